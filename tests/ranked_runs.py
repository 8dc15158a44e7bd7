"""Runs recipes alone, or as one of several processes under torchrun: `-m tests.ranked_runs FOLDER`."""

import contextlib
import functools
import json
import os
import sys
from pathlib import Path

import torch

from tests.small_runs import RECIPES
from tunesmith import cli
from tunesmith.data import cache
from tunesmith.steps import data

TRAINED = ("lora", "full", "packed", "stream", "packed stream", "pt", "rm")
ASKED = {
    "eval": ("eval", "lora", "--eval_dataset", "more.jsonl"),
    "predict": ("predict", "lora", "--eval_dataset", "heldout.jsonl", "--output", "asked.jsonl"),
}
REFUSED = {
    "bad recipe": (2, ("train", "lora.yaml", "--lora_r", "many")),
    "bad data": (3, ("train", "lora.yaml", "--dataset", "broken.jsonl", "--output_dir", "broken")),
    "in the way": (2, ("train", "lora.yaml", "--output_dir", "mine")),
    "finished": (2, ("train", "lora.yaml", "--output_dir", "lora")),
    "no checkpoint": (4, ("train", "lora.yaml", "--output_dir", "new", "--resume_from_checkpoint", "true")),
}
assert RECIPES.keys() >= set(TRAINED)


def commands(ranks: int) -> dict[str, tuple[str, ...]]:
    """All commands, with the same global batch for any number of processes.

    Dropout would draw by process, and Adam makes a whole step of a gradient that is no more than rounding error.
    """
    batch = (
        "--per_device_train_batch_size",
        str(4 // ranks),
        "--data_cache_dir",
        "cache",
        "--adam_epsilon",
        "1e-4",
        "--learning_rate",
        "1e-3",
    )
    found = {}
    for name in TRAINED:
        dropout = ("--lora_dropout", "0") if "lora_r" in RECIPES[name] else ()
        merge = ("--do_merge", "true") if name == "lora" else ()
        found[name] = ("train", f"{name}.yaml", "--output_dir", name, *batch, *dropout, *merge)
    return found | ASKED | {name: words for name, (_, words) in REFUSED.items()}


def exit_codes(ranks: int) -> dict[str, int]:
    """Run all commands here; returns what each ends with."""
    data.cache_of = functools.partial(cache_of_any_size, data.cache_of)
    found = {}
    for name, words in commands(ranks).items():
        try:
            cli.app(list(words), prog_name="tunesmith")
        except SystemExit as done:
            found[name] = int(done.code or 0)
    return found


def cache_of_any_size(cache_of, folder: str | None, overwrite: bool) -> cache.Cache | None:
    """The cache, also for the few rows of a test."""
    found = cache_of(folder, overwrite)
    return None if found is None else cache.Cache(found.folder, found.overwrite, min_rows=1)


def main(folder: str) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    cli.WAIT_FOR_FIRST = 0.0  # here nothing ends the others
    rank, ranks = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    with open(f"rank{rank}.txt", "w") as file, contextlib.redirect_stdout(file):
        codes = exit_codes(ranks)
    Path(f"rank{rank}.json").write_text(json.dumps(codes))
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
