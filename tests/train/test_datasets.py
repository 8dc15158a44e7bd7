"""Every kind of dataset becomes token rows whose ids and labels are written out here: one byte is one id."""

import json
import random
import sys
from multiprocessing.context import SpawnProcess
from multiprocessing.spawn import get_preparation_data

import datasets
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import DataCollatorForLanguageModeling

import tunesmith.data.encode
import tunesmith.data.parallel
from tests import tiny
from tunesmith.data.report import Report
from tunesmith.data.rows import RowError
from tunesmith.errors import ConfigError, DataError
from tunesmith.train.datasets import prepared, prepared_mixture
from tunesmith.train.options import SFTConfig
from tunesmith.train.reading import Preparation, preparation_of

EOS = 257
TEXTS = Dataset.from_dict({"text": ["one", "two!", "three"]})
CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
CHAT_TEXT = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n⟦4<|im_end|>⟧\n"


def ids(text: str) -> list[int]:
    return list(text.encode())


def arguments(**options) -> SFTConfig:
    args = SFTConfig()
    args.dataset_kwargs, args.num_of_sequences, args.chars_per_token = None, 1024, 3.6
    for name, value in options.items():
        setattr(args, name, value)
    return args


def make(dataset, *, report=None, name="train_dataset", max_length=64, family="chatml", **options):
    tokenizer = options.pop("tokenizer", None) or tiny.make_byte_tokenizer(family)
    report = Report() if report is None else report
    found = prepared(name, dataset, Preparation(tokenizer, max_length, **options), report)
    assert report.read == report.kept + report.num_dropped
    return found


def marked(row, tokenizer=None) -> str:
    """The row's text, trained tokens in ⟦ ⟧."""
    tokenizer = tokenizer or tiny.make_byte_tokenizer()
    text, inside = "", False
    for id, label in zip([*row["input_ids"], None], [*row["labels"], -100]):
        if (label != -100) != inside:
            text, inside = text + "⟧⟦"[not inside], not inside
        text += "" if id is None else tokenizer.decode([id])
    return text


class TorchRows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TorchStream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = list(rows)

    def __iter__(self):
        return iter(self.rows)


# Plain text


# trainer: F9 B1 C1
@pytest.mark.parametrize(
    "build", [tiny.make_byte_tokenizer, tiny.make_bpe_tokenizer, tiny.make_sentencepiece_like_tokenizer]
)
def test_a_text_is_the_tokenizers_own_ids_and_the_stop_token(build):
    tokenizer = build()
    rows = make(TEXTS, tokenizer=tokenizer)
    for row, text in zip(rows, TEXTS["text"]):
        assert row["input_ids"] == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        begin = 1 if row["input_ids"][0] == tokenizer.bos_token_id else 0
        assert row["labels"] == [-100] * begin + row["input_ids"][begin:]


# trainer: F9 C1
def test_a_long_text_is_cut_where_the_tokenizer_would_cut_it_and_gets_no_false_stop(sentencepiece_like_tokenizer):
    report, text = Report(), "how many legs has a spider? " * 9
    rows = make([{"text": text}], tokenizer=sentencepiece_like_tokenizer, max_length=12, report=report)
    assert rows[0]["input_ids"] == sentencepiece_like_tokenizer(text, truncation=True, max_length=12)["input_ids"]
    assert [(change.reason, change.line) for change in report.changes] == [("cut", 1)]


def test_a_cut_on_the_left_keeps_the_stop_token():
    report = Report()
    rows = make([{"text": "abcdef"}], max_length=4, too_long="truncate_left", report=report)
    assert rows[0] == {"input_ids": [*ids("def"), EOS], "labels": [*ids("def"), EOS]}
    assert [change.reason for change in report.changes] == ["cut"]


# trainer: B8 G11 G14
@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, ["<s>", "hi", "</s>"]),
        ({"append_concat_token": False}, ["<s>", "hi"]),
        ({"add_special_tokens": False}, ["hi", "</s>"]),
        ({"add_special_tokens": False, "append_concat_token": False}, ["hi"]),
    ],
)
def test_dataset_kwargs_say_what_stands_around_a_text(kwargs, expected, sentencepiece_like_tokenizer):
    how = preparation_of(arguments(dataset_kwargs=kwargs), sentencepiece_like_tokenizer, 64)
    row = prepared("train_dataset", [{"text": "hi"}], how, Report())[0]
    tokens = sentencepiece_like_tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert "|".join(tokens).replace("▁", "").replace("h|i", "hi").split("|") == expected


# trainer: B8
def test_dataset_kwargs_say_how_rows_are_read(byte_tokenizer):
    kwargs = {"columns": {"text": "body"}, "format": "text", "on_bad_row": "skip"}
    report = Report()
    how = preparation_of(arguments(dataset_kwargs=kwargs), byte_tokenizer, 64)
    rows = prepared("train_dataset", [{"body": 5}, {"body": "hi"}], how, report)
    assert rows[0]["input_ids"] == [*ids("hi"), EOS]
    assert [(drop.reason, drop.line) for drop in report.drops] == [("bad-content", 1)]


# trainer: B1
def test_the_text_may_stand_in_another_column_which_then_wins():
    rows = make([{"body": "hi", "messages": CHAT}], text_field="body")
    assert rows[0]["input_ids"] == [*ids("hi"), EOS]
    with pytest.raises(
        DataError, match=r"row 1: dataset_text_field names the column 'boddy', but .* Did you mean 'body'"
    ):
        make([{"body": "hi"}], text_field="boddy")


def test_a_control_token_in_a_text_counts_and_is_not_doubled():
    assert make([{"text": "a<|im_end|>"}])[0]["input_ids"] == [*ids("a"), EOS]


def test_a_tokenizer_without_a_stop_token_is_an_error_unless_none_is_wanted():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer has no eos_token"):
        make(TEXTS, tokenizer=tokenizer)
    assert make(TEXTS, tokenizer=tokenizer, append_eos=False)[0]["input_ids"] == ids("one")


def test_empty_texts_are_dropped_and_counted():
    report = Report()
    assert len(make([{"text": "a"}, {"text": ""}, {"text": " \n"}], report=report)) == 1
    assert (report.read, report.kept, [drop.reason for drop in report.drops]) == (3, 1, ["empty-text"] * 2)


# Conversations


# trainer: F1
@pytest.mark.parametrize(
    "row",
    [
        {"messages": CHAT},
        {"conversations": CHAT},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"instruction": "2+2?", "input": "", "output": "4"},
        {"messages": CHAT, "text": None, "prompt": None, "completion": None},
    ],
)
def test_conversations_are_rendered_with_the_chat_template(row):
    assert marked(make([row])[0]) == CHAT_TEXT
    assert marked(make(Dataset.from_list([row]))[0]) == CHAT_TEXT


# trainer: F2
def test_prompt_and_completion_texts_become_two_turns():
    assert marked(make([{"prompt": "2+2?", "completion": "4"}])[0]) == CHAT_TEXT
    turns = make([{"prompt": CHAT[:1], "completion": CHAT[1:]}])[0]
    assert marked(turns) == CHAT_TEXT


def test_without_a_template_prompt_and_completion_are_joined():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.chat_template = None
    assert marked(make([{"prompt": "2+2=", "completion": "4"}], tokenizer=tokenizer)[0]) == "2+2=⟦4<|im_end|>⟧"


# trainer: F3
def test_unknown_columns_are_an_error_that_names_them():
    with pytest.raises(DataError, match=r"train_dataset row 1: no known format has the columns question, answer"):
        make([{"question": "2+2?", "answer": "4"}])


def test_tables_fill_in_nulls_and_templates_do_not_see_them():
    tool = {"type": "function", "function": {"name": "add", "parameters": {"x": {"type": "int"}}}}
    other = {"type": "function", "function": {"name": "sub", "parameters": {"y": {"type": "int"}}}}
    rows = [{"messages": CHAT, "tools": [tool]}, {"messages": CHAT, "tools": [other]}]
    assert "None" in str(Dataset.from_list(rows)[0]["tools"])
    texts = [marked(row) for row in make(Dataset.from_list(rows), max_length=999)]
    assert texts == [marked(row) for row in make(rows, max_length=999)]
    assert texts == [
        marked(row) for row in make([{**row, "tools": json.dumps(row["tools"])} for row in rows], max_length=999)
    ]


THINKING = "{% for m in messages %}{{ m.role }}{{ '+' if think else '-' }}{{ m.content }}<|im_end|>{% endfor %}" + (
    "{% if add_generation_prompt %}assistant{{ '+' if think else '-' }}{% endif %}"
)


def test_a_row_sets_variables_of_its_template():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.chat_template = THINKING
    rows = [{"messages": CHAT, "chat_template_kwargs": {"think": True}}, {"messages": CHAT}]
    found = [marked(row, tokenizer) for row in make(rows, tokenizer=tokenizer)]
    assert found == ["user+2+2?<|im_end|>assistant+⟦4<|im_end|>⟧", "user-2+2?<|im_end|>assistant-⟦4<|im_end|>⟧"]
    with pytest.raises(RowError, match=r"row 1: 'chat_template_kwargs' is an object .* without tokenize"):
        make([{"messages": CHAT, "chat_template_kwargs": {"tokenize": True}}])


# reliability: 40
def test_a_cut_that_leaves_nothing_to_train_drops_the_row():
    report = Report()
    late = [{"role": "user", "content": "?" * 30}, CHAT[1]]
    rows = make([{"messages": CHAT}, {"messages": late}], report=report, max_length=26)
    assert [marked(row) for row in rows] == [CHAT_TEXT]
    assert [(drop.reason, drop.line) for drop in report.drops] == [("truncated", 2)]
    assert not report.changes
    with pytest.raises(DataError, match=r"(?s)nothing is left to train on: the only row was dropped.*truncated"):
        make([{"messages": CHAT}], max_length=10)


# Kinds of datasets


# trainer: A5 F4
@pytest.mark.parametrize(
    "kind",
    [
        lambda rows: rows,
        Dataset.from_list,
        TorchRows,
        TorchStream,
        lambda rows: Dataset.from_list(rows).to_iterable_dataset(),
        lambda rows: Dataset.from_list(rows).with_format("torch"),
    ],
)
def test_every_kind_of_dataset_gives_the_same_rows(kind):
    rows = [{"messages": CHAT}, {"messages": [CHAT[0], {"role": "assistant", "content": "four"}]}]
    report = Report()
    found = prepared("train_dataset", kind(rows), Preparation(tiny.make_byte_tokenizer(), 64), report)
    assert [marked(row) for row in found] == [CHAT_TEXT, CHAT_TEXT.replace("4", "four")]
    assert (report.read, report.kept, report.num_dropped) == (2, 2, 0)
    assert report.num_trained == 2 + 5


# trainer: A5
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            DatasetDict({"train": TEXTS, "test": TEXTS}),
            r"is a dict of datasets \(train, test\)\. Pick a split: dataset\['train'\]",
        ),
        ("imdb", r"train_dataset is a str; expected .* Load it first"),
        (TEXTS.to_pandas(), r"is a DataFrame; .*Dataset\.from_pandas"),
        (["a", "b"], r"train_dataset row 1 is a str, not a dict of columns"),
        ([], r"no rows were read"),
    ],
)
def test_what_is_no_dataset_is_an_error_that_says_what_to_do(dataset, message):
    with pytest.raises((ConfigError, DataError), match=message):
        make(dataset)


# trainer: M3 B8
def test_skip_prepare_dataset_returns_the_very_dataset(byte_tokenizer):
    how = preparation_of(arguments(dataset_kwargs={"skip_prepare_dataset": True}), byte_tokenizer, 64)
    assert prepared("train_dataset", TEXTS, how, Report()) is TEXTS
    masked = Dataset.from_dict({"input_ids": [[1]], "completion_mask": [[1]]})
    with pytest.raises(ConfigError, match="has completion_mask but no labels, and skip_prepare_dataset"):
        prepared("train_dataset", masked, how, Report())


def test_documents_that_only_positions_tell_apart_are_refused_if_nobody_prepares_them(byte_tokenizer):
    how = preparation_of(arguments(dataset_kwargs={"skip_prepare_dataset": True}), byte_tokenizer, 64)
    packed = Dataset.from_dict({"input_ids": [[1, 2]] * 2, "position_ids": [[0, 1], [0, 0]]})
    with pytest.raises(ConfigError, match="train_dataset row 2: its position_ids begin anew, and skip_prepare"):
        prepared("train_dataset", packed, how, Report())
    told = packed.add_column("seq_lengths", [[2], [1, 1]])
    assert prepared("train_dataset", told, how, Report()) is told
    padded = packed.add_column("attention_mask", [[1, 1], [0, 1]])
    assert prepared("train_dataset", padded, how, Report()) is padded


# Tokenized by somebody else


# trainer: M2
def test_tokenized_rows_are_used_as_they_are_however_long():
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3, 4, 5], [6]], "labels": [[-100, 2, 3, 4, 5], [6]]})
    report = Report()
    assert make(dataset, max_length=2, report=report) is dataset
    assert (report.lengths, report.num_tokens, report.num_trained) == ([5, 1], 6, 4)


def test_of_packed_rows_the_first_token_of_each_document_is_not_counted_as_trained():
    columns = {"input_ids": [[1, 2, 3, 4, 5], [6, 7]], "labels": [[1, 2, 3, -100, 5], [6, 7]]}
    report = Report()
    make(Dataset.from_dict({**columns, "seq_lengths": [[2, 3], [2]]}), report=report)
    assert (report.num_tokens, report.num_trained) == (7, 3)


# trainer: M2
@pytest.mark.parametrize("kind", [lambda dataset: dataset, list, TorchRows, TorchStream, Dataset.to_iterable_dataset])
def test_labels_default_to_the_ids(kind):
    rows = list(make(kind(Dataset.from_dict({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}))))
    assert [(row["input_ids"], row["labels"]) for row in rows] == [([1, 2], [1, 2]), ([3], [3])]


@pytest.mark.parametrize("kind", [lambda dataset: dataset, list, TorchStream])
@pytest.mark.parametrize(("train_on", "labels"), [("assistant", [-100, 2, -100, 4]), ("all", [-100, 2, 3, 4])])
def test_mask_columns_leave_tokens_out(kind, train_on, labels):
    dataset = Dataset.from_dict(
        {"input_ids": [[1, 2, 3, 4]], "completion_mask": [[1, 1, 0, 1]], "assistant_masks": [[0, 1, 1, 1]]}
    )
    assert next(iter(make(kind(dataset), train_on=train_on)))["labels"] == labels


def test_padding_of_tokenized_rows_is_taken_out():
    dataset = Dataset.from_dict({"input_ids": [[9, 1, 2, 9]], "attention_mask": [[0, 1, 1, 0]]})
    assert make(dataset)[0] == {"input_ids": [1, 2], "labels": [1, 2]}


def test_a_format_that_hides_columns_hides_no_labels():
    dataset = TEXTS.add_column("input_ids", [[1, 2], [3], [4]]).with_format("torch", columns=["input_ids"])
    row = make(dataset)[0]
    assert (row["input_ids"], row["labels"]) == ([1, 2], [1, 2])


# trainer: M2 G2
def test_tokenized_rows_are_packed_only_if_asked_and_long_ones_are_counted():
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10, 11]]})
    report = Report()
    rows = make(dataset, packing=True, max_length=5, report=report)
    assert [row["input_ids"] for row in rows] == [[6, 7, 8, 9, 10], [1, 2, 3, 4, 5]]
    assert [(change.reason, change.line) for change in report.changes] == [("cut", 3)]
    dropping = Report()
    rows = make(dataset, packing=True, max_length=5, too_long="drop", report=dropping)
    assert [row["seq_lengths"] for row in rows] == [[3, 2]]
    assert [(drop.reason, drop.line) for drop in dropping.drops] == [("too-long", 3)]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("labels", [[1], [1, 2]]),  # as many as ids in all
        ("completion_mask", [[1], [1, 1]]),
        ("attention_mask", [[1], [1, 1]]),
        ("seq_lengths", [[1], [1, 1]]),
    ],
)
def test_columns_of_unequal_length_are_an_error_with_the_row(column, values, kind):
    rows = kind([{"input_ids": ids, column: some} for ids, some in zip([[1, 2], [3]], values)])
    with pytest.raises(RowError, match=rf"train_dataset row 1: .* found input_ids 2, {column} 1\. Give every row"):
        make(rows)


@pytest.mark.parametrize("kind", [list, Dataset.from_list, TorchStream])
def test_tokenized_rows_that_cannot_be_used_are_dropped_and_counted(kind):
    report = Report()
    rows = [
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"input_ids": [3], "labels": [3, 4]},
        {"input_ids": [], "labels": []},
    ]
    assert [row["input_ids"] for row in make(kind(rows), on_bad_row="skip", report=report)] == [[1, 2]]
    assert [(drop.reason, drop.line) for drop in report.drops] == [("unequal-columns", 2), ("no-token", 3)]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_rows_without_labels_among_others_that_have_them_are_trained_whole(kind):
    rows = make(kind([{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4], "labels": None}]))
    assert rows["labels"][:] == [[-100, 2], [3, 4]]


def picked(rows):
    """A table of more rows, in chunks, of which an index picks these."""
    part = Dataset.from_list(rows)
    return datasets.concatenate_datasets([part, part]).select([i + len(rows) * (i % 2) for i in range(len(rows))])


@pytest.mark.parametrize("seed", range(30))
def test_tokenized_rows_are_the_same_from_a_list_a_table_and_a_stream(seed):
    draw = random.Random(seed)
    columns = {"labels": [-100, 5], "completion_mask": [0, 1], "attention_mask": [0, 1, 1, 1], "weights": [0.5, 2.0]}
    present = [name for name in columns if draw.random() < 0.5]
    rows = []
    for length in draw.choices(range(1, 6), k=3):
        values = {name: draw.choices(columns[name], k=length) for name in present}
        rows.append({"input_ids": draw.choices(range(200), k=length), **values})

    def outcome(dataset):
        report = Report()
        found = [(row["input_ids"], row["labels"], row.get("weights")) for row in make(dataset, report=report)]
        return found, report.num_tokens, report.num_trained, report.num_dropped

    assert outcome(rows) == outcome(Dataset.from_list(rows)) == outcome(picked(rows)) == outcome(TorchStream(rows))


def test_rows_as_a_tokenizer_gives_tensors_lose_the_dimension_of_one():
    assert make([{"input_ids": torch.tensor([[1, 2]])}])[0]["input_ids"] == [1, 2]
    assert make(Dataset.from_dict({"input_ids": [[[1, 2]]]}))[0]["input_ids"] == [1, 2]


def test_no_tokenized_row_at_all_is_an_error_that_names_the_dataset():
    with pytest.raises(DataError, match=r"eval_dataset\[a\]: no rows were read"):
        make(Dataset.from_dict({"input_ids": [], "labels": []}), name="eval_dataset[a]")


@pytest.mark.parametrize("kind", [list, Dataset.from_list, TorchRows])
def test_rows_that_come_packed_stay_so_and_are_shuffled_if_asked(kind):
    rows = [{"input_ids": [i, i], "labels": [i, i], "seq_lengths": [1, 1]} for i in range(20)]
    found = [row["input_ids"][0] for row in make(kind(rows), packing=True, shuffle=True)]
    assert found != list(range(20))
    assert sorted(found) == list(range(20))


def test_packed_rows_and_single_documents_go_together():
    rows = make([{"input_ids": [1, 2, 3], "seq_lengths": [1, 2]}, {"input_ids": [4, 5]}])
    assert rows["seq_lengths"][:] == [[1, 2], [2]]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", [list, Dataset.from_list, TorchRows, TorchStream])
def test_positions_that_begin_anew_are_documents(kind, packing):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "position_ids": [0, 0, 1]},
        {"input_ids": [4, 5, 6], "labels": [4, 5, 6], "position_ids": [0, 1, 2]},
    ]
    found = list(make(kind(rows), packing=packing, max_length=3))
    assert sorted(length for row in found for length in row.get("seq_lengths", [3])) == [1, 2, 3]


def test_positions_of_padding_begin_no_document():
    rows = [{"input_ids": [9, 9, 1, 2], "attention_mask": [0, 0, 1, 1], "position_ids": [1, 1, 0, 1]}]
    assert make(Dataset.from_list(rows))[0] == {"input_ids": [1, 2], "labels": [1, 2]}


@pytest.mark.parametrize("kind", [list, Dataset.from_list, TorchStream])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("labels", 3.7, "labels hold 3.7 at token 2, and must be whole numbers"),
        ("labels", None, "labels hold None at token 2"),
        ("labels", float("nan"), "labels hold nan at token 2"),
        ("labels", 300, "labels hold 300 at token 2, and must be tokens of the model, from 0 to 258, or -100 where"),
        ("labels", -1, "labels hold -1 at token 2"),
        ("completion_mask", 0.5, "completion_mask hold 0.5 at token 2"),
        ("input_ids", -100, "input_ids hold -100 at token 2, and must be tokens of the model, from 0 to 258\\."),
    ],
)
def test_numbers_that_are_no_tokens_are_an_error_with_the_row(column, value, message, kind):
    good = {"input_ids": [1, 2], "labels": [1, 2], "completion_mask": [1, 1]}
    with pytest.raises(RowError, match=f"^train_dataset row 2: {message}") as caught:
        list(make(kind([good, good | {column: [1, value]}]), num_ids=259))
    assert caught.value.reason == "bad-tokens"


@pytest.mark.parametrize("kind", [list, Dataset.from_list, TorchStream])
def test_whole_numbers_may_be_written_as_floats(kind):
    (row,) = make(kind([{"input_ids": [1, 2], "labels": [-100.0, 2.0]}]))
    assert (row["input_ids"], row["labels"]) == ([1, 2], [-100, 2])
    assert all(type(label) is int for label in row["labels"])


# Formatting functions


def batched_function(rows):
    return [f"{question} {answer}" for question, answer in zip(rows["prompt"], rows["completion"])]


def row_function(row):
    return f"{row['prompt']} {row['completion']}"


# trainer: F5 F6 A11
@pytest.mark.parametrize("function", [batched_function, row_function])
@pytest.mark.parametrize("options", [{}, {"text_field": "body"}, {"packing": True}])
def test_a_formatting_function_is_never_ignored(function, options):
    rows = [{"prompt": "a", "completion": "b", "messages": CHAT, "body": "no"}]
    row = make(rows, formatting_func=function, **options)[0]
    assert row["input_ids"] == row["labels"] == [*ids("a b"), EOS]


# trainer: G13
def test_a_packed_function_joins_several_fields():
    report = Report()
    rows = [{"prompt": f"q{i}", "completion": "a"} for i in range(4)]
    packed = make(rows, formatting_func=row_function, packing=True, max_length=10, report=report)
    assert [row["input_ids"] for row in packed] == [[*ids(f"q{i} a"), EOS, *ids(f"q{i + 1} a"), EOS] for i in (0, 2)]


# trainer: F8
def test_a_formatting_function_beside_input_ids_is_warned_of():
    dataset = Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1, 2]]})
    with pytest.warns(UserWarning, match="train_dataset has input_ids, .* formatting_func is not used"):
        assert make(dataset, formatting_func=row_function) is dataset
    with pytest.warns(UserWarning, match="formatting_func is not used"):
        assert len(list(make(TorchStream(dataset), formatting_func=row_function))) == 1


# trainer: F10
def test_kept_columns_stand_beside_the_tokens_of_their_row():
    dataset = Dataset.from_dict({"text": ["a", "", "b"], "id": [1, 2, 3]})
    with pytest.warns(UserWarning, match="remove_unused_columns=False keeps the columns text, id of train_dataset"):
        rows = make(dataset, keep_columns=True)
    assert [(row["input_ids"], row["id"], row["text"]) for row in rows] == [([97, EOS], 1, "a"), ([98, EOS], 3, "b")]
    with pytest.warns(UserWarning, match="keeps the columns"):
        stream = make(dataset.to_iterable_dataset(), keep_columns=True)
    assert [(row["id"], row["labels"]) for row in stream] == [(1, [97, EOS]), (3, [98, EOS])]


# trainer: A4
def test_rows_for_a_collator_of_the_persons_have_what_the_stock_one_reads():
    tokenizer = tiny.make_byte_tokenizer()
    rows = make(TEXTS, own_collator=True, tokenizer=tokenizer)
    assert rows.column_names == ["input_ids", "attention_mask"]
    batch = DataCollatorForLanguageModeling(tokenizer, mlm=False)(list(rows))
    assert batch["labels"][0].tolist() == [*ids("one"), EOS, -100, -100]
    assert make([{"messages": CHAT}], own_collator=True).column_names == ["input_ids", "labels", "attention_mask"]
    assert list(make(TorchStream(TEXTS), own_collator=True)) == list(rows)


# Packing


# trainer: B2 G1 G12
def test_packed_documents_are_kept_apart_and_whole():
    rows = make(TEXTS, packing=True, max_length=10)
    assert [row["input_ids"] for row in rows] == [[*ids("three"), EOS, *ids("one"), EOS], [*ids("two!"), EOS]]
    assert [row["seq_lengths"] for row in rows] == [[6, 4], [5]]


# trainer: G1 G12
def test_wrapped_rows_have_constant_length_and_long_texts_go_on_in_the_next():
    report = Report()
    rows = make(
        [{"text": "abcdefgh"}, {"text": "xyz"}], packing=True, packing_strategy="wrapped", max_length=5, report=report
    )
    assert [row["input_ids"] for row in rows] == [ids("abcde"), [*ids("fgh"), EOS, *ids("x")], [*ids("yz"), EOS]]
    assert not report.changes


def test_bfd_split_goes_on_with_a_long_text_in_another_document():
    rows = make([{"text": "abcdefgh"}, {"text": "x"}], packing=True, packing_strategy="bfd_split", max_length=6)
    assert [row["seq_lengths"] for row in rows] == [[6], [3, 2]]
    assert rows[1]["input_ids"] == [*ids("gh"), EOS, *ids("x"), EOS]


# trainer: G2 B9
@pytest.mark.parametrize(("eval_packing", "num_rows"), [(None, 2), (True, 2), (False, 3)])
def test_evaluation_data_is_packed_as_eval_packing_says(eval_packing, num_rows, byte_tokenizer):
    args = arguments(packing=True, eval_packing=eval_packing)
    train, evaluation = (preparation_of(args, byte_tokenizer, 10, evaluation=value) for value in (False, True))
    assert len(prepared("train_dataset", TEXTS, train, Report())) == 2
    assert len(prepared("eval_dataset", TEXTS, evaluation, Report())) == num_rows


# trainer: G4
@pytest.mark.parametrize("dataset", [[], [{"text": ""}], TEXTS.select([])])
def test_packing_nothing_is_an_error(dataset):
    message = "Error occurred while packing the dataset. Make sure that your dataset has enough samples to at least"
    with pytest.raises(ValueError, match=message):
        make(dataset, packing=True)
    with pytest.raises(ValueError, match=message):
        list(make(TorchStream(dataset), packing=True))


def test_rows_are_shuffled_by_the_seed_before_they_are_packed():
    rows = [{"text": f"{i:03}"} for i in range(50)]
    first = make(rows, packing=True, shuffle=True, max_length=8)
    assert first[:] == make(rows, packing=True, shuffle=True, max_length=8)[:]
    assert first[:] != make(rows, packing=True, shuffle=True, seed=1, max_length=8)[:]
    assert first[:] != make(rows, packing=True, max_length=8)[:]
    assert sorted(id for ids in first["input_ids"] for id in ids) == sorted(
        id for ids in make(rows)["input_ids"] for id in ids
    )


def test_documents_are_labelled_by_a_given_function_before_they_are_packed():
    def after_colon(tokens):
        at = tokens.index(ord(":")) + 1 if ord(":") in tokens else len(tokens)
        return [-100] * at + tokens[at:]

    report = Report()
    rows = make([{"text": "a: b"}, {"text": "none"}], packing=True, label_with=after_colon, report=report)
    assert [marked(row) for row in rows] == ["a:⟦ b<|im_end|>⟧"]
    assert [(drop.reason, drop.line) for drop in report.drops] == [("no-trained-token", 2)]

    def refuse(tokens):
        raise DataError("no template")

    for row in ({"text": "a: b"}, {"input_ids": ids("a: b")}):
        for packing in (True, False):
            with pytest.raises(DataError, match=r"^train_dataset row 1: no template$"):
                make([row], packing=packing, label_with=refuse)


def test_a_row_that_is_dropped_does_not_count_as_changed():
    report, tokenizer = Report(), tiny.make_bpe_tokenizer()
    short, long = ([CHAT[0], {"role": "assistant", "content": text}] for text in ("\nb", "\nb" * 40))
    make([{"messages": short}, {"messages": long}], tokenizer=tokenizer, too_long="drop", report=report)
    assert [(change.reason, change.line) for change in report.changes] == [("split-at-boundary", 1)]
    assert [(drop.reason, drop.line) for drop in report.drops] == [("too-long", 2)]


# Batches and processes


# trainer: B6
@pytest.mark.parametrize(("batch_size", "calls"), [(2, 2), (1000, 1), (None, 1), (0, 1), (-1, 1)])
def test_examples_are_tokenized_in_batches(batch_size, calls, monkeypatch):
    sizes = []
    tokenize = tunesmith.data.encode.tokenize
    monkeypatch.setattr(
        tunesmith.data.encode, "tokenize", lambda rows, *rest: sizes.append(len(rows)) or tokenize(rows, *rest)
    )
    assert [row["input_ids"][0] for row in make(TEXTS, batch_size=batch_size)] == ids("ott")
    assert len(sizes) == calls
    assert sum(sizes) == 3


# trainer: B5
def test_two_processes_give_the_same_rows_and_report_as_one():
    rows = [{"messages": [{"role": "user", "content": "x" * i}, *CHAT[1:]]} for i in range(1, 30)]
    one, two = Report(), Report()
    options = {"batch_size": 4, "max_length": 40, "too_long": "drop"}
    assert make(rows, report=one, **options)[:] == make(rows, report=two, num_proc=2, **options)[:]
    assert one.to_json() == two.to_json()
    assert one.num_dropped > 0
    with pytest.raises(DataError, match=r"train_dataset row 6: \d+ tokens, max_length is 27"):
        make(rows, num_proc=2, **{**options, "too_long": "error", "max_length": 27})


def test_workers_do_not_run_the_persons_script_again(monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "train.py"), raising=False)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(SpawnProcess, "_Popen", staticmethod(lambda process: get_preparation_data("worker")))
    main = sys.modules["__main__"]
    assert "init_main_from_path" in get_preparation_data("worker")
    assert not {"init_main_from_path", "init_main_from_name"} & tunesmith.data.parallel._Worker._Popen(None).keys()
    assert sys.modules["__main__"] is main


def test_repeated_rows_are_noted_across_batches():
    report = Report()
    make([{"text": "a"}, {"text": "b"}, {"text": "a"}], batch_size=1, report=report)
    assert report.notes == ["format: text (column text)", "1 of 3 examples repeat an earlier one word for word (kept)"]


# trainer: F4
def test_a_json_file_is_loaded_and_packed(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS["text"]))
    dataset = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))
    assert make(dataset, packing=True, max_length=10)[:] == make(TEXTS, packing=True, max_length=10)[:]


# Mixtures


def mixture(parts, **options):
    reports = {}
    how = Preparation(tiny.make_byte_tokenizer(), 64, **options)
    return prepared_mixture("train_dataset", parts, how, reports), reports


def test_parts_in_different_formats_are_mixed_as_tokens():
    parts = {"chat": [{"messages": CHAT}] * 6, "text": TEXTS, "ready": Dataset.from_dict({"input_ids": [[1, 2]] * 9})}
    rows, reports = mixture(parts)
    assert [len(row["input_ids"]) for row in rows] == [26] * 6 + [4, 5, 6] + [2] * 9
    assert [(name, report.kept) for name, report in reports.items()] == [
        ("train_dataset[chat]", 6),
        ("train_dataset[text]", 3),
        ("train_dataset[ready]", 9),
    ]


@pytest.mark.parametrize("stop", ["first", "all"])
def test_a_mixture_of_streams_draws_what_one_of_tables_draws(stop):
    tables = {
        "a": Dataset.from_dict({"text": [f"a{i}" for i in range(9)]}),
        "b": Dataset.from_dict({"text": ["b0", "b1"]}),
    }
    options = {"mixture_weights": {"a": 2, "b": 1}, "mixture_stop": stop}
    rows, _ = mixture(tables, **options)
    streams, _ = mixture({"a": tables["a"].to_iterable_dataset(), "b": TorchStream(tables["b"])}, **options)
    assert [row["input_ids"] for row in streams] == [row["input_ids"] for row in rows]
    assert {97, 98} == {row["input_ids"][0] for row in rows}


def test_a_mixture_is_packed_as_a_whole():
    rows, _ = mixture({"a": TEXTS, "b": [{"text": "x"}]}, packing=True)
    assert [row["seq_lengths"] for row in rows] == [[6, 5, 4, 2]]


def test_a_mixture_that_cannot_be_is_an_error():
    with pytest.raises(ConfigError, match=r"weights: none is given for b"):
        mixture({"a": TEXTS, "b": TEXTS}, mixture_weights={"a": 1})
    with pytest.raises(ConfigError, match=r"mixture_stop\) is 'first' or 'all', not 'last'"):
        mixture({"a": TEXTS}, mixture_stop="last")
    with pytest.raises(ConfigError, match=r"train_dataset\[a\] is a dict of datasets"):
        mixture({"a": DatasetDict({"train": TEXTS})})


# trainer: F7
def test_a_prompt_in_the_manner_of_alpaca_is_trained_whole():
    def layout(rows):
        return [
            f"### Instruction:\n{instruction}\n\n### Response:\n{output}"
            for instruction, output in zip(rows["instruction"], rows["output"])
        ]

    row = make(Dataset.from_list([{"instruction": "Add.", "output": "4"}]), formatting_func=layout)[0]
    assert row["labels"] == [*ids("### Instruction:\nAdd.\n\n### Response:\n4"), EOS]


# trainer: K1
def test_rows_are_cut_at_max_length_and_never_padded_to_it():
    assert [len(row["input_ids"]) for row in make(TEXTS, max_length=5)] == [4, 5, 5]
