"""Sampled answers that repeat: each row of a batch draws from numbers of its own, so its answer never changes."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def is_plain_sampling(config: GenerationConfig) -> bool:
    """Whether temperature, top-k and top-p are all there is to it."""
    others = ("min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff", "watermarking_config")
    neutral = (None, 0.0, 1.0)
    return (config.num_beams or 1) == 1 and all(getattr(config, name, None) in neutral for name in others)


def row_sampling(
    config: GenerationConfig, seeds: Sequence[Sequence[int]]
) -> tuple[GenerationConfig, LogitsProcessorList]:
    """Sampling as greedy search over logits that leave one token each: so every row has random numbers of its own.

    transformers draws for the whole batch at once, from one source: an answer would change with the rows beside it.
    """
    processors = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p))
    processors.append(RowSampler(seeds, config.max_new_tokens))
    config = copy.deepcopy(config)
    config.do_sample, config.temperature, config.top_p, config.top_k = False, 1.0, 1.0, 50
    return config, processors


class RowSampler(LogitsProcessor):
    """Draws one token per row, by the row's own numbers, and gives it all the probability.

    Args:
        seeds: what each row's numbers come from.
        length: most tokens that will be drawn.
    """

    def __init__(self, seeds: Sequence[Sequence[int]], length: int):
        self.draws = torch.tensor(np.stack([np.random.default_rng(list(seed)).random(length) for seed in seeds]))
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) that are 0 at the drawn token and -inf elsewhere."""
        exact = torch.float32 if scores.device.type == "mps" else torch.float64  # mps has no float64
        # infinite logits, divided by a low temperature, would overflow again
        sums = torch.nan_to_num(scores.to(exact)).softmax(-1).cumsum(-1)  # (B, V)
        drawn = self.draws[:, self.step, None].to(scores.device, exact) * sums[:, -1:]
        token = torch.searchsorted(sums, drawn, right=True).clamp(max=scores.shape[1] - 1)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@contextmanager
def seeded(seed: Sequence[int] | None, device: torch.device) -> Iterator[None]:
    """Inside, torch draws from `seed`; outside, as if nothing had been drawn. `None`: as always."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(int(np.random.default_rng(list(seed)).integers(2**62)))
        yield
