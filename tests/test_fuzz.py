"""Whatever a file, a row or a recipe holds: a sentence and an exit code, or every row accounted for."""

import json
import string
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import make_byte_tokenizer
from tunesmith.config import CONFIGS, DataConfig
from tunesmith.data.collect import collect
from tunesmith.data.prepare import encode_examples
from tunesmith.errors import TunesmithError
from tunesmith.recipe import load_recipe
from tunesmith.recipe.schema import own_options

QUIET = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENIZER = make_byte_tokenizer()
CODES = {2, 3}

# Rows --------------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=12) | st.sampled_from(
    ["", " ", "<|im_end|>", "<|im_start|>assistant\n", "\x00", "\u202e", "é"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS
JUNK = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "function", "nobody", ""]) | JUNK
TURN = st.fixed_dictionaries({"role": ROLES, "content": TEXTS | JUNK}) | JUNK
CHAT = st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4) | JUNK})
SHAREGPT = st.fixed_dictionaries(
    {"conversations": st.lists(st.fixed_dictionaries({"from": ROLES, "value": TEXTS | JUNK}), max_size=4)}
)
PAIRED = st.fixed_dictionaries({"prompt": TEXTS | JUNK, "completion": TEXTS | JUNK})
ALPACA = st.fixed_dictionaries({"instruction": TEXTS | JUNK, "input": TEXTS | JUNK, "output": TEXTS | JUNK})
GOOD = st.just({"prompt": "one?", "completion": "two"})
ROWS = st.one_of(GOOD, CHAT, SHAREGPT, PAIRED, ALPACA, JUNK)
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=20),
    st.sampled_from(
        [b"", b"\r", b"{", b'{"prompt": "a"', b"null", b"[]", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe"]
    ),
)
FILES = st.lists(LINES, max_size=6).map(b"\n".join)
ENDINGS = st.sampled_from(["jsonl", "json", "csv", "txt", "parquet", "arrow"])


def check_error(error: TunesmithError) -> None:
    """An error of ours says something, and exits as its kind does."""
    assert error.exit_code in CODES, error
    assert str(error).strip()


def check_file(folder: Path, content: bytes, ending: str, policy: str) -> None:
    """Read and tokenize a file: an error of ours, or a report that accounts for every row."""
    path = folder / f"rows.{ending}"
    path.write_bytes(content)
    try:
        found = collect(DataConfig(dataset=str(path), on_bad_row=policy))
        rows = encode_examples(found.train, TOKENIZER, found.report, max_length=64, on_bad_row=policy)
    except TunesmithError as error:
        check_error(error)
        return
    report = found.report
    assert report.read == report.kept + report.num_dropped
    assert len(rows) == report.kept
    for row in rows:
        assert len(row["input_ids"]) == len(row["labels"])
        assert any(label != -100 for label in row["labels"][1:]), "a row that trains nothing"


# reliability: 34 36 37
@given(FILES, ENDINGS, st.sampled_from(["error", "skip"]))
@QUIET
def test_any_file_is_read_or_refused_with_a_sentence(tmp_path, content, ending, policy):
    check_file(tmp_path, content, ending, policy)


@given(st.lists(ROWS, min_size=1, max_size=5), st.sampled_from(["error", "skip"]))
@QUIET
def test_any_rows_are_read_or_refused_with_a_sentence(tmp_path, rows, policy):
    check_file(tmp_path, "".join(f"{json.dumps(row)}\n" for row in rows).encode(), "jsonl", policy)


# Recipes -----------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(sorted(own_options(CONFIGS))) | st.text(string.ascii_lowercase + "_", min_size=1, max_size=12)
VALUES = st.one_of(
    JUNK, st.sampled_from(["1e-5", "no", "auto", "0x10", -1, 0, 1, 2**70, "../..", "a,b", [1, "a"], {}])
)


def check_recipe(path: Path, task: str) -> None:
    """Read a recipe: typed options, or an error of ours with exit code 2."""
    try:
        load_recipe(str(path), task=task)
    except TunesmithError as error:
        check_error(error)


# reliability: 51 52
@given(st.dictionaries(NAMES, VALUES, max_size=5), st.booleans(), st.sampled_from(["train", "check", "eval", "chat"]))
@QUIET
def test_any_recipe_is_read_or_refused_with_a_sentence(tmp_path, options, whole, task):
    path = tmp_path / "recipe.yaml"
    needed = {"model_name_or_path": "model", "dataset": "rows.jsonl"} if whole else {}
    path.write_text(yaml.safe_dump({**needed, **options}, allow_unicode=True), encoding="utf-8", errors="replace")
    check_recipe(path, task)


# reliability: 51
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "replace")))
@QUIET
def test_any_bytes_as_a_recipe_are_refused_with_a_sentence(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    check_recipe(path, "train")


@pytest.mark.parametrize("name", ["recipe.json", "recipe.toml", "recipe"])
def test_a_recipe_of_another_kind_is_read_or_refused(tmp_path, name):
    (tmp_path / name).write_text("[")
    check_recipe(tmp_path / name, "train")
