"""Recipes of LLaMA-Factory and its ancestor: every key is an option, converted, told or noted; none is unknown."""

import pytest

from tests.recipe import their_recipes as theirs
from tests.recipe.their_keys import BETWEEN, ERA, HEAD, TRANSFORMERS_4
from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.config import ALIASES
from tunesmith.recipe import load_recipe, phases
from tunesmith.recipe.llamafactory import CONVERSIONS, KEYS, TOLD, TOLD_WORDS, UNREAD, WORDS
from tunesmith.recipe.names import FOREIGN
from tunesmith.recipe.schema import options

ALL = HEAD | ERA | BETWEEN | TRANSFORMERS_4
# Where a default of theirs is no value of ours, and why.
NOT_OURS = {
    "lora_alpha": "theirs may be null: twice the rank",
    "lora_target": "the era's default was none, which its own check refused",
    "do_train": "false alone leaves nothing to do",
    "output_dir": "transformers has none",
    **dict.fromkeys(("model_name_or_path", "dataset"), "one is needed"),
    **dict.fromkeys(("optim", "include_for_metrics"), "computed, so not in the table"),
    "batch_size": "an option of the benchmarks",
    **dict.fromkeys(("task", "task_dir", "lang", "n_shot", "save_dir", "download_mode"), "the benchmarks'"),
}
BESIDE = {
    "double_quantization": {"quantization_bit": 4},
    **{key: {"finetuning_type": "freeze"} for key in ("num_layer_trainable", "name_module_trainable")},
}


# workflow: A1 A2 A3 A4 A5 A6 A7
def test_every_key_of_the_other_programs_is_an_option_an_alias_or_has_a_fate():
    assert ALL.keys() - options().keys() - ALIASES.keys() - FOREIGN.keys() == set()
    assert (options().keys() | ALIASES.keys()) & FOREIGN.keys() == {"generation_config", "sortish_sampler"}  # inert


# workflow: A2 A3 A4 A5 A7
@pytest.mark.parametrize("table", [HEAD, ERA, BETWEEN, TRANSFORMERS_4], ids=["head", "era", "between", "transformers"])
def test_a_default_of_theirs_that_is_written_out_is_no_error(table):
    for key in table.keys() - NOT_OURS.keys():
        load_recipe({**NEEDED, **BESIDE.get(key, {}), key: table[key]})


def test_the_tables_hold_what_they_are_taken_from():
    assert (len(HEAD), len(ERA), len(BETWEEN), len(TRANSFORMERS_4)) == (241, 54, 30, 138)
    assert not (CONVERSIONS.keys() & TOLD.keys() | CONVERSIONS.keys() & UNREAD.keys() | TOLD.keys() & UNREAD.keys())
    assert not FOREIGN.keys() & ALIASES.keys()
    assert set(ALIASES.values()) <= options().keys()


# ---- what says the same


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        ({"quantization_bit": 4}, {"load_in_4bit": True}),
        ({"quantization_bit": "8"}, {"load_in_8bit": True}),
        ({"quantization_bit": None}, {}),
        ({"train_on_prompt": True}, {"train_on": "all"}),
        ({"train_on_prompt": "no"}, {}),
        ({"mask_history": True}, {"train_on": "last_turn"}),
        ({"neat_packing": True}, {"packing": True}),
        ({"neat_packing": True, "packing": True}, {"packing": True}),
        ({"packing": None}, {"packing": False}),
        (
            {"create_new_adapter": True, "adapter_name_or_path": "a"},
            {"resume_lora_training": False, "checkpoint_dir": "a"},
        ),
        ({"pissa_init": True, "pissa_iter": -1, "pissa_convert": True}, {"lora_init": "pissa"}),
        ({"use_dft_loss": True}, {"loss_type": "dft"}),
        ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"disable_shuffling": True}, {"train_sampling_strategy": "sequential"}),
        ({"pure_bf16": True}, {"dtype": "bfloat16", "upcast_trainable": False}),
        ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"warmup_ratio": 0.0, "warmup_steps": 20}, {"warmup_steps": 20}),
        ({"use_auth_token": True}, {}),
        ({"enable_liger_kernel": True}, {"use_liger_kernel": True}),
        ({"lora_target": "all"}, {"lora_target_modules": "all-linear"}),
        ({"lora_target": "q_proj, v_proj"}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ({"flash_attn": "auto"}, {"attn_implementation": None}),
        ({"flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}),
        ({"flash_attn": "disabled"}, {"attn_implementation": "eager"}),
        ({"flash_attn": "sdpa"}, {"attn_implementation": "sdpa"}),
        ({"flash_attn": True}, {"attn_implementation": "flash_attention_2"}),
        (
            {"finetuning_type": "freeze", "name_module_trainable": "all"},
            {"adapter": "freeze", "freeze_trainable_modules": None},
        ),
        (
            {"finetuning_type": "freeze", "freeze_trainable_modules": "mlp,norm"},
            {"adapter": "freeze", "freeze_trainable_modules": ["mlp", "norm"]},
        ),
        ({"num_layer_trainable": -3, "adapter": "freeze"}, {"freeze_trainable_layers": -3, "adapter": "freeze"}),
        ({"optim": "adamw_hf"}, {"optim": "adamw_torch"}),
        ({"group_by_length": True}, {"train_sampling_strategy": "group_by_length"}),
        ({"adafactor": True}, {"optim": "adafactor"}),
        ({"resume_from_checkpoint": True}, {"resume_from_checkpoint": "true"}),
        ({"checkpoint_dir": "a, b"}, {"checkpoint_dir": ["a", "b"]}),
        (
            {"dataset": "a, b", "interleave_probs": "0.3,0.7", "mix_strategy": "interleave_over"},
            {"dataset": ["a", "b"], "interleave_probs": [0.3, 0.7], "mix_strategy": "interleave_over"},
        ),
    ],
)
def test_what_another_program_says_is_said_in_our_options(given, ours):
    assert load_recipe(NEEDED, given) == load_recipe({**NEEDED, **ours})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"quantization_bit": 3}, "argument quantization_bit: expected 4 or 8, got 3."),
        ({"warmup_ratio": 1.5}, "argument warmup_ratio: expected a number of at least 0 and below 1, got 1.5."),
        ({"mask_history": "sometimes"}, "argument mask_history: expected true or false, got 'sometimes'."),
        ({"train_on_prompt": True, "mask_history": True}, "name one option and differ: 'all' and 'last_turn'"),
        ({"finetuning_type": "lora", "adapter": "full"}, "name one option and differ: 'lora' and 'full'"),
    ],
)
def test_a_conversion_that_fails_names_the_key_as_written(given, expected):
    assert expected in message(NEEDED, given)


def test_a_flag_of_theirs_wins_over_the_same_key_in_the_recipe(recipe_file):
    name = recipe_file(BASE + "quantization_bit: 4\nmask_history: true\n")
    recipe = load_recipe(name, flags=["--quantization_bit", "8", "--no-mask_history"])
    assert (recipe.model.load_in_4bit, recipe.model.load_in_8bit, recipe.training) == (False, True, {})
    assert load_recipe(NEEDED, flags=["--neat_packing"]).training == {"packing": True}
    assert "--quantization_bit: expected a whole number after it" in message(NEEDED, flags=["--quantization_bit"])


# ---- what is told


# workflow: A2
def test_derived_arguments_cannot_be_specified():
    for key in ("compute_dtype", "model_max_length"):
        assert f"argument {key}: These arguments cannot be specified" in message(NEEDED, {key: "x"})
        load_recipe(NEEDED, {key: None})


@pytest.mark.parametrize("key", sorted(key for key, fate in FOREIGN.items() if fate.kind == "told"))
def test_what_does_not_exist_here_is_an_error_that_says_what_to_do(key):
    harmless = FOREIGN[key].harmless
    value = (not harmless[0]) if FOREIGN[key].takes is bool else "x"
    found = message(NEEDED, {key: value})
    assert found.startswith(f"argument {key}: ")
    assert found.endswith(".")
    assert "{value}" not in found


@pytest.mark.parametrize("key", sorted(key for key, fate in FOREIGN.items() if fate.kind == "unread"))
def test_what_nothing_reads_is_a_line_and_not_an_error(key):
    harmless = FOREIGN[key].harmless
    value = (not harmless[0]) if FOREIGN[key].takes is bool else "a secret"
    recipe = load_recipe(NEEDED, {key: value})
    assert recipe == load_recipe(NEEDED)
    assert recipe.notes == [f"argument {key}: {FOREIGN[key].sentence}"]
    assert not any(load_recipe(NEEDED, {key: value}).notes for value in (None, *harmless))


@pytest.mark.parametrize(("option", "word"), [(option, word) for option in TOLD_WORDS for word in TOLD_WORDS[option]])
def test_a_word_that_does_not_exist_here_names_those_that_do(option, word):
    found = message(NEEDED, {option: word})
    assert found.startswith(f"argument {option}: ")
    assert "{" not in found


def test_every_word_of_theirs_belongs_to_an_option():
    assert WORDS.keys() | TOLD_WORDS.keys() <= options().keys()
    assert not KEYS.keys() & options().keys()


# ---- whole recipes


@pytest.mark.parametrize("name", ["SFT", "PRETRAIN", "REWARD", "FULL", "FREEZE", "QLORA", "PISSA", "PREDICT"])
def test_a_recipe_of_llama_factory_runs_unchanged(recipe_file, name):
    recipe = load_recipe(recipe_file(getattr(theirs, name)))
    assert phases(recipe) == ((False, False, True) if name == "PREDICT" else (True, True, False))
    assert recipe.training["max_length"] == 2048
    assert recipe.training["dataset_num_proc"] == 16


# workflow: A6
def test_its_sft_recipe_means_what_it_meant(recipe_file):
    recipe = load_recipe(recipe_file(theirs.SFT))
    assert (recipe.run.stage, recipe.model.adapter, recipe.model.lora_r) == ("sft", "lora", 8)
    assert recipe.model.lora_target_modules == "all-linear"
    assert recipe.data.dataset == ["identity", "alpaca_en_demo"]
    assert recipe.data.val_size == 0.1
    assert (
        recipe.training.items() >= {"chat_template": "llama3", "warmup_steps": 0.1, "eval_strategy": "steps"}.items()
    )
    assert recipe.model.trust_remote_code is False
    assert [note.split(": ", 1)[1] for note in recipe.notes] == [
        "trust_remote_code: a recipe may not allow a model's code to run, so it stays false. Pass "
        "--trust_remote_code if the model needs its own code and you trust it.",
        "lora_alpha 16 (here 32).",
    ]


def test_its_other_recipes_mean_what_they_meant(recipe_file):
    reward = load_recipe(recipe_file(theirs.REWARD))
    assert (reward.run.stage, reward.data.dataset) == ("rm", "dpo_en_demo")
    assert load_recipe(recipe_file(theirs.PRETRAIN)).run.stage == "pt"
    assert load_recipe(recipe_file(theirs.FULL)).model.adapter == "full"
    assert load_recipe(recipe_file(theirs.QLORA)).model.load_in_4bit
    assert load_recipe(recipe_file(theirs.PISSA)).model.lora_init == "pissa"
    freeze = load_recipe(recipe_file(theirs.FREEZE)).model
    assert (freeze.adapter, freeze.freeze_trainable_layers, freeze.freeze_trainable_modules) == ("freeze", 8, None)
    predict = load_recipe(recipe_file(theirs.PREDICT))
    assert (predict.model.checkpoint_dir, predict.data.dataset) == ("saves/llama3-8b/lora/sft", None)
    assert load_recipe(recipe_file(theirs.INFERENCE), task="chat").model.checkpoint_dir == "a"


# workflow: A6
def test_what_is_not_here_is_told_in_one_report(recipe_file):
    assert message(recipe_file(theirs.DPO)) == (
        "recipe.yaml:5: stage: stage dpo does not exist here; the stages are pt, sft and rm. "
        "Preference pairs train a reward model: rm."
    )
    assert "merge with: tunesmith merge RUN_OR_ADAPTER out" in message(recipe_file(theirs.MERGE))
    assert message(recipe_file(theirs.BENCHMARK)).count("lm-evaluation-harness") == 3


# workflow: A1 A4
def test_flags_of_2023_make_the_same_recipe():
    recipe = load_recipe(flags=theirs.ERA_FLAGS.split())
    assert recipe.model.lora_target_modules == ["q_proj", "v_proj"]
    assert recipe.training["max_length"] == 512
    assert recipe.training["do_train"] is recipe.training["fp16"] is recipe.run.plot_loss is True
    assert recipe.notes == [
        "LLaMA-Factory's defaults that differ and are not in the recipe: lora_r 8 (here 16), lora_alpha 16 (here 32)."
    ]


def test_defaults_that_differ_are_named_where_a_recipe_leaves_them_out():
    lines = load_recipe(NEEDED, {"finetuning_type": "lora", "quantization_bit": 4, "max_length": 512}).notes
    assert lines == [
        "max_length is the longest example here, their cutoff_len; answers are bounded by max_new_tokens.",
        "LLaMA-Factory's defaults that differ and are not in the recipe: learning_rate 5e-05 (here 2e-05), "
        "lora_r 8 (here 16), lora_alpha 16 (here 32), use_bnb_nested_quant true (here false).",
    ]
    assert load_recipe(NEEDED, {"adapter": "lora", "load_in_4bit": True}).notes == []
