"""Rows are read as text: one byte is one token, and `|` stands for the end-of-sequence token."""

import itertools
import logging
import pickle
import warnings

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from tests import tiny
from tunesmith.errors import ConfigError, DataError
from tunesmith.train.constant_length import ConstantLengthDataset

BYTE = tiny.make_byte_tokenizer()
TEXTS = ["one", "two", "three", "four", "five"]
ROWS = [{"text": text} for text in TEXTS]


def make(rows=ROWS, tokenizer=BYTE, **options) -> ConstantLengthDataset:
    return ConstantLengthDataset(tokenizer, rows, **{"dataset_text_field": "text", "shuffle": False, **options})


def shown(rows) -> list[str]:
    return ["".join("|" if one == 257 else chr(one) for one in row["input_ids"].tolist()) for row in rows]


# trainer: G5
def test_the_arguments_are_those_of_trl():
    dataset = ConstantLengthDataset(BYTE, ROWS, "text")
    assert isinstance(dataset, IterableDataset)
    assert (dataset.seq_length, dataset.num_of_sequences, dataset.chars_per_token) == (1024, 1024, 3.6)
    switches = (dataset.infinite, dataset.shuffle, dataset.append_concat_token, dataset.add_special_tokens)
    assert switches == (False, True, True, True)
    assert (dataset.tokenizer, dataset.dataset, dataset.concat_token_id, len(dataset)) == (BYTE, ROWS, 257, 5)


# trainer: G5 G12
def test_every_row_has_the_same_length_and_documents_go_on_in_the_next():
    rows = list(make(seq_length=8))
    assert shown(rows) == ["one|two|", "three|fo", "ur|five|"]
    for row in rows:
        assert row.keys() == {"input_ids", "labels"}
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64
        assert torch.equal(row["input_ids"], row["labels"])
        assert row["input_ids"] is not row["labels"]


# trainer: G5
@pytest.mark.parametrize("name", ["seq_length", "num_of_sequences", "chars_per_token"])
def test_a_size_of_nothing_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name}: expected more than 0, got 0"):
        make(**{name: 0})


# trainer: G6
def test_a_formatting_function_makes_the_text_of_one_row():
    rows = [{"question": "2+2?", "answer": "4"}]
    function = "Q: {0[question]} A: {0[answer]}".format
    dataset = make(rows, dataset_text_field=None, formatting_func=function, seq_length=13)
    assert shown(dataset) == ["Q: 2+2? A: 4|"]


# trainer: G6
def test_a_formatting_function_goes_before_a_text_field():
    with pytest.warns(UserWarning, match="Ignoring `dataset_text_field` .'text'. and using `formatting_func`"):
        dataset = make(formatting_func=lambda row: row["text"].upper(), seq_length=4)
    assert shown(dataset)[:2] == ["ONE|", "TWO|"]


# trainer: G6
def test_neither_text_field_nor_function_is_an_error():
    with pytest.raises(ValueError, match="Either `dataset_text_field` or `formatting_func` should be provided"):
        make(dataset_text_field=None)


# trainer: G6
def test_a_column_that_is_not_there_is_named():
    with pytest.raises(DataError, match=r"no column 'prompt', only \['text'\]"):
        list(make(dataset_text_field="prompt"))


# trainer: G6
def test_a_function_for_batches_is_refused():
    with pytest.raises(DataError, match=r"formatting_func gave .*called with one row at a time"):
        list(make(dataset_text_field=None, formatting_func=lambda row: [row["text"]]))


# trainer: G7
def test_an_infinite_dataset_begins_again_and_loses_nothing():
    dataset = make(ROWS[:2], seq_length=3, infinite=True)
    assert "".join(shown(itertools.islice(dataset, 8))) == "one|two|" * 3
    assert "".join(shown(make(ROWS[:2], seq_length=3))) == "one|tw"


# trainer: G4 G7
def test_an_infinite_dataset_of_nothing_ends():
    for rows in ([], (row for row in ROWS)):
        with pytest.raises(DataError, match="Make sure that your dataset has enough samples to at least yield one"):
            list(make(rows, infinite=True, seq_length=64))


# trainer: G7
def test_a_row_may_take_more_than_one_pass():
    dataset = make(ROWS[:1], seq_length=10, infinite=True)
    assert shown([next(iter(dataset))]) == ["one|one|on"]


class Counted:
    """Rows that know how many of them were read."""

    def __init__(self, rows):
        self.rows, self.num_read = rows, 0

    def __iter__(self):
        for row in self.rows:
            self.num_read += 1
            yield row


# trainer: G8
@pytest.mark.parametrize(("chars_per_token", "expected"), [(1, 3), (2, 6), (0.5, 2)])
def test_texts_are_read_up_to_a_number_of_characters(chars_per_token, expected):
    rows = Counted([{"text": "abc"}] * 9)
    next(iter(make(rows, seq_length=4, num_of_sequences=2, chars_per_token=chars_per_token)))
    assert rows.num_read == expected


# trainer: G8
def test_token_ids_are_read_up_to_a_number_of_tokens():
    rows = Counted([{"input_ids": [1, 2, 3]}] * 9)
    row = next(iter(make(rows, dataset_text_field="input_ids", seq_length=4, num_of_sequences=2, chars_per_token=9)))
    assert rows.num_read == 3
    assert row["input_ids"].tolist() == [1, 2, 3, 257]


# trainer: G8
def test_tokenized_datasets_need_no_text_field():
    rows = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    for dataset in (rows, rows.with_format("torch"), rows.to_iterable_dataset()):
        for field in (None, "text"):
            found = list(make(dataset, dataset_text_field=field, seq_length=5))
            assert [row["input_ids"].tolist() for row in found] == [[1, 2, 257, 3, 257]]


# trainer: G12
@pytest.mark.parametrize("num_of_sequences", [1, 2, 100])
def test_the_rest_of_a_buffer_begins_the_next(num_of_sequences):
    dataset = make(seq_length=8, num_of_sequences=num_of_sequences, chars_per_token=0.1)
    assert shown(dataset) == ["one|two|", "three|fo", "ur|five|"]


# trainer: G9
def test_the_end_token_of_the_tokenizer_comes_first():
    assert make(eos_token_id=5).concat_token_id == 257
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.eos_token = None
    assert make(tokenizer=tokenizer, eos_token_id=5).concat_token_id == 5
    assert make(tokenizer=tokenizer).concat_token_id == 0


# trainer: G9
def test_an_end_token_with_id_0_is_one():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    assert tokenizer.eos_token_id == 0
    assert make(tokenizer=tokenizer, eos_token_id=5).concat_token_id == 0


# trainer: G10
def test_shuffling_keeps_the_samples_and_is_reproducible():
    rows = [{"text": f"{i:03}"} for i in range(50)]
    first = shown(make(rows, seq_length=4, shuffle=True))
    assert sorted(first) == [f"{i:03}|" for i in range(50)]
    assert first != sorted(first)
    assert first == shown(make(rows, seq_length=4, shuffle=True))
    assert first != shown(make(rows, seq_length=4, shuffle=True, seed=1))


# trainer: G10
def test_samples_and_rows_are_shuffled():
    rows = [{"text": f"{i:03}"} for i in range(50)]
    found = shown(make(rows, seq_length=8, shuffle=True))
    assert sorted("".join(found).split("|")[:-1]) == [f"{i:03}" for i in range(50)]
    neighbours = [(int(row[:3]), int(row[4:7])) for row in found]
    assert sum(second == first + 1 for first, second in neighbours) < 5  # samples
    assert "".join(found) != "".join(shown(make(rows, seq_length=8, shuffle=True, num_of_sequences=1)))


# trainer: G10
def test_shuffling_stays_inside_the_buffer():
    rows = [{"text": f"{i:03}"} for i in range(50)]
    found = shown(make(rows, seq_length=4, num_of_sequences=10, chars_per_token=0.75, shuffle=True))
    assert [row[:2] for row in found] == sorted(row[:2] for row in found)


# trainer: G10
def test_each_pass_and_each_epoch_has_an_order_of_its_own():
    dataset = make([{"text": f"{i:03}"} for i in range(50)], seq_length=4, shuffle=True)
    first, second = shown(dataset), shown(dataset)
    assert (first != second, dataset.epoch) == (True, 2)
    dataset.set_epoch(0)
    next(iter(dataset))  # looking at a row changes nothing
    assert shown(dataset) == first
    endless = make(dataset.dataset, seq_length=4, shuffle=True, infinite=True)
    assert shown(itertools.islice(endless, 100)) == first + second


# trainer: G11
def test_the_end_token_may_be_left_out():
    assert shown(make(seq_length=6, append_concat_token=False)) == ["onetwo", "threef", "ourfiv"]


# trainer: G11
def test_a_sample_that_ends_with_the_end_token_gets_no_second_one():
    rows = [{"text": f"yes{BYTE.eos_token}"}, {"text": "no"}]
    assert shown(make(rows, seq_length=7)) == ["yes|no|"]


# trainer: G11
def test_the_tokenizer_adds_its_special_tokens_to_each_sample_on_request():
    tokenizer = tiny.make_sentencepiece_like_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for adds, front in ((True, [bos]), (False, [])):
        expected = [*front, *tokenizer("one", add_special_tokens=False)["input_ids"], eos]
        [row] = make(ROWS[:1], tokenizer=tokenizer, seq_length=len(expected), add_special_tokens=adds)
        assert row["input_ids"].tolist() == expected


# trainer: G11
@pytest.mark.parametrize("make_tokenizer", [tiny.make_bpe_tokenizer, tiny.make_sentencepiece_like_tokenizer])
def test_the_ids_are_those_of_the_tokenizer_end_to_end(make_tokenizer):
    tokenizer = make_tokenizer()
    expected = [one for text in TEXTS for one in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    found = [one for row in make(tokenizer=tokenizer, seq_length=4) for one in row["input_ids"].tolist()]
    assert found == expected[: len(expected) // 4 * 4]


# trainer: G12
def test_what_makes_no_full_row_is_counted_and_said(caplog):
    dataset = make(seq_length=10)
    with caplog.at_level(logging.WARNING):
        assert shown(dataset) == ["one|two|th", "ree|four|f"]
    assert dataset.dropped_tokens == 4
    assert "4 token(s) at the end of the pass made no full row of 10 and were left out; packing=True" in caplog.text


# trainer: G12
def test_nothing_is_said_where_nothing_is_left_out(caplog):
    dataset = make(seq_length=8)
    assert len(list(dataset)) == dataset.current_size == 3
    assert (dataset.dropped_tokens, caplog.text) == (0, "")


class Stream(torch.utils.data.IterableDataset):
    """Knows nothing of workers."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def as_sharded_stream(rows):
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2)


# trainer: G5
@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list, Stream, as_sharded_stream])
def test_workers_read_each_row_once(kind):
    rows = [{"text": f"{i:03}"} for i in range(8)]
    loader = DataLoader(make(kind(rows), seq_length=4), batch_size=None, num_workers=2)
    assert sorted(shown(loader)) == [f"{i:03}|" for i in range(8)]


# trainer: G7
def test_more_workers_than_rows_do_not_hang():
    dataset = make(ROWS[:1], seq_length=4, infinite=True)
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch counts rows by len()
        assert shown([next(loader), next(loader)]) == ["one|", "one|"]


def test_the_dataset_can_be_sent_to_another_process():
    assert shown(pickle.loads(pickle.dumps(make(seq_length=8)))) == shown(make(seq_length=8))


# trainer: G5
def test_a_loader_makes_batches_of_the_rows():
    batch = next(iter(DataLoader(make(seq_length=8), batch_size=3)))
    assert batch["input_ids"].shape == batch["labels"].shape == (3, 8)
