"""Tokens per second of one GPU on a 0.5B shape with random weights and Alpaca-like lengths, no peer, no network.

python -m benchmarks.gpu_speed --output results/gpu.json
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from tests.tiny import make_byte_tokenizer
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

# Qwen2.5-0.5B's sizes in a Llama: hidden 896, 24 layers, 14 heads over 2, a vocabulary of 152k
SHAPE = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4_864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 4_096, "tie_word_embeddings": True,
}  # fmt: skip


class StepClock(TrainerCallback):
    """Seconds and tokens of every step after the first few, which pay for caches."""

    def __init__(self, trainer: SFTTrainer, skip: int):
        self.trainer, self.skip, self.steps = trainer, skip, []

    def on_step_end(self, args, state, control, **kwargs):
        """Wait for the device and note where it is."""
        torch.cuda.synchronize()
        self.steps.append((time.perf_counter(), self.trainer.tokens_seen))

    def tokens_per_second(self) -> float:
        """Over the steps after the first few."""
        (begin, before), (end, after) = self.steps[self.skip - 1], self.steps[-1]
        return (after - before) / (end - begin)


def alpaca_like_rows(count: int, seed: int = 0) -> datasets.Dataset:
    """Random tokens with the lengths of alpaca_en_demo: mean 201, p95 452, at most 750; a quarter is prompt."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(mean=5.1, sigma=0.6, size=count).clip(20, 750).astype(int)
    rows = []
    for length in lengths:
        ids = generator.integers(0, SHAPE["vocab_size"], length).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return datasets.Dataset.from_list(rows)


def main() -> None:
    """Train some steps and print and save the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens_per_batch", type=int, default=16_384)
    options = parser.parse_args()
    model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder, max_steps=options.steps, tokens_per_batch=options.tokens_per_batch,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        rows = alpaca_like_rows(2_500)
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=make_byte_tokenizer())
        clock = StepClock(trainer, skip=5)
        trainer.add_callback(clock)
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "work": f"0.5B shape, full, {options.tokens_per_batch} tokens a step",
        "tokens_per_second": round(clock.tokens_per_second()),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "loss": [entry["loss"] for entry in logs],
        "grad_norm": [entry["grad_norm"] for entry in logs],
        "choices": trainer.choices,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print({key: result[key] for key in ("device", "work", "tokens_per_second", "peak_memory_gib")})


if __name__ == "__main__":
    main()
