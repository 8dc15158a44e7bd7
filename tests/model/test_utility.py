"""`ModelConfig` becomes quantization, adapter and device map, as the contract's snippet uses them."""

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tunesmith.config import ModelConfig
from tunesmith.errors import ConfigError
from tunesmith.model import utility
from tunesmith.model.utility import get_kbit_device_map, get_peft_config, get_quantization_config
from tunesmith.train.options import SFTConfig


# trainer: I2
def test_four_bits_compute_and_store_in_the_models_type():
    found = get_quantization_config(
        ModelConfig(load_in_4bit=True, torch_dtype="bfloat16", bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    )
    assert found.load_in_4bit
    assert not found.load_in_8bit
    assert found.bnb_4bit_compute_dtype == torch.bfloat16
    assert found.bnb_4bit_quant_storage == torch.bfloat16
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("fp4", True)


# trainer: I2
@pytest.mark.parametrize("dtype", [None, "auto"])
def test_without_a_type_bitsandbytes_decides(dtype):
    found = get_quantization_config(ModelConfig(load_in_4bit=True, dtype=dtype))
    assert (found.bnb_4bit_compute_dtype, found.bnb_4bit_quant_storage) == (torch.float32, torch.uint8)
    assert (found.bnb_4bit_quant_type, found.bnb_4bit_use_double_quant) == ("nf4", False)


# trainer: I2
def test_the_storage_may_be_named_apart():
    found = get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bfloat16", bnb_4bit_quant_storage="float16"))
    assert (found.bnb_4bit_compute_dtype, found.bnb_4bit_quant_storage) == (torch.bfloat16, torch.float16)


# trainer: I2
def test_eight_bits_and_none():
    assert get_quantization_config(ModelConfig(load_in_8bit=True)).load_in_8bit
    assert get_quantization_config(ModelConfig()) is None


# trainer: I2
def test_a_type_that_torch_lacks_is_named():
    with pytest.raises(ConfigError, match=r"dtype: expected 'auto', a torch.dtype or the name of one .*, got 'bf16'"):
        get_quantization_config(ModelConfig(load_in_4bit=True, dtype="bf16"))


# trainer: I3
def test_no_adapter_unless_asked_for():
    assert get_peft_config(ModelConfig()) is None


# trainer: I3
def test_the_adapter_has_the_options_of_the_config():
    found = get_peft_config(
        ModelConfig(
            use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.1, lora_target_modules=["q_proj", "v_proj"],
            lora_modules_to_save=["lm_head"], lora_task_type="SEQ_CLS", use_rslora=True, use_dora=True,
        )
    )  # fmt: skip
    expected = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], bias="none",
        modules_to_save=["lm_head"], task_type="SEQ_CLS", use_rslora=True, use_dora=True,
    )  # fmt: skip
    assert found.to_dict() == expected.to_dict()


# trainer: I3
def test_parameters_of_experts_get_an_adapter_too():
    found = get_peft_config(ModelConfig(use_peft=True, lora_target_parameters=["mlp.experts.down_proj"]))
    assert found.target_parameters == ["mlp.experts.down_proj"]


# trainer: I3
def test_an_adapter_without_peft_says_what_to_install(monkeypatch):
    monkeypatch.setattr(utility, "is_peft_available", lambda: False)
    with pytest.raises(ValueError, match=r"peft is not installed\. Run: pip install peft"):
        get_peft_config(ModelConfig(use_peft=True))


# trainer: I4
@pytest.mark.parametrize(("device", "expected"), [("xpu", {"": "xpu:0"}), ("cuda", {"": 0}), (None, None)])
def test_the_whole_model_goes_to_this_processes_accelerator(monkeypatch, device, expected):
    monkeypatch.setattr(torch.xpu, "is_available", lambda: device == "xpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(utility, "PartialState", lambda: type("State", (), {"local_process_index": 0}))
    assert get_kbit_device_map() == expected


# trainer: I5
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_snippet_of_the_model_utilities_runs(make_tiny_model, tmp_path, checkpointing):
    make_tiny_model().save_pretrained(tmp_path)
    training_args = SFTConfig(gradient_checkpointing=checkpointing)
    model_args = ModelConfig(model_name_or_path=str(tmp_path), attn_implementation=None, torch_dtype="bfloat16")
    torch_dtype = (
        model_args.torch_dtype if model_args.torch_dtype in ["auto", None] else getattr(torch, model_args.torch_dtype)
    )
    quantization_config = get_quantization_config(model_args)
    model_kwargs = dict(  # noqa: C408 - as the snippet writes it
        revision=model_args.model_revision,
        trust_remote_code=model_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        torch_dtype=torch_dtype,
        use_cache=False if training_args.gradient_checkpointing else True,  # noqa: SIM211
        device_map=get_kbit_device_map() if quantization_config is not None else None,
        quantization_config=quantization_config,
    )
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, **model_kwargs)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is not checkpointing
    assert get_peft_config(model_args) is None


# ------------------------------------------------------------------------------------------ ModelConfig itself


# trainer: I1
def test_the_model_options_have_the_old_defaults():
    config = ModelConfig()
    expected = {
        "model_name_or_path": None, "model_revision": "main", "torch_dtype": None, "trust_remote_code": False,
        "attn_implementation": None, "use_peft": False, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05,
        "lora_target_modules": None, "lora_modules_to_save": None, "lora_task_type": "CAUSAL_LM",
        "use_rslora": False, "load_in_8bit": False, "load_in_4bit": False, "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_model_option_of_trl_1_16_is_a_field():
    trl = pytest.importorskip("trl")
    ours = {*ModelConfig.__dataclass_fields__, *SFTConfig.__dataclass_fields__}
    assert not trl.ModelConfig.__dataclass_fields__.keys() - ours


# trainer: I1
def test_contradictions_of_the_model_options_are_errors():
    with pytest.raises(ValueError, match="You can't use 8 bit and 4 bit precision at the same time"):
        ModelConfig(load_in_8bit=True, load_in_4bit=True)
    with pytest.raises(ConfigError, match=r"name one option\. Keep dtype"):
        ModelConfig(dtype="bfloat16", torch_dtype="float16")


# trainer: I1
def test_one_target_module_is_its_name_and_both_type_names_agree():
    config = ModelConfig(lora_target_modules=["all-linear"], torch_dtype="bfloat16")
    assert (config.lora_target_modules, config.dtype, config.torch_dtype) == ("all-linear", "bfloat16", "bfloat16")
