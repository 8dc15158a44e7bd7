"""Old names: each says the same as the new one, contradicts it loudly, or is an error with a way out."""

import dataclasses

import pytest
from transformers import Seq2SeqTrainingArguments

from tunesmith.errors import ConfigError
from tunesmith.train.legacy import OLD, LegacyFields
from tunesmith.train.options import SFTConfig, modernized

# old option, value, option of today, its value
TRANSLATED = [
    ("max_seq_length", 512, "max_length", 512),
    ("chat_template_path", "chat.jinja", "chat_template", "chat.jinja"),
    ("use_liger", True, "use_liger_kernel", True),
    ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
    ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
    ("per_gpu_eval_batch_size", 3, "per_device_eval_batch_size", 3),
    ("no_cuda", True, "use_cpu", True),
    ("push_to_hub_token", "secret", "hub_token", "secret"),
    ("push_to_hub_model_id", "name", "hub_model_id", "name"),
    ("push_to_hub_organization", "owner", "hub_model_id", "owner/tmp_trainer"),
    ("warmup_ratio", 0.1, "warmup_steps", 0.1),
    ("assistant_only_loss", True, "train_on", "assistant"),
    ("assistant_only_loss", False, "train_on", "all"),
    ("completion_only_loss", True, "train_on", "completion"),
    ("completion_only_loss", False, "train_on", "all"),
    ("truncation_mode", "keep_end", "too_long", "truncate_left"),
    ("adafactor", True, "optim", "adafactor"),
    ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
    ("include_inputs_for_metrics", True, "include_for_metrics", ["inputs"]),
    ("torchdynamo", "eager", "torch_compile_backend", "eager"),
]
GONE = [
    ("save_safetensors", False, "a pickled checkpoint can run code.*Leave it true"),
    ("use_mps_device", True, "an Apple GPU is used wherever there is one. Remove it"),
    ("jit_mode_eval", True, "set torch_compile=True"),
    ("use_ipex", True, "Intel extension"),
    ("fp16_opt_level", "O2", "Set fp16=True or bf16=True"),
    ("fp16_backend", "apex", "torch's autocast"),
    ("half_precision_backend", "cpu_amp", "torch's autocast"),
    ("tpu_num_cores", 8, "accelerate launch"),
    ("tpu_metrics_debug", True, "Write debug='tpu_metrics_debug'"),
    ("past_index", 1, "Remove it"),
    ("mp_parameters", "x", "SageMaker"),
    ("ray_scope", "all", r"trainer.hyperparameter_search\(backend='ray', scope=...\)"),
    ("use_legacy_prediction_loop", True, "one evaluation loop"),
]
PARTS = ["dispatch_batches", "split_batches", "fsdp_min_num_params", "fsdp_transformer_layer_cls_to_wrap"]


def test_every_old_option_has_a_fate_and_a_case_here():
    names = {field.name for field in dataclasses.fields(LegacyFields)}
    assert names == set(OLD)
    assert names == {case[0] for case in TRANSLATED + GONE} | {*PARTS, "overwrite_output_dir"}


def test_old_options_redeclare_nothing_that_transformers_has():
    assert not {field.name for field in dataclasses.fields(Seq2SeqTrainingArguments)} & set(OLD)


# trainer: B4 B12
@pytest.mark.parametrize(("old", "value", "new", "expected"), TRANSLATED)
def test_an_old_option_moves_to_the_new_one(old, value, new, expected):
    args = SFTConfig(**{old: value})
    assert getattr(args, new) == expected
    assert getattr(args, old) == value
    assert getattr(args, new) != getattr(SFTConfig(), new) or expected in ("assistant", True)


# trainer: B4 B12
@pytest.mark.parametrize(("old", "value", "new", "expected"), TRANSLATED)
def test_an_old_option_assigned_later_counts(old, value, new, expected):
    args = SFTConfig()
    setattr(args, old, value)
    later = modernized(modernized(args))
    assert getattr(later, new) == expected
    assert getattr(args, new) == getattr(SFTConfig(), new), "the caller's own arguments are left alone"


@pytest.mark.parametrize(("old", "value", "message"), GONE)
def test_an_option_that_nothing_acts_on_is_an_error(old, value, message):
    with pytest.raises(ConfigError, match=f"SFTConfig: {old}: got {value!r}, but .*{message}"):
        SFTConfig(**{old: value})
    args = SFTConfig()
    setattr(args, old, value)
    with pytest.raises(ConfigError, match=message):
        modernized(args)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"max_seq_length": 512, "max_length": 256}, r"max_seq_length \(512\) and max_length \(256\)"),
        ({"max_seq_length": 512, "max_length": 1024}, r"max_seq_length \(512\) and max_length \(1024\)"),
        ({"evaluation_strategy": "no", "eval_strategy": "steps"}, "evaluation_strategy .* and eval_strategy"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, r"warmup_ratio \(0.1\) and warmup_steps \(10\)"),
        ({"adafactor": True, "optim": "sgd"}, r"adafactor \(True\) and optim \('sgd'\)"),
        ({"assistant_only_loss": True, "train_on": "all"}, "assistant_only_loss .* and train_on"),
        ({"use_liger": True, "use_liger_kernel": False}, "use_liger .* and use_liger_kernel"),
        ({"truncation_mode": "keep_end", "too_long": "drop"}, "truncation_mode .* and too_long"),
        ({"split_batches": True, "accelerator_config": {"split_batches": False}}, None),
        ({"dispatch_batches": False, "accelerator_config": {"dispatch_batches": True}}, "dispatch_batches .* and acc"),
    ],
)
def test_old_and_new_name_that_differ_are_an_error(options, names):
    if names is None:  # false is what nothing said is, too
        assert SFTConfig(**options).accelerator_config.split_batches
        return
    with pytest.raises(ConfigError, match=f"{names}.* name one option and differ. Keep "):
        SFTConfig(**options)


def test_old_and_new_name_may_agree():
    assert SFTConfig(max_seq_length=512, max_length=512).max_length == 512


# trainer: B4
def test_the_name_that_was_assigned_last_counts():
    args = SFTConfig(max_seq_length=512)
    args.max_length = 256
    later = modernized(args)
    assert (later.max_length, later.max_seq_length) == (256, 256)
    later.max_seq_length = 128
    assert modernized(later).max_length == 128
    later.max_seq_length = None
    assert modernized(later).max_length == 1024


def test_two_names_assigned_differently_are_an_error():
    args = SFTConfig()
    args.max_seq_length, args.max_length = 128, 256
    with pytest.raises(ConfigError, match="name one option and differ"):
        modernized(args)


# trainer: B8 L4
def test_what_v013_scripts_assign_later_is_checked_and_kept():
    args = SFTConfig()
    args.remove_unused_columns = False
    args.dataset_kwargs = {"skip_prepare_dataset": True}
    later = modernized(args)
    assert (later.remove_unused_columns, later.dataset_kwargs) == (False, {"skip_prepare_dataset": True})
    args.dataset_kwargs = {"skip": True}
    with pytest.raises(ConfigError, match="unknown key 'skip'"):
        modernized(args)


def test_bringing_up_to_date_changes_nothing_else():
    args = SFTConfig(max_seq_length=64, eval_strategy="steps", eval_steps=2, split_batches=True, report_to=[])
    args.mine = "kept"
    assert modernized(args) == args
    assert modernized(args).mine == "kept"


# ------------------------------------------------------------------------------------------ one by one


@pytest.mark.parametrize(
    ("assistant", "completion", "train_on"),
    [
        (True, True, "assistant"),
        (True, False, "assistant"),
        (False, True, "completion"),
        (False, False, "all"),
        (None, None, "assistant"),
    ],
)
def test_trls_two_switches_together(assistant, completion, train_on):
    args = SFTConfig(assistant_only_loss=assistant, completion_only_loss=completion)
    assert args.train_on == train_on


def test_a_share_of_the_run_warms_up():
    args = SFTConfig(warmup_ratio=0.25)
    assert args.get_warmup_steps(100) == 25
    for share in (1.0, -0.1):
        with pytest.raises(ConfigError, match=f"warmup_ratio: expected a share from 0 to below 1, got {share}"):
            SFTConfig(warmup_ratio=share)


def test_owner_and_name_of_the_hub_repository_are_joined():
    args = SFTConfig(push_to_hub_organization="owner", push_to_hub_model_id="name")
    assert args.hub_model_id == "owner/name"


def test_batch_options_reach_accelerate():
    args = SFTConfig(split_batches=True, dispatch_batches=False, accelerator_config={"even_batches": False})
    config = args.accelerator_config
    assert (config.split_batches, config.dispatch_batches, config.even_batches) == (True, False, False)
    later = SFTConfig(accelerator_config='{"even_batches": false}')
    later.split_batches = True
    config = modernized(later).accelerator_config
    assert (config.split_batches, config.even_batches) == (True, False)
    with pytest.raises(ConfigError, match=r"accelerator_config: 'a.json' is a file. Write split_batches into that"):
        SFTConfig(split_batches=True, accelerator_config="a.json")


def test_fsdp_options_reach_its_config():
    args = SFTConfig(fsdp=True, fsdp_transformer_layer_cls_to_wrap="Layer")
    assert args.fsdp_config["transformer_layer_cls_to_wrap"] == ["Layer"]
    assert args.fsdp_config["auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    args = SFTConfig(fsdp=True, fsdp_min_num_params=1000)
    assert (args.fsdp_config["min_num_params"], args.fsdp_config["auto_wrap_policy"]) == (1000, "SIZE_BASED_WRAP")
    with pytest.raises(ConfigError, match="fsdp_min_num_params: got 1000, but fsdp is off"):
        SFTConfig(fsdp_min_num_params=1000)
    with pytest.raises(ConfigError, match=r"auto_wrap_policy .* name one option and differ"):
        SFTConfig(fsdp=True, fsdp_min_num_params=1000, fsdp_transformer_layer_cls_to_wrap="Layer")


@pytest.mark.parametrize(
    ("option", "word", "now"),
    [
        ("loss_type", "chunked_nll", "nll"),
        ("optim", "adamw_hf", "adamw_torch"),
        ("packing_strategy", "ffd", "bfd"),
        ("packing_strategy", "bfd-requeue", "bfd_split"),
    ],
)
def test_old_words_are_understood(option, word, now):
    assert getattr(SFTConfig(**{option: word}), option) == now


def test_a_folder_is_overwritten_anyway():
    assert SFTConfig(overwrite_output_dir=True).overwrite_output_dir


def test_a_log_folder_that_nothing_writes_to_is_said():
    with pytest.warns(UserWarning, match="logging_dir: nothing will be written to ./logs.*report_to='tensorboard'"):
        SFTConfig(logging_dir="./logs")
    assert SFTConfig(logging_dir="./logs", report_to="tensorboard").logging_dir == "./logs"
