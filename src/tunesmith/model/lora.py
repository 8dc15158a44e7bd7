"""LoRA beyond its default: starts that borrow a part of the base (PiSSA, OLoRA), a faster B (LoRA+), fewer casts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ConfigError

BORROWING = ("pissa", "olora", "corda", "lora_ga")
"""Starts that take a part out of the base's weights and put it into A and B (PiSSA, arXiv:2404.02948)."""


def borrows(peft_config: Any) -> bool:
    """Whether this adapter's base is no longer the model it was loaded as."""
    return str(getattr(peft_config, "init_lora_weights", "")).lower().startswith(BORROWING)


def borrows_the_same(peft_config: Any) -> bool:
    """Whether the part that this adapter's start took can be found again: not by a random or data-driven start."""
    return str(peft_config.init_lora_weights).lower() in ("pissa", "olora")


def refuse_borrowed_embeddings(model: nn.Module) -> None:
    """Raise ConfigError for embeddings that a start took a part out of: what peft saves of them cannot be undone."""
    found = [name for name, layer in model.named_modules() if getattr(layer, "lora_embedding_A", None)]
    starts = [config.init_lora_weights for config in model.peft_config.values() if borrows(config)]
    if found and starts:
        raise ConfigError(
            f"lora_init: {starts[0]} takes a part out of '{found[0].split('.')[-1]}', which the saved adapter could "
            "not give back. Leave it out of lora_target_modules, or start without (lora_init: default)."
        )


def remember_first_weights(model: nn.Module) -> None:
    """Keep A and B as they begin, where `save_plain_lora` will need them."""
    if any(borrows(config) for config in model.peft_config.values()):
        model.first_lora_weights = {name: value.detach().cpu().clone() for name, value in lora_weights(model).items()}


def lora_weights(model: nn.Module) -> dict[str, Tensor]:
    """A and B of the active adapter, named as in an adapter file."""
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: value for name, value in found.items() if ".lora_A." in name or ".lora_B." in name}


def save_plain_lora(model: nn.Module, folder: str | Path) -> bool:
    """Rewrite the adapter saved in `folder` as LoRA on the untouched base, if it began with a part of the base.

    With W = W' + s·B₀A₀ the model is W' + s·BA = W + s·[B, -B₀][A; A₀]: rank 2r, which every program that reads LoRA
    reads right. The adapter as trained fits W' only, which nobody else has. Checkpoints keep that form to go on from.

    Returns: whether there was something to rewrite.
    """
    first = getattr(model, "first_lora_weights", None)
    if not first:
        return False
    from safetensors.torch import load_file, save_file

    path = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, start in first.items():
        sign, side = (-1, 1) if ".lora_B." in name else (1, 0)
        now = tensors[name]
        tensors[name] = torch.cat([now, sign * start.to(now)], dim=side).contiguous()
        layer, _, rest = name.partition(".lora_A.")
        base = f"{layer}.base_layer.weight"
        if rest and base in tensors:  # peft saves a head that has an adapter: W', and W is wanted
            scale = model.get_submodule(layer).scaling[model.active_adapter]
            taken = scale * (first[f"{layer}.lora_B.{rest}"] @ start)
            tensors[base] = tensors[base] + taken.to(tensors[base])
    save_file(tensors, path, metadata={"format": "pt"})
    config = deepcopy(model.peft_config[model.active_adapter])
    config.inference_mode = True
    double_rank(config)
    config.save_pretrained(str(folder))
    return True


def double_rank(config: Any) -> None:
    """Twice the rank at the same scale: alpha grows by 2, by √2 under rsLoRA."""
    factor = 2**0.5 if config.use_rslora else 2
    config.init_lora_weights = True
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * rank for name, rank in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()}


def loraplus_groups(
    model: nn.Module, learning_rate: float, ratio: float, weight_decay: float = 0.0, decayed: set[str] | None = None
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ (arXiv:2402.12354): B learns `ratio` times as fast as everything else.

    Unlike peft's `create_loraplus_optimizer`, only B does: norms, biases and DoRA's magnitudes keep `learning_rate`,
    and so do adapters on embeddings, for which that function has a rate of its own, 1e-6.

    Args:
        decayed: names that decay, as `Trainer.get_decay_parameter_names` gives them; `None`: matrices.

    Raises: ConfigError where the model has no LoRA.
    """
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 if decayed is None else name in decayed
            groups.setdefault((".lora_B." in name, decays), []).append(parameter)
    if not any(is_b for is_b, _ in groups):
        raise ConfigError("loraplus_lr_ratio: the model has no LoRA whose B could learn faster. Remove it.")
    return [
        {
            "params": parameters,
            "lr": learning_rate * (ratio if is_b else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (is_b, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def casting_layers(model: nn.Module) -> list[nn.Module]:
    """Plain LoRA layers, which make their input the type of A before they multiply; 4- and 8-bit ones do not."""
    return [
        layer
        for layer in model.modules()
        if hasattr(layer, "lora_A")
        and hasattr(layer, "_cast_input_dtype")
        and not getattr(layer, "lora_variant", None)
    ]


@contextmanager
def inputs_left_to_autocast(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, `layers` (of `casting_layers`) take their input as it comes; only for a forward pass under autocast.

    peft makes a half-precision input float32, since A is, and autocast makes it half precision again: the same numbers
    after 12 bytes a value to and fro, once for each adapter, and as much again in the backward pass.
    """
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True
