"""recipe.yaml and flags → Recipe: values, errors with lines, contradictions, the way back."""

import itertools
import json
from pathlib import Path

import pytest
import yaml
from annotated_types import Ge, Gt

from tunesmith.config import CONFIGS, DataConfig, ModelConfig, Recipe
from tunesmith.errors import ConfigError
from tunesmith.recipe import (
    CONTRADICTIONS,
    NOT_YET,
    RANGES,
    coerce,
    load_for_model,
    load_recipe,
    options,
    options_help,
    resolved,
)

BASE = "model_name_or_path: m\ndataset: d.jsonl\n"
NEEDED = {"model_name_or_path": "m", "dataset": "d.jsonl"}


@pytest.fixture
def recipe_file(tmp_path, monkeypatch):
    """Write `recipe.yaml` (or another name) in the current directory and give its name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes, name: str = "recipe.yaml") -> str:
        Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


def message(*args, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(*args, **kwargs)
    return str(caught.value)


def without_places(recipe: Recipe) -> tuple:
    return recipe.run, recipe.model, recipe.data, recipe.training, recipe.decoding


# ---- values


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
    assert all(without_places(recipe) == without_places(found[0]) for recipe in found)
    assert found[0].training == {"learning_rate": 1e-4, "packing": True, "seed": 7}


@pytest.mark.parametrize("text", ["1e-4", "1E-4", ".0001", "1.e-4", "0.0001", "'1e-4'"])
def test_every_spelling_of_a_number_is_a_number(recipe_file, text):
    assert load_recipe(recipe_file(BASE + f"learning_rate: {text}\n")).training["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("text", "value"), [("no", False), ("yes", True), ("off", False), ("True", True), ("false", False)]
)
def test_yes_and_no_are_booleans_where_one_is_wanted(recipe_file, text, value):
    recipe = load_recipe(recipe_file(BASE + f"bf16: {text}\nsave_strategy: no\n"))
    assert recipe.training == {"bf16": value, "save_strategy": "no"}


def test_text_options_keep_what_was_typed(recipe_file):
    recipe = load_recipe(recipe_file(BASE + "run_name: 010\nmodel_revision: 1e5\nsystem_prompt: 12:30\n"))
    assert recipe.training["run_name"] == "010"
    assert recipe.model.model_revision == "1e5"
    assert recipe.data.system_prompt == "12:30"


def test_a_leading_zero_does_not_make_a_number_octal(recipe_file):
    assert load_recipe(recipe_file(BASE + "lora_r: 010\n")).model.lora_r == 10


@pytest.mark.parametrize("text", ["null", "~", "None", ""])
def test_null_is_none(recipe_file, text):
    assert load_recipe(recipe_file(BASE + f"max_length: {text}\n")).training == {"max_length": None}


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
    assert without_places(recipes[0]) == without_places(recipes[1])
    assert recipes[0].training == {"packing": True, "max_steps": -1, "bf16": False}
    assert recipes[0].data.columns == {"a": "b"}


def test_a_flag_takes_several_words_where_a_list_fits():
    assert load_recipe(flags=["--model", "m", "--dataset", "a.jsonl", "b.jsonl"]).data.dataset == [
        "a.jsonl",
        "b.jsonl",
    ]


def test_aliases_are_the_same_option():
    recipe = load_recipe({"model": "m", "dataset": "d", "lora_rank": 4, "cutoff_len": 99, "finetuning_type": "lora"})
    assert (recipe.model.lora_r, recipe.training) == (4, {"max_length": 99})


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


def test_a_dataset_beside_the_recipe_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text("{}")
    (tmp_path / "deep" / "recipe.yaml").write_text("model: m\ndataset: [rows.jsonl, org/on-the-hub]\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("deep/recipe.yaml").data.dataset == [str(Path("deep/rows.jsonl")), "org/on-the-hub"]
    (tmp_path / "rows.jsonl").write_text("{}")  # the current directory comes first
    assert load_recipe("deep/recipe.yaml").data.dataset == ["rows.jsonl", "org/on-the-hub"]


# ---- wrong keys and values


def test_all_problems_stand_in_one_report_in_file_order(recipe_file):
    text = BASE + "learnin_rate: 1e-4\nlora_r: eight\nlora_dropout: 1.5\npacking_strategy: bfdd\n"
    assert message(recipe_file(text), flags=["--lora_alpha", "0", "--sed", "1"]).splitlines() == [
        "6 problems in recipe.yaml:",
        "  recipe.yaml:3: unknown key 'learnin_rate'. Did you mean 'learning_rate'?",
        "  recipe.yaml:4: lora_r: expected a whole number, got 'eight'.",
        "  recipe.yaml:5: lora_dropout: expected a number of at least 0 and at most 1, got 1.5.",
        "  recipe.yaml:6: packing_strategy: expected one of bfd, wrapped, got 'bfdd'. Did you mean 'bfd'?",
        "  --lora_alpha: expected a whole number of at least 1, got 0.",
        "  unknown flag '--sed'. Did you mean 'seed'?",
    ]


def test_an_unknown_python_keyword_names_the_nearest():
    assert message(NEEDED, {"lora_rnk": 8}) == "unknown option 'lora_rnk'. Did you mean 'lora_rank'?"


def test_one_problem_is_one_line(recipe_file):
    assert message(recipe_file(BASE + "lora_r: 8.5\n")) == "recipe.yaml:3: lora_r: expected a whole number, got 8.5."


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
        ({"max_steps": -2}, "argument max_steps: expected a whole number of at least -1, got -2."),
    ],
)
def test_a_wrong_value_says_what_was_wanted(given, expected):
    assert expected in message(NEEDED, given)


@pytest.mark.parametrize(
    "name", sorted(name for name in RANGES if any(isinstance(mark, Gt | Ge) for mark in RANGES[name]))
)
def test_a_value_below_its_range_is_an_error(name):
    low = next(m.gt if isinstance(m, Gt) else m.ge - 1 for m in RANGES[name] if isinstance(m, Gt | Ge))
    assert f"argument {name}: expected" in message(NEEDED, {name: low})


def test_a_key_that_stands_twice_is_an_error_with_both_lines(recipe_file):
    assert message(recipe_file(BASE + "seed: 1\nlora_r: 8\nseed: 1\n")) == (
        "recipe.yaml:5: key 'seed' is on line 3 and again on line 5."
    )
    assert "recipe.yaml:5: not valid YAML (key 'a' is on line 4 and again)" in message(
        recipe_file(BASE + "columns:\n  a: b\n  a: c\n")
    )
    assert "recipe.json:3: key 'seed'" in message(recipe_file('{"seed": 1,\n"lora_r": 2,\n"seed": 1}', "recipe.json"))


def test_two_names_of_one_option_must_agree(recipe_file):
    assert message(recipe_file(BASE + "lora_r: 8\nlora_rank: 16\n")) == (
        "recipe.yaml:4: 'lora_r' (recipe.yaml:3) and 'lora_rank' name one option and differ: 8 and 16. Keep 'lora_r'."
    )
    assert load_recipe(recipe_file(BASE + "lora_r: 8\nlora_rank: 8\n")).model.lora_r == 8
    assert load_recipe(recipe_file(BASE + "lora_rank: 8\n"), flags=["--lora_r", "4"]).model.lora_r == 4


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
    ],
)
def test_a_file_that_is_no_recipe_is_an_error_with_its_line(recipe_file, text, expected):
    assert expected in message(recipe_file(text))


def test_broken_json_is_an_error_with_its_line(recipe_file):
    assert "recipe.json:2: not valid JSON" in message(recipe_file('{"seed": 1,\n"lora_r" 2}', "recipe.json"))


def test_a_recipe_that_does_not_exist_names_the_nearest(recipe_file):
    recipe_file(BASE)
    assert message("recpe.yaml") == "the recipe recpe.yaml does not exist. Did you mean 'recipe.yaml'?"
    assert "is a folder" in message(Path.cwd())
    assert "ends in .yaml, .yml, .json" in message(recipe_file(BASE, "recipe.toml"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--lora_r", "--lora_r: expected a whole number after it, found nothing."),
        ("--seed 1 --seed 2", "--seed is given twice, as 1 and as 2."),
        ("--seed 1 other.yaml", "--seed takes one value, got '1 other.yaml'. The recipe comes first"),
        ("stray --seed 1", "'stray' is not a flag."),
        ("--no-lora_r", "unknown flag '--no-lora_r'."),
    ],
)
def test_wrong_flags_are_named(flags, expected):
    assert expected in message(NEEDED, flags=flags.split())


# ---- contradictions

BROKEN = [
    ({"bf16": True, "fp16": True}, "bf16 and fp16 cannot both be true"),
    ({"packing": True, "train_sampling_strategy": "group_by_length"}, "nothing to group"),
    ({"adapter": "full", "lora_r": 8}, "LoRA options have no effect with adapter: full"),
    ({"adapter": "freeze", "use_dora": True}, "LoRA options have no effect with adapter: freeze"),
    ({"freeze_trainable_layers": 1}, "freeze options have no effect with adapter: lora"),
    ({"adapter": "full", "do_merge": True}, "do_merge has nothing to merge"),
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


@pytest.mark.parametrize("key", sorted(NOT_YET))
def test_what_this_version_does_not_do_is_an_error(key):
    assert f"'{key}' {NOT_YET[key]}" in message(NEEDED, {key: "x"})


def test_a_foreign_key_that_is_switched_off_does_no_harm():
    assert load_recipe(NEEDED, {"predict_with_generate": False}).training == {}


def test_a_recipe_file_may_not_allow_foreign_code(recipe_file):
    name = recipe_file(BASE + "trust_remote_code: true\n")
    for task in ("train", "chat"):
        assert "recipe.yaml:3: a recipe may not allow a model's code" in message(name, task=task)
    assert load_recipe(recipe_file(BASE), flags=["--trust_remote_code"]).model.trust_remote_code


def test_what_is_missing_depends_on_the_task():
    assert message({}).splitlines()[1:] == [
        "  the options: model_name_or_path is not set. Name the base model: a folder or a Hub id.",
        "  the options: dataset is not set. Name the examples: a file, a folder or a Hub id.",
    ]
    assert "eval_dataset is not set" in message({"model": "m"}, task="eval")
    assert load_recipe({"model": "m"}, task="chat").model == ModelConfig(model_name_or_path="m")


# ---- a model that exists


@pytest.fixture
def run_directory(recipe_file):
    Path("run").mkdir()
    recipe_file(
        BASE + "gguf_file: x.gguf\nval_size: 0.1\ntemperature: 0.5\noutput_dir: elsewhere\n", "run/recipe.yaml"
    )
    return Path("run")


def test_a_run_directory_gives_its_model_and_its_options(run_directory):
    (run_directory / "adapter_config.json").write_text("{}")
    recipe = load_for_model("run", flags=["--eval_dataset", "e.jsonl"], task="eval")
    assert recipe.model.model_name_or_path == recipe.training["output_dir"] == "run"
    assert recipe.data == DataConfig(dataset="d.jsonl", eval_dataset="e.jsonl")
    assert (recipe.decoding.temperature, recipe.model.gguf_file) == (0.5, "x.gguf")


def test_a_run_with_a_whole_model_forgets_its_base(run_directory):
    (run_directory / "config.json").write_text("{}")
    assert load_for_model("run", task="chat").model.gguf_file is None


def test_a_run_that_holds_no_model_is_an_error(run_directory):
    with pytest.raises(ConfigError, match="holds no trained model"):
        load_for_model("run", task="chat")


def test_a_model_folder_hub_id_or_recipe_is_used_as_it_is(recipe_file):
    Path("model").mkdir()
    assert load_for_model("model", task="chat").model.model_name_or_path == "model"
    assert load_for_model("org/name", task="chat").model.model_name_or_path == "org/name"
    assert load_for_model(recipe_file(BASE), task="chat").model.model_name_or_path == "m"


# ---- the way back


def test_a_resolved_recipe_loads_back_to_the_same_one(recipe_file):
    flags = "--val_size 0.1 --lora_r 4 --eval_strategy steps --eval_steps 5 --packing --report_to none"
    first = load_recipe(NEEDED, {"columns": {"a": "b"}}, flags=flags.split())
    name = recipe_file(yaml.safe_dump(resolved(first), sort_keys=False))
    second = load_recipe(name)
    assert resolved(second) == resolved(first)
    assert (second.run, second.model, second.data, second.decoding) == (
        first.run,
        first.model,
        first.data,
        first.decoding,
    )
    assert second.training.items() >= first.training.items()
    assert without_places(load_recipe(recipe_file(yaml.safe_dump(resolved(second))))) == without_places(second)


@pytest.mark.parametrize("adapter", ["full", "freeze"])
def test_a_resolved_recipe_of_every_adapter_is_no_contradiction(recipe_file, adapter):
    first = load_recipe(NEEDED, {"adapter": adapter, "max_steps": 5})
    assert load_recipe(recipe_file(yaml.safe_dump(resolved(first)))).model.adapter == adapter


def test_a_resolved_recipe_holds_every_own_option_but_no_secret_and_no_trust():
    values = resolved(load_recipe(NEEDED, {"hub_token": "hf_secret", "trust_remote_code": True, "seed": 3}))
    own = [name for name, *_ in options_help(CONFIGS)]
    assert [name for name in own if name not in values] == ["trust_remote_code"]
    assert values["seed"] == 3
    assert "hub_token" not in values


def test_help_tells_name_type_default_and_text_of_every_option():
    rows = {name: (kind, default, text) for name, kind, default, text in options_help(CONFIGS)}
    assert rows["lora_r"][:2] == ("int ≥ 1", "16")
    assert rows["packing"][:2] == ("bool", "false")
    assert rows["too_long"][0] == "error|drop|truncate|keep_last_turns"
    assert all(text for _, _, text in rows.values())


def test_every_shipped_recipe_parses():
    recipes = list((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).model.model_name_or_path
