"""The CUDA path against float32 references on the CPU; `scripts/gpu_check.sh` runs these where a GPU is at hand."""

import copy

import pytest
import torch
from torch import nn

from tests.model.test_attention import LENGTHS, plain, tensors
from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.model.attention import document_attention
from tunesmith.train.loss import head_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

HEAD_DIM = 32  # FlashAttention takes multiples of eight
HALF_TOLERANCE = {"atol": 2e-2, "rtol": 2e-2}


def build(make_tiny_model, **config):
    shape = {"hidden_size": 4 * HEAD_DIM, "intermediate_size": 256, "head_dim": HEAD_DIM}
    return make_tiny_model(**{**shape, **config})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 3])
def test_document_attention_equals_float32(dtype, window):
    states = [tensor.to(dtype) for tensor in tensors(dim=HEAD_DIM)]
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32).cuda()
    leaves = [state.cuda().requires_grad_() for state in states]
    found, _ = document_attention(
        nn.Module(), *leaves, None, document_lengths=LENGTHS, cu_seq_lens_q=bounds, sliding_window=window
    )
    found.float().pow(2).sum().backward()
    references = [state.float().requires_grad_() for state in states]
    expected = plain(*references, window)
    expected.pow(2).sum().backward()
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else HALF_TOLERANCE
    torch.testing.assert_close(found.float().cpu(), expected, **tolerance)
    for leaf, reference in zip(leaves, references):
        torch.testing.assert_close(leaf.grad.float().cpu(), reference.grad, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_equals_float32(dtype):
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=False)
    hidden, targets = torch.randn(300, 64), torch.randint(0, 1000, (300,))
    expected = nn.functional.cross_entropy(head(hidden), targets, reduction="sum")
    expected.backward()
    moved = copy.deepcopy(head).cuda().to(dtype)
    moved.zero_grad()
    found = head_loss(moved, moved.forward, hidden.cuda().to(dtype), targets.cuda())
    found.loss.backward()
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if dtype == torch.float32 else {"atol": 5e-1, "rtol": 5e-2}
    torch.testing.assert_close(found.loss.cpu(), expected.detach(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(moved.weight.grad.float().cpu(), head.weight.grad, **tolerance)


@pytest.mark.parametrize("layout", [{}, {"padding_free": False}, {"packing": True, "max_length": 32}])
def test_every_layout_equals_the_float32_loop_on_the_cpu(make_tiny_model, byte_tokenizer, tmp_path, layout):
    rows = token_rows()
    expected = reference_gradients(build(make_tiny_model), rows)
    trainer = make_trainer(build(make_tiny_model), byte_tokenizer, rows, tmp_path, use_cpu=False, **layout)
    loss, gradients = first_gradients(trainer)
    assert_same((loss, {name: gradient.cpu() for name, gradient in gradients.items()}), expected, tolerance=1e-4)


def test_packed_equals_unpacked_in_bfloat16(make_tiny_model, byte_tokenizer, tmp_path):
    rows, options = token_rows(), {"use_cpu": False, "bf16": True}
    losses = []
    for layout in ({}, {"packing": True, "max_length": 32}, {"per_device_train_batch_size": 1}):
        accumulation = {"gradient_accumulation_steps": 8} if "per_device_train_batch_size" in layout else {}
        trainer = make_trainer(
            build(make_tiny_model), byte_tokenizer, rows, tmp_path, **options, **layout, **accumulation
        )
        assert trainer.support.layout == "documents"
        losses.append(first_gradients(trainer)[0])
    assert losses == pytest.approx([losses[0]] * 3, rel=2e-3)


@pytest.mark.parametrize("bf16", [True, False])
def test_twenty_steps_lower_the_loss(make_tiny_model, byte_tokenizer, tmp_path, bf16):
    rows = token_rows()
    options = {"use_cpu": False, "bf16": bf16, "max_steps": 20, "num_train_epochs": 20, "learning_rate": 5e-3}
    trainer = make_trainer(build(make_tiny_model), byte_tokenizer, rows, tmp_path, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
