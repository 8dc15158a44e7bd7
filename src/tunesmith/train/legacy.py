"""Options of transformers 4 and of TRL (0.13 to 1.16) that are called otherwise here, or that nothing acts on today.

`OLD` says for each what becomes of a value that was given: it moves to today's option, or it is an error. None is
ignored.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tunesmith.errors import ConfigError


@dataclass
class LegacyFields:
    """Old names of options, with the defaults they had. A value given to one moves to the option of today."""

    max_seq_length: int | None = None
    """Older name of `max_length`, with the same default: what the tokenizer was made for, at most 1024."""
    assistant_only_loss: bool | None = None
    """TRL's name: true is `train_on="assistant"`, false is `train_on="all"`."""
    completion_only_loss: bool | None = None
    """TRL's name: true is `train_on="completion"`, false is `train_on="all"`. With `assistant_only_loss`: the
    assistant turns, and of rows with a prompt those of the completion."""
    chat_template_path: str | None = None
    """TRL's name of `chat_template`."""
    truncation_mode: Literal["keep_start", "keep_end"] = "keep_start"
    """TRL's name: `keep_end` is `too_long="truncate_left"`."""
    use_liger: bool = False
    """Older name of `use_liger_kernel`."""
    evaluation_strategy: str | None = None
    """Older name of `eval_strategy`."""
    per_gpu_train_batch_size: int | None = None
    """Older name of `per_device_train_batch_size`."""
    per_gpu_eval_batch_size: int | None = None
    """Older name of `per_device_eval_batch_size`."""
    no_cuda: bool = False
    """Older name of `use_cpu`."""
    warmup_ratio: float | None = 0.0
    """Share of the run that is warmup, from 0 to below 1: `warmup_steps` takes it today."""
    adafactor: bool = False
    """Older spelling of `optim="adafactor"`."""
    group_by_length: bool = False
    """Older spelling of `train_sampling_strategy="group_by_length"`."""
    include_inputs_for_metrics: bool = False
    """Older spelling of `include_for_metrics=["inputs"]`."""
    dispatch_batches: bool | None = None
    """Older spelling of `accelerator_config={"dispatch_batches": ...}`."""
    split_batches: bool | None = None
    """Older spelling of `accelerator_config={"split_batches": ...}`."""
    fsdp_min_num_params: int = 0
    """Older spelling of `fsdp_config={"min_num_params": ...}`."""
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    """Older spelling of `fsdp_config={"transformer_layer_cls_to_wrap": ...}`."""
    torchdynamo: str | None = None
    """Older name of `torch_compile_backend`."""
    push_to_hub_model_id: str | None = None
    """Older name of `hub_model_id`."""
    push_to_hub_organization: str | None = None
    """Owner of the Hub repository; `hub_model_id="owner/name"` today."""
    push_to_hub_token: str | None = None
    """Older name of `hub_token`."""
    overwrite_output_dir: bool = False
    """Accepted: a trainer made in Python writes into a folder whether it is empty or not."""
    save_safetensors: bool = True
    """Weights are always saved as safetensors; false is an error."""
    use_mps_device: bool = False
    """An Apple GPU is used where there is one; true is an error."""
    jit_mode_eval: bool = False
    """Gone from transformers: true is an error."""
    use_ipex: bool = False
    """Gone from transformers: true is an error."""
    fp16_opt_level: str = "O1"
    """Level of NVIDIA Apex, gone from transformers: another value is an error."""
    fp16_backend: str = "auto"
    """Gone from transformers, which uses torch's autocast: another value is an error."""
    half_precision_backend: str = "auto"
    """Gone from transformers, which uses torch's autocast: another value is an error."""
    tpu_num_cores: int | None = None
    """Gone from transformers: a value is an error."""
    tpu_metrics_debug: bool = False
    """Gone from transformers: true is an error."""
    past_index: int = -1
    """Gone from transformers: another value is an error."""
    mp_parameters: str = ""
    """SageMaker's model parallelism, which tunesmith does not drive: a value is an error."""
    ray_scope: str = "last"
    """Gone from transformers: another value is an error."""
    use_legacy_prediction_loop: bool = False
    """Gone from transformers: true is an error."""


# Words of other programs and other years for the same thing.
OLD_WORDS: dict[str, dict[str, str]] = {
    "loss_type": {"chunked_nll": "nll"},
    "packing_strategy": {"ffd": "bfd", "bfd-requeue": "bfd_split"},
    "optim": {"adamw_hf": "adamw_torch"},  # transformers' own AdamW, its default until 2023
}


class Fate(NamedTuple):
    """What becomes of an old option that was given a value."""

    now: str | None
    """Option of today; `None`: there is none, and `told` is an error or, when empty, the value needs nothing."""
    value: Callable[[Any], Any] | None = None
    """Arguments → the value of `now`; `None`: the old option's own."""
    joins: bool = False
    """`value` adds to what `now` holds and sees to contradictions itself."""
    told: str = ""


def renamed(now: str) -> Fate:
    """The same option has another name."""
    return Fate(now)


def becomes(now: str, value: Callable[[Any], Any]) -> Fate:
    """Another option says the same."""
    return Fate(now, value)


def joins(now: str, value: Callable[[Any], Any]) -> Fate:
    """The value is now a part of another option."""
    return Fate(now, value, joins=True)


def gone(told: str) -> Fate:
    """Nothing acts on it any more: why, and what to write instead."""
    return Fate(None, told=told)


def always() -> Fate:
    """What it asks for is the case anyway."""
    return Fate(None)


# ------------------------------------------------------------------------------------------ values of today


def trained_part(args: Any) -> str:
    """`train_on` for TRL's two switches; prompt turns of rows with a completion are never trained as "assistant"."""
    if args.assistant_only_loss:
        return "assistant"
    if args.completion_only_loss:
        return "completion"
    return "all" if False in (args.assistant_only_loss, args.completion_only_loss) else "assistant"


def warmup_share(args: Any) -> float:
    """`warmup_steps` below 1 is a share of the run; a share of 1 cannot be said, it would be one step."""
    share = args.warmup_ratio or 0.0
    if not 0 <= share < 1:
        raise ConfigError(
            f"SFTConfig: warmup_ratio: expected a share from 0 to below 1, got {share}. Write steps as warmup_steps."
        )
    return share


def hub_id(args: Any) -> str | None:
    """`owner/name` from the three old options; the name is the run directory's where none is given."""
    name, owner = args.push_to_hub_model_id, args.push_to_hub_organization
    if owner is None:
        return name
    name = name or Path(args.output_dir or "tmp_trainer").name
    return name if "/" in name else f"{owner}/{name}"


def metric_inputs(args: Any) -> list[str]:
    """`include_for_metrics` with or without `inputs`."""
    others = [what for what in args.include_for_metrics if what != "inputs"]
    return [*others, "inputs"] if args.include_inputs_for_metrics else others


def batches_option(key: str) -> Callable[[Any], dict[str, Any]]:
    """`accelerator_config` with an old option in it."""

    def value(args: Any) -> dict[str, Any]:
        given = args.accelerator_config
        held = asdict(given) if is_dataclass(given) else mapping(given, "accelerator_config", key)
        return with_key(held, "accelerator_config", key, getattr(args, key))

    return value


def fsdp_option(key: str, old: str, policy: str) -> Callable[[Any], dict[str, Any]]:
    """`fsdp_config` with an old option in it, and the wrapping policy that reads it."""

    def value(args: Any) -> dict[str, Any] | None:
        given = getattr(args, old)
        if not args.fsdp:
            raise ConfigError(f"SFTConfig: {old}: got {given!r}, but fsdp is off. Set fsdp=True, or remove {old}.")
        held = mapping(args.fsdp_config, "fsdp_config", key)
        held = {name.removeprefix("fsdp_"): item for name, item in held.items()}
        held = with_key(held, "fsdp_config", "auto_wrap_policy", policy)  # the one that reads it
        return with_key(held, "fsdp_config", key, [given] if isinstance(given, str) else given)

    return value


def mapping(given: Any, option: str, key: str) -> dict[str, Any]:
    """A copy of an option that may be a mapping, JSON text or nothing."""
    if given is None or isinstance(given, dict):
        return dict(given or {})
    if isinstance(given, str) and given.startswith("{"):
        return json.loads(given)
    raise ConfigError(f"SFTConfig: {option}: {given!r} is a file. Write {key} into that file.")


def with_key(held: dict[str, Any], option: str, key: str, value: Any) -> dict[str, Any]:
    """`held` with `key: value`; a different value that stands there is an error."""
    if held.get(key) not in (None, False, 0, value):
        raise ConfigError(
            f"SFTConfig: {key} ({value!r}) and {option}[{key!r}] ({held[key]!r}) name one option and differ. "
            f"Keep {option}."
        )
    return {**held, key: value}


AUTOCAST = "there is one half precision since transformers 5, torch's autocast"
OLD: dict[str, Fate] = {
    "max_seq_length": renamed("max_length"),
    "chat_template_path": renamed("chat_template"),
    "use_liger": renamed("use_liger_kernel"),
    "evaluation_strategy": renamed("eval_strategy"),
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "no_cuda": renamed("use_cpu"),
    "torchdynamo": renamed("torch_compile_backend"),
    "push_to_hub_token": renamed("hub_token"),
    "push_to_hub_model_id": becomes("hub_model_id", hub_id),
    "push_to_hub_organization": becomes("hub_model_id", hub_id),
    "warmup_ratio": becomes("warmup_steps", warmup_share),
    "assistant_only_loss": becomes("train_on", trained_part),
    "completion_only_loss": becomes("train_on", trained_part),
    "truncation_mode": becomes("too_long", lambda args: {"keep_end": "truncate_left"}.get(args.truncation_mode)),
    "adafactor": becomes("optim", lambda args: "adafactor" if args.adafactor else None),
    "group_by_length": becomes(
        "train_sampling_strategy", lambda args: "group_by_length" if args.group_by_length else None
    ),
    "include_inputs_for_metrics": joins("include_for_metrics", metric_inputs),
    "dispatch_batches": joins("accelerator_config", batches_option("dispatch_batches")),
    "split_batches": joins("accelerator_config", batches_option("split_batches")),
    "fsdp_min_num_params": joins(
        "fsdp_config", fsdp_option("min_num_params", "fsdp_min_num_params", "SIZE_BASED_WRAP")
    ),
    "fsdp_transformer_layer_cls_to_wrap": joins(
        "fsdp_config",
        fsdp_option("transformer_layer_cls_to_wrap", "fsdp_transformer_layer_cls_to_wrap", "TRANSFORMER_BASED_WRAP"),
    ),
    "overwrite_output_dir": always(),
    "save_safetensors": gone("a pickled checkpoint can run code when it is opened. Leave it true"),
    "use_mps_device": gone("an Apple GPU is used wherever there is one. Remove it"),
    "jit_mode_eval": gone("transformers 5 evaluates no TorchScript. Remove it, or set torch_compile=True"),
    "use_ipex": gone("transformers 5 knows no Intel extension; torch has its kernels. Remove it"),
    "fp16_opt_level": gone("transformers 5 knows no NVIDIA Apex. Set fp16=True or bf16=True"),
    "fp16_backend": gone(f"{AUTOCAST}. Remove it; fp16=True or bf16=True turns it on"),
    "half_precision_backend": gone(f"{AUTOCAST}. Remove it; fp16=True or bf16=True turns it on"),
    "tpu_num_cores": gone("the launcher says how many processes run. Remove it; use `accelerate launch`"),
    "tpu_metrics_debug": gone("it is a word of another option now. Write debug='tpu_metrics_debug'"),
    "past_index": gone("no model of today returns such a state. Remove it"),
    "mp_parameters": gone("tunesmith does not drive SageMaker's model parallelism. Remove it; use FSDP or DeepSpeed"),
    "ray_scope": gone("Ray's search takes it directly: trainer.hyperparameter_search(backend='ray', scope=...)"),
    "use_legacy_prediction_loop": gone("transformers 5 has one evaluation loop. Remove it"),
}
# Two names of which the installed transformers may know both; `None` is what neither was given.
CHECKPOINTING = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


# ------------------------------------------------------------------------------------------ moving them


class Settled:
    """Which options of `args` were given a value: at construction, or assigned since they were last settled."""

    def __init__(self, args: Any):
        self.args = args
        self.before: dict[str, Any] = getattr(args, "_settled", {})
        self.named: Iterable[str] = getattr(args, "_named", ())

    def default(self, name: str) -> Any:
        """The value that an option has when nothing is said."""
        return default_of(type(self.args), name)

    def given(self, name: str) -> bool:
        """Whether somebody chose this option's value since it was last settled."""
        if name in self.named:
            return True
        return getattr(self.args, name) != self.before.get(name, self.default(name))


def default_of(cls: type, name: str) -> Any:
    """Default value of a dataclass field."""
    declared = cls.__dataclass_fields__[name]
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def translate(args: Any) -> None:
    """Move what was given under old names to the options of today; both stay readable and agree.

    Raises: ConfigError for an old option that nothing acts on, and for an old and a new name that differ.
    """
    for option, words in OLD_WORDS.items():
        value = getattr(args, option)
        if isinstance(value, str):
            setattr(args, option, words.get(value, value))
    settled = Settled(args)
    for old, fate in OLD.items():
        value = getattr(args, old)
        if fate.now is None:
            if fate.told and value != settled.default(old):
                raise ConfigError(f"SFTConfig: {old}: got {value!r}, but {fate.told}.")
        elif value != settled.before.get(old, settled.default(old)):
            move(settled, old, fate)
        elif fate.value is None and value != settled.default(old):
            setattr(args, old, getattr(args, fate.now))  # the new name was assigned since


def move(settled: Settled, old: str, fate: Fate) -> None:
    """Give today's option the value that an old one was given."""
    args, now = settled.args, fate.now
    value = fate.value(args) if fate.value else getattr(args, old)
    if value is None:
        value = settled.default(now)
    if not fate.joins and settled.given(now) and getattr(args, now) != value:
        raise ConfigError(differ(args, old, now, keep=now))
    setattr(args, now, value)


def differ(args: Any, one: str, other: str, keep: str) -> str:
    """What is wrong with two names of one option that were given different values."""
    return (
        f"SFTConfig: {one} ({getattr(args, one)!r}) and {other} ({getattr(args, other)!r}) name one option and "
        f"differ. Keep {keep}."
    )


def checkpointing(args: Any, old: str) -> Any:
    """What `gradient_checkpointing`, or its kwargs, were asked to be under either name; `None`: nothing was said."""
    settled, names = Settled(args), [name for name in (CHECKPOINTING[old], old) if hasattr(args, name)]
    asked = [name for name in names if settled.given(name) and getattr(args, name) is not None]
    if len(asked) == 2 and getattr(args, asked[0]) != getattr(args, asked[1]):
        raise ConfigError(differ(args, *asked, keep=asked[0]))
    return getattr(args, asked[0] if asked else old)


def remember(args: Any) -> None:
    """Note the options' values, so that a later assignment to one can be told from what was settled."""
    watched = {*OLD, *(fate.now for fate in OLD.values() if fate.now), *CHECKPOINTING, *CHECKPOINTING.values()}
    args._settled = {field.name: getattr(args, field.name) for field in fields(args) if field.name in watched}
    args._named = ()
