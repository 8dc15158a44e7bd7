"""Keys inside an option that takes a mapping: wrong ones stand in the report, right ones pass."""

import pytest
from transformers.trainer_utils import SchedulerType

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.recipe import load_recipe
from tunesmith.recipe.nested import KEYS, scheduler_keys
from tunesmith.recipe.schema import options


# reliability: 50
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "lr_scheduler_type: cosine_with_restarts\nlr_scheduler_kwargs:\n  num_cycle: 2\n",
            "recipe.yaml:4: lr_scheduler_kwargs: unknown key 'num_cycle'. Did you mean 'num_cycles'? "
            "The option of cosine_with_restarts takes num_cycles.",
        ),
        (
            "lr_scheduler_kwargs: {num_cycles: 2}\n",
            "recipe.yaml:3: lr_scheduler_kwargs: unknown key 'num_cycles'. The option of linear takes nothing.",
        ),
        (
            "lr_scheduler_type: constant_with_warmup\nlr_scheduler_kwargs: {num_cycles: 2}\n",
            "recipe.yaml:4: lr_scheduler_kwargs: unknown key 'num_cycles'. The option of constant_with_warmup takes",
        ),
        (
            "gradient_checkpointing_kwargs: {use_reentrat: false}\n",
            "recipe.yaml:3: gradient_checkpointing_kwargs: unknown key 'use_reentrat'. Did you mean 'use_reentrant'?",
        ),
        (
            "accelerator_config: {split_batchs: true}\n",
            "recipe.yaml:3: accelerator_config: unknown key 'split_batchs'. Did you mean 'split_batches'?",
        ),
    ],
)
def test_a_misspelled_key_inside_an_option_is_told_with_its_line(recipe_file, text, expected):
    assert expected in message(recipe_file(BASE + text))


# reliability: 50
def test_nested_and_other_mistakes_come_in_one_report(recipe_file):
    text = BASE + "learnin_rate: 1\naccelerator_config: {even_batchs: true}\nlora_r: eight\n"
    assert [line.split(":")[1] for line in message(recipe_file(text)).splitlines()[1:]] == ["3", "4", "5"]


@pytest.mark.parametrize(
    "given",
    [
        {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 3}},
        {"lr_scheduler_kwargs": {}},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True, "preserve_rng_state": False}},
        {"accelerator_config": {"dispatch_batches": False, "gradient_accumulation_kwargs": {}}},
        {"dispatch_batches": False},
    ],
)
def test_keys_that_the_libraries_take_pass(given):
    load_recipe(NEEDED, given)


def test_every_schedule_says_what_it_takes_or_that_nobody_knows():
    schedules = [schedule.value for schedule in SchedulerType]
    assert "cosine" in schedules
    for schedule in schedules:
        known = scheduler_keys(schedule)
        assert known is None or "optimizer" not in known
    assert KEYS.keys() <= options().keys()
