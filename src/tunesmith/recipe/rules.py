"""What cannot hold together, what must be there, and what is worth a line: all checked, all in one report."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tunesmith.recipe.given import Given, Problems
from tunesmith.recipe.llamafactory import different_defaults
from tunesmith.recipe.phases import Phases, asked_for, has_held_out
from tunesmith.recipe.schema import options
from tunesmith.recipe.settle import FREEZE_KEYS, LORA_KEYS

Task = Literal["train", "check", "eval", "predict", "chat"]
Values = Mapping[str, Any]
Where = Mapping[str, Given]


COMMIT = re.compile("[0-9a-f]{40}")


class Rule(NamedTuple):
    """Options that contradict each other; left unchecked where one of `keys` is itself wrong."""

    keys: tuple[str, ...]
    broken: Callable[[Values, Where], Any]
    message: str
    """A sentence in which `{name}` stands for an option's value."""


# ------------------------------------------------------------------------------------------ reading the values


def in_few_bits(v: Values) -> Any:
    """Whether the base is to be held in 4 or 8 bits."""
    return v["load_in_4bit"] or v["load_in_8bit"]


def listed(value: str | list[str] | None) -> list[str]:
    """The parts of an option that takes one or several."""
    return value if isinstance(value, list) else [value] if value else []


def answers(v: Values) -> Any:
    """Whether the run has answers written."""
    return v["predict_with_generate"] or v["do_predict"] or v["compare_rows"] or v["sample_rows"]


def gives_any(keys: Iterable[str], given: Where) -> bool:
    """Whether one of `keys` was given a value of its own."""
    return any(differs(key, given) for key in keys)


def differs(key: str, given: Where) -> bool:
    """Whether a key was given with a value other than its default (a resolved recipe gives them all)."""
    return key in given and given[key].value != options()[key].default


def system_prompts(v: Values) -> int:
    """How many messages `system_prompt` holds; a text separates them by `|` where there are several datasets."""
    given = v["system_prompt"]
    if isinstance(given, list):
        return len(given)
    return given.count("|") + 1 if given and len(listed(v["dataset"])) > 1 else 1


def bad_shares(v: Values) -> bool:
    """Whether `interleave_probs` are not one share for each dataset."""
    shares = [float(share) for share in listed(v["interleave_probs"])]
    return len(shares) != len(listed(v["dataset"])) or min(shares) < 0 or abs(sum(shares) - 1) > 0.011


def zero_stage(deepspeed: Mapping[str, Any] | str | None) -> Any:
    """The ZeRO stage of a DeepSpeed configuration: a mapping, JSON text or a file. `None` where it cannot be read."""
    if isinstance(deepspeed, str):
        try:
            text = deepspeed if deepspeed.startswith("{") else Path(deepspeed).read_text(encoding="utf-8")
            deepspeed = json.loads(text)
        except (OSError, ValueError):
            return None
    zero = deepspeed.get("zero_optimization") if isinstance(deepspeed, Mapping) else None
    return zero.get("stage") if isinstance(zero, Mapping) else None


def is_missing_file(value: Any) -> bool:
    """Whether a configuration is named as a JSON file that does not exist."""
    return isinstance(value, str) and value.endswith(".json") and not Path(value).is_file()


def is_too_long(value: Any) -> bool:
    """Whether a path has a name in it that no file system takes."""
    return isinstance(value, str) and max(len(part.encode()) for part in value.split("/")) > 255


def bad_pairs(value: Any) -> bool:
    """Whether a text is anything but `name=value`, several of them with commas between."""
    return isinstance(value, str) and not all(part.partition("=")[1] for part in value.split(","))


# ------------------------------------------------------------------------------------------ contradictions

# Whatever the recipe is for: training, evaluation or prediction.
CONTRADICTIONS = [
    Rule(
        ("trust_remote_code", "model_revision", "model_name_or_path"),
        lambda v, given: (
            v["trust_remote_code"]
            and v["model_name_or_path"]
            and not os.path.isdir(os.path.expanduser(v["model_name_or_path"]))
            and not COMMIT.fullmatch(v["model_revision"])
        ),
        "trust_remote_code runs code that whoever owns {model_name_or_path} may change at any time. Read the code, "
        "and name its commit: --model_revision and 40 hexadecimal digits.",
    ),
    Rule(
        ("do_train", "do_eval", "do_predict"),
        lambda v, given: not any(asked_for(said(given), has_held_out(v))),
        "nothing is to be done: do_train is false, and so are do_eval and do_predict. Set one to true.",
    ),
    Rule(
        ("stage", "predict_with_generate"),
        lambda v, given: v["stage"] != "sft" and v["predict_with_generate"],
        "predict_with_generate: only stage sft writes answers, and this is stage {stage}. Remove it.",
    ),
    Rule(
        ("stage", "do_predict", "predict_with_generate"),
        lambda v, given: v["stage"] == "sft" and v["do_predict"] and not v["predict_with_generate"],
        "Please enable `predict_with_generate` to save model predictions.",
    ),
    Rule(
        ("stage", "compare_rows", "sample_rows"),
        lambda v, given: v["stage"] != "sft" and (v["compare_rows"] or v["sample_rows"]),
        "compare_rows and sample_rows have answers written, which only stage sft does. Remove them.",
    ),
    Rule(
        ("stage", "adapter"),
        lambda v, given: v["stage"] == "rm" and v["adapter"] != "lora",
        "stage: rm trains a LoRA adapter with a value head, not adapter: {adapter}. Set adapter: lora.",
    ),
    Rule(
        ("stage", "train_on"),
        lambda v, given: (
            v["stage"] != "sft" and differs("train_on", given) and (v["stage"], v["train_on"]) != ("pt", "all")
        ),
        "train_on: {train_on} has no effect with stage: {stage}, which has no turns to choose from. Remove it.",
    ),
    Rule(
        ("stage", "packing"),
        lambda v, given: v["stage"] == "rm" and v["packing"],
        "packing joins examples into rows, and stage: rm compares them in pairs. Remove packing.",
    ),
    Rule(
        ("stage", "loss_type"),
        lambda v, given: v["stage"] == "rm" and differs("loss_type", given),
        "loss_type: {loss_type} has no effect with stage: rm, which has a loss of its own. Remove it.",
    ),
    Rule(
        ("stage", "reward_loss"),
        lambda v, given: v["stage"] != "rm" and differs("reward_loss", given),
        "reward_loss: {reward_loss} has no effect with stage: {stage}, which compares no answers. Remove it.",
    ),
    Rule(
        ("bf16", "fp16"),
        lambda v, given: v["bf16"] and v["fp16"],
        "bf16 and fp16 cannot both be true. Keep one.",
    ),
    Rule(
        ("fp16", "use_cpu"),
        lambda v, given: v["fp16"] and v["use_cpu"],
        "a CPU does not multiply in float16. Set bf16: true in its place, or remove both fp16 and bf16.",
    ),
    Rule(
        ("adapter", *LORA_KEYS),
        lambda v, given: v["adapter"] in ("full", "freeze") and gives_any(LORA_KEYS, given),
        "LoRA options have no effect with adapter: {adapter}. Set adapter: lora, or remove them.",
    ),
    Rule(
        ("adapter", *FREEZE_KEYS),
        lambda v, given: v["adapter"] in ("full", "lora") and gives_any(FREEZE_KEYS, given),
        "freeze options have no effect with adapter: {adapter}. Set adapter: freeze, or remove them.",
    ),
    Rule(
        ("adapter", "checkpoint_dir"),
        lambda v, given: v["adapter"] == "none" and v["checkpoint_dir"],
        "checkpoint_dir has no effect with adapter: none. Set adapter: lora for adapters, full for whole weights.",
    ),
    Rule(
        ("adapter", "checkpoint_dir"),
        lambda v, given: v["adapter"] in ("full", "freeze") and len(listed(v["checkpoint_dir"])) > 1,
        "only adapter: lora takes several checkpoint_dir; adapter: {adapter} starts from one. Keep one.",
    ),
    Rule(
        ("checkpoint_dir", "load_in_4bit", "load_in_8bit"),
        lambda v, given: in_few_bits(v) and len(listed(v["checkpoint_dir"])) > 1,
        "adapters cannot be merged into a 4- or 8-bit base, so it takes one checkpoint_dir. Merge them first.",
    ),
    Rule(
        ("resume_lora_training", "checkpoint_dir", "load_in_4bit", "load_in_8bit"),
        lambda v, given: in_few_bits(v) and v["checkpoint_dir"] and not v["resume_lora_training"],
        "adapters cannot be merged into a 4- or 8-bit base, so no new one begins there. Remove resume_lora_training.",
    ),
    Rule(
        ("resume_lora_training", "checkpoint_dir"),
        lambda v, given: not v["resume_lora_training"] and not v["checkpoint_dir"],
        "resume_lora_training: false merges the adapters of checkpoint_dir, which is not set. Set it, or remove this.",
    ),
    Rule(
        ("load_in_4bit", "load_in_8bit"),
        lambda v, given: v["load_in_4bit"] and v["load_in_8bit"],
        "load_in_4bit and load_in_8bit cannot both be true. Keep one.",
    ),
    Rule(
        ("load_in_4bit", "load_in_8bit", "adapter"),
        lambda v, given: in_few_bits(v) and v["adapter"] in ("full", "freeze"),
        "a 4- or 8-bit base has no weights that adapter: {adapter} could train. Set adapter: lora.",
    ),
    Rule(
        ("load_in_4bit", "load_in_8bit", "gguf_file"),
        lambda v, given: in_few_bits(v) and v["gguf_file"],
        "gguf_file is converted to full precision, which load_in_4bit and load_in_8bit contradict. Remove one.",
    ),
    Rule(
        ("load_in_4bit", "load_in_8bit", "lora_init"),
        lambda v, given: in_few_bits(v) and v["lora_init"] in ("pissa", "olora"),
        "lora_init: {lora_init} takes a part out of the base's weights, which 4 and 8 bits do not allow. Remove it.",
    ),
    Rule(
        ("load_in_4bit", "load_in_8bit", "deepspeed"),
        lambda v, given: in_few_bits(v) and zero_stage(v["deepspeed"]) == 3,
        "ZeRO stage 3 cuts weights into pieces, which a 4- or 8-bit base cannot be. Use stage 2, or full precision.",
    ),
    Rule(
        ("deepspeed",),
        lambda v, given: is_missing_file(v["deepspeed"]),
        "deepspeed: there is no file {deepspeed}. Name DeepSpeed's JSON, or write its mapping here.",
    ),
    Rule(
        ("accelerator_config",),
        lambda v, given: is_missing_file(v["accelerator_config"]),
        "accelerator_config: there is no file {accelerator_config}. Name its JSON, or write its mapping here.",
    ),
    Rule(
        ("fsdp_config",),
        lambda v, given: is_missing_file(v["fsdp_config"]),
        "fsdp_config: there is no file {fsdp_config}. Name its JSON, or write its mapping here.",
    ),
    Rule(
        ("optim_args",),
        lambda v, given: v["optim_args"] and bad_pairs(v["optim_args"]),
        "optim_args: expected name=value, several with commas between, got {optim_args}.",
    ),
    Rule(
        ("output_dir",),
        lambda v, given: is_too_long(v["output_dir"]),
        "output_dir: no file system takes a name of more than 255 bytes. Shorten it.",
    ),
    Rule(
        ("model_name_or_path",),
        lambda v, given: is_too_long(v["model_name_or_path"]),
        "model_name_or_path: no folder and no Hub id has a name of more than 255 bytes. Shorten it.",
    ),
    Rule(
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "load_in_4bit"),
        lambda v, given: not v["load_in_4bit"] and gives_any(("bnb_4bit_quant_type", "use_bnb_nested_quant"), given),
        "4-bit options have no effect without load_in_4bit: true. Add it, or remove them.",
    ),
    Rule(
        ("rope_factor", "rope_scaling"),
        lambda v, given: v["rope_factor"] is not None and v["rope_scaling"] is None,
        "rope_factor has no effect without rope_scaling. Set rope_scaling: linear, dynamic, yarn or llama3.",
    ),
    Rule(
        ("mix_strategy", "interleave_probs"),
        lambda v, given: v["interleave_probs"] is not None and v["mix_strategy"] == "concat",
        "interleave_probs has no effect with mix_strategy: concat. Set mix_strategy: interleave_under, or ..._over.",
    ),
    Rule(
        ("interleave_probs", "dataset"),
        lambda v, given: v["dataset"] and v["interleave_probs"] and bad_shares(v),
        "interleave_probs: expected one share for each dataset, which add up to 1, got {interleave_probs}.",
    ),
    Rule(
        ("system_prompt", "dataset"),
        lambda v, given: v["dataset"] and system_prompts(v) not in (1, len(listed(v["dataset"]))),
        "system_prompt: expected one text, or one for each dataset: a list, or separated by |.",
    ),
    Rule(
        ("streaming", "buffer_size"),
        lambda v, given: not v["streaming"] and differs("buffer_size", given),
        "buffer_size has no effect without streaming: true. Add it, or remove buffer_size.",
    ),
    Rule(
        ("streaming", "val_size"),
        lambda v, given: v["streaming"] and 0 < v["val_size"] < 1,
        "streaming does not know how many rows there are, so val_size cannot be a share. Write a count.",
    ),
    Rule(
        ("eval_on_each_dataset", "eval_dataset", "dataset"),
        lambda v, given: v["eval_on_each_dataset"] and len(listed(v["eval_dataset"]) or listed(v["dataset"])) < 2,
        "eval_on_each_dataset needs several sets, in eval_dataset or, with val_size, in dataset. Name more, or remove "
        "it.",
    ),
    Rule(
        ("eval_dataset", "val_size"),
        lambda v, given: v["eval_dataset"] and v["val_size"] > 0,
        "eval_dataset and val_size both say what is held out. Keep one.",
    ),
    Rule(
        ("max_source_length", "max_length"),
        lambda v, given: v["max_length"] and (v["max_source_length"] or 0) > v["max_length"],
        "max_source_length ({max_source_length}) is above max_length ({max_length}). Lower it, or raise max_length.",
    ),
    Rule(
        ("max_target_length", "max_length"),
        lambda v, given: v["max_length"] and (v["max_target_length"] or 0) > v["max_length"],
        "max_target_length ({max_target_length}) is above max_length ({max_length}). Lower it, or raise max_length.",
    ),
    Rule(
        ("train_on", "max_source_length", "max_target_length"),
        lambda v, given: (
            v["train_on"] == "all"
            and gives_any(("max_source_length", "max_target_length"), given)
            and v["stage"] == "sft"
        ),
        "max_source_length and max_target_length cut what stands before answers, and answers; train_on: all knows "
        "neither. Set max_length alone.",
    ),
    Rule(
        ("eval_num_beams", "predict_with_generate", "do_predict"),
        lambda v, given: v["eval_num_beams"] and not answers(v),
        "eval_num_beams has no effect where no answers are written. Set predict_with_generate: true, or remove it.",
    ),
]

# What a recipe that trains cannot say.
TRAINING = [
    Rule(
        ("adapter",),
        lambda v, given: v["adapter"] == "none",
        "adapter: none trains nothing. Set adapter: lora, full or freeze, or do_train: false.",
    ),
    Rule(
        ("adapter", "lora_target_modules"),
        lambda v, given: v["adapter"] == "lora" and not v["lora_target_modules"],
        "Please specify `lora_target` in LoRA training: all, or the names of modules.",
    ),
    Rule(
        ("packing", "train_sampling_strategy"),
        lambda v, given: v["packing"] and v["train_sampling_strategy"] == "group_by_length",
        "packing fills every row, so group_by_length has nothing to group. Remove one of the two.",
    ),
    Rule(
        ("packing", "packing_strategy", "eval_packing"),
        lambda v, given: not v["packing"] and not v["eval_packing"] and differs("packing_strategy", given),
        "packing_strategy: {packing_strategy} has no effect without packing: true. Add it, or remove this.",
    ),
    Rule(
        ("do_merge", "adapter"),
        lambda v, given: v["do_merge"] and v["adapter"] in ("full", "freeze"),
        "do_merge has nothing to merge with adapter: {adapter}. Remove it.",
    ),
    Rule(
        ("streaming", "max_steps"),
        lambda v, given: v["streaming"] and v["max_steps"] < 1,
        "Please specify `max_steps` in streaming mode: nobody knows how many rows a stream has.",
    ),
    Rule(
        ("load_best_model_at_end", "eval_strategy"),
        lambda v, given: v["load_best_model_at_end"] and v["eval_strategy"] == "no",
        "load_best_model_at_end needs evaluations during the run. Set eval_strategy: steps or epoch.",
    ),
    Rule(
        ("eval_strategy", "eval_dataset", "val_size"),
        lambda v, given: v["eval_strategy"] != "no" and not has_held_out(v),
        "eval_strategy: {eval_strategy} needs held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("do_eval", "do_predict", "predict_with_generate", "eval_strategy", "eval_dataset", "val_size"),
        lambda v, given: (
            (v["do_eval"] or v["do_predict"] or v["predict_with_generate"])
            and v["eval_strategy"] == "no"
            and not has_held_out(v)
        ),
        "do_eval, do_predict and predict_with_generate need held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("compare_rows", "sample_rows", "eval_dataset", "val_size"),
        lambda v, given: (v["compare_rows"] or v["sample_rows"]) and not has_held_out(v),
        "compare_rows and sample_rows need held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("max_steps",),
        lambda v, given: v["max_steps"] == 0,
        "max_steps: 0 is no length of a run. Write -1 for whole epochs, or do_train: false to train nothing.",
    ),
    Rule(
        ("warmup_steps", "max_steps"),
        lambda v, given: 0 < v["max_steps"] < v["warmup_steps"],
        "warmup_steps ({warmup_steps:g}) is more than max_steps ({max_steps}). Lower it.",
    ),
    Rule(
        ("tokens_per_batch", "max_length"),
        lambda v, given: v["tokens_per_batch"] and v["max_length"] and v["tokens_per_batch"] < v["max_length"],
        "tokens_per_batch ({tokens_per_batch}) is below max_length ({max_length}): the longest example would not fit.",
    ),
]

# ------------------------------------------------------------------------------------------ what must be there

HOW_TO_SET = {
    "model_name_or_path": "Name the base model: a folder or a Hub id.",
    "dataset": "Name the examples: a file, a folder or a Hub id.",
    "eval_dataset": "Name the held-out examples: --eval_dataset FILE.",
}


def needed(values: Values, task: Task, parts: Phases) -> list[str]:
    """The options without which there is nothing to do."""
    if task == "chat":
        return ["model_name_or_path"]
    if task in ("eval", "predict"):
        return ["model_name_or_path", *([] if was_held_out(values) else ["eval_dataset"])]
    if parts.train:
        return ["model_name_or_path", "dataset"]
    return ["model_name_or_path", *([] if values["dataset"] else ["eval_dataset"])]  # all of dataset, without training


def was_held_out(values: Values) -> bool:
    """Whether `dataset` and `val_size` say what a run held out; of a stream they do not, read whole as it is here."""
    return bool(values["dataset"] and values["val_size"] and not values["streaming"])


def said(chosen: Where) -> dict[str, Any]:
    """The values as given."""
    return {key: item.value for key, item in chosen.items()}


def check(chosen: Where, problems: Problems, task: Task) -> None:
    """Add what is missing, what contradicts itself and what is worth a line."""
    values = {name: option.default for name, option in options().items()} | said(chosen)
    runs = task in ("train", "check")
    parts = asked_for(said(chosen), has_held_out(values)) if runs else Phases(False, task == "eval", task == "predict")
    for key in needed(values, task, parts):
        if not values[key] and key not in problems.keys:
            problems.found.append((9, 0, f"{problems.source}: {key} is not set. {HOW_TO_SET[key]}"))
    rules = (CONTRADICTIONS if runs else []) + (TRAINING if runs and parts.train else [])
    for rule in rules:
        if not problems.keys.intersection(rule.keys) and rule.broken(values, chosen):
            problems.found.append(
                (9, 1, f"{places(rule, chosen) or problems.source}: {rule.message.format_map(values)}")
            )
    problems.notes += remarks(values, chosen, parts, runs)


def places(rule: Rule, chosen: Where) -> str:
    """Where the options of a broken rule were given."""
    given = [key for key in rule.keys if key in chosen]
    return ", ".join(dict.fromkeys(chosen[key].where for key in given if differs(key, chosen) or len(given) == 1))


def remarks(values: Values, chosen: Where, parts: Phases, runs: bool) -> list[str]:
    """Lines about a recipe that is right, but may not do what its writer thinks."""
    lines: list[str] = []
    if runs and not parts.train and "do_train" not in chosen:
        what = "do_predict" if parts.predict else "do_eval"
        lines.append(f"{what} is given and do_train is not, so nothing is trained. Add do_train: true to train, too.")
    if not runs and not values["eval_dataset"] and was_held_out(values):
        lines.append(
            f"eval_dataset is not set: these are the examples that val_size: {values['val_size']:g} holds out of "
            "dataset, those of the training while dataset and seed are the same."
        )
    if parts.train and values["max_steps"] > 0 and "num_train_epochs" in chosen:
        lines.append(f"max_steps: {values['max_steps']} says how long to train; num_train_epochs has no effect.")
    if in_few_bits(values) and not parts.train:
        lines.append("Evaluating model in 4/8-bit mode may cause lower scores.")
    drawing = [key for key in ("temperature", "top_p", "top_k") if differs(key, chosen)]
    if drawing and not values["do_sample"]:
        lines.append(
            f"{', '.join(drawing)}: nothing is drawn, the likeliest token is taken. Add do_sample: true to draw."
        )
    if runs:
        spelled = [item.spelled for item in chosen.values()]
        writes = bool(answers(values)) and values["stage"] == "sft"
        lines += different_defaults(spelled, values, trains=parts.train, writes=writes)
    return lines
