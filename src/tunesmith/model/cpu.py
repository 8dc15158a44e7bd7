"""Which matrix instructions this CPU has: they decide in which of several ways a product is formed fastest."""

from functools import cache

import torch


@cache
def has_tiles() -> bool:
    """Whether this CPU multiplies bfloat16 in tiles (AMX)."""
    return torch.cpu._is_amx_tile_supported()


@cache
def has_half_products() -> bool:
    """Whether this CPU multiplies bfloat16 at all, in tiles or in vectors (AVX512_BF16)."""
    return has_tiles() or torch.cpu._is_avx512_bf16_supported()
