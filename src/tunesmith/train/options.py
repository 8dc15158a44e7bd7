"""SFTConfig: tunesmith's training options, those of transformers and every older name of either, in one dataclass."""

import copy
import inspect
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache, wraps
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from transformers import BitsAndBytesConfig, Seq2SeqTrainingArguments, TrainingArguments

from tunesmith.config import ModelConfig, TrainingFields, described
from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean
from tunesmith.train.legacy import LegacyFields, checkpointing, default_of, remember, translate
from tunesmith.train.values import checked, parts

DATASET_KWARGS: dict[str, Any] = {
    "skip_prepare_dataset": bool,
    "add_special_tokens": bool,
    "append_concat_token": bool,
    "on_bad_row": typing.Literal["error", "skip"],
    "format": str | None,
    "columns": dict | None,
    "system_prompt": str | None,
    "mixture_weights": dict | list | None,
    "mixture_stop": typing.Literal["first", "all"],
}
MAPPINGS = ("model_init_kwargs", "dataset_kwargs", "prepare_in_int8_kwargs")
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
SECRETS = ("hub_token", "push_to_hub_token")
TRAINER_ARGUMENTS = {
    *("model", "data_collator", "train_dataset", "eval_dataset", "processing_class", "tokenizer", "model_init"),
    *("compute_metrics", "callbacks", "optimizers", "preprocess_logits_for_metrics", "peft_config"),
    *("formatting_func", "compute_loss_func", "optimizer_cls_and_kwargs", "quantization_config"),
}


class UnknownOption(ConfigError, TypeError):
    """A keyword that SFTConfig does not have. Python's own error for it is a TypeError, so this is one too."""


def explains_keywords(cls: type) -> type:
    """Let the constructor say what an unknown keyword should have been; a class decorator.

    It also takes the fields with `init=False`, which `HfArgumentParser` leaves to another dataclass.
    """
    generated = cls.__init__
    taken = {field.name for field in fields(cls) if field.init}
    apart = {field.name for field in fields(cls) if not field.init and not field.name.startswith("_")}

    @wraps(generated)
    def construct(self: Any, *args: Any, **given: Any) -> None:
        unknown = next((name for name in given if name not in taken | apart), None)
        if unknown is not None:
            raise UnknownOption(f"SFTConfig: {unknown}: {why_unknown(unknown, taken | apart)}")
        for name in given.keys() & apart:
            setattr(self, name, given.pop(name))
        # a parser or a copy names every option, which says nothing about what was chosen
        self._named = () if taken <= given.keys() else tuple(given)
        generated(self, *args, **given)

    cls.__init__ = construct
    return cls


def why_unknown(name: str, known: set[str]) -> str:
    """Where a keyword belongs that is no option of SFTConfig."""
    if name in ("load_in_8bit", "load_in_4bit"):
        return (
            f"is an argument of from_pretrained. Set model_init_kwargs={{'{name}': True}}, or load the model "
            "with a quantization_config and give the trainer that."
        )
    if name in TRAINER_ARGUMENTS:
        return f"is an argument of the trainer: SFTTrainer(..., {name}=...)."
    if name in ModelConfig.__dataclass_fields__:
        return "is an option of ModelConfig, not of SFTConfig."
    return f"there is no such option.{did_you_mean(name, known)}"


@explains_keywords
@described
@dataclass
class SFTConfig(LegacyFields, TrainingFields, Seq2SeqTrainingArguments):
    """All options of `SFTTrainer`: tunesmith's own, those of `Seq2SeqTrainingArguments`, and TRL's.

    `bf16`, `gradient_checkpointing` and `padding_free` may be `None`: the trainer chooses for hardware and model.
    Older names work and say the same as the new ones (`train.legacy.OLD`); what nothing acts on is an error.
    Options may be assigned after construction too; the trainer reads `modernized(args)`.
    """

    model_init_kwargs: dict[str, Any] | str | None = None
    """Arguments of `from_pretrained` when the trainer is given a model's name, e.g. `{"dtype": "bfloat16"}`."""
    trust_remote_code: bool = field(default=False, init=False)
    """Run Python code that comes with a model given by name. On the command line it is `ModelConfig`'s flag."""
    dataset_kwargs: dict[str, Any] | str | None = None
    """How rows are read: skip_prepare_dataset, add_special_tokens, append_concat_token, on_bad_row, format, columns,
    system_prompt; and how a dict of training sets is mixed: mixture_weights, mixture_stop."""
    num_of_sequences: Annotated[int, Ge(1)] = 1024
    """Packed rows that a streamed data set is read ahead for."""
    chars_per_token: Annotated[float, Gt(0)] = 3.6
    """Characters per token, an estimate that sizes the same buffer where rows are plain text."""
    pad_to_multiple_of: int | str | None = None
    """Pad batches to a multiple of this many tokens. `None`, or TRL's `auto`: no more than needed."""
    prepare_in_int8_kwargs: dict[str, Any] | str | None = None
    """Arguments of the preparation of a quantized base for training, e.g. `{"use_gradient_checkpointing": false}`."""
    logging_dir: str | None = None
    """Folder of TensorBoard's files, when `report_to` names it. `None`: `output_dir/runs`."""
    include_tokens_per_second: bool = False
    """Report `train_tokens_per_second` when training ends."""

    __repr__ = TrainingArguments.__str__  # the one of dataclasses would show hub_token

    def __post_init__(self):
        read_texts(self)
        translate(self)
        check_values(self)
        check_supported(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on a CPU that it was not told to use
        asked = ask_checkpointing(self)
        super().__post_init__()
        if asked is None:  # transformers made it False
            for name in ("gradient_checkpointing", "activation_checkpointing"):
                if hasattr(self, name):
                    setattr(self, name, None)
        remember(self)

    @property
    def choose_checkpointing(self) -> bool:
        """Whether the trainer decides about gradient checkpointing."""
        return self.gradient_checkpointing is None

    @property
    def device(self) -> torch.device:
        """The device of this process; `cpu` without an index.

        Among several processes accelerate says `cpu:0`, and transformers 5.17 hands that to `torch.load` when it
        resumes, which knows no such place (5.23 leaves it out itself).
        """
        found = super().device
        return torch.device("cpu") if found.type == "cpu" else found

    def to_dict(self) -> dict[str, Any]:
        """All options as JSON can hold them; Hub tokens are blotted out.

        Unlike transformers', it leaves the objects in `model_init_kwargs` as they are (theirs puts text into the
        caller's own mapping) and shows `eos_token` and `pad_token`, which are no secrets.
        """
        flat = copy.copy(self)
        flat.model_init_kwargs = plain(self.model_init_kwargs)
        found = super(SFTConfig, flat).to_dict()
        # transformers blots out every name that ends in _token, chars_per_token among them
        shown = {name: getattr(self, name) for name in found if name.endswith("_token") and name not in SECRETS}
        hidden = {name: "<HUB_TOKEN>" if getattr(self, name) else None for name in SECRETS}
        return {**found, **shown, **hidden}


# ------------------------------------------------------------------------------------------ at construction


def read_texts(args: SFTConfig) -> None:
    """Options that the command line can only give as text: mappings as JSON, a number that may be `auto`."""
    for name in MAPPINGS:
        value = getattr(args, name)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ConfigError(f"SFTConfig: {name}: is no JSON ({error}), got {value!r}.") from error
            setattr(args, name, value)
        if not isinstance(value, Mapping | None):
            raise ConfigError(f"SFTConfig: {name}: expected a mapping such as {{'key': 'value'}}, got {value!r}.")
    multiple = args.pad_to_multiple_of
    if isinstance(multiple, str):
        args.pad_to_multiple_of = int(multiple) if multiple.isdecimal() else None
    if args.pad_to_multiple_of == 0 or (args.pad_to_multiple_of is None and multiple not in (None, "auto", "none")):
        raise ConfigError(f"SFTConfig: pad_to_multiple_of: expected int ≥ 1, 'auto' or None, got {multiple!r}.")
    args.report_to = "none" if args.report_to is None else args.report_to


@cache
def own_annotations() -> dict[str, Any]:
    """Option → annotation, of the options that are declared here and not by transformers."""
    hints = typing.get_type_hints(SFTConfig, include_extras=True)
    declaring = (LegacyFields, TrainingFields, SFTConfig)
    return {name: hints[name] for cls in declaring for name in inspect.get_annotations(cls)}


@cache
def inherited_annotations() -> dict[str, Any]:
    """Option → annotation, of transformers' options that are numbers or switches, with the ranges of `COUNTS`."""
    hints = typing.get_type_hints(Seq2SeqTrainingArguments)
    plain = {name: hint for name, hint in hints.items() if set(parts(hint)[0]) <= {int, float, bool, type(None)}}
    shared = plain.keys() - own_annotations().keys()
    return {name: Annotated[plain[name], Ge(1)] if name in COUNTS else plain[name] for name in sorted(shared)}


def check_values(args: SFTConfig) -> None:
    """Raise ConfigError for the first option whose value has the wrong type, word or range."""
    for name, annotation in own_annotations().items():
        setattr(args, name, checked(name, getattr(args, name), annotation))
    for name, annotation in inherited_annotations().items():
        value = getattr(args, name, None)
        if value is not None:
            whole = isinstance(value, float) and value.is_integer() and float not in parts(annotation)[0]
            setattr(args, name, checked(name, int(value) if whole else value, annotation))
    for key, value in (args.dataset_kwargs or {}).items():
        if key not in DATASET_KWARGS:
            raise ConfigError(
                f"SFTConfig: dataset_kwargs: unknown key '{key}'.{did_you_mean(key, DATASET_KWARGS)} "
                f"Known: {', '.join(DATASET_KWARGS)}."
            )
        checked(f"dataset_kwargs[{key!r}]", value, DATASET_KWARGS[key])
    if args.train_on == "all" and (args.max_source_length or args.max_target_length):
        raise ConfigError(
            "SFTConfig: max_source_length, max_target_length: they cut what stands before answers, and answers; "
            "train_on='all' knows neither. Set max_length alone."
        )
    if args.model_init_kwargs:
        loading(args)


def check_supported(args: SFTConfig) -> None:
    """Warn of what nothing will read."""
    if args.logging_dir is not None and "tensorboard" not in args.report_to and "all" not in args.report_to:
        warnings.warn(
            f"logging_dir: nothing will be written to {args.logging_dir}, which only TensorBoard uses. "
            "Add report_to='tensorboard', or remove logging_dir.",
            stacklevel=5,
        )


def ask_checkpointing(args: SFTConfig) -> bool | None:
    """Say what was asked under the name that the installed transformers prefers; returns it, `None`: choose for me."""
    asked = checkpointing(args, "gradient_checkpointing")
    kwargs = checkpointing(args, "gradient_checkpointing_kwargs")
    if hasattr(args, "activation_checkpointing"):  # since transformers 5.2x, which warns of the old names
        args.activation_checkpointing, args.gradient_checkpointing = asked, None
        args.activation_checkpointing_kwargs, args.gradient_checkpointing_kwargs = kwargs, None
    else:
        args.gradient_checkpointing, args.gradient_checkpointing_kwargs = asked, kwargs
    return asked


# ------------------------------------------------------------------------------------------ for the trainer


def modernized(args: SFTConfig) -> SFTConfig:
    """A copy of `args` in which everything that was assigned after construction counts, old names too.

    Raises: ConfigError for what the constructor would have refused.
    """
    args = copy.copy(args)
    SFTConfig.__post_init__(args)  # a subclass's own has run, and may not bear to run twice
    return args


def as_sft_config(args: TrainingArguments | None) -> SFTConfig:
    """`args` as an SFTConfig: `None` is the default one, transformers' own arguments are taken over field by field.

    Values are taken as they are, secrets included (`to_dict` would blot out `hub_token`). Options of another library's
    subclass count where they were changed.

    Raises: ConfigError for changed options that SFTConfig does not have.
    """
    if args is None:
        return SFTConfig(output_dir="tmp_trainer")
    if isinstance(args, SFTConfig):
        return args
    if not isinstance(args, TrainingArguments):
        raise ConfigError(f"SFTTrainer: args: expected an SFTConfig, got a {type(args).__name__}.")
    standard = Seq2SeqTrainingArguments.__dataclass_fields__
    given = {}
    for declared in fields(args):
        name, value = declared.name, getattr(args, declared.name)
        if not declared.init or (name not in standard and value == default_of(type(args), name)):
            continue
        given[name] = value
    strange = sorted(given.keys() - SFTConfig.__dataclass_fields__.keys())
    if strange:
        raise ConfigError(
            f"SFTTrainer: args: a {type(args).__name__} has options that SFTConfig does not have: "
            f"{', '.join(strange)}. Derive it from tunesmith.SFTConfig."
        )
    return SFTConfig(**given)


def loading(args: SFTConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a model given by name, in today's spelling.

    `torch_dtype` is `dtype`, `load_in_8bit` and `load_in_4bit` are a `quantization_config`, and `trust_remote_code`
    is SFTConfig's. `args.model_init_kwargs` stays as it was given.

    Raises: ConfigError for a type that torch does not have, and for two ways of saying one thing that differ.
    """
    kwargs = dict(args.model_init_kwargs or {})
    types = {name: torch_type(kwargs.pop(name)) for name in ("torch_dtype", "dtype") if name in kwargs}
    if len(set(types.values())) > 1:
        raise ConfigError(f"SFTConfig: model_init_kwargs: {types} name one option and differ. Keep dtype.")
    if types:
        kwargs["dtype"] = next(iter(types.values()))
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, False)]
    if bits and (len(bits) == 2 or kwargs.get("quantization_config") is not None):
        raise ConfigError(
            "SFTConfig: model_init_kwargs: load_in_8bit, load_in_4bit and quantization_config each say how "
            "weights are quantized. Keep one."
        )
    if bits:
        kwargs["quantization_config"] = BitsAndBytesConfig(**{bits[0]: True})
    if args.trust_remote_code:
        kwargs.setdefault("trust_remote_code", True)
    return kwargs


def torch_type(named: Any) -> Any:
    """A dtype from its name; "auto", `None` and dtypes as they are."""
    found = getattr(torch, named, None) if isinstance(named, str) and named != "auto" else named
    if not (found in (None, "auto") or isinstance(found, torch.dtype)) or (found is None and named is not None):
        raise ConfigError(
            f"SFTConfig: model_init_kwargs: dtype: Invalid `torch_dtype` passed to the SFTConfig. Expected 'auto', a "
            f"name such as 'bfloat16' or a torch.dtype, got {named!r}."
        )
    return found


def plain(value: Any) -> Any:
    """`value` with torch's types as text and configurations as mappings, in new containers."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return value.to_dict() if hasattr(value, "to_dict") else value
