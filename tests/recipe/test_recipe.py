"""From file to Recipe: one report, the model of a run that exists, the way back."""

from pathlib import Path

import pytest
import yaml

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.config import CONFIGS, DataConfig
from tunesmith.errors import ConfigError
from tunesmith.recipe import load_for_model, load_recipe, options_help, resolved


# reliability: 50, 52
def test_all_problems_stand_in_one_report_in_file_order(recipe_file):
    text = BASE + "learnin_rate: 1e-4\nlora_r: eight\nlora_dropout: 1.5\npacking_strategy: bfdd\n"
    assert message(recipe_file(text), flags=["--lora_alpha", "0", "--sed", "1"]).splitlines() == [
        "6 problems in recipe.yaml:",
        "  recipe.yaml:3: unknown key 'learnin_rate'. Did you mean 'learning_rate'?",
        "  recipe.yaml:4: lora_r: expected a whole number, got 'eight'.",
        "  recipe.yaml:5: lora_dropout: expected a number of at least 0 and at most 1, got 1.5.",
        "  recipe.yaml:6: packing_strategy: expected one of bfd, bfd_split, wrapped, blocks, got 'bfdd'. "
        "Did you mean 'bfd'?",
        "  --lora_alpha: expected a whole number of at least 1, got 0.",
        "  unknown flag '--sed'. Did you mean 'seed'?",
    ]


def test_one_problem_is_one_line(recipe_file):
    assert message(recipe_file(BASE + "lora_r: 8.5\n")) == "recipe.yaml:3: lora_r: expected a whole number, got 8.5."


def test_a_dataset_beside_the_recipe_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "rows.jsonl").write_text("{}")
    (tmp_path / "deep" / "recipe.yaml").write_text("model: m\ndataset: [rows.jsonl, org/on-the-hub]\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("deep/recipe.yaml").data.dataset == [str(Path("deep/rows.jsonl")), "org/on-the-hub"]
    (tmp_path / "rows.jsonl").write_text("{}")  # the current directory comes first
    assert load_recipe("deep/recipe.yaml").data.dataset == ["rows.jsonl", "org/on-the-hub"]


def test_every_shipped_recipe_parses():
    recipes = list((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_recipe(path).model.model_name_or_path


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


# reliability: 55
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
    assert load_recipe(recipe_file(yaml.safe_dump(resolved(second)))) == second


@pytest.mark.parametrize("adapter", ["full", "freeze"])
def test_a_resolved_recipe_of_every_adapter_is_no_contradiction(recipe_file, adapter):
    first = load_recipe(NEEDED, {"adapter": adapter, "max_steps": 5})
    assert load_recipe(recipe_file(yaml.safe_dump(resolved(first)))).model.adapter == adapter


def test_a_resolved_recipe_holds_every_own_option_but_no_secret_and_no_trust():
    trusting = {"trust_remote_code": True, "model_revision": "a" * 40}
    values = resolved(load_recipe(NEEDED, {"hub_token": "hf_secret", **trusting, "seed": 3}))
    own = [name for name, *_ in options_help(CONFIGS)]
    assert [name for name in own if name not in values] == ["trust_remote_code", "hf_token"]
    assert values["seed"] == 3
    assert "hub_token" not in values
