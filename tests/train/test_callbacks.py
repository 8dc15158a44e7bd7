"""What a person watches: files written as training goes, plain lines, a bar, a picture."""

import io
import json
import re

import pytest
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunesmith.runs import Run, read_metrics, read_status
from tunesmith.train.callbacks import (
    Pace,
    ProgressCallback,
    RunLogCallback,
    Work,
    clock_text,
    make_unfailing,
    progress_line,
    use_progress,
)
from tunesmith.train.curves import plot_curves


class Clock:
    """A clock that a test sets."""

    now = 100.0

    def __call__(self):
        return self.now


class Training:
    """Calls the hooks of callbacks as the trainer would: 100 tokens and 2 seconds a step, 10 seconds for the first."""

    def __init__(self, callback, tmp_path, total_steps=10, **args):
        self.callback, self.clock, self.tokens = callback, Clock(), 0
        callback.pace.clock, callback.pace.tokens_seen = self.clock, lambda: self.tokens
        self.args = TrainingArguments(**{"disable_tqdm": False, **args}, output_dir=str(tmp_path), report_to="none")
        self.state = TrainerState(max_steps=total_steps, is_world_process_zero=True)

    def call(self, hook, **kwargs):
        getattr(self.callback, hook)(self.args, self.state, TrainerControl(), **kwargs)

    def step(self, seconds=2.0, **logs):
        self.clock.now += seconds
        self.tokens += 100
        self.state.global_step += 1
        self.call("on_step_end")
        if logs:
            self.call("on_log", logs=logs)

    def run(self, steps=10, **logs):
        self.call("on_train_begin")
        for step in range(steps):
            self.step(10.0 if step == 0 else 2.0, **logs)
        return self


def plain_console(**options):
    return Console(file=io.StringIO(), **options)


def test_pace_leaves_out_the_first_step_and_the_evaluation():
    clock, tokens = Clock(), [0]
    pace = Pace(lambda: tokens[0], clock)
    for step, seconds in [(1, 60.0), (2, 2.0), (3, 2.0)]:
        clock.now, tokens[0] = clock.now + seconds, step * 100
        pace.end_step(step)
        assert pace.remaining(11) == {1: None, 2: 2.0 * 9, 3: 2.0 * 8}[step]
    clock.now += 12.0
    pace.skip()
    assert pace.tokens_per_second == 50.0
    assert pace.remaining(11) == 8.0 * 8  # evaluations will come again
    assert pace.elapsed == 76.0


def test_utilization_is_the_arithmetic_of_the_timed_steps_over_the_peak(tmp_path):
    log = RunLogCallback(Run(tmp_path))
    training = Training(log, tmp_path)
    log.pace.work = Work(lambda: 3.0 * training.tokens, peak=600.0)
    training.run(steps=4, loss=0.5)
    assert log.pace.mfu == 3.0 * 300 / 6 / 600
    assert read_status(tmp_path)["mfu"] == 0.25
    assert (
        progress_line(4, 10, {"loss": 0.5}, log.pace) == "step 4/10 · loss 0.500 · 50 tokens/s · MFU 25 % · 0:12 left"
    )


def test_pace_of_a_resumed_run_counts_only_its_own_steps():
    clock = Clock()
    pace = Pace(None, clock)
    pace.start(step=500)
    for step in (501, 502):
        clock.now += 3.0
        pace.end_step(step)
    assert pace.remaining(510) == 24.0
    assert pace.tokens_per_second is None


# workflow: W5
def test_trainer_log_has_the_fields_of_the_workflow(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text("an older run\n")
    Training(RunLogCallback(Run(tmp_path)), tmp_path).run(2, loss=0.5, learning_rate=1e-3, epoch=0.1)
    lines = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    assert [line["current_steps"] for line in lines] == [1, 2]
    assert "remaining_time" not in lines[0]
    assert lines[1] == {
        "current_steps": 2,
        "total_steps": 10,
        "loss": 0.5,
        "learning_rate": 1e-3,
        "epoch": 0.1,
        "percentage": 20.0,
        "elapsed_time": "0:00:12",
        "remaining_time": "0:00:16",
    }


# workflow: W5
def test_a_resumed_run_goes_on_in_the_same_trainer_log_and_its_steps_rise(tmp_path):
    log = tmp_path / "trainer_log.jsonl"
    log.write_text('{"current_steps": 5}\n{"current_steps": 6}\n{"curr')
    training = Training(RunLogCallback(Run(tmp_path)), tmp_path)
    training.state.global_step = 5
    training.run(2, loss=0.5)
    assert [json.loads(line)["current_steps"] for line in log.read_text().splitlines()] == [5, 6, 7]


# workflow: W5
def test_a_run_that_is_aborted_stops_after_the_step(tmp_path):
    callback, control = RunLogCallback(Run(tmp_path)), TrainerControl()
    training = Training(callback, tmp_path)
    callback.on_step_end(training.args, training.state, control)
    assert not control.should_training_stop
    callback.aborted = True
    callback.on_step_end(training.args, training.state, control)
    assert control.should_training_stop


def test_status_follows_the_run_and_keeps_the_last_losses(tmp_path):
    training = Training(RunLogCallback(Run(tmp_path)), tmp_path).run(3, loss=0.5)
    training.call("on_log", logs={"eval_loss": 0.75})
    training.call("on_train_end")
    status = read_status(tmp_path)
    figures = {key: status[key] for key in ("state", "step", "total_steps", "loss", "eval_loss")}
    assert figures == {"state": "running", "step": 3, "total_steps": 10, "loss": 0.5, "eval_loss": 0.75}
    assert (status["tokens_per_second"], status["eta_seconds"]) == (50.0, 14.0)


def test_only_the_first_process_writes(tmp_path):
    training = Training(RunLogCallback(Run(tmp_path)), tmp_path)
    training.state.is_world_process_zero = False
    training.run(2, loss=0.5)
    training.call("on_train_end")
    assert list(tmp_path.iterdir()) == []


def test_without_a_terminal_progress_is_plain_lines(tmp_path):
    callback = ProgressCallback(console=plain_console(width=40))
    Training(callback, tmp_path).run(3, loss=0.8344, grad_norm=1.2, learning_rate=9.1e-4)
    lines = callback.console.file.getvalue().splitlines()
    assert lines[0] == "step 1/10 · loss 0.834 · grad norm 1.20 · lr 9.1e-04"
    assert not re.search(r"[\x1b\r]", callback.console.file.getvalue())


def test_plain_lines_are_rare_but_show_the_last_step_and_every_evaluation(tmp_path):
    callback = ProgressCallback(console=plain_console())
    training = Training(callback, tmp_path).run(4, loss=0.5)
    training.call("on_log", logs={"eval_loss": 0.25})
    training.call("on_evaluate")
    for _ in range(6):
        training.step(0.1, loss=0.5)
    training.call("on_log", logs={"train_runtime": 3.0})
    lines = callback.console.file.getvalue().splitlines()
    assert [line.split(" · ")[:2] for line in lines] == [
        ["step 1/10", "loss 0.500"],
        ["step 4/10", "loss 0.500"],
        ["step 4/10", "eval loss 0.250"],
        ["step 10/10", "loss 0.500"],
    ]
    assert lines[1].endswith("50 tokens/s · 0:12 left")


@pytest.mark.parametrize("width", [40, 60, 120])
def test_the_bar_fits_the_terminal(tmp_path, width):
    callback = ProgressCallback(console=plain_console(width=width, force_terminal=True, color_system=None))
    training = Training(callback, tmp_path).run(9, loss=0.5)
    training.call("on_log", logs={"eval_loss": 0.25})
    training.call("on_train_end")
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", callback.console.file.getvalue())
    rows = [row for row in re.split(r"[\r\n]+", written) if row.strip()]
    assert max(map(len, rows)) <= width
    assert "9/10 · loss 0.500" in rows[-1]
    assert "0:02 left" in rows[-1]
    assert any(row.startswith("step 9/10 · eval loss 0.250") for row in rows)


def test_the_bar_has_no_colour_under_no_color(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    callback = ProgressCallback(console=plain_console(width=100, force_terminal=True))
    Training(callback, tmp_path).run(9, loss=0.5).call("on_train_end")
    codes = re.findall(r"\x1b\[([\d;]*)m", callback.console.file.getvalue())
    assert not [code for code in codes if re.search(r"\b(3[0-9]|4[0-9]|9[0-7])\b", code)]


def test_close_gives_the_cursor_back_and_may_be_called_twice(tmp_path):
    callback = ProgressCallback(console=plain_console(width=80, force_terminal=True))
    Training(callback, tmp_path).run(2, loss=0.5)
    callback.close()
    callback.close()
    assert callback.console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_disable_tqdm_means_plain_lines_on_a_terminal_too(tmp_path):
    callback = ProgressCallback(console=plain_console(width=80, force_terminal=True))
    Training(callback, tmp_path, disable_tqdm=True).run(1, loss=0.5)
    assert callback.console.file.getvalue() == "step 1/10 · loss 0.500\n"


def test_a_real_trainer_writes_the_files_and_the_lines(tmp_path, tiny_model, capsys):
    rows = [{"input_ids": list(range(10, 20)), "labels": list(range(10, 20))} for _ in range(8)]
    args = TrainingArguments(
        disable_tqdm=False, output_dir=str(tmp_path), max_steps=4,
        per_device_train_batch_size=2, logging_steps=1, eval_strategy="steps",
        eval_steps=2, report_to="none", save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        tiny_model, args, train_dataset=rows, eval_dataset=rows[:2], callbacks=[RunLogCallback(Run(tmp_path))]
    )
    callback = ProgressCallback(tokens_seen=lambda: 20 * trainer.state.global_step, console=plain_console())
    use_progress(trainer, callback)
    trainer.train()
    lines = callback.console.file.getvalue().splitlines()
    assert [line.split(" ·")[0] for line in lines] == ["step 1/4", "step 2/4", "step 4/4", "step 4/4"]
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4]
    assert read_status(tmp_path)["step"] == 4
    assert capsys.readouterr().out == ""
    drawn = plot_curves(trainer.state.log_history, tmp_path)
    assert [path.name for path in drawn] == ["training_loss.png", "training_eval_loss.png"]


def test_clock_text_reads_like_a_clock():
    assert [clock_text(seconds) for seconds in (-1, 5.4, 65, 3600)] == ["0:00", "0:05", "1:05", "1:00:00"]


class FailingTracker(TrainerCallback):
    """A tracker whose server is away."""

    def on_log(self, args, state, control, **kwargs):
        raise ConnectionError("no route to host")


# reliability: 22
def test_a_tracker_that_fails_is_told_once_and_kills_nothing(tmp_path, caplog):
    tracker = FailingTracker()
    make_unfailing(tracker)
    for _ in range(3):
        assert tracker.on_log(None, None, None) is None
    assert tracker.on_train_begin(None, None, None) is None
    assert caplog.messages == ["FailingTracker failed (ConnectionError: no route to host); training goes on"]


# reliability: 22
def test_a_log_that_cannot_be_written_is_told_once_and_kills_nothing(tmp_path, caplog):
    callback = RunLogCallback(Run(tmp_path / "away"))
    training = Training(callback, tmp_path)
    training.call("on_train_begin")
    for _ in range(3):
        training.step(loss=1.0)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the run's log cannot be written ([Errno 2] No such file or directory")
