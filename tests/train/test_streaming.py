"""A stream gives every row once, whole, in a repeatable order, and holds no more of itself than a buffer."""

import logging
import random

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, get_worker_info

from tests import tiny
from tunesmith.data.mix import shuffled_stream
from tunesmith.data.report import Report
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import DataError
from tunesmith.train.datasets import prepared, prepared_mixture
from tunesmith.train.reading import Preparation
from tunesmith.train.streaming import MixedStream, PackedStream, TokenStream, growing_batches

EOS = 257
TEXTS = [f"text {i:03}" + "." * (i % 7) for i in range(120)]


class Counting(torch.utils.data.IterableDataset):
    """A torch stream that knows nothing of workers, and counts what was read of it."""

    def __init__(self, texts=TEXTS, column="text"):
        self.texts, self.column, self.read, self.epochs = texts, column, 0, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for text in self.texts:
            self.read += 1
            yield {self.column: text}


class SplittingItself(Counting):
    def __iter__(self):
        worker = get_worker_info()
        share = self.texts[worker.id :: worker.num_workers] if worker else self.texts
        return iter([{"text": text} for text in share])


class Once(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def make(source, report=None, **options):
    options = {"max_length": 32, **options}
    return prepared("train_dataset", source, Preparation(tiny.make_byte_tokenizer(), **options), report or Report())


def texts_of(rows) -> list[str]:
    """The documents of the rows as text, the stop token of each checked and taken off."""
    found = []
    for row in rows:
        ends = np.cumsum(row.get("seq_lengths", [len(row["input_ids"])])).tolist()
        for begin, end in zip([0, *ends], ends):
            *ids, last = row["input_ids"][begin:end]
            assert last == EOS
            found.append(bytes(ids).decode())
    return found


def whole(rows):
    return rows


# trainer: M1 A5
@pytest.mark.parametrize(
    "source",
    [
        Counting(),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
        datasets.IterableDataset.from_generator(lambda: ({"text": text} for text in TEXTS)),
    ],
)
def test_a_stream_is_tokenized_while_it_is_read_and_every_row_counted(source):
    report = Report()
    assert texts_of(make(source, report)) == TEXTS
    assert (report.read, report.kept, report.num_dropped) == (120, 120, 0)
    assert report.num_tokens == sum(len(text) + 1 for text in TEXTS)


# trainer: M1
def test_the_first_step_needs_only_a_few_rows_and_the_rest_is_not_read_ahead():
    source = Counting()
    rows = iter(make(source))
    assert source.read == 0
    next(rows)
    assert source.read == 8
    for _ in range(8):
        next(rows)
    assert source.read == 8 + 16


def test_batches_grow_to_their_size_and_end_early_at_many_characters():
    rows = [Row({"text": "abcd", "n": [1]}, "a", i) for i in range(60)]
    assert [len(batch) for batch in growing_batches(iter(rows), 20, 10**6)] == [8, 16, 20, 16]
    assert [len(batch) for batch in growing_batches(iter(rows), None, 10**6)] == [8, 16, 32, 4]
    assert [len(batch) for batch in growing_batches(iter(rows), 0, 9)] == [3] * 20


# trainer: M1 G1 G8 B10 B11
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("num_of_sequences", [1, 3, 1024])
def test_a_packed_stream_loses_no_row_and_holds_a_buffer(strategy, num_of_sequences):
    report = Report()
    options = {"packing": True, "packing_strategy": strategy, "num_of_sequences": num_of_sequences}
    rows = list(make(Counting(), report, **options))
    joined = [id for row in rows for id in row["input_ids"]]
    assert sorted(joined) == sorted(id for text in TEXTS for id in [*text.encode(), EOS])
    assert all(len(row["input_ids"]) == sum(row["seq_lengths"]) <= 32 for row in rows)
    assert (report.read, report.kept) == (120, 120)
    if strategy == "bfd":
        assert sorted(texts_of(rows)) == sorted(TEXTS)
    if strategy == "wrapped":
        assert sum(len(row["input_ids"]) < 32 for row in rows) == 1


# trainer: G8 B10 B11
def test_no_more_is_read_than_the_buffer_needs():
    source = Counting()
    next(iter(make(source, packing=True, num_of_sequences=2, chars_per_token=0.5)))
    assert source.read < 20  # 2 rows of 32 tokens are 5 texts; a batch ends at 32 characters
    source = Counting()
    next(iter(make(source, packing=True, num_of_sequences=2, chars_per_token=99.0)))
    assert source.read == 8


def test_packed_rows_come_in_an_order_of_seed_and_epoch():
    stream = make(Counting(), packing=True)
    first = [row["input_ids"] for row in stream]
    assert [row["input_ids"] for row in stream] == first
    stream.set_epoch(1)
    assert [row["input_ids"] for row in stream] != first
    assert [row["input_ids"] for row in make(Counting(), packing=True, seed=7)] != first
    lengths = [row["seq_lengths"][0] for row in make(Counting(), packing=True)]
    assert lengths != sorted(lengths, reverse=True)


# trainer: G3 G7
@pytest.mark.parametrize("packing", [False, True])
def test_an_infinite_stream_begins_again_as_the_next_epoch(packing):
    source = Counting()
    stream = make(source, packing=packing)
    once = len(list(stream))
    assert stream.infinite is False
    stream.infinite = True
    rows = iter(stream)
    assert len([next(rows) for _ in range(2 * once + 1)]) == 2 * once + 1
    assert source.epochs == [0, 0, 1, 2]


def test_the_source_hears_of_the_epoch():
    source = Counting()
    stream = make(source)
    stream.set_epoch(3)
    next(iter(stream))
    assert source.epochs == [3]


def test_a_stream_is_shuffled_by_seed_and_epoch_if_asked():
    stream = make(Counting(), shuffle=True)
    first = texts_of(stream)
    assert first != TEXTS
    assert sorted(first) == sorted(TEXTS)
    stream.set_epoch(1)
    assert texts_of(stream) != first
    assert sorted(shuffled_stream(iter(range(5000)), 1000, random.Random(0))) == list(range(5000))


# trainer: M1
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    "source",
    [
        Counting(),
        SplittingItself(),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(num_shards=3),
        Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ],
    ids=["plain", "splits itself", "three shards", "one shard"],
)
def test_with_two_workers_every_row_comes_once(source, packing):
    rows = list(DataLoader(make(source, packing=packing), batch_size=None, num_workers=2, collate_fn=whole))
    assert sorted(texts_of(rows)) == sorted(TEXTS)


def test_an_error_names_the_row_of_the_stream():
    with pytest.raises(RowError, match=r"^train_dataset row 31: 'text' is a number \(5\), not a text"):
        list(make(Counting([*TEXTS[:30], 5])))


def test_dropped_rows_are_counted_and_the_first_is_logged(caplog):
    report = Report()
    with caplog.at_level(logging.WARNING):
        rows = list(make(Counting(["a", "", "b", " ", "c" * 40]), report, too_long="drop"))
    assert texts_of(rows) == ["a", "b"]
    assert (report.read, report.kept, report.num_dropped) == (5, 2, 3)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.split(":")[0] for message in messages] == [
        "train_dataset row 2 is dropped (empty-text",
        "train_dataset row 5 is dropped (too-long",
    ]


def test_the_report_of_a_long_stream_stays_short():
    report, part = Report(), Report()
    part.read = 600
    for line in range(600):
        part.dropped("too-long", Row({}, "train_dataset", line))
        part.changed("cut", Row({}, "train_dataset", line))
    for _ in range(3):
        report.add(part, limit=1000)
    assert (report.read, report.num_dropped, len(report.drops), len(report.changes)) == (1800, 1800, 1000, 1000)
    assert "1,400 changed" in report.table()  # repeats count once among those listed


# trainer: M2
def test_tokenized_streams_are_used_as_they_are_and_packed_if_asked():
    ids = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]
    source = Counting(ids, column="input_ids")
    assert [(row["input_ids"], row["labels"]) for row in make(source, max_length=2)] == [(row, row) for row in ids]
    report = Report()
    rows = list(make(source, report, max_length=5, packing=True))
    assert sorted(row["input_ids"] for row in rows) == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    assert [(change.reason, change.line) for change in report.changes] == [("cut", 3)]


def test_rows_that_come_packed_are_never_joined_across_their_documents():
    source = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "seq_lengths": [2, 1]}, {"input_ids": [4, 5]}]
    rows = list(make(Plain(source), max_length=8, packing=True))
    assert rows[0]["seq_lengths"] == [2, 2, 1]
    assert next(iter(make(Plain(source)))) == source[0]


class Plain(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class Finished(Plain):
    """As `ConstantLengthDataset`: its rows are ready for the model."""

    yields_tokens = True


# trainer: A5
def test_a_stream_of_finished_rows_is_left_alone():
    source = Finished([{"input_ids": torch.tensor([1]), "labels": torch.tensor([1])}])
    assert make(source, packing=True) is source


def test_an_empty_stream_is_an_error():
    with pytest.raises(DataError, match="no rows were read"):
        list(make(Counting([])))
    with pytest.raises(DataError, match=r"Error occurred while packing the dataset\..* Here no rows were read"):
        list(make(Counting([]), packing=True))


def test_parts_of_a_mixture_that_end_begin_again_until_the_last_ends():
    how = Preparation(tiny.make_byte_tokenizer(), 32)
    parts = [
        TokenStream(name, Counting([f"{name}{i}" for i in range(n)]), how, Report())
        for name, n in (("a", 2), ("b", 9))
    ]
    mixed = texts_of(MixedStream(parts, np.array([0.5, 0.5]), 0, "all"))
    assert [text for text in mixed if text[0] == "b"] == [f"b{i}" for i in range(9)]
    of_a = [text for text in mixed if text[0] == "a"]
    assert of_a == (["a0", "a1"] * len(of_a))[: len(of_a)]
    assert texts_of(MixedStream(parts, None, 0, "all")) == ["a0", "a1", *(f"b{i}" for i in range(9))]
    packed = PackedStream(MixedStream(parts, None, 0, "all"), how, Report())
    assert len(texts_of(packed)) == 11


def test_a_part_of_a_mixture_that_cannot_be_read_again_is_an_error():
    parts = {"once": Once([{"text": "a"}]), "many": [{"text": "b"}] * 9}
    how = Preparation(tiny.make_byte_tokenizer(), 32, mixture_weights=[0.9, 0.1], mixture_stop="all")
    with pytest.raises(DataError, match=r"train_dataset\[once\] gave rows once and none when it was read again"):
        list(prepared_mixture("train_dataset", parts, how, {}))


def test_a_stream_is_packed_for_a_collator_of_the_persons():
    rows = list(make(Counting(["one", "two"]), packing=True, own_collator=True))
    assert texts_of(rows) == ["one", "two"]
    assert rows[0]["labels"] == rows[0]["input_ids"]


def test_the_first_row_that_is_cut_is_logged_too(caplog):
    with caplog.at_level(logging.WARNING):
        list(make(Counting(["long " * 20] * 3)))
    assert [record.message for record in caplog.records] == [
        "train_dataset row 1 is changed (cut: 101 tokens, max_length is 32); further rows are counted"
    ]
