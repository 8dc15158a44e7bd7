"""Where the time of a training step goes, levers off and on: figures and a picture.

    python -m benchmarks.step_profile MODEL_FOLDER alpaca_en_demo.json --mode full

Two steps are profiled by torch.profiler, which costs some time itself; each way in its own process. Written are
`benchmarks/results/profile_<mode>.json` and `docs/images/profile_<mode>.png`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.pairs import RESULTS, surroundings, token_rows
from benchmarks.training import RATES, adapter, common, options_of

WAYS = {
    "float32, levers off": {"bf16": False, "compile_layers": False, "share_prefix": False},
    "bfloat16, levers off": {"compile_layers": False, "share_prefix": False},
    "bfloat16, levers on": {"compile_layers": True},
}
OWN_ATTENTION = "ProductAttention"
PARTS = {
    "attention": ("scaled_dot_product", "ScaledDotProduct", OWN_ATTENTION),
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
    "optimizer, gradient norm": ("_fused_adam", "linalg_vector_norm", "_foreach_norm", "Optimizer"),
    "copies and casts": ("aten::copy_", "aten::_to_copy", "aten::cat", "aten::clone"),
    "compiled elementwise": ("CompiledFxGraph",),
    "elementwise": ("aten::",),
}
"""Part of a step → how the names of its events begin or what they contain; the first that fits has it."""
HEAD, REST = "head and loss", "Python, dispatch, the rest"
PICTURES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    """Profile every way, print, save, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--mode", choices=sorted(RATES), default="full")
    parser.add_argument("--steps", type=int, default=5, help="the last two are profiled")
    parser.add_argument("--one", choices=sorted(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(profiled(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        token_rows(options.model, options.data).save_to_disk(folder)
        command = [sys.executable, "-m", "benchmarks.step_profile", options.model, folder, "--mode", options.mode]
        found = {way: run([*command, "--steps", str(options.steps), "--one", way]) for way in WAYS}
    result = {"benchmark": f"profile_{options.mode}", **surroundings(), "ways": found}
    path = RESULTS / f"profile_{options.mode}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for way, one in found.items():
        print(f"{way}: {one['microseconds_per_token']:.0f} µs a token")
        for part, share in one["shares"].items():
            print(f"    {part:28}{share:6.1%}")
    draw(found, PICTURES / f"profile_{options.mode}.png")


def run(command: list[str]) -> dict[str, Any]:
    """The figures of one way, from a process of its own."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def profiled(options: argparse.Namespace) -> dict[str, Any]:
    """Train some steps one way, the last two under the profiler."""
    from tunesmith import allocator

    allocator.tune()
    import datasets
    import torch
    from transformers import TrainerCallback

    from tunesmith import SFTConfig, SFTTrainer

    training = options_of(
        ["tunesmith", options.model, str(options.data), "--mode", options.mode, "--steps", str(options.steps)]
    )
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    tokens = []

    class Watch(TrainerCallback):
        """The profiler on for the last two steps."""

        def on_step_begin(self, args, state, control, **kwargs):
            """Start before the last but one."""
            if state.global_step == options.steps - 2:
                tokens.append(trainer.tokens_seen)
                profiler.start()

        def on_train_end(self, args, state, control, **kwargs):
            """Stop after the last."""
            profiler.stop()
            tokens.append(trainer.tokens_seen)

    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(**common(training, folder), **WAYS[options.one])
        rows = datasets.load_from_disk(str(options.data))
        trainer = SFTTrainer(options.model, args, train_dataset=rows, peft_config=adapter(training))
        trainer.add_callback(Watch())
        trainer.train()
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
    events = profiler.events()
    seconds = sum_parts(((name_of(e), e.input_shapes, e.self_cpu_time_total / 1e6) for e in events), vocabulary)
    total = sum(seconds.values())
    return {
        "shares": {part: round(spent / total, 4) for part, spent in seconds.items()},
        "microseconds_per_token": total * 1e6 / (tokens[1] - tokens[0]),
        "choices": trainer.choices,
    }


def name_of(event: Any) -> str:
    """An event's name, or that of the attention of ours within which it came."""
    outer = event
    while outer is not None:
        if OWN_ATTENTION in outer.name:
            return OWN_ATTENTION
        outer = outer.cpu_parent
    return event.name


def sum_parts(events: Iterable[tuple[str, Any, float]], vocabulary: int) -> dict[str, float]:
    """Seconds of each part from (name, input shapes, seconds); what has the vocabulary's width is the head's."""
    seconds = dict.fromkeys([*PARTS, HEAD, REST], 0.0)
    for name, shapes, spent in events:
        is_head = "Adam" not in name and "norm" not in name and any(vocabulary in shape for shape in shapes or ())
        found = HEAD if is_head else next((part for part, words in PARTS.items() if fits(name, words)), REST)
        seconds[found] += spent
    return seconds


def fits(name: str, words: Iterable[str]) -> bool:
    """Whether an event's name has one of these in it."""
    return any(word in name for word in words)


def draw(found: dict[str, Any], path: Path) -> None:
    """A bar for each way, its parts in microseconds a token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 3.2), layout="constrained")
    colors = ("#1f4e79", "#d1495b", "#66a182", "#8d96a3", "#edae49", "#f3d9a4", "#00798c", "#dddddd")
    left = dict.fromkeys(found, 0.0)
    for part, color in zip([*PARTS, HEAD, REST], colors):
        widths = [one["shares"][part] * one["microseconds_per_token"] for one in found.values()]
        axes.barh(list(found), widths, left=list(left.values()), color=color, label=part)
        left = {way: begin + width for (way, begin), width in zip(left.items(), widths)}
    axes.invert_yaxis()
    axes.set_xlabel("microseconds per real token, two cores")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
