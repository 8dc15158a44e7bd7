"""Which keys exist, which value wins, what contradicts, what is missing."""

import pytest
import yaml

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.config import ModelFields
from tunesmith.recipe import load_recipe
from tunesmith.recipe.rules import CONTRADICTIONS, NOT_YET


def test_an_unknown_python_keyword_names_the_nearest():
    assert message(NEEDED, {"lora_rnk": 8}) == "unknown option 'lora_rnk'. Did you mean 'lora_rank'?"


def test_aliases_are_the_same_option():
    recipe = load_recipe({"model": "m", "dataset": "d", "lora_rank": 4, "cutoff_len": 99, "finetuning_type": "lora"})
    assert (recipe.model.lora_r, recipe.training) == (4, {"max_length": 99})


@pytest.mark.parametrize("key", sorted(NOT_YET))
def test_what_this_version_does_not_do_is_an_error(key):
    assert f"'{key}' {NOT_YET[key]}" in message(NEEDED, {key: "x"})


def test_a_foreign_key_that_is_switched_off_does_no_harm():
    assert load_recipe(NEEDED, {"generation_config": None}).training == {}


# ---- one value a key


def test_a_later_layer_wins(recipe_file):
    recipe = load_recipe(
        recipe_file(BASE + "lora_r: 1\nlora_alpha: 1\nseed: 1\n"), {"lora_alpha": 2, "seed": 2}, flags=["--seed", "3"]
    )
    assert (recipe.model.lora_r, recipe.model.lora_alpha, recipe.training["seed"]) == (1, 2, 3)
    assert [recipe.given[key] for key in ("lora_r", "lora_alpha", "seed")] == [
        "recipe.yaml:3",
        "argument lora_alpha",
        "--seed",
    ]


def test_two_names_of_one_option_must_agree(recipe_file):
    assert message(recipe_file(BASE + "lora_r: 8\nlora_rank: 16\n")) == (
        "recipe.yaml:4: 'lora_r' (recipe.yaml:3) and 'lora_rank' name one option and differ: 8 and 16. Keep 'lora_r'."
    )
    assert load_recipe(recipe_file(BASE + "lora_r: 8\nlora_rank: 8\n")).model.lora_r == 8
    assert load_recipe(recipe_file(BASE + "lora_rank: 8\n"), flags=["--lora_r", "4"]).model.lora_r == 4


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ({"num_train_epochs": 3}, {"max_steps": 10}),
        ({"val_size": 0.1}, {"eval_dataset": "e"}),
        ({"lora_r": 32}, {"adapter": "full"}),
        ({"adapter": "freeze", "freeze_trainable_layers": 1}, {"adapter": "lora"}),
    ],
)
def test_a_flag_takes_the_place_of_what_it_excludes(recipe_file, low, high):
    flags = [word for key, value in high.items() for word in (f"--{key}", str(value))]
    assert not set(low) - set(high) & set(load_recipe(recipe_file(BASE + yaml.safe_dump(low)), flags=flags).given)


# ---- contradictions


BROKEN = [
    ({"bf16": True, "fp16": True}, "bf16 and fp16 cannot both be true"),
    ({"packing": True, "train_sampling_strategy": "group_by_length"}, "nothing to group"),
    ({"adapter": "full", "lora_r": 8}, "LoRA options have no effect with adapter: full"),
    ({"adapter": "freeze", "use_dora": True}, "LoRA options have no effect with adapter: freeze"),
    ({"freeze_trainable_layers": 1}, "freeze options have no effect with adapter: lora"),
    ({"adapter": "full", "do_merge": True}, "do_merge has nothing to merge"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit cannot both be true"),
    ({"load_in_4bit": True, "adapter": "full"}, "no weights that adapter: full could train"),
    ({"load_in_8bit": True, "gguf_file": "m.gguf"}, "gguf_file is converted to full precision"),
    ({"load_in_4bit": True, "lora_init": "pissa"}, "lora_init: pissa takes a part out of the base's weights"),
    ({"use_bnb_nested_quant": True}, "4-bit options have no effect without load_in_4bit: true"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
    ({"eval_strategy": "steps"}, "eval_strategy: steps needs held-out examples"),
    ({"compare_rows": 3}, "compare_rows needs held-out examples"),
    ({"eval_dataset": "e", "val_size": 0.1}, "both say what is held out"),
    ({"warmup_steps": 20, "max_steps": 10}, "warmup_steps (20) is more than max_steps (10)"),
    ({"max_steps": 10, "num_train_epochs": 1}, "both say how long to train"),
    ({"tokens_per_batch": 512}, "tokens_per_batch (512) is below max_length (1024)"),
    ({"do_train": False}, "do_train: false does not fit"),
]


@pytest.mark.parametrize(("given", "expected"), BROKEN)
def test_a_contradiction_is_an_error_that_names_its_places(given, expected):
    found = message(NEEDED, given)
    assert expected in found
    assert "argument " in found


def test_every_contradiction_has_a_test():
    keys = [set(given) for given, _ in BROKEN]
    assert all(any(set(rule.keys) & given for given in keys) for rule in CONTRADICTIONS)


def test_a_wrong_value_is_not_also_a_contradiction():
    assert message(NEEDED, {"val_size": "some", "eval_strategy": "steps"}).count("\n") == 0


def test_a_recipe_file_may_not_allow_foreign_code(recipe_file):
    name = recipe_file(BASE + "trust_remote_code: true\n")
    for task in ("train", "chat"):
        assert "recipe.yaml:3: a recipe may not allow a model's code" in message(name, task=task)
    assert load_recipe(recipe_file(BASE), flags=["--trust_remote_code"]).model.trust_remote_code


# ---- what must be there


def test_what_is_missing_depends_on_the_task():
    assert message({}).splitlines()[1:] == [
        "  the options: model_name_or_path is not set. Name the base model: a folder or a Hub id.",
        "  the options: dataset is not set. Name the examples: a file, a folder or a Hub id.",
    ]
    assert "eval_dataset is not set" in message({"model": "m"}, task="eval")
    assert load_recipe({"model": "m"}, task="chat").model == ModelFields(model_name_or_path="m")
