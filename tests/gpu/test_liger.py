"""Liger's kernels against transformers' own layers, where there is a GPU and liger-kernel is installed."""

import pytest
import torch
from peft import LoraConfig

from tests.gpu.device import GPU, LORA, build, cuda_only, distance, marks
from tests.train.rows import first_gradients, make_trainer, token_rows

pytestmark = [*marks, cuda_only]


@pytest.fixture(autouse=True)
def ligers_layers_go_again(monkeypatch):
    """Liger replaces them for the whole process."""
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


# trainer: J4
def test_a_model_with_ligers_kernels_computes_the_same():
    from tunesmith.model.liger import apply_liger

    model = build().cuda()
    ids = torch.arange(24, device="cuda").reshape(2, 12)
    expected = model(input_ids=ids, use_cache=False).logits
    apply_liger(model)
    assert "Liger" in repr(model.model.norm)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_with_ligers_kernels_are_the_same(byte_tokenizer, tmp_path, lora):
    found = []
    for liger in (False, True):
        torch.manual_seed(0)
        peft_config = LoraConfig(**LORA) if lora else None
        options = {"bf16": True, "use_liger_kernel": liger, "peft_config": peft_config, **GPU}
        found.append(first_gradients(make_trainer(build(), byte_tokenizer, token_rows(), tmp_path, **options)))
    assert found[1][0] == pytest.approx(found[0][0], rel=5e-3)
    for name, gradient in found[0][1].items():
        if gradient.any():  # B is zero at first, so A has none
            assert distance(found[1][1][name], gradient) < 8e-2, name
