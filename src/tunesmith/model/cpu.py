"""Which instructions this CPU has: matrix ones decide in which of several ways a product is formed fastest."""

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


@cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX)."""
    return torch.cpu._is_amx_tile_supported()


@cache
def has_half_products() -> bool:
    """Whether this CPU multiplies bfloat16 at all, in tiles or in vectors (AVX512_BF16)."""
    return has_tiles() or torch.cpu._is_avx512_bf16_supported()


@cache
def instructions() -> str:
    """A name for all instructions of this CPU that torch may use, such as `avx512-1f0c2a9b`."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    digest = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return f"{torch.backends.cpu.get_cpu_capability().lower()}-{digest}"
