"""The sides of a comparison train the same rows to the same losses, and ratios are taken within a round."""

import json
from argparse import Namespace

import datasets
import pytest
import torch

from benchmarks import big_head, generation, idle, long_rows, loss_curve, pairs, start, training
from benchmarks.blocks import LargestBlock


@pytest.fixture
def model_folder(tmp_path, tiny_model, byte_tokenizer):
    """A tiny model with its tokenizer."""
    tiny_model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def rows():
    """Six rows, the first two tokens of each not trained."""
    ids = [list(range(3, 3 + length)) for length in (9, 4, 12, 7, 5, 10)]
    return datasets.Dataset.from_list([{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in ids])


@pytest.fixture
def train(tmp_path, model_folder, rows):
    """Train a side for three steps of two rows."""
    rows.save_to_disk(tmp_path / "rows")

    def run(side, *how, batch=("--rows_per_batch", "2")):
        words = [side, model_folder, str(tmp_path / "rows"), "--steps", "3", *batch, *how]
        options = training.options_of(words)
        return training.watched(options) if options.watch else training.SIDES[side](options)

    return run


def test_our_losses_and_norms_are_those_of_the_plain_loop(train):
    ours, plain = train("tunesmith_fp32"), train("plain")
    assert ours["tokens"] == plain["tokens"] == [13, 19, 15]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_a_step_is_the_same_in_one_forward_pass_and_in_two(train):
    one, two = train("tunesmith_fp32"), train("tunesmith_fp32", "--accumulate", "2", batch=["--rows_per_batch", "1"])
    assert one["tokens"] == two["tokens"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_trl_trains_the_same_rows(train):
    pytest.importorskip("trl")
    theirs, plain = train("trl_fp32"), train("plain")
    assert theirs["tokens"] == plain["tokens"]
    assert theirs["loss"] == pytest.approx(plain["loss"], rel=1e-3)  # it logs four digits


def test_a_ratio_is_the_median_of_those_within_rounds():
    def one(speed):
        return {"tokens_per_second": speed, "peak_memory_gb": 1.0, "loss": [2.0], "grad_norm": [1.0]}

    rounds = [{"a": one(100), "b": one(50)}, {"a": one(60), "b": one(20)}, {"a": one(10), "b": one(10)}]
    found = pairs.summary(rounds)
    assert found["a"]["ratio"] == 1.0
    assert (found["b"]["ratio"], found["b"]["ratio_spread"]) == (2.0, [1.0, 3.0])
    assert (found["a"]["tokens_per_second"], found["a"]["spread"]) == (60, [10, 100])


def test_a_side_is_compared_with_the_reference_step_by_step_and_only_where_it_trained_the_same_rows():
    def one(loss, tokens):
        figures = {"tokens_per_second": 1.0, "peak_memory_gb": 1.0, "grad_norm": [1.0, 2.0]}
        return figures | {"loss": loss, "tokens": tokens}

    first = {"a": one([2.02, 3.0], [5, 5]), "b": one([9.0, 9.0], [6, 6]), "plain": one([2.0, 2.0], [5, 5])}
    found = pairs.summary([first, {"a": first["a"], "b": first["b"]}])  # the reference runs once
    assert found["a"]["loss_off"] == pytest.approx([0.01, 0.5])
    assert found["a"]["grad_norm_off"] == [0.0, 0.0]
    assert "loss_off" not in found["b"]
    assert "loss_off" not in found["plain"]


def test_a_side_named_once_runs_in_the_first_round(monkeypatch):
    monkeypatch.setattr(pairs, "in_a_process", lambda side, words: words)
    assert pairs.in_turn({"a": [1], "b": [2]}, 2, once=["b"]) == [{"a": [1], "b": [2]}, {"a": [1]}]


@pytest.mark.parametrize("steps", ["2", "0", "-1"])
def test_a_run_with_no_timed_step_is_refused(steps, capsys):
    with pytest.raises(SystemExit):
        training.options_of(["plain", "model", "rows", "--steps", steps])
    assert "expected 3 or more" in capsys.readouterr().err


# The rows of the table ----------------------------------------------------------------------------------------------


def test_growth_is_what_a_token_costs_more_in_one_forward_pass():
    def one(speed):
        return {"tokens_per_second": speed, "peak_memory_gb": 1.0, "loss": [2.0], "grad_norm": [1.0], "tokens": [1]}

    first = {"tail tunesmith": one(9), "tail trl_fp32": one(3), "one trl_fp32": one(2), "many trl_fp32": one(4)}
    ours = {"one tunesmith": one(100), "many tunesmith": one(110)}
    found = long_rows.parts([ours | first, {"tail tunesmith": one(9), **ours}])
    assert found["growth"] == {"tunesmith": (0.1, [0.1, 0.1]), "trl_fp32": (1.0, [1.0, 1.0])}
    assert found["tail"]["tail trl_fp32"]["ratio"] == 3


def test_documents_have_the_lengths_that_are_named(rows):
    lengths = [len(row) for row in long_rows.documents(rows, 500)["input_ids"]]
    assert (min(lengths), max(lengths)) == (20, len(rows["input_ids"][0]) + 38)  # no more text than that: 47 tokens


def test_the_largest_block_of_logits_is_found_in_the_forward_and_the_backward_pass():
    head, states = torch.nn.Linear(4, 50, bias=False), torch.ones(6, 4, requires_grad=True)
    with LargestBlock(50, 4) as seen:
        head(states[:2]).sum().backward()
        assert seen.bytes == 2 * 50 * 4
        head(states).logsumexp(-1).sum().backward()
    assert seen.bytes == 6 * 50 * 4


def test_a_big_head_is_watched_in_training(tmp_path):
    shape = big_head.SHAPE | {"vocab_size": 1000, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    big_head.save_model(shape | {"num_attention_heads": 2, "head_dim": 8}, str(tmp_path / "model"))
    big_head.random_rows(6, 1000).save_to_disk(tmp_path / "rows")
    words = [str(tmp_path / "model"), str(tmp_path / "rows"), "--rows_per_batch", "2", "--steps", "3"]
    ours = training.watched(training.options_of(["tunesmith_fp32", *words]))
    plain = training.watched(training.options_of(["plain", *words]))
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert 0 < ours["largest_logits_mb"] < plain["largest_logits_mb"]


def test_one_by_one_gives_the_answers_of_predict(tmp_path, model_folder):
    rows = [{"instruction": "say " + "a" * length, "input": "", "output": "b"} for length in (3, 1, 9)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = Namespace(model=model_folder, data=tmp_path / "rows.json", prompts=3, max_new_tokens=5)
    sides = {side: generation.measured(Namespace(**vars(options), alone=side)) for side in generation.SIDES}
    assert sides["tunesmith"]["answers"] == sides["one_by_one"]["answers"]
    assert generation.summary([sides])["tunesmith"]["different"] == 0


def test_idle_is_the_step_less_the_work(model_folder, rows):
    options = Namespace(steps=4, untimed=2, alone="lora")
    found = idle.measured(model_folder, rows, options)
    assert found["idle"] == pytest.approx(found["step"] - found["work"])
    assert 0 < found["share"] < 1
    assert {"forward", "backward", "optimizer", "log", "batches"} <= found["pieces"].keys()


def test_the_stages_of_a_start_come_one_after_another(tmp_path, model_folder):
    rows = [{"instruction": "say a", "input": "", "output": "b"}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = start.measure_train(Namespace(model=model_folder, data=tmp_path / "rows.json"))
    assert list(found) == ["recipe", "data", "trainer", "training", "first step"]
    assert sorted(found.values()) == list(found.values())
    assert start.stages_of([found])["data"][0] == round(found["data"], 2)


def test_a_curve_is_as_far_away_as_its_farthest_step():
    plain = {"loss": [2.0, 1.0], "grad_norm": [4.0, 2.0]}
    ours = {"loss": [2.0, 1.5], "grad_norm": [5.0, 2.0]}
    found = loss_curve.distances({"plain": plain, "tunesmith": ours})
    assert found == {"tunesmith": {"loss": 0.5, "grad_norm": 0.25}}
