"""Whether a model that was written answers as the one it was made of: the logits of a few texts side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

PROBES = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs.",
    'def add(a, b):\n    return a + b\n\n{"name": "Ada", "year": 1843}',
    "Naïve café, Москва, 東京, 你好, 🙂 — 3.14159 and 2+2=4",
)


def probe_ids(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[list[int]]:
    """A few texts as token ids, and ids spread over the whole vocabulary, new tokens included."""
    rows = [tokenizer(text)["input_ids"][:64] for text in PROBES]
    rows.append([place * (vocabulary - 1) // 63 for place in range(64)])
    return [[token for token in row if token < vocabulary] for row in rows if row]


def logits_of(model: nn.Module, rows: Sequence[Sequence[int]]) -> Tensor:
    """Logits of every position of every row, (positions, V), in float32."""
    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].cpu() for row in rows]
    return torch.cat(parts).float()


def differences(expected: Tensor, found: Tensor) -> dict[str, float]:
    """How far two (positions, V) are apart.

    Returns: `max_difference` of any logit, the largest logit as `scale`, `relative_difference` of the two, and
        `same_first_choice`, the share of positions where both prefer the same token.
    """
    difference, scale = (expected - found).abs().max().item(), expected.abs().max().item()
    return {
        "max_difference": difference,
        "scale": scale,
        "relative_difference": difference / scale if scale else difference,
        "same_first_choice": (expected.argmax(-1) == found.argmax(-1)).float().mean().item(),
    }
