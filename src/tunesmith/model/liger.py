"""Liger's Triton kernels for norms, rotary positions and gated MLPs; the loss is ours already.

Written from the source of liger-kernel 0.8 (`src/liger_kernel/transformers/monkey_patch.py` at commit 00218a0); its
kernels have not run here, there was no GPU: `tests/gpu` holds the test.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from tunesmith.errors import ConfigError, ModelError

OWN_LOSS = {"fused_linear_cross_entropy": False, "cross_entropy": False}
"""Liger's losses, always off: the first replaces the model's `forward` and with it the loss formed in the head, the
second replaces `torch.nn.functional.cross_entropy` for the whole process (Granite's default)."""


def check_liger(config: dict[str, Any] | None = None) -> None:
    """Find out, before anything is loaded, whether `use_liger_kernel` can work here.

    Raises: ConfigError if the device or the package is missing, or `liger_kernel_config` asks for Liger's loss.
    """
    if not torch.cuda.is_available():
        raise ConfigError(
            "use_liger_kernel: Liger's kernels are written in Triton and need a CUDA device; torch sees none here. "
            "Leave it out: the loss is fused without it, too."
        )
    if find_spec("liger_kernel") is None:
        raise ConfigError("use_liger_kernel: liger-kernel is not installed. Run `pip install liger-kernel`.")
    liger_options(config)


def liger_options(config: dict[str, Any] | None = None) -> dict[str, Any]:
    """`liger_kernel_config` with Liger's losses off; for every kernel it leaves out Liger's default holds.

    Raises: ConfigError if `config` asks for one of the losses.
    """
    for name in OWN_LOSS:
        if (config or {}).get(name):
            raise ConfigError(
                f"liger_kernel_config: {name} would take the loss out of SFTTrainer's hands, which forms it in the "
                "head without full logits already. Remove it."
            )
    return {**(config or {}), **OWN_LOSS}


def apply_liger(model: nn.Module, config: dict[str, Any] | None = None) -> None:
    """Give `model`, wrapped by peft or not, Liger's norms, rotary positions and gated MLPs.

    Liger also replaces the functions and classes of the model's family in transformers, for the whole process.

    Raises: ConfigError as `check_liger`; ModelError for a family that Liger has no kernels for.
    """
    check_liger(config)
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = getattr(getattr(base, "config", None), "model_type", None)
    if family not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # Liger says so in its log only, and does nothing
        raise ModelError(f"use_liger_kernel: Liger has no kernels for models of type '{family}'. Leave it out.")
    _apply_liger_kernel_to_instance(model=base, **liger_options(config))
