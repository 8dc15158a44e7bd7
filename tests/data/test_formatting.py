"""Both generations of formatting functions are told apart by what they return, and neither passes for the other."""

import pytest

from tunesmith.data.formatting import Formatter
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import DataError

ROWS = [
    Row({"question": "Who is it?", "answer": "Me."}, "train", 1),
    Row({"question": "Where?", "answer": "Here."}, "train", 2),
    Row({"question": "When?", "answer": "Now."}, "train", 3),
]
TEXTS = ["Q: Who is it? A: Me.", "Q: Where? A: Here.", "Q: When? A: Now."]


def batched(examples):
    return [f"Q: {q} A: {a}" for q, a in zip(examples["question"], examples["answer"])]


def single(example):
    return f"Q: {example['question']} A: {example['answer']}"


def values(function, rows=ROWS):
    return [row.value for row in Formatter(function)(rows)]


# trainer: F5 F6 F7 A11
@pytest.mark.parametrize("function", [batched, single])
def test_a_function_for_batches_and_one_for_single_rows_give_the_same_texts(function):
    assert values(function) == [{"text": text} for text in TEXTS]
    assert values(function, ROWS[:1]) == [{"text": TEXTS[0]}]


def test_rows_keep_their_places():
    assert [row[1:] for row in Formatter(batched)(ROWS)] == [("train", 1), ("train", 2), ("train", 3)]


# trainer: F5
@pytest.mark.parametrize(
    "function",
    [
        lambda examples: f"Q: {examples['question'][0]}",
        lambda examples: f"Q: {examples['question'][0]} A: {examples['answer']}",
        lambda examples: "".join(f"Q: {question}" for question in examples["question"]),
    ],
)
def test_one_text_for_many_rows_is_an_error(function):
    with pytest.raises(
        ValueError,
        match=r"^The formatting_func should return a list of processed strings since it can lead to silent bugs\. "
        r".*got 3 rows as a dict of lists and returned one text \(['\"]Q: .* Return a list with one",
    ):
        Formatter(function)(ROWS)


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (lambda row: row["question"].upper(), "WHO IS IT?"),
        (lambda row: row["question"][:3], "Who"),
        (lambda row: f"{row['question'][:3]}: {row['answer']}", "Who: Me."),
        (lambda row: row["question"][:100], "Who is it?"),
        (lambda rows: rows["question"], "Who is it?"),
        (lambda row: "always the same", "always the same"),
    ],
)
def test_a_function_for_single_rows_may_change_its_values(function, first):
    assert values(function)[0] == {"text": first}


TURNS = [{"role": "user", "content": "Who is it?"}, {"role": "assistant", "content": "Me."}]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda row: {"prompt": row["question"], "completion": row["answer"]},
            {"prompt": "Who is it?", "completion": "Me."},
        ),
        (
            lambda row: [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            {"messages": TURNS},
        ),
        (
            lambda rows: [
                {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
                for q, a in zip(rows["question"], rows["answer"])
            ],
            {"messages": TURNS},
        ),
    ],
)
def test_a_function_may_return_turns_or_a_prompt_and_its_completion(function, expected):
    assert values(function)[0] == expected
    assert values(function, ROWS[:2])[0] == expected  # as many rows as turns


def test_a_list_of_one_text_for_a_single_row_is_no_batch():
    with pytest.raises(RowError, match=r"train row 1: formatting_func .* fits no rows: given 1 of them .*list"):
        Formatter(lambda row: [f"Q: {row['question']}"])(ROWS[:1])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda rows: [q for q in rows["question"] if len(q) > 5], r"it returned 2 items for 3 rows"),
        (lambda rows: [len(q) for q in rows["question"]], r"it returned a list \(\[10, 6, 5\]\) for 3 rows"),
        (lambda row: None, r"it returned null for 3 rows, not a list of texts; given one row, it returned null"),
        (lambda row: row["qestion"], r"raised KeyError: 'qestion'; .* The columns are question, answer\."),
    ],
)
def test_a_function_that_fits_no_rows_is_an_error_with_what_it_did(function, message):
    with pytest.raises(DataError, match=message):
        Formatter(function)(ROWS)


def picky(examples):
    return [question.strip() for question in examples["question"]]


# trainer: F5
def test_the_row_on_which_a_function_fails_is_named():
    formatter = Formatter(picky)
    formatter(ROWS)
    bad = Row({"question": None, "answer": "?"}, "train", 17)
    with pytest.raises(
        RowError, match=r"^train row 17: formatting_func picky: it raised AttributeError.*question, answer"
    ):
        formatter([*ROWS, bad])
    left_out = []
    kept = formatter([ROWS[0], bad, ROWS[1]], lambda row, error: left_out.append((row.line, error.reason)))
    assert [row.line for row in kept] == [1, 2]
    assert left_out == [(17, "formatting-failed")]


@pytest.mark.parametrize("function", [picky, lambda row: "Q: " + row["question"]])
def test_bad_rows_among_the_first_may_be_skipped(function):
    bad = Row({"question": None, "answer": "?"}, "train", 17)
    left_out = []
    kept = Formatter(function)([bad, *ROWS], lambda row, error: left_out.append(row.line))
    assert [row.line for row in kept] == [row.line for row in ROWS]
    assert left_out == [17]
    with pytest.raises(RowError, match=r"^train row 17: formatting_func .* fits no rows"):
        Formatter(function)([bad, *ROWS])
