"""Document attention against attention over each document alone."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunesmith.model import attention
from tunesmith.model.attention import document_attention, documents_attend, groups_below_limit, window_mask

LENGTHS = (5, 1, 9)


def tensors(heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, count, sum(LENGTHS), dim, generator=generator) for count in (heads, kv_heads, kv_heads)]


def plain(query, key, value, window=None, scaling=None):
    """softmax(q·k) v with every number written out, one document at a time."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    outputs = []
    for q, k, v in zip(query.split(LENGTHS, 2), key.split(LENGTHS, 2), value.split(LENGTHS, 2)):
        scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
        seen = window_mask(q.shape[2], window or 10**6, q.device)
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_each_document_attends_to_itself_alone(kv_heads, window, scaling):
    states = tensors(kv_heads=kv_heads)
    found, _ = document_attention(
        nn.Module(), *states, None, document_lengths=LENGTHS, sliding_window=window, scaling=scaling
    )
    torch.testing.assert_close(found, plain(*states, window, scaling))


def test_a_window_sees_that_many_tokens():
    assert window_mask(4, 2, torch.device("cpu")).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]


@pytest.mark.parametrize("autocast", [True, False])
def test_short_documents_in_bfloat16_are_attended_in_float32_on_a_cpu(monkeypatch, autocast):
    monkeypatch.setattr(attention, "SHORT_DOCUMENT", 5)  # the third document is a long one
    half = [tensor.bfloat16().requires_grad_() for tensor in tensors()]
    whole = [tensor.detach().float().requires_grad_() for tensor in half]
    expected = plain(*whole)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, _ = document_attention(nn.Module(), *half, None, document_lengths=LENGTHS)
    assert found.dtype == torch.bfloat16
    short = sum(LENGTHS[:2])
    torch.testing.assert_close(found[:, :short], expected[:, :short].bfloat16(), rtol=2**-8, atol=1e-6)  # one rounding
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)
    grads = [
        torch.autograd.grad(output.float().square().sum(), states)
        for output, states in ((found, half), (expected, whole))
    ]
    for ours, theirs in zip(*grads):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("special", ["softcap", "s_aux"])
def test_what_it_cannot_do_exactly_it_refuses(special):
    with pytest.raises(NotImplementedError, match=special):
        document_attention(nn.Module(), *tensors(), None, document_lengths=LENGTHS, **{special: 1.0})


def test_without_boundaries_it_refuses():
    with pytest.raises(NotImplementedError, match="known boundaries"):
        document_attention(nn.Module(), *tensors(), None)


def test_groups_stay_below_the_index_limit_of_the_kernel():
    ends = groups_below_limit((1000,) * 10, width=4, limit=10_000)
    sizes = [end - begin for begin, end in zip([0, *ends], ends)]
    assert sum(sizes) == 10
    assert all(size * (1000 + 128) * 4 < 10_000 for size in sizes)


def old_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """The signature of torch 2.10: no groups, no scale."""
    assert is_causal
    assert query.shape == key.shape
    return attention_by_bounds(query, key, value, cu_seq_q, query.shape[-1] ** -0.5)


def new_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    num_splits=None,
):
    """The signature of torch 2.13."""
    assert window_size == (-1, 0)
    assert enable_gqa
    assert num_splits == 1
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    return attention_by_bounds(query, key, value, cu_seq_q, scale or query.shape[-1] ** -0.5)


def attention_by_bounds(query, key, value, bounds, scale):
    lengths = bounds.diff().tolist()
    outputs = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
        q, k, v = (tensor.transpose(0, 1) for tensor in (q, k, v))
        outputs.append(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1)
        )
    return torch.cat(outputs)


@pytest.mark.parametrize("function", [old_varlen, new_varlen])
@pytest.mark.parametrize("limit", [2**31, 3000])
def test_the_flash_path_serves_every_signature_of_varlen(monkeypatch, function, limit):
    import inspect

    monkeypatch.setattr(
        attention, "varlen_function", lambda: (function, frozenset(inspect.signature(function).parameters))
    )
    monkeypatch.setattr(attention, "groups_below_limit", lambda lengths, width: groups_below_limit(lengths, 8, limit))
    states = tensors()
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    found = attention.flash_documents(*states, LENGTHS, bounds, 0.3, None)
    torch.testing.assert_close(found, plain(*states, scaling=0.3))


def test_a_model_attends_this_way_only_inside(tiny_model):
    configs = attention.attention_configs(tiny_model)

    def fail_inside():
        with documents_attend(configs):
            assert tiny_model.config._attn_implementation == attention.NAME
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_inside()
    assert tiny_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("dtype", "window", "repeated"), [("float32", None, True), ("bfloat16", 3, True), ("bfloat16", None, False)]
)
def test_key_heads_are_repeated_where_no_fast_kernel_of_a_gpu_shares_them(monkeypatch, dtype, window, repeated):
    """Pretended tensors on a GPU: torch would take the kernel that keeps all scores."""
    seen = {}

    def note(query, key, value, **options):
        seen.update(options, heads=key.shape[1])
        return query

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", note)
    monkeypatch.setattr(attention, "window_mask", lambda *where: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes = ((1, 4, 8, 16), (1, 2, 8, 16), (1, 2, 8, 16))
        states = [torch.empty(shape, dtype=getattr(torch, dtype), device="cuda") for shape in shapes]
        attention.attend_document(*states, None, 0.0, window)
    assert (seen["heads"], seen["enable_gqa"]) == ((4, False) if repeated else (2, True))
