"""Values as written → values as declared, or what was wanted."""

import pytest
from annotated_types import Ge, Gt

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.recipe import load_recipe
from tunesmith.recipe.coerce import coerce
from tunesmith.recipe.schema import RANGES, options


# reliability: 51
@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "1.e-4", "0.0001", "'1e-4'"])
def test_every_spelling_of_a_number_is_a_number(recipe_file, text):
    assert load_recipe(recipe_file(BASE + f"learning_rate: {text}\n")).training["learning_rate"] == 1e-4


# reliability: 51
@pytest.mark.parametrize(
    ("text", "value"), [("no", False), ("yes", True), ("off", False), ("True", True), ("false", False)]
)
def test_yes_and_no_are_booleans_where_one_is_wanted(recipe_file, text, value):
    recipe = load_recipe(recipe_file(BASE + f"bf16: {text}\nsave_strategy: no\n"))
    assert recipe.training == {"bf16": value, "save_strategy": "no"}


# reliability: 51
def test_text_options_keep_what_was_typed(recipe_file):
    recipe = load_recipe(recipe_file(BASE + "run_name: 010\nmodel_revision: 1e5\nsystem_prompt: 12:30\n"))
    assert recipe.training["run_name"] == "010"
    assert recipe.model.model_revision == "1e5"
    assert recipe.data.system_prompt == "12:30"


# reliability: 51
def test_a_leading_zero_does_not_make_a_number_octal(recipe_file):
    assert load_recipe(recipe_file(BASE + "lora_r: 010\n")).model.lora_r == 10


@pytest.mark.parametrize("text", ["null", "~", "None", ""])
def test_null_is_none(recipe_file, text):
    assert load_recipe(recipe_file(BASE + f"max_length: {text}\n")).training == {"max_length": None}


def test_options_of_transformers_arrive_as_plain_values():
    flags = ["--lr_scheduler_type", "cosine", "--optim=sgd", "--num_train_epochs", "2", "--logging_first_step"]
    recipe = load_recipe(NEEDED, flags=flags)
    assert recipe.training == {
        "lr_scheduler_type": "cosine",
        "optim": "sgd",
        "num_train_epochs": 2.0,
        "logging_first_step": True,
    }


@pytest.mark.parametrize("name", sorted(options()))
def test_every_default_passes_its_own_type(name):
    option = options()[name]
    if option.default is not None:
        default = option.default.value if hasattr(option.default, "value") else option.default
        assert coerce(default, option.annotation) == default


# reliability: 52
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lora_r": True}, "argument lora_r: expected a whole number, got True."),
        ({"learning_rate": 0}, "argument learning_rate: expected a number above 0, got 0."),
        ({"learning_rate": float("nan")}, "argument learning_rate: expected a number, got nan."),
        ({"learning_rate": "fast"}, "argument learning_rate: expected a number, got 'fast'."),
        ({"packing": 3}, "argument packing: expected true or false, got 3."),
        ({"max_samples": None, "lora_r": None}, "argument lora_r: expected a whole number, got nothing."),
        ({"columns": "a"}, "argument columns: expected a mapping, got 'a'."),
        ({"columns": "{a: "}, "argument columns: expected a YAML list or mapping, got '{a: '"),
        ({"split": 3}, "argument split: expected text, got 3."),
        ({"lr_scheduler_type": "cosin"}, "Did you mean 'cosine'?"),
        ({"train_sampling_strategy": "sequentail"}, "Did you mean 'sequential'?"),
        ({"stage": 3}, "argument stage: expected one of pt, sft, rm, got 3."),
        ({"max_steps": -2}, "argument max_steps: expected a whole number of at least -1, got -2."),
    ],
)
def test_a_wrong_value_says_what_was_wanted(given, expected):
    assert expected in message(NEEDED, given)


# reliability: 52
@pytest.mark.parametrize(
    "name", sorted(name for name in RANGES if any(isinstance(mark, Gt | Ge) for mark in RANGES[name]))
)
def test_a_value_below_its_range_is_an_error(name):
    low = next(m.gt if isinstance(m, Gt) else m.ge - 1 for m in RANGES[name] if isinstance(m, Gt | Ge))
    assert f"argument {name}: expected" in message(NEEDED, {name: low})


# workflow: A2 A3 A4
def test_comma_lists_are_split_and_texts_are_not(recipe_file):
    text = 'dataset: "a, b"\nmodel: m\ncheckpoint_dir: "x, y"\nlora_target: q_proj, v_proj\n'
    text += "system_prompt: Be brief, be kind.\n"
    recipe = load_recipe(recipe_file(text + "chat_template: '{{ a }}, [b]'\n"))
    assert (recipe.data.dataset, recipe.model.checkpoint_dir) == (["a", "b"], ["x", "y"])
    assert recipe.model.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.data.system_prompt == "Be brief, be kind."
    assert recipe.training["chat_template"] == "{{ a }}, [b]"


def test_several_system_prompts_may_be_a_list_on_one_line():
    two = {"model": "m", "dataset": "a,b"}
    for given in ('["one, and", "two"]', ["one, and", "two"]):
        assert load_recipe(two, {"system_prompt": given}).data.system_prompt == ["one, and", "two"]
    assert load_recipe(two, flags=["--system_prompt", "one, and", "two"]).data.system_prompt == ["one, and", "two"]
    assert load_recipe(two, {"system_prompt": "[INST] {x}, one"}).data.system_prompt == "[INST] {x}, one"
