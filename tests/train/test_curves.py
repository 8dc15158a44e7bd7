import logging
import math

import pytest

from tunesmith.train.curves import held_out_losses, losses, plot_curves, smooth

HISTORY = [{"step": step, "loss": 1 / step} for step in range(1, 9)]


# workflow: W2
def test_the_loss_curve_is_a_whole_png(tmp_path):
    assert plot_curves([*HISTORY, {"step": 8, "eval_loss": float("nan")}], tmp_path, title="Tiny")
    assert (tmp_path / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    assert [entry.name for entry in tmp_path.iterdir()] == ["training_loss.png"]


# workflow: W2
def test_evaluations_have_a_picture_of_their_own(tmp_path):
    history = [*HISTORY, {"step": 4, "eval_loss": 0.5}, {"step": 8, "eval_loss": 0.4}]
    assert [path.name for path in plot_curves(history, tmp_path)] == ["training_loss.png", "training_eval_loss.png"]


def test_each_evaluation_set_is_a_curve():
    history = [{"step": 2, "eval_zh_loss": 1.0, "eval_zh_runtime": 3.0}, {"step": 2, "eval_en_loss": 2.0, "loss": 0.5}]
    assert held_out_losses(history) == {"zh": [(2, 1.0)], "en": [(2, 2.0)]}
    assert losses(history, "loss") == [(2, 0.5)]


# workflow: W2
def test_without_a_loss_no_picture_is_drawn_and_the_log_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert plot_curves([{"step": 3, "train_runtime": 1.0}], tmp_path) == []
    assert "no curve is drawn" in caplog.text
    assert list(tmp_path.iterdir()) == []


# workflow: W2
def test_smoothing_follows_the_workflow_formula():
    weight = 1.8 * (1 / (1 + math.exp(-0.05 * 3)) - 0.5)
    second = 3.0 * weight + 1.0 * (1 - weight)
    assert smooth([3.0, 1.0, 2.0]) == pytest.approx([3.0, second, second * weight + 2.0 * (1 - weight)])
    assert smooth([]) == []
