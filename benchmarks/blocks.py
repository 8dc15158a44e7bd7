"""The largest block of logits that any operation makes, forward and backward, on a CPU."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LargestBlock(TorchDispatchMode):
    """Bytes of the largest tensor whose last dimension is the vocabulary.

    The head's weight and its gradient, transposed, have that shape too and are left out: logits of exactly
    `hidden_size` positions would be taken for them.
    """

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.vocab_size, self.weight_shape, self.bytes = vocab_size, (hidden_size, vocab_size), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it made."""
        output = func(*args, **(kwargs or {}))
        found = (made for made in tree_iter(output) if isinstance(made, torch.Tensor) and made.ndim > 1)
        for made in found:
            if made.shape[-1] == self.vocab_size and tuple(made.shape) != self.weight_shape:
                self.bytes = max(self.bytes, made.numel() * made.element_size())
        return output
