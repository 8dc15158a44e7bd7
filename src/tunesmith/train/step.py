"""TokenTrainer: transformers' trainer with a loss at trained tokens only, normalised over the whole step."""

import dis
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from tunesmith.data import IGNORE_INDEX
from tunesmith.deliver.card import write_card
from tunesmith.errors import ConfigError
from tunesmith.evaluate.flops import StepFlops, step_flops
from tunesmith.model.attention import documents_attend
from tunesmith.model.capabilities import Support, matrix_rate, output_head
from tunesmith.model.lora import casting_layers, inputs_left_to_autocast, loraplus_groups, save_plain_lora
from tunesmith.train.choose import chosen_line
from tunesmith.train.collate import loss_positions
from tunesmith.train.compiling import compiled_layers
from tunesmith.train.guards import GuardedTrainer
from tunesmith.train.head import HeadLoss, loss_in_head
from tunesmith.train.loss import PLAIN, TokenLoss, loss_kind
from tunesmith.train.memory import Batch, Memory
from tunesmith.train.neftune import EmbeddingNoise, noisy_embeddings
from tunesmith.train.processing import mend_special_ids, special_ids

logger = logging.getLogger(__name__)

HOST_KEYS = ("labels", "loss_index", "loss_targets", "loss_weights", "num_tokens", "num_squares", "skip_logits",
             "rows")  # fmt: skip
FIGURES = ("correct", "entropy", "count", "nll", "weight")


class TokenTrainer(GuardedTrainer):
    """Runs the step: forward with the loss formed in the head, backward, and the figures that are logged.

    Attributes:
        support: how the model may be fed; whoever builds the trainer sets it.
        tokens_seen: real tokens this process has trained on in this session, no padding.
        flops_seen: operations that these tokens needed, counted by sizes (`evaluate.flops.step_flops`).
        tokenizer, reports: what rows are read with, and what became of them, by name of the dataset.
        largest_batch, memory: the largest micro-batch, and what a step with it is estimated to take.
        method: how the model card calls the training of a model that writes no answers.
    """

    support: Support
    tokenizer: Any = None
    reports: Mapping[str, Any] = {}
    method: str | None = None
    largest_batch: Batch | None = None
    memory: Memory | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # our loss is normalised over the whole step; a mean of a micro-batch is divided by how many there are
        self.model_accepts_loss_kwargs = may_know_the_step(type(self).compute_loss)
        self.label_names = ["labels"]  # transformers reads them off a forward's signature, which wrappers hide
        self.tokens_seen, self.flops_seen, self._flops = 0, 0.0, StepFlops(0.0, 0.0, 0.0)
        self._tokens_before: int | None = None  # of the sessions before this one, all processes
        self._steps_before = 0
        self._attention_configs: list[Any] = []
        self._figures = torch.zeros(len(FIGURES))
        self.loss_kind = loss_kind(self.args.loss_type, self.args.label_smoothing_factor)
        self.label_smoother = None  # transformers' own, which needs all logits
        self.neftune_noise_alpha = None  # and its noise, which knows one length for the whole batch
        self._noise = EmbeddingNoise(None)
        self._compiles, self._compiled = False, None
        self._casting: list[nn.Module] = []

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train; arguments as in transformers: `resume_from_checkpoint`, `trial`, `ignore_keys_for_eval`."""
        self._steps_before = self._steps_uncounted = 0
        self._special_ids = special_ids(self.model)
        try:
            output = super().train(*args, **kwargs)
        finally:
            self.is_in_train = False
        if self.args.include_tokens_per_second:
            output.metrics["train_tokens_per_second"] = self.count_tokens_here() / output.metrics["train_runtime"]
        return output._replace(training_loss=output.metrics["train_loss"])

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """With noise on the embeddings of the model that trains, which `train` may have made anew.

        `auto_find_batch_size` calls this once for each size that it tries; figures of the sizes before do not count.
        """
        self.tokens_seen, self.flops_seen, self._tokens_before = 0, 0.0, None
        self._figures = torch.zeros(len(FIGURES), device=self.args.device)
        model = self.accelerator.unwrap_model(self.model)
        self._flops = step_flops(model)
        mend_special_ids(model, self._special_ids)
        self._casting = casting_layers(model) if self.args.bf16 or self.args.fp16 else []
        if self.args.compile_layers:
            self._compile()
        with noisy_embeddings(model, self.args.neftune_noise_alpha) as self._noise:
            return super()._inner_training_loop(*args, **kwargs)

    def _compile(self) -> None:
        """Compile the layers of the model that trains, if that was planned."""
        if self._compiles and (self._compiled is None or self._compiled.model is not self.model):
            self._compiled, line = compiled_layers(self)
            self._compiles = self._compiled is not None
            self.choices.append(line)
            logger.log(logging.INFO if self._compiles else logging.WARNING, line)

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is a person's: `compute_loss_func`, or a subclass's `compute_loss` or `prediction_step`."""
        cls = type(self)
        overridden = (cls.compute_loss, cls.prediction_step) != (
            TokenTrainer.compute_loss,
            TokenTrainer.prediction_step,
        )
        return overridden or self.compute_loss_func is not None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of the next step; none after the last, which transformers would go beyond.

        It looks whether `max_steps` are done when a step has ended, and not when it goes on from a checkpoint.
        """
        if 0 < self.state.max_steps <= self.state.global_step:
            self._restore_once()
            self.control.should_training_stop = True
            return [], None
        if self.state.global_step:  # nobody waits for the first loss, and a resumed run compiles where this one did
            self._compile()
        return super().get_batch_samples(*args, **kwargs)

    # ---- the step ------------------------------------------------------------------------------------------------

    def _one_pass(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """Forward and backward of one micro-batch, or of a part; returns its share of the step's loss."""
        if self._tokens_before is None:
            self._tokens_before = self.state.num_input_tokens_seen  # from the checkpoint, if there was one
            self._steps_before = self.state.global_step
        tokens = real_tokens(inputs)
        self.tokens_seen += tokens
        self.flops_seen += self._flops.of(tokens, len(inputs.get("loss_index", ())), inputs.get("num_squares", 0))
        with self._attention(inputs), self._layers(), self._activations(), self._noise.of(inputs):
            return super()._one_pass(model, inputs, num_items_in_batch)

    def _step_state(self) -> dict[str, Any]:
        sums = {"figures": self._figures.clone(), "tokens": self.tokens_seen, "flops": self.flops_seen}
        return super()._step_state() | sums

    def _take_up(self, state: dict[str, Any]) -> None:
        super()._take_up(state)
        self._figures.copy_(state["figures"])
        self.tokens_seen, self.flops_seen = state["tokens"], state["flops"]

    def _forget_step(self) -> None:
        self._figures.copy_(self._at_step_begin["figures"])

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, with the places of the loss, which our collators have found already."""
        inputs = super()._prepare_inputs(inputs)
        if "loss_index" in inputs or inputs.get("labels") is None:
            return inputs
        return {**inputs, **loss_positions(inputs["labels"])}

    def _attention(self, inputs: dict[str, Any]) -> AbstractContextManager:
        """Document attention, for batches that say where documents end."""
        flat = self._attention_configs and "document_lengths" in inputs
        return documents_attend(self._attention_configs) if flat else nullcontext()

    @contextmanager
    def _layers(self) -> Iterator[None]:
        """The model's layers in their compiled form, if they have one; adapters cast no input that autocast casts."""
        compiled = nullcontext() if self._compiled is None else self._compiled.run()
        with compiled, inputs_left_to_autocast(self._casting):
            yield

    def _activations(self) -> AbstractContextManager:
        offload = self.args.activation_offloading
        return torch.autograd.graph.save_on_cpu(pin_memory=True) if offload else nullcontext()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ weight · loss of this micro-batch over the weight of the whole step's trained tokens, on all ranks."""
        if return_outputs or self.compute_loss_func is not None:
            loss, outputs = self._loss_with_logits(model, inputs, num_items_in_batch)
            return (loss, outputs) if return_outputs else loss
        found, balance = self._token_loss(model, inputs, metrics=self.args.token_metrics)
        self._count(found, inputs)
        return self._share_of_step(found, balance, inputs, num_items_in_batch)

    def _share_of_step(
        self, found: TokenLoss, balance: Tensor | None, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> Tensor:
        """What these sums add to the loss of the step."""
        weight = step_weight(inputs) if num_items_in_batch is None else num_items_in_batch
        loss = found.loss * (self._ranks_averaged(num_items_in_batch) / weight)
        if balance is not None:
            loss = loss + balance * (self.args.router_aux_loss_coef / self.current_gradient_accumulation_steps)
        return loss

    def _count(self, found: TokenLoss, inputs: dict[str, Any]) -> None:
        """Add to the figures of the next log line."""
        if self.args.token_metrics:
            count = inputs["loss_targets"].numel()
            figures = (found.correct, found.entropy, count, found.nll, step_weight(inputs))
            self._figures += stacked(figures, self._figures)

    def _ranks_averaged(self, num_items_in_batch: Any) -> int:
        """DDP averages gradients over ranks, and the step's weight already counts the tokens of all of them."""
        return self.accelerator.num_processes if num_items_in_batch is not None else 1

    def _token_loss(
        self, model: nn.Module, inputs: dict[str, Any], *, metrics: bool = False
    ) -> tuple[TokenLoss, Tensor | None]:
        """Run the model with the loss formed in its head; the sums, and an expert model's load-balancing loss."""
        check_batch(inputs)
        kind = self.loss_kind if model.training else PLAIN  # evaluation reports what perplexity is made of
        request = loss_request(inputs, plain_head=self.support.plain_head, kind=kind, metrics=metrics)
        head = output_head(self.accelerator.unwrap_model(model))
        if head is None:
            outputs = model(**self._model_inputs(inputs))
            rows = outputs.logits.reshape(-1, outputs.logits.shape[-1])[request.index]
            found = replace(request, plain_head=False).from_logits(rows)
            return found, getattr(outputs, "aux_loss", None)
        with loss_in_head(head, request):
            outputs = model(**self._model_inputs(inputs))
        return request.from_logits(outputs.logits), getattr(outputs, "aux_loss", None)

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        batch = {key: value for key, value in inputs.items() if key not in HOST_KEYS}
        if hasattr(self.accelerator.unwrap_model(self.model), "config"):  # a person's own module keeps no cache
            batch["use_cache"] = False
        return batch | {"output_router_logits": True} if self.args.router_aux_loss_coef else batch

    def _loss_with_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> tuple[Tensor, Any]:
        """Loss and full outputs of one forward, for whoever wants logits: metrics, `predict`, a subclass."""
        with self._attention(inputs):
            outputs = model(**self._model_inputs(inputs))
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, inputs["labels"], num_items_in_batch=num_items_in_batch)
            return loss * self._ranks_averaged(num_items_in_batch), outputs
        kind = self.loss_kind if model.training else PLAIN
        request = loss_request(inputs, plain_head=False, kind=kind, metrics=model.training and self.args.token_metrics)
        found = request.from_logits(outputs.logits.reshape(-1, outputs.logits.shape[-1])[request.index])
        if not model.training:
            return self._share_of_step(found, None, inputs, num_items_in_batch), outputs
        self._count(found, inputs)
        balance = getattr(outputs, "aux_loss", None) if self.args.router_aux_loss_coef else None
        return self._share_of_step(found, balance, inputs, num_items_in_batch), outputs

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | float | None:
        """Weight of all trained tokens of one step: over its micro-batches, and over all ranks."""
        if not batch_samples:
            return None
        total = sum(step_weight(batch) for batch in batch_samples)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(torch.as_tensor(total, dtype=torch.float64, device=device), "sum")
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: transformers' count walks every module at every micro-batch; ours is `tokens_seen`."""
        return 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer; with `loraplus_lr_ratio` its groups are those of LoRA+."""
        if self.args.loraplus_lr_ratio is not None and self.optimizer is None:
            target = self.model if model is None else model
            make, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, target)
            rates = (self.args.learning_rate, self.args.loraplus_lr_ratio, self.args.weight_decay)
            self.optimizer = make(
                loraplus_groups(target, *rates, set(self.get_decay_parameter_names(target))), **options
            )
        return super().create_optimizer(model)

    # ---- what is logged and saved --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the trained tokens since the last log line."""
        if self.is_in_train and "loss" in logs:
            logs["num_tokens"] = self.count_tokens()
            if self.args.token_metrics:
                found = dict(zip(FIGURES, self.accelerator.reduce(self._figures, "sum").tolist()))
                self._figures.zero_()
                if not found["count"]:
                    logger.warning(
                        "step %d: none of the tokens since the last log line is trained", self.state.global_step
                    )
                count = max(found["count"], 1)
                logs |= {"mean_token_accuracy": found["correct"] / count, "entropy": found["entropy"] / count}
                if self.loss_kind != PLAIN:
                    logs["nll"] = found["nll"] / max(found["weight"], 1e-12)
        if {"train_loss", "train_samples_per_second", "train_steps_per_second"} <= logs.keys():
            self._count_whole_run(logs)
        super().log(logs, start_time)

    def _count_whole_run(self, metrics: dict[str, float]) -> None:
        """Put right what transformers says at the end of training.

        It leaves steps since the last log line to each process, and 5.23 divides the losses of all sessions, which our
        checkpoints hand on, by the steps of this one. 5.17 takes the steps of the whole schedule for those of now.
        """
        total = torch.tensor(self._total_loss_scalar, dtype=torch.float64, device=self.args.device)
        total = self.accelerator.reduce(total, "mean") if self.args.world_size > 1 else total
        metrics["train_loss"] = float(total) / max(self.state.global_step - self._steps_uncounted, 1)
        if not hasattr(self, "_initial_global_step") and self.steps_here:
            for rate in ("train_samples_per_second", "train_steps_per_second"):
                metrics[rate] *= self.steps_here / self.state.max_steps

    def chosen_line(self) -> str | None:
        """What was chosen for this model and machine, in one line; `None` where nothing is trained."""
        if self.largest_batch is None:
            return None
        more = ["a common beginning once"] if getattr(self.data_collator, "share_prefix", False) else []
        more += ["layers compiled, some ten seconds"] if self._compiles else []
        return chosen_line(self.args, self.model, self.support, self.largest_batch, self.memory, more)

    @property
    def peak_flops(self) -> float | None:
        """Operations a second that this device does in the type of products, timed once; `None` where it cannot be."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
        return matrix_rate(self.args.device.type, dtype)

    @property
    def steps_here(self) -> int:
        """Optimizer steps of this session: since `train` was called, not since the run began."""
        return 0 if self._tokens_before is None else self.state.global_step - self._steps_before

    def count_tokens_here(self) -> int:
        """Real tokens that all processes have trained on in this session; every process must call it."""
        here = torch.tensor(self.tokens_seen, dtype=torch.int64, device=self.args.device)
        return int(self.accelerator.reduce(here, "sum"))

    def count_tokens(self) -> int:
        """The same of all sessions, kept in the trainer's state; every process must call it."""
        before = self.state.num_input_tokens_seen if self._tokens_before is None else self._tokens_before
        total = before + self.count_tokens_here()
        if self.args.include_num_input_tokens_seen == "no":  # else transformers counts there
            self.state.num_input_tokens_seen = total
        return total

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.count_tokens()
        super()._save_checkpoint(*args, **kwargs)

    def _counters(self) -> dict[str, Any]:
        return super()._counters() | {"figures": self._figures.tolist()}

    def _restore_counters(self, saved: Mapping[str, Any]) -> None:
        super()._restore_counters(saved)
        self._figures += torch.tensor(saved["figures"], device=self._figures.device)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Model or adapter, tokenizer and template, all as safetensors and JSON; no pickled arguments."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # since 5.23 every process comes here, to gather what is sharded
            return
        folder = output_dir or self.args.output_dir
        if not os.path.basename(os.path.normpath(folder)).startswith("checkpoint-"):
            save_plain_lora(self.model, folder)  # PiSSA and its like; checkpoints keep the form that trains on
        arguments = os.path.join(folder, "training_args.bin")
        if os.path.isfile(arguments):
            os.remove(arguments)

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """Write README.md into `output_dir`, on the first process only; one that a person wrote stays."""
        model = self.accelerator.unwrap_model(self.model)
        if self.is_world_process_zero():
            write_card(
                self.args.output_dir,
                model=getattr(model, "base", model),  # a reward model's language model
                args=self.args,
                tokenizer=self.tokenizer,
                model_name=model_name,
                dataset_name=dataset_name,
                tags=tags,
                reports=self.reports,
                log_history=self.state.log_history,
                method=self.method,
            )


def may_know_the_step(compute_loss: Callable) -> bool:
    """Whether a `compute_loss` may divide by the weight of the whole step: it reads it, or asks another that does.

    transformers takes that for granted wherever the model's forward takes keywords, and then gradients of a plain
    mean grow with `gradient_accumulation_steps`.
    """
    code = getattr(inspect.unwrap(compute_loss), "__code__", None)
    if code is None:
        return True
    asks = {"num_items_in_batch", "super", "compute_loss"}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        asks.add(
            code.co_varnames[code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)]
        )
    loads = (step.argval for step in dis.get_instructions(code) if step.opname.startswith("LOAD"))
    return any(not asks.isdisjoint(names if isinstance(names, tuple) else (names,)) for names in loads)


def stacked(values: Iterable[Any], like: Tensor) -> Tensor:
    """Numbers and scalar tensors as one tensor of the type and device of `like`; no wait for the device."""
    return torch.stack([value.to(like) if isinstance(value, Tensor) else like.new_full((), value) for value in values])


def loss_request(inputs: dict[str, Any], **options: Any) -> HeadLoss:
    """Where the loss of a prepared batch is formed."""
    return HeadLoss(inputs["loss_index"], inputs["loss_targets"], inputs.get("loss_weights"), **options)


def check_batch(inputs: Any) -> None:
    """Raise ConfigError if a person's collator made something that has no labels."""
    if not isinstance(inputs, Mapping):
        raise ConfigError(f"data_collator: expected a dict of tensors, got a {type(inputs).__name__}.")
    if inputs.get("labels") is None:
        found = ", ".join(key for key in inputs if key not in HOST_KEYS)
        raise ConfigError(
            f"data_collator: its batch has no labels, only {found}. Add labels: the ids where a token is trained and "
            "-100 elsewhere, not shifted. Or leave data_collator out."
        )


def step_weight(inputs: dict[str, Any]) -> Tensor | float:
    """Weight of a micro-batch's trained tokens, at least a hair above none."""
    if "loss_weights" in inputs:
        return inputs["loss_weights"].sum().clamp(min=1e-12)
    if "loss_targets" in inputs:
        return max(inputs["loss_targets"].numel(), 1e-12)
    check_batch(inputs)
    return (inputs["labels"][..., 1:] != IGNORE_INDEX).sum().clamp(min=1e-12)


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a micro-batch without padding, from the host where the collator left the count there."""
    if "num_tokens" in inputs:
        return inputs["num_tokens"]
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
