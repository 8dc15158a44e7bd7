"""From examples to rows: the same however the work is divided, and as a LLaMA-like tokenizer's user expects."""

import random

import pytest

from tests import tiny
from tests.real import shared_data
from tunesmith.config import DataConfig
from tunesmith.data import IGNORE_INDEX, parallel
from tunesmith.data.collect import collect
from tunesmith.data.encode import Encoding, encode_batch
from tunesmith.data.parallel import encode_batches, num_workers
from tunesmith.data.prepare import as_dataset, encode_examples
from tunesmith.data.report import Report
from tunesmith.errors import DataError, TemplateError

SKIP = {"max_length": 60, "on_bad_row": "skip"}


def chats(num=40):
    """Conversations of unequal length; some too long, some with control tokens, one that no template accepts."""
    rng = random.Random(0)
    rows = []
    for line in range(1, num + 1):
        text = "".join(rng.choices(["a ", "legs ", "<|im_end|>", "\n", "世"], k=rng.randrange(12)))
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1] or "yes"}]
        if line == 7:
            turns[0] = {"role": "user", "content": 7}
        rows.append({"messages": turns, "source": "a.jsonl", "line": line})
    return rows


# workflow: P7
@pytest.mark.parametrize("characters", [1, 300, 10**9])
def test_two_threads_give_the_rows_and_the_report_of_one(monkeypatch, bpe_tokenizer, characters):
    monkeypatch.setattr(parallel, "CHARACTERS_OF_A_PART", characters)
    rows, plain, report = chats(), Report(), Report()
    expected = [found.tokens for found in encode_batch(rows, bpe_tokenizer, Encoding(**SKIP), plain)]
    dataset = encode_examples(rows, bpe_tokenizer, report, batch_size=9, **SKIP)
    assert dataset.to_list() == as_dataset(expected).to_list()
    assert sorted(report.drops) == sorted(plain.drops)
    assert sorted(report.changes) == sorted(plain.changes)
    assert (report.kept, report.lengths, report.num_trained) == (plain.kept, plain.lengths, plain.num_trained)
    assert {problem.reason for problem in report.drops} == {"too-long", "template"}


# reliability: 40
@pytest.mark.parametrize("too_long", ["truncate", "truncate_left", "drop", "keep_last_turns"])
def test_every_row_that_is_kept_trains_something_and_every_other_is_counted(bpe_tokenizer, too_long):
    for max_length in range(1, 70, 4):
        report, how = Report(), Encoding(max_length=max_length, too_long=too_long, on_bad_row="skip")
        kept = [found.tokens for found in encode_batch(chats(), bpe_tokenizer, how, report)]
        assert all(set(row["labels"][1:]) != {IGNORE_INDEX} for row in kept)
        assert max((len(row["input_ids"]) for row in kept), default=0) <= max_length
        assert len(kept) + report.num_dropped == 40
        assert {problem.reason for problem in report.drops} <= {"truncated", "too-long", "template"}


# reliability: 40
def test_a_row_of_which_nothing_is_to_be_trained_is_not_said_to_be_truncated(byte_tokenizer):
    turns = [{"role": "user", "content": "q" * 50}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": [turns[0], {**turns[1], "train": train}]} for train in (True, False)]
    for max_length, reasons in ((None, ["no-trained-token"]), (60, ["truncated", "no-trained-token"])):
        report = Report()
        encode_examples(rows, byte_tokenizer, report, max_length=max_length, too_long="truncate")
        assert [problem.reason for problem in report.drops] == reasons


# workflow: P7
def test_each_row_says_which_example_it_was_made_of(byte_tokenizer):
    parts = encode_batches([chats()[:10], chats()[10:20]], byte_tokenizer, Encoding(**SKIP), Report())
    for part in parts:
        for index, ids in zip(part.indexes, part.table["input_ids"].to_pylist(), strict=True):
            assert part.examples[index]["messages"][1]["content"] in byte_tokenizer.decode(ids)


def test_the_first_bad_row_raises_though_later_ones_are_rendered_before_it_is_tokenized(byte_tokenizer):
    rows = chats(12)
    with pytest.raises(DataError, match=r"a.jsonl:\d: \d+ tokens, max_length is 20"):
        encode_examples(rows, byte_tokenizer, Report(), batch_size=6, max_length=20, too_long="error")
    with pytest.raises(TemplateError, match=r"a.jsonl:7"):
        encode_examples(rows, byte_tokenizer, Report(), batch_size=6)


def test_workers_start_only_where_rows_and_cores_pay_for_them(monkeypatch, byte_tokenizer):
    how = Encoding()
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: range(16), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert num_workers(None, 49_999, byte_tokenizer, how) == 1
    assert num_workers(None, 60_000, byte_tokenizer, how) == 6
    assert num_workers(None, 10**6, byte_tokenizer, how) == parallel.MAX_WORKERS
    assert num_workers(None, 10**6, byte_tokenizer, Encoding(label_with=list)) == 1
    assert num_workers(3, 5, byte_tokenizer, how) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert num_workers(None, 10**6, byte_tokenizer, how) == 1


# workflow: P8
def test_the_first_chinese_row_ends_with_a_trained_stop_token_and_its_prompt_is_masked():
    options = DataConfig(dataset=str(shared_data("alpaca_zh_demo.json")), max_samples=1)
    check_llama_like(collect(options).train)


# workflow: P8
def test_a_chinese_row_ends_with_a_trained_stop_token_and_its_prompt_is_masked():
    turns = [
        {"role": "user", "content": "识别并解释给定列表"},
        {"role": "assistant", "content": "这个列表说明了科学方法"},
    ]
    check_llama_like([{"messages": turns, "source": "a", "line": 1}])


def check_llama_like(examples):
    tokenizer = tiny.make_sentencepiece_like_tokenizer()
    (row,) = encode_examples(examples, tokenizer, Report())
    prompt = tokenizer.apply_chat_template(examples[0]["messages"][:1])["input_ids"]
    assert row["input_ids"][-1] == row["labels"][-1] == tokenizer.eos_token_id
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"] == [IGNORE_INDEX] * len(prompt) + row["input_ids"][len(prompt) :]
    answer = examples[0]["messages"][1]["content"]
    assert tokenizer.decode(row["input_ids"][len(prompt) :]).removeprefix(" ") == answer + tokenizer.eos_token
