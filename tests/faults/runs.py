"""Small runs in forks of this process, which has imported everything and run nothing; they may be killed."""

import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch.utils.data import Dataset

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.train.rows import token_rows
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

ROWS = (9, 4, 14, 6, 11, 5, 8, 17, 3, 12)
DROPS = {"attention_dropout": 0.1}
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
BASE = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 2,
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 3,
    "learning_rate": 1e-2,
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
}
"""Two epochs of 10 rows: 3 steps each, of 4, 4 and 2 rows."""


class RandomCollator:
    """A collator that masks tokens by chance, with the numbers of three libraries."""

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), 258)
        for line, row in zip(ids, rows):
            line[: len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels = ids.masked_fill((ids == 258) | (torch.rand(ids.shape) < 0.3), -100)
        if random.random() < 0.5:
            labels[:, 0] = -100
        return {"input_ids": ids, "attention_mask": (ids != 258).long(), "labels": labels}


class PlainRows(Dataset):
    """Rows that are no table."""

    def __init__(self, rows: Any):
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


KINDS: dict[str, dict[str, Any]] = {
    "dropout": {"model": DROPS},
    "lora": {"lora": LORA},
    "packed": {"model": DROPS, "packing": True, "max_length": 20},
    "grouped by length": {"model": DROPS, "train_sampling_strategy": "group_by_length"},
    "token budget": {"model": DROPS, "tokens_per_batch": 24},
    "random collator": {"model": DROPS, "collator": RandomCollator},
    "random collator, workers": {
        "collator": RandomCollator,
        "dataloader_num_workers": 2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
    },
    "evaluated between": {"model": DROPS, "held_out": (5, 7), "eval_strategy": "steps", "eval_steps": 3},
    "bfloat16": {"model": DROPS, "bf16": True},
    "neftune": {"neftune_noise_alpha": 5.0},
    "one's own dataset": {"model": DROPS, "dataset": PlainRows},
}


def make_run(folder: Path, **given: Any) -> SFTTrainer:
    """A trainer of a kind of `KINDS`, or of other options."""
    options = {**BASE, "output_dir": str(folder), **given}
    model, lora = options.pop("model", {}), options.pop("lora", None)
    collator, held_out = options.pop("collator", None), options.pop("held_out", None)
    dataset = options.pop("dataset", lambda rows: rows)
    rows = options.pop("rows", ROWS)
    callbacks = options.pop("callbacks", None)
    return SFTTrainer(
        make_tiny_model(**model),
        SFTConfig(**options),
        data_collator=collator and collator(),
        train_dataset=dataset(token_rows(rows)),
        eval_dataset=held_out and token_rows(held_out, seed=1),
        processing_class=make_byte_tokenizer(),
        peft_config=lora and LoraConfig(**lora),
        callbacks=callbacks,
    )


def outcome(trainer: SFTTrainer) -> dict[str, Any]:
    """What must be equal, bit for bit: weights, optimizer, schedule, random numbers, and every logged figure."""
    found = hashlib.sha256()
    for name, value in sorted(trainer.model.state_dict().items()):
        found.update(name.encode() + value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        for name, value in sorted(state.items()):
            found.update(name.encode() + torch.as_tensor(value).reshape(-1).view(torch.uint8).numpy().tobytes())
    found.update(repr(trainer.lr_scheduler.state_dict()).encode() + torch.get_rng_state().numpy().tobytes())
    clock = ("runtime", "per_second")
    logs = [
        {key: value for key, value in line.items() if not key.endswith(clock)} for line in trainer.state.log_history
    ]
    return {"hash": found.hexdigest(), "logs": logs}


def train(folder: Path, resume: Any = None, **options: Any) -> dict[str, Any]:
    """Train to the end, from a checkpoint perhaps."""
    trainer = make_run(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer)


# Processes ---------------------------------------------------------------------------------------------------------


@cache
def context() -> Any:
    """Forks of a process that has imported all and run nothing: once torch has used threads, forks may hang."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.faults.runs"])
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return found


def in_child(told: Path, function: Callable, *args: Any, **kwargs: Any) -> int:
    """Run a function in a process of its own; what it returns goes as JSON into `told`.

    Returns: the exit code, the negative number of a signal that ended it.
    """
    child = start_child(told, function, *args, **kwargs)
    child.join()
    return child.exitcode


def start_child(told: Path, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """The same without waiting. Returns: the process."""
    child = context().Process(target=run_in_child, args=(told, function, args, kwargs))
    child.start()
    return child


def run_in_child(told: Path, function: Callable, args: tuple, kwargs: dict) -> None:
    """Call the function, note what it returns, and end with the code that the command line would."""
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        told.parent.mkdir(parents=True, exist_ok=True)
        output = os.open(f"{told}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        told.write_text(json.dumps(function(*args, **kwargs)))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        traceback.print_exc()
        code = getattr(error, "exit_code", 1)
    finally:
        sys.stderr.flush()
        os._exit(code)


def log_of(told: Path) -> str:
    """What a process printed."""
    return Path(f"{told}.log").read_text()
