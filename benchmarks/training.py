"""One side of a comparison: some steps of training on given token rows, in this process, and a JSON line of figures.

    python -m benchmarks.training tunesmith MODEL_FOLDER ROWS_FOLDER --mode full --steps 6

All sides get the same rows in the same order, so their losses can be compared. ROWS_FOLDER is what `save_to_disk` of
`datasets` wrote, with input_ids and labels; `benchmarks.pairs` makes one.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peak import peak_bytes

RATES = {"full": 2e-5, "lora": 1e-4, "qlora": 1e-4}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def main() -> None:
    """Train and print the line."""
    options = options_of()
    figures = watched(options) if options.watch else SIDES[options.side](options)
    figures["peak_memory_gb"] = round(peak_bytes() / 1e9, 2)
    print(json.dumps(figures))


def options_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side", choices=sorted(SIDES))
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--mode", choices=sorted(RATES), default="full")
    parser.add_argument("--rows_per_batch", type=int, default=8, help="rows of a forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes of a step")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--packing", action="store_true", help="join rows to such of max_length tokens")
    parser.add_argument("--watch", action="store_true", help="find the largest block of logits, at the cost of speed")
    add_steps(parser, steps=6, untimed=2)
    options = parser.parse_args(words)
    check_steps(parser, options)
    return options


def add_steps(parser: argparse.ArgumentParser, *, steps: int, untimed: int) -> None:
    """The options that say how long a run is."""
    parser.add_argument("--steps", type=int, default=steps, help=f"steps of a run [{steps}]")
    why = "first steps that are not timed: they pay for memory and caches"
    parser.add_argument("--untimed", type=int, default=untimed, help=f"{why} [{untimed}]")


def check_steps(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse a run in which no step is timed."""
    if options.steps <= options.untimed:
        least = options.untimed + 1
        parser.error(
            f"--steps {options.steps}: expected {least} or more, for the first {options.untimed} are not timed"
        )


# The sides ----------------------------------------------------------------------------------------------------------


def with_tunesmith(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """`SFTTrainer` of tunesmith."""
    from tunesmith import allocator

    allocator.tune()  # as the command line does, before torch is imported
    import datasets

    from tunesmith import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        long_run = {
            "compile_layers": options.mode != "qlora"
        }  # chosen in runs of minutes, which these steps stand for
        args = SFTConfig(**common(options, folder), **long_run, **more)
        rows = datasets.load_from_disk(options.rows)
        trainer = SFTTrainer(options.model, args, train_dataset=rows, peft_config=adapter(options))
        figures = timed(trainer, lambda: trainer.tokens_seen, options.untimed)
    return figures | {"choices": trainer.choices}


def with_trl(options: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """TRL's `SFTTrainer`."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**common(options, folder) | {"include_num_input_tokens_seen": "non_padding"} | more)
        rows = datasets.load_from_disk(options.rows)
        trainer = SFTTrainer(options.model, args=args, train_dataset=rows, peft_config=adapter(options))
        return timed(trainer, lambda: trainer.state.num_input_tokens_seen, options.untimed)


def with_a_plain_loop(options: argparse.Namespace, *, bf16: bool = False) -> dict[str, Any]:
    """What every side must equal: transformers' padded forward pass in float32, all logits, cross entropy, AdamW.

    With `bf16` under autocast, the usual way to bfloat16 products.
    """
    import datasets
    import torch
    import torch.nn.functional as F
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **base(options))
    if options.mode != "full":
        torch.manual_seed(0)
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(**LORA))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rate, size = RATES[options.mode], options.rows_per_batch
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    rows, figures = datasets.load_from_disk(options.rows), empty_figures()
    for step in range(options.steps):
        begin = time.perf_counter()
        batch = rows[step * size : (step + 1) * size]
        optimizer.param_groups[0]["lr"] = rate * (1 - step / options.steps)
        ids, labels = (padded(batch[name], fill) for name, fill in (("input_ids", 0), ("labels", -100)))
        mask = padded([[1] * len(row) for row in batch["input_ids"]], 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        figures["grad_norm"].append(torch.nn.utils.clip_grad_norm_(trained, 1.0).item())
        figures["loss"].append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        figures["seconds"].append(time.perf_counter() - begin)
        figures["tokens"].append(int(mask.sum()))
    return with_speed(figures, options.untimed)


TUNED = {"gradient_checkpointing": False, "packing": True, "per_device_train_batch_size": 2}
SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "tunesmith": with_tunesmith,
    "tunesmith_fp32": lambda options: with_tunesmith(options, bf16=False),
    "trl": with_trl,
    "trl_fp32": lambda options: with_trl(options, bf16=False, gradient_checkpointing=False),
    "trl_tuned": lambda options: with_trl(options, bf16=False, **TUNED),
    "trl_tuned_bf16": lambda options: with_trl(options, bf16=True, **TUNED),
    "plain": with_a_plain_loop,
    "plain_bf16": lambda options: with_a_plain_loop(options, bf16=True),
}
"""`trl` has TRL's defaults: bfloat16 and checkpointing; `trl_tuned` and `trl_tuned_bf16` pack 2 rows of
`max_length` into a step; which of them is the faster depends on the machine."""


def watched(options: argparse.Namespace) -> dict[str, Any]:
    """The figures of a side, and the largest block of logits that it made, in MB."""
    from benchmarks.blocks import LargestBlock

    config = json.loads((Path(options.model) / "config.json").read_text(encoding="utf-8"))
    with LargestBlock(config["vocab_size"], config["hidden_size"]) as seen:
        figures = SIDES[options.side](options)
    return figures | {"largest_logits_mb": round(seen.bytes / 1e6, 1)}


# What they share ----------------------------------------------------------------------------------------------------


def common(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": folder,
        "max_length": options.max_length,
        "packing": options.packing,
        "max_steps": options.steps,
        "per_device_train_batch_size": options.rows_per_batch,
        "gradient_accumulation_steps": options.accumulate,
        "learning_rate": RATES[options.mode],
        "model_init_kwargs": base(options) or None,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
    }


def adapter(options: argparse.Namespace) -> Any:
    """The peft config of the mode."""
    from peft import LoraConfig

    return None if options.mode == "full" else LoraConfig(**LORA)


def base(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the base of the mode: four bits that multiply in bfloat16, or none."""
    import torch
    from transformers import BitsAndBytesConfig

    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(**four_bits)} if options.mode == "qlora" else {}


def empty_figures() -> dict[str, list]:
    """A list of each figure of a step."""
    return {"seconds": [], "tokens": [], "loss": [], "grad_norm": []}


def timed(trainer: Any, tokens_seen: Callable[[], int], untimed: int) -> dict[str, Any]:
    """Train; the figures of each step."""
    from transformers import TrainerCallback

    figures = empty_figures()

    class StepClock(TrainerCallback):
        """Seconds and tokens of each step."""

        def on_step_begin(self, args, state, control, **kwargs):
            """Start the clock."""
            self.begin, self.before = time.perf_counter(), tokens_seen()

        def on_step_end(self, args, state, control, **kwargs):
            """Note the step."""
            figures["seconds"].append(time.perf_counter() - self.begin)
            figures["tokens"].append(tokens_seen() - self.before)

    trainer.add_callback(StepClock())
    trainer.train()
    for entry in trainer.state.log_history:
        for name in ("loss", "grad_norm"):
            if "loss" in entry:
                figures[name].append(entry[name])
    return with_speed(figures, untimed)


def with_speed(figures: dict[str, Any], untimed: int) -> dict[str, Any]:
    """The figures, and real tokens per second without the first steps."""
    speed = sum(figures["tokens"][untimed:]) / sum(figures["seconds"][untimed:])
    return {"tokens_per_second": speed, **figures}


def padded(rows: list[list[int]], fill: int) -> Any:
    """(rows, longest) int64, filled on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill)


if __name__ == "__main__":
    main()
