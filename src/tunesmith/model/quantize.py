"""A base model in 4 or 8 bits (bitsandbytes) that only an adapter trains on (QLoRA, arXiv:2305.14314)."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError, ModelError

BNB_OPTIONS = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
)

BNB_WEIGHTS = ("Int8Params", "Params4bit")


# ---- loading -----------------------------------------------------------------------------------------------------


def with_quantization_config(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `from_pretrained` in which `load_in_4bit`, `load_in_8bit` and `bnb_...` became one config.

    transformers 5 takes no `load_in_4bit` any more; scripts and recipes still say it. Four bits are `nf4` unless
    `bnb_4bit_quant_type` says otherwise (`BitsAndBytesConfig` itself says `fp4`), the QLoRA paper's choice.

    Raises: ConfigError for 4 and 8 bits at once, for a flag beside a config, or for options without a flag.
    """
    given = {name: options[name] for name in BNB_OPTIONS if options.get(name) is not None}
    rest = {name: value for name, value in options.items() if name not in BNB_OPTIONS}
    bits = [name for name in ("load_in_4bit", "load_in_8bit") if given.get(name)]
    if len(bits) == 2:
        raise ConfigError("load_in_4bit and load_in_8bit cannot both be true. Keep one.")
    if bits and rest.get("quantization_config") is not None:
        raise ConfigError(f"{bits[0]} and quantization_config both say how to quantize. Keep one.")
    if bits:
        from transformers import BitsAndBytesConfig

        rest["quantization_config"] = BitsAndBytesConfig(**{"bnb_4bit_quant_type": "nf4", **given})
    elif lost := [name for name, value in given.items() if value and not name.startswith("load_in")]:
        raise ConfigError(f"{lost[0]} has no effect without load_in_4bit or load_in_8bit. Add one, or remove it.")
    return rest


def quantization_options(
    config: ModelFields,
    use_cpu: bool = False,
    *,
    training: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """What a recipe says about bits, as arguments of `load_model`; nothing where it says nothing.

    Args:
        training: hold the base whole on this process's GPU (`own_device`); otherwise it may spread over all of them.
        compute_dtype: what 4-bit weights multiply in. `None`: float32, until a bfloat16 run says otherwise
            (`multiply_in`).
    """
    if not (config.load_in_4bit or config.load_in_8bit):
        return {}
    place: dict[str, Any] = {"device_map": {"": "cpu"}} if use_cpu else {} if training else {"device_map": "auto"}
    if config.load_in_8bit:
        return {"load_in_8bit": True, **place}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": config.use_bnb_nested_quant,
        **place,
        **({} if compute_dtype is None else {"bnb_4bit_compute_dtype": compute_dtype}),
    }


def check_bitsandbytes(quantization_config: Any) -> None:
    """Raise ModelError if the config needs bitsandbytes and it is not installed."""
    from importlib.util import find_spec

    method = (
        quantization_config.get("quant_method", "bitsandbytes")
        if isinstance(quantization_config, dict)
        else getattr(quantization_config, "quant_method", "")
    )
    if "bitsandbytes" in str(getattr(method, "value", method)) and find_spec("bitsandbytes") is None:
        raise ModelError("4- and 8-bit models need bitsandbytes. Install it: pip install 'tunesmith[quant]'.")


def own_device() -> dict[str, Any]:
    """`device_map` for a quantized model: whole on this process's GPU, since it cannot be moved well later."""
    if torch.cuda.is_available():
        return {"": int(os.environ.get("LOCAL_RANK", "0"))}
    return {"": "cpu"}


# ---- what a model is ---------------------------------------------------------------------------------------------


def is_quantized(model: nn.Module) -> bool:
    """Whether some weights are held as integers, which cannot be trained themselves."""
    marks = ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    return any(getattr(model, mark, False) is True for mark in marks) or not kinds.isdisjoint(BNB_WEIGHTS)


def four_bit_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers whose weight bitsandbytes packs into 4 bits."""
    for module in model.modules():
        if getattr(module, "weight", None).__class__.__name__ == "Params4bit":
            yield module


# ---- training ----------------------------------------------------------------------------------------------------


def prepare_for_kbit_training(
    model: nn.Module,
    *,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    sharded: bool = False,
    **prepare_kwargs: Any,
) -> nn.Module:
    """Make a quantized base, or a `PeftModel` over one, ready for adapters to train; `model` itself is changed.

    Freezes the base, lets gradients reach the first layer under reentrant checkpointing, and keeps weights in the
    layout that autograd knows. Types stay as loaded: peft's `prepare_model_for_kbit_training` turns norms, embeddings
    and head into float32, which costs 2 bytes for each of their parameters and makes queries and keys float32, so that
    no flash kernel takes them. Sums and the loss are in float32 here anyway.

    Args:
        gradient_checkpointing, gradient_checkpointing_kwargs: as in `SFTConfig`, settled.
        sharded: FSDP or ZeRO-3 holds the weights; then nothing is changed.
        prepare_kwargs: arguments of peft's function (`prepare_in_int8_kwargs` of older scripts), which then runs
            instead, with its float32.
    """
    quiet_bitsandbytes()
    if sharded or any(parameter.is_meta for parameter in model.parameters()):
        return model
    keep_differentiable(model)
    if not hasattr(model, "peft_config"):
        model.requires_grad_(False)
    if prepare_kwargs:
        from peft import prepare_model_for_kbit_training

        given = {
            "use_gradient_checkpointing": gradient_checkpointing,
            "gradient_checkpointing_kwargs": gradient_checkpointing_kwargs,
        }
        return prepare_model_for_kbit_training(model, **{**given, **prepare_kwargs})
    require_input_grads(model, gradient_checkpointing, gradient_checkpointing_kwargs)
    return model


def require_input_grads(model: nn.Module, gradient_checkpointing: bool, kwargs: dict[str, Any] | None) -> bool:
    """Let gradients enter a frozen model at its embeddings where checkpointing is reentrant; says whether it did.

    Reentrant checkpointing gives no gradients to a block none of whose inputs asks for them, and with adapters the
    embeddings ask for none. The non-reentrant kind, our default, needs nothing; transformers 5.23 does the same itself
    for models that read `input_ids`.
    """
    reentrant = gradient_checkpointing and (kwargs or {}).get("use_reentrant", True)
    frozen = not any(parameter.requires_grad for parameter in model.get_input_embeddings().parameters())
    if reentrant and frozen:
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output.requires_grad_(True)
            )
    return bool(reentrant and frozen)


def keeps_inputs(model: nn.Module) -> bool:
    """Whether layers keep their inputs where the non-reentrant kind of checkpointing cannot let them go.

    bitsandbytes (0.50) keeps those of 8-bit products on the autograd node itself, which outlives the first pass there.
    """
    return any(type(parameter).__name__ == "Int8Params" for parameter in model.parameters())


def keep_differentiable(model: nn.Module) -> int:
    """Hold 4-bit weights in the layout that gradients pass through; returns how many were in the other one.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 repacks weights at the first forward pass in eval mode, and in that
    layout its product has no backward pass: training after an evaluation would drop gradients behind one warning.
    `load_model` prevents it. Where it has happened, scales of blocks stay rounded to bfloat16, by 0.2 % at most.
    """
    unpacked = 0
    for layer in four_bit_layers(model):
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            layer.state_dict()  # unpacks in place, as it must before saving
            state = layer.weight.quant_state
            if state.absmax.ndim == 2:  # bitsandbytes 0.50 leaves plain (not nested) scales transposed
                state.absmax = state.absmax.T.reshape(-1).float()
            unpacked += 1
    return unpacked


def keep_scales(model: nn.Module) -> None:
    """Let 8-bit layers on a CPU bear that DoRA reads their weights at every pass.

    peft (0.21) puts each weight back as a new one, which bitsandbytes (0.50) takes for one whose scales it has not
    fetched yet, and forgets those it has.
    """
    for layer in model.modules():
        is_8bit = type(getattr(layer, "weight", None)).__name__ == "Int8Params"
        if is_8bit and has_its_scales not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(has_its_scales)


def has_its_scales(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Forward pre-hook of an 8-bit layer: a weight without scales is no new one."""
    weight = layer.weight
    if getattr(weight, "CB", None) is not None and weight.SCB is None:
        weight.CB = None


@contextmanager
def rows_apart(model: nn.Module) -> Iterator[None]:
    """Inside, 8-bit layers treat every token by itself, so that what a token sees can be told from its logits.

    bitsandbytes looks for outlier features over a whole batch, so which of a token's are multiplied in 16 bits depends
    on the other tokens (by 6 % of the largest logit of SmolLM2-135M).
    """
    states = [module.state for module in model.modules() if hasattr(getattr(module, "state", None), "threshold")]
    thresholds = [state.threshold for state in states]
    try:
        for state in states:
            state.threshold = 0.0
        yield
    finally:
        for state, threshold in zip(states, thresholds):
            state.threshold = threshold


def multiply_in(model: nn.Module, dtype: torch.dtype) -> int:
    """Let 4-bit layers dequantize to `dtype` and multiply in it, and hand on what they give as it is.

    Autocast does not reach them. Without this a bfloat16 run multiplies in float32, as `BitsAndBytesConfig` says, and
    where norms are float32 makes every output float32 again: 13 % more memory and 30 % more time on a CPU.

    Returns: the number of layers.
    """
    count = 0
    for layer in four_bit_layers(model):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True
        if as_autocast_would not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(as_autocast_would)
        count += 1
    return count


def as_autocast_would(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Forward pre-hook of a 4-bit layer: under autocast its input in the type it multiplies in, else untouched."""
    states, *rest = inputs
    if torch.is_autocast_enabled(states.device.type):
        return states.to(layer.compute_dtype), *rest
    return None


def hold_adapters_in(model: nn.Module, dtype: torch.dtype) -> int:
    """Hold trained weights in `dtype`, as the QLoRA paper does in bfloat16; returns how many tensors changed.

    Only for `upcast_trainable=False`: tunesmith otherwise holds adapters in float32, which costs some megabytes and
    keeps updates that bfloat16 rounds away. DoRA's magnitudes stay in float32: their updates are smaller still.
    """
    changed = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != dtype and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(dtype)
            changed += 1
    return changed


def quiet_bitsandbytes() -> None:
    """Keep bitsandbytes from logging each product of an 8-bit layer, and an optional kernel at its import.

    peft imports it wherever it is installed, also for models that are not quantized.
    """
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)
