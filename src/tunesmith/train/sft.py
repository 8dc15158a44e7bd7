"""SFTTrainer: transformers' trainer, fed with flat documents and a loss at trained tokens only."""

import copy
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import (
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from tunesmith import allocator
from tunesmith.data.load import Row
from tunesmith.data.pack import pack
from tunesmith.data.prepare import prepare
from tunesmith.data.report import Report
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.adapt import attach, count_parameters
from tunesmith.model.attention import attention_configs, documents_attend
from tunesmith.model.capabilities import Support, probe_model
from tunesmith.model.load import check_vocabulary, load_model, load_tokenizer, read_template
from tunesmith.train.batching import EpochSampler, TokenBudgetSampler
from tunesmith.train.choose import settled
from tunesmith.train.collate import FlatCollator, PaddedCollator, loss_positions
from tunesmith.train.head import HeadLoss, loss_in_head
from tunesmith.train.loss import TokenLoss
from tunesmith.train.options import SFTConfig

MODEL_COLUMNS = ("input_ids", "labels", "weights", "seq_lengths")
HOST_KEYS = ("labels", "loss_index", "loss_targets", "loss_weights", "num_tokens")


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
        tokenizer = templated(processing_class or load_tokenizer(model.config._name_or_path), args.chat_template)
        check_vocabulary(model, tokenizer)
        if peft_config is not None:
            set_seed(args.seed)  # adapters draw their first weights
            model = attach(model, peft_config)
        self.max_length = args.max_length or longest_input(model, tokenizer)
        self.reports: dict[str, Report] = {}
        train_dataset = self._prepared("train_dataset", train_dataset, tokenizer, args)
        eval_dataset = self._prepared("eval_dataset", eval_dataset, tokenizer, args)
        args, self.choices = settled(args, model, train_dataset)
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
        if isinstance(dataset, IterableDataset | datasets.IterableDataset):
            raise ConfigError(
                f"{name}: streamed datasets are not supported yet. Give a datasets.Dataset or a list of rows."
            )
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
                max_length=self.max_length,
            )
            self.reports[name].check(max_drop_ratio=1.0)
        elif "labels" not in dataset.column_names:
            dataset = dataset.add_column("labels", dataset["input_ids"])
        packing = args.packing if name == "train_dataset" or args.eval_packing is None else args.eval_packing
        if packing and "seq_lengths" not in dataset.column_names:
            return pack(dataset, self.max_length, args.packing_strategy)
        return dataset

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
        shuffle = self.args.train_sampling_strategy != "sequential"
        sampler = TokenBudgetSampler(lengths, self.args.tokens_per_batch, self._data_seed(), shuffle=shuffle)
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
        request = loss_request(inputs, plain_head=self.support.plain_head, count_correct=count_correct)
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
        request = loss_request(inputs, plain_head=False)
        rows = outputs.logits.reshape(-1, outputs.logits.shape[-1])[request.index]
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
        model = self.model_wrapped
        if not self.is_in_train and not self.accelerator._models:
            model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        loss, weight, correct, count = self._summed(model, dataloader)
        if count == 0:
            raise ConfigError("the evaluation set has no trained token, so it has no loss.")
        metrics = {"loss": loss / weight, "perplexity": perplexity(loss / weight), "token_accuracy": correct / count}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=self.num_examples(dataloader)
        )

    def _summed(self, model: nn.Module, dataloader: DataLoader) -> list[float]:
        """Loss, weight, likeliest-token hits and trained tokens, over all batches and ranks; one wait at the end."""
        exact = torch.float32 if self.args.device.type == "mps" else torch.float64  # mps has no float64
        sums = torch.zeros(4, dtype=exact, device=self.args.device)
        for inputs in dataloader:
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self._attention():
                found = self._token_loss(model, inputs, count_correct=True)
            figures = (found.loss, step_weight(inputs), found.correct, loss_request(inputs).targets.numel())
            sums += torch.stack([torch.as_tensor(figure, dtype=exact, device=sums.device) for figure in figures])
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        return self.accelerator.reduce(sums, "sum").tolist()

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


def templated(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy that has `chat_template`; the caller's stays as it is."""
    if chat_template is None or tokenizer.chat_template == read_template(chat_template):
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = read_template(chat_template)
    return tokenizer


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase, otherwise: int = 1024) -> int:
    """Longest input, in tokens, that the model or its tokenizer names; `otherwise` where neither does."""
    config = getattr(model, "config", None)
    named = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return named or (tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else otherwise)


def loss_request(inputs: dict[str, Any], **options: Any) -> HeadLoss:
    """Where the loss of a batch is formed: as our collators found it, or found here for other people's."""
    found = inputs if "loss_index" in inputs else loss_positions(inputs["labels"])
    return HeadLoss(found["loss_index"], found["loss_targets"], found.get("loss_weights"), **options)


def step_weight(inputs: dict[str, Any]) -> Tensor | float:
    """Weight of a micro-batch's trained tokens, at least a hair above none."""
    if "loss_weights" in inputs:
        return inputs["loss_weights"].sum().clamp(min=1e-12)
    return max(loss_request(inputs).targets.numel(), 1e-12)


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a micro-batch without padding, from the host where the collator left the count there."""
    if "num_tokens" in inputs:
        return inputs["num_tokens"]
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if mask is not None else inputs["input_ids"].numel()


def perplexity(loss: float) -> float:
    """E to the loss; infinite where that overflows."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
