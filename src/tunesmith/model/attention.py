"""Attention over documents laid end to end: each sees only itself, no padding, no dense mask.

Registered with transformers under a name of our own, and a model uses it only inside `documents_attend(model)`: other
models, other trainers and generation never notice.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from tunesmith.model.cpu import has_half_products
from tunesmith.model.product_attention import MEAN, ProductAttention, longest_document

NAME = "tunesmith_documents"
HALF = (torch.float16, torch.bfloat16)

SHORT_DOCUMENT = 512
"""Tokens up to which a CPU attends faster in float32 than in bfloat16."""

# FlashAttention's variable-length backward indexes (tokens + 128 · documents) · heads · head_dim with 32 bits.
FLASH_INDEX_LIMIT = 2**31


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    document_lengths: tuple[int, ...] | None = None,
    cu_seq_lens_q: Tensor | None = None,
    shared_prefix: tuple[int, int] = (0, 0),
    **special: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document.

    Args:
        query: (1, heads, T, D); key and value: (1, kv_heads, T, D), T the tokens of all documents.
        document_lengths: tokens per document on the host; sums to T.
        cu_seq_lens_q: (documents + 1,) int32 on the device, the same boundaries.
        shared_prefix: (tokens, documents): so many documents begin with the first so many tokens of the first one,
            and only there do these tokens stand.
        special: other attention arguments; soft-caps and sinks are refused.

    Returns: (1, T, heads, D) and no weights.
    Raises: NotImplementedError for what it cannot do exactly; the start-up check then chooses another way.
    """
    if document_lengths is None or query.shape[0] != 1 or not getattr(module, "is_causal", True):
        raise NotImplementedError("document attention needs one causal row with known boundaries")
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if special.get(name) is not None:
            raise NotImplementedError(f"document attention has no {name}")
    if query.is_cuda and torch.is_autocast_enabled("cuda"):  # rope leaves queries and keys in float32
        query, key, value = (one.to(torch.get_autocast_dtype("cuda")) for one in (query, key, value))
    if dropout == 0.0 and suit_products(value.dtype, value.device.type, document_lengths, sliding_window):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = (states[0].transpose(0, 1) for states in (query, key, value))
        output = ProductAttention.apply(*states, document_lengths, shared_prefix, scale).unsqueeze(0)
    elif shared_prefix[0]:
        output = sharing_documents(query, key, value, document_lengths, shared_prefix, scaling, sliding_window)
    elif query.is_cuda and query.dtype in HALF and dropout == 0.0:
        output = flash_documents(query, key, value, document_lengths, cu_seq_lens_q, scaling, sliding_window)
    else:
        output = looped_documents(query, key, value, document_lengths, scaling, dropout, sliding_window)
    return output, None


def suit_products(dtype: torch.dtype, device: str, lengths: tuple[int, ...], window: int | None = None) -> bool:
    """Whether documents with values of this type attend fastest by `ProductAttention`."""
    if dtype != torch.bfloat16 or device != "cpu" or not has_half_products():
        return False
    longest = max(lengths)
    return longest <= longest_document() and sum(lengths) >= MEAN * len(lengths) and not (window and longest > window)


def looped_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """One SDPA call per document; shapes as in `document_attention`. CPUs have a flash kernel for it."""
    # split, not slicing: its backward concatenates, where slices would each add a zero-filled full tensor
    parts = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2))
    outputs = [attend_document(*part, scaling, dropout, window) for part in parts]
    return torch.cat(outputs, dim=2).transpose(1, 2)


def sharing_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    shared_prefix: tuple[int, int],
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """`looped_documents` where documents share a prefix: each attends with it in front, and leaves its output out."""
    tokens, count = shared_prefix
    parts = list(zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)))
    prefix = [part[:, :, :tokens] for part in parts[0]]
    prefix[0] = prefix[0].detach()  # what these queries find is left out, so they have no gradient
    outputs = [attend_document(*parts[0], scaling, 0.0, window)]
    for index, part in enumerate(parts[1:], start=1):
        if index < count:
            whole = [torch.cat(pair, dim=2) for pair in zip(prefix, part)]
            outputs.append(attend_document(*whole, scaling, 0.0, window)[:, :, tokens:])
        else:
            outputs.append(attend_document(*part, scaling, 0.0, window))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def attend_document(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of one document, (1, heads, L, D)."""
    length = query.shape[2]
    windowed = bool(window and length > window)
    return attend(
        query,
        key,
        value,
        attn_mask=window_mask(length, window, query.device) if windowed else None,
        is_causal=not windowed,
        dropout_p=dropout,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA, in float32 where that is the faster; more exact it is anyway.

    The backward pass of the CPU's flash kernel takes two to three times as long in bfloat16 for short documents.
    """
    if value.device.type == "cuda" and (value.dtype == torch.float32 or options["attn_mask"] is not None):
        # only the flash kernel shares key heads, and it takes neither: torch would form all scores and keep them
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], dim=1) for heads in (key, value))
        options["enable_gqa"] = False
    is_slow = value.device.type == "cpu" and value.dtype == torch.bfloat16 and query.shape[2] <= SHORT_DOCUMENT
    if not is_slow:
        return F.scaled_dot_product_attention(query, key, value, **options)
    with torch.autocast("cpu", enabled=False):  # it would cast them back
        whole = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), **options)
    return whole.to(value.dtype)


def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool: position i sees j where i - window < j <= i."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    return (distance >= 0) & (distance < window)


def flash_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    cu_seq_lens: Tensor,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """FlashAttention over all documents in one call, in several where its 32-bit indices would overflow."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (T, heads, D)
    width = query.shape[1] * -(-query.shape[3] // 32) * 32
    outputs, begin, first = [], 0, 0
    for last in groups_below_limit(lengths, width):
        tokens = sum(lengths[first:last])
        bounds = cu_seq_lens if last - first == len(lengths) else cu_seq_lens[first : last + 1] - cu_seq_lens[first]
        part = slice(begin, begin + tokens)
        outputs.append(varlen(q[part], k[part], v[part], bounds, max(lengths[first:last]), scaling, window))
        begin, first = begin + tokens, last
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0)


def groups_below_limit(lengths: tuple[int, ...], width: int, limit: int = FLASH_INDEX_LIMIT) -> list[int]:
    """Ends of consecutive groups of documents, each with (tokens + 128 · documents) · width below `limit`.

    >>> groups_below_limit((100, 100, 100), width=1, limit=500)
    [2, 3]
    """
    ends, size = [], 0
    for index, length in enumerate(lengths):
        cost = (length + 128) * width
        if size and size + cost >= limit:
            ends.append(index)
            size = 0
        size += cost
    return [*ends, len(lengths)]


def varlen(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scaling: float | None, window: int | None):
    """Torch's `varlen_attn`, whose arguments moved between 2.10 and 2.12. q: (tokens, heads, D)."""
    function, known = varlen_function()
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (window - 1 if window else -1, 0)
    elif window and longest > window:
        raise NotImplementedError("this torch has no sliding windows in varlen_attn")
    else:
        options["is_causal"] = True
    if "enable_gqa" in known:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    elif q.shape[1] != k.shape[1]:
        k, v = (tensor.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for tensor in (k, v))
    if "num_splits" in known:
        options["num_splits"] = 1  # results do not depend on what else is in the batch
    if scaling is not None:
        if "scale" in known:
            options["scale"] = scaling
        else:
            q = q * (scaling * q.shape[-1] ** 0.5)
    return function(q, k, v, bounds, bounds, longest, longest, **options)


@cache
def varlen_function():
    """`varlen_attn` and the names of its parameters."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@contextmanager
def documents_attend(configs: list[Any]) -> Iterator[None]:
    """Inside, the model whose `attention_configs` these are attends with `document_attention`.

    Cover the backward pass too: gradient checkpointing runs layers again there.
    """
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        for config, name in zip(configs, before):
            config._attn_implementation = name


def attention_configs(model: nn.Module) -> list[Any]:
    """Every config object that a layer of `model` asks for its attention, once each."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in configs.values() if hasattr(config, "_attn_implementation")]


# Without a mask function of the same name transformers builds no mask at all, which is what flat documents need.
AttentionInterface.register(NAME, document_attention)
