"""Decoder layers compiled one by one: norms, rope, gated MLPs and residuals become a few passes over memory.

    layer.forward ── torch.compile ──► [norm, q k v, rope] ─ attention as it is ─ [o, residual, norm, MLP, residual]

All layers of a model share one compiled form, for any number of tokens. Attention stays out of it: its loop over
documents would be compiled anew for every batch. Linear layers that train form their weight gradients as
`turned_linear` does. Weights, names and checkpoints are untouched, and outside `CompiledLayers.run` the model is as it
was.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from tunesmith.model.attention import NAME, document_attention
from tunesmith.model.cpu import instructions
from tunesmith.model.turned_linear import gains, turned_forward

COMPILERS = ("c++", "g++", "clang++")


class CompiledLayers:
    """The compiled forward passes of a model's decoder layers; nothing is compiled before they first run."""

    def __init__(self, model: nn.Module):
        keep_apart()
        AttentionInterface.register(NAME, torch.compiler.disable(document_attention))
        self.model = model
        self.layers: list[tuple[nn.Module, Callable]] = [
            (layer, torch.compile(layer.forward, dynamic=True)) for layer in separate_layers(model)
        ]
        inside = (module for layer, _ in self.layers for module in layer.modules())
        self.linears = [(module, MethodType(turned_forward, module)) for module in inside if gains(module)]

    @contextmanager
    def run(self) -> Iterator[None]:
        """Inside, the layers run compiled. Cover the backward pass too, for gradient checkpointing."""
        try:
            for layer, forward in [*self.layers, *self.linears]:
                layer.forward = forward
            yield
        finally:
            for layer, _ in [*self.layers, *self.linears]:
                layer.__dict__.pop("forward", None)


def keep_apart() -> None:
    """Have Inductor's cache in a folder of this CPU's instructions, inside the one that the person or torch chose.

    Its keys do not name them (torch 2.13). Loops written for AVX-512 and found again where torch uses AVX2 leave half
    of their values unwritten, and machine code that it was native to may end the process on another CPU.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(cache_dir())
    if folder.name != instructions():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / instructions())


def separate_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers checkpoints one by one, but for those whose forward pass somebody has replaced."""
    return [
        module
        for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and "forward" not in module.__dict__
    ]


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` calls for a CPU, if there is one."""
    names = (os.environ.get("CXX"), *COMPILERS)
    return next((found for name in names if name and (found := shutil.which(name))), None)
