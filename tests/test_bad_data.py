"""Bad data at the command line: what is said of a file, with which exit code, and what is trained all the same."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from tests import tiny
from tests.workplace import PAIRS, call, write_recipe, write_rows
from tunesmith.data.cache import ENTRY, Cache

USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "x"}
SYSTEM = {"role": "system", "content": "s"}
PAIR = {"prompt": "a", "completion": "b"}


@pytest.fixture
def ask(workplace):
    """Call a command on `rows.jsonl` after writing rows there; nothing is held out."""
    write_recipe(workplace / "recipe.yaml", eval_dataset=None, compare_rows=0, dataset="rows.jsonl")

    def ask(rows, *words, command="check", code=0):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (workplace / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return call(command, "recipe.yaml", *words, code=code)

    ask.folder = workplace
    return ask


def chats(*conversations):
    return [{"messages": turns} for turns in conversations]


# ---- rows that cannot be read


# reliability: 33
def test_broken_json_is_named_with_its_line_and_text_or_skipped_and_counted(ask):
    rows = [PAIR, PAIR, '{"prompt": "a" "completion"}', *[PAIR] * 20]
    assert 'rows.jsonl:3: not valid JSON: Expecting \',\' delimiter at column 16: \'{"prompt": "a" "com' in ask(
        rows, code=3
    )
    said = ask(rows, "--on_bad_row", "skip")
    assert "23 rows read, 22 kept, 1 dropped" in said
    assert "dropped  bad-json     1 row  rows.jsonl:3" in said


# reliability: 34
def test_a_last_line_that_was_cut_off_is_named(ask):
    said = ask([PAIR, '{"prompt": "a", "compl'], code=3)
    assert "rows.jsonl:2: not valid JSON: Unterminated string" in said
    assert "Was the file cut off" in said


# reliability: 35
@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}, "sharegpt"),
        ({"instruction": "q", "output": "x"}, "alpaca"),
        ({"prompt": "q", "completion": "x"}, "prompt-completion"),
        ({"messages": [USER, REPLY]}, "messages"),
    ],
)
def test_the_format_is_found_and_named(ask, row, named):
    said = ask([row])
    assert f"format: {named} (column" in said
    assert "q<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>⟧" in said


# reliability: 36, 37
def test_rows_that_cannot_be_trained_on_are_counted_by_reason_or_stop_the_check(ask):
    def spoken(content):
        return [{**USER, "content": content}, REPLY]

    rows = [
        *({"messages": turns} for turns in (None, [], "hello")),
        *chats(spoken(None), spoken(3), [{"role": "user"}, REPLY], spoken(["q"])),
        *chats([USER, {**REPLY, "role": "boss"}], [REPLY, USER], [USER, SYSTEM, REPLY], [USER], [USER, REPLY, USER]),
        *chats([USER, {**REPLY, "content": ""}], [USER, USER, REPLY], [SYSTEM, USER, REPLY]),
    ]
    said = ask(rows, "--on_bad_row", "skip", "--max_drop_ratio", "0.9")
    assert "15 rows read, 2 kept, 13 dropped" in said
    reasons = {
        "bad-messages": "1, 2, 3",
        "bad-content": "4, 5, 6",
        "not-text": "7",
        "unknown-role": "8",
        "assistant-first": "9",
        "system-not-first": "10",
        "no-assistant": "11",
        "ends-with-user": "12",
        "empty-answer": "13",
    }
    lines = [" ".join(line.split()) for line in said.splitlines() if line.startswith("  dropped")]
    assert {line.split()[1]: line.partition("rows.jsonl:")[2] for line in lines} == reasons
    assert "rows.jsonl:1: 'messages' is null; expected a list of turns" in ask(rows, code=3)


@pytest.mark.parametrize("split", ["train[:50%]", "train+test"])
def test_a_part_of_a_file_is_refused(ask, split):
    said = ask([PAIR] * 4, "--split", split, code=2)
    assert f"split: '{split}' takes a part of a Hub dataset, and dataset rows.jsonl is a file or folder" in said


def test_keys_of_turns_that_nothing_reads_are_named(ask):
    said = ask(chats([USER, REPLY | {"id": 3, "name": "n"}], [USER | {"los": 1}, REPLY | {"loss": True}]))
    assert "keys of turns that nothing reads but a chat template that knows them: id, los\n" in said


# reliability: 38
def test_a_file_of_two_formats_is_named_with_two_lines(ask):
    rows = [*chats([USER, REPLY]) * 700, {"instruction": "q", "output": "x"}]
    said = "the rows have different formats: rows.jsonl:1 is messages, rows.jsonl:701 is alpaca"
    assert said in ask(rows, code=3)
    assert said in ask(rows, "--on_bad_row", "skip", code=3)


# ---- too little is left


# reliability: 39
@pytest.mark.parametrize(
    ("num_good", "message"),
    [
        (0, r"nothing is left to train on: all 3 rows were dropped"),
        (9, "3 of 12 rows (25.0 %) would be dropped; max_drop_ratio allows 5 %"),
    ],
)
def test_too_few_rows_left_stop_a_run_before_its_model_is_loaded(ask, num_good, message):
    (ask.folder / "model" / "model.safetensors").unlink()
    rows = chats(*[[USER]] * 3, *[[USER, REPLY]] * num_good)
    said = ask(rows, "--on_bad_row", "skip", command="train", code=3)
    assert message in said
    assert "  no-assistant    3 rows  rows.jsonl:1, 2, 3\n" in said
    assert "rows.jsonl:1: there is no assistant turn" in said


# reliability: 40
def test_an_answer_beyond_max_length_is_dropped_as_truncated(ask):
    late = chats([{**USER, "content": "q" * 300}, REPLY])
    said = ask([*chats([USER, REPLY]) * 30, *late], "--max_length", "60")
    assert "31 rows read, 30 kept, 1 dropped" in said
    assert "dropped  truncated     1 row  rows.jsonl:31" in said
    said = ask(late * 2, "--max_length", "60", code=3)
    assert "nothing is left to train on: all 2 rows were dropped" in said
    assert "rows.jsonl:1: what would be trained is cut off: 322 tokens, max_length is 60" in said


# reliability: 48
def test_an_evaluation_set_with_nothing_in_it_is_an_error_that_names_it(ask):
    held_out = ask.folder / "heldout.jsonl"
    good, words = chats([USER, REPLY]), ("--eval_dataset", "heldout.jsonl", "--on_bad_row", "skip")
    held_out.write_text("")
    assert "heldout.jsonl is empty: it holds no rows" in ask(good, *words, code=3)
    held_out.write_text(json.dumps({"messages": [USER]}))
    said = ask(good, *words, code=3)
    assert "nothing is left to evaluate: the only row was dropped.\n  no-assistant     1 row  heldout.jsonl:1" in said


# reliability: 48
@pytest.mark.parametrize(
    ("num_rows", "words", "said"),
    [
        (3, (), "all 3 rows, fewer than the 4 of one step (per_device_train_batch_size 4)"),
        (1, (), "the only row, fewer than the 4 of one step (per_device_train_batch_size 4)"),
        (
            9,
            ("--gradient_accumulation_steps", "4"),
            "all 9 rows, fewer than the 16 of one step (per_device_train_batch_size 4 × gradient_accumulation_steps 4",
        ),
        (9, ("--packing",), "the only packed row, fewer than the 4 of one step"),
        (9, (), None),
        (3, ("--tokens_per_batch", "1024"), None),
    ],
)
def test_fewer_rows_than_one_step_asks_for_are_trained_and_said(ask, num_rows, words, said):
    printed = ask(chats([USER, REPLY]) * num_rows, *words, "--max_steps", "1", command="train")
    assert "steps: each trains on" not in printed if said is None else f"steps: each trains on {said}" in printed


# reliability: 48
def test_fewer_pairs_than_one_step_asks_for_are_said(ask):
    pairs = [{"prompt": "q", "chosen": "yes", "rejected": "no!"}] * 3
    said = ask(pairs, "--stage", "rm", "--max_steps", "1", command="train")
    assert "steps: each trains on all 3 rows, fewer than the 4 of one step" in said


# reliability: 48
def test_a_batch_that_dropping_the_last_one_leaves_empty_is_an_error(ask):
    said = ask(chats([USER, REPLY]) * 3, "--dataloader_drop_last", command="train", code=2)
    assert "dataloader_drop_last: 3 rows are fewer than the 4 of one batch" in said


# ---- tokenizers that lack something


@pytest.fixture
def tokenizer_without(ask):
    """A copy of the model folder whose tokenizer lacks a part."""

    def make(name, **changes):
        shutil.copytree(ask.folder / "model", ask.folder / name)
        tokenizer = tiny.make_byte_tokenizer()
        for key, value in changes.items():
            setattr(tokenizer, key, value)
        (ask.folder / name / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(ask.folder / name)
        return "--model_name_or_path", name

    return make


# reliability: 45
def test_a_tokenizer_without_a_chat_template_is_named_with_the_ways_out(ask, tokenizer_without):
    words = tokenizer_without("bare", chat_template=None)
    said = ask(chats([USER, REPLY]), *words, code=3)
    assert (
        "rows.jsonl:1: the tokenizer has no chat template, so messages cannot be rendered. Set chat_template:" in said
    )
    assert "⟦x<|im_end|>⟧" in ask(chats([USER, REPLY]), *words, "--chat_template", "chatml")


# reliability: 45
def test_a_tokenizer_without_a_stop_token_is_named_where_none_is_written(ask, tokenizer_without):
    words = tokenizer_without("endless", eos_token=None)
    said = ask([{"text": "once"}], *words, code=3)
    assert "rows.jsonl:1: no stop token ends the text, and the tokenizer has no eos_token. Name one of its" in said
    assert "o⟦nce<|im_end|>⟧" in ask([{"text": "once"}], *words, "--eos_token", "<|im_end|>")
    assert "⟦x<|im_end|>⟧" in ask(chats([USER, REPLY]), *words)  # the template writes one


# reliability: 45
@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_what_pads_changes_nothing_that_is_trained_or_answered(ask, tokenizer_without, padding_free):
    write_rows(ask.folder / "heldout.jsonl", [("Red?", "red"), ("Up or down, or neither?", "up")])
    models = {"plain": ("--model_name_or_path", "model")} | {
        name: tokenizer_without(name, pad_token=pad) for name, pad in (("none", None), ("eos", "<|im_end|>"))
    }
    rows = [{"prompt": question, "completion": reply} for question, reply in PAIRS]
    more = ("--padding_free", padding_free, "--eval_dataset", "heldout.jsonl", "--compare_rows", "2")
    found = []
    for name, words in models.items():
        ask(rows, *words, *more, "--output_dir", f"run-{name}", command="train")
        run = ask.folder / f"run-{name}"
        weights = {key: value.tolist() for key, value in load_file(run / "adapter_model.safetensors").items()}
        answers = (run / "predictions_after.jsonl").read_text()
        report = json.loads((run / "data_report.json").read_text())["train"]["tokens"]
        assert report["num_trained"] == sum(len(reply) + 1 for _, reply in PAIRS)  # each stop token among them
        found.append((weights, answers))
    assert found[0] == found[1] == found[2]


# ---- the cache


# reliability: 47
def test_tokens_are_read_again_where_only_the_output_folder_is_another(ask, monkeypatch):
    folder = ask.folder / "cache"
    monkeypatch.setattr("tunesmith.steps.data.cache_of", lambda name, overwrite: Cache(folder, overwrite, min_rows=1))
    rows = chats(*[[{**USER, "content": "q" * number}, REPLY] for number in range(1, 9)])

    def is_read(rows, *words, command="check"):
        return "read from the cache" in ask(rows, *words, command=command)

    train = ("--max_steps", "1", "--output_dir")
    assert not is_read(rows, *train, "one", command="train")
    assert is_read(rows, *train, "two", command="train")
    assert is_read(rows)
    assert not is_read(rows, "--max_length", "100")
    assert not is_read(rows, "--chat_template", "vicuna")
    assert not is_read([*rows[:-1], *chats([USER, {**REPLY, "content": "y"}])])
    assert is_read(rows)
    for path in folder.glob(f"*/{ENTRY}"):
        path.write_bytes(b"\xff")
    assert "made anew" in ask(rows)
    assert is_read(rows)
