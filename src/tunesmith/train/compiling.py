"""Whether a run's layers are compiled: where nothing stands against it, the run is long, and a trial agrees."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from tunesmith.data import IGNORE_INDEX
from tunesmith.errors import ConfigError
from tunesmith.model.attention import documents_attend
from tunesmith.model.compiled import CompiledLayers, compiler, separate_layers
from tunesmith.model.lora import inputs_left_to_autocast
from tunesmith.model.quantize import is_quantized
from tunesmith.train.collate import FlatCollator

LONG_RUN = 2e14
"""Operations of training from which on compiling repays its seconds: five minutes on two cores with AMX. No clock
decides, or a resumed run might be compiled where the one before it was not, and differ in the last bits."""
TRIAL_LENGTHS, TRIAL_TRAINED = (200, 312), 16
"""Documents of the trial. Always the same, because generated code depends on the sizes that are met first."""


def plan_compiling(trainer: Any) -> tuple[bool, str]:
    """Whether `trainer` is to compile its layers, and the line that says so.

    Raises: ConfigError where `compile_layers` asks for what cannot be.
    """
    asked = trainer.args.compile_layers
    if asked is False:
        return False, "layers: not compiled (compile_layers: false)"
    why = obstacle(trainer) or ("" if asked else too_short(trainer))
    if why and asked:
        raise ConfigError(f"compile_layers: {why}. Leave it out, and the layers run as they are.")
    if why:
        return False, f"layers: not compiled ({why})"
    when = "before" if asked else "after"
    return True, f"layers: compiled {when} the first step, in some ten seconds (compile_layers: false turns it off)"


def compiled_layers(trainer: Any) -> tuple[CompiledLayers | None, str]:
    """The compiled layers of `trainer.model` after their trial, `None` if it fails; and the line that says so.

    Raises: ConfigError if it fails and `compile_layers` asks for them.
    """
    begin, compiled = time.perf_counter(), CompiledLayers(trainer.model)
    why = trial(trainer, compiled)
    if why and trainer.args.compile_layers:
        raise ConfigError(f"compile_layers: the trial failed: {why}. Leave it out, and the layers run as they are.")
    if why:
        return None, f"layers: not compiled after all, the trial failed ({why})"
    return compiled, f"layers: compiled in {time.perf_counter() - begin:.0f} s"


def obstacle(trainer: Any) -> str:
    """What stands against compiled layers here, or nothing."""
    args, model = trainer.args, trainer.model
    found = {
        "torch_compile compiles the whole model": args.torch_compile,
        "this trainer's batches are not flat": not are_flat(trainer),
        "a quantized base": is_quantized(model),
        "several processes": args.world_size > 1,
        "not tried on a GPU yet": args.device.type != "cpu" and not args.compile_layers,
        "there is no C++ compiler": args.device.type == "cpu" and compiler() is None,
        "no layers that can be told apart": not separate_layers(model),
    }
    return next((why for why, holds in found.items() if holds), "")


def are_flat(trainer: Any) -> bool:
    """Whether batches are documents laid end to end by our collator."""
    return trainer.support.layout == "documents" and isinstance(trainer.data_collator, FlatCollator)


def too_short(trainer: Any) -> str:
    """Why compiling would not repay itself, or nothing."""
    tokens = planned_tokens(trainer.args, trainer.train_dataset)
    if tokens is None:
        return "nobody knows how long the run is"
    operations = 6 * tokens * sum(parameter.numel() for parameter in trainer.model.parameters())
    return "" if operations >= LONG_RUN else "a short run"


def planned_tokens(args: Any, dataset: Any) -> int | None:
    """Tokens that the whole run will train on, `None` where rows are not counted beforehand."""
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names or not len(dataset):
        return None
    lengths = pc.list_value_length(dataset.with_format("arrow").select_columns(["input_ids"])[:]["input_ids"])
    tokens = pc.sum(lengths).as_py()
    if args.max_steps <= 0:
        return round(tokens * args.num_train_epochs)
    per_batch = args.tokens_per_batch or args.per_device_train_batch_size * tokens / len(dataset)
    return round(args.max_steps * args.gradient_accumulation_steps * per_batch)


def trial(trainer: Any, compiled: CompiledLayers) -> str:
    """Compile by training on two documents: loss and gradients must be those of the layers as they are.

    No weight changes, no gradient is left, and no generator of random numbers was moved.

    Returns: why the compiled layers cannot be used, or nothing.
    """
    model, training = trainer.model, trainer.model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with torch.random.fork_rng(), documents_attend(trainer._attention_configs):
            inputs = trial_inputs(trainer)
            expected = loss_and_norm(trainer, inputs, trained, nullcontext())
            found = loss_and_norm(trainer, inputs, trained, compiled.run())
    except Exception as error:  # whatever a compiler may meet
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(training)
        for parameter in trained:
            parameter.grad = None
    tolerance = 3e-2 if trainer.args.bf16 or trainer.args.fp16 else 1e-3
    if not drops_out(model) and not torch.allclose(found, expected, rtol=tolerance):
        return f"their loss and gradient norm are {found.tolist()} in place of {expected.tolist()}"
    return ""


def trial_inputs(trainer: Any) -> dict[str, Any]:
    """A batch of two documents of random tokens, of which a few are trained: the head is not what is on trial."""
    vocabulary = trainer.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, min(vocabulary, 1000), (length,), generator=generator) for length in TRIAL_LENGTHS]
    documents = [{"input_ids": row, "labels": torch.full_like(row, IGNORE_INDEX)} for row in rows]
    for document in documents:
        document["labels"][-TRIAL_TRAINED:] = document["input_ids"][-TRIAL_TRAINED:]
    return trainer._prepare_inputs(trainer.data_collator(documents))


def loss_and_norm(
    trainer: Any, inputs: dict[str, Any], trained: list[nn.Parameter], how: AbstractContextManager
) -> Tensor:
    """(2,) float32: the loss of `inputs`, and the norm of its gradient by the trained weights."""
    args, model = trainer.args, trainer.model.train()
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    for parameter in trained:
        parameter.grad = None
    with how, inputs_left_to_autocast(trainer._casting):
        with torch.autocast(args.device.type, dtype, enabled=bool(args.bf16 or args.fp16)):
            loss = trainer._token_loss(model, inputs)[0].loss
        loss.backward()
    norms = [parameter.grad.float().norm() for parameter in trained if parameter.grad is not None]
    return torch.stack([loss.detach().float(), torch.stack(norms).norm()])


def drops_out(model: nn.Module) -> bool:
    """Whether two passes over one batch differ by chance."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
