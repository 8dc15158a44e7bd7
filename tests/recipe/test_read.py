"""Files, dicts and flags become the same values; what cannot be read is named with its line."""

import itertools
import json
from pathlib import Path

import pytest
import yaml

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.recipe import load_recipe


def test_yaml_json_dict_and_flags_give_the_same_recipe(recipe_file):
    values = {**NEEDED, "learning_rate": 1e-4, "lora_target_modules": ["q_proj", "v_proj"], "packing": True, "seed": 7}
    flags = "--model m --dataset d.jsonl --learning-rate 1e-4 --lora_target_modules q_proj,v_proj --packing --seed=7"
    found = [
        load_recipe(recipe_file(yaml.safe_dump(values))),
        load_recipe(recipe_file(json.dumps(values, indent="\t"), "recipe.json")),
        load_recipe(values),
        load_recipe(None, values),
        load_recipe(flags=flags.split()),
    ]
    assert all(recipe == found[0] for recipe in found)
    assert found[0].training == {"learning_rate": 1e-4, "packing": True, "seed": 7}


# reliability: 51
def test_a_key_that_stands_twice_is_an_error_with_both_lines(recipe_file):
    assert message(recipe_file(BASE + "seed: 1\nlora_r: 8\nseed: 1\n")) == (
        "recipe.yaml:5: key 'seed' is on line 3 and again on line 5."
    )
    assert "recipe.yaml:5: not valid YAML (key 'a' is on line 4 and again)" in message(
        recipe_file(BASE + "columns:\n  a: b\n  a: c\n")
    )
    assert "recipe.json:3: key 'seed'" in message(recipe_file('{"seed": 1,\n"lora_r": 2,\n"seed": 1}', "recipe.json"))


# reliability: 51
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "recipe.yaml is empty"),
        ("# nothing\n", "recipe.yaml is empty"),
        ("- a\n- b\n", "recipe.yaml:1: expected `key: value` lines, found a list."),
        ("just words\n", "recipe.yaml:1: expected `key: value` lines, found plain text."),
        (BASE + "columns:\n\ta: b\n", "recipe.yaml:4: a tab stands where YAML wants spaces"),
        (BASE + "seed: [1\nlora_r: 2\n", "recipe.yaml:4: not valid YAML"),
        (BASE + "seed: !!python/object:os.system 1\n", "recipe.yaml:3: not valid YAML"),
        (b"model: m\ndataset: caf\xe9\n", "recipe.yaml:2: the file is not UTF-8 text"),
        (BASE + "run_name: a\x00b\n", "recipe.yaml:3: not valid YAML"),
        (BASE + "seed: !!int abc\n", "recipe.yaml:3: not valid YAML (the value is not what its tag !!int says)."),
        (BASE + "seed: !!float abc\n", "recipe.yaml:3: not valid YAML (the value is not what its tag !!float says)."),
        (BASE + "run_name: !!timestamp abc\n", "recipe.yaml:3: not valid YAML (the value is not what its tag"),
        (BASE + f"columns: {'[' * 3000}{']' * 3000}\n", "recipe.yaml: its lists and mappings are nested too deep"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error_with_its_line(recipe_file, text, expected):
    assert expected in message(recipe_file(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"seed": 1,\n"lora_r" 2}', "recipe.json:2: not valid JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "recipe.json: not valid JSON (Exceeds the limit"),
        ("[1, 2]", "recipe.json:1: expected `key: value` lines, found a list."),
        ("\n", "recipe.json is empty"),
        (
            '{"seed": 1,\n"dataset_kwargs": {"a": [{"b": 1, "b": 2}]}}',
            "recipe.json:2: dataset_kwargs: its key 'b' stands",
        ),
        ('{"columns": ' + "[" * 3000 + "]" * 3000 + "}", "recipe.json: its lists and mappings are nested too deep"),
        ('{"' + "k" * 2000 + '": 1}', "recipe.json:1: unknown key 'kkk"),
    ],
)
def test_broken_json_is_an_error_with_its_line(recipe_file, text, expected):
    assert expected in message(recipe_file(text, "recipe.json"))


def test_json_is_read_as_json(recipe_file):
    """Not as YAML, which knows no DEL in a text, and colons and tabs in other places."""
    text = '{"model_name_or_path": "m",\t"dataset"\n:\t"d.jsonl", "run_name": "a\x7fb: #c\\t", "seed"\t:7 }\n'
    found = load_recipe(recipe_file(text, "recipe.json")).training
    assert found == {"run_name": "a\x7fb: #c\t", "seed": 7}


def test_a_recipe_that_does_not_exist_names_the_nearest(recipe_file):
    recipe_file(BASE)
    assert message("recpe.yaml") == "the recipe recpe.yaml does not exist. Did you mean 'recipe.yaml'?"
    assert "is a folder" in message(Path.cwd())
    assert "ends in .yaml, .yml, .json" in message(recipe_file(BASE, "recipe.toml"))


def test_a_recipe_is_a_path_or_a_dict():
    assert message(5) == "expected a recipe's path or a dict of options, got 5."


# ---- flags


def test_the_order_of_flags_does_not_matter():
    words = [
        ["--model", "m"],
        ["--dataset", "d"],
        ["--packing"],
        ["--max_steps", "-1"],
        ["--no-bf16"],
        ["--columns", "{a: b}"],
    ]
    recipes = [load_recipe(flags=[*itertools.chain(*order)]) for order in (words, words[::-1])]
    assert recipes[0] == recipes[1]
    assert recipes[0].training == {"packing": True, "max_steps": -1, "bf16": False}
    assert recipes[0].data.columns == {"a": "b"}


def test_a_flag_takes_several_words_where_a_list_fits():
    assert load_recipe(flags=["--model", "m", "--dataset", "a.jsonl", "b.jsonl"]).data.dataset == [
        "a.jsonl",
        "b.jsonl",
    ]


# reliability: 50
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--lora_r", "--lora_r: expected a whole number after it, found nothing."),
        (f"--seed {'9' * 5000}", "--seed: expected a whole number"),
        ("--seed 1 --seed 2", "--seed is given twice, as 1 and as 2."),
        ("--seed 1 other.yaml", "--seed takes one value, got '1 other.yaml'. The recipe comes first"),
        ("stray --seed 1", "'stray' is not a flag."),
        ("learning_rate=1e-4", "'learning_rate=1e-4' is not a flag. Write --learning_rate=1e-4."),
        ("--no-lora_r", "unknown flag '--no-lora_r'."),
        ("--no-lora_rnk", "unknown flag '--no-lora_rnk'."),
        ("--quantization_bit 4 8", "--quantization_bit takes one value, got '4 8'."),
    ],
)
def test_wrong_flags_are_named(flags, expected):
    assert expected in message(NEEDED, flags=flags.split())
