"""SFTTrainer: rows in any known format and a causal language model go in, a trained model comes out."""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

import datasets
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback

from tunesmith import allocator
from tunesmith.data import IGNORE_INDEX
from tunesmith.data.report import Report
from tunesmith.deliver.card import tag_model
from tunesmith.errors import ConfigError
from tunesmith.model.adapt import check_trainable, trainable_line, upcast_trainable
from tunesmith.model.attention import attention_configs
from tunesmith.model.capabilities import Support
from tunesmith.model.liger import apply_liger, check_liger, liger_options
from tunesmith.model.load import check_vocabulary
from tunesmith.model.quantize import is_quantized
from tunesmith.train.arguments import (
    check_arguments,
    check_ids,
    check_optimizer,
    check_output_dir,
    explains_arguments,
    makes_labels,
    num_embeddings,
    unless_default,
)
from tunesmith.train.choose import keeps_masters, memory_of, settled, supported
from tunesmith.train.collate import FlatCollator, LocatedCollator
from tunesmith.train.compiling import drops_out, plan_compiling
from tunesmith.train.completion_only import DataCollatorForCompletionOnlyLM, LabelsForReport
from tunesmith.train.datasets import prepared, prepared_mixture
from tunesmith.train.generation import GeneratingTrainer
from tunesmith.train.largest import largest_batch
from tunesmith.train.loaders import (
    epoch_sampler,
    eval_batches,
    eval_stream_loader,
    loader,
    stream_loader,
    train_batches,
)
from tunesmith.train.loss import loss_kind
from tunesmith.train.options import SFTConfig, as_sft_config, modernized
from tunesmith.train.processing import one_of, processing_for, tokenizer_in
from tunesmith.train.reading import Preparation, check_report, preparation_of
from tunesmith.train.trainable import adapted, named_model

logger = logging.getLogger(__name__)

MODEL_COLUMNS = ("input_ids", "labels", "weights", "seq_lengths")
DEFAULT_MAX_LENGTH = 1024


class SFTTrainer(GeneratingTrainer):
    """Fine-tune a causal language model on examples.

    The arguments stand in TRL 0.13's order; those of later versions are keywords.

    Args:
        model: a model, or the folder or Hub id of one (of an adapter too, which then goes on training).
        args: an `SFTConfig`; transformers' `TrainingArguments` are taken over; `None` is `SFTConfig()`.
        data_collator: makes a batch of rows; `None`, or TRL 0.13's `DataCollatorForLanguageModeling(mlm=False)`, lays
            documents end to end without padding.
        train_dataset, eval_dataset: rows in a format of `data.formats.FORMATS`, or tokenized rows with `input_ids`
            (and `labels`), which are used as they are: a `datasets.Dataset` or `IterableDataset`, a torch dataset, or
            a list of dicts. `eval_dataset` may be a dict of them.
        processing_class: the tokenizer, or a processor that has one; `None` loads the model's. It stays unchanged.
        model_init: makes the model, in place of `model`; called again when `train` begins.
        compute_metrics: takes transformers' `EvalPrediction`, returns a dict.
        callbacks, optimizers, preprocess_logits_for_metrics: as in transformers.
        peft_config: wraps the model with an adapter; a copy is used.
        formatting_func: makes the text of a row, or of a batch of rows.
        tokenizer: older name of `processing_class`.
        compute_loss_func: `(outputs, labels, num_items_in_batch) -> loss`, in place of the trainer's own loss.
        optimizer_cls_and_kwargs: as in transformers.
        quantization_config: `BitsAndBytesConfig` for a model given by name.

    Attributes:
        reports: `data.report.Report` of each dataset that was rendered and tokenized here.
        choices: one line for each thing chosen for this model and machine.
        largest_batch, memory: the largest micro-batch, and what a step with it takes; `None` where nothing is trained,
            or a model's config does not tell its sizes.
        tokens_seen: real tokens this process has trained on, no padding.

    Raises: ConfigError, DataError, ModelError before anything is trained.
    """

    @explains_arguments
    def __init__(
        self,
        model: nn.Module | str | os.PathLike | None = None,
        args: SFTConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[[], nn.Module] | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: Any = None,
        formatting_func: Callable | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        compute_loss_func: Callable | None = None,
        optimizer_cls_and_kwargs: tuple | None = None,
        quantization_config: Any = None,
    ):
        check_arguments(self, locals())
        self.args = checked_args(args, optimizers, optimizer_cls_and_kwargs)
        self.model_init, self._peft_config, self._formatting_func = model_init, peft_config, formatting_func
        self.compute_loss_func = compute_loss_func
        self.choices: list[str] = []
        self.reports: dict[str, Report] = {}
        model, processing_class = self._loaded(model, one_of(processing_class, tokenizer), quantization_config)
        if train_dataset is not None:
            check_trainable(model)
        data_collator = self._collating(data_collator)
        train_dataset = self._prepared("train_dataset", train_dataset)
        eval_dataset = self._prepared("eval_dataset", eval_dataset)
        args = self._settled(model, train_dataset)
        use_cache = getattr(getattr(model, "config", None), "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            compute_loss_func=compute_loss_func,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if optimizers[0] is not None:
            check_optimizer(optimizers[0], model)
        self.model_init = model_init
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs  # Seq2SeqTrainer does not pass it on
        if use_cache is not None:
            model.config.use_cache = use_cache  # the trainer turns it off in the config, which would be saved
        for callback in self.callback_handler.callbacks:
            if args.logging_dir is not None and type(callback).__name__ == "TensorBoardCallback":
                callback.logging_dir = args.logging_dir  # transformers 5 reads an environment variable instead
        tag_model(model)
        self.support = self._probe()
        if train_dataset is not None:
            self._compiles, line = plan_compiling(self)
            self.choices.append(line)
        for line in self.choices:
            logger.info(line)

    # ---- before training -----------------------------------------------------------------------------------------

    def _loaded(self, model: Any, processing_class: Any, quantization_config: Any) -> tuple[nn.Module, Any]:
        """The model with its adapter, and what reads its texts, found where it is not given."""
        args, model = self.args, self._fresh_model(model, quantization_config)
        processing_class = processing_for(model, processing_class, args)
        self.tokenizer = tokenizer_in(processing_class)
        if self.tokenizer is not None:
            check_vocabulary(model, self.tokenizer)
        model = adapted(model, args, self._peft_config, self.tokenizer, self.choices.append)
        self.max_length = args.max_length = args.max_seq_length = longest_row(args, model, self.tokenizer)
        self._num_embeddings = num_embeddings(model)
        return model, processing_class

    def _collating(self, data_collator: Callable | None) -> Callable:
        """The person's collator, or ours where it does no more than ours; then rows are padded as it would have."""
        args, multiple = self.args, getattr(data_collator, "pad_to_multiple_of", None)
        if not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            data_collator = unless_default(data_collator, self.choices.append)
        self._label_with, self._makes_labels = labels_by(data_collator, args), makes_labels(data_collator)
        self._own_batches = data_collator is None or self._label_with is not None
        if not self._own_batches:
            return data_collator
        args.pad_to_multiple_of = args.pad_to_multiple_of or multiple
        return FlatCollator()

    def _settled(self, model: nn.Module, train_dataset: Any) -> SFTConfig:
        """The arguments with nothing left open, as this model, machine and largest micro-batch have it."""
        if train_dataset is not None:
            ours = self._own_batches or self.args.world_size == 1
            self.largest_batch = largest_batch(train_dataset, self.args, drawn=ours)
        args, lines = settled(self.args, model, train_dataset, self.largest_batch)
        self.choices += lines
        self.memory = None if self.largest_batch is None else memory_of(args, model, self.largest_batch)
        if args.use_liger_kernel:
            apply_liger(model, args.liger_kernel_config)
            args.liger_kernel_config = liger_options(args.liger_kernel_config)  # transformers applies them once more
        return args

    def _fresh_model(self, model: nn.Module | str | None, quantization_config: Any) -> nn.Module:
        """The model itself, the one that its name stands for, or what `model_init` makes."""
        if self.model_init is None:
            return named_model(model, self.args, quantization_config)
        if model is not None:
            raise ConfigError("SFTTrainer takes either a model or a model_init, but not both. Remove one.")
        return super().call_model_init()

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model, made ready as the first was; `train` begins with it where there is a `model_init`."""
        model = super().call_model_init(trial)
        model = adapted(model, self.args, self._peft_config, self.tokenizer, lambda _: None)
        if keeps_masters(self.args):
            upcast_trainable(model)
        self._attention_configs = attention_configs(model) if self._attention_configs else []
        tag_model(model)
        return model

    def _prepared(self, name: str, dataset: Any) -> Any:
        """The dataset as token rows; a dict of training sets is mixed, one of evaluation sets stays a dict."""
        evaluation = name != "train_dataset"
        if dataset is None or (isinstance(dataset, dict) and not dataset):
            return None
        if isinstance(dataset, dict) and evaluation:
            return {key: self._prepared(f"{name}[{key}]", part) for key, part in dataset.items()}
        how = preparation_of(
            self.args,
            self.tokenizer,
            self.max_length,
            evaluation=evaluation,
            formatting_func=self._formatting_func,
            label_with=self._label_with,
            own_collator=not self._own_batches,
            makes_labels=self._makes_labels,
            unweighed=self._unweighed(),
            num_ids=self._num_embeddings,
        )
        if self.tokenizer is None and not how.skip:
            raise ConfigError(
                f"{name}: rows need a tokenizer, and the processing_class has none. Give a tokenizer, or prepare the "
                'rows yourself and set dataset_kwargs={"skip_prepare_dataset": True}.'
            )
        if type(dataset) is dict:
            return prepared_mixture(name, dataset, how, self.reports)
        check_ids(name, dataset, self._num_embeddings)
        self.reports[name] = Report()
        found = prepared(name, dataset, how, self.reports[name])
        if not evaluation and self.reports[name].num_tokens:  # a stream has none yet
            check_report(name, self.reports[name], how.packing)
        say_of_rows(name, self.reports[name], how)
        ours = found is not dataset or hasattr(found, "infinite")
        if how.packing and not evaluation and ours:
            found.infinite = self.args.max_steps > 0  # a stream begins again at its end; TRL's rows say so, too
        return found

    def _unweighed(self) -> str:
        """The argument that leaves weights of tokens out of the loss, if one does."""
        if self.compute_loss_func is not None:
            return "compute_loss_func"
        sees_columns = self._own_batches or self.args.remove_unused_columns is False
        return "" if sees_columns else "data_collator"

    def _probe(self) -> Support:
        """Find out how this model may be fed, set the collator, and say what was chosen."""
        support = self._asked(self._measured())
        shares = shares_prefix(self, support)
        if self._own_batches and support.layout == "padded":
            self.data_collator = self._padding_collator()
        elif self._own_batches:
            self.data_collator = FlatCollator(support.layout == "documents", self.args.pad_to_multiple_of, shares)
        self._attention_configs = attention_configs(self.model) if support.layout == "documents" else []
        sharing = ", a common beginning once" if getattr(self.data_collator, "share_prefix", False) else ""
        kind = "varlen flash attention" if self.args.device.type == "cuda" else "causal attention per document"
        said = {
            "documents": f"flat, no padding, {kind}{sharing}",
            "packed": "flat, no padding, block mask of the model's own attention",
            "padded": "padded",
        }[support.layout]
        self.choices.append(f"batches: {said}" + (f" ({support.why})" if support.why else ""))
        if self.train_dataset is not None:
            self.choices.append(trainable_line(self.model))
        return support

    def _asked(self, support: Support) -> Support:
        """What the model supports, less what was not asked for."""
        if self.args.padding_free and support.layout == "padded":
            raise ConfigError(f"padding_free: this model does not keep documents apart ({support.why}). Leave it out.")
        if self.args.padding_free is False or not self._own_batches:
            return support._replace(layout="padded")
        if not self.args.ignore_pad_token_for_loss:
            return support._replace(layout="padded", why="ignore_pad_token_for_loss: false trains the padding")
        if self.has_own_loss and self.args.padding_free is None and not self.args.packing:
            return support._replace(layout="padded", why="a loss of one's own may count on a row for each example")
        return support

    def _measured(self) -> Support:
        """What the start-up check finds; a model that needs more than text may fail at it, if it need not be known."""
        if not hasattr(self.model, "get_input_embeddings"):
            return Support("padded", plain_head=False, why="a module of one's own")
        try:
            return supported(self.args, self.model)
        except Exception as error:
            if self._own_batches:
                raise
            why = f"the start-up check failed: {type(error).__name__}: {error}".splitlines()[0]
            return Support("padded", plain_head=False, why=why)

    # ---- batches -------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        if self._own_batches:
            skips = (self.args.dataset_kwargs or {}).get("skip_prepare_dataset")  # then rows may hold padding
            self._signature_columns = [*MODEL_COLUMNS, *(["attention_mask"] if skips else [])]
        super()._set_signature_columns_if_needed()

    def get_train_dataloader(self) -> DataLoader:
        """This process's training batches: of rows, or of tokens where `tokens_per_batch` says so."""
        dataset, args = self.train_dataset, self.args
        if dataset is None:
            raise ConfigError("train_dataset is missing. Give SFTTrainer the rows to train on.")
        if isinstance(dataset, IterableDataset | datasets.IterableDataset):
            if args.tokens_per_batch is not None:
                raise ConfigError(
                    "tokens_per_batch needs the lengths of all rows, which a stream does not tell. Remove it."
                )
            collate = self._collator("training", dataset, dataset)
            return stream_loader(dataset, self._train_batch_size, collate, args)
        if args.train_sampling_strategy == "batch_rebalance":
            return super().get_train_dataloader()
        if not self._own_batches and args.world_size > 1:  # no batch of no rows, so transformers shares them out
            if args.tokens_per_batch is not None:
                raise ConfigError("tokens_per_batch: with a data_collator of your own only on one process. Remove it.")
            return super().get_train_dataloader()
        batches = train_batches(dataset, args, self._train_batch_size)
        collate = self._collator("training", dataset, batches.sampler)
        return loader(self._read(dataset, "training"), batches, collate, args)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy not in ("random", "group_by_length") or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(dataset)
        return epoch_sampler(dataset, self.args, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's evaluation batches; padded rows where `compute_metrics` wants logits row by row."""
        if self.compute_metrics is not None and not self._writes:
            with self._padded_batches():
                return self._eval_loader(eval_dataset, by_row=True)
        return self._eval_loader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same of a test set; in padded rows where no answers are written, for logits are handed out by row."""
        if self._writes:
            return self._eval_loader(test_dataset)
        with self._padded_batches():
            return self._eval_loader(test_dataset, by_row=True)

    def _eval_loader(self, eval_dataset: Any, *, by_row: bool = False) -> DataLoader:
        """Each row once and in its order, whatever training does with its rows."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise ConfigError("eval_dataset is missing. Give it to SFTTrainer or to evaluate().")
        is_stream = isinstance(dataset, IterableDataset | datasets.IterableDataset)
        if self.args.world_size > 1 and (by_row or not (self._own_batches or is_stream)):
            return super().get_eval_dataloader(eval_dataset)  # its equal shares of a batch can be gathered by row
        if is_stream:
            return eval_stream_loader(dataset, self._collator("evaluation", dataset), self.args)
        batches, collate = eval_batches(dataset, self.args), self._collator("evaluation", dataset)
        return loader(self._read(dataset, "evaluation"), batches, collate, self.args)

    def _read(self, dataset: Any, description: str) -> Any:
        """Without the columns that no collator reads."""
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description)
        return dataset

    def _collator(self, description: str, dataset: Any, source: Any = None) -> Callable:
        """Our collator, or the caller's with what ours find out; it sees the columns that transformers keeps.

        `source` knows the epoch.
        """
        if self._own_batches:
            return self.data_collator
        is_table = isinstance(dataset, datasets.Dataset)  # `_read` has removed its columns
        given = self.data_collator
        collate = given if is_table else self._get_collator_with_removed_columns(given, description)
        return LocatedCollator(collate, self.args.seed, source)


def shares_prefix(trainer: SFTTrainer, support: Support) -> bool:
    """Whether a micro-batch's documents share what they begin with, by `share_prefix` and what stands against it.

    Raises: ConfigError where it is asked for and cannot be.
    """
    args = trainer.args
    against = {
        "batches are not flat documents": support.layout != "documents" or not trainer._own_batches,
        "this model, or this device, computes every document apart": not support.shares_prefix,
        "dropout is drawn for every token": drops_out(trainer.model),
        "NEFTune's noise is drawn for every token": bool(args.neftune_noise_alpha),
        "router_aux_loss_coef counts every token": bool(args.router_aux_loss_coef),
        "a loss of one's own may count every token": trainer.has_own_loss,
        "a quantized base looks at the whole batch": is_quantized(trainer.model),
    }
    why = next((why for why, holds in against.items() if holds), "")
    if why and args.share_prefix:
        raise ConfigError(f"share_prefix: {why}. Leave it out.")
    return not why and args.share_prefix is not False


def say_of_rows(name: str, report: Report, how: Preparation) -> None:
    """Say aloud which rows were lost, and that a caller's collator has packed rows to keep apart."""
    if lost := report.losses():
        logger.warning("%s: %s (trainer.reports has every row)", name, lost)
    if how.packing and how.own_collator and not how.skip:
        warnings.warn(
            f"{name}: packed rows hold several documents, whose lengths are in seq_lengths. A data_collator of yours "
            "has to keep them apart (position_ids that begin again); leave it out, or set packing=False.",
            UserWarning,
            stacklevel=6,
        )


def checked_args(args: Any, optimizers: tuple, optimizer_cls_and_kwargs: tuple | None) -> SFTConfig:
    """`args` as the trainer's own, before a model is loaded; the allocator is tuned for what will be.

    Raises: ConfigError for what can be told to be wrong by then.
    """
    args = modernized(as_sft_config(args))
    loss_kind(args.loss_type, args.label_smoothing_factor)
    check_output_dir(args.output_dir)
    if args.use_liger_kernel:
        check_liger(args.liger_kernel_config)
    if optimizer_cls_and_kwargs is not None and optimizers[0] is not None:
        raise ConfigError("optimizers and optimizer_cls_and_kwargs both name the optimizer. Give one of them.")
    if args.device.type == "cpu":
        allocator.tune()
    return args


def labels_by(data_collator: Any, args: SFTConfig) -> Callable[[list[int]], list[int]] | None:
    """Ids of a document → labels, where a completion-only collator does no more than that: rows may then be packed.

    A subclass, or other options, make batches of their own; so do rows that nobody prepares.
    """
    plain = type(data_collator) is DataCollatorForCompletionOnlyLM and not data_collator.padding_free
    skipped = (args.dataset_kwargs or {}).get("skip_prepare_dataset")
    if not plain or skipped or data_collator.ignore_index != IGNORE_INDEX:
        return None
    return LabelsForReport(data_collator)


def longest_row(args: SFTConfig, model: nn.Module, tokenizer: Any) -> int:
    """`max_length`, its default lowered to what the tokenizer was made for; `None` is what the model was made for."""
    limit = getattr(tokenizer, "model_max_length", None) or 10**30  # "very large" stands for unknown
    if args.max_length is not None:
        return min(args.max_length, limit) if args.max_length == DEFAULT_MAX_LENGTH else args.max_length
    config = getattr(model, "config", None)
    named = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    return named or (limit if limit < 10**9 else DEFAULT_MAX_LENGTH)
