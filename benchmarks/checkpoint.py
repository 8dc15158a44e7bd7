"""Seconds to write a checkpoint of SmolLM2-135M trained whole: ours, sealed and synced, beside transformers' own.

    python -m benchmarks.checkpoint MODEL_FOLDER alpaca_en_demo.json --rounds 5

Weights, AdamW's moments and the rest, 1.6 GB. The two take turns in one process after one step of training; each
begins with nothing left to be written to the disk, and is timed until its call returns. transformers' call returns
before its files are on the disk: `sync` is what that takes then, and nothing is left of it after ours. Nothing else
may run on the machine.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.pairs import parser_of, save, spread, token_rows
from benchmarks.training import common, options_of


def main() -> None:
    """Run, print and save."""
    parser = parser_of("checkpoint", __doc__)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = measured(options, Path(folder))
    found: dict[str, Any] = {}
    for side in ("transformers", "tunesmith"):
        for figure in ("seconds", "sync"):
            found[f"{side}_{figure}"] = spread([one[side][figure] for one in rounds], 2)
    found["ratio"] = spread([one["tunesmith"]["seconds"] / one["transformers"]["seconds"] for one in rounds], 2)
    whole = [sum(one["tunesmith"].values()) / sum(one["transformers"].values()) for one in rounds]
    found["ratio_until_on_disk"] = spread(whole, 2)
    save(options.output, "checkpoint", rounds, sides=found)
    for name, (middle, around) in found.items():
        print(f"{name:24}{middle:>8}   {around}")


def measured(options: Any, folder: Path) -> list[dict[str, dict[str, float]]]:
    """Seconds of each side, round by round."""
    from tunesmith import allocator

    allocator.tune()
    from tunesmith import SFTConfig, SFTTrainer

    rows = token_rows(options.model, options.data)
    how = options_of(["tunesmith", options.model, "", "--steps", "1", "--untimed", "0"])
    args = SFTConfig(**common(how, str(folder)) | {"save_total_limit": None})
    trainer = SFTTrainer(options.model, args, train_dataset=rows)
    trainer.train()
    trainer.args.save_strategy = "steps"
    return [both(trainer, folder) for _ in range(options.rounds)]


def both(trainer: Any, folder: Path) -> dict[str, dict[str, float]]:
    """One checkpoint each way."""
    from transformers import Trainer

    return {
        "transformers": timed(lambda: Trainer._save_checkpoint(trainer, trainer.model, None), folder),
        "tunesmith": timed(lambda: trainer._save_checkpoint(trainer.model, None), folder),
    }


def timed(write: Any, folder: Path) -> dict[str, float]:
    """Seconds of a call, and of the disk's after it; what was written is removed."""
    os.sync()
    begin = time.perf_counter()
    write()
    seconds = time.perf_counter() - begin
    os.sync()
    sync = time.perf_counter() - begin - seconds
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    return {"seconds": seconds, "sync": sync}


if __name__ == "__main__":
    main()
