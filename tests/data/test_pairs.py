"""Preference examples become two conversations of one prompt, each with its stop token; nothing is lost unseen."""

import pytest

from tunesmith.data.pairs import encode_pairs, first_difference, preference, token_rows
from tunesmith.data.report import Report
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import DataError, TemplateError

SYSTEM = {"role": "system", "content": "Be kind."}


def example(chosen="4", rejected="five", prompt=None, line=1, **beside):
    return {
        "prompt": prompt or [{"role": "user", "content": "2+2?"}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "source": "pairs.jsonl",
        "line": line,
        **beside,
    }


def encoded(tokenizer, *examples, **options):
    report = Report()
    report.read = len(examples)
    pairs = encode_pairs(examples, tokenizer, report, **options)
    assert report.read == report.kept + report.num_dropped  # every row is one or the other
    return list(pairs), report


# workflow: P6
def test_a_pair_is_its_prompt_with_each_answer_and_its_stop_token(byte_tokenizer):
    (pair,), _ = encoded(byte_tokenizer, example("4", "five"))
    prompt = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert byte_tokenizer.decode(pair["chosen_input_ids"]) == prompt + "4<|im_end|>"
    assert byte_tokenizer.decode(pair["rejected_input_ids"]) == prompt + "five<|im_end|>"
    assert pair["first_difference"] == len(byte_tokenizer(prompt)["input_ids"])
    assert pair["index"] == 0


# workflow: P6
@pytest.mark.parametrize(("chosen", "rejected", "shared"), [("go on", "go away", "go "), ("go", "go away", "go")])
def test_the_pair_parts_behind_what_the_answers_share(byte_tokenizer, chosen, rejected, shared):
    (pair,), _ = encoded(byte_tokenizer, example(chosen, rejected))
    assert byte_tokenizer.decode(pair["chosen_input_ids"][: pair["first_difference"]]).endswith("assistant\n" + shared)


# workflow: P6
def test_both_conversations_of_a_merging_tokenizer_share_the_prompt_that_generation_sees(bpe_tokenizer):
    messages = [{"role": "user", "content": "How many legs?"}]
    (pair,), _ = encoded(bpe_tokenizer, example("\n\nthe answer is 42", "A spider", messages))
    asked = bpe_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for side in ("chosen", "rejected"):
        assert pair[f"{side}_input_ids"][: len(asked)] == asked


# workflow: P6
def test_prompt_and_answer_have_limits_of_their_own(byte_tokenizer):
    (pair,), report = encoded(byte_tokenizer, example("abcdef", "xyz"), max_source_length=20, max_target_length=4)
    prompt = "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n"
    assert byte_tokenizer.decode(pair["chosen_input_ids"]) == prompt + "abcd"
    assert byte_tokenizer.decode(pair["rejected_input_ids"]) == prompt + "xyz<|im_end|>"
    assert pair["first_difference"] == 20
    assert report.to_json()["changed"] == {"cut": {"rows": 1, "first": [{"source": "pairs.jsonl", "line": 1}]}}


def test_a_limit_below_the_header_of_an_answer_is_an_error(byte_tokenizer):
    with pytest.raises(DataError, match="max_source_length: 9 leaves no room for the 13 tokens"):
        encoded(byte_tokenizer, example(), max_source_length=9)


# workflow: P6
def test_equal_answers_are_dropped_and_counted_with_their_place(byte_tokenizer):
    pairs, report = encoded(byte_tokenizer, example(line=7), example("same", "same", line=8), example(line=9))
    assert [pair["index"] for pair in pairs] == [0, 2]
    assert report.drops[0][:3] == ("pairs.jsonl", 8, "equal-answers")


LONG = [{"role": "user", "content": "a" * 9}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
WHOLE = "<|im_start|>user\naaaaaaaaa<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"


@pytest.mark.parametrize(
    ("too_long", "text"),
    [
        ("truncate", WHOLE + "<|im_start|>assistant\nx"),
        ("truncate_left", WHOLE + "<|im_start|>assistant\nxyz<|im_end|>"),
        ("keep_last_turns", "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\nxyz<|im_end|>"),
    ],
)
def test_a_pair_that_is_too_long_is_shortened_alike_on_both_sides(byte_tokenizer, too_long, text):
    limit = len(byte_tokenizer(WHOLE + "<|im_start|>assistant\nx")["input_ids"])
    (pair,), report = encoded(byte_tokenizer, example("y", "xyz", LONG), max_length=limit, too_long=too_long)
    rejected = byte_tokenizer.decode(pair["rejected_input_ids"])
    assert text.endswith(rejected) if too_long == "truncate_left" else rejected == text
    shared = pair["first_difference"]
    assert pair["chosen_input_ids"][:shared] == pair["rejected_input_ids"][:shared]
    assert byte_tokenizer.decode(pair["chosen_input_ids"][shared : shared + 1]) == "y"
    assert len(report.changes) == 1


@pytest.mark.parametrize(("too_long", "reason"), [("drop", "too-long"), ("truncate", "no-difference")])
def test_a_pair_is_never_cut_until_it_differs_nowhere(byte_tokenizer, too_long, reason):
    pairs, report = encoded(byte_tokenizer, example("long and good", "long and bad"), max_length=24, too_long=too_long)
    assert not pairs
    assert report.drops[0].reason == reason


def test_a_pair_that_is_too_long_may_stop_the_run(byte_tokenizer):
    with pytest.raises(DataError, match=r"pairs.jsonl:1: \d+ and \d+ tokens, max_length is 9\. Raise max_length"):
        encoded(byte_tokenizer, example(), max_length=9, too_long="error")


def test_a_template_that_refuses_stops_the_run_or_is_counted():
    from tests.tiny import make_byte_tokenizer

    gemma, refused = make_byte_tokenizer("gemma"), example(prompt=[SYSTEM, {"role": "user", "content": "?"}])
    with pytest.raises(TemplateError, match="System role not supported"):
        encoded(gemma, refused)
    pairs, report = encoded(gemma, refused, example(line=2), on_bad_row="skip")
    assert [pair["index"] for pair in pairs] == [1]
    assert report.drops[0][:3] == ("pairs.jsonl", 1, "template")


def test_the_report_counts_the_tokens_of_both_and_trains_from_the_difference(byte_tokenizer):
    (pair,), report = encoded(byte_tokenizer, example("4", "five"))
    chosen, rejected = token_rows(pair)
    assert report.num_tokens == len(chosen["input_ids"]) + len(rejected["input_ids"])
    assert report.num_trained == len("4") + 1 + len("five") + 1
    assert [id for id in chosen["labels"] if id != -100] == chosen["input_ids"][-2:]


def test_template_variables_of_the_run_are_overridden_by_the_rows_own(byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    rows = example(), example(chat_template_kwargs={"mood": "sad"})
    pairs, _ = encoded(tokenizer, *rows, chat_template_kwargs={"mood": "glad"})
    texts = [tokenizer.decode(pair["chosen_input_ids"]) for pair in pairs]
    assert [text.partition("<")[0] for text in texts] == ["glad", "sad"]


def test_texts_without_a_chat_template_are_laid_end_to_end(byte_tokenizer):
    import copy

    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = None
    row = preference(Row({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, "pairs.jsonl", 1))
    (pair,), _ = encoded(tokenizer, row)
    assert tokenizer.decode(pair["chosen_input_ids"]) == "2+2=4<|im_end|>"


# Rows of other programs


USER, GOOD, BAD = ({"role": role, "content": text} for role, text in zip(("user", *["assistant"] * 2), "?+-"))


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "?", "chosen": [USER, GOOD], "rejected": BAD},
        {"prompt": "?", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD], "score_chosen": 3.0},
    ],
)
def test_every_shape_of_trl_is_one_example(value):
    assert preference(Row(value, "f.json", 3)) == {
        **{"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        **{"source": "f.json", "line": 3},
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "?", "chosen": "+"}, "f.jsonl:3: 'rejected' is missing; the row has prompt, chosen"),
        ({"prompt": "?", "chosen": "+", "rejected": " "}, "'rejected' is empty"),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": []},
            "'rejected' is an empty list; expected a text or turns",
        ),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "last turn is the user's|no assistant turn"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no prompt, and the two conversations share no turn"),
        (
            {"prompt": "?", "chosen": [{"from": "gpt", "value": "+"}], "rejected": "-"},
            "turn 1 of 'chosen' has no role",
        ),
    ],
)
def test_a_row_that_is_no_pair_says_why(value, message):
    with pytest.raises(RowError, match=message):
        preference(Row(value, "f.jsonl", 3))


@pytest.mark.parametrize(("one", "other", "at"), [("abc", "abd", 2), ("ab", "abd", 2), ("x", "y", 0), ("ab", "ab", 2)])
def test_the_first_difference_is_where_they_part_or_one_ends(one, other, at):
    assert first_difference(list(map(ord, one)), list(map(ord, other))) == at
