"""The four input forms - flags, YAML, JSON, a dict - say the same and are read as the same."""

import json
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tunesmith
from tests.recipe.wrong import NEEDED
from tunesmith.cli import app
from tunesmith.config import CONFIGS, Recipe
from tunesmith.recipe import load_recipe
from tunesmith.recipe.schema import kinds, limits, own_options

BIG = {
    "model_name_or_path": "org/model",
    "dataset": ["a.jsonl", "b.jsonl"],
    "mix_strategy": "interleave_over",
    "interleave_probs": "0.3,0.7",
    "columns": {"instruction": "question", "output": "answer"},
    "system_prompt": "Be brief, be kind, [and] be right.",
    "chat_template": "{% for m in messages %}{{ m['content'] }}, {% endfor %}",
    "chat_template_kwargs": {"enable_thinking": False, "depth": 2},
    "checkpoint_dir": "first, second",
    "lora_target": "q_proj, v_proj",
    "lora_modules_to_save": None,
    "learning_rate": "1e-4",
    "val_size": 1,
    "packing": True,
    "bf16": False,
    "max_grad_norm": 0.5,
    "run_name": "010",
    "report_to": ["tensorboard", "wandb"],
    "finetuning_type": "lora",
    "warmup_ratio": 0.1,
    "trust_remote_code": False,
    "lr_scheduler_type": "cosine_with_restarts",
    "lr_scheduler_kwargs": {"num_cycles": 2},
}


def written_as_yaml(values: dict[str, Any], folder: str) -> Path:
    path = Path(folder) / "recipe.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def written_as_json(values: dict[str, Any], folder: str) -> Path:
    path = Path(folder) / "args.json"
    path.write_text(json.dumps(values, indent=1), encoding="utf-8")
    return path


def as_flags(values: dict[str, Any]) -> list[str]:
    words = [value if isinstance(value, str) else json.dumps(value) for value in values.values()]
    return [f"--{key}={word}" for key, word in zip(values, words, strict=True)]


def in_every_form(values: dict[str, Any], **task: Any) -> list[Recipe]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [written_as_yaml(values, folder), written_as_json(values, folder)]
        recipes = [load_recipe(path, **task) for path in paths]
    return [
        *recipes,
        load_recipe(values, **task),
        load_recipe(None, values, **task),
        load_recipe(flags=as_flags(values), **task),
    ]


# workflow: A1
def test_a_big_recipe_is_the_same_in_every_form():
    found = in_every_form(BIG)
    assert all(recipe == found[0] for recipe in found)
    recipe = found[0]
    assert recipe.data.dataset == ["a.jsonl", "b.jsonl"]
    assert recipe.data.interleave_probs == [0.3, 0.7]
    assert recipe.data.system_prompt == BIG["system_prompt"]
    assert recipe.model.checkpoint_dir == ["first", "second"]
    assert recipe.model.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.training["chat_template"] == BIG["chat_template"]
    assert recipe.training["chat_template_kwargs"] == BIG["chat_template_kwargs"]
    assert (recipe.training["learning_rate"], recipe.training["run_name"]) == (1e-4, "010")


WORDS = (
    st.text("abcXYZ_-./ é", min_size=1, max_size=8).map(str.strip).filter(lambda word: word and word[0] not in "-.~")
)
PLAIN = WORDS.filter(lambda word: not word.replace(".", "").replace("_", "").isdigit())
OPTIONS = own_options(CONFIGS)


def values_of(annotation: Any) -> st.SearchStrategy:
    """Values that an option takes, out of its declared type."""
    marks = limits(annotation)
    low = next((m.ge if isinstance(m, Ge) else m.gt + 1 for m in marks if isinstance(m, Ge | Gt)), -3)
    high = next((m.le if isinstance(m, Le) else m.lt - 1 for m in marks if isinstance(m, Le | Lt)), low + 50)
    ways = []
    for kind in kinds(annotation):
        if typing.get_origin(kind) is Literal:
            ways.append(st.sampled_from(typing.get_args(kind)))
        elif typing.get_origin(kind) is list:
            inner = st.floats(0, 1).map(lambda x: round(x, 3)) if typing.get_args(kind)[0] is float else PLAIN
            ways.append(st.lists(inner, min_size=1, max_size=3))
        elif typing.get_origin(kind) is dict:
            ways.append(st.dictionaries(PLAIN, PLAIN, max_size=3))
        elif kind is bool:
            ways.append(st.booleans())
        elif kind is int:
            ways.append(st.integers(low, high))
        elif kind is float:
            ways.append(st.floats(low, high).map(lambda x: round(x, 4)))
        elif kind is str:
            ways.append(PLAIN)
    return st.one_of(ways)


# workflow: A1
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_option_is_the_same_in_every_form(data):
    name = data.draw(st.sampled_from(sorted(OPTIONS.keys() - {"trust_remote_code"})))  # which no file may say
    value = data.draw(values_of(OPTIONS[name].annotation), name)
    found = in_every_form({**NEEDED, name: value}, task="chat")  # contradictions are for those that train
    assert all(recipe == found[0] for recipe in found)
    assert all(recipe.given.keys() == found[0].given.keys() for recipe in found)


# workflow: A1
@pytest.mark.parametrize("name", ["args.json", "recipe.yaml", "recipe.yml"])
def test_train_takes_a_json_or_a_yaml_file(tmp_path, monkeypatch, name):
    workflow, taken = types.ModuleType("tunesmith.workflow"), []
    workflow.train = taken.append
    monkeypatch.setitem(sys.modules, "tunesmith.workflow", workflow)
    monkeypatch.setattr(tunesmith, "workflow", workflow, raising=False)
    path = tmp_path / name
    path.write_text(json.dumps(BIG))
    result = CliRunner().invoke(app, ["train", str(path), "--seed", "3"])
    assert result.exit_code == 0, result.output
    assert taken == [load_recipe(BIG, {"seed": 3})]
