"""Small recipes of every stage for runs on several processes and runs that are cut short."""

import json
from pathlib import Path

import yaml

from tests.tiny import make_byte_tokenizer, make_tiny_model

WORDS = ("red", "blue", "up", "down", "left", "right", "in", "out", "hot", "cold", "wet")
ALL = {
    "model_name_or_path": "model",
    "learning_rate": 0.01,
    "max_steps": 7,  # in the middle of an epoch
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "generation_batch_size": 2,
    "max_new_tokens": 6,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 3,
    "plot_loss": False,
    "bf16": False,
    "use_cpu": True,
}
CHAT = {"dataset": "chat.jsonl", "eval_dataset": "heldout.jsonl"}
TWO = {"dataset": "chat.jsonl,more.jsonl", "interleave_probs": "0.6,0.4"}
LORA = {"lora_r": 4, "lora_dropout": 0.1}
ALL_PHASES = {"do_train": True, "do_eval": True, "do_predict": True}
STREAM = {"streaming": True, "buffer_size": 8}
PACKED = {"packing": True, "max_length": 120, "val_size": 3}
RECIPES = {
    "lora": {**CHAT, **LORA, **ALL_PHASES, "predict_with_generate": True, "compare_rows": 3, "sample_rows": 2,
             "plot_loss": True},
    "full": {**CHAT, "adapter": "full", "gradient_accumulation_steps": 2, "num_train_epochs": 3, "max_steps": -1},
    "packed": {**TWO, **LORA, **PACKED, "mix_strategy": "interleave_under"},
    "stream": {**TWO, **LORA, **STREAM, "eval_dataset": "heldout.jsonl", "mix_strategy": "interleave_over"},
    "packed stream": {**TWO, **LORA, **STREAM, **PACKED, "mix_strategy": "interleave_under"},
    "pt": {"stage": "pt", "dataset": "texts.jsonl", "val_size": 4, "max_length": 32, "adapter": "full"},
    "rm": {"stage": "rm", "dataset": "pairs.jsonl", "val_size": 5, **LORA, **ALL_PHASES},
}  # fmt: skip


def make_workplace(folder: Path) -> Path:
    """A model, data of each kind and a file for each recipe."""
    make_tiny_model().save_pretrained(folder / "model")
    make_byte_tokenizer().save_pretrained(folder / "model")
    pairs = [(one, other) for one in WORDS for other in WORDS if one != other]
    asked = [(f"{one} or {other}?{' please' * (index % 4)}", one, other) for index, (one, other) in enumerate(pairs)]
    chat = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer, _ in asked
    ]
    write_rows(folder / "chat.jsonl", chat[:15])
    write_rows(folder / "more.jsonl", chat[40:50])
    write_rows(folder / "heldout.jsonl", chat[30:35])
    write_rows(folder / "texts.jsonl", [{"text": " ".join(WORDS[index:] * 2)} for index in range(11)])
    write_rows(
        folder / "pairs.jsonl",
        [{"prompt": question, "chosen": good, "rejected": bad * 2} for question, good, bad in asked[:20]],
    )
    for name, options in RECIPES.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**ALL, **options}))
    return folder


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_figures(path: Path) -> dict[str, float]:
    """Figures of a results file, without those of the clock."""
    return {name: value for name, value in json.loads(path.read_text()).items() if "_second" not in name
            and not name.endswith(("_runtime", "_mfu"))}  # fmt: skip
