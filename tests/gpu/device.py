"""Where the GPU tests run: on CUDA, else nowhere; TUNESMITH_GPU_DRY_RUN=1 tries the tests themselves on the CPU."""

import os

import pytest
import torch

from tests import tiny

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
DRY_RUN = not ON_CUDA and os.environ.get("TUNESMITH_GPU_DRY_RUN") == "1"
marks = [pytest.mark.gpu, pytest.mark.skipif(not ON_CUDA and not DRY_RUN, reason="no CUDA device on this machine")]
cuda_only = pytest.mark.skipif(not ON_CUDA, reason="there is nothing of it on a CPU")

GPU = {"use_cpu": not ON_CUDA}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
HEAD_DIM = 32  # FlashAttention takes multiples of eight


def build(**config):
    """A tiny model whose heads FlashAttention takes, in float32 on the CPU."""
    shape = {"hidden_size": 4 * HEAD_DIM, "intermediate_size": 256, "head_dim": HEAD_DIM}
    return tiny.make_tiny_model(**{**shape, **config})


def adapters_that_do_something(model, seed: int = 0) -> None:
    """Fill LoRA's matrices by name from `seed`; B begins as zeros, which leave A without gradients."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator) / 10
            parameter.data = drawn.to(parameter.device, parameter.dtype)


def distance(found, expected) -> float:
    """‖found - expected‖ / ‖expected‖ in float64; NaN stays NaN, which passes no comparison."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm()).item()
