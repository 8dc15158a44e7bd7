"""Attention as matrix products against the same attention through torch's kernel, forward and backward."""

import pytest
import torch
from torch import nn

from tunesmith.model import attention, product_attention
from tunesmith.model.attention import document_attention
from tunesmith.model.product_attention import Document, ProductAttention, blocks, rounded

LENGTHS = {"one block": (40, 96, 1), "blocks": (300, 7, 611), "multiples": (64, 192, 32)}


def states(lengths, heads=6, kv_heads=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, sum(lengths), dim) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def by_kernel(tensors, lengths, prefix, scale):
    if prefix[0]:
        return attention.sharing_documents(*tensors, lengths, prefix, scale, None)
    return attention.looped_documents(*tensors, lengths, scale, 0.0, None)


def by_products(tensors, lengths, prefix, scale):
    return ProductAttention.apply(*(one[0].transpose(0, 1) for one in tensors), lengths, prefix, scale).unsqueeze(0)


def with_gradients(function, tensors, *arguments):
    found = function(tensors, *arguments)
    above = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
    return found, *torch.autograd.grad(found, tensors, above)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("prefix", [(0, 0), (5, 3), (5, 2)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_in_float32_it_is_the_kernel_s(lengths, prefix, kv_heads):
    tensors = states(lengths, kv_heads=kv_heads)
    expected = with_gradients(by_kernel, tensors, lengths, prefix, 0.3)
    found = with_gradients(by_products, tensors, lengths, prefix, 0.3)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", ["queries and keys in float32", "all in bfloat16"])
def test_in_bfloat16_it_is_about_as_near_as_the_kernel_in_bfloat16(whole):
    lengths = (300, 130)
    exact = [one.detach().bfloat16().float().requires_grad_() for one in states(lengths)]
    expected = with_gradients(by_kernel, exact, lengths, (0, 0), 0.25)
    half = [one.detach().bfloat16().requires_grad_() for one in exact]
    kernel = with_gradients(half_kernel, half, lengths)
    given = half if whole == "all in bfloat16" else [*exact[:2], half[2]]
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(by_products, given, lengths, (0, 0), 0.25)
    assert [one.dtype for one in found] == [torch.bfloat16, *(one.dtype for one in given)]
    for ours, theirs, truth in zip(found, kernel, expected):
        distance, allowed = ((one.float() - truth).norm() / truth.norm() for one in (ours, theirs))
        assert distance < 1.5 * allowed + 1e-3


def half_kernel(tensors, lengths):
    """SDPA in bfloat16, document by document."""
    parts = zip(*(one.split(lengths, 2) for one in tensors))
    outputs = [
        nn.functional.scaled_dot_product_attention(*part, is_causal=True, scale=0.25, enable_gqa=True)
        for part in parts
    ]
    return torch.cat(outputs, 2).transpose(1, 2)


def test_blocks_cover_every_query_once_and_see_all_before_it():
    for length in (1, 31, 32, 287, 288, 289, 768):
        for ahead in (0, 3, 700):
            document = Document(50, 50 + length, ahead)
            parts = list(blocks(document))
            assert [query for begin, end, *_ in parts for query in range(begin, end)] == list(range(50, 50 + length))
            for begin, end, first, seen in parts:
                assert first == ahead + begin - 50
                assert seen == rounded(first + end - begin)
                size = len(product_attention.later_keys())
                assert rounded(end - begin) <= size
                assert seen - first <= size


@pytest.mark.parametrize(
    ("case", "chosen"),
    [
        ({}, True),
        ({"lengths": (96,)}, True),
        ({"lengths": (95,)}, False),
        ({"lengths": (768,), "tiles": True}, True),
        ({"lengths": (769,), "tiles": True}, False),
        ({"lengths": (1024,)}, True),
        ({"lengths": (1025,)}, False),
        ({"lengths": (30, 30, 400)}, True),
        ({"dtype": torch.float32}, False),
        ({"half_products": False}, False),
        ({"window": 100}, False),
        ({"window": 200}, True),
        ({"dropout": 0.1}, False),
    ],
)
def test_where_it_is_taken(monkeypatch, case, chosen):
    lengths = case.get("lengths", (100, 200))
    monkeypatch.setattr(attention, "has_half_products", lambda: case.get("half_products", True))
    monkeypatch.setattr(product_attention, "has_tiles", lambda: case.get("tiles", False))
    calls = []
    monkeypatch.setattr(ProductAttention, "apply", lambda *given: calls.append(given) or given[0])
    tensors = states(lengths, dtype=case.get("dtype", torch.bfloat16))
    document_attention(
        nn.Module(),
        *tensors,
        None,
        document_lengths=lengths,
        sliding_window=case.get("window"),
        dropout=case.get("dropout", 0.0),
    )
    assert bool(calls) == chosen


def test_the_answer_is_laid_out_as_the_model_wants_it(monkeypatch):
    monkeypatch.setattr(attention, "has_half_products", lambda: True)
    tensors = states((100, 200), dtype=torch.bfloat16)
    found, weights = document_attention(nn.Module(), *tensors, None, document_lengths=(100, 200))
    assert weights is None
    assert found.shape == (1, 300, 6, 16)
    expected = by_kernel(tensors, (100, 200), (0, 0), 16**-0.5)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
