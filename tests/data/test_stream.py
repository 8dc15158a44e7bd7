"""Rows that are read while training asks for them: lazily, shuffled, mixed, and the same under the same seed."""

import itertools

import datasets
import pytest

from tests import tiny
from tests.data.registries import alpaca, asked, make_file, make_registry
from tunesmith.config import DataConfig
from tunesmith.data import readers
from tunesmith.data.report import Report
from tunesmith.data.stream import FINISHED, stream
from tunesmith.errors import ConfigError, DataError
from tunesmith.train.reading import Preparation
from tunesmith.train.streaming import TokenStream

FILE = {"file_name": "a.jsonl"}


@pytest.fixture
def two(tmp_path):
    """A registry of `a`, 30 rows, and `b`, 90 rows."""
    make_file(tmp_path, "a.jsonl", alpaca(30, "a"))
    make_file(tmp_path, "b.jsonl", alpaca(90, "b"))
    return make_registry(tmp_path, a=FILE, b={"file_name": "b.jsonl"})


def begin(folder, names, **options):
    own = {key: options.pop(key) for key in ("stage", "seed") if key in options}
    given = {"buffer_size": 8, "streaming": True} | options
    return stream(DataConfig(dataset=names, dataset_dir=str(folder), **given), **own)


def epoch(found, number=0):
    found.train.set_epoch(number)
    return asked(found.train)


# workflow: D7
def test_a_stream_reads_no_further_than_its_buffer(tmp_path, monkeypatch):
    pulled = []

    def endless(path):
        for number in itertools.count(1):
            pulled.append(number)
            yield readers.Row({"instruction": f"q{number}", "output": "a"}, path, number)

    monkeypatch.setitem(readers.READERS, ".jsonl", endless)
    path = make_file(tmp_path, "a.jsonl", [])
    found = begin(tmp_path, path, buffer_size=200)
    assert isinstance(found.train, datasets.IterableDataset)
    assert pulled == []
    assert len(list(itertools.islice(found.train, 10))) == 10
    assert len(pulled) == 210


# workflow: D7
def test_a_hub_dataset_is_streamed(monkeypatch, tmp_path):
    asked_for = []

    def load_dataset(path, **options):
        asked_for.append((path, options))
        return datasets.Dataset.from_list(alpaca(5)).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(epoch(begin(tmp_path, "owner/name"))) == 5
    assert asked_for == [("owner/name", {"split": "train", "streaming": True})]


# workflow: D7
def test_a_pass_depends_on_the_seed_and_the_epoch_alone(two):
    found = begin(two, "b")
    first, second = epoch(found, 0), epoch(found, 1)
    assert sorted(first) == sorted(second) == sorted(f"b{n}" for n in range(90))
    assert len({tuple(rows) for rows in (first, second, [f"b{n}" for n in range(90)])}) == 3
    assert epoch(found, 0) == first == epoch(begin(two, "b"), 0)
    assert epoch(begin(two, "b", seed=1), 0) != first


# workflow: D7
def test_rows_move_no_farther_ahead_than_the_buffer(two):
    places = [int(row[1:]) for row in epoch(begin(two, "b", buffer_size=10))]
    assert all(place <= index + 9 for index, place in enumerate(places))
    assert places != sorted(places)
    assert epoch(begin(two, "b", buffer_size=1)) == [f"b{n}" for n in range(90)]


def test_a_pass_can_be_taken_up_where_it_was_left(two):
    options = {"mix_strategy": "interleave_over", "val_size": 5}
    whole = epoch(begin(two, "a,b", **options), 2)
    found = begin(two, "a,b", **options)
    found.train.set_epoch(2)
    rows = list(itertools.islice(found.train, 40))
    state = found.train.state_dict()
    again = begin(two, "a,b", **options)
    again.train.load_state_dict(state)
    again.train.set_epoch(2)
    assert asked(rows) + asked(again.train) == whole


# workflow: D4 D7
def test_max_samples_and_num_samples_are_the_first_rows_of_each_source(two, tmp_path):
    found = begin(two, "a,b", max_samples=5)
    assert sorted(epoch(found)) == [f"{name}{n}" for name in "ab" for n in range(5)]
    make_registry(tmp_path, a={**FILE, "num_samples": 3})
    assert sorted(epoch(begin(tmp_path, "a", max_samples=5))) == ["a0", "a1", "a2"]


# Mixing


# workflow: D6 D7
def test_concat_reads_one_after_another_and_warns_that_they_are_not_mixed(two, caplog):
    found = begin(two, "a,b", buffer_size=1)
    assert "mix_strategy concat reads the streams one after another" in caplog.text
    assert epoch(found) == [f"a{n}" for n in range(30)] + [f"b{n}" for n in range(90)]
    assert "mix_strategy concat reads the streams one after another" in found.report.notes[0]


# workflow: D6 D7
def test_interleaved_streams_end_with_the_first_or_the_last(two):
    under = epoch(begin(two, "a,b", mix_strategy="interleave_under"))
    assert len(under) == len(set(under)) < 120
    assert sum(row[0] == "a" for row in under) == 30
    over = begin(two, "a,b", mix_strategy="interleave_over", interleave_probs="0.5,0.5")
    assert len(set(epoch(over))) == 120
    assert epoch(over).count("a0") > 1
    assert epoch(over) == epoch(begin(two, "a,b", mix_strategy="interleave_over", interleave_probs=[0.5, 0.5]))
    assert sorted(epoch(over, 1)) != sorted(epoch(over, 0))  # other draws in another epoch


# workflow: D6
def test_streams_are_drawn_by_their_probabilities(tmp_path):
    make_file(tmp_path, "a.jsonl", alpaca(2000, "a"))
    make_file(tmp_path, "b.jsonl", alpaca(2000, "b"))
    make_registry(tmp_path, a=FILE, b={"file_name": "b.jsonl"})
    found = epoch(begin(tmp_path, "a,b", mix_strategy="interleave_under", interleave_probs="0.2,0.8"))
    assert sum(row[0] == "a" for row in found) / len(found) == pytest.approx(0.2, abs=0.02)


# What is held out


# workflow: R5 D7
@pytest.mark.parametrize("strategy", ["concat", "interleave_under", "interleave_over"])
def test_the_first_rows_of_the_shuffled_stream_are_held_out_of_every_epoch_and_the_rest_is_shuffled(two, strategy):
    found = begin(two, "a,b", val_size=6, mix_strategy=strategy)
    held_out = asked(found.evaluation[""])
    assert len(set(held_out)) == 6
    assert held_out == asked(begin(two, "a,b", val_size=6, mix_strategy=strategy).evaluation[""])
    for number in range(3):
        rows = epoch(found, number)
        assert not set(rows) & set(held_out)
        assert rows != sorted(rows, key=lambda row: (row[0], int(row[1:])))
    assert strategy != "concat" or len(epoch(found)) == 114
    assert found.evaluation_reports[""].read == 6


# workflow: R5 V8
def test_a_share_of_a_stream_cannot_be_held_out(two):
    with pytest.raises(ConfigError, match=r"val_size: 0\.1 of a stream cannot be known .* such as val_size: 100"):
        begin(two, "a", val_size=0.1)


# workflow: R5
@pytest.mark.parametrize("val_size", [30, 31])
def test_a_val_size_that_leaves_nothing_of_a_stream_is_an_error(two, val_size):
    with pytest.raises(DataError, match=rf"val_size: {val_size} would be held out of 30 rows, so none is left"):
        begin(two, "a", val_size=val_size)


def test_evaluation_sets_are_read_whole_beside_a_stream(two):
    found = begin(two, "b", eval_dataset="a")
    assert asked(found.evaluation[""]) == [f"a{n}" for n in range(30)]
    apart = begin(two, "a,b", val_size=40, mix_strategy="interleave_over", eval_on_each_dataset=True)
    assert sorted(apart.evaluation) == ["a", "b"]


# Bad rows and stages

BAD = {"instruction": "x", "output": ""}


# workflow: P2 D7
def test_bad_rows_of_a_stream_stop_it_or_are_counted_once(tmp_path, caplog):
    path = make_file(tmp_path, "a.jsonl", [*alpaca(2), BAD, *alpaca(2, "more"), BAD])
    with pytest.raises(DataError, match=r"a\.jsonl:3: the assistant's turn 2 is empty"):
        epoch(begin(tmp_path, path))
    found = begin(tmp_path, path, on_bad_row="skip", val_size=1)
    for number in range(3):
        assert len(epoch(found, number)) == 3
    report = found.report
    assert (report.read, report.kept, report.num_dropped) == (6, 4, 2)
    assert [(problem.line, problem.reason) for problem in report.drops] == [(3, "empty-answer"), (6, "empty-answer")]
    assert "1 of the rows are held out" in report.notes
    assert caplog.text.count("is dropped (empty-answer") == 1


# reliability: 38
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_row_of_another_format_far_behind_the_first_stops_a_stream(tmp_path, on_bad_row):
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = make_file(tmp_path, "a.jsonl", [*alpaca(150), chat])
    with pytest.raises(DataError, match=r"different formats: .*a\.jsonl:1 is alpaca, .*a\.jsonl:151 is messages"):
        epoch(begin(tmp_path, path, on_bad_row=on_bad_row))


def test_a_row_of_a_stream_that_lacks_a_column_of_its_format_is_a_bad_row(tmp_path):
    path = make_file(tmp_path, "a.jsonl", [*alpaca(150), {"instruction": "q", "answer": "a"}])
    with pytest.raises(DataError, match=r"a\.jsonl:151: there is no column 'output'"):
        epoch(begin(tmp_path, path))
    assert len(epoch(begin(tmp_path, path, on_bad_row="skip"))) == 150


# workflow: V5
def test_a_stream_of_the_wrong_kind_for_its_stage_is_an_error(two, tmp_path):
    with pytest.raises(ConfigError, match="dataset a is no ranking"):
        begin(two, "a", stage="rm")
    with pytest.raises(DataError, match="stage rm compares two answers"):
        epoch(begin(two, f"{two}/a.jsonl", stage="rm"))
    pairs = make_file(tmp_path, "p.jsonl", [{"prompt": "p", "chosen": "good", "rejected": "bad"}])
    assert next(iter(begin(two, pairs, stage="rm").train)).keys() == {"prompt", "chosen", "rejected", "source", "line"}


@pytest.mark.parametrize(
    ("options", "message"),
    [({"val_size": 1, "eval_dataset": "b"}, "both say what is held out"), ({"names": None}, "dataset is missing")],
)
def test_options_that_do_not_fit_are_an_error(two, options, message):
    with pytest.raises(ConfigError, match=message):
        begin(two, options.pop("names", "a"), **options)


# Into the trainer


# workflow: D7
def test_examples_of_several_kinds_become_tokens(tmp_path):
    texts = make_file(tmp_path, "t.jsonl", [{"text": "Once upon a time."}] * 3)
    pairs = make_file(tmp_path, "p.jsonl", [{"prompt": "2+2=", "completion": "4"}] * 3)
    chats = make_file(tmp_path, "c.jsonl", alpaca(3))
    found = begin(tmp_path, [texts, pairs, chats])
    how = Preparation(tiny.make_byte_tokenizer(), max_length=64, format=FINISHED)
    report = Report()
    rows = list(TokenStream("train_dataset", found.train, how, report))
    assert (len(rows), report.read, report.kept) == (9, 9, 9)
    assert {name for row in rows for name in row} == {"input_ids", "labels"}
