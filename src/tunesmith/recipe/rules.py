"""What a recipe may say: which keys, which of several values wins, what cannot hold together, what must be there."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from tunesmith.config import ALIASES, ModelFields
from tunesmith.lookup import did_you_mean
from tunesmith.recipe.given import FILE, FLAG, Given, Problems
from tunesmith.recipe.schema import options

Task = Literal["train", "check", "eval", "predict", "chat"]

# Words that other programs or transformers know and this version does not act on: an error, never ignored.
NOT_YET: dict[str, str] = {
    "generation_config": "is not implemented. Set max_new_tokens, temperature, top_p, ... directly",
    "warmup_ratio": "is no option of transformers 5. Write it as warmup_steps: below 1 that is a share of the run",
    "quantization_bit": "does not exist. Write load_in_4bit: true or load_in_8bit: true",
    "save_safetensors": "does not exist: weights are always saved as safetensors",
}


def named(given: list[Given], problems: Problems) -> list[Given]:
    """The values whose keys exist, under their canonical names."""
    known = options()
    result = []
    for item in given:
        key = ALIASES.get(item.spelled, item.spelled)
        if key in NOT_YET:
            if key not in known or item.value not in (known[key].default, False, None):
                problems.add(item, f"{item.where}: '{item.spelled}' {NOT_YET[key]}.", key)
        elif key in known:
            result.append(item._replace(key=key))
        else:
            hint = did_you_mean(item.spelled, [*known, *ALIASES])
            what = f"{item.where}: unknown key '{item.spelled}'"
            if item.layer != FILE:
                what = f"unknown {'flag' if item.layer == FLAG else 'option'} '{item.where.removeprefix('argument ')}'"
            nearest = hint.split("'")[1] if hint else item.spelled
            problems.add(item, f"{what}.{hint}", ALIASES.get(nearest, nearest))
    return result


# ------------------------------------------------------------------------------------------ one value a key

LORA_KEYS = tuple(
    n for n in ModelFields.__dataclass_fields__ if n.startswith("lora_") or n in ("use_rslora", "use_dora")
)
FREEZE_KEYS = tuple(n for n in ModelFields.__dataclass_fields__ if n.startswith("freeze_"))
UNUSED_BY_ADAPTER = {"lora": FREEZE_KEYS, "full": LORA_KEYS + FREEZE_KEYS, "freeze": LORA_KEYS}
# Given in a higher layer, the one takes the place of the other: `--max_steps 10` over a recipe with num_train_epochs.
EITHER_OR = {
    "max_steps": ("num_train_epochs",),
    "num_train_epochs": ("max_steps",),
    "eval_dataset": ("val_size",),
    "val_size": ("eval_dataset",),
}


def settle(given: list[Given], problems: Problems) -> dict[str, Given]:
    """One value a key: the highest layer's. Two spellings of one key in one layer must agree."""
    chosen: dict[str, Given] = {}
    for item in given:
        old = chosen.get(item.key)
        if old is not None and old.layer == item.layer and old.value != item.value:
            if old.spelled == item.spelled:
                problems.add(item, f"{item.where} is given twice, as {old.value!r} and as {item.value!r}.")
            else:
                place = f"{item.where}: " if item.layer == FILE else ""
                problems.add(
                    item,
                    f"{place}'{old.spelled}' ({old.where}) and '{item.spelled}' name one option and differ: "
                    f"{old.value!r} and {item.value!r}. Keep '{item.key}'.",
                )
        for replaced in replaces(item):
            if replaced in chosen and chosen[replaced].layer < item.layer:
                del chosen[replaced]
        chosen[item.key] = item
    return chosen


def replaces(item: Given) -> tuple[str, ...]:
    """Options of a lower layer that make no sense beside `item`: `--adapter full` over a recipe with lora_r."""
    if item.key == "adapter":
        return UNUSED_BY_ADAPTER.get(item.value, ())
    return EITHER_OR.get(item.key, ())


# ------------------------------------------------------------------------------------------ contradictions

Values = Mapping[str, Any]
Where = Mapping[str, Given]


class Rule(NamedTuple):
    """Options that contradict each other; left unchecked where one of `keys` is itself wrong."""

    keys: tuple[str, ...]
    broken: Callable[[Values, Where], Any]
    message: str
    """A sentence in which `{name}` stands for an option's value."""


def has_eval(v: Values) -> bool:
    """Whether there are held-out examples."""
    return bool(v["eval_dataset"]) or v["val_size"] > 0


def in_few_bits(v: Values) -> Any:
    """Whether the base is to be held in 4 or 8 bits."""
    return v["load_in_4bit"] or v["load_in_8bit"]


def gives_any(keys: Iterable[str], given: Where) -> bool:
    """Whether one of `keys` was given a value of its own."""
    return any(differs(key, given) for key in keys)


def differs(key: str, given: Where) -> bool:
    """Whether a key was given with a value other than its default (a resolved recipe gives them all)."""
    return key in given and given[key].value != options()[key].default


# What no recipe file may say, for any task; then what cannot hold together in training.
SAFETY = [
    Rule(
        ("trust_remote_code",),
        lambda v, given: v["trust_remote_code"] and given["trust_remote_code"].layer == FILE,
        "a recipe may not allow a model's code to run. Remove it; pass --trust_remote_code if you trust the model.",
    )
]
CONTRADICTIONS = [
    Rule(
        ("bf16", "fp16"),
        lambda v, given: v["bf16"] and v["fp16"],
        "bf16 and fp16 cannot both be true. Keep one.",
    ),
    Rule(
        ("packing", "train_sampling_strategy"),
        lambda v, given: v["packing"] and v["train_sampling_strategy"] == "group_by_length",
        "packing fills every row, so group_by_length has nothing to group. Remove train_sampling_strategy.",
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
        ("bnb_4bit_quant_type", "use_bnb_nested_quant", "load_in_4bit"),
        lambda v, given: not v["load_in_4bit"] and gives_any(("bnb_4bit_quant_type", "use_bnb_nested_quant"), given),
        "4-bit options have no effect without load_in_4bit: true. Add it, or remove them.",
    ),
    Rule(
        ("do_merge", "adapter"),
        lambda v, given: v["do_merge"] and v["adapter"] in ("full", "freeze"),
        "do_merge has nothing to merge with adapter: {adapter}. Remove it.",
    ),
    Rule(
        ("load_best_model_at_end", "eval_strategy"),
        lambda v, given: v["load_best_model_at_end"] and v["eval_strategy"] == "no",
        "load_best_model_at_end needs evaluations during the run. Set eval_strategy: steps or epoch.",
    ),
    Rule(
        ("eval_strategy", "eval_dataset", "val_size"),
        lambda v, given: v["eval_strategy"] != "no" and not has_eval(v),
        "eval_strategy: {eval_strategy} needs held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("compare_rows", "eval_dataset", "val_size"),
        lambda v, given: v["compare_rows"] and not has_eval(v),
        "compare_rows needs held-out examples. Set eval_dataset or val_size.",
    ),
    Rule(
        ("eval_dataset", "val_size"),
        lambda v, given: v["eval_dataset"] and v["val_size"] > 0,
        "eval_dataset and val_size both say what is held out. Keep one.",
    ),
    Rule(
        ("warmup_steps", "max_steps"),
        lambda v, given: 0 < v["max_steps"] < v["warmup_steps"],
        "warmup_steps ({warmup_steps:g}) is more than max_steps ({max_steps}). Lower it.",
    ),
    Rule(
        ("max_steps", "num_train_epochs"),
        lambda v, given: v["max_steps"] > 0 and "num_train_epochs" in given,
        "max_steps and num_train_epochs both say how long to train. Keep one.",
    ),
    Rule(
        ("tokens_per_batch", "max_length"),
        lambda v, given: v["tokens_per_batch"] and v["max_length"] and v["tokens_per_batch"] < v["max_length"],
        "tokens_per_batch ({tokens_per_batch}) is below max_length ({max_length}): the longest example would not fit.",
    ),
    Rule(
        ("do_train",),
        lambda v, given: "do_train" in given and not v["do_train"],
        "do_train: false does not fit `tunesmith train`. Remove it, or use `tunesmith eval` or `tunesmith predict`.",
    ),
]


# ------------------------------------------------------------------------------------------ what must be there

NEEDS: dict[str, tuple[str, ...]] = {
    "train": ("model_name_or_path", "dataset"),
    "check": ("model_name_or_path", "dataset"),
    "eval": ("model_name_or_path", "eval_dataset"),
    "predict": ("model_name_or_path", "eval_dataset"),
    "chat": ("model_name_or_path",),
}
HOW_TO_SET = {
    "model_name_or_path": "Name the base model: a folder or a Hub id.",
    "dataset": "Name the examples: a file, a folder or a Hub id.",
    "eval_dataset": "Name the held-out examples: --eval_dataset FILE.",
}


def check(chosen: Where, problems: Problems, task: Task) -> None:
    """Add what is missing and what contradicts itself."""
    values = {name: option.default for name, option in options().items()}
    values |= {key: item.value for key, item in chosen.items()}
    for key in NEEDS[task]:
        if not values[key] and key not in problems.keys:
            problems.found.append((9, 0, f"{problems.source}: {key} is not set. {HOW_TO_SET[key]}"))
    rules = SAFETY + (CONTRADICTIONS if task in ("train", "check") else [])
    for rule in rules:
        if not problems.keys.intersection(rule.keys) and rule.broken(values, chosen):
            given = [key for key in rule.keys if key in chosen]
            places = [chosen[key].where for key in given if differs(key, chosen) or len(given) == 1]
            message = rule.message.format_map(values)
            problems.found.append((9, 1, f"{', '.join(places) or problems.source}: {message}"))
