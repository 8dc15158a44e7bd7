"""Liger's kernels against transformers' own layers, where there is a GPU and liger-kernel is installed."""

import pytest
import torch

from tests.gpu.test_gpu import build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


# trainer: J4
def test_a_model_with_ligers_kernels_computes_the_same(make_tiny_model, monkeypatch):
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    from tunesmith.model.liger import apply_liger

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # Liger replaces them for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    model = build(make_tiny_model).cuda()
    ids = torch.arange(24, device="cuda").reshape(2, 12)
    expected = model(input_ids=ids, use_cache=False).logits
    apply_liger(model)
    assert "Liger" in repr(model.model.norm)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-3, rtol=1e-3)
