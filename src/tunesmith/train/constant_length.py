"""A stream of texts → rows of exactly `seq_length` tokens, as TRL's `ConstantLengthDataset` made them until 0.19.

text, text, ...  ─►  buffer  ─►  ids EOS ids EOS ids ...  ─►  | seq_length | seq_length | rest → next buffer
"""

import logging
import random
import warnings
from collections.abc import Callable, Generator, Iterator
from itertools import chain, islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from tunesmith.errors import ConfigError, DataError
from tunesmith.train.reading import NOT_PACKED
from tunesmith.train.streaming import splits_itself

logger = logging.getLogger(__name__)
Sample = str | list[int]


class ConstantLengthDataset(IterableDataset):
    """Texts end to end, cut every `seq_length` tokens: yields {"input_ids", "labels"}, equal LongTensors.

    For scripts written for TRL. Documents in a row attend to each other, and a long one goes on in another row:
    `SFTConfig(packing=True)` keeps documents whole and apart, and is what new code should use.

    Args:
        tokenizer: of the texts.
        dataset: rows; each has a text, or `input_ids`. An iterable that can be read again: each worker of a DataLoader
            takes its part of it, unless the iterable itself asks who the worker is (as streams of `datasets` do).
        dataset_text_field: column with the text, or with ids. Rows whose dataset has a column `input_ids` need
            neither this nor `formatting_func`.
        formatting_func: makes the text (or ids) of one row; goes before `dataset_text_field`.
        infinite: begin again at the end, rather than stop.
        seq_length: tokens of a row.
        num_of_sequences: rows' worth of samples that are read at once, and shuffled among each other.
        chars_per_token: guess by which `num_of_sequences` becomes a number of characters.
        eos_token_id: written between samples if the tokenizer has no end-of-sequence token.
        shuffle: shuffle the samples of a buffer, then its rows.
        append_concat_token: write the end-of-sequence token behind each sample that does not end with it.
        add_special_tokens: let the tokenizer add what it adds to a text, such as BOS. (Not to ids.)
        seed: of the shuffling. Each pass, and with `set_epoch` each epoch, has an order of its own; all processes that
            iterate have the same. TRL drew from Python's global generator.

    Attributes:
        concat_token_id: the token between samples.
        epoch: passes finished, or what `set_epoch` said (transformers' Trainer calls it).
        current_size: rows yielded so far.
        dropped_tokens: tokens at the end of the last finished pass that made no full row; also logged.

    `len()` is the number of rows of `dataset`, as it was in TRL, not of the rows yielded: a trainer that counts the
    steps of an epoch by it goes on to the next epoch too early where samples are long. Set max_steps.
    """

    yields_tokens = True

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Any,
        dataset_text_field: str | None = None,
        formatting_func: Callable[[dict[str, Any]], Sample] | None = None,
        infinite: bool = False,
        seq_length: int = 1024,
        num_of_sequences: int = 1024,
        chars_per_token: float = 3.6,
        eos_token_id: int = 0,
        shuffle: bool = True,
        append_concat_token: bool = True,
        add_special_tokens: bool = True,
        seed: int = 0,
    ):
        _check_positive(seq_length=seq_length, num_of_sequences=num_of_sequences, chars_per_token=chars_per_token)
        self.tokenizer, self.dataset = tokenizer, dataset
        self.field = _field(dataset, dataset_text_field, formatting_func)
        self.formatting_func = formatting_func or itemgetter(self.field)
        self.infinite, self.shuffle, self.seed = infinite, shuffle, seed
        self.seq_length, self.num_of_sequences, self.chars_per_token = seq_length, num_of_sequences, chars_per_token
        self.append_concat_token, self.add_special_tokens = append_concat_token, add_special_tokens
        # TRL took an end-of-sequence token with id 0 for none
        self.concat_token_id = eos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        self.epoch = self.current_size = self.dropped_tokens = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle the next pass as pass number `epoch`."""
        self.epoch = epoch
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rest: list[int] = []
        while True:
            num_read, rest = yield from self._one_pass(rest)
            if not self.infinite:
                self._drop(rest)
                return
            if not num_read:
                if get_worker_info() is not None:
                    return  # more workers than rows
                raise DataError(f"{NOT_PACKED} A pass over it read no token; a generator can be read only once.")

    def _one_pass(self, rest: list[int]) -> Generator[dict[str, Tensor], None, tuple[int, list[int]]]:
        """Yield the rows of a pass, the first beginning with `rest`; tokens read, and those that made no full row."""
        shuffler = random.Random(f"{self.seed} {self.epoch}")
        num_read = 0
        for samples in self._buffers():
            if self.shuffle:
                shuffler.shuffle(samples)
            ids = list(chain.from_iterable(self._tokenized(samples)))
            num_read += len(ids)
            ids = rest + ids
            edge = len(ids) - len(ids) % self.seq_length
            rows, rest = [ids[i : i + self.seq_length] for i in range(0, edge, self.seq_length)], ids[edge:]
            if self.shuffle:
                shuffler.shuffle(rows)
            for row in rows:
                self.current_size += 1
                yield {"input_ids": torch.tensor(row), "labels": torch.tensor(row)}
        self.set_epoch(self.epoch + 1)
        return num_read, rest

    def _buffers(self) -> Iterator[list[Sample]]:
        """Samples until they make about `num_of_sequences` rows, by their characters or ids."""
        buffer, size = [], 0
        for row in self._share():
            sample = self._sample(row)
            buffer.append(sample)
            size += len(sample)
            per_token = self.chars_per_token if isinstance(sample, str) else 1
            if size >= self.seq_length * per_token * self.num_of_sequences:
                yield buffer
                buffer, size = [], 0
        if buffer:
            yield buffer

    def _share(self) -> Iterator[Any]:
        """The rows that this worker of a DataLoader reads; all if there is none."""
        worker = get_worker_info()
        if worker is None or splits_itself(self.dataset):
            return iter(self.dataset)
        return islice(self.dataset, worker.id, None, worker.num_workers)

    def _sample(self, row: Any) -> Sample:
        if self.field is not None and self.field not in row:
            raise DataError(f"a row has no column '{self.field}', only {sorted(row)}. Set dataset_text_field.")
        sample = self.formatting_func(row)
        sample = sample.tolist() if hasattr(sample, "tolist") else sample
        if isinstance(sample, str):
            return sample
        if isinstance(sample, list) and all(isinstance(one, int) for one in sample):
            return sample
        maker = f"column '{self.field}'" if self.field else "formatting_func"
        raise DataError(
            f"{maker} gave {str(sample)[:80]!r}. Rows of constant length are made of one text, or one list of token "
            "ids, for each row; formatting_func is called with one row at a time."
        )

    def _tokenized(self, samples: list[Sample]) -> Iterator[list[int]]:
        """Ids of each sample, with the token that ends it."""
        texts = [sample for sample in samples if isinstance(sample, str)]
        options = {"add_special_tokens": self.add_special_tokens, "truncation": False, "verbose": False}
        encoded = iter(self.tokenizer(texts, **options)["input_ids"] if texts else ())
        for sample in samples:
            ids = next(encoded) if isinstance(sample, str) else sample
            has_end = ids[-1:] == [self.tokenizer.eos_token_id]
            yield ids if has_end or not self.append_concat_token else [*ids, self.concat_token_id]

    def _drop(self, rest: list[int]) -> None:
        self.dropped_tokens = len(rest)
        if rest:
            logger.warning(
                "%d token(s) at the end of the pass made no full row of %d and were left out; packing=True keeps all",
                len(rest),
                self.seq_length,
            )


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if number <= 0:
            raise ConfigError(f"{name}: expected more than 0, got {number}.")


def _field(dataset: Any, text_field: str | None, formatting_func: Callable | None) -> str | None:
    """The column to read; `None` if `formatting_func` reads the rows."""
    columns = getattr(dataset, "column_names", None) or ()
    if formatting_func is not None:
        if text_field is not None:
            warnings.warn(
                "Only one of `dataset_text_field` and `formatting_func` should be provided. Ignoring "
                f"`dataset_text_field` ('{text_field}') and using `formatting_func`.",
                UserWarning,
                stacklevel=3,
            )
        return None
    if "input_ids" in columns and text_field not in columns:
        return "input_ids"
    if text_field is None:
        raise ConfigError(
            "Either `dataset_text_field` or `formatting_func` should be provided: the column with the text, or a "
            "function that makes the text of one row."
        )
    return text_field
