"""Fifty steps of ours, every lever on, beside a plain loop's on the same rows: how far the losses are apart.

    python -m benchmarks.loss_curve MODEL_FOLDER alpaca_en_demo.json

SmolLM2-135M trained whole, 2 rows of at most 160 tokens a step, at 2e-5 falling to 0. The reach is 1e-3 in float32 at
every step; bfloat16 products round, and their distance is shown beside that of a plain loop under autocast.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.pairs import REFERENCE, in_turn, parser_of, save, token_rows, training

SIDES = (REFERENCE, "tunesmith_fp32", "plain_bf16", "tunesmith")
ROWS, LONGEST = 2, 160


def main() -> None:
    """Run the sides, print and save their curves and distances."""
    parser = parser_of("loss_curve", __doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = in_turn(words_of(options, folder), options.rounds)
    found = distances(rounds[0])
    save(options.output, "loss_curve", rounds, steps=options.steps, distances=found)
    for side, one in found.items():
        print(f"{side:16} largest difference of a loss {one['loss']:.1e}, of a gradient norm {one['grad_norm']:.1%}")


def words_of(options: argparse.Namespace, folder: str) -> dict[str, list[str]]:
    """Each side's words after `python -m`; the rows are written into `folder`."""
    rows = token_rows(options.model, options.data)
    rows = rows.filter(lambda row: len(row["input_ids"]) <= LONGEST).select(range(ROWS * options.steps))
    rows.save_to_disk(folder)
    how = ("--steps", str(options.steps), "--rows_per_batch", str(ROWS))
    return {side: training(side, options.model, folder, *how) for side in SIDES}


def distances(sides: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each side the largest difference of any step from the plain loop's: in nats, and relative."""
    plain = sides[REFERENCE]
    return {
        side: {
            "loss": max(abs(a - b) for a, b in zip(one["loss"], plain["loss"], strict=True)),
            "grad_norm": max(abs(a / b - 1) for a, b in zip(one["grad_norm"], plain["grad_norm"], strict=True)),
        }
        for side, one in sides.items()
        if side != REFERENCE
    }


if __name__ == "__main__":
    main()
