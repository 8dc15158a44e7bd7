"""The memory of training, measured beside what `train/memory.py` says of it: each case in a process of its own.

    python -m benchmarks.memory MODEL_FOLDER --cases full,bf16,8x300 lora,bf16,checkpointing,1x1024

A case names what it wants of full, lora, qlora; float32, bf16; checkpointing; and ROWSxTOKENS, the largest rows of a
micro-batch: rows have from half as many tokens to that many, so that no two batches are alike. Every other token is
trained. The peak is `VmHWM` after three steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile

from benchmarks.peak import peak_bytes

STEPS = 3
CASES = [
    f"{mode},{products}{checkpointing},{size}"
    for mode in ("full", "lora")
    for products in ("float32", "bf16")
    for checkpointing, size in (
        ("", "8x300"),
        ("", "1x1024"),
        (",checkpointing", "8x300"),
        (",checkpointing", "32x300"),
    )
] + ["qlora,bf16,8x300"]


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", nargs="+", default=CASES)
    parser.add_argument("--here", help="run one case in this process and print its figures as JSON")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measured(options.model, options.here)))
        return
    print("| case | tokens | measured GB | estimated GB | |\n|---|---|---|---|---|")
    for case in options.cases:
        found = in_a_process(options.model, case)
        sizes = [found[name] / 1e9 for name in ("measured", "total")]
        off = f"{100 * (sizes[1] / sizes[0] - 1):+.0f} %"
        print(f"| {case} | {found['tokens']:,} | {sizes[0]:.2f} | {sizes[1]:.2f} | {off} |", flush=True)


def in_a_process(model: str, case: str) -> dict[str, float]:
    """The figures of a case, from a process that ran nothing else."""
    command = [sys.executable, "-m", "benchmarks.memory", model, "--here", case]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(model: str, case: str) -> dict[str, float]:
    """Train three steps of a case; the estimate's parts, the tokens of the largest step, and the peak."""
    from tunesmith import allocator

    allocator.tune()  # as the command line does, before torch is imported
    from peft import LoraConfig

    from tunesmith import SFTConfig, SFTTrainer

    words = case.split(",")
    rows, length = (int(number) for number in words[-1].split("x"))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=rows,
            bf16="bf16" in words,
            gradient_checkpointing="checkpointing" in words,
            model_init_kwargs={"load_in_4bit": True} if "qlora" in words else None,
            train_sampling_strategy="sequential",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        adapter = None if "full" in words else lora
        trainer = SFTTrainer(model, args, train_dataset=token_rows(rows, length), peft_config=adapter)
        trainer.train()
    peak = peak_bytes()
    return trainer.memory.to_json() | {"measured": peak, "tokens": trainer.largest_batch.tokens}


def token_rows(rows: int, length: int):
    """Rows of a micro-batch for each step; the second step has those of full length."""
    import datasets

    half = length // 2
    lengths = [
        length if step == 1 else half + (37 * row + 53 * step) % half for step in range(STEPS) for row in range(rows)
    ]
    ids = [[10 + (7 * place + row) % 1000 for place in range(size)] for row, size in enumerate(lengths)]
    labels = [[token if place % 2 else -100 for place, token in enumerate(row)] for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels})


if __name__ == "__main__":
    main()
