"""Every recipe in recipes/ runs, on the tiny model and for two steps."""

import json
from pathlib import Path

import pytest

from tunesmith.recipe import load_recipe, phases
from tunesmith.runs import read_status
from tunesmith.workflow import run

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))
SMALL = {"max_length": 1024, "max_new_tokens": 2, "use_cpu": True, "bf16": False, "max_samples": 40}


@pytest.fixture
def model(make_tiny_model, byte_tokenizer, tmp_path) -> str:
    wide = {"hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 2048, "num_hidden_layers": 4}
    make_tiny_model(**wide).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def small(path, model, tmp_path) -> dict:
    """Options that make a recipe quick."""
    recipe = load_recipe(path)
    steps = {"max_steps": 2, "warmup_steps": 0} if phases(recipe).train else {}
    held_out = {"val_size": 4} if recipe.data.val_size else {}
    compared = {"compare_rows": 2} if recipe.run.compare_rows else {}
    return {**SMALL, **steps, **held_out, **compared, "model_name_or_path": model, "output_dir": str(tmp_path / "run")}


def test_there_is_a_recipe_for_each_stage_and_adapter():
    recipes = [load_recipe(path) for path in RECIPES]
    assert len(recipes) > 10
    assert {recipe.run.stage for recipe in recipes} == {"pt", "sft", "rm"}
    assert {recipe.model.adapter for recipe in recipes} == {"lora", "full", "freeze"}


# workflow: A6 W1 W3
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path, model, tmp_path):
    for name, package in (("qlora", "bitsandbytes"), ("chinese", "jieba")):
        if name in path.stem:
            pytest.importorskip(package)
    options = small(path, model, tmp_path)
    todo = phases(load_recipe(path, options))
    figures = run(path, **options)
    assert figures == json.loads((tmp_path / "run" / "all_results.json").read_text())
    written = {entry.name for entry in (tmp_path / "run").iterdir()}
    assert todo.train <= ({"train_results.json", "trainer_state.json", "training_loss.png"} <= written)
    assert todo.evaluate <= ("eval_results.json" in written and any("loss" in name for name in figures))
    assert todo.predict <= ({"predict_results.json", "generated_predictions.jsonl"} <= written)
    assert not any(name.endswith((".bin", ".pkl")) for name in written)
    assert read_status(tmp_path / "run")["state"] == "completed"
