"""A stream is taken up where it stood: no consumed row is read again, and the run ends bit for bit as in one go."""

import json
import shutil

import pytest

from tests.faults.runs import BASE, outcome
from tests.tiny import make_byte_tokenizer, make_tiny_model
from tunesmith.checkpoints import checkpoints
from tunesmith.config import DataConfig
from tunesmith.data import readers
from tunesmith.data.sources import PEEK
from tunesmith.data.stream import FINISHED, stream
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer


def write_rows(path, count, start=0):
    rows = [{"prompt": f"{n}?", "completion": "yes " * (1 + n % 5) + str(n)} for n in range(start, start + count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def streamed(folder, data, resume=None, **given):
    """Train on a stream; what came out, and which lines of the first file were read as JSON, until when."""
    read, at_save, original = [], {}, readers._json_row

    def noted(path, line, raw):
        read.append(line)
        return original(path, line, raw)

    options = {**BASE, "output_dir": str(folder), "dataset_kwargs": {"format": FINISHED}, "logging_steps": 1}
    options |= {"num_train_epochs": 3, "save_total_limit": None, **given}
    found = stream(DataConfig(streaming=True, **data), seed=3)
    trainer = SFTTrainer(
        make_tiny_model(attention_dropout=0.1),
        SFTConfig(**options),
        train_dataset=found.train,
        processing_class=make_byte_tokenizer(),
    )
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args: (at_save.update({str(trainer.state.global_step): len(read)}), save(*args))
    readers._json_row = noted
    try:
        trainer.train(resume_from_checkpoint=resume)
    finally:
        readers._json_row = original
    return {**outcome(trainer), "read": read, "at_save": at_save}


KINDS = {
    "one file": ({"buffer_size": 16}, {}),
    "no buffer to speak of": ({"buffer_size": 1}, {}),
    "held in the buffer": ({"buffer_size": 1000}, {}),
    "packed": ({"buffer_size": 16}, {"packing": True, "max_length": 64, "num_of_sequences": 4}),
    "two, interleaved": ({"buffer_size": 8, "mix_strategy": "interleave_under", "interleave_probs": [0.7, 0.3]}, {}),
    "two, until both ended": (
        {"buffer_size": 8, "mix_strategy": "interleave_over", "interleave_probs": [0.7, 0.3]},
        {},
    ),
    "two, one after the other": ({"buffer_size": 8}, {}),
    "held out": ({"buffer_size": 8, "val_size": 5}, {}),
}


KINDS_STEPS = dict(zip(KINDS, (15, 40, 14, 30, 16, 40, 16, 1), strict=True))
"""The step that the default suite goes on from; `make faults` takes six of each."""


# reliability: 2 16
@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_taken_up_where_it_stood(tmp_path, kind, request, outcome_of):
    data, options = KINDS[kind]
    files = [write_rows(tmp_path / "one.jsonl", 60)]
    if kind.startswith("two"):
        files.append(write_rows(tmp_path / "two.jsonl", 25, start=100))
    data = {**data, "dataset": files}
    options = {**options, "max_steps": 45}  # of 4 rows: into the third epoch of 60
    whole = outcome_of(streamed, tmp_path / "whole", data, **options)
    for step in (1, 14, 15, 16, 30, 40) if request.config.getoption("--all-faults") else (KINDS_STEPS[kind],):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert (checkpoint / "stream.json").is_file()
        again = outcome_of(streamed, tmp_path / "again", data, str(checkpoint), **options)
        assert again["logs"] == whole["logs"], f"after step {step}"
        assert again["hash"] == whole["hash"], f"after step {step}"
        rest = len(whole["read"]) - whole["at_save"][str(step)]
        assert rest <= len(again["read"]) <= rest + PEEK * len(files), "rows were read again that are no first look"
        shutil.rmtree(tmp_path / "again")


# reliability: 16
def test_most_of_a_long_file_is_not_read_again(tmp_path, outcome_of):
    data = {"dataset": [write_rows(tmp_path / "rows.jsonl", 10_000)], "buffer_size": 64}
    options = {
        "per_device_train_batch_size": 50,
        "gradient_accumulation_steps": 1,
        "max_steps": 170,
        "save_steps": 160,
    }
    whole = outcome_of(streamed, tmp_path / "whole", data, **options)
    assert list(checkpoints(tmp_path / "whole")) == [160, 170]
    checkpoint = str(tmp_path / "whole" / "checkpoint-160")
    again = outcome_of(streamed, tmp_path / "again", data, checkpoint, **options)
    assert again["hash"] == whole["hash"]
    assert len([line for line in again["read"] if line <= 8000]) < 80


def test_a_stream_of_ones_own_counts_its_rows_off(tmp_path, outcome_of):
    data = {"dataset": [write_rows(tmp_path / "rows.jsonl", 60)], "buffer_size": 16}
    options = {"max_steps": 5, "dataloader_num_workers": 1}
    whole = outcome_of(streamed, tmp_path / "whole", data, **options)
    assert not (tmp_path / "whole" / "checkpoint-3" / "stream.json").exists()
    again = outcome_of(streamed, tmp_path / "again", data, str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert again["hash"] == whole["hash"]
