"""A `ModelConfig` → what `from_pretrained` and `SFTTrainer` take: quantization, adapter, device map."""

from typing import Any

import torch
from accelerate import PartialState
from transformers import BitsAndBytesConfig
from transformers.utils import is_peft_available

from tunesmith.errors import ConfigError
from tunesmith.model.load import named_dtype


def get_quantization_config(model_args: Any) -> BitsAndBytesConfig | None:
    """How the frozen base is held, from `load_in_4bit`, `load_in_8bit` and `bnb_4bit_*`; `None`: as it is.

    Products are formed in `dtype`, and 4-bit weights are stored as `dtype` too, so that FSDP can shard them;
    `bnb_4bit_quant_storage` names another type. With no `dtype`, or "auto", bitsandbytes decides: float32 and bytes.
    """
    if model_args.load_in_4bit:
        dtype = torch_type("dtype", model_args.dtype)
        storage = torch_type("bnb_4bit_quant_storage", getattr(model_args, "bnb_4bit_quant_storage", None))
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
            bnb_4bit_quant_storage=storage or dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if model_args.load_in_8bit else None


def get_peft_config(model_args: Any) -> Any:
    """A `LoraConfig` of the `lora_*` options, or `None` without `use_peft`.

    Raises: ConfigError if peft is not installed.
    """
    if not model_args.use_peft:
        return None
    if not is_peft_available():
        raise ConfigError("use_peft: peft is not installed. Run: pip install peft")
    from peft import LoraConfig

    given = {"target_parameters": model_args.lora_target_parameters} if model_args.lora_target_parameters else {}
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        target_modules=model_args.lora_target_modules,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        bias="none",
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        modules_to_save=model_args.lora_modules_to_save,
        **given,
    )


def get_kbit_device_map() -> dict[str, int | str] | None:
    """The whole model on this process's own accelerator, as a quantized base needs it; `None` on CPUs and Macs."""
    if torch.xpu.is_available():
        return {"": f"xpu:{PartialState().local_process_index}"}
    if torch.cuda.is_available():
        return {"": PartialState().local_process_index}
    return None


def torch_type(option: str, name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from its name; `None` for "auto" and `None`.

    Raises: ConfigError if torch has no such type.
    """
    found = named_dtype(name, option)
    return None if found == "auto" else found
