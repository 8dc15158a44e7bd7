"""A model card: README.md beside the weights, from what the trainer knows, for a person to complete."""

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from tunesmith import __version__
from tunesmith.runs import write_text

logger = logging.getLogger(__name__)

TAGS = ("trl", "sft", "tunesmith")
"""In `model.model_tags` of every model trained here. `trl` is what the Hub's filters and TRL's own tests look for."""

MARK = "<!-- Written by tunesmith, which will replace it. Delete this line to keep changes of your own. -->"
BESIDE = "README.tunesmith.md"

OPTIONS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "tokens_per_batch",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "packing",
    "train_on",
    "loss_type",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
)
ADAPTER_OPTIONS = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save")
NOT_SHOWN = ("runtime", "per_second", "_flos")


@dataclass
class Card:
    """What a model card says; every part may be left out."""

    name: str
    """The model's name: the headline."""
    base_model: str | None = None
    """Hub id of the base model."""
    repository: str | None = None
    """What the quick start loads; `None`: `name`."""
    datasets: list[str] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    is_adapter: bool = False
    is_chat: bool = False
    """The tokenizer has a chat template, so the quick start asks with messages."""
    method: str = "SFT (supervised fine-tuning)"
    answers: bool = True
    """It writes texts from texts alone, so there is a quick start. What others take differs from model to model."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """For each dataset its name, and rows and tokens, as `data_rows` gives them."""
    options: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    """Tracker → URL of the run."""


def write_card(
    output_dir: str | Path,
    *,
    model: Any,
    args: Any = None,
    tokenizer: Any = None,
    model_name: str | None = None,
    dataset_name: str | Sequence[str] | None = None,
    tags: str | Sequence[str] | None = None,
    reports: Mapping[str, Any] | None = None,
    log_history: Iterable[Mapping[str, Any]] = (),
    method: str | None = None,
) -> Path:
    """Write the card of a trained model into its folder. Call it on the first process only.

    A card that a program wrote is replaced. One that a person wrote stays: ours is then `README.tunesmith.md`.

    Args:
        output_dir: folder of the model; it is made if there is none.
        model: the trained model, whose `config` and `peft_config` are read; DDP's wrapper taken off.
        args: training options.
        model_name: headline. `None`: the Hub id in `args`, or the folder's name.
        dataset_name: Hub ids. `None`: no dataset is named.
        tags: added to those of the model.
        reports: dataset → `data.report.Report`.
        log_history: `trainer.state.log_history`; the last figure of each kind is shown.
        method: how a model was trained that writes no answers. `None`: supervised fine-tuning.

    Returns: the file that was written.
    """
    folder = Path(output_dir)
    hub_id = getattr(args, "hub_model_id", None)
    card = Card(
        name=one_line(model_name or hub_id or folder.resolve().name),
        base_model=base_model_id(model),
        repository=hub_id,
        datasets=as_list(dataset_name),
        tags=list(dict.fromkeys(["generated_from_trainer", *model_tags(model), *as_list(tags)])),
        is_adapter=hasattr(model, "peft_config"),
        is_chat=bool(getattr(tokenizer, "chat_template", None)),
        method=method or Card.method,
        answers=method is None and not hasattr(getattr(model, "config", None), "vision_config"),
        rows=data_rows(reports or {}),
        options=shown_options(args, model),
        metrics=last_figures(log_history),
        links=tracker_links(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    return write_text(path_in(folder), model_card(card))


def path_in(folder: Path) -> Path:
    """Where a card may be written without replacing what a person wrote."""
    path = folder / "README.md"
    if not path.exists() or is_generated(path.read_text(encoding="utf-8", errors="replace")):
        return path
    logger.warning("%s was written by a person and stays; the model card is %s.", path, BESIDE)
    return folder / BESIDE


def tag_model(model: Any) -> list[str]:
    """Put `TAGS`, and `unsloth` where it applies, into `model.model_tags`; the tags there now.

    They go to the model inside a `PeftModel`, through which they are seen, and where peft's own card looks for them.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.model_tags = model_tags(model)
    return inner.model_tags


def model_tags(model: Any) -> list[str]:
    """Tags of a model, those of this program among them."""
    unsloth = ["unsloth"] if getattr(getattr(model, "config", None), "unsloth_version", None) else []
    return list(dict.fromkeys([*(getattr(model, "model_tags", None) or []), *TAGS, *unsloth]))


# ---------------------------------------------------------------------------------------------------- what is known


def base_model_id(model: Any) -> str | None:
    """Hub id of the base model; `None` for a folder, whose name means nothing elsewhere."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return None if not name or Path(name).exists() or name.count("/") > 1 or name.startswith((".", "/")) else name


def data_rows(reports: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Counts of each dataset whose tokens were counted in this process; of others the report holds zeros."""
    return [
        {
            "dataset": name.replace("_dataset", ""),
            "rows read": report.read,
            "rows used": report.kept,
            "tokens": report.num_tokens,
            "trained tokens": report.num_trained,
        }
        for name, report in reports.items()
        if report.num_tokens
    ]


def shown_options(args: Any, model: Any) -> dict[str, Any]:
    """The options that say how a model was trained, and its adapter's; never a token, a path or a URL."""
    found = {name: getattr(args, name, None) for name in OPTIONS}
    found["processes"] = world if (world := getattr(args, "world_size", 1)) > 1 else None
    if (found["max_steps"] or -1) <= 0:
        found["max_steps"] = None
    else:
        found["num_train_epochs"] = None  # it had no say
    for adapter in getattr(model, "peft_config", {}).values():
        found |= {name: getattr(adapter, name, None) for name in ADAPTER_OPTIONS}
    return {name: plain(value) for name, value in found.items() if value is not None and value is not False}


def plain(value: Any) -> Any:
    """An option as a card shows it, the same at every run: enums by value, sets in order."""
    if isinstance(value, set | frozenset | list | tuple):
        return ", ".join(sorted(map(str, value)))
    return getattr(value, "value", value)


def last_figures(log_history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last loss of training, and the last figure of each kind from evaluations."""
    found: dict[str, float] = {}
    for entry in log_history:
        for name, value in entry.items():
            wanted = name == "train_loss" or name.startswith("eval_")
            if wanted and isinstance(value, int | float) and not any(part in name for part in NOT_SHOWN):
                found[name] = value
    return found


def tracker_links() -> dict[str, str]:
    """URLs of the run at trackers that are in use; none is imported for it."""
    wandb, comet = sys.modules.get("wandb"), sys.modules.get("comet_ml")
    running = getattr(comet, "get_running_experiment", lambda: None)()
    urls = {
        "Weights & Biases": getattr(getattr(wandb, "run", None), "url", None),
        "Comet": getattr(running, "url", None),
    }
    return {name: url for name, url in urls.items() if isinstance(url, str)}


def versions(is_adapter: bool) -> dict[str, str]:
    """Versions of the packages that a model trained here depends on."""
    found = {"tunesmith": __version__}
    # peft, when it saves beside this card, adds its line unless it finds one
    names = {"PEFT": "peft"} if is_adapter else {}
    names |= {"Transformers": "transformers", "PyTorch": "torch", "Datasets": "datasets", "Tokenizers": "tokenizers"}
    for shown, package in names.items():
        try:
            found[shown] = version(package)
        except PackageNotFoundError:
            continue
    return found


# ---------------------------------------------------------------------------------------------------- what is written


def model_card(card: Card) -> str:
    """The card as Markdown with YAML front matter, as the Hub reads it."""
    data = ModelCardData(
        base_model=card.base_model,
        datasets=card.datasets or None,
        library_name="peft" if card.is_adapter else "transformers",
        model_name=card.name,
        pipeline_tag="text-generation" if card.answers else None,
        tags=card.tags,
    )
    body = "\n".join(sections(card)).strip()
    return f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n{body}\n"


def sections(card: Card) -> Iterator[str]:
    """The card's parts, blank lines included."""
    yield f"# {card.name}\n"
    yield opening(card)
    yield f"It was trained with {card.method} by tunesmith {__version__}.\n"
    if card.answers:
        yield f"## Quick start\n\n```python\n{quick_start(card)}\n```\n"
    if card.rows:
        yield "## Training data\n"
        yield table(list(card.rows[0]), [list(row.values()) for row in card.rows])
    yield "## Training procedure\n"
    for name, url in card.links.items():
        yield f"The run at {name}: <{url}>\n"
    if card.options:
        yield table(["option", "value"], [list(pair) for pair in card.options.items()])
    if card.metrics:
        yield "## Results\n"
        yield table(["figure", "value"], [[name, f"{value:.4g}"] for name, value in card.metrics.items()])
    yield "### Framework versions\n"
    yield from (f"- {name} {number}" for name, number in versions(card.is_adapter).items())


def opening(card: Card) -> str:
    """What the model was made of, and from what data."""
    made = "An adapter" if card.is_adapter else "A fine-tuned version" if card.base_model else "A fine-tuned model"
    if card.base_model:
        made += f" {'for' if card.is_adapter else 'of'} [{card.base_model}](https://huggingface.co/{card.base_model})"
    data = ", ".join(f"[{name}](https://huggingface.co/datasets/{name})" for name in card.datasets)
    return f"{made}, trained on {data}." if data else f"{made}."


def quick_start(card: Card) -> str:
    """Code that loads the model and asks it something."""
    name = repr(card.repository or card.name).replace("'", '"')
    question = '[{"role": "user", "content": "How are you?"}]' if card.is_chat else '"Once upon a time"'
    ask = f"print(generator({question}, max_new_tokens=128, return_full_text=False)[0]['generated_text'])"
    if not card.is_adapter:
        load = f'from transformers import pipeline\n\ngenerator = pipeline("text-generation", model={name})'
        return f"{load}\n{ask}"
    return (
        "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer, pipeline\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({name})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({name})\n"
        f'generator = pipeline("text-generation", model=model, tokenizer=tokenizer)\n{ask}'
    )


def table(header: list[str], rows: Iterable[list[Any]]) -> str:
    """A Markdown table, and a blank line."""
    lines = [header, ["---"] * len(header), *rows]
    cells = (" | ".join(one_line(cell).replace("|", "\\|") for cell in line) for line in lines)
    return "\n".join(f"| {line} |" for line in cells) + "\n"


def one_line(value: Any) -> str:
    """A text without line breaks; large counts with commas."""
    return " ".join((f"{value:,}" if type(value) is int else str(value)).split())


def as_list(value: str | Sequence[str] | None) -> list[str]:
    """One name as a list of it."""
    return [] if value is None else [value] if isinstance(value, str) else list(value)


# ---------------------------------------------------------------------------------------------------- whose card


PEFT_LINE = re.compile(
    r"- (PEFT |[a-z0-9_]+: )|#+ (Framework versions|Training procedure)|The following `bitsandbytes`"
)
GENERATED = (
    MARK,
    "This model card has been generated automatically according to the information the Trainer had access to",
)


def is_generated(text: str) -> bool:
    """Whether a program wrote this card: tunesmith, transformers' trainer, or peft, whose card is an empty form."""
    if any(mark in text for mark in GENERATED):
        return True
    form = set(ModelCard.from_template(ModelCardData()).text.splitlines())
    lines = ModelCard(text, ignore_metadata_errors=True).text.splitlines()
    return all(not line.strip() or line in form or PEFT_LINE.match(line) for line in lines)
