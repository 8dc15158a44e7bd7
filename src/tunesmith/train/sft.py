"""SFTTrainer: transformers' trainer, fed with flat documents and a loss at trained tokens only."""

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from tunesmith import allocator
from tunesmith.config import TrainingFields
from tunesmith.data.load import Row
from tunesmith.data.pack import pack
from tunesmith.data.prepare import prepare
from tunesmith.data.report import Report
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapt import attach, count_parameters, upcast_trainable
from tunesmith.model.attention import attention_configs, documents_attend
from tunesmith.model.capabilities import Support, activations_fit, bf16_is_faster, probe_model
from tunesmith.model.load import check_vocabulary, load_model, load_tokenizer
from tunesmith.train.batching import EpochSampler, TokenBudgetSampler
from tunesmith.train.collate import FlatCollator, PaddedCollator, loss_positions
from tunesmith.train.head import HeadLoss, loss_in_head
from tunesmith.train.loss import TokenLoss

MODEL_COLUMNS = ("input_ids", "labels", "weights", "seq_lengths")
NOT_DONE = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "predict_with_generate": False}
HOST_KEYS = ("labels", "loss_index", "loss_targets", "loss_weights", "num_tokens")


@dataclass
class SFTConfig(TrainingFields, Seq2SeqTrainingArguments):
    """All options of `SFTTrainer`: tunesmith's own (`TrainingFields`) and those of `Seq2SeqTrainingArguments`.

    `bf16`, `gradient_checkpointing` and `padding_free` may be `None`: the trainer chooses for hardware and model.
    """

    model_init_kwargs: dict[str, Any] | None = None
    """Arguments of `from_pretrained` when the trainer is given a model's name."""

    def __post_init__(self):
        for name, unset in NOT_DONE.items():
            if getattr(self, name) != unset:
                raise ConfigError(f"{name}: SFTTrainer's own loss does not know it yet. Remove it.")
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bf16 on a CPU that it was not told to use
        # transformers 5.2x renamed gradient_checkpointing; `None` (choose for me) must survive its defaults
        asked = self.gradient_checkpointing
        if hasattr(self, "activation_checkpointing"):
            asked = self.activation_checkpointing if asked is None else asked
            self.activation_checkpointing, self.gradient_checkpointing = asked, None
        self.choose_checkpointing = asked is None
        super().__post_init__()
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = False


class SFTTrainer(Seq2SeqTrainer):
    """Fine-tune a causal language model on examples.

    Args:
        model: a model, or the folder or Hub id of one.
        args: an `SFTConfig`; `None` is `SFTConfig()`.
        data_collator: makes a batch of rows; `None` lays documents end to end without padding.
        train_dataset, eval_dataset: rows in a format of `data.normalize.FORMATS`, or tokenized rows with `input_ids`
            (and `labels`), which are used as they are. `eval_dataset` may be a dict of datasets.
        processing_class: the tokenizer; `None` loads the model's.
        peft_config: wraps the model with an adapter.

    Attributes:
        reports: `data.report.Report` of each dataset that was rendered and tokenized here.
        choices: one line for each thing chosen for this model and machine, as said at the start of a run.
        tokens_seen: real tokens trained on so far, no padding.

    Raises: ConfigError, DataError, ModelError before anything is trained.
    """

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: SFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
    ):
        args = SFTConfig() if args is None else args
        if args.device.type == "cpu":
            allocator.tune()
        model = named_model(model, args)
        tokenizer = processing_class or load_tokenizer(model.config._name_or_path, chat_template=args.chat_template)
        check_vocabulary(model, tokenizer)
        if peft_config is not None:
            model = attach(model, peft_config)
        self.reports: dict[str, Report] = {}
        train_dataset = self._prepared("train_dataset", train_dataset, tokenizer, args)
        eval_dataset = self._prepared("eval_dataset", eval_dataset, tokenizer, args)
        self.choices: list[str] = []
        args = self._chosen(args, model, train_dataset)
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or FlatCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if use_cache is not None:
            model.config.use_cache = use_cache  # the trainer turns it off in the config, which would be saved
        self.model_accepts_loss_kwargs = True  # our loss is normalised over the whole step
        self.loss_is_scaled_for_ga = True  # the same, for transformers ≥ 5.2x
        self.tokens_seen = 0
        self.support = self._probe(data_collator)

    # ---- before training -----------------------------------------------------------------------------------------

    def _prepared(self, name: str, dataset: Any, tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> Any:
        """Rows → tokenized (and packed) rows; datasets with `input_ids` pass through."""
        if dataset is None or (isinstance(dataset, dict) and not dataset):
            return None
        if isinstance(dataset, dict):
            return {key: self._prepared(f"{name}[{key}]", part, tokenizer, args) for key, part in dataset.items()}
        if "input_ids" not in (getattr(dataset, "column_names", None) or []):
            self.reports[name] = Report()
            rows = [Row(dict(row), name, number) for number, row in enumerate(dataset, 1)]
            self.reports[name].read = len(rows)
            dataset = prepare(
                rows,
                tokenizer,
                self.reports[name],
                columns={"text": args.dataset_text_field} if args.dataset_text_field != "text" else None,
                train_on=args.train_on,
                too_long=args.too_long,
                max_length=args.max_length,
            )
            self.reports[name].check(max_drop_ratio=1.0)
        elif "labels" not in dataset.column_names:
            dataset = dataset.add_column("labels", dataset["input_ids"])
        packing = args.packing if name == "train_dataset" or args.eval_packing is None else args.eval_packing
        if packing and "seq_lengths" not in dataset.column_names:
            return pack(dataset, args.max_length or model_limit(tokenizer), args.packing_strategy)
        return dataset

    def _chosen(self, args: SFTConfig, model: nn.Module, train_dataset: Any) -> SFTConfig:
        """A copy of `args` with precision and checkpointing decided for this machine; the caller's stays as it is."""
        args = copy.copy(args)
        device = args.device
        if args.upcast_trainable and not args.fp16 and (count := upcast_trainable(model)):
            self.choices.append(
                f"weights: {count} trained tensors held in float32 (half precision loses small updates)"
            )
        if args.bf16 is None:
            args.bf16 = not args.fp16 and bf16_is_faster(device)
            why = (
                "the faster here, weights stay float32"
                if args.bf16
                else f"bfloat16 is not faster on this {device.type}"
            )
            self.choices.append(f"precision: {'bfloat16' if args.bf16 else 'float32'} products ({why})")
        args.mixed_precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
        if args.choose_checkpointing and train_dataset is not None:
            tokens = longest_batch(train_dataset, args)
            fits = activations_fit(model, tokens, bytes_per_value=2 if args.bf16 else 4, device=device)
            args.gradient_checkpointing = not fits
            said = "off (activations fit)" if fits else "on (activations would not fit)"
            self.choices.append(f"gradient checkpointing: {said}, {tokens:,} tokens in the largest micro-batch")
        if hasattr(args, "activation_checkpointing"):
            args.activation_checkpointing = args.gradient_checkpointing
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs is None:
            args.gradient_checkpointing_kwargs = {"use_reentrant": False}
            if hasattr(args, "activation_checkpointing_kwargs"):
                args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs
        return args

    def _probe(self, data_collator: Callable | None) -> Support:
        """Find out how this model may be fed, set the collator, and say what was chosen."""
        support = probe_model(self.model)
        if self.args.padding_free is False and data_collator is None:
            support = support._replace(layout="padded")
        elif self.args.padding_free and support.layout == "padded":
            raise ConfigError(f"padding_free: this model does not keep documents apart ({support.why}). Leave it out.")
        if data_collator is not None:
            support = support._replace(layout="padded")
        elif support.layout == "padded":
            pad = self.processing_class.pad_token_id
            self.data_collator = PaddedCollator(0 if pad is None else pad)
        else:
            self.data_collator = FlatCollator(boundaries=support.layout == "documents")
        self._own_batches = data_collator is None
        self._attention_configs = attention_configs(self.model) if support.layout == "documents" else []
        kind = "varlen flash attention" if self.args.device.type == "cuda" else "causal attention per document"
        said = {
            "documents": f"flat, no padding, {kind}",
            "packed": "flat, no padding, block mask of the model's own attention",
            "padded": "padded",
        }[support.layout]
        self.choices.append(f"batches: {said}" + (f" ({support.why})" if support.why else ""))
        trained, total = count_parameters(self.model)
        if self.train_dataset is not None:
            self.choices.append(f"trained parameters: {trained:,} of {total:,} ({trained / total:.2%})")
        if self.train_dataset is not None and trained == 0:
            raise ModelError("no parameter of the model is trainable. Set requires_grad, or give a peft_config.")
        return support

    def _set_signature_columns_if_needed(self) -> None:
        if self._own_batches:
            self._signature_columns = list(MODEL_COLUMNS)
        super()._set_signature_columns_if_needed()

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        return EpochSampler(len(dataset), self._data_seed())

    def get_train_dataloader(self) -> DataLoader:
        """Batches of rows, or of tokens where `tokens_per_batch` says so."""
        if self.args.tokens_per_batch is None:
            return super().get_train_dataloader()
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        sampler = TokenBudgetSampler(lengths, self.args.tokens_per_batch, self._data_seed())
        return self.accelerator.prepare(
            DataLoader(
                self._remove_unused_columns(self.train_dataset, "training"),
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def _data_seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed

    # ---- the step ------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss."""
        self.tokens_seen += real_tokens(inputs)
        with self._attention():
            return super().training_step(model, inputs, num_items_in_batch)

    def _attention(self) -> AbstractContextManager:
        return documents_attend(self._attention_configs) if self._attention_configs else nullcontext()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ weight · nll of this micro-batch over the trained tokens of the whole step, on all ranks."""
        if return_outputs:
            return self._loss_with_logits(model, inputs)
        weight = step_weight(inputs) if num_items_in_batch is None else num_items_in_batch
        found = self._token_loss(model, inputs)
        # DDP averages gradients over ranks; the weight already counts the tokens of all of them
        ranks = self.accelerator.num_processes if num_items_in_batch is not None else 1
        return found.loss * (ranks / weight)

    def _token_loss(self, model: nn.Module, inputs: dict[str, Any], count_correct: bool = False) -> TokenLoss:
        """Run the model with the loss formed in its head."""
        positions = inputs if "loss_index" in inputs else loss_positions(inputs["labels"])
        request = HeadLoss(
            positions["loss_index"],
            positions["loss_targets"],
            positions.get("loss_weights"),
            self.support.plain_head,
            count_correct,
        )
        batch = {key: value for key, value in inputs.items() if key not in HOST_KEYS}
        head = self.accelerator.unwrap_model(model).get_output_embeddings()
        with loss_in_head(head, request):
            logits = model(**batch, use_cache=False).logits
        return request.from_logits(logits)

    def _loss_with_logits(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Loss and full outputs, for callers that want logits (`compute_metrics`)."""
        batch = {key: value for key, value in inputs.items() if key not in HOST_KEYS}
        with self._attention():
            outputs = model(**batch, use_cache=False)
        positions = inputs if "loss_index" in inputs else loss_positions(inputs["labels"])
        rows = outputs.logits.reshape(-1, outputs.logits.shape[-1])[positions["loss_index"]]
        request = HeadLoss(
            positions["loss_index"], positions["loss_targets"], positions.get("loss_weights"), plain_head=False
        )
        return request.from_logits(rows).loss / step_weight(inputs), outputs

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

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss, perplexity and accuracy per trained token, the same for every batch size."""
        if self.compute_metrics is not None:
            return super().evaluation_loop(
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        model = (
            self.model_wrapped
            if self.is_in_train
            else self.accelerator.prepare_model(self.model, evaluation_mode=True)
        )
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        sums = torch.zeros(4, dtype=torch.float64, device=self.args.device)  # loss, weight, correct, tokens
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self._attention():
                found = self._token_loss(model, inputs, count_correct=True)
            count = loss_positions(inputs["labels"])["loss_index"].numel()
            sums += torch.stack(
                [
                    torch.as_tensor(value, dtype=torch.float64, device=sums.device)
                    for value in (found.loss, step_weight(inputs), found.correct, count)
                ]
            )
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, weight, correct, count = self.accelerator.reduce(sums, "sum").tolist()
        if count == 0:
            raise ConfigError("the evaluation set has no trained token, so it has no loss.")
        metrics = {"loss": loss / weight, "perplexity": perplexity(loss / weight), "token_accuracy": correct / count}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )

    # ---- after ---------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Model or adapter, tokenizer and template, all as safetensors and JSON; no pickled arguments."""
        super()._save(output_dir, state_dict)
        arguments = os.path.join(output_dir or self.args.output_dir, "training_args.bin")
        if os.path.isfile(arguments):
            os.remove(arguments)


def named_model(model: nn.Module | str | None, args: SFTConfig) -> nn.Module:
    """The model itself, or the one a name stands for.

    Raises: ConfigError for no model, or for `model_init_kwargs` beside a model that exists already.
    """
    if model is None:
        raise ConfigError("SFTTrainer: model is missing. Give a model, a folder or a Hub id.")
    if isinstance(model, str):
        return load_model(model, **{"dtype": "float32", **(args.model_init_kwargs or {})})
    if args.model_init_kwargs:
        raise ConfigError("You passed model_init_kwargs to the SFTConfig, but your model is already instantiated.")
    return model


def model_limit(tokenizer: PreTrainedTokenizerBase, otherwise: int = 1024) -> int:
    """Longest input the tokenizer names; `otherwise` where it names none."""
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else otherwise


def longest_batch(dataset: Any, args: SFTConfig) -> int:
    """Tokens in the largest micro-batch that can come up."""
    if args.tokens_per_batch is not None:
        return args.tokens_per_batch
    if not isinstance(dataset, datasets.Dataset):
        return args.per_device_train_batch_size * (args.max_length or 1024)
    lengths = sorted((len(ids) for ids in dataset["input_ids"]), reverse=True)
    return sum(lengths[: args.per_device_train_batch_size])


def step_weight(inputs: dict[str, Any]) -> Tensor | float:
    """Weight of a micro-batch's trained tokens, at least a hair above none."""
    if "loss_weights" in inputs:
        return inputs["loss_weights"].sum().clamp(min=1e-12)
    if "loss_targets" in inputs:
        return max(inputs["loss_targets"].numel(), 1e-12)
    return max(loss_positions(inputs["labels"])["loss_index"].numel(), 1e-12)


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a micro-batch without padding, from the host where the collator left the count there."""
    if "num_tokens" in inputs:
        return inputs["num_tokens"]
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


def perplexity(loss: float) -> float:
    """E to the loss; infinite where that overflows."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
