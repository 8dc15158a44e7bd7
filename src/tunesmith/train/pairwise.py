"""Pairs → one batch of conversations, the places of the rewards that the loss compares, and that loss.

rewards  | chosen 1 | ... | chosen n | rejected 1 | ... | rejected n |      one number for each token
loss     of a pair: the mean of -log sigmoid(reward of chosen - reward of rejected) over the places compared
score    of a conversation: the reward at its last token
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.data.pairs import SIDES
from tunesmith.train.collate import FlatCollator, PaddedCollator

MODEL_KEYS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("document_lengths", "cu_seq_lens_q", "cu_seq_lens_k"),
)


class PairCollator:
    """n pairs → 2n conversations, the chosen ones first, and the places of the rewards that are compared.

    span:        r_c and r_r at position t = first difference, ..., end of the longer conversation; where the shorter
                 one has ended, its last reward stands for it
    last_token:  r_c and r_r at the last token of each

    The era's code compared an answer that goes on with rewards of the padding behind the other, which no score is
    ever read from; with answers of one length both are the same.

    Args:
        collate: makes a batch of documents, flat or padded on the right.
        reward_loss: `last_token` or `span`.
    """

    def __init__(self, collate: FlatCollator | PaddedCollator, reward_loss: str = "last_token"):
        self.collate, self.reward_loss = collate, reward_loss

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch; of no pairs, one that trains nothing."""
        ids = [list(pair[f"{side}_input_ids"]) for side in SIDES for pair in pairs]
        batch = self.collate([{"input_ids": document, "labels": document} for document in ids])
        lengths = [len(document) for document in ids]
        width = batch["input_ids"].shape[1]
        is_flat = isinstance(self.collate, FlatCollator)
        starts = np.cumsum([0, *lengths])[:-1] if is_flat else width * np.arange(len(ids))
        batch = {key: batch[key] for key in (*MODEL_KEYS, "num_tokens", "num_squares") if key in batch}
        begins = [pair["first_difference"] if self.reward_loss == "span" else None for pair in pairs]
        return batch | compared(begins, lengths, starts.tolist()) | {"num_pairs": len(pairs)}


def compared(begins: Sequence[int | None], lengths: Sequence[int], starts: Sequence[int]) -> dict[str, Tensor]:
    """Places in the flattened rewards of what the loss compares.

    Args:
        begins: where each pair begins to differ; `None`: its last tokens are compared.
        lengths, starts: of the 2n conversations, the chosen ones first; where each begins in the flattened batch.

    Returns: `left_index`, `right_index` (N,) of chosen and rejected; `pair_weights` (N,), which sum to 1 for each
    pair; `chosen_last`, `rejected_last` (n,).
    """
    count = len(begins)
    last = torch.tensor([start + length - 1 for start, length in zip(starts, lengths)], dtype=torch.int64)
    left, right, weights = [], [], []
    for pair, begin in enumerate(begins):
        both = (pair, pair + count)
        end = max(lengths[side] for side in both)
        places = torch.arange(end - 1 if begin is None else min(begin, end - 1), end)
        for found, side in zip((left, right), both):
            found.append(starts[side] + places.clamp(max=lengths[side] - 1))
        weights.append(torch.full((len(places),), 1 / len(places)))
    none = torch.zeros(0, dtype=torch.int64)
    return {
        "left_index": torch.cat([none, *left]),
        "right_index": torch.cat([none, *right]),
        "pair_weights": torch.cat([none.float(), *weights]),
        "chosen_last": last[:count],
        "rejected_last": last[count:],
    }


class Compared(NamedTuple):
    """What a batch of pairs comes to."""

    loss: Tensor
    """Summed over the pairs."""
    chosen: Tensor
    """Score of each chosen conversation, (n,)."""
    rejected: Tensor


def pair_loss(rewards: Tensor, batch: Mapping[str, Tensor]) -> Compared:
    """Loss and scores from the rewards of all tokens, (B, S), at the places that `compared` found."""
    flat = rewards.flatten()
    margins = flat[batch["left_index"]] - flat[batch["right_index"]]
    loss = -(F.logsigmoid(margins) * batch["pair_weights"]).sum()
    return Compared(loss, flat[batch["chosen_last"]].detach(), flat[batch["rejected_last"]].detach())
