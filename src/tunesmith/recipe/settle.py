"""One value a key: a higher layer wins, two names of one option must agree, and what follows from what was given."""

from tunesmith.config import ModelFields
from tunesmith.recipe.given import FILE, Given, Problems

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
    return without_trust(with_length(chosen), problems)


def replaces(item: Given) -> tuple[str, ...]:
    """Options of a lower layer that make no sense beside `item`: `--adapter full` over a recipe with lora_r."""
    if item.key == "adapter":
        return UNUSED_BY_ADAPTER.get(item.value, ())
    return EITHER_OR.get(item.key, ())


def with_length(chosen: dict[str, Given]) -> dict[str, Given]:
    """`max_length` where LLaMA-Efficient-Tuning's lengths of prompt and answer are given in its place: their sum.

    Plain text has no answer: blocks of stage pt are `max_source_length` long.
    """
    source, target, stage = (chosen.get(key) for key in ("max_source_length", "max_target_length", "stage"))
    if "max_length" in chosen or source is None or source.value is None:
        return chosen
    if stage is not None and stage.value == "pt":
        return chosen | {"max_length": source._replace(key="max_length")}
    if target is None or target.value is None:
        return chosen
    return chosen | {"max_length": source._replace(key="max_length", value=source.value + target.value)}


def without_trust(chosen: dict[str, Given], problems: Problems) -> dict[str, Given]:
    """No recipe file may let a model's code run: whoever wrote it is not who runs it."""
    item = chosen.get("trust_remote_code")
    if item is None or not item.value or item.layer != FILE:
        return chosen
    sentence = (
        "a recipe may not allow a model's code to run, so it stays false. Pass --trust_remote_code if the model needs "
        "its own code and you trust it."
    )
    problems.notes.append(item.says(sentence))
    return {key: other for key, other in chosen.items() if other is not item}
