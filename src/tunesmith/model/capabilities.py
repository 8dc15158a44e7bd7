"""What a model can do exactly and what the hardware does fast: measured at start-up, not read from a list of names."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tunesmith.model import main_memory
from tunesmith.model.attention import attention_configs, documents_attend
from tunesmith.model.mixed_types import types_joined
from tunesmith.model.quantize import rows_apart

Layout = Literal["documents", "packed", "padded"]


class Support(NamedTuple):
    """How a model may be fed, as found by running it."""

    layout: Layout
    """`documents`: flat, our attention; `packed`: flat, a block mask of transformers; `padded`: padded rows."""
    plain_head: bool
    """The logits are exactly the output of the head module, so the loss may be formed inside it."""
    why: str = ""
    """What ruled out the faster layouts."""
    shares_prefix: bool = False
    """Documents may share their first tokens (`shared_prefix` of document attention)."""


def probe_model(model: nn.Module, *, lengths: tuple[int, int] = (5, 7), seed: int = 0) -> Support:
    """Run two short documents apart and end to end; the fastest layout whose logits agree is the one to use.

    This finds what no list of architectures can: layers that carry state across documents, attention that ignores our
    boundaries, heads that scale or cap their output.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = model.get_input_embeddings().weight
    ids = torch.randint(0, min(embeddings.shape[0], 1000), (1, sum(lengths)), generator=generator).to(
        embeddings.device
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), rows_apart(model), types_joined(model):
            expected, plain_head = _separate_logits(model, ids, lengths)
            support = _fastest_layout(model, ids, lengths, expected, plain_head)
            return support._replace(shares_prefix=_shares_prefix(model, ids, support))
    finally:
        model.train(training)


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that makes logits of hidden states, if the model says which; peft's wrapper is left aside."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _separate_logits(model: nn.Module, ids: Tensor, lengths: tuple[int, int]) -> tuple[Tensor, bool]:
    """Logits of each document run alone, joined, and whether the head's own output is what the model returns."""
    seen: list[Tensor] = []
    head = output_head(model)
    hook = (
        head.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) if head is not None else None
    )
    try:
        logits = [model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)]
    finally:
        if hook is not None:
            hook.remove()
    plain = len(seen) == 2 and all(
        a.shape == b.shape and torch.equal(a.float(), b.float()) for a, b in zip(seen, logits)
    )
    return torch.cat(logits, dim=1), plain


def _fastest_layout(
    model: nn.Module, ids: Tensor, lengths: tuple[int, int], expected: Tensor, plain_head: bool
) -> Support:
    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):  # longer than the check's documents
        return Support("padded", plain_head, "attention in chunks counts from the beginning of a row")
    reasons = []
    for layout in ("documents", "packed"):
        try:
            found = _flat_logits(model, ids, lengths, layout)
            _check_longer_rows(model, layout, getattr(config, "max_position_embeddings", None))
        except (NotImplementedError, TypeError, ValueError, RuntimeError) as error:
            reasons.append(f"{layout}: {str(error).splitlines()[0]}")
            continue
        if agree(found, expected):
            return Support(layout, plain_head, "; ".join(reasons))
        reasons.append(f"{layout}: a document's logits change with its neighbour")
    return Support("padded", plain_head, "; ".join(reasons))


def _check_longer_rows(model: nn.Module, layout: str, limit: int | None) -> None:
    """Raise what a model raises for more tokens than `limit`, if its causal mask is a table of so many positions."""
    has_table = limit and any(buffer.shape[-2:] == (limit, limit) for buffer in model.buffers())
    if has_table:
        half = limit // 2 + 1
        ids = torch.zeros(1, 2 * half, dtype=torch.long, device=model.get_input_embeddings().weight.device)
        _flat_logits(model, ids, (half, half), layout)


def _flat_logits(model: nn.Module, ids: Tensor, lengths: tuple[int, int], layout: str) -> Tensor:
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0).to(ids.device)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": position_ids, "use_cache": False}
    if layout == "packed":
        return model(**inputs).logits
    bounds = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32, device=ids.device)
    with documents_attend(attention_configs(model)):
        return model(**inputs, document_lengths=lengths, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds).logits


def _shares_prefix(model: nn.Module, ids: Tensor, support: Support, prefix: int = 3) -> bool:
    """Whether two documents that begin alike have the same logits when their beginning stands there only once."""
    if support.layout != "documents" or ids.is_cuda:
        return False
    first = ids[:, :5]
    second = torch.cat([ids[:, :prefix], ids[:, 5:9]], dim=1)
    expected = torch.cat([model(input_ids=part, use_cache=False).logits for part in (first, second)], dim=1)
    shared = torch.cat([first, second[:, prefix:]], dim=1)
    positions = torch.tensor([[0, 1, 2, 3, 4, *range(prefix, second.shape[1])]], device=ids.device)
    inputs = {"input_ids": shared, "position_ids": positions, "use_cache": False}
    lengths = (5, second.shape[1] - prefix)
    bounds = torch.tensor([0, 5, sum(lengths)], dtype=torch.int32, device=ids.device)
    with documents_attend(attention_configs(model)):
        found = model(
            **inputs,
            document_lengths=lengths,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            shared_prefix=(prefix, 2),
        ).logits
    return agree(found[:, 5:], expected[:, 5 + prefix :]) and agree(found[:, :5], expected[:, :5])


def agree(found: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of their type; a leak between documents is orders of magnitude larger."""
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-8}.get(expected.dtype, 5e-2)
    scale = expected.float().abs().max().clamp(min=1e-6)
    return bool((found.float() - expected.float()).abs().max() <= tolerance * scale)


def bf16_is_faster(device: torch.device, *, at_least: float = 1.5) -> bool:
    """Whether bfloat16 matrix products run `at_least` times as fast as float32 ones.

    CUDA devices answer by capability. CPUs are timed for some 50 ms: with AMX they are seven times as fast, with
    AVX512_BF16 four times, with neither four times slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bf16_speedup() > at_least


@cache
def bf16_speedup(rounds: int = 12) -> float:
    """How many times as fast as float32 this CPU multiplies bfloat16: fastest of a few (512, 768) × (768, 1024).

    Both in turn, so what else runs here slows both.
    """
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    for _ in range(rounds):
        for dtype in best:
            best[dtype] = min(best[dtype], _product_seconds(dtype))
    return best[torch.float32] / best[torch.bfloat16]


def _product_seconds(dtype: torch.dtype) -> float:
    left, right = torch.ones(512, 768, dtype=dtype), torch.ones(1024, 768, dtype=dtype)
    return _seconds_of(lambda: torch.nn.functional.linear(left, right), "cpu")


PROBE_SECONDS = 0.08
PROBE_SIDES = {"cpu": 1024, "cuda": 8192}


@cache
def matrix_rate(device_type: str, dtype: torch.dtype) -> float | None:
    """Floating-point operations a second of large matrix products here, the fastest of those tried in 80 ms.

    `None` for devices that cannot be timed. Another program at work on the device lowers it: it is what could be had.
    """
    side = PROBE_SIDES.get(device_type)
    if side is None:
        return None
    generator = torch.Generator(device_type).manual_seed(0)  # the global one belongs to the run
    left, right = (torch.rand(side, side, generator=generator, device=device_type).to(dtype) for _ in range(2))
    output, best = torch.empty_like(left), float("inf")
    torch.mm(left, right, out=output)  # the first pays for the library's start
    end = time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < end:
        best = min(best, _seconds_of(lambda: torch.mm(left, right, out=output), device_type))
    return 2 * side**3 / best


def _seconds_of(run: Callable[[], Any], device_type: str) -> float:
    """How long `run` takes, its work on a GPU included."""
    if device_type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device_type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def usable_bytes(device: torch.device) -> float:
    """Memory of `device` that this process could hold in all; infinite where nobody can say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0]) + torch.cuda.memory_reserved(device)
    return main_memory.usable_bytes()
