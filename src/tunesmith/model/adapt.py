"""Which parameters train: all of them, some layers, or low-rank adapters. `ADAPTERS` maps a name to a function."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.config import ModelFields
from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean, lookup


def adapt(model: PreTrainedModel, config: ModelFields) -> nn.Module:
    """Make `model` trainable the way `config.adapter` says.

    Raises: ConfigError for unknown adapters, modules or layers.
    """
    return lookup(ADAPTERS, config.adapter, "adapter")(model, config)


def full(model: PreTrainedModel, config: ModelFields) -> nn.Module:
    """Train every parameter."""
    return model.requires_grad_(True)


def freeze(model: PreTrainedModel, config: ModelFields) -> nn.Module:
    """Train some layers, or parts of them, and freeze the rest. Layers are matched by exact number: 1 is not 11."""
    model.requires_grad_(False)
    layers = decoder_layers(model)
    count = config.freeze_trainable_layers
    if count == 0 or abs(count) > len(layers):
        raise ConfigError(f"freeze_trainable_layers: {count} does not name 1 to {len(layers)} of the model's layers.")
    for layer in layers[-count:] if count > 0 else layers[:-count]:
        parts = dict(layer.named_children())
        for name in config.freeze_trainable_modules or parts:
            if name not in parts:
                raise ConfigError(
                    f"freeze_trainable_modules: layers have no '{name}'.{did_you_mean(name, parts)} "
                    f"Known: {', '.join(parts)}."
                )
            parts[name].requires_grad_(True)
    return model


def lora(model: PreTrainedModel, config: ModelFields) -> nn.Module:
    """Train low-rank updates beside frozen weights (LoRA, arXiv:2106.09685)."""
    from peft import LoraConfig

    return attach(
        model,
        LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            modules_to_save=config.lora_modules_to_save,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            task_type="CAUSAL_LM",
        ),
    )


ADAPTERS: dict[str, Callable[[PreTrainedModel, ModelFields], nn.Module]] = {
    "full": full,
    "freeze": freeze,
    "lora": lora,
}


def attach(model: PreTrainedModel, peft_config) -> nn.Module:
    """Wrap `model` with the adapter that `peft_config` describes; the config stays as it is.

    Raises: ConfigError when a name in `target_modules` or `modules_to_save` matches no module (peft says nothing).
    """
    from copy import deepcopy

    from peft import get_peft_model

    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for option in ("target_modules", "modules_to_save"):
        wanted = getattr(peft_config, option, None)
        if wanted is None or isinstance(wanted, str):  # a string is a pattern or "all-linear"
            continue
        for name in wanted:
            if name.rpartition(".")[2] not in names:
                raise ConfigError(f"{option}: the model has no module '{name}'.{did_you_mean(name, names)}")
    try:
        return get_peft_model(model, deepcopy(peft_config))
    except ValueError as error:
        raise ConfigError(f"target_modules: {str(error).splitlines()[0]}") from error


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The stack of equal blocks: the longest `ModuleList` of the model."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not stacks:
        raise ConfigError("adapter freeze: the model has no list of layers. Use lora or full.")
    return max(stacks, key=len)


def upcast_trainable(model: nn.Module) -> int:
    """Hold trained parameters in float32 where they were loaded in half precision; returns how many tensors changed.

    A bfloat16 weight has 8 bits: an update below 1/256 of its size is rounded away, so small rates train nothing.
    """
    changed = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
            changed += 1
    return changed


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, all) parameters; a 4-bit tensor counts the values it packs."""
    trained = total = 0
    for parameter in model.parameters():
        count = parameter.numel()
        if parameter.__class__.__name__ == "Params4bit":
            count *= 2 * parameter.element_size()  # two values per stored byte
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
