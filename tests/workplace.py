"""A folder of a person: rows, recipes, and the command line called in it."""

import json

import yaml
from typer.testing import CliRunner

from tunesmith.cli import app

PAIRS = [("Red or blue?", "red"), ("Up or down?", "up"), ("Left or right?", "left"), ("In or out?", "in")]


def write_rows(path, pairs):
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]}
        for question, reply in pairs
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_recipe(path, **changes):
    options = {
        "model_name_or_path": "model",
        "dataset": "train.jsonl",
        "eval_dataset": "heldout.jsonl",
        "output_dir": "run",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "lora_r": 4,
        "compare_rows": 2,
        "max_new_tokens": 8,
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        **changes,
    }
    path.write_text(yaml.safe_dump({key: value for key, value in options.items() if value is not None}))


def said(output: str) -> str:
    """The last line, which is the error's."""
    return output.splitlines()[-1]


def call(*words, code=0) -> str:
    """Output of a command that must end with `code`; a traceback fails the test."""
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result.output
