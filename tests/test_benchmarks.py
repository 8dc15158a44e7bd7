"""The sides of a comparison train the same rows to the same losses, and ratios are taken within a round."""

from argparse import ArgumentTypeError, Namespace

import datasets
import pytest

from benchmarks import pairs, training


@pytest.fixture
def options(tmp_path, tiny_model, byte_tokenizer, monkeypatch):
    """A tiny model and 3 steps of 2 rows."""
    monkeypatch.setattr(training, "ROWS_PER_STEP", 2)
    tiny_model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    ids = [list(range(3, 3 + length)) for length in (9, 4, 12, 7, 5, 10)]
    rows = [{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in ids]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    return Namespace(model=str(tmp_path / "model"), rows=str(tmp_path / "rows"), mode="full", steps=3)


def test_our_losses_and_norms_are_those_of_the_plain_loop(options):
    ours, plain = training.SIDES["tunesmith_fp32"](options), training.SIDES["plain"](options)
    assert ours["tokens"] == plain["tokens"] == [13, 19, 15]
    assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


def test_trl_trains_the_same_rows(options):
    pytest.importorskip("trl")
    theirs, plain = training.SIDES["trl_fp32"](options), training.SIDES["plain"](options)
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


@pytest.mark.parametrize("text", ["2", "0", "-1", "many"])
def test_a_run_with_no_timed_step_is_refused(text):
    assert training.timed_steps("3") == 3
    with pytest.raises(ArgumentTypeError, match="expected 3 or more"):
        training.timed_steps(text)
