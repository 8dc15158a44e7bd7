"""One run, top to bottom: recipe → data → model → train → evaluate → predict → plot; a function for each command."""

import contextlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tunesmith import __version__
from tunesmith.config import TrainingFields
from tunesmith.deliver.merge import merge
from tunesmith.deliver.summary import show_answers, show_reports, show_results
from tunesmith.errors import ConfigError
from tunesmith.evaluate.predict import comparisons, prefixed
from tunesmith.lock import locked
from tunesmith.model.capabilities import bf16_is_faster
from tunesmith.model.compiled import compiler
from tunesmith.model.load import lacks_weights
from tunesmith.model.saved import save_arguments
from tunesmith.ranks import first_decides, is_first_process, join_processes
from tunesmith.recipe import Recipe, load_recipe, phases
from tunesmith.resume import Beginning, begin, is_complete, repeatable
from tunesmith.runs import (
    COMPARED_FILES,
    DATA_REPORT_FILE,
    PREDICTIONS_FILE,
    STATUS_FILE,
    Run,
    as_saved,
    shared_output_dir,
    to_json,
    write_text,
)
from tunesmith.signals import Terminated, heeded
from tunesmith.steps.answers import answered, check_prompts, written_metric
from tunesmith.steps.data import (
    Prepared,
    after_stream,
    check_data,
    evaluation_notes,
    first_of_stream,
    note_tails,
    prepare_data,
    report_json,
    show_data,
    taken_over,
)
from tunesmith.steps.figures import training_figures
from tunesmith.steps.memory import memory_json, show_memory
from tunesmith.steps.model import tokenizer_of, trainable_model, usable_model
from tunesmith.steps.options import (
    STAGES,
    check_installed,
    check_warmup,
    decoding,
    evaluation_arguments,
    only,
    saved_options,
    trainer_arguments,
    uses_cpu,
)
from tunesmith.steps.overwrite import look_before_deleting
from tunesmith.train.callbacks import ProgressCallback, RunLogCallback, SampleCallback, Work, use_progress
from tunesmith.train.choose import IN_CHOSEN_LINE
from tunesmith.train.curves import plot_curves
from tunesmith.train.reward import RewardTrainer
from tunesmith.train.sft import SFTTrainer

SHOWN_COMPARISONS = 5


def run(recipe: Any = None, **overrides: Any) -> dict[str, float]:
    """Do what a recipe says: `run("recipe.yaml", learning_rate=1e-4)`, as `tunesmith train` does.

    Args:
        recipe: path of a recipe, or a dict of options, or a `Recipe`.
        overrides: options that win over the recipe's.

    Returns: figures of the run, as in `all_results.json`.
    """
    return train(recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides))


# ---- the run -----------------------------------------------------------------------------------------------------


def train(recipe: Recipe) -> dict[str, float]:
    """Train, evaluate, predict: the phases that the recipe names; `output_dir` holds everything afterwards."""
    console = own_console(recipe)
    with heeded(is_own_process=is_command()), only_writer(recipe):
        folder, found, complete = open_run(recipe)
        checkpoint = found.checkpoint
        if complete:
            console.out(f"{folder.path} is complete: {checkpoint.name} is after its last step. Nothing was done.")
            return folder.results()
        with recorded(folder) if phases(recipe).train else beside_a_run(folder):
            return run_phases(recipe, folder, found, console)


def run_phases(recipe: Recipe, folder: Run, found: Beginning, console: Console) -> dict[str, float]:
    """The phases of a recipe, in a folder that is this process's alone."""
    todo, checkpoint = phases(recipe), found.checkpoint
    if todo.train and checkpoint is None:
        folder.save_recipe(repeatable(saved_options(recipe)))
    going_on = [f"resume: going on from {checkpoint}"] if checkpoint is not None else []
    tell([*recipe.notes, *found.skipped, *going_on], folder, console)
    check_installed(recipe)
    tokenizer = tokenizer_of(recipe, lambda line: tell([line], folder, console))
    data = prepare_data(recipe, tokenizer)
    folder.save_json(DATA_REPORT_FILE, report_json(data))
    check_data(recipe, data)
    show_data(data, tokenizer, console)
    metric = written_metric(recipe, data)
    trainer = build_trainer(recipe, tokenizer, data, metric, folder, console, checkpoint)
    if todo.train:
        if checkpoint is not None:
            tell(trainer.compare_terms(checkpoint), folder, console)
            folder.save_recipe(repeatable(saved_options(recipe)))  # once it is sure that the run is this recipe's
        run_training(recipe, trainer, data, metric, folder, checkpoint, console)
    if todo.evaluate and data.evaluation:
        folder.save_results("eval", trainer.evaluate())
    if todo.predict:
        folder.save_results("predict", run_prediction(recipe, trainer, data, metric, folder, console))
    return finish(recipe, data, folder, console)


def is_command() -> bool:
    """Whether the command line runs this, and not a program or notebook of a person's own."""
    return Path(sys.argv[0]).stem in ("tunesmith", "__main__")


@contextlib.contextmanager
def only_writer(recipe: Recipe) -> Iterator[None]:
    """Nobody else writes the run directory inside. Raises: ConfigError where somebody does already."""
    output_dir = recipe.training.get("output_dir") or TrainingFields.output_dir
    alone = locked(output_dir) if phases(recipe).train and is_first_process() else contextlib.nullcontext()
    with alone:
        yield


def own_console(recipe: Recipe, as_json: bool = False) -> Console:
    """Where to print: nowhere on all processes but the first, which have met then; JSON has stdout to itself."""
    join_processes(uses_cpu(recipe))
    return Console(quiet=not is_first_process(), stderr=as_json)


def open_run(recipe: Recipe) -> tuple[Run, Beginning, bool]:
    """The run directory, where training goes on from, and whether all has been done already.

    Evaluation and prediction alone put their files beside what the folder holds.
    """
    output_dir = recipe.training.get("output_dir") or TrainingFields.output_dir
    if not phases(recipe).train:
        folder = shared_output_dir(output_dir)
        return Run(folder, writes=is_first_process()), Beginning(folder), False
    found, complete = first_decides(lambda: beginning(recipe, output_dir))
    folder = Run(found.folder, writes=is_first_process())
    if found.checkpoint is None:
        folder.forget_results()
    return folder, found, complete


def beginning(recipe: Recipe, output_dir: str) -> tuple[Beginning, bool]:
    """Where the run begins, and whether it is complete."""
    if recipe.run.overwrite_output_dir:
        look_before_deleting(recipe, Path(output_dir).expanduser())
    found = begin(
        output_dir,
        overwrite=recipe.run.overwrite_output_dir,
        resume_from_checkpoint=recipe.training.get("resume_from_checkpoint"),
    )
    return found, is_complete(found, saved_options(recipe))


def run_training(
    recipe: Recipe, trainer: Any, data: Prepared, metric: Any, folder: Run, checkpoint: Path | None, console: Console
) -> None:
    """Train and save the model, with the compared answers from before and after."""
    check_warmup(recipe, trainer)
    if recipe.run.stage == "sft" and (phases(recipe).predict or trainer.args.predict_with_generate):
        check_prompts(recipe, trainer.model, trainer.processing_class, data.held_out)
    before = compare(recipe, trainer, data, metric, folder, "before", console)
    output = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    figures = training_figures(trainer, output.metrics)
    trainer.save_trained()
    trainer.save_state()
    if is_first_process():
        save_arguments(folder.path, recipe.model, trainer.model)
        trainer.create_model_card()
    if recipe.data.streaming:
        folder.save_json(DATA_REPORT_FILE, report_json(after_stream(data, trainer.reports.get("train_dataset"))))
    after = compare(recipe, trainer, data, metric, folder, "after", console)
    folder.save_results("train", figures | after)
    if recipe.run.plot_loss and is_first_process():
        title = f"Loss of {folder.path.name}"
        plot_curves(trainer.state.log_history, folder.path, title, STAGES[recipe.run.stage].unit)
    if after:
        answers = (folder.path / name for name in COMPARED_FILES.values())
        shown = comparisons(
            data.held_out,
            trainer.processing_class,
            *answers,
            chat_template_kwargs=recipe.training.get("chat_template_kwargs"),
            limit=SHOWN_COMPARISONS,
        )
        show_answers(shown, min(recipe.run.compare_rows, len(data.held_out)), before, after, console)


def run_prediction(
    recipe: Recipe, trainer: Any, data: Prepared, metric: Any, folder: Run, console: Console
) -> dict[str, float]:
    """Answer every held-out prompt, or score every held-out pair, into `generated_predictions.jsonl`."""
    if recipe.run.stage == "rm":
        result = trainer.predict(data.held_out_pairs, metric_key_prefix="predict")
        trainer.save_predictions(result)
        return result.metrics
    path, tokenizer = folder.path / PREDICTIONS_FILE, trainer.processing_class
    found = answered(recipe, trainer.model, tokenizer, data.held_out, path, metric, console)
    return prefixed(found, "predict")


def compare(
    recipe: Recipe, trainer: Any, data: Prepared, metric: Any, folder: Run, when: str, console: Console
) -> dict[str, float]:
    """Answer the compared rows and score them; the answers go to `predictions_before.jsonl` and `..._after.jsonl`."""
    examples = data.held_out[: recipe.run.compare_rows]
    if not examples:
        return {}
    console.out(f"answering {len(examples)} held-out prompts {when} training", highlight=False)
    path = folder.path / COMPARED_FILES[when]
    found = answered(recipe, trainer.model, trainer.processing_class, examples, path, metric, console)
    return {key: value for key, value in found.items() if not key.startswith("predict_")}


def finish(recipe: Recipe, data: Prepared, folder: Run, console: Console) -> dict[str, float]:
    """Merge where that is asked for, say what came out, and return the figures."""
    todo, figures = phases(recipe), first_decides(folder.results)  # the others may find the file not yet written
    if recipe.run.do_merge and todo.train and is_first_process():
        merge(folder.path, folder.path / "merged")
    kind = "adapter" if recipe.model.adapter == "lora" else "model"
    show_results(folder.path, figures, todo, list(data.evaluation_examples), kind, console)
    return figures


@contextlib.contextmanager
def recorded(folder: Run) -> Iterator[None]:
    """Keep `status.json` true: preparing now, completed at the end, or interrupted or failed and why."""
    folder.write_status("preparing")
    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            folder.write_status("interrupted", "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else str(stop))
        raise
    except BaseException as error:
        with contextlib.suppress(OSError):
            folder.write_status("failed", f"{type(error).__name__}: {error}")
        raise
    folder.write_status("completed")


@contextlib.contextmanager
def beside_a_run(folder: Run) -> Iterator[None]:
    """Where nothing is trained: a status that stands in the folder is that of the run which was, and comes back."""
    path = folder.path / STATUS_FILE
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    try:
        with recorded(folder):
            yield
    finally:
        if before is not None and folder.writes:
            write_text(path, before)


def tell(lines: Sequence[str], folder: Run | None, console: Console) -> None:
    """Print lines, and keep them among the run's events."""
    for line in lines:
        if folder is not None:
            folder.event("choice", line)
        console.out(line, highlight=False)


def tell_of_hang(folder: Run, sentence: str) -> None:
    """Say why the process is about to end itself; called by a thread of its own."""
    folder.event("error", sentence)
    folder.write_status("failed", sentence)
    Console(stderr=True).out(sentence, highlight=False)


def tell_choices(trainer: Any, folder: Run, console: Console) -> None:
    """Print what the trainer chose in one line, and whatever else it found; all its lines are the run's events."""
    for line in trainer.choices:
        folder.event("choice", line)
    line = trainer.chosen_line()
    if line is not None:
        folder.event("choice", line)
        console.out(line, highlight=False)
    for other in trainer.choices:
        if line is None or not other.startswith(IN_CHOSEN_LINE):
            console.out(other, highlight=False)


# ---- the trainer ---------------------------------------------------------------------------------------------------


def build_trainer(
    recipe: Recipe,
    tokenizer: Any,
    data: Prepared,
    metric: Any,
    folder: Run,
    console: Console,
    checkpoint: Path | None = None,
) -> SFTTrainer | RewardTrainer:
    """The stage's trainer around the model, with the run directory and the progress display listening."""
    stage, said = STAGES[recipe.run.stage], []
    args = trainer_arguments(recipe, folder, checkpoint)
    model = trainable_model(recipe, tokenizer, said.append) if phases(recipe).train else None
    if model is None:
        model = usable_model(recipe, tokenizer, said.append)
    elif is_first_process():
        save_arguments(folder.path, recipe.model, model)
    trainer = stage.trainer(
        model, args, train_dataset=data.train, eval_dataset=data.evaluation_sets, processing_class=tokenizer
    )
    trainer.verified = checkpoint
    trainer.tell_of_hang = lambda sentence: tell_of_hang(folder, sentence)
    folder.save_json("training_args.json", trainer.args.to_dict())
    add_notes(trainer, data, folder, said)
    tell(said, folder, console)
    tell_choices(trainer, folder, console)
    if args.predict_with_generate:
        trainer.decoding, trainer.text_metric = recipe.decoding, metric
    work = work_of(trainer) if phases(recipe).train else None
    use_progress(trainer, ProgressCallback(lambda: all_tokens(trainer), console, work=work))
    trainer.add_callback(RunLogCallback(folder, lambda: all_tokens(trainer), work))
    if recipe.run.sample_rows and data.held_out:
        few = data.held_out[: recipe.run.sample_rows]
        kwargs = recipe.training.get("chat_template_kwargs")
        trainer.add_callback(SampleCallback(folder, few, tokenizer, decoding(recipe), chat_template_kwargs=kwargs))
    return trainer


def all_tokens(trainer: Any) -> int:
    """About how many tokens all processes have trained on, for the speed: to ask the others would hold them up."""
    return trainer.tokens_seen * trainer.args.world_size


def work_of(trainer: Any) -> Work | None:
    """The arithmetic of this process's training; `None` where its device's peak cannot be measured."""
    peak = trainer.peak_flops
    return None if peak is None else Work(lambda: trainer.flops_seen, peak)


def add_notes(trainer: Any, data: Prepared, folder: Run, said: list[str]) -> None:
    """Take over what only the trainer found out about the rows, such as the tail that packing leaves out."""
    if hasattr(data.train, "select"):
        said += taken_over(trainer, "train_dataset", data.report, "data")
    said += evaluation_notes(trainer, data)
    folder.save_json(DATA_REPORT_FILE, report_json(data))


# ---- look, score, answer, talk -----------------------------------------------------------------------------------


def check(recipe: Recipe, rows: int = 3, *, as_json: bool = False) -> Prepared:
    """Show what would be trained: rows kept, changed and dropped, lengths, real rows with trained tokens marked, and
    the memory that a step is estimated to take.

    As JSON: the options as `recipe.yaml` of the run will hold them, what `data_report.json` will, and the memory.
    """
    console = own_console(recipe, as_json)
    tell(recipe.notes, None, console)
    tokenizer = tokenizer_of(recipe)
    check_installed(recipe)
    if lacks_weights(name := str(recipe.model.model_name_or_path)):
        tell([f"{name} holds no weights: enough for this report, not for training"], None, console)
    data = prepare_data(recipe, tokenizer)
    stream = data.train
    if recipe.data.streaming and stream is not None:
        data = first_of_stream(recipe, tokenizer, data)
    note_tails(recipe, data)
    show_data(data, tokenizer, console, rows)
    check_data(recipe, data)
    memory = memory_json(recipe, stream) if phases(recipe).train else None
    if memory is not None:
        show_memory(memory, console)
    if as_json:
        found = {"recipe": as_saved(repeatable(saved_options(recipe))), "data": report_json(data), "memory": memory}
        print_json(found)
    return data


def print_json(value: dict[str, Any]) -> None:
    """Write one JSON object to stdout, on the first process."""
    Console(quiet=not is_first_process()).out(to_json(value, indent=2), highlight=False)


def evaluate(recipe: Recipe, *, as_json: bool = False) -> dict[str, float]:
    """Loss, perplexity and token accuracy of a model on held-out examples, per trained token."""
    console = own_console(recipe, as_json)
    with evaluating(only(recipe, do_eval=True), console) as (trainer, _):
        metrics = trainer.evaluate()
    if as_json:
        print_json(metrics)
    else:
        show_figures({name.removeprefix("eval_"): value for name, value in metrics.items()}, console)
    return metrics


def predict(recipe: Recipe, output: Path = Path(PREDICTIONS_FILE), *, as_json: bool = False) -> dict[str, float]:
    """Answer every held-out prompt, or score every held-out pair, into a JSON-lines file."""
    console = own_console(recipe, as_json)
    recipe = only(recipe, do_predict=True)
    make_room(output)
    metrics = scored_pairs(recipe, output, console) if recipe.run.stage == "rm" else asked(recipe, output, console)
    if as_json:
        print_json(metrics)
    else:
        show_figures(metrics, console)
    console.out(f"answers: {output}", highlight=False)
    return metrics


def make_room(output: Path) -> None:
    """The folder of a file that is to be written; raises ConfigError before anything is loaded for nothing."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with open(output, "ab"):
            pass
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error.strerror or error}. Name another file.") from error


@contextlib.contextmanager
def evaluating(recipe: Recipe, console: Console) -> Iterator[tuple[SFTTrainer | RewardTrainer, Prepared]]:
    """A trainer that evaluates what is held out, and its data; it writes nothing."""
    tokenizer, data = held_out_data(recipe, console)
    model = usable_model(recipe, tokenizer, lambda line: tell([line], None, console))
    with tempfile.TemporaryDirectory() as folder:  # the trainer makes its output folder whether it writes or not
        args = evaluation_arguments(recipe, folder)
        trainer = STAGES[recipe.run.stage].trainer(
            model, args, eval_dataset=data.evaluation_sets, processing_class=tokenizer
        )
        use_progress(trainer, None)
        tell(evaluation_notes(trainer, data), None, console)
        yield trainer, data


def held_out_data(recipe: Recipe, console: Console) -> tuple[Any, Prepared]:
    """Tokenizer and data of a command that only evaluates, with the reports shown."""
    tell(recipe.notes, None, console)
    tokenizer = tokenizer_of(recipe)
    data = prepare_data(recipe, tokenizer)
    check_data(recipe, data)
    show_reports(None, data.evaluation_reports, console)
    return tokenizer, data


def asked(recipe: Recipe, output: Path, console: Console) -> dict[str, float]:
    """Answers to the held-out prompts, and their figures."""
    tokenizer, data = held_out_data(recipe, console)
    metric = written_metric(recipe, data)
    model = usable_model(recipe, tokenizer, lambda line: tell([line], None, console))
    return answered(recipe, model, tokenizer, data.held_out, output, metric, console)


def scored_pairs(recipe: Recipe, output: Path, console: Console) -> dict[str, float]:
    """Rewards of the held-out pairs, and their figures."""
    with evaluating(recipe, console) as (trainer, data):
        result = trainer.predict(data.held_out_pairs, metric_key_prefix="predict")
        trainer.save_predictions(result, output)
    return result.metrics


def show_figures(metrics: dict[str, float], console: Console) -> None:
    """One line a figure; how long it took is left out."""
    shown = {
        name.replace("_", " "): value
        for name, value in metrics.items()
        if isinstance(value, float) and not name.endswith(("runtime", "per_second"))
    }
    width = max(map(len, shown), default=0) + 2
    for name, value in shown.items():
        console.out(f"{name:{width}}{value:.4f}", highlight=False)


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
        "layers": "compiled in long runs"
        if compiler()
        else "run as they are: there is no C++ compiler to compile them",
        "command": Path(sys.argv[0]).name,
    }
