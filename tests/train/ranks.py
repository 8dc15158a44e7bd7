"""Trains small runs and writes their curves: alone in a test, or as one of several processes under torchrun."""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.train.rows import LENGTHS, make_trainer, token_rows

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# Each with a global batch of 8 rows, however many processes share it; odd numbers of rows leave an uneven last batch.
RUNS = {
    "even": {"rows": LENGTHS * 2},
    "uneven": {"rows": LENGTHS + LENGTHS[:3]},
    "one row left": {"rows": (*LENGTHS, 5)},
    "accumulated": {"rows": LENGTHS * 2, "gradient_accumulation_steps": 2},
    "padded": {"rows": LENGTHS + LENGTHS[:3], "padding_free": False},
    "weighted": {"rows": LENGTHS + LENGTHS[:1], "weights": True},
    "shuffled": {"rows": LENGTHS * 3, "train_sampling_strategy": "random", "max_grad_norm": 1.0},
    "checkpointed": {"rows": LENGTHS, "gradient_checkpointing": True},
    "streamed": {"rows": LENGTHS * 2, "stream": True, "max_steps": 3, "num_train_epochs": 3},
    "lora": {"rows": LENGTHS + LENGTHS[:3], "lora": True},
}
SHOWN = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")


def curve(name: str, folder: Path, ranks: int) -> dict:
    """What a run logs, what its model scores, and a sum over its weights."""
    options = dict(RUNS[name])
    rows = token_rows(options.pop("rows"), weights=options.pop("weights", False))
    held_out = token_rows((7, 12, 5))
    if options.pop("stream", False):
        rows, held_out = rows.to_iterable_dataset(), held_out.to_iterable_dataset()
    if options.pop("lora", False):
        options["peft_config"] = LoraConfig(**LORA)
    batch = 8 // ranks // options.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        make_tiny_model(),
        make_byte_tokenizer(),
        rows,
        folder / name,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=2,
        eval_dataset=held_out,
        **{"num_train_epochs": 2, **options},
    )
    trainer.train()
    scores = trainer.evaluate()
    logged = [[line[key] for key in SHOWN] for line in trainer.state.log_history if "loss" in line]
    scored = [scores[f"eval_{key}"] for key in ("loss", "mean_token_accuracy", "entropy")]
    weights = sum(float(p.detach().double().abs().sum()) for p in trainer.model.parameters())
    return {"logged": logged, "scored": scored, "weights": weights}


def resumed(folder: Path) -> dict:
    """Losses of a run on an adapter that borrows from its base, of its second half run again, and the saved rank."""
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options["peft_config"] = LoraConfig(**LORA, init_lora_weights="pissa")
    trainers = [
        make_trainer(make_tiny_model(), make_byte_tokenizer(), token_rows(), folder, **options) for _ in range(2)
    ]
    trainers[0].train()
    trainers[0].save_model()
    torch.distributed.barrier()
    trainers[1].train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    weights = load_file(folder / "adapter_model.safetensors")
    return {
        "losses": [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in trainers],
        "saved_ranks": sorted({value.shape[0] for name, value in weights.items() if "lora_A" in name}),
    }


def main(folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    curves = {name: curve(name, Path(folder), ranks) for name in RUNS}
    curves["resumed"] = resumed(Path(folder) / "resumed")
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps(curves), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
