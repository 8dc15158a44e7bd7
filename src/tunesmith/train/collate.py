"""Rows of token ids become tensors: flat, documents end to end, or padded where a model cannot keep documents apart.

flat    input_ids  (1, T)   | doc 1 ......... | doc 2 ... | doc 3 ..... |
        position_ids         0 1 2 ...          0 1 2 ...   0 1 2 ...
        loss_index           positions whose *next* token is trained, loss_targets those tokens
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

from tunesmith.data import IGNORE_INDEX
from tunesmith.errors import ConfigError, DataError


class Rows:
    """The rows that a batch was made of, should it have to be made in parts; no collection that a library walks."""

    __slots__ = ("rows",)

    def __init__(self, rows: Sequence[Any]):
        self.rows = rows


class FlatCollator:
    """Lay the documents of some rows end to end, with no padding.

    Rows have `input_ids` and `labels`, optionally `weights`, and `seq_lengths` when they are packed.
    `boundaries=True` adds what document attention reads: `document_lengths` (host), `cu_seq_lens_q`, `cu_seq_lens_k`.
    `pad_to_multiple_of` adds a last document that trains nothing, for a total that is a multiple of it.
    `share_prefix=True` lays down once what all documents begin with, as `shared_prefix` (tokens, documents) tells.
    """

    def __init__(self, boundaries: bool = True, pad_to_multiple_of: int | None = None, share_prefix: bool = False):
        self.boundaries, self.pad_to_multiple_of = boundaries, pad_to_multiple_of
        self.share_prefix = share_prefix

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One flat batch."""
        documents = [document for row in rows for document in split_documents(row)]
        whole = [len(document["input_ids"]) for document in documents]
        prefix, sharing = common_prefix(documents) if self.share_prefix else 0, len(documents)
        documents = [document if index == 0 else without(document, prefix) for index, document in enumerate(documents)]
        laid = sum(len(document["input_ids"]) for document in documents)
        missing = -laid % self.pad_to_multiple_of if self.pad_to_multiple_of else 0
        missing = missing or int(not documents)
        documents += [nothing(missing)] * (missing > 0)
        input_ids = torch.cat([document["input_ids"] for document in documents])
        labels = torch.cat([first_masked(document["labels"]) for document in documents])
        lengths = [len(document["input_ids"]) for document in documents]
        begins = [prefix if 0 < index < sharing else 0 for index in range(len(documents))]
        positions = [torch.arange(begin, begin + length) for begin, length in zip(begins, lengths)]
        batch: dict[str, Any] = {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": torch.cat(positions).unsqueeze(0),
            "labels": labels.unsqueeze(0),
            "num_tokens": sum(whole),
            "num_squares": sum(length * length for length in whole),
            **loss_positions(labels.unsqueeze(0), joined_weights(documents)),
            "rows": Rows(rows),
        }
        if self.boundaries:
            bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            batch |= {"document_lengths": tuple(lengths), "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            batch["shared_prefix"] = (prefix, sharing)
        return batch


class PaddedCollator:
    """One document a row, padded to the longest; labels at padding are ignored by position, not by id.

    Args:
        pad_token_id: written where there is padding.
        pad_to_multiple_of: of what the width is a multiple.
        padding_side: where rows are padded. On the left they also get `position_ids` that begin at 0 with the row; on
            the right those of every model do.
        ignore_pad_token_for_loss: if false, padding is trained like text, as with `label_pad_token_id=pad_token_id`
            of `DataCollatorForSeq2Seq`. It is there for old recipes: the model learns to write padding, the mean loss
            falls because padding is easy, and it depends on which rows happen to share a batch.
    """

    def __init__(
        self,
        pad_token_id: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: Literal["right", "left"] = "right",
        ignore_pad_token_for_loss: bool = True,
    ):
        self.pad_token_id, self.pad_to_multiple_of = pad_token_id, pad_to_multiple_of
        self.padding_side, self.ignore_pad_token_for_loss = padding_side, ignore_pad_token_for_loss

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One padded batch."""
        documents = [document for row in rows for document in split_documents(row)] or [nothing()]
        lengths = [len(document["input_ids"]) for document in documents]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(lengths) // multiple) * multiple

        def padded(values: Sequence[Tensor], fill: float) -> Tensor:
            return stacked(values, width, fill, self.padding_side)

        trains_padding = bool(rows) and not self.ignore_pad_token_for_loss
        label_of_padding = self.pad_token_id if trains_padding else IGNORE_INDEX
        labels = padded([first_masked(document["labels"]) for document in documents], label_of_padding)
        weights = joined_weights(documents)
        if weights is not None:
            weights = padded(list(weights.split(lengths)), float(trains_padding)).flatten()
        attention_mask = padded([torch.ones(length, dtype=torch.int64) for length in lengths], 0)
        batch = {
            "input_ids": padded([document["input_ids"] for document in documents], self.pad_token_id),
            "attention_mask": attention_mask,
            "labels": labels,
            "num_tokens": sum(lengths) if rows else 0,
            "num_squares": sum(length * length for length in lengths),
            **loss_positions(labels, weights),
            "rows": Rows(rows),
        }
        if self.padding_side == "left":
            batch["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        return batch


class LocatedCollator:
    """A caller's collator, with the places of the loss and the number of tokens found on the host, as ours do.

    What it draws by chance depends on seed, epoch and rows alone, in whichever process it runs: a resumed run makes
    the same batches.

    Args:
        source: knows the epoch; `None`: there is only one.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], Mapping[str, Any]], seed: int = 0, source: Any = None):
        self.collator, self.seed, self.source = collator, seed, source

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """The caller's batch with `loss_index`, `loss_targets` and `num_tokens` beside; `weights` (B, S) count."""
        with drawn_from(self.seed, getattr(self.source, "epoch", 0), *map(summary, rows)):
            batch = self.collator(rows)
        if not isinstance(batch, Mapping):
            raise ConfigError(f"data_collator: expected a dict of tensors, got a {type(batch).__name__}.")
        batch = dict(batch)
        if isinstance(batch.get("labels"), Tensor) and batch["labels"].dim() == 2:
            weights = batch.pop("weights", None)
            batch = loss_positions(batch["labels"], None if weights is None else weights.flatten()) | batch
        counted = batch.get("attention_mask")
        if isinstance(counted, Tensor) and counted.dim() == 2:
            batch.setdefault("num_tokens", int(counted.sum()))
            batch.setdefault("num_squares", int((counted.sum(1) ** 2).sum()))
        return batch | {"rows": Rows(rows)}


@contextmanager
def drawn_from(*what: Any) -> Iterator[None]:
    """Inside, random numbers of Python, numpy and torch depend on `what` alone; afterwards they go on as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = xxhash.xxh3_64_intdigest(repr(what).encode("utf-8", "surrogatepass"))
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def summary(row: Any) -> Any:
    """Enough of a row to tell it from the others of its batch."""
    if not isinstance(row, Mapping):
        return type(row).__name__
    sized = {key: value for key, value in sorted(row.items()) if hasattr(value, "__len__")}
    return [(key, len(value), as_list(value[:16])) for key, value in sized.items() if not isinstance(value, Mapping)]


def as_list(values: Any) -> Any:
    """Arrays as lists, all else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def nothing(length: int = 1) -> dict[str, Tensor]:
    """Tokens that train nothing: padding, or the batch of a process for which no row is left (`RankBatches`)."""
    return {"input_ids": torch.zeros(length, dtype=torch.int64), "labels": torch.full((length,), IGNORE_INDEX)}


def split_documents(row: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The documents of one row, as int64 tensors: several if it is packed, else itself, without its padding."""
    columns = {name: as_tensor(row[name]) for name in ("input_ids", "labels", "weights") if row.get(name) is not None}
    if "input_ids" not in columns:
        found = ", ".join(row)
        raise DataError(
            f"a row has no input_ids, only {found}. skip_prepare_dataset leaves rows as they are: remove it."
        )
    columns.setdefault("labels", columns["input_ids"])
    lengths = row.get("seq_lengths")
    if lengths is None:
        seen = row.get("attention_mask")
        return [
            columns if seen is None else {name: values[as_tensor(seen).bool()] for name, values in columns.items()}
        ]
    pieces = {name: values.split(list(lengths)) for name, values in columns.items()}
    return [dict(zip(pieces, parts)) for parts in zip(*pieces.values())]


def as_tensor(values: Any) -> Tensor:
    """A tensor of `values`; lists by way of numpy, which reads them six times as fast as torch does."""
    return torch.from_numpy(np.array(values)) if isinstance(values, list) and values else torch.as_tensor(values)


def common_prefix(documents: Sequence[dict[str, Tensor]]) -> int:
    """How many first tokens all documents have in common before the first position with a loss in any of them.

    >>> common_prefix([{"input_ids": torch.tensor(ids), "labels": torch.tensor([-100, -100, -100, ids[-1]])}
    ...                for ids in ([7, 8, 1, 2], [7, 8, 3, 4])])
    2
    """
    if len(documents) < 2:
        return 0
    trained = [(document["labels"] != IGNORE_INDEX).nonzero() for document in documents]
    # the loss of the first trained token is formed at the position before it
    limits = [int(found[0]) - 1 if len(found) else len(one["labels"]) - 1 for found, one in zip(trained, documents)]
    limit = max(0, min(limits))
    ids = torch.stack([document["input_ids"][:limit] for document in documents])
    return int((ids == ids[0]).all(0).long().cumprod(0).sum())


def without(document: dict[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """A document without its first tokens."""
    return {name: values[prefix:] for name, values in document.items()}


def first_masked(labels: Tensor) -> Tensor:
    """Labels without the first: nothing comes before it in its document, so nothing can predict it."""
    labels = labels.clone()
    labels[0] = IGNORE_INDEX
    return labels


def joined_weights(documents: Sequence[dict[str, Tensor]]) -> Tensor | None:
    """Weights of all tokens in order, (T,) float32; `None` if no document has any."""
    if not any("weights" in document for document in documents):
        return None
    return torch.cat(
        [document.get("weights", torch.ones(len(document["input_ids"]))).to(torch.float32) for document in documents]
    )


def stacked(values: Sequence[Tensor], width: int, fill: float, padding_side: str = "right") -> Tensor:
    """Rows of unequal length as one (B, width) tensor, filled on one side."""
    output = torch.full((len(values), width), fill, dtype=values[0].dtype)
    for row, value in zip(output, values):
        row[slice(len(value)) if padding_side == "right" else slice(width - len(value), None)] = value
    return output


def loss_positions(labels: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Where the loss is formed, found here on the host so that no step waits for the device.

    Args:
        labels: (B, S), not shifted. weights: one per position of `labels`, flattened.

    Returns: `loss_index` (N,): flat positions whose next token is trained; `loss_targets` (N,): those tokens;
    `loss_weights` (N,) float32 if there are weights.
    """
    shifted = torch.full_like(labels, IGNORE_INDEX)
    shifted[:, :-1] = labels[:, 1:]
    index = (shifted.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    found = {"loss_index": index, "loss_targets": shifted.flatten().index_select(0, index)}
    if weights is not None:
        found["loss_weights"] = weights[index + 1]  # the weight belongs to the token, one to the right
    return found
