"""One row of the GPU table in this process: some steps of training on random weights, and a JSON line of figures.

    python -m benchmarks.gpu_side '{"shape": "0.5b", "mode": "full", "side": "tunesmith", "rows": 80}'

`benchmarks.gpu` starts these. Every side of a row trains the same rows in the same steps, so that losses and norms
can be compared. `"side": "probe"` measures the device instead.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_models import make_model, make_rows, needed_flops
from benchmarks.training import LORA, RATES

NOMINAL_TFLOPS = {"H100": 989, "H200": 989}
"""Dense bfloat16 rate of the data sheets."""
DEFAULTS = {
    "mode": "full", "rows": 80, "accumulate": 1, "steps": 40, "untimed": 4, "seconds": 6.0, "options": {},
    "device": "cuda", "dtype": None, "profile": None, "wait": False,
}  # fmt: skip
"""rows: of a whole step. seconds: timed at most. dtype: of the weights; `None`: the side's own. profile: a file."""


def main() -> None:
    """Import, wait for a line on stdin if `wait`, run the row and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", type=json.loads, help=f"JSON; what is left out is as in {json.dumps(DEFAULTS)}")
    row = {**DEFAULTS, **parser.parse_args().row}
    import_what_it_takes(row["side"])
    if row["wait"]:
        sys.stdin.readline()
    try:
        figures = probe(row) if row["side"] == "probe" else run(row)
    except torch.OutOfMemoryError as error:
        figures = {"error": "out of memory", "said": str(error).splitlines()[0][:300]}
    except Exception as error:
        traceback.print_exc()
        figures = {"error": type(error).__name__, "said": str(error)[:600]}
    print(json.dumps(figures), flush=True)


def import_what_it_takes(side: str) -> None:
    """Import what takes seconds before the clock of the row begins."""
    if side == "probe":
        return
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    if side == "tunesmith":
        import tunesmith.train.sft  # noqa: F401
    else:
        import trl.trainer.sft_trainer  # noqa: F401


def run(row: dict[str, Any]) -> dict[str, Any]:
    """Train one row of the table."""
    begin = time.perf_counter()
    dataset = make_rows(row["shape"], row["rows"] * row["steps"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SIDES[row["side"]](row, dataset, folder)
        clock = clock_of(trainer, row)
        ready = time.perf_counter()
        trainer.train()
    return {
        **clock.figures(dataset),
        "peak_memory_gib": peak_memory(row["device"]),
        "choices": getattr(trainer, "choices", None),
        "seconds_to_build": round(ready - begin, 1),
    }


# ---- the sides ---------------------------------------------------------------------------------------------------


def tunesmith_side(row: dict[str, Any], dataset: Any, folder: str) -> Any:
    """Tunesmith with its own defaults, beside what `row["options"]` says."""
    from tunesmith import SFTConfig, SFTTrainer

    model = model_of(row, torch.float32 if row["mode"] == "full" else torch.bfloat16)
    args = SFTConfig(**{**common(row, folder), **row["options"]})
    return SFTTrainer(model, args, train_dataset=dataset, processing_class=tokenizer(), peft_config=adapter(row))


def trl_side(row: dict[str, Any], dataset: Any, folder: str) -> Any:
    """TRL with its own defaults: padded, bfloat16 over float32 weights, gradient checkpointing."""
    return with_trl(row, dataset, folder, torch.float32, {})


def trl_padded_side(row: dict[str, Any], dataset: Any, folder: str) -> Any:
    """TRL without gradient checkpointing, a frozen base in bfloat16, Liger's kernels."""
    return with_trl(row, dataset, folder, tuned_type(row), tuned(row))


def trl_varlen_side(row: dict[str, Any], dataset: Any, folder: str) -> Any:
    """The same, padding-free, with torch's variable-length flash kernel registered as its attention.

    So it has what flash-attn would give it, which cannot be built where nothing can be fetched.
    """
    options = {**tuned(row), "padding_free": True, "max_length": None}
    return with_trl(row, dataset, folder, tuned_type(row), options, attention="torch_varlen")


SIDES: dict[str, Callable[[dict[str, Any], Any, str], Any]] = {
    "tunesmith": tunesmith_side,
    "trl": trl_side,
    "trl_padded": trl_padded_side,
    "trl_varlen": trl_varlen_side,
}


def with_trl(
    row: dict[str, Any], dataset: Any, folder: str, dtype: torch.dtype, options: dict[str, Any], attention: str = ""
) -> Any:
    """TRL's `SFTTrainer`."""
    from transformers import AttentionInterface
    from trl import SFTConfig, SFTTrainer

    model = model_of(row, dtype)
    if attention:
        AttentionInterface.register(attention, varlen_attention)
        model.config._attn_implementation = attention
    args = SFTConfig(**{**common(row, folder), **options, **row["options"]})
    return SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer(), peft_config=adapter(row))


def tuned(row: dict[str, Any]) -> dict[str, Any]:
    """What makes TRL fast, apart from its batches."""
    on_gpu = row["device"] == "cuda"
    return {"gradient_checkpointing": False, "bf16": on_gpu, "use_liger_kernel": on_gpu}


def tuned_type(row: dict[str, Any]) -> torch.dtype:
    """Float32 where weights train, unless they would not fit."""
    return torch.float32 if row["mode"] == "full" else torch.bfloat16


def varlen_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    """Causal attention within `cu_seq_lens_q`; query (1, heads, T, D) → (1, T, heads, D)."""
    from tunesmith.model.attention import looped_documents, varlen

    bounds = given["cu_seq_lens_q"]
    if not query.is_cuda:
        lengths = tuple(bounds.diff().tolist())
        return looped_documents(query, key, value, lengths, given.get("scaling"), 0.0, None), None
    # rotary positions of a model with float32 weights leave queries and keys in float32, also under autocast
    q, k, v = (tensor[0].transpose(0, 1).to(value.dtype) for tensor in (query, key, value))
    return varlen(q, k, v, bounds, int(given["max_length_q"]), given.get("scaling"), None).unsqueeze(0), None


def common(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """Arguments of every trainer."""
    return {
        "output_dir": folder,
        "max_steps": row["steps"],
        "per_device_train_batch_size": row["rows"] // row["accumulate"],
        "gradient_accumulation_steps": row["accumulate"],
        "learning_rate": RATES["full" if row["mode"] == "full" else "lora"],
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "seed": 0,
        "disable_tqdm": True,
        "use_cpu": row["device"] == "cpu",
    }


def model_of(row: dict[str, Any], dtype: torch.dtype) -> Any:
    """The row's model; its own `dtype` counts first, and 4 bits pack bfloat16."""
    four_bits = row["mode"] == "qlora"
    chosen = getattr(torch, row["dtype"]) if row["dtype"] else torch.bfloat16 if four_bits else dtype
    return make_model(row["shape"], row["device"], chosen, four_bits=four_bits)


def adapter(row: dict[str, Any]) -> Any:
    """The peft config of the mode."""
    from peft import LoraConfig

    return None if row["mode"] == "full" else LoraConfig(**LORA)


def tokenizer() -> Any:
    """A tokenizer that trainers can keep; rows are tokens already."""
    from tests.tiny import make_byte_tokenizer

    return make_byte_tokenizer()


# ---- the clock ---------------------------------------------------------------------------------------------------


def clock_of(trainer: Any, row: dict[str, Any]) -> Any:
    """A callback that notes when steps begin and stops after `row["seconds"]`, or after a profile."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Times of the beginnings of steps; logging makes each of them wait for the device."""

        def __init__(self) -> None:
            self.begins: list[float] = []
            self.profile = Profile(row) if row["profile"] else None

        def on_step_begin(self, args, state, control, **kwargs):
            """Note the time."""
            self.begins.append(time.perf_counter())
            if self.profile:
                self.profile.begin_step(len(self.begins) - row["untimed"])

        def on_step_end(self, args, state, control, **kwargs):
            """Stop when it is time; the last step ends when the device has done it."""
            done = len(self.begins)
            if self.profile:
                control.should_training_stop = self.profile.end_step(done - row["untimed"])
            elif done > row["untimed"] + 1 and time.perf_counter() - self.begins[row["untimed"]] > row["seconds"]:
                control.should_training_stop = True
            if control.should_training_stop or state.global_step >= args.max_steps:
                wait_for(row["device"])
                self.begins.append(time.perf_counter())

        def figures(self, dataset: Any) -> dict[str, Any]:
            """Speed over the timed steps or what the profile found, and what was logged of every step."""
            found = self.profile.found if self.profile else speed(row, trainer.model, dataset, self.begins)
            return {**found, **logged(trainer)}

    clock = Clock()
    trainer.add_callback(clock)
    return clock


def speed(row: dict[str, Any], model: Any, dataset: Any, begins: list[float]) -> dict[str, Any]:
    """Real tokens and needed operations per second of the steps after the first few."""
    seconds = [after - before for before, after in pairwise(begins)]
    untimed = min(row["untimed"], len(seconds) - 1)
    timed = dataset[untimed * row["rows"] : len(seconds) * row["rows"]]
    tokens, took = sum(map(len, timed["input_ids"])), sum(seconds[untimed:])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    adapters = None if row["mode"] == "full" else trained
    flops = needed_flops(row["shape"], timed["input_ids"], timed["labels"], adapters)
    return {
        "tokens_per_second": round(tokens / took),
        "tflops": round(flops / took / 1e12, 1),
        "tokens_per_step": round(tokens / (len(seconds) - untimed)),
        "timed_steps": len(seconds) - untimed,
        "seconds": [round(second, 4) for second in seconds],
    }


def logged(trainer: Any) -> dict[str, list[float]]:
    """Loss and gradient norm of every step."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {name: [round(float(entry[name]), 5) for entry in entries] for name in ("loss", "grad_norm")}


def wait_for(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: str) -> float:
    """GiB that tensors took at most; of the whole process on a CPU."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # KiB on Linux


# ---- what the device does ----------------------------------------------------------------------------------------


def probe(row: dict[str, Any], size: int = 8192) -> dict[str, Any]:
    """Its name, the bfloat16 rate of a large product of random numbers, the rate of a large copy."""
    device = row["device"]
    if device == "cpu":
        size = 128
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    copied = torch.randn(size, size, 4, device=device)
    product, copy = best_of(device, lambda: left @ right), best_of(device, copied.clone)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found = {
        "name": name,
        "product_tflops": round(2 * size**3 / product / 1e12, 1),
        "copy_gb_per_second": round(2 * copied.nbytes / copy / 1e9),
        "nominal_tflops": next((rate for chip, rate in NOMINAL_TFLOPS.items() if chip in name), None),
    }
    if device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        found |= {"memory_gib": round(memory / 2**30, 1), "cuda": torch.version.cuda}
    return found


def best_of(device: str, work: Callable[[], Any], times: int = 10) -> float:
    """Seconds of `work`, the median of some after a few that warm up."""
    took = []
    for _ in range(times + 3):
        wait_for(device)
        begin = time.perf_counter()
        work()
        wait_for(device)
        took.append(time.perf_counter() - begin)
    return sorted(took[3:])[times // 2]


class Profile:
    """Two steps under torch's profiler, then one in which every wait of the host for the device is noted."""

    def __init__(self, row: dict[str, Any]):
        self.device, self.path = row["device"], Path(row["profile"])
        self.found: dict[str, Any] = {}
        self.waits: Counter[str] = Counter()

    def begin_step(self, number: int) -> None:
        """Begin with step 1; those before warm up."""
        if number == 1:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
            self.profiler = profile(activities=activities)
            self.profiler.__enter__()
            self.began = time.perf_counter()

    def end_step(self, number: int) -> bool:
        """Write the tables after step 2; true when all is done."""
        if number == 2:
            wait_for(self.device)
            seconds = (time.perf_counter() - self.began) / 2
            self.profiler.__exit__(None, None, None)
            self.write(seconds)
            self.watch_for_waits()
        if number == 3:
            self.stop_watching()
        return number >= 3

    def write(self, seconds: float) -> None:
        """The 25 most expensive kernels and host operations as text."""
        events = self.profiler.key_averages()
        on_device = (event for event in events if event.device_type != torch.autograd.DeviceType.CPU)
        kernels = [event for event in on_device if not event.is_user_annotation]  # a range around kernels is none
        busy = sum(event.self_device_time_total for event in kernels) / 1e6 / 2
        shown = {"row_limit": 25, "max_name_column_width": 90}
        parts = [
            f"seconds of a step, profiled: {seconds:.4f}; of kernels in it: {busy:.4f}; kernels: "
            f"{sum(event.count for event in kernels) // 2}",
            events.table(sort_by="self_cpu_time_total" if self.device == "cpu" else "self_device_time_total", **shown),
            events.table(sort_by="self_cpu_time_total", **shown),
        ]
        self.path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        self.found = {"profiled_step_seconds": round(seconds, 4), "kernel_seconds": round(busy, 4)}

    def watch_for_waits(self) -> None:
        """Let torch warn at each wait, and note the lines that it comes from."""
        if self.device == "cuda":
            warnings.simplefilter("always")
            self.show, warnings.showwarning = warnings.showwarning, self.note
            torch.cuda.set_sync_debug_mode("warn")

    def note(self, message: Any, *_rest: Any, **_more: Any) -> None:
        """One warning: the three innermost lines outside of torch."""
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.waits[" < ".join(f"{Path(one.filename).name}:{one.lineno}" for one in frames[:-4:-1])] += 1

    def stop_watching(self) -> None:
        """Keep what was noted."""
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self.show
        self.found["waits"] = dict(self.waits.most_common(25))


if __name__ == "__main__":
    main()
