"""64 prompts of unequal length answered greedily by SmolLM2-135M, as `predict` does and one by one.

    python -m benchmarks.generation MODEL_FOLDER alpaca_en_demo.json --rounds 5

    tunesmith     `predict`'s way, with its own defaults
    one_by_one    a call of transformers' `model.generate` for each prompt, in float32

Prompts are the first of the file; an answer has at most 32 new tokens.
`different` counts answers that are not those of one_by_one, `times` says how many times as fast a side is in wall
time; `cpu_seconds` of the runs count all threads, for machines that others use. Nothing else may run on the machine.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.pairs import in_turn, parser_of, save, spread
from benchmarks.peak import peak_bytes

NAME = "generation"


def main() -> None:
    """Run the sides in turn, print, save."""
    parser = parser_of(NAME, __doc__)
    parser.add_argument("model", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("data", type=Path, help="JSON list of Alpaca rows")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--alone", choices=SIDES, help="run the one side here and print its figures only")
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(measured(options)))
        return
    how = [f"--prompts={options.prompts}", f"--max_new_tokens={options.max_new_tokens}"]
    words = ["benchmarks.generation", options.model, str(options.data), *how, "--alone"]
    rounds = in_turn({side: [*words, side] for side in options.sides}, options.rounds)
    found = summary(rounds)
    save(options.output, NAME, rounds, prompts=options.prompts, max_new_tokens=options.max_new_tokens, sides=found)
    print(f"{'side':14}{'tokens/s':>10}{'spread':>16}{'times':>8}{'spread':>14}{'GB':>7}{'different':>11}")
    for side, one in found.items():
        speed, times = (f"{one[name][0]:>10}{'{}–{}'.format(*one[name][1]):>16}" for name in ("speed", "times"))
        print(f"{side:14}{speed}{times}{one['peak_memory_gb']:>7}{one['different']:>11}")


def summary(rounds: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tokens per second, how many times as fast as one by one within a round, and how many answers differ."""
    found = {}
    for side in rounds[0]:
        runs = [one[side] for one in rounds]
        base = [one.get("one_by_one", one[side]) for one in rounds]
        found[side] = {
            "speed": spread([run["tokens_per_second"] for run in runs], 1),
            "times": spread([other["seconds"] / run["seconds"] for run, other in zip(runs, base)], 2),
            "peak_memory_gb": max(run["peak_memory_gb"] for run in runs),
            "different": sum(a != b for a, b in zip(runs[0]["answers"], base[0]["answers"])),
        }
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Answers of one side, and the seconds they took; loading is not timed."""
    from tunesmith import allocator

    allocator.tune()
    import torch

    from tunesmith.evaluate.generate import stop_token_ids
    from tunesmith.model.load import load_model, load_tokenizer

    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, dtype="float32").requires_grad_(False).eval()
    prompts = first_prompts(options.data, tokenizer, options.prompts)
    stop_ids = stop_token_ids(model, tokenizer)
    with torch.no_grad():
        model(torch.tensor([prompts[0]]))  # pay for memory and threads
    begin, cpu = time.perf_counter(), time.process_time()
    answers = SIDES[options.alone](model, tokenizer, prompts, stop_ids, options.max_new_tokens)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    tokens = sum(map(len, answers))
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "tokens": tokens,
        "prompt_tokens": [len(prompt) for prompt in prompts],
        "peak_memory_gb": round(peak_bytes() / 1e9, 2),
        "answers": answers,
    }


def first_prompts(data: Path, tokenizer: Any, count: int) -> list[list[int]]:
    """Token ids of the first prompts of the file."""
    from tunesmith.config import DataConfig
    from tunesmith.data.collect import collect
    from tunesmith.evaluate.questions import ask

    examples = collect(DataConfig(dataset=str(data), max_samples=count)).train
    return [ask(example, tokenizer, index=index).prompt.input_ids for index, example in enumerate(examples)]


def with_predict(model: Any, tokenizer: Any, prompts: list, stop_ids: list[int], limit: int) -> list[list[int]]:
    """As `evaluate.predict` does."""
    from tunesmith.evaluate.generate import answer_decoding, generate_ids, generation_config, padding_id

    options = answer_decoding({"max_new_tokens": limit})
    config = generation_config(options, stop_ids, pad_id=padding_id(tokenizer, stop_ids))
    found = dict(generate_ids(model, dict(enumerate(prompts)), config, batch_size=options["generation_batch_size"]))
    return [found[number] for number in range(len(prompts))]


def one_by_one(model: Any, tokenizer: Any, prompts: list, stop_ids: list[int], limit: int) -> list[list[int]]:
    """A prompt after another."""
    import torch

    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        how = {"do_sample": False, "eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **how)
        answers.append(found[0, len(prompt) :].tolist())
    return answers


SIDES: dict[str, Callable[..., list[list[int]]]] = {"tunesmith": with_predict, "one_by_one": one_by_one}

if __name__ == "__main__":
    main()
