"""Which keys exist."""

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.recipe import load_recipe


# workflow: A1
def test_an_unknown_key_is_an_error_in_every_form(recipe_file):
    hint = " Did you mean 'learning_rate'?"
    assert message(recipe_file(BASE + "learnin_rate: 1\n")) == f"recipe.yaml:3: unknown key 'learnin_rate'.{hint}"
    name = recipe_file('{"model": "m", "dataset": "d",\n"learnin_rate": 1}', "recipe.json")
    assert message(name) == f"recipe.json:2: unknown key 'learnin_rate'.{hint}"
    assert message({**NEEDED, "learnin_rate": 1}) == f"unknown option 'learnin_rate'.{hint}"
    assert message(NEEDED, {"learnin_rate": 1}) == f"unknown option 'learnin_rate'.{hint}"
    assert message(NEEDED, flags=["--learnin_rate", "1"]) == f"unknown flag '--learnin_rate'.{hint}"


def test_the_nearest_key_may_be_an_alias_or_another_programs():
    assert message(NEEDED, {"lora_rnk": 8}) == "unknown option 'lora_rnk'. Did you mean 'lora_rank'?"
    assert "Did you mean 'quantization_bit'?" in message(NEEDED, {"quantisation_bit": 8})


def test_aliases_are_the_same_option():
    recipe = load_recipe({"model": "m", "dataset": "d", "lora_rank": 4, "cutoff_len": 99, "finetuning_type": "lora"})
    assert (recipe.model.lora_r, recipe.training) == (4, {"max_length": 99})


def test_a_foreign_key_that_is_switched_off_does_no_harm():
    recipe = load_recipe(NEEDED, {"generation_config": None, "use_galore": "no", "save_safetensors": True})
    assert (recipe.training, recipe.notes) == ({}, [])
    assert "expected true or false, got 'perhaps'" in message(NEEDED, {"use_galore": "perhaps"})
