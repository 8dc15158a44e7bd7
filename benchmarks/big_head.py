"""A model with a head of 262,144 tokens trained whole, a quarter of the tokens trained: ours, TRL and a plain loop.

    python -m benchmarks.big_head --rounds 5

The shape of Gemma-3-270M with random weights: hidden 640, 18 layers, 4 heads of 256 over 1, head tied to the
embeddings. 8 rows a step of 32 to 256 random tokens: the plain loop, which makes all logits of the padded rows and
holds them several times, needs some 15 GB, the others less. `largest_logits_mb` is the largest block of logits that
any operation of a side of ours made, forward or backward, found in a run of its own, which is not timed.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pairs import REFERENCE, in_a_process, in_turn, parser_of, print_table, save, summary, training
from benchmarks.training import add_steps, check_steps

NAME = "big_head"
OURS = ("tunesmith", "tunesmith_fp32")
SIDES = (*OURS, "trl_fp32", REFERENCE)
SHAPE = {
    "vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2_048, "num_hidden_layers": 18,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
}  # fmt: skip
SHORTEST, LONGEST = 32, 256


def main() -> None:
    """Run, print, save."""
    parser = parser_of(NAME, __doc__)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add_steps(parser, steps=3, untimed=1)
    options = parser.parse_args()
    check_steps(parser, options)
    with tempfile.TemporaryDirectory() as folder:
        model, rows = str(Path(folder) / "model"), str(Path(folder) / "rows")
        save_model(SHAPE, model)
        random_rows(8 * options.steps, SHAPE["vocab_size"]).save_to_disk(rows)
        how = ["--steps", str(options.steps), "--untimed", str(options.untimed)]
        sides = {side: training(side, model, rows, *how) for side in options.sides}
        rounds = in_turn(sides, options.rounds, once=[REFERENCE])
        found = summary(rounds)
        for side in (side for side in sides if side in OURS):
            watched = in_a_process(side, [*sides[side], "--watch"])
            found[side]["largest_logits_mb"] = watched["largest_logits_mb"]
    save(options.output, NAME, rounds, steps=options.steps, shape=SHAPE, sides=found)
    print_table(found)
    for side in (side for side in found if side in OURS):
        print(f"{side}: largest block of logits {found[side]['largest_logits_mb']:,.1f} MB")


def save_model(shape: dict[str, int], folder: str) -> None:
    """Random weights of the shape, and a tokenizer, which a trainer wants to see."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from tests.tiny import make_byte_tokenizer

    torch.manual_seed(0)
    tokenizer = make_byte_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    Gemma3ForCausalLM(Gemma3TextConfig(**shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def random_rows(count: int, vocab_size: int) -> Any:
    """Rows of random tokens; the last quarter of each is trained."""
    import datasets

    generator, rows = np.random.default_rng(0), []
    for length in generator.integers(SHORTEST, LONGEST + 1, count).tolist():
        ids = generator.integers(0, vocab_size, length).tolist()
        asked = length - length // 4
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return datasets.Dataset.from_list(rows)


if __name__ == "__main__":
    main()
