"""What only a GPU can do with quantized bases, and FlashAttention 2 as transformers has it."""

import pytest
import torch
from peft import LoraConfig
from transformers.utils import is_flash_attn_2_available

from tests import tiny
from tests.gpu.device import GPU, ON_CUDA, adapters_that_do_something, cuda_only, distance, marks
from tests.model.test_quantize import dense_copy
from tests.train.rows import first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.model.adapt import attach
from tunesmith.model.load import load_model
from tunesmith.model.quantize import is_quantized, multiply_in, prepare_for_kbit_training

pytestmark = marks

LORA = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    tiny.make_tiny_model(**shape).to(torch.bfloat16).save_pretrained(path)
    return str(path)


# trainer: H5 H8
@pytest.mark.parametrize(
    "bits", [{"load_in_4bit": True}, {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {"load_in_8bit": True}]
)
def test_adapters_on_a_quantized_base_learn_in_bfloat16(folder, byte_tokenizer, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    model = load_model(folder, dtype="bfloat16", **bits)
    assert is_quantized(model)
    assert model.device.type == ("cuda" if ON_CUDA else "cpu")
    multiply_in(model, torch.bfloat16)
    options = {**GPU, "bf16": True, "max_steps": 20, "learning_rate": 5e-3}
    trainer = make_trainer(model, byte_tokenizer, token_rows(), tmp_path, peft_config=LoraConfig(**LORA), **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_gradients_on_a_4_bit_base_are_those_of_its_dense_weights(folder, byte_tokenizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    packed = load_model(folder, dtype="bfloat16", load_in_4bit=True)
    dense = attach(dense_copy(folder, packed).float().cpu(), LoraConfig(**LORA))
    wrapped = attach(packed, LoraConfig(**LORA))
    for model in (dense, wrapped):
        adapters_that_do_something(model)
    rows = token_rows()
    loss, gradients = first_gradients(make_trainer(wrapped, byte_tokenizer, rows, tmp_path, bf16=True, **GPU))
    expected = reference_gradients(dense, rows)
    assert loss == pytest.approx(expected[0], rel=1e-2)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert distance(gradient, expected[1][name]) < 0.1, name


# trainer: H8
@cuda_only
def test_queries_over_a_quantized_base_stay_in_half_precision(folder):
    """Float32 queries would miss the flash kernel; peft's own preparation makes them so."""
    pytest.importorskip("bitsandbytes")
    model, seen = load_model(folder, dtype="bfloat16", load_in_4bit=True), []
    layer = prepare_for_kbit_training(model).model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(torch.arange(8, device="cuda").unsqueeze(0))
    assert seen == [torch.bfloat16]


# trainer: H8
@cuda_only
@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}])
def test_flash_attention_2_agrees_with_sdpa_on_padded_rows(folder, bits):
    if not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed")
    ids = torch.arange(24, device="cuda").reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    logits = []
    for attention in ("flash_attention_2", "sdpa"):
        model = load_model(folder, dtype="bfloat16", attn_implementation=attention, **bits).cuda()
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask).logits[mask.bool()].float())
    torch.testing.assert_close(logits[0], logits[1], atol=2e-2, rtol=2e-2)
