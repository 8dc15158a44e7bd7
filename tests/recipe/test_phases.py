"""do_train, do_eval, do_predict: what a run consists of, and what it then needs."""

import pytest
import yaml

from tests.recipe.wrong import NEEDED, message
from tunesmith.recipe import load_recipe, phases, resolved

EVAL = {"eval_dataset": "e.jsonl"}
GENERATE = {"predict_with_generate": True}


# workflow: A6 A7
@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, (True, False, False)),
        ({"val_size": 5}, (True, True, False)),
        ({"val_size": 5, "do_eval": False}, (True, False, False)),
        ({"do_train": True, "val_size": 5, "do_predict": True, **GENERATE}, (True, True, True)),
        ({"do_eval": True}, (False, True, False)),
        ({"do_predict": True, **GENERATE}, (False, False, True)),
        ({"do_predict": True, "do_eval": True, **GENERATE}, (False, True, True)),
        ({"do_train": False, "do_eval": True}, (False, True, False)),
        ({"do_train": True, "do_eval": True, **EVAL}, (True, True, False)),
    ],
)
def test_a_run_consists_of_what_is_asked_for(given, parts):
    assert phases(load_recipe(NEEDED, given)) == parts


def test_a_resolved_recipe_says_its_phases(recipe_file):
    for given in ({}, {"val_size": 5}, {"do_predict": True, **GENERATE}):
        first = load_recipe(NEEDED, given)
        second = load_recipe(recipe_file(yaml.safe_dump(resolved(first))))
        assert phases(second) == phases(first)
        assert [resolved(second)[f"do_{part}"] for part in ("train", "eval", "predict")] == list(phases(first))


def test_a_run_that_trains_nothing_says_so():
    notes = load_recipe(NEEDED, {"do_predict": True, **GENERATE}).notes
    assert notes == [
        "do_predict is given and do_train is not, so nothing is trained. Add do_train: true to train, too."
    ]
    assert load_recipe(NEEDED, {"do_train": False, "do_eval": True}).notes == []


# workflow: R5
def test_without_training_either_set_is_enough():
    load_recipe({"model": "m", "do_eval": True, **EVAL})
    load_recipe({"model": "m", "do_eval": True, "dataset": "d"})
    assert message({"model": "m", "do_eval": True}) == (
        "the options: eval_dataset is not set. Name the held-out examples: --eval_dataset FILE."
    )
    assert "dataset is not set. Name the examples" in message({"model": "m", "do_train": True, **EVAL})


def test_a_run_of_nothing_is_an_error():
    assert "nothing is to be done" in message(NEEDED, {"do_train": False})


@pytest.mark.parametrize("given", [{"do_eval": True}, {"do_predict": True, **GENERATE}, GENERATE])
def test_training_needs_held_out_examples_for_what_follows_it(given):
    assert "need held-out examples. Set eval_dataset or val_size." in message(NEEDED, {"do_train": True, **given})


# workflow: V12
def test_evaluation_in_few_bits_is_said_to_score_lower():
    line = "Evaluating model in 4/8-bit mode may cause lower scores."
    assert line in load_recipe(NEEDED, {"do_eval": True, "load_in_4bit": True}).notes
    assert line in load_recipe({"model": "m", **EVAL}, {"load_in_8bit": True}, task="eval").notes
    assert line not in load_recipe(NEEDED, {"load_in_4bit": True}).notes


def test_what_is_missing_depends_on_the_task():
    assert message({}).splitlines()[1:] == [
        "  the options: model_name_or_path is not set. Name the base model: a folder or a Hub id.",
        "  the options: dataset is not set. Name the examples: a file, a folder or a Hub id.",
    ]
    assert "eval_dataset is not set" in message({"model": "m"}, task="eval")
    assert load_recipe({"model": "m"}, task="chat").model.model_name_or_path == "m"
