"""One run, top to bottom: recipe → data → model → train → evaluate → compare → save; a function for each command."""

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from rich.console import Console
from torch import nn

from tunesmith import __version__
from tunesmith.config import TrainingFields
from tunesmith.data.load import load_rows, split_rows
from tunesmith.data.normalize import Example, find_overlap
from tunesmith.data.pack import length_before_packing
from tunesmith.data.prepare import encode_examples, read_examples
from tunesmith.data.report import Report, preview
from tunesmith.data.templates import use_template
from tunesmith.deliver.chat import chat as talk
from tunesmith.deliver.merge import merge
from tunesmith.errors import CheckpointError, ConfigError
from tunesmith.evaluate.metrics import METRICS
from tunesmith.evaluate.predict import before_after_table, comparisons
from tunesmith.evaluate.predict import predict as answer
from tunesmith.lookup import lookup
from tunesmith.model.adapt import adapt
from tunesmith.model.capabilities import bf16_is_faster
from tunesmith.model.load import adapter_base, load_any, load_tokenizer, model_max_length
from tunesmith.model.quantize import is_quantized, quantization_options
from tunesmith.recipe import Recipe, load_recipe, resolved
from tunesmith.runs import Run, prepare_output_dir
from tunesmith.train.callbacks import ProgressCallback, RunLogCallback, SampleCallback, use_progress
from tunesmith.train.curves import plot_curves
from tunesmith.train.options import SFTConfig
from tunesmith.train.processing import changed
from tunesmith.train.sft import SFTTrainer

SHOWN_COMPARISONS = 5
DEFAULT_SEED = 42

STAGES = {"sft": (SFTTrainer, SFTConfig)}


class Prepared(NamedTuple):
    """The data of a run, tokenized, with its reports; evaluation parts are `None` without evaluation data."""

    train: datasets.Dataset
    report: Report
    evaluation: datasets.Dataset | None = None
    evaluation_report: Report | None = None
    evaluation_examples: Sequence[Example] = ()


def run(recipe: Any = None, **overrides: Any) -> dict[str, float]:
    """Train what a recipe says: `run("recipe.yaml", learning_rate=1e-4)`, as `tunesmith train` does.

    Args:
        recipe: path of a recipe, or a dict of options, or a `Recipe`.
        overrides: options that win over the recipe's.

    Returns: figures of the run, as in `all_results.json`.
    """
    return train(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides))


# ---- train -------------------------------------------------------------------------------------------------------


def train(recipe: Recipe) -> dict[str, float]:
    """Run the whole recipe; everything a person may want to see lies in `output_dir` afterwards."""
    console = Console()
    output_dir = recipe.training.get("output_dir") or TrainingFields.output_dir
    folder = open_run(output_dir, recipe)
    with recorded(folder):
        folder.save_recipe(resolved(recipe))
        tokenizer = tokenizer_of(recipe)
        data = prepare_data(recipe, tokenizer)
        folder.save_json("data_report.json", report_json(data))
        show_data(data, tokenizer, console)
        said: list[str] = []
        model = trainable_model(recipe, tokenizer, said.append)
        trainer = build_trainer(recipe, model, tokenizer, data, folder, console, said)
        before = compare(recipe, trainer, data, folder, "before", console)
        metrics = trainer.train(resume_from_checkpoint=recipe.training.get("resume_from_checkpoint")).metrics
        trainer.save_model()
        after = compare(recipe, trainer, data, folder, "after", console)
        metrics |= trainer.evaluate() if data.evaluation is not None and recipe.training.get("do_eval", True) else {}
        metrics = finish(recipe, trainer, folder, metrics | after)
        if recipe.run.do_merge:
            merge(folder.path, folder.path / "merged")
        show_results(recipe, folder, data, tokenizer, metrics, before, after, console)
    return metrics


def open_run(output_dir: str, recipe: Recipe) -> Run:
    """The run directory: a new one, or the one that the checkpoint to resume from lies in.

    Raises: CheckpointError where there is no such checkpoint; ConfigError for a folder that is in the way.
    """
    checkpoint = recipe.training.get("resume_from_checkpoint")
    if checkpoint is not None:
        if not (Path(checkpoint) / "trainer_state.json").is_file():
            raise CheckpointError(
                f"resume_from_checkpoint: {checkpoint} holds no trainer_state.json, so it is no checkpoint. "
                "Name a folder like runs/mine/checkpoint-100."
            )
        if Path(output_dir).resolve() in Path(checkpoint).resolve().parents:
            return Run(output_dir)
    return Run(prepare_output_dir(output_dir, recipe.run.overwrite_output_dir))


def tokenizer_of(recipe: Recipe) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer that the recipe's model brings, with the recipe's template."""
    if recipe.model.model_name_or_path is None:
        raise ConfigError("model_name_or_path is missing. Name a model folder or a Hub id.")
    tokenizer = load_tokenizer(
        recipe.model.model_name_or_path, gguf_file=recipe.model.gguf_file, **hub_options(recipe)
    )
    asked = {key: recipe.training[key] for key in ("eos_token", "pad_token") if recipe.training.get(key)}
    if recipe.training.get("chat_template"):
        tokenizer = use_template(changed(tokenizer, asked), recipe.training["chat_template"])
    return changed(tokenizer, asked)


def hub_options(recipe: Recipe) -> dict[str, Any]:
    """What `from_pretrained` must know about where a model comes from."""
    return {"revision": recipe.model.model_revision, "trust_remote_code": recipe.model.trust_remote_code}


def prepare_data(recipe: Recipe, tokenizer: Any, *, check: bool = True) -> Prepared:
    """Load, split, render and tokenize; raises DataError when nothing, or suspiciously little, would be trained."""
    options, report = recipe.data, Report()
    rows = load_source(recipe, options.dataset, report)
    held_out, held_out_report = [], Report()
    if options.eval_dataset:
        held_out = load_source(recipe, options.eval_dataset, held_out_report)
    elif options.val_size:
        rows, held_out = split_rows(rows, options.val_size, recipe.training.get("seed", DEFAULT_SEED))
        report.read -= len(held_out)
        held_out_report.read = len(held_out)
    examples = examples_of(recipe, rows, report)
    dataset = encode(recipe, examples, tokenizer, report)
    if check:
        report.check(options.max_drop_ratio)
    if not held_out:
        return Prepared(dataset, report)
    held_out_examples = examples_of(recipe, held_out, held_out_report)
    if overlap := find_overlap(examples, held_out_examples):
        held_out_report.note(
            f"{overlap} of {len(held_out_examples)} held-out examples also stand in the training data"
        )
    held_out_dataset = encode(recipe, held_out_examples, tokenizer, held_out_report)
    if check:
        held_out_report.check(options.max_drop_ratio)
    return Prepared(dataset, report, held_out_dataset, held_out_report, held_out_examples)


def load_source(recipe: Recipe, source: str | list[str], report: Report) -> list:
    """Rows of one or several files, folders or Hub datasets."""
    options = recipe.data
    return load_rows(
        source, split=options.split, max_samples=options.max_samples, on_bad_row=options.on_bad_row, report=report
    )


def examples_of(recipe: Recipe, rows: list, report: Report) -> list[Example]:
    """Rows in the recipe's format."""
    options, text_field = recipe.data, recipe.training.get("dataset_text_field", "text")
    columns = options.columns or ({"text": text_field} if text_field != "text" else None)
    return read_examples(
        rows,
        report,
        format=options.format,
        columns=columns,
        system_prompt=options.system_prompt,
        on_bad_row=options.on_bad_row,
    )


def encode(recipe: Recipe, examples: Sequence[Example], tokenizer: Any, report: Report) -> datasets.Dataset:
    """Examples as tokens, the way the recipe says."""

    def option(name: str) -> Any:
        return recipe.training.get(name, getattr(TrainingFields, name))

    max_length = option("max_length")
    if max_length is None and recipe.model.gguf_file is None:
        max_length = model_max_length(recipe.model.model_name_or_path, **hub_options(recipe))
    if option("packing") and max_length is not None:
        max_length = length_before_packing(max_length, option("packing_strategy"), option("too_long"))
    return encode_examples(
        examples,
        tokenizer,
        report,
        batch_size=option("dataset_batch_size"),
        num_proc=option("dataset_num_proc"),
        train_on=option("train_on"),
        too_long=option("too_long"),
        append_eos=option("append_eos"),
        chat_template_kwargs=option("chat_template_kwargs"),
        max_length=max_length,
        on_bad_row=recipe.data.on_bad_row,
    )


def trainable_model(recipe: Recipe, tokenizer: Any, say: Callable[[str], None]) -> nn.Module:
    """The base model with what the recipe trains of it; an adapter folder's adapter goes on training."""
    options = recipe.model
    transformers.set_seed(recipe.training.get("seed", DEFAULT_SEED))  # before adapters draw their first weights
    model = load_any(
        options.model_name_or_path,
        trainable_adapter=True,
        dtype=weight_dtype(recipe),
        attn_implementation=options.attn_implementation,
        gguf_file=options.gguf_file,
        **quantization_options(options, use_cpu=bool(recipe.training.get("use_cpu"))),
        **hub_options(recipe),
    )
    if adapter_base(options.model_name_or_path) is not None:
        if options.adapter != "lora":
            raise ConfigError(f"adapter: {options.model_name_or_path} is a LoRA adapter, which only goes on as lora.")
        return model
    return adapt(model, options, tokenizer, say)


def weight_dtype(recipe: Recipe) -> str:
    """float32, unless a frozen base may stay in the half precision it was saved in, which halves a GPU's memory."""
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    on_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu")
    return "auto" if on_gpu and recipe.model.adapter == "lora" else "float32"


def build_trainer(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    data: Prepared,
    folder: Run,
    console: Console,
    said: Sequence[str] = (),
) -> SFTTrainer:
    """The stage's trainer, with the run directory and the progress display listening."""
    trainer_class, config_class = STAGES[recipe.run.stage]
    # transformers takes disable_tqdm from its log level, which the command line lowers
    defaults = {"output_dir": str(folder.path), "seed": DEFAULT_SEED, "disable_tqdm": False}
    try:
        args = config_class(**{**defaults, **recipe.training})
    except ConfigError:
        raise
    except ValueError as error:  # transformers checks combinations of its own
        raise ConfigError(f"the training options contradict each other: {error}") from error
    trainer = trainer_class(
        model, args, train_dataset=data.train, eval_dataset=data.evaluation, processing_class=tokenizer
    )
    for line in (*said, *trainer.choices):
        folder.event("choice", line)
        console.out(line, highlight=False)
    use_progress(trainer, ProgressCallback(lambda: trainer.tokens_seen, console))
    trainer.add_callback(RunLogCallback(folder, lambda: trainer.tokens_seen))
    if recipe.run.sample_rows and data.evaluation_examples:
        few = data.evaluation_examples[: recipe.run.sample_rows]
        trainer.add_callback(SampleCallback(folder, few, tokenizer, recipe.decoding))
    return trainer


def compare(
    recipe: Recipe, trainer: SFTTrainer, data: Prepared, folder: Run, when: str, console: Console
) -> dict[str, float]:
    """Answer the compared rows and score them; the answers go to `predictions_before.jsonl` and `..._after.jsonl`."""
    examples = data.evaluation_examples[: recipe.run.compare_rows]
    if not examples:
        return {}
    console.out(f"answering {len(examples)} held-out prompts {when} training", highlight=False)
    path = folder.path / f"predictions_{when}.jsonl"
    found = answered(recipe, trainer.model, trainer.processing_class, examples, path, console)
    return {key: value for key, value in found.items() if not key.startswith("predict_")}


def answered(
    recipe: Recipe, model: nn.Module, tokenizer: Any, examples: Sequence[Example], path: Path, console: Console
) -> dict[str, float]:
    """Answer the examples into a file, with a count on a terminal; returns the figures."""
    with console.status(f"answering {len(examples)} prompts") as status:
        return answer(
            model,
            tokenizer,
            examples,
            path,
            decoding=recipe.decoding,
            metric=recipe.run.metrics or "exact_match",
            progress=lambda done, total: status.update(f"answered {done} of {total} prompts"),
        )


def finish(recipe: Recipe, trainer: SFTTrainer, folder: Run, metrics: dict[str, Any]) -> dict[str, float]:
    """Write figures, state and curve."""
    metrics |= {"train_tokens": trainer.tokens_seen}
    trainer.save_state()
    folder.save_json("all_results.json", metrics)
    if recipe.run.plot_loss:
        plot_curves(trainer.state.log_history, folder.path, title=f"Loss of {folder.path.name}")
    return metrics


def show_results(
    recipe: Recipe,
    folder: Run,
    data: Prepared,
    tokenizer: Any,
    metrics: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
    console: Console,
) -> None:
    """The end of the output: what changed, where everything lies, what to type next."""
    if after:
        answers = (folder.path / f"predictions_{when}.jsonl" for when in ("before", "after"))
        shown = comparisons(data.evaluation_examples, tokenizer, *answers, limit=SHOWN_COMPARISONS)
        compared = min(recipe.run.compare_rows, len(data.evaluation_examples))
        console.out(f"{compared} held-out prompts answered before and after training, {len(shown)} of them:")
        before_after_table(shown, console, before, after)
    speed = metrics["train_tokens"] / max(metrics["train_runtime"], 1e-9)
    what = "adapter" if recipe.model.adapter == "lora" else "model"
    lines = [
        f"trained in {clock(metrics['train_runtime'])}: {metrics['train_tokens']:,} tokens, {speed:,.0f} tokens/s"
    ]
    if "eval_loss" in metrics:
        accuracy = metrics["eval_mean_token_accuracy"]
        lines.append(f"held-out loss {metrics['eval_loss']:.3f}, token accuracy {accuracy:.1%}")
    lines.append(f"{what + ':':12}{folder.path}")
    if recipe.run.plot_loss:
        lines.append(f"{'loss curve:':12}{folder.path / 'training_loss.png'}")
    lines.append(f"{'log:':12}{folder.path / 'metrics.jsonl'}")
    lines.append(f"{'next:':12}{own_command()} chat {folder.path}")
    for line in lines:
        console.out(line, highlight=False)


def own_command() -> str:
    """What to type for this program here: its name, or its path where the shell would not find the name."""
    called = Path(sys.argv[0])
    if called.name != "tunesmith":
        return "python -m tunesmith"
    return "tunesmith" if shutil.which("tunesmith") else os.path.relpath(called)


def clock(seconds: float) -> str:
    """1:05 for 65 seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextlib.contextmanager
def recorded(folder: Run) -> Iterator[None]:
    """Keep `status.json` true: preparing now, completed at the end, or interrupted or failed and why."""
    folder.write_status("preparing")
    try:
        yield
    except KeyboardInterrupt:
        folder.write_status("interrupted", "Ctrl-C")
        raise
    except BaseException as error:
        folder.write_status("failed", f"{type(error).__name__}: {error}")
        raise
    folder.write_status("completed")


# ---- look, score, answer, talk -----------------------------------------------------------------------------------


def check(recipe: Recipe, rows: int = 3) -> Prepared:
    """Show what would be trained: rows kept, changed and dropped, lengths, and real rows, trained tokens marked."""
    console = Console()
    tokenizer = tokenizer_of(recipe)
    data = prepare_data(recipe, tokenizer, check=False)
    show_data(data, tokenizer, console, rows)
    data.report.check(recipe.data.max_drop_ratio)
    if data.evaluation_report is not None:
        data.evaluation_report.check(recipe.data.max_drop_ratio)
    return data


def show_data(data: Prepared, tokenizer: Any, console: Console, rows: int = 0) -> None:
    """The report of each set, and a preview of the first rows."""
    data.report.table(console)
    if data.evaluation_report is not None:
        console.out("held out:", highlight=False)
        data.evaluation_report.table(console)
    if rows:
        preview(list(data.train.select(range(min(rows, len(data.train))))), tokenizer, console, rows=rows)


def report_json(data: Prepared) -> dict[str, Any]:
    """The reports as data."""
    held_out = data.evaluation_report.to_json() if data.evaluation_report is not None else None
    return {"train": data.report.to_json(), "evaluation": held_out}


def evaluate(recipe: Recipe) -> dict[str, float]:
    """Loss, perplexity and token accuracy of a model on `eval_dataset`, per trained token."""
    console = Console()
    examples, tokenizer = held_out_examples(recipe)
    report = Report()
    report.read = len(examples)
    dataset = encode(recipe, examples, tokenizer, report)
    report.check(recipe.data.max_drop_ratio)
    report.table(console)
    model = usable_model(recipe)
    given = {key: recipe.training[key] for key in ("bf16", "use_cpu", "padding_free") if key in recipe.training}
    size = recipe.training.get("per_device_eval_batch_size", 8)
    with tempfile.TemporaryDirectory() as folder:  # the trainer makes its output folder whether it writes or not
        args = SFTConfig(output_dir=folder, save_strategy="no", per_device_eval_batch_size=size, **given)
        metrics = SFTTrainer(model, args, eval_dataset=dataset, processing_class=tokenizer).evaluate()
    for name in ("loss", "perplexity", "mean_token_accuracy"):
        console.out(f"{name.replace('_', ' '):16}{metrics[f'eval_{name}']:.4f}", highlight=False)
    return metrics


def predict(recipe: Recipe, output: Path = Path("generated_predictions.jsonl")) -> dict[str, float]:
    """Answer every prompt of `eval_dataset` into a JSON-lines file and score the answers."""
    console = Console()
    examples, tokenizer = held_out_examples(recipe)
    lookup(METRICS, recipe.run.metrics or "exact_match", "metric")  # before the model loads
    model = usable_model(recipe)
    metrics = answered(recipe, model, tokenizer, examples, output, console)
    for name, value in metrics.items():
        console.out(f"{name.replace('_', ' '):20}{value:.2f}", highlight=False)
    console.out(f"{'answers':20}{output}", highlight=False)
    return metrics


def chat(recipe: Recipe, system: str | None = None) -> None:
    """Talk to a model in the terminal."""
    tokenizer = tokenizer_of(recipe)
    talk(
        usable_model(recipe),
        tokenizer,
        system=system or recipe.data.system_prompt,
        decoding=recipe.decoding,
        console=Console(),
    )


def held_out_examples(recipe: Recipe) -> tuple[list[Example], Any]:
    """The examples of `eval_dataset`, or of `dataset` where only that is given, and the tokenizer."""
    tokenizer = tokenizer_of(recipe)
    report = Report()
    source = recipe.data.eval_dataset or recipe.data.dataset
    if not source:
        raise ConfigError("eval_dataset is missing. Name the file with the held-out examples: --eval_dataset FILE.")
    return examples_of(recipe, load_source(recipe, source, report), report), tokenizer


def usable_model(recipe: Recipe) -> nn.Module:
    """The model for inference, on the fastest device, in the checkpoint's own precision where the device has it."""
    options = recipe.model
    on_gpu = torch.cuda.is_available() and not recipe.training.get("use_cpu")
    dtype = options.dtype if options.dtype != "auto" else "auto" if on_gpu else "float32"
    model = load_any(
        options.model_name_or_path,
        dtype=dtype,
        attn_implementation=options.attn_implementation,
        gguf_file=options.gguf_file,
        **quantization_options(options, use_cpu=not on_gpu),
        **hub_options(recipe),
    )
    return model.eval() if is_quantized(model) else model.to("cuda" if on_gpu else "cpu").eval()


def env() -> dict[str, str]:
    """Versions, device and what was found fast here, for a bug report; no paths, no names."""
    from importlib import metadata

    names = ("torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    fast = bf16_is_faster(device)
    return {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "tunesmith": __version__,
        **{name: metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads used by torch",
        "precision": f"{'bfloat16' if fast else 'float32'} products are the faster here "
        f"(probed in {time.perf_counter() - begin:.2f} s)",
        "command": Path(sys.argv[0]).name,
    }
