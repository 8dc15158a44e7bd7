"""What contradicts itself: every rule breaks on its own example, and names the places."""

import json
import re
from pathlib import Path

import pytest

from tests.recipe.wrong import BASE, NEEDED, message
from tunesmith.errors import ConfigError
from tunesmith.recipe import load_recipe
from tunesmith.recipe.rules import CONTRADICTIONS, TRAINING, zero_stage

ZERO3 = {"zero_optimization": {"stage": 3}}
PREDICT = {"do_predict": True, "predict_with_generate": True}
BROKEN = [
    ({"trust_remote_code": True}, "trust_remote_code runs code that whoever owns m may change"),
    ({"do_train": False}, "nothing is to be done"),
    (
        {"stage": "pt", "predict_with_generate": True, "val_size": 1},
        "only stage sft writes answers, and this is stage pt",
    ),
    ({"do_predict": True}, "Please enable `predict_with_generate` to save model predictions."),
    ({"stage": "rm", "compare_rows": 2, "val_size": 9}, "have answers written, which only stage sft does"),
    ({"stage": "rm", "adapter": "full"}, "stage: rm trains a LoRA adapter with a value head, not adapter: full"),
    ({"stage": "pt", "train_on": "last_turn"}, "train_on: last_turn has no effect with stage: pt"),
    ({"stage": "rm", "packing": True}, "stage: rm compares them in pairs"),
    ({"stage": "rm", "loss_type": "dft"}, "loss_type: dft has no effect with stage: rm"),
    ({"reward_loss": "span"}, "reward_loss: span has no effect with stage: sft"),
    ({"bf16": True, "fp16": True}, "bf16 and fp16 cannot both be true"),
    ({"fp16": True, "use_cpu": True}, "a CPU does not multiply in float16"),
    ({"packing": True, "train_sampling_strategy": "group_by_length"}, "nothing to group"),
    ({"packing_strategy": "wrapped"}, "packing_strategy: wrapped has no effect without packing"),
    ({"adapter": "full", "lora_r": 8}, "LoRA options have no effect with adapter: full"),
    ({"adapter": "freeze", "use_dora": True}, "LoRA options have no effect with adapter: freeze"),
    ({"freeze_trainable_layers": 1}, "freeze options have no effect with adapter: lora"),
    ({"adapter": "none"}, "adapter: none trains nothing"),
    ({"adapter": "none", "checkpoint_dir": "a", "do_eval": True}, "checkpoint_dir has no effect with adapter: none"),
    ({"adapter": "full", "checkpoint_dir": "a,b"}, "only adapter: lora takes several checkpoint_dir"),
    ({"load_in_4bit": True, "checkpoint_dir": "a,b"}, "it takes one checkpoint_dir"),
    ({"load_in_8bit": True, "checkpoint_dir": "a", "resume_lora_training": False}, "so no new one begins there"),
    ({"resume_lora_training": False}, "merges the adapters of checkpoint_dir, which is not set"),
    ({"lora_target": None}, "Please specify `lora_target` in LoRA training"),
    ({"adapter": "full", "do_merge": True}, "do_merge has nothing to merge"),
    ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit cannot both be true"),
    ({"load_in_4bit": True, "adapter": "full"}, "no weights that adapter: full could train"),
    ({"load_in_8bit": True, "gguf_file": "m.gguf"}, "gguf_file is converted to full precision"),
    ({"load_in_4bit": True, "lora_init": "pissa"}, "lora_init: pissa takes a part out of the base's weights"),
    ({"quantization_bit": 4, "deepspeed": ZERO3}, "ZeRO stage 3 cuts weights into pieces"),
    ({"deepspeed": "nowhere/ds.json"}, "there is no file nowhere/ds.json"),
    ({"accelerator_config": "nowhere.json"}, "accelerator_config: there is no file nowhere.json"),
    ({"fsdp_config": "nowhere.json"}, "fsdp_config: there is no file nowhere.json"),
    ({"optim_args": "rank=4,x"}, "optim_args: expected name=value, several with commas between, got rank=4,x."),
    ({"output_dir": "runs/" + "x" * 256}, "output_dir: no file system takes a name of more than 255 bytes"),
    ({"model_name_or_path": "ü" * 128}, "model_name_or_path: no folder and no Hub id has a name of more than 255"),
    ({"max_steps": 0}, "max_steps: 0 is no length of a run"),
    ({"use_bnb_nested_quant": True}, "4-bit options have no effect without load_in_4bit: true"),
    ({"rope_factor": 2}, "rope_factor has no effect without rope_scaling"),
    ({"interleave_probs": [1.0]}, "interleave_probs has no effect with mix_strategy: concat"),
    (
        {"interleave_probs": "0.3,0.7", "mix_strategy": "interleave_over"},
        "expected one share for each dataset, which add up to 1",
    ),
    (
        {"interleave_probs": "-1", "mix_strategy": "interleave_over"},
        "expected one share for each dataset, which add up to 1",
    ),
    ({"system_prompt": ["a", "b"]}, "system_prompt: expected one text, or one for each dataset"),
    ({"buffer_size": 10}, "buffer_size has no effect without streaming"),
    ({"streaming": True}, "Please specify `max_steps` in streaming mode"),
    ({"streaming": True, "max_steps": 5, "val_size": 0.1}, "val_size cannot be a share"),
    ({"eval_on_each_dataset": True, "eval_dataset": "e"}, "eval_on_each_dataset needs several sets"),
    ({"max_source_length": 2000, "max_length": 1000}, "max_source_length (2000) is above max_length (1000)"),
    ({"max_target_length": 2000}, "max_target_length (2000) is above max_length (1024)"),
    ({"train_on": "all", "max_source_length": 64}, "train_on: all knows neither"),
    ({"eval_num_beams": 4}, "eval_num_beams has no effect where no answers are written"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
    ({"eval_strategy": "steps"}, "eval_strategy: steps needs held-out examples"),
    ({"predict_with_generate": True}, "do_eval, do_predict and predict_with_generate need held-out examples"),
    ({"compare_rows": 3}, "compare_rows and sample_rows need held-out examples"),
    ({"eval_dataset": "e", "val_size": 0.1}, "both say what is held out"),
    ({"warmup_steps": 20, "max_steps": 10}, "warmup_steps (20) is more than max_steps (10)"),
    ({"tokens_per_batch": 512}, "tokens_per_batch (512) is below max_length (1024)"),
]


# reliability: 53
@pytest.mark.parametrize(("given", "expected"), BROKEN)
def test_a_contradiction_is_an_error_that_names_its_places(given, expected):
    found = message(NEEDED, given)
    assert expected in found
    assert "argument " in found


def test_every_contradiction_has_a_test():
    found = [message(NEEDED, given) for given, _ in BROKEN]
    for rule in CONTRADICTIONS + TRAINING:
        literal = max(re.split(r"{[^}]*}", rule.message), key=len)
        assert any(literal in text for text in found), literal


def test_a_wrong_value_is_not_also_a_contradiction():
    assert message(NEEDED, {"val_size": "some", "eval_strategy": "steps"}).count("\n") == 0


# reliability: 52, 53
def test_every_contradiction_is_in_the_one_report(recipe_file):
    text = BASE + "bf16: true\nfp16: true\nlearning_rate: -1\nwarmup_steps: 20\nmax_steps: 10\nuse_muon: true\n"
    assert message(recipe_file(text)).splitlines() == [
        "4 problems in recipe.yaml:",
        "  recipe.yaml:5: learning_rate: expected a number above 0, got -1.",
        "  recipe.yaml:8: use_muon: Muon is not here. Remove it; optim names what there is.",
        "  recipe.yaml:3, recipe.yaml:4: bf16 and fp16 cannot both be true. Keep one.",
        "  recipe.yaml:6, recipe.yaml:7: warmup_steps (20) is more than max_steps (10). Lower it.",
    ]


# reliability: 52
def test_every_value_out_of_range_is_in_the_one_report(recipe_file):
    wrong = [
        "learning_rate: -1",
        "num_train_epochs: 0",
        "per_device_train_batch_size: 0",
        "max_length: 1",
        "save_steps: 0",
    ]
    found = message(recipe_file(BASE + "\n".join(wrong)))
    assert found.startswith("5 problems in recipe.yaml:")
    for line, option in enumerate(wrong, start=3):
        assert f"recipe.yaml:{line}: {option.split(':')[0]}: expected" in found


# ---- the rules of LLaMA-Efficient-Tuning's parser, one by one


# workflow: V1
@pytest.mark.parametrize("stage", ["pt", "rm"])
def test_only_sft_writes_answers(stage):
    given = {"stage": stage, "predict_with_generate": True, "val_size": 2}
    assert "predict_with_generate: only stage sft writes answers" in message(NEEDED, given)
    load_recipe(NEEDED, given | {"stage": "sft"})


# workflow: V2
def test_prediction_needs_generation_in_stage_sft():
    assert message(NEEDED, {"do_predict": True}).endswith(
        "Please enable `predict_with_generate` to save model predictions."
    )
    load_recipe(NEEDED, {"do_predict": True, "stage": "rm"})
    load_recipe(NEEDED, PREDICT)


# workflow: V3
def test_a_run_that_trains_may_have_answers_written():
    recipe = load_recipe(NEEDED, {"do_train": True, "predict_with_generate": True, "val_size": 2})
    assert recipe.training["predict_with_generate"]


# workflow: V4
def test_a_reward_model_is_an_adapter_and_ppo_and_dpo_do_not_exist():
    for adapter in ("full", "freeze", "none"):
        assert "stage: rm trains a LoRA adapter" in message(NEEDED, {"stage": "rm", "finetuning_type": adapter})
    for stage in ("ppo", "dpo"):
        assert f"stage {stage} does not exist here" in message(NEEDED, {"stage": stage})
    load_recipe(NEEDED, {"stage": "rm", "resume_from_checkpoint": "out/checkpoint-1"})


# workflow: V6
def test_lora_without_targets_cannot_train():
    for given in ({"lora_target": None}, {"lora_target_modules": None}):
        assert "Please specify `lora_target` in LoRA training" in message(NEEDED, given)
        load_recipe(NEEDED, given | {"do_eval": True})


# workflow: V7
def test_few_bits_go_with_one_adapter_and_without_zero_3(recipe_file):
    bits = {"quantization_bit": 4}
    for adapter in ("full", "freeze"):
        assert f"no weights that adapter: {adapter} could train" in message(
            NEEDED, bits | {"finetuning_type": adapter}
        )
    assert "it takes one checkpoint_dir" in message(NEEDED, bits | {"checkpoint_dir": "a, b"})
    assert "only adapter: lora takes several" in message(NEEDED, {"adapter": "freeze", "checkpoint_dir": "a, b"})
    recipe_file(json.dumps(ZERO3), "ds.json")
    for deepspeed in (ZERO3, json.dumps(ZERO3), "ds.json"):
        assert "ZeRO stage 3" in message(NEEDED, bits | {"deepspeed": deepspeed})
        load_recipe(NEEDED, {"deepspeed": deepspeed})
    load_recipe(NEEDED, bits | {"checkpoint_dir": "a", "deepspeed": {"zero_optimization": {"stage": 2}}})


def test_a_deepspeed_file_that_cannot_be_read_has_no_stage(recipe_file):
    recipe_file("no JSON", "ds.json")
    assert [zero_stage(given) for given in ("ds.json", "nowhere", "{", {}, {"zero_optimization": 3}, None)] == [
        None
    ] * 6


def test_a_deepspeed_file_beside_the_recipe_is_found_from_elsewhere(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "ds.json").write_text("{}")
    (tmp_path / "deep" / "recipe.yaml").write_text(BASE + "deepspeed: ds.json\n")
    monkeypatch.chdir(tmp_path)
    assert load_recipe("deep/recipe.yaml").training["deepspeed"] == str(Path("deep/ds.json"))


# workflow: V8
def test_a_stream_needs_steps_and_a_count_and_keeps_max_samples():
    assert "Please specify `max_steps` in streaming mode" in message(NEEDED, {"streaming": True})
    stream = {"streaming": True, "max_steps": 5}
    assert "val_size cannot be a share" in message(NEEDED, stream | {"val_size": 0.1})
    recipe = load_recipe(NEEDED, stream | {"val_size": 1, "max_samples": 10})
    assert (recipe.data.val_size, recipe.data.max_samples) == (1.0, 10)
    load_recipe(NEEDED, {"streaming": True, "do_eval": True})


# workflow: V9
def test_half_precisions_exclude_each_other_and_none_is_needed():
    assert "bf16 and fp16 cannot both be true" in message(NEEDED, {"bf16": True, "fp16": True})
    assert "a CPU does not multiply in float16" in message(NEEDED, {"fp16": True, "use_cpu": True})
    load_recipe(NEEDED, {"use_cpu": True})
    load_recipe(NEEDED, {"use_cpu": True, "bf16": True})


# workflow: A3
def test_system_prompts_are_one_or_one_for_each_dataset():
    two = NEEDED | {"dataset": "a, b"}
    assert "expected one text, or one for each dataset" in message(NEEDED, {"system_prompt": ["one", "two"]})
    assert "expected one text" in message(two, {"system_prompt": "one|two|three"})
    for right in ("one|two", "one, and no other", ["one", "two"], ["a | in one text"]):
        load_recipe(two, {"system_prompt": right})
    load_recipe(NEEDED, {"system_prompt": "| a | table | for one dataset |"})


# workflow: A3
def test_shares_are_one_for_each_dataset_and_add_up_to_1():
    two = NEEDED | {"dataset": "a, b", "mix_strategy": "interleave_under"}
    for wrong in ("0.3", "0.3,0.3", [1.5, -0.5], "0.2,0.3,0.5"):
        assert "which add up to 1" in message(two, {"interleave_probs": wrong})
    load_recipe(two, {"interleave_probs": "0.33, 0.67"})


# workflow: A5
def test_drawing_options_without_drawing_are_said_to_do_nothing():
    assert load_recipe(NEEDED, {"temperature": 0.5, "top_p": 0.7}).notes == [
        "temperature, top_p: nothing is drawn, the likeliest token is taken. Add do_sample: true to draw."
    ]
    assert load_recipe(NEEDED, {"temperature": 0.5, "do_sample": True}).notes == []


def test_several_sets_are_evaluated_one_by_one_wherever_they_come_from():
    each = {"eval_on_each_dataset": True}
    load_recipe(NEEDED, each | {"eval_dataset": "a, b"})
    load_recipe(NEEDED | {"dataset": "a, b", "val_size": 5}, each)
    assert "eval_on_each_dataset needs several sets" in message(NEEDED, each | {"val_size": 5})


# reliability: 52, 53
def test_an_error_is_a_config_error_with_exit_code_2():
    with pytest.raises(ConfigError) as caught:
        load_recipe(NEEDED, {"bf16": True, "fp16": True})
    assert caught.value.exit_code == 2


def test_of_steps_and_epochs_the_steps_say_how_long_and_that_is_said():
    notes = load_recipe(NEEDED, {"max_steps": 10, "num_train_epochs": 2}).notes
    assert "max_steps: 10 says how long to train; num_train_epochs has no effect." in notes


def test_a_reward_model_is_told_nothing_of_how_answers_are_written():
    theirs = {"template": "chatml", "finetuning_type": "lora", "val_size": 2, "do_train": True, "do_predict": True}
    notes = {
        stage: " ".join(load_recipe(NEEDED, {**theirs, **more}).notes)
        for stage, more in (("rm", {"stage": "rm"}), ("sft", {"predict_with_generate": True}))
    }
    assert "do_sample" in notes["sft"]
    assert "do_sample" not in notes["rm"]


@pytest.mark.parametrize(
    ("key", "value", "option"),
    [
        ("dev_ratio", 0.1, "val_size"),
        ("prompt_template", "chatml", "chat_template"),
        ("neft_alpha", 5, "neftune_noise_alpha"),
    ],
)
def test_keys_of_the_first_months_are_known(key, value, option):
    recipe = load_recipe(NEEDED, {key: value})
    assert {**vars(recipe.data), **recipe.training}[option] == value
