"""What the options leave open, chosen for this model and machine at start-up, each choice with a line on why."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers.trainer_utils import has_length
from transformers.training_args import ParallelMode

from tunesmith import allocator
from tunesmith.errors import ConfigError
from tunesmith.model.adapt import has_adapter, hold_in_float32, upcast_trainable
from tunesmith.model.capabilities import Support, bf16_is_faster, bf16_speedup, probe_model, usable_bytes
from tunesmith.model.quantize import (
    hold_adapters_in,
    is_quantized,
    keeps_inputs,
    multiply_in,
    require_input_grads,
)
from tunesmith.train.memory import Batch, Memory, estimate
from tunesmith.train.options import SFTConfig, loading

ROOM = 0.9
"""Share of the memory that may be had which an estimate may take; it is right to about a tenth."""

IN_CHOSEN_LINE = ("precision:", "weights:", "gradient checkpointing:", "batches:", "layers:")
"""Beginnings of the lines that `chosen_line` says shorter."""


def settled(
    args: SFTConfig, model: nn.Module, train_dataset: Any, batch: Batch | None = None
) -> tuple[SFTConfig, list[str]]:
    """A copy of `args` with nothing left open, and the lines to say; `model`'s trained weights become float32.

    `batch` is the largest micro-batch, by which checkpointing is chosen.
    """
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
    if args.choose_checkpointing and batch is not None:
        lines.append(choose_checkpointing(args, model, batch))
    lines += few_rows(args, train_dataset)
    if args.save_total_limit == 1:
        args.save_total_limit = 2
        lines.append("checkpoints: two are kept, not one, since the newest may turn out damaged (save_total_limit)")
    if args.gradient_checkpointing and args.device.type == "cpu":
        allocator.save_memory()
    if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
        args.gradient_checkpointing_kwargs = {"use_reentrant": keeps_inputs(model)}
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


def choose_checkpointing(args: SFTConfig, model: nn.Module, batch: Batch) -> str:
    """Set `args.gradient_checkpointing` by an estimate for micro-batches of `batch`; returns the line."""
    wanted = memory_of(args, model, batch, checkpointing=False)
    fits = wanted is None or wanted.total < ROOM * usable_bytes(args.device)
    args.gradient_checkpointing = not fits
    said = "off (activations fit)" if fits else "on (activations would not fit)"
    return f"gradient checkpointing: {said}, {batch.tokens:,} tokens in the largest micro-batch"


def supported(args: SFTConfig, model: nn.Module) -> Support:
    """What a check finds that `model` supports; on a GPU under training's autocast, whose kernel is not float32's."""
    halves = args.device.type == "cuda" and bool(args.bf16 or args.fp16)
    with torch.autocast("cuda", torch.float16 if args.fp16 else torch.bfloat16, enabled=halves):
        return probe_model(model)


def memory_of(args: SFTConfig, model: nn.Module, batch: Batch, *, checkpointing: bool | None = None) -> Memory | None:
    """What training `model` as `args` say takes; `None` if that cannot be told."""
    return estimate(
        model,
        batch,
        bf16=bool(args.bf16 or args.fp16),
        checkpointing=bool(args.gradient_checkpointing) if checkpointing is None else checkpointing,
        optimizer=getattr(args.optim, "value", args.optim),
        accumulates=args.gradient_accumulation_steps > 1,
        device=args.device.type,
    )


def products_of(args: SFTConfig, model: nn.Module) -> str:
    """The type that matrix products are formed in."""
    if args.bf16 or args.fp16:
        return "bfloat16" if args.bf16 else "float16"
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return "float32" if first is None else str(first.dtype).removeprefix("torch.")


def chosen_line(
    args: SFTConfig,
    model: nn.Module,
    support: Support,
    batch: Batch,
    memory: Memory | None,
    more: Sequence[str] = (),
) -> str:
    """What a person reads at the start of a run: what was chosen, in one line, with the figures that it rests on."""
    products = f"{products_of(args, model)} products"
    if args.device.type == "cpu":
        products += f" (bfloat16 is {bf16_speedup():.1f} × as fast as float32 here)"
    rows = f"{args.per_device_train_batch_size} rows, " * (args.tokens_per_batch is None)
    checkpointing = "checkpointing" if args.gradient_checkpointing else "no checkpointing"
    if memory is not None:
        checkpointing += f" ({memory.total / 1e9:.1f} of {usable_bytes(args.device) / 1e9:.1f} GB)"
    kind = {
        "documents": "attention per document, no padding",
        "packed": "attention with a block mask, no padding",
        "padded": "padded rows",
    }[support.layout]
    why = f" ({support.why})" if support.why else ""
    size = f"{rows}at most {batch.tokens:,} tokens a micro-batch"
    return "chose: " + " · ".join([products, size, checkpointing, kind + why, *more])
