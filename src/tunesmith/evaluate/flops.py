"""How much arithmetic a step of training takes, counted operation by operation on a model without weights."""

import copy
from typing import TYPE_CHECKING

import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def count_flops(config: "PretrainedConfig", batch_size: int = 1, seq_length: int = 512) -> dict[str, int]:
    """Floating-point operations of a batch of full rows; a multiplication and an addition are two.

    Counted are matrix products, attention's too, as every published figure does. Nothing is computed and no weight is
    allocated, so a model of any size takes seconds.

    Args:
        config: the model's, e.g. from `AutoConfig.from_pretrained`; it is not changed.
        batch_size: rows.
        seq_length: tokens per row.

    Returns: `forward`, `backward` of training all weights, `step` their sum, `parameters`, and `per_token` of a step.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager")
        ids = torch.zeros(batch_size, seq_length, dtype=torch.long)
        mask = torch.zeros(batch_size, 1, seq_length, seq_length)  # a whole one is not looked into: it has no values
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    step = counter.get_total_flops()
    return {
        "forward": forward,
        "backward": step - forward,
        "step": step,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "per_token": step // (batch_size * seq_length),
    }
