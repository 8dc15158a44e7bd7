"""NEFTune: uniform noise on the embeddings of training batches (Jain et al. 2023, arXiv:2310.05914).

    embeddings (B, S, H) + Uniform(-m, m),   m = alpha / sqrt(L · H),   L the real length of each token's document

The hook lives on one model, from the beginning of training until it ends, in whatever way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ConfigError


class EmbeddingNoise:
    """A forward hook for an embedding layer. Outside `of` a document is as long as its row; `alpha` `None` is off."""

    def __init__(self, alpha: float | None):
        self.alpha = alpha
        self._lengths: Tensor | None = None

    @contextmanager
    def of(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Inside, a forward pass over `inputs` scales its noise by the length of each document."""
        self._lengths = None if self.alpha is None else real_lengths(inputs)
        try:
            yield
        finally:
            self._lengths = None

    def __call__(self, module: nn.Module, _arguments: tuple, output: Tensor) -> Tensor:
        """`output` (B, S, H) and its noise, drawn from torch's generator of the device; as it is in evaluation."""
        if not module.training:
            return output
        length, width = output.shape[-2:]
        size = self.alpha / (length * width) ** 0.5
        if self._lengths is not None and fits(self._lengths, output):
            lengths = self._lengths.unsqueeze(-1).float()  # (B or 1, S or 1, 1)
            size = self.alpha * (lengths * width).rsqrt().to(output.dtype)
        return output + torch.empty_like(output).uniform_(-1.0, 1.0) * size


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[EmbeddingNoise]:
    """Inside, the input embeddings of `model` are noisy while it trains; afterwards, also by an error, they are not.

    Args:
        model: wrapped by peft or not.
        alpha: the paper's noise scale, 5 to 15; `None` or 0 adds nothing.

    Yields: the noise, to be told of each batch: `with noise.of(inputs): model(**inputs)`.
    Raises: ConfigError for a negative `alpha`.
    """
    if alpha is not None and not 0.0 <= alpha < float("inf"):
        raise ConfigError(f"neftune_noise_alpha: expected a number of 0 or more, got {alpha}. The paper uses 5 to 15.")
    noise = EmbeddingNoise(alpha or None)
    if noise.alpha is None:
        yield noise
        return
    handle = model.get_input_embeddings().register_forward_hook(noise)
    try:
        yield noise
    finally:
        handle.remove()


def real_lengths(inputs: dict[str, Any]) -> Tensor | None:
    """Length of the document of each position, (B, S), or of each row, (B, 1); `None` if `inputs` do not say.

    Computed where the batch is, so no step waits for the device.
    """
    found = []
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        found.append(mask.sum(1, keepdim=True).clamp(min=1))
    if isinstance(positions, Tensor) and positions.dim() == 2:
        found.append(document_lengths(positions))
    return torch.minimum(found[0], found[-1]) if found else None  # positions may run on into the padding


def fits(lengths: Tensor, output: Tensor) -> bool:
    """Whether (B or 1, S or 1) `lengths` describe embeddings (B, S, H)."""
    return output.dim() == 3 and all(size in (1, full) for size, full in zip(lengths.shape, output.shape))


def document_lengths(position_ids: Tensor) -> Tensor:
    """Length of each position's document, where documents lie end to end and their positions begin anew.

    >>> document_lengths(torch.tensor([[0, 1, 2, 0, 1]]))
    tensor([[3, 3, 3, 2, 2]])
    """
    begins = torch.ones_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    document = begins.cumsum(1) - 1
    counts = torch.zeros_like(position_ids).scatter_add_(1, document, torch.ones_like(position_ids))
    return counts.gather(1, document)
