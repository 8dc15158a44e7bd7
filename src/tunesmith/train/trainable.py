"""What the trainer is given for a model becomes one that trains: loaded, quantized, prepared, with its adapter."""

import os
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import set_seed

from tunesmith.errors import ConfigError
from tunesmith.model.adapt import attach
from tunesmith.model.chat_format import release_padding_row
from tunesmith.model.load import load_any
from tunesmith.model.quantize import is_quantized, keep_differentiable, keep_scales, prepare_for_kbit_training
from tunesmith.train.options import SFTConfig, loading


def named_model(
    model: nn.Module | str | os.PathLike | None, args: SFTConfig, quantization_config: Any = None
) -> nn.Module:
    """The model itself, or the one that its name stands for.

    Raises: ConfigError for none, or for options of `from_pretrained` beside a model that exists already.
    """
    if model is None:
        raise ConfigError("SFTTrainer: model is missing. Give a model, a folder or a Hub id.")
    if isinstance(model, str | os.PathLike):
        return load_any(os.fspath(model), trainable_adapter=True, **named_options(args, quantization_config))
    if quantization_config is not None:
        raise ConfigError("quantization_config is for a model given by name. Give it to from_pretrained instead.")
    if given := args.model_init_kwargs:
        raise ConfigError(
            "You passed model_init_kwargs to the SFTConfig, but your model is already instantiated. "
            f"Give {', '.join(given)} to from_pretrained, or pass the model's name."
        )
    return model


def named_options(args: SFTConfig, quantization_config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained`; without a type float32, but a quantized base on a GPU keeps the checkpoint's."""
    options = loading(args)
    if quantization_config is not None:
        if options.get("quantization_config") is not None:
            raise ConfigError("quantization_config and model_init_kwargs both quantize the model. Keep one.")
        options["quantization_config"] = quantization_config
    few_bits_on_gpu = options.get("quantization_config") is not None and args.device.type != "cpu"
    return {"dtype": "auto" if few_bits_on_gpu else "float32", **options}


def adapted(
    model: nn.Module, args: SFTConfig, peft_config: Any, tokenizer: Any, say: Callable[[str], None]
) -> nn.Module:
    """The model with the adapter that `peft_config` describes, or ready to train as it is."""
    if peft_config is not None:
        if is_quantized(model):
            keep_scales(model)
            prepare_for_kbit_training(model, **(args.prepare_in_int8_kwargs or {}))
        elif args.prepare_in_int8_kwargs:
            raise ConfigError(
                "prepare_in_int8_kwargs: the model is not quantized. Remove them, or load it in 4 or 8 bits."
            )
        set_seed(args.seed)  # adapters draw their first weights
        return attach(model, peft_config, tokenizer, say)
    if is_quantized(model):
        keep_differentiable(model)
        keep_scales(model)
    elif hasattr(model, "get_input_embeddings"):
        release_padding_row(model)
    return model
