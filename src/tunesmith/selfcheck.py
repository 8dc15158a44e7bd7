"""`tunesmith selfcheck`: the promises proved on this machine, with a tiny model made on the spot and no network.

Each check trains twice what must come out the same, with plain gradient descent at a rate of 1, so that the difference
of the weights is the difference of the gradients.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from tunesmith.checkpoints import checkpoints, last_whole
from tunesmith.data import IGNORE_INDEX
from tunesmith.train.callbacks import use_progress
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

LENGTHS = (9, 4, 14, 6, 11, 5, 8, 17)
WORDS = 64
DESCENT = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
CLOSE, CLOSE_ON_GPU = 1e-5, 1e-3  # a GPU's float32 products may be of TF32, and its sums are in any order
Weights = dict[str, Tensor]


@dataclass
class Check:
    """One promise: what was compared, the largest difference, and what it may be."""

    name: str
    difference: float
    allowed: float
    passed: bool
    note: str = ""


def run_checks(use_cpu: bool = False) -> list[Check]:
    """All checks, in the order of the promises.

    Args:
        use_cpu: leave a GPU alone.
    """
    on_gpu = torch.cuda.is_available() and not use_cpu
    allowed = CLOSE_ON_GPU if on_gpu else CLOSE
    found = []
    for name, check in CHECKS.items():
        with tempfile.TemporaryDirectory() as folder:
            bar = 0.0 if name in EXACT and not on_gpu else allowed
            found.append(outcome(name, bar, partial(check, Path(folder), use_cpu)))
    return found


def outcome(name: str, allowed: float, check: Callable[[], float]) -> Check:
    """A check that was carried out; one that breaks has failed."""
    try:
        difference = check()
    except Exception as error:  # whatever the machine may do: the other checks are still of use
        return Check(name, float("nan"), allowed, False, f"{type(error).__name__}: {error}".splitlines()[0])
    return Check(name, difference, allowed, difference <= allowed)


def show_checks(checks: list[Check], console: Console | None = None) -> None:
    """A table: what was compared, how far apart, how far it may be."""
    table = Table(box=None, pad_edge=False)
    for title in ("check", "difference", "allowed", ""):
        table.add_column(title, justify="right" if title in ("difference", "allowed") else "left", no_wrap=True)
    for check in checks:
        table.add_row(
            check.name,
            f"{check.difference:.1e}",
            f"{check.allowed:.0e}",
            "pass" if check.passed else "FAIL " + check.note,
        )
    (console or Console()).print(table, highlight=False, markup=False)


# The checks ---------------------------------------------------------------------------------------------------------


def packed(folder: Path, use_cpu: bool) -> float:
    """Examples joined to rows against each for itself."""
    return apart(trained(folder / "a", use_cpu), trained(folder / "b", use_cpu, packing=True, max_length=32))


def flat(folder: Path, use_cpu: bool) -> float:
    """Batches without padding against padded ones."""
    return apart(trained(folder / "a", use_cpu), trained(folder / "b", use_cpu, padding_free=False))


def accumulated(folder: Path, use_cpu: bool) -> float:
    """Four micro-batches of two rows against one of eight."""
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    return apart(trained(folder / "a", use_cpu), trained(folder / "b", use_cpu, **parts))


def checkpointed(folder: Path, use_cpu: bool) -> float:
    """Activations that are computed again against such that are kept."""
    return apart(trained(folder / "a", use_cpu), trained(folder / "b", use_cpu, gradient_checkpointing=True))


def plain(folder: Path, use_cpu: bool) -> float:
    """A step against a plain loop: a row at a time, all logits, PyTorch's own loss."""
    model, rows = make_model().to("cpu" if use_cpu or not torch.cuda.is_available() else "cuda"), make_rows()
    losses, count = [], 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=model.device)
        targets = torch.tensor(row["labels"], device=model.device)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE_INDEX))
        count += int((targets != IGNORE_INDEX).sum())
    (torch.stack(losses).sum() / count).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= parameter.grad
    return apart(trained(folder, use_cpu), weights_of(model))


def resumed(folder: Path, use_cpu: bool) -> float:
    """Two steps and two more from their checkpoint against four in one go; with dropout, AdamW, and rows shuffled."""
    options = {
        **{"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4, "train_sampling_strategy": "random"},
        **{"per_device_train_batch_size": 3, "save_strategy": "steps", "save_steps": 2, "dropout": 0.1},
    }
    whole = trained(folder / "a", use_cpu, **options)
    again = trained(folder / "b", use_cpu, resume=str(folder / "a" / "checkpoint-2"), **options)
    return apart(whole, again)


def damaged(folder: Path, use_cpu: bool) -> float:
    """A checkpoint with one bit changed is not used, and the one before it is: 0, or 1 where it is not so."""
    trained(folder, use_cpu, max_steps=2, save_strategy="steps", save_steps=1)
    path = checkpoints(folder)[2] / "optimizer.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return 0.0 if last_whole(folder).path == checkpoints(folder)[1] else 1.0


def merged(folder: Path, use_cpu: bool) -> float:
    """Logits of a trained adapter on its base against those of the two merged."""
    from peft import LoraConfig

    trainer = make_trainer(folder, use_cpu, peft_config=LoraConfig(**LORA), learning_rate=0.1, max_steps=3)
    trainer.train()
    model = trainer.model.eval()
    ids = torch.tensor([make_rows()[7]["input_ids"]], device=model.device)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        after = model.merge_and_unload()(input_ids=ids).logits
    return float((before - after).abs().max())


CHECKS: dict[str, Callable[[Path, bool], float]] = {
    "ours = a plain loop": plain,
    "packed = unpacked": packed,
    "flat = padded": flat,
    "accumulated = whole": accumulated,
    "checkpointed = kept": checkpointed,
    "resumed = uninterrupted": resumed,
    "damaged checkpoint = skipped": damaged,
    "merged = adapter": merged,
}
EXACT = ("resumed = uninterrupted", "damaged checkpoint = skipped")
"""What must be equal bit for bit on a CPU."""


# What they train ----------------------------------------------------------------------------------------------------


def trained(folder: Path, use_cpu: bool, *, resume: str | None = None, **options: Any) -> Weights:
    """Weights after training."""
    trainer = make_trainer(folder, use_cpu, **options)
    trainer.train(resume_from_checkpoint=resume)
    return weights_of(trainer.model)


def make_trainer(folder: Path, use_cpu: bool, *, peft_config: Any = None, dropout: float = 0.0, **options: Any) -> Any:
    """A float32 trainer of the tiny model that takes its eight rows in one step."""
    shared = {
        **{"output_dir": str(folder), "use_cpu": use_cpu, "bf16": False, "max_steps": 1, "save_strategy": "no"},
        **{"per_device_train_batch_size": 8, "train_sampling_strategy": "sequential", "disable_tqdm": True},
        **{"hang_timeout": 300.0, "logging_strategy": "no"},
    }
    model, rows = make_model(dropout), make_rows()
    args = SFTConfig(**{**shared, **DESCENT, **options})
    tokenizer = make_tokenizer()
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config)
    use_progress(trainer, None)
    return trainer


def make_model(dropout: float = 0.0) -> LlamaForCausalLM:
    """A seeded Llama of two layers, small enough to be made in milliseconds."""
    config = LlamaConfig(
        **{"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "attention_dropout": dropout},
        **{"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    )
    set_seed(0)
    return LlamaForCausalLM(config)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word for each id."""
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="w0", eos_token="w1", pad_token="w2")


def make_rows() -> datasets.Dataset:
    """Rows of unequal length, the first third of each not trained."""
    generator, rows = torch.Generator().manual_seed(0), []
    for length in LENGTHS:
        ids = torch.randint(4, WORDS, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * (length // 3) + ids[length // 3 :]})
    return datasets.Dataset.from_list(rows)


def weights_of(model: Any) -> Weights:
    """A copy of all weights, on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.named_parameters()}


def apart(one: Weights, other: Weights) -> float:
    """The largest difference of any weight."""
    return max(float(difference.max()) for difference in differences(one, other))


def differences(one: Weights, other: Weights) -> Iterator[Tensor]:
    """Of each weight."""
    for name, value in one.items():
        yield (value - other[name]).abs()
