"""SmolLM2-135M trained whole on a long tail of lengths: 64 rows a step, and packed rows in one or many forward passes.

    python -m benchmarks.long_rows MODEL_FOLDER alpaca_en_demo.json --rounds 5

Documents of 20 to 900 tokens, median 60 (lognormal), cut from the text of the file; the first quarter of each is not
trained. TRL runs in the first round only: float32, no checkpointing, 8 rows in a forward pass.

    64 rows a step     ours in one forward pass; TRL in eight
    packed             the same rows of 1,024 tokens, eight to a step: each in a forward pass of its own, or all in
                       one of 8,192; TRL the same with four, one of 4,096. `growth` is what a token costs more in one

Nothing else may run on the machine.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import in_turn, parser_of, print_table, save, spread, summary, token_rows, training
from benchmarks.training import add_steps, check_steps

NAME = "long_rows"
ROWS, SHORTEST, LONGEST, MEDIAN = 64, 20, 900, 60
PACKED, OURS, THEIRS = 1024, 8, 4
"""Tokens of a packed row, and such rows of a step."""
PEER = "trl_fp32"


def main() -> None:
    """Run, print, save."""
    parser = parser_of(NAME, __doc__)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    add_steps(parser, steps=2, untimed=1)
    options = parser.parse_args()
    check_steps(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        count = options.steps * max(ROWS, 2 * OURS * PACKED // MEDIAN)
        documents(token_rows(options.model, options.data), count).save_to_disk(folder)
        how = ["--steps", str(options.steps), "--untimed", str(options.untimed)]
        sides = sides_of(options.model, folder, how)
        rounds = in_turn(sides, options.rounds, once=[side for side in sides if PEER in side])
    found = parts(rounds)
    save(options.output, NAME, rounds, steps=options.steps, **found)
    for part in ("tail", "packed"):
        print_table(found[part])
    for side, (middle, ends) in found["growth"].items():
        print(f"{side}: a token costs {middle:+.1%} in one forward pass ({ends[0]:+.1%} to {ends[1]:+.1%})")


def documents(rows: Any, count: int) -> Any:
    """`count` documents of the text of the rows."""
    import datasets

    text = [token for row in rows["input_ids"] for token in row]
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), 1.0, count).clip(SHORTEST, LONGEST).astype(int)
    found, place = [], 0
    for length in drawn.tolist():
        place = place if place + length <= len(text) else 0  # begin again
        ids, place = text[place : place + length], place + length
        found.append({"input_ids": ids, "labels": [-100] * (length // 4) + ids[length // 4 :]})
    return datasets.Dataset.from_list(found)


def sides_of(model: str, rows: str, how: list[str]) -> dict[str, list[str]]:
    """The words of each side: `tail` in one forward pass or in eight, `packed` likewise."""
    tail = ["--rows_per_batch", str(ROWS)]
    eighth = ["--rows_per_batch", str(ROWS // 8), "--accumulate", "8"]
    packed = ["--packing", "--max_length", str(PACKED)]

    def joined(rows_per_batch: int, accumulate: int) -> list[str]:
        return [*packed, "--rows_per_batch", str(rows_per_batch), "--accumulate", str(accumulate)]

    found = {
        "tail tunesmith": ("tunesmith", tail),
        f"tail {PEER}": (PEER, eighth),
        "one tunesmith": ("tunesmith", joined(OURS, 1)),
        "many tunesmith": ("tunesmith", joined(1, OURS)),
        f"one {PEER}": (PEER, joined(THEIRS, 1)),
        f"many {PEER}": (PEER, joined(1, THEIRS)),
    }
    return {name: training(side, model, rows, *how, *more) for name, (side, more) in found.items()}


def parts(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the tail and of packed rows, and how much dearer a token is in one long forward pass."""
    tail = [{side: one[side] for side in one if side.startswith("tail")} for one in rounds]
    packed = [{side: one[side] for side in one if not side.startswith("tail")} for one in rounds]
    growth = {}
    for side in ("tunesmith", PEER):
        both = [(one[f"many {side}"], one[f"one {side}"]) for one in rounds if f"one {side}" in one]
        growth[side] = spread([a["tokens_per_second"] / b["tokens_per_second"] - 1 for a, b in both], 4)
    return {"tail": summary(tail, f"tail {PEER}"), "packed": summary(packed, "many tunesmith"), "growth": growth}


if __name__ == "__main__":
    main()
