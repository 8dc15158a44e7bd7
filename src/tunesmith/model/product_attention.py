"""Causal attention within documents as plain matrix products, for CPUs that multiply bfloat16 (AMX, AVX512_BF16).

    scores = q · kᵀ in float32 ── softmax of what each query sees ──► shares in bfloat16 ── shares · v ──► attended
    backward: four products in bfloat16, from the shares, which are kept

torch's flash kernel forms the scores a second time instead, in products that do not reach the tiles: for documents of
some hundred tokens it takes up to a third longer, on CPUs without tiles twice as long (docs/log.md). Heads that share
a key are rows of one product.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tunesmith.model.cpu import has_tiles

MEAN = 96
"""Tokens of a mean document from which on this is the fastest way."""
LONGEST, LONGEST_IN_TILES = 1024, 768
"""Tokens of a document up to which it is worth it: without tiles for what the shares take of memory, with them it is
slower beyond."""
BLOCK = 192
"""Queries that attend at once, about; what none of them sees is not computed."""
STEP = 32
"""Products have multiples of this many rows and columns: for every new shape oneDNN compiles, for 1 to 5 ms."""


def longest_document() -> int:
    """Tokens up to which documents attend this way on this machine."""
    return LONGEST_IN_TILES if has_tiles() else LONGEST


class ProductAttention(torch.autograd.Function):
    """Attention of documents that stand end to end, `count` of them beginning with the first `tokens` of the first.

    query: (T, heads, D); key, value: (T, kv_heads, D); lengths: tokens of each document; shared_prefix: (tokens,
    count); scale: the scores' factor. Returns (T, heads, D) in the type of `value`, in which all products but the
    scores are formed. Rows that only pad a product are given no gradient and so add nothing.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # it would form the scores in bfloat16
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        shared_prefix: tuple[int, int],
        scale: float,
    ) -> Tensor:
        """Attended values; keeps the shares."""
        groups, half = key.shape[1], value.dtype
        attended = torch.empty_like(query, dtype=half, memory_format=torch.contiguous_format)
        queries, found = by_group(query, groups), by_group(attended, groups)
        keys, values = by_group(key, groups), by_group(value, groups)
        kept = []
        for document in documents(lengths, shared_prefix):
            own_keys = gathered(keys, document, torch.float32).mul_(scale)
            own_values = gathered(values, document, half)
            kept += [own_keys.to(half), own_values]
            for begin, end, first, seen in blocks(document):
                rows = padded(queries[:, begin:end], torch.float32)
                scores = torch.bmm(rows.flatten(1, 2), own_keys[:, :seen].mT).view(*rows.shape[:3], seen)
                shares = causal_softmax(scores, first).to(half)
                part = torch.bmm(shares.flatten(1, 2), own_values[:, :seen]).view(rows.shape)
                found[:, begin:end] = part[:, : end - begin]
                kept += [rows.to(half), shares]
        ctx.save_for_backward(attended, *kept)
        ctx.plan = lengths, shared_prefix, scale
        ctx.types = query.dtype, key.dtype, half
        return attended

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        attended, *kept = ctx.saved_tensors
        lengths, shared_prefix, scale = ctx.plan
        half, groups, left = ctx.types[2], len(kept[0]), iter(kept)
        by_query = torch.empty_like(attended, dtype=ctx.types[0])
        by_key, by_value = (attended.new_empty(len(grad), groups, grad.shape[2], dtype=one) for one in ctx.types[1:])
        common = (grad.float() * attended).sum(-1, keepdim=True)  # what the softmax takes off each row
        above, common, grad_queries = (by_group(one, groups) for one in (grad, common, by_query))
        prefix_sums = torch.zeros(2, groups, shared_prefix[0], grad.shape[2])
        for document in documents(lengths, shared_prefix):
            keys, values = next(left), next(left)
            sums = torch.zeros(2, *keys.shape)  # gradients of keys and values
            for begin, end, _first, seen in blocks(document):
                rows, shares = next(left), next(left)
                given = padded(above[:, begin:end], half).flatten(1, 2)
                errors = torch.bmm(given, values[:, :seen].mT).view(shares.shape)
                errors.sub_(padded(common[:, begin:end], half)).mul_(shares)  # the gradient by the scores
                errors, shares = errors.flatten(1, 2), shares.flatten(1, 2)
                sums[0, :, :seen] += torch.bmm(errors.mT, rows.flatten(1, 2))
                sums[1, :, :seen] += torch.bmm(shares.mT, given)
                part = torch.bmm(errors, keys[:, :seen]).view(rows.shape)
                grad_queries[:, begin:end] = part[:, : end - begin]
            if document.ahead:
                prefix_sums += sums[:, :, : document.ahead]
            own = sums[:, :, document.ahead : document.positions].transpose(1, 2)
            torch.mul(own[0], scale, out=by_key[document.begin : document.end])
            by_value[document.begin : document.end] = own[1]
        if shared_prefix[0]:
            by_key[: shared_prefix[0]] += prefix_sums[0].transpose(0, 1) * scale
            by_value[: shared_prefix[0]] += prefix_sums[1].transpose(0, 1)
        return by_query, by_key, by_value, None, None, None


class Document(NamedTuple):
    """Where a document stands, and how many tokens it has in front of it that stand elsewhere."""

    begin: int
    end: int
    ahead: int

    @property
    def positions(self) -> int:
        """Tokens that its last query sees."""
        return self.ahead + self.end - self.begin


def documents(lengths: tuple[int, ...], shared_prefix: tuple[int, int]) -> Iterator[Document]:
    """The documents in their order; all but the first of those that share a prefix find it in the first."""
    tokens, count = shared_prefix
    begin = 0
    for index, length in enumerate(lengths):
        yield Document(begin, begin + length, tokens if 0 < index < count else 0)
        begin += length


def blocks(document: Document) -> Iterator[tuple[int, int, int, int]]:
    """About equal blocks of queries: their begin and end, the first one's position, and keys to look at.

    >>> list(blocks(Document(1000, 1500, 20)))
    [(1000, 1167, 20, 192), (1167, 1334, 187, 384), (1334, 1500, 354, 544)]
    """
    queries = document.end - document.begin
    size = -(-queries // max(1, round(queries / BLOCK)))
    for begin in range(document.begin, document.end, size):
        end = min(begin + size, document.end)
        first = document.ahead + begin - document.begin
        yield begin, end, first, rounded(first + end - begin)


def share_values(lengths: tuple[int, ...], heads: int) -> int:
    """How many shares are kept for the backward pass."""
    parts = (part for document in documents(lengths, (0, 0)) for part in blocks(document))
    return heads * sum(rounded(end - begin) * seen for begin, end, _first, seen in parts)


def rounded(rows: int) -> int:
    """The next multiple of `STEP`."""
    return -(-rows // STEP) * STEP


def by_group(states: Tensor, groups: int) -> Tensor:
    """(T, heads, D) as (groups, T, heads / groups, D), in the same memory."""
    return states.unflatten(1, (groups, -1)).transpose(0, 1)


def padded(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """(groups, n, heads, D) copied to (groups, rounded(n), heads, D), with zeros behind."""
    groups, n, *rest = rows.shape
    result = rows.new_empty((groups, rounded(n), *rest), dtype=dtype)
    result[:, :n] = rows
    if n < rounded(n):
        result[:, n:] = 0
    return result


def gathered(states: Tensor, document: Document, dtype: torch.dtype) -> Tensor:
    """What a document looks at, of (kv_heads, T, 1, D): (kv_heads, rounded(positions), D) with zeros behind."""
    result = states.new_zeros((len(states), rounded(document.positions), states.shape[3]), dtype=dtype)
    result[:, : document.ahead] = states[:, : document.ahead, 0]
    result[:, document.ahead : document.positions] = states[:, document.begin : document.end, 0]
    return result


def causal_softmax(scores: Tensor, first: int) -> Tensor:
    """Softmax in place of (groups, rows, heads, keys): the i-th row sees keys up to `first + i`."""
    rows, keys = scores.shape[1], scores.shape[3]
    scores[..., first:] += later_keys()[:rows, None, : keys - first]
    return torch.softmax(scores, -1, out=scores)


@cache
def later_keys() -> Tensor:
    """-inf where a key stands behind its query; larger than any block of `blocks`, padding included."""
    size = rounded(BLOCK * 3 // 2) + 2 * STEP
    return torch.full((size, size), float("-inf")).triu(1)
