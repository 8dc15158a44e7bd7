"""A model without weights: the parameters of what a recipe would train, on the meta device, for what sizes tell."""

import dataclasses

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from tunesmith.config import ModelFields
from tunesmith.model.adapt import adapt, decoder_layers
from tunesmith.model.load import load_config, named_dtype
from tunesmith.model.open import hub_options, start_of, training_dtype, unsaid

WEIGHTS_PER_SCALE = 64
"""Of four bits; nested scales are smaller still."""


def sketch(options: ModelFields, *, use_cpu: bool) -> nn.Module:
    """The model that `open_for_training` would load, with its adapter: types, shapes and what trains, no values.

    Rows of tokens that train beside an adapter are left out.

    Raises: ConfigError, ModelError as `open_for_training`; whatever a model's own code says on the meta device.
    """
    start = start_of(options, training=True, say=unsaid)
    config = load_config(start.weights, options.gguf_file, **hub_options(options))
    dtype = named_dtype(training_dtype(options, use_cpu))
    if dtype == "auto":
        dtype = named_dtype(getattr(config, "dtype", None) or "float32")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=options.trust_remote_code, attn_implementation="eager"
        )
        if start.adapter is not None:
            model = earlier_adapter(model, start.adapter)
        else:
            model = adapt(model, dataclasses.replace(options, lora_init="default", lora_trainable_tokens=None))
    if bits := 4 if options.load_in_4bit else 8 if options.load_in_8bit else None:
        pack(model, bits)
    return model


def earlier_adapter(model: transformers.PreTrainedModel, folder: str) -> nn.Module:
    """An adapter with the config of one that goes on training."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode, config.init_lora_weights = False, True
    return get_peft_model(model, config)


def pack(model: nn.Module, bits: int) -> None:
    """Give the linear layers' frozen weights the types and sizes that bitsandbytes holds them in."""
    for name, module in decoder_layers(model).named_modules():
        if type(module) is nn.Linear and "lora_" not in name:
            count = module.weight.numel()
            packed = torch.empty(
                (count // 2, 1) if bits == 4 else module.weight.shape, dtype=torch.int8, device="meta"
            )
            scales = count // WEIGHTS_PER_SCALE if bits == 4 else module.out_features
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.register_buffer("scales", torch.empty(scales, dtype=torch.float32, device="meta"))
