"""Which of several values wins, and what follows from what was given."""

import pytest
import yaml

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.recipe import load_recipe


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


def test_a_keyword_wins_over_a_recipe_that_is_a_dict():
    assert load_recipe({**NEEDED, "lora_r": 4}, {"lora_r": 8}).model.lora_r == 8


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


# workflow: V12
def test_the_lengths_of_prompt_and_answer_make_the_length_of_an_example():
    both = {"max_source_length": 300, "max_target_length": 200}
    assert load_recipe(NEEDED, both).training["max_length"] == 500
    assert load_recipe(NEEDED, both | {"max_length": 400}).training["max_length"] == 400
    assert load_recipe(NEEDED, both | {"stage": "pt"}).training["max_length"] == 300
    assert "max_length" not in load_recipe(NEEDED, {"max_source_length": 300}).training
    assert "max_length" not in load_recipe(NEEDED, {"max_target_length": 300}).training


def test_a_recipe_file_does_not_allow_foreign_code(recipe_file):
    name = recipe_file(BASE + "trust_remote_code: true\n")
    for task in ("train", "chat"):
        recipe = load_recipe(name, task=task)
        assert recipe.model.trust_remote_code is False
        assert recipe.notes[0].startswith("recipe.yaml:3: trust_remote_code: a recipe may not allow a model's code")
    trusted = load_recipe(name, flags=["--trust_remote_code", "--model_revision", "c0ffee" * 6 + "0000"])
    assert (trusted.model.trust_remote_code, trusted.notes) == (True, [])
