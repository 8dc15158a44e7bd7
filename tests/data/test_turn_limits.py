"""Long sources and targets are cut where a model can still learn from them."""

from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.data.chats import PAIRS, SPACES, WORDS, answer, chats, family_of
from tunesmith.data import IGNORE_INDEX
from tunesmith.data.encode import Encoding, encode_batch
from tunesmith.data.render import render_prompt
from tunesmith.data.report import Report
from tunesmith.data.tokenize import tokenize
from tunesmith.data.turn_limits import cut_prompt, header_length
from tunesmith.errors import DataError
from tunesmith.train.datasets import prepared
from tunesmith.train.options import SFTConfig
from tunesmith.train.reading import preparation_of

CHAT = [
    {"role": "user", "content": "abcdefghij"},
    {"role": "assistant", "content": "0123456789"},
    {"role": "user", "content": "k"},
    {"role": "assistant", "content": "1"},
]
HEADER = "<|im_end|>\n<|im_start|>assistant\n"
three_templates = pytest.mark.parametrize("pair", ["byte-chatml", "bpe-llama3", "sentencepiece-mistral"])


def encoded(messages, tokenizer, **options):
    """The tokens of one conversation, and what the report says was done to it."""
    report = Report()
    found = encode_batch([{"messages": messages, "source": "a", "line": 1}], tokenizer, Encoding(**options), report)
    return (found[0].tokens if found else None), [problem.reason for problem in report.changes + report.drops]


def text_of(ids, tokenizer):
    return tokenizer.decode([tokenizer.pad_token_id, *ids]).removeprefix(tokenizer.pad_token)


def runs_of(tokens):
    """The stretches of trained tokens."""
    runs = groupby(tokens["labels"], lambda label: label != IGNORE_INDEX)
    return [list(run) for is_trained, run in runs if is_trained]


def trained(tokens, tokenizer):
    return text_of([label for label in tokens["labels"] if label != IGNORE_INDEX], tokenizer)


# workflow: P4
# reliability: 41
@three_templates
@given(data=st.data())
def test_all_turns_are_trained_and_trained_tokens_are_the_answers_with_their_stop(pair, data):
    tokenizer = PAIRS[pair]()
    messages = data.draw(chats(family_of(tokenizer), WORDS + SPACES))
    tokens, _ = encoded(messages, tokenizer, max_source_length=10_000, max_target_length=10_000)
    answers = [answer(message, family_of(tokenizer)) for message in messages if message["role"] == "assistant"]
    assert trained(tokens, tokenizer) == "".join(answers)
    assert len(tokens["labels"]) == len(tokens["input_ids"])


# workflow: P4
@three_templates
@given(data=st.data(), source=st.integers(45, 70), target=st.integers(3, 30))
def test_whatever_the_limits_sources_and_targets_keep_them_and_no_stop_is_false(pair, data, source, target):
    tokenizer = PAIRS[pair]()
    stop = tokenizer.eos_token
    messages = data.draw(chats("mistral", WORDS * 3))
    tokens, _ = encoded(messages, tokenizer, max_source_length=source, max_target_length=target)
    assert len(tokens["input_ids"]) <= source + target
    answers = [answer(message, family_of(tokenizer)) for message in messages if message["role"] == "assistant"]
    for run, whole in zip(runs_of(tokens), answers):
        text = text_of(run, tokenizer)
        assert text == whole or (stop not in text and whole.startswith(text.rstrip("�")))
        assert len(run) <= target


# workflow: P4
def test_a_cut_source_keeps_what_the_template_writes_before_the_answer(byte_tokenizer):
    tokens, done = encoded(CHAT[:2], byte_tokenizer, max_source_length=23)
    text = byte_tokenizer.decode(tokens["input_ids"])
    assert text == f"<|im_start|>user\nabcd{HEADER}0123456789<|im_end|>\n"
    assert trained(tokens, byte_tokenizer) == "0123456789<|im_end|>"
    assert done[0] == "source-cut"


# workflow: P4
def test_a_cut_last_answer_ends_without_a_stop(byte_tokenizer):
    tokens, done = encoded(CHAT[:2], byte_tokenizer, max_target_length=4)
    assert byte_tokenizer.decode(tokens["input_ids"]).endswith("assistant\n0123")
    assert trained(tokens, byte_tokenizer) == "0123"
    assert done == ["target-cut"]


# workflow: P4
def test_a_cut_answer_within_a_conversation_has_a_stop_that_is_not_trained(byte_tokenizer):
    tokens, _ = encoded(CHAT, byte_tokenizer, max_target_length=4)
    text = byte_tokenizer.decode(tokens["input_ids"])
    assert text == f"<|im_start|>user\nabcdefghij{HEADER}012<|im_end|>\n<|im_start|>user\nk{HEADER}1<|im_end|>\n"
    assert trained(tokens, byte_tokenizer) == "0121<|im_end|>"


# workflow: P4
def test_turns_stop_being_added_where_the_row_would_be_longer_than_both_limits(byte_tokenizer):
    tokens, done = encoded(CHAT, byte_tokenizer, max_source_length=40, max_target_length=12)
    assert trained(tokens, byte_tokenizer) == "0123456789<|im_end|>"
    assert done == ["later-turns-dropped"]
    tokens, done = encoded(CHAT, byte_tokenizer, max_source_length=40, max_length=50)
    assert trained(tokens, byte_tokenizer) == "0123456789<|im_end|>"


def test_the_first_turn_still_obeys_max_length(byte_tokenizer):
    limits = {"max_source_length": 30, "max_target_length": 12, "max_length": 35}
    assert encoded(CHAT[:2], byte_tokenizer, **limits) == (None, ["too-long"])
    tokens, done = encoded(CHAT[:2], byte_tokenizer, **limits, too_long="truncate")
    assert (len(tokens["input_ids"]), done) == (35, ["cut"])


@pytest.mark.parametrize("pair", PAIRS)
def test_training_and_prediction_cut_a_prompt_alike(pair):
    tokenizer = PAIRS[pair]()
    messages = [{"role": "user", "content": "hello there, " * 12}, {"role": "assistant", "content": "yes"}]
    (prompt,) = tokenize([render_prompt(messages[:1], tokenizer)], tokenizer)
    header = header_length(messages[:1], tokenizer)
    cut = cut_prompt(prompt["input_ids"], header + 20, header)
    tokens, done = encoded(messages, tokenizer, max_source_length=header + 20)
    assert tokens["input_ids"][: header + 20] == cut
    assert tokens["labels"][header + 19] == IGNORE_INDEX != tokens["labels"][header + 20]
    assert done[0] == "source-cut"


def test_answers_that_are_not_trained_belong_to_the_source(byte_tokenizer):
    tokens, _ = encoded(CHAT, byte_tokenizer, max_source_length=21, train_on="last_turn")
    assert byte_tokenizer.decode(tokens["input_ids"]) == f"<|im_start|>user\nab{HEADER}1<|im_end|>\n"


def test_limits_without_a_template_cut_prompt_and_completion():
    tokenizer = tiny.make_sentencepiece_like_tokenizer()
    tokenizer.chat_template = None
    example = {"prompt": "1234567890", "completion": "1234567890", "source": "a", "line": 1}
    how = Encoding(max_source_length=6, max_target_length=4)
    (found,) = encode_batch([example], tokenizer, how, Report())
    assert found.tokens["input_ids"][0] == tokenizer.bos_token_id
    assert [label != IGNORE_INDEX for label in found.tokens["labels"]] == [False] * 6 + [True] * 4


def test_a_row_of_plain_text_has_no_turns(byte_tokenizer):
    row = {"text": "0123456789", "source": "a", "line": 1}
    (found,) = encode_batch([row], byte_tokenizer, Encoding(max_source_length=2, max_target_length=2), Report())
    assert len(found.tokens["input_ids"]) == 11


def test_a_limit_below_the_header_is_refused(byte_tokenizer):
    with pytest.raises(DataError, match=r"max_source_length: 5 leaves no room for the 13 tokens"):
        encoded(CHAT, byte_tokenizer, max_source_length=5)


def test_weights_are_cut_along(byte_tokenizer):
    messages = [CHAT[0], {**CHAT[1], "weight": 0.5}]
    tokens, _ = encoded(messages, byte_tokenizer, max_source_length=22, max_target_length=4)
    assert tokens["weights"] == [1.0] * 22 + [0.5] * 4


# workflow: P4
def test_the_trainers_options_reach_every_row(byte_tokenizer, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), max_source_length=23, max_target_length=4, max_length=64)
    how, report = preparation_of(args, byte_tokenizer, 64), Report()
    (row,) = prepared("train_dataset", [{"messages": CHAT[:2]}], how, report)
    assert byte_tokenizer.decode(row["input_ids"]) == f"<|im_start|>user\nabcd{HEADER}0123"
    assert [problem.reason for problem in report.changes] == ["source-cut", "target-cut"]
