"""SFTConfig: every option of TRL v0.13 and 1.16, its default, its parser, and what is no option."""

import argparse
import ast
import copy
import dataclasses
import json

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from tunesmith.config import ModelConfig
from tunesmith.errors import ConfigError
from tunesmith.train.options import SFTConfig, as_sft_config, loading, modernized
from tunesmith.train.sft import SFTTrainer

# The 142 options of TRL v0.13's SFTConfig and their defaults.
SEED = """
output_dir=REQUIRED overwrite_output_dir=False do_train=False do_eval=False do_predict=False eval_strategy='no'
prediction_loss_only=False per_device_train_batch_size=8 per_device_eval_batch_size=8 per_gpu_train_batch_size=None
per_gpu_eval_batch_size=None gradient_accumulation_steps=1 eval_accumulation_steps=None eval_delay=0
torch_empty_cache_steps=None learning_rate=2e-05 weight_decay=0.0 adam_beta1=0.9 adam_beta2=0.999
adam_epsilon=1e-08 max_grad_norm=1.0 num_train_epochs=3.0 max_steps=-1 lr_scheduler_type='linear'
lr_scheduler_kwargs=<factory> warmup_ratio=0.0 warmup_steps=0 log_level='passive' log_level_replica='warning'
log_on_each_node=True logging_dir=None logging_strategy='steps' logging_first_step=False logging_steps=500
logging_nan_inf_filter=True save_strategy='steps' save_steps=500 save_total_limit=None save_safetensors=True
save_on_each_node=False save_only_model=False restore_callback_states_from_checkpoint=False no_cuda=False
use_cpu=False use_mps_device=False seed=42 data_seed=None jit_mode_eval=False use_ipex=False bf16=False fp16=False
fp16_opt_level='O1' half_precision_backend='auto' bf16_full_eval=False fp16_full_eval=False tf32=None local_rank=-1
ddp_backend=None tpu_num_cores=None tpu_metrics_debug=False debug='' dataloader_drop_last=False eval_steps=None
dataloader_num_workers=0 dataloader_prefetch_factor=None past_index=-1 run_name=None disable_tqdm=None
remove_unused_columns=True label_names=None load_best_model_at_end=False metric_for_best_model=None
greater_is_better=None ignore_data_skip=False fsdp='' fsdp_min_num_params=0 fsdp_config=None
fsdp_transformer_layer_cls_to_wrap=None accelerator_config=None deepspeed=None label_smoothing_factor=0.0
optim='adamw_torch' optim_args=None adafactor=False group_by_length=False length_column_name='length'
report_to=None ddp_find_unused_parameters=None ddp_bucket_cap_mb=None ddp_broadcast_buffers=None
dataloader_pin_memory=True dataloader_persistent_workers=False skip_memory_metrics=True
use_legacy_prediction_loop=False push_to_hub=False resume_from_checkpoint=None hub_model_id=None
hub_strategy='every_save' hub_token=None hub_private_repo=None hub_always_push=False gradient_checkpointing=False
gradient_checkpointing_kwargs=None include_inputs_for_metrics=False include_for_metrics=<factory>
eval_do_concat_batches=True fp16_backend='auto' evaluation_strategy=None push_to_hub_model_id=None
push_to_hub_organization=None push_to_hub_token=None mp_parameters='' auto_find_batch_size=False
full_determinism=False torchdynamo=None ray_scope='last' ddp_timeout=1800 torch_compile=False
torch_compile_backend=None torch_compile_mode=None dispatch_batches=None split_batches=None
include_tokens_per_second=False include_num_input_tokens_seen=False neftune_noise_alpha=None
optim_target_modules=None batch_eval_metrics=False eval_on_start=False use_liger_kernel=False
eval_use_gather_object=False average_tokens_across_devices=False dataset_text_field='text' packing=False
max_seq_length=None dataset_num_proc=None dataset_batch_size=1000 model_init_kwargs=None dataset_kwargs=None
eval_packing=None num_of_sequences=1024 chars_per_token=3.6 use_liger=False
"""
# Where tunesmith or transformers 5 has another default on purpose, and why.
DIFFERENT = {
    "output_dir": ("tmp_trainer", "v0.13 requires it, and its own snippets leave it out"),
    "logging_steps": (1, "a line for each step: a curve needs them, and they cost nothing"),
    "logging_nan_inf_filter": (False, "a NaN is shown, not hidden, and no micro-batch waits for the device"),
    "bf16": (None, "the trainer chooses for the hardware"),
    "gradient_checkpointing": (None, "the trainer chooses for model and memory"),
    "report_to": ([], "v0.13 reports to whatever is installed"),
    "optim": ("adamw_torch_fused", "transformers 5: the same update in one kernel"),
    "lr_scheduler_kwargs": (None, "transformers 5: an empty mapping"),
    "include_for_metrics": ([], "the list that v0.13's factory makes"),
    "fsdp": (None, "transformers 5: off"),
    "include_num_input_tokens_seen": ("no", "transformers 5: a word in place of False"),
    "average_tokens_across_devices": (True, "the loss is a mean over the tokens of all devices"),
}
# What v0.13 turns into something else at construction, too.
RESOLVED = {"debug": [], "disable_tqdm": False, "use_cpu": not torch.accelerator.is_available()}


def seed_defaults() -> dict:
    pairs = [item.split("=", 1) for item in SEED.split()]
    return {name: text if text[:1] in "R<" else ast.literal_eval(text) for name, text in pairs}


def default(name: str):
    value = getattr(SFTConfig(disable_tqdm=False), name)
    return value.value if hasattr(value, "value") else value


# trainer: B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12
def test_every_option_of_v013_is_a_field():
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    assert len(seed_defaults()) == 142
    assert not seed_defaults().keys() - names


# trainer: B1 B2 B3 B4 B5 B6 B7 B8 B9 B10 B11 B12
@pytest.mark.parametrize(("name", "value"), seed_defaults().items())
def test_defaults_are_those_of_v013_or_listed_as_different(name, value):
    if name in ("accelerator_config", "dataloader_pin_memory"):  # resolved by transformers for the machine
        return
    expected = DIFFERENT[name][0] if name in DIFFERENT else RESOLVED.get(name, value)
    assert default(name) == expected


def test_every_option_of_trl_1_16_is_a_field():
    trl = pytest.importorskip("trl")
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    assert not {field.name for field in dataclasses.fields(trl.SFTConfig)} - names


def test_the_first_positional_argument_is_the_folder(tmp_path):
    assert SFTConfig(tmp_path / "run").output_dir == str(tmp_path / "run")


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 1}, "max_length: expected int ≥ 2 or None, got 1"),
        ({"max_seq_length": "512"}, "max_seq_length: expected int or None, got '512'"),
        ({"packing": "yes"}, "packing: expected True or False, got 'yes'"),
        ({"too_long": "trunc"}, "too_long: expected one of .*, got 'trunc'. Did you mean 'truncate'"),
        ({"packing_strategy": "bdf"}, "packing_strategy: .* Did you mean 'bfd'"),
        ({"truncation_mode": "keep"}, "truncation_mode: expected one of keep_start, keep_end, got 'keep'"),
        ({"learning_rate": -1.0}, "learning_rate: expected float > 0, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate: expected float > 0, got nan"),
        ({"num_of_sequences": 0}, "num_of_sequences: expected int ≥ 1, got 0"),
        ({"chars_per_token": 0}, "chars_per_token: expected float > 0, got 0"),
        ({"dataset_num_proc": True}, "dataset_num_proc: expected int ≥ 1 or None, got True"),
        ({"pad_to_multiple_of": "many"}, "pad_to_multiple_of: expected int ≥ 1, 'auto' or None, got 'many'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of: expected int ≥ 1"),
    ],
)
def test_a_wrong_value_names_option_value_and_range(options, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**options)


def test_a_number_that_yaml_took_for_text_is_a_number(tmp_path):
    (tmp_path / "args.yaml").write_text("learning_rate: 2e-4\nmax_seq_length: 64\n")
    (args,) = HfArgumentParser(SFTConfig).parse_yaml_file(tmp_path / "args.yaml")
    assert (args.learning_rate, args.max_length) == (2e-4, 64)


# trainer: B6
@pytest.mark.parametrize("size", [None, 0, -1])
def test_all_rows_at_once_is_a_batch_size(size):
    assert SFTConfig(dataset_batch_size=size).dataset_batch_size == size


@pytest.mark.parametrize(("given", "kept"), [("auto", None), (None, None), ("64", 64), (8, 8)])
def test_padding_to_a_multiple_takes_trls_auto(given, kept):
    assert SFTConfig(pad_to_multiple_of=given).pad_to_multiple_of == kept


# trainer: B8
def test_dataset_kwargs_take_the_three_old_keys_and_ours():
    given = {"skip_prepare_dataset": True, "add_special_tokens": False, "append_concat_token": False}
    given |= {"on_bad_row": "skip", "format": "alpaca", "columns": {"a": "b"}, "system_prompt": None}
    assert SFTConfig(dataset_kwargs=given).dataset_kwargs == given


# trainer: B8
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"skip_prepare": True}, "unknown key 'skip_prepare'. Did you mean 'skip_prepare_dataset'"),
        ({"on_bad_row": "drop"}, r"dataset_kwargs\['on_bad_row'\]: expected one of error, skip, got 'drop'"),
        ({"add_special_tokens": "no"}, "expected True or False, got 'no'"),
        ("{skip}", "dataset_kwargs: is no JSON"),
        ("[1]", "dataset_kwargs: expected a mapping"),
        ([1], "dataset_kwargs: expected a mapping"),
    ],
)
def test_wrong_dataset_kwargs_are_named(given, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(dataset_kwargs=given)


# trainer: B8
def test_mappings_may_be_json_text_as_on_the_command_line():
    args = SFTConfig(dataset_kwargs='{"skip_prepare_dataset": true}', model_init_kwargs='{"dtype": "bfloat16"}')
    assert args.dataset_kwargs == {"skip_prepare_dataset": True}
    assert args.model_init_kwargs == {"dtype": "bfloat16"}


# ------------------------------------------------------------------------------------------ unknown keywords


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_seq_len", "there is no such option. Did you mean 'max_seq_length'"),
        ("peft_config", r"is an argument of the trainer: SFTTrainer\(..., peft_config=...\)"),
        ("lora_r", "is an option of ModelConfig"),
    ],
)
def test_an_unknown_keyword_says_what_it_should_be(name, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(**{name: None})


def test_an_unknown_keyword_is_a_type_error_as_everywhere_in_python():
    with pytest.raises(TypeError, match="zzz"):
        SFTConfig(zzz=1)


# trainer: K3
@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_quantizing_names_its_way_in(name):
    with pytest.raises(ConfigError, match=rf"Set model_init_kwargs={{'{name}': True}}"):
        SFTConfig(**{name: True})


# trainer: K2
def test_the_preparation_of_a_quantized_base_takes_arguments():
    assert SFTConfig().prepare_in_int8_kwargs is None
    assert SFTConfig(prepare_in_int8_kwargs={"a": 1}).prepare_in_int8_kwargs == {"a": 1}


# ------------------------------------------------------------------------------------------ loading a model


# trainer: H1 B7
@pytest.mark.parametrize("given", ["bfloat16", torch.bfloat16])
@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_both_names_of_the_type_load_in_it(name, given):
    args = SFTConfig(model_init_kwargs={name: given, "use_cache": False})
    assert loading(args) == {"dtype": torch.bfloat16, "use_cache": False}
    assert args.model_init_kwargs == {name: given, "use_cache": False}


# trainer: B7
def test_auto_stays_auto():
    assert loading(SFTConfig(model_init_kwargs={"torch_dtype": "auto"})) == {"dtype": "auto"}


# trainer: B7
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"torch_dtype": "bf16"}, "Invalid `torch_dtype` passed to the SFTConfig.*got 'bf16'"),
        ({"torch_dtype": -1}, "Invalid `torch_dtype` passed to the SFTConfig.*got -1"),
        ({"torch_dtype": "bfloat16", "dtype": "float16"}, "name one option and differ"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "Keep one"),
        ({"load_in_8bit": True, "quantization_config": {}}, "Keep one"),
    ],
)
def test_wrong_loading_arguments_are_named(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        SFTConfig(model_init_kwargs=kwargs)


# trainer: K3
@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_quantized_loading_goes_through_model_init_kwargs(name):
    found = loading(SFTConfig(model_init_kwargs={name: True}))
    assert found.keys() == {"quantization_config"}
    assert getattr(found["quantization_config"], name)


# trainer: B7 K4
def test_loading_arguments_beside_a_model_are_an_error(tiny_model, byte_tokenizer):
    with pytest.raises(ValueError, match="You passed model_init_kwargs to the SFTConfig, but your model is already"):
        SFTTrainer(tiny_model, SFTConfig(model_init_kwargs={"dtype": "auto"}), processing_class=byte_tokenizer)


def test_trust_in_remote_code_is_an_option_here_and_a_flag_of_the_model():
    assert loading(SFTConfig(trust_remote_code=True)) == {"trust_remote_code": True}
    assert loading(copy.deepcopy(SFTConfig(trust_remote_code=True))) == {"trust_remote_code": True}
    assert loading(SFTConfig()) == {}


# ------------------------------------------------------------------------------------------ other arguments


# trainer: A3
def test_no_arguments_are_the_default_ones():
    assert as_sft_config(None).output_dir == "tmp_trainer"


# trainer: A3
def test_an_sft_config_comes_back_as_it_is():
    args = SFTConfig()
    assert as_sft_config(args) is args


# trainer: A3
@pytest.mark.parametrize("cls", [TrainingArguments, Seq2SeqTrainingArguments])
def test_plain_arguments_keep_every_value_and_their_secrets(cls, tmp_path):
    plain = cls(
        output_dir=str(tmp_path),
        hub_token="secret",
        eval_strategy="steps",
        weight_decay=0.25,
        optim="sgd",
        use_cpu=True,
        accelerator_config={"split_batches": True},
        label_names=["labels"],
    )
    args = as_sft_config(plain)
    assert type(args) is SFTConfig
    for field in dataclasses.fields(plain):
        if field.init:
            assert getattr(args, field.name) == getattr(plain, field.name), field.name
    assert args.hub_token == "secret"
    assert (args.bf16, args.gradient_checkpointing, args.learning_rate) == (False, False, 5e-5)


# trainer: A3
def test_arguments_with_options_of_their_own_are_not_silently_cut(tmp_path):
    @dataclasses.dataclass
    class Mine(TrainingArguments):
        flavour: str = "plain"

    assert as_sft_config(Mine(output_dir=str(tmp_path))).output_dir == str(tmp_path)
    with pytest.raises(ConfigError, match=r"a Mine has options that SFTConfig does not have: flavour"):
        as_sft_config(Mine(output_dir=str(tmp_path), flavour="hot"))
    with pytest.raises(ConfigError, match="expected an SFTConfig, got a dict"):
        as_sft_config({"max_steps": 1})


def test_arguments_of_trl_are_taken_over(tmp_path):
    trl = pytest.importorskip("trl")
    theirs = trl.SFTConfig(output_dir=str(tmp_path), completion_only_loss=True, max_length=99, use_cpu=True)
    args = as_sft_config(theirs)
    assert (args.train_on, args.max_length, args.loss_type) == ("completion", 99, "nll")
    assert as_sft_config(trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True)).train_on == "assistant"


# ------------------------------------------------------------------------------------------ copies and parsers


def test_nothing_set_works_and_everything_can_be_copied_and_written():
    args = SFTConfig()
    assert copy.deepcopy(args) == args
    assert json.loads(args.to_json_string())["learning_rate"] == 2e-5
    assert SFTConfig(**args.to_dict()) == args


def test_writing_shows_stop_tokens_but_no_secrets_and_leaves_mappings_alone():
    kwargs = {"torch_dtype": torch.bfloat16, "dtype": torch.bfloat16}
    args = SFTConfig(eos_token="<e>", hub_token="secret", model_init_kwargs=kwargs)
    written = json.loads(args.to_json_string())
    assert (written["eos_token"], written["pad_token"], written["chars_per_token"]) == ("<e>", None, 3.6)
    assert written["model_init_kwargs"] == {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert kwargs == {"torch_dtype": torch.bfloat16, "dtype": torch.bfloat16}
    assert "secret" not in args.to_json_string() + repr(args) + str(args)


def test_a_persons_own_dataclass_may_derive_from_it():
    @dataclasses.dataclass
    class Mine(SFTConfig):
        flavour: str = "plain"

    args = Mine(flavour="hot", max_seq_length=64)
    assert (args.flavour, args.max_length, modernized(args).flavour) == ("hot", 64, "hot")


# trainer: I1
def test_the_parser_takes_both_generations_of_flags():
    line = "--max_seq_length 512 --packing --torch_dtype bfloat16 --lora_target_modules all-linear --bf16 "
    line += "--gradient_checkpointing --report_to tensorboard --trust_remote_code --assistant_only_loss True"
    parser = HfArgumentParser((SFTConfig, ModelConfig))
    args, model_args = parser.parse_args_into_dataclasses(line.split(), look_for_args_file=False)
    assert (args.max_length, args.packing, args.bf16, args.gradient_checkpointing) == (512, True, True, True)
    assert (args.report_to, args.train_on, args.choose_checkpointing) == (["tensorboard"], "assistant", False)
    assert (model_args.dtype, model_args.lora_target_modules) == ("bfloat16", "all-linear")
    assert model_args.trust_remote_code


def test_the_parser_leaves_open_what_no_flag_says():
    (args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses([], look_for_args_file=False)
    assert args == SFTConfig()
    assert args.choose_checkpointing
    assert args.bf16 is None


def test_help_shows_every_options_text():
    def wide(prog):
        return argparse.ArgumentDefaultsHelpFormatter(prog, width=10_000)

    shown = HfArgumentParser((SFTConfig, ModelConfig), formatter_class=wide).format_help()
    for field in [*dataclasses.fields(SFTConfig), *dataclasses.fields(ModelConfig)]:
        if field.init:
            text = field.metadata["help"].replace("%%", "%")
            assert len(text) > 10, field.name
            assert text in shown, field.name


def test_dicts_are_parsed_too():
    given = {"max_seq_length": 64, "torch_dtype": "bfloat16", "use_peft": True}
    args, model_args = HfArgumentParser((SFTConfig, ModelConfig)).parse_dict(given)
    assert (args.max_length, model_args.dtype, model_args.use_peft) == (64, "bfloat16", True)


def test_transformers_own_fields_are_not_changed():
    field = TrainingArguments.__dataclass_fields__["warmup_steps"]
    assert field is not SFTConfig.__dataclass_fields__["warmup_steps"]


# ------------------------------------------------------------------------------------------ gradient checkpointing


# trainer: K5
def test_checkpointing_arguments_are_taken_without_a_warning(recwarn):
    args = SFTConfig(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert args.gradient_checkpointing
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("before", [None, True, False])
def test_checkpointing_may_be_assigned_later(value, before):
    args = SFTConfig(gradient_checkpointing=before)
    args.gradient_checkpointing = value
    later = modernized(modernized(args))
    assert later.gradient_checkpointing is value
    assert not later.choose_checkpointing


@pytest.mark.skipif(not hasattr(SFTConfig, "activation_checkpointing"), reason="transformers has one name only")
def test_both_names_of_checkpointing_count():
    assert SFTConfig(activation_checkpointing=True).gradient_checkpointing is True
    args = SFTConfig(gradient_checkpointing=True)
    args.activation_checkpointing = False
    assert modernized(args).gradient_checkpointing is False
    with pytest.raises(ConfigError, match="name one option and differ"):
        SFTConfig(activation_checkpointing=True, gradient_checkpointing=False)


def test_what_is_open_stays_open_in_copies():
    for args in (
        modernized(SFTConfig()),
        dataclasses.replace(SFTConfig(), seed=1),
        SFTConfig(**SFTConfig().to_dict()),
    ):
        assert args.choose_checkpointing
        assert args.bf16 is None
