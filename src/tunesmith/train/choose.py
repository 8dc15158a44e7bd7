"""What the options leave open, chosen for this model and machine at start-up, each choice with a line on why."""

import copy
import math
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.training_args import ParallelMode

from tunesmith.errors import ConfigError
from tunesmith.model.adapt import has_adapter, hold_in_float32, upcast_trainable
from tunesmith.model.capabilities import activations_fit, bf16_is_faster
from tunesmith.model.quantize import hold_adapters_in, is_quantized, multiply_in, require_input_grads
from tunesmith.train.options import SFTConfig, loading


def settled(args: SFTConfig, model: nn.Module, train_dataset: Any) -> tuple[SFTConfig, list[str]]:
    """A copy of `args` with nothing left open, and the lines to say; `model`'s trained weights become float32."""
    check(args, model)
    args, lines = copy.copy(args), []
    if args.n_gpu > 1:
        lines.append(
            f"devices: one of {args.n_gpu} GPUs (start with torchrun --nproc_per_node {args.n_gpu} to use all)"
        )
        args._n_gpu = 1  # transformers would split each batch with DataParallel, which knows no document boundaries
    if keeps_masters(args) and (count := upcast_trainable(model)):
        lines.append(f"weights: {count} trained tensors held in float32 (half precision loses small updates)")
    if args.bf16 is None:
        lines.append(choose_precision(args, args.device))
    elif args.bf16 and args.device.type == "cpu" and not bf16_is_faster(args.device, at_least=1.0):
        lines.append("precision: bfloat16 products, as asked (float32 would be faster on this cpu)")
    if not (args.bf16 or args.fp16) and (count := hold_in_float32(model)):
        lines.append(f"weights: {count} frozen tensors held in float32 too, as products are (bf16=True: as loaded)")
    args.mixed_precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    if args.choose_checkpointing and train_dataset is not None:
        lines.append(choose_checkpointing(args, model, longest_batch(train_dataset, args)))
    lines += few_rows(args, train_dataset)
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False}
    if has_adapter(model):
        require_input_grads(model, args.gradient_checkpointing, args.gradient_checkpointing_kwargs)
    if (args.bf16 or args.fp16) and is_quantized(model):
        multiply_in(model, torch.bfloat16 if args.bf16 else torch.float16)
        if args.bf16 and args.upcast_trainable is False:
            hold_adapters_in(model, torch.bfloat16)
    if choose_unused_search(args, model):
        lines.append("ddp: no search for unused parameters, since every adapter is used (ddp_find_unused_parameters)")
    if hasattr(args, "activation_checkpointing"):  # the names since transformers 5.2x
        args.activation_checkpointing = args.gradient_checkpointing
        args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
    return args, lines


def few_rows(args: SFTConfig, dataset: Any) -> list[str]:
    """A line where a whole epoch has fewer rows than one step was to train on; a stream is not counted."""
    if isinstance(dataset, IterableDataset) or not has_length(dataset) or args.tokens_per_batch is not None:
        return []
    sizes = {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
    }
    wanted, rows = math.prod(sizes.values()), len(dataset)
    if rows >= wanted:
        return []
    product = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    packed = " packed" if "seq_lengths" in (getattr(dataset, "column_names", None) or ()) else ""
    said = f"all {rows}{packed} rows" if rows > 1 else f"the only{packed} row"
    return [f"steps: each trains on {said}, fewer than the {wanted} of one step ({product})"]


def choose_unused_search(args: SFTConfig, model: nn.Module) -> bool:
    """Spare DDP its walk over the graph after each step where nobody asked for it; says whether it did.

    transformers walks for everything that is no `PreTrainedModel`, a `PeftModel` among them. Every step uses every
    adapter, but for those on experts, to which a step may send no token.
    """
    if args.parallel_mode is not ParallelMode.DISTRIBUTED or args.ddp_find_unused_parameters is not None:
        return False
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not has_adapter(model) or any("experts" in name for name in trained):
        return False
    args.ddp_find_unused_parameters = False
    return True


def check(args: SFTConfig, model: nn.Module) -> None:
    """Raise ConfigError for options that this model or machine cannot act on."""
    if args.bf16 and args.device.type == "cuda" and not bf16_is_faster(args.device):
        raise ConfigError(
            f"bf16: {torch.cuda.get_device_name(args.device)} has no bfloat16 arithmetic (GPUs of compute capability "
            "8.0 have it) and would emulate it, slower than float32. Set fp16: true, or leave bf16 out."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ConfigError(
            "fp16: nothing multiplies in float16 on a cpu, so it would be float32. Leave it out, or set bf16=True."
        )
    if args.activation_offloading and args.device.type == "cpu":
        raise ConfigError(
            "activation_offloading: this machine trains on its cpu, whose memory the activations are in. Remove it."
        )
    experts = any("router" in name or "experts" in name for name, _ in model.named_modules())
    if args.router_aux_loss_coef and not experts:
        raise ConfigError(f"router_aux_loss_coef: {type(model).__name__} has no experts to balance. Remove it.")


def keeps_masters(args: SFTConfig) -> bool:
    """Whether trained weights are held in float32; a type that `model_init_kwargs` asked for by name is kept."""
    if args.fp16:
        return False  # accelerate does it
    if args.upcast_trainable is None:
        return "dtype" not in loading(args)
    return args.upcast_trainable


def choose_precision(args: SFTConfig, device: torch.device) -> str:
    """Set `args.bf16` by a timed probe; returns the line."""
    args.bf16 = not args.fp16 and bf16_is_faster(device)
    if args.bf16:
        return "precision: bfloat16 products (the faster here, weights stay float32)"
    return f"precision: float32 products (bfloat16 is not faster on this {device.type})"


def choose_checkpointing(args: SFTConfig, model: nn.Module, tokens: int) -> str:
    """Set `args.gradient_checkpointing` by an estimate for micro-batches of `tokens`; returns the line."""
    fits = activations_fit(model, tokens, bytes_per_value=2 if args.bf16 else 4, device=args.device)
    args.gradient_checkpointing = not fits
    said = "off (activations fit)" if fits else "on (activations would not fit)"
    return f"gradient checkpointing: {said}, {tokens:,} tokens in the largest micro-batch"


def longest_batch(dataset: Any, args: SFTConfig) -> int:
    """Tokens in the largest micro-batch that can come up."""
    if args.tokens_per_batch is not None:
        return args.tokens_per_batch
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return args.per_device_train_batch_size * (args.max_length or 1024)
    lengths = sorted((len(ids) for ids in dataset["input_ids"]), reverse=True)
    return sum(lengths[: args.per_device_train_batch_size])
