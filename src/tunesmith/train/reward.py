"""RewardTrainer: preference pairs and a causal language model go in, a model that scores answers comes out."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from tunesmith import allocator
from tunesmith.config import RewardFields, described
from tunesmith.data.pairs import SIDES, encode_pairs, first_difference, preference, side_of
from tunesmith.data.prepare import batched
from tunesmith.data.render import render
from tunesmith.data.report import Report
from tunesmith.data.rows import RowError
from tunesmith.data.tokenize import tokenize
from tunesmith.errors import CheckpointError, ConfigError, DataError
from tunesmith.model.adapt import check_trainable, trainable_line
from tunesmith.model.attention import attention_configs
from tunesmith.model.capabilities import Support
from tunesmith.model.load import check_vocabulary
from tunesmith.model.lora import save_plain_lora
from tunesmith.model.value_head import RewardModel, ValueHead, has_head, read_head
from tunesmith.runs import PREDICTIONS_FILE, write_text
from tunesmith.train.arguments import check_ids, check_output_dir, num_embeddings
from tunesmith.train.choose import few_rows, memory_of, settled, supported
from tunesmith.train.collate import FlatCollator, PaddedCollator
from tunesmith.train.datasets import columns_of
from tunesmith.train.evaluation import EvaluatingTrainer
from tunesmith.train.largest import largest_rows
from tunesmith.train.loaders import eval_batches, loader, train_batches
from tunesmith.train.memory import Batch
from tunesmith.train.options import SFTConfig, as_sft_config, explains_keywords, modernized
from tunesmith.train.pairwise import MODEL_KEYS, PairCollator, pair_loss
from tunesmith.train.processing import one_of, processing_for, tokenizer_in
from tunesmith.train.reading import check_report, numbered, values_of
from tunesmith.train.sft import longest_row
from tunesmith.train.step import stacked
from tunesmith.train.trainable import adapted, named_model

logger = logging.getLogger(__name__)

READ_DATASET_KWARGS = ("on_bad_row",)


@explains_keywords
@described
@dataclass
class RewardConfig(RewardFields, SFTConfig):
    """All options of `RewardTrainer`: those of `SFTConfig`, and which rewards the loss compares."""

    def __post_init__(self):
        check_reward_loss(self.reward_loss)
        super().__post_init__()


def check_reward_loss(name: str) -> str:
    """The name, if it is one; raises ConfigError."""
    if name not in ("last_token", "span"):
        raise ConfigError(f"RewardConfig: reward_loss: expected last_token or span, got {name!r}.")
    return name


# The trainer --------------------------------------------------------------------------------------------------------


class RewardTrainer(EvaluatingTrainer):
    """Train a value head, and the model below it, to score the chosen answer of a pair above the rejected one.

    Args:
        model: a causal language model, the folder or Hub id of one, or a `RewardModel`; a folder with a value head
            goes on with that.
        args: a `RewardConfig`; `SFTConfig` and transformers' arguments are taken over. Batch sizes count pairs.
        train_dataset, eval_dataset: preference rows (prompt, chosen, rejected: texts or turns), or rows of
            `data.pairs.Pair`; `eval_dataset` may be a dict of them.
        processing_class: the tokenizer; `None` loads the model's.
        compute_metrics: takes an `EvalPrediction` of (chosen scores, rejected scores), returns a dict.
        callbacks, optimizers: as in transformers.
        peft_config: wraps the language model with an adapter; the value head trains whole beside it.
        tokenizer: older name of `processing_class`.
        quantization_config: `BitsAndBytesConfig` for a model given by name.

    Attributes:
        reports, choices, largest_batch, memory, tokens_seen: as of `SFTTrainer`.

    Raises: ConfigError, DataError, ModelError before anything is trained.
    """

    method = "pairs of answers, as a reward model"

    def __init__(
        self,
        model: nn.Module | str,
        args: SFTConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        quantization_config: Any = None,
    ):
        args = as_reward_config(args)
        if args.device.type == "cpu":
            allocator.tune()
        self.choices: list[str] = []
        self.reports: dict[str, Report] = {}
        base, head = parts_of(model, args, quantization_config)
        processing_class = processing_for(base, one_of(processing_class, tokenizer), args)
        self.tokenizer = tokenizer_in(processing_class)
        check_vocabulary(base, self.tokenizer)
        base = adapted(base, args, peft_config, self.tokenizer, self.choices.append)
        if train_dataset is not None:
            check_trainable(base)
        self._num_embeddings = num_embeddings(base)
        self.args, self.max_length = args, longest_row(args, base, self.tokenizer)
        train_dataset = self._prepared("train_dataset", train_dataset)
        eval_dataset = self._prepared("eval_dataset", eval_dataset)
        if train_dataset is not None:
            self.largest_batch = largest_pairs(train_dataset, args)
        args, lines = settled(args, base, None, self.largest_batch)
        self.memory = None if self.largest_batch is None else memory_of(args, base, self.largest_batch)
        self.choices += [*lines, *few_rows(args, train_dataset)]
        use_cache = base.config.use_cache
        super().__init__(
            model=RewardModel(base, head, args.seed),
            args=args,
            data_collator=PairCollator(FlatCollator(), args.reward_loss),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        base.config.use_cache = use_cache  # the trainer turns it off in the config, which would be saved
        self.support = self._probe()
        for line in self.choices:
            logger.info(line)

    # ---- before training ---------------------------------------------------------------------------------------

    def _prepared(self, name: str, dataset: Any) -> Any:
        """The dataset as rows of `Pair`; a dict of evaluation sets stays a dict."""
        if dataset is None or (isinstance(dataset, Mapping) and not dataset):
            return None
        if isinstance(dataset, Mapping) and name != "train_dataset":
            return {key: self._prepared(f"{name}[{key}]", part) for key, part in dataset.items()}
        check_pairs_kind(name, dataset)
        if f"{SIDES[0]}_input_ids" in columns_of(dataset):
            return ready_pairs(name, dataset, self._num_embeddings)
        report = self.reports[name] = Report()
        found = read_pairs(name, dataset, self.args, self.tokenizer, self.max_length, report)
        if lost := report.losses():
            logger.warning("%s: %s (trainer.reports has every row)", name, lost)
        return found

    def _probe(self) -> Support:
        """Find out how the language model may be fed, set the collator, and say what was chosen."""
        args, support = self.args, supported(self.args, self.model.base)
        if args.padding_free and support.layout == "padded":
            raise ConfigError(f"padding_free: this model does not keep documents apart ({support.why}). Leave it out.")
        support = support._replace(layout="padded") if args.padding_free is False else support
        self._attention_configs = attention_configs(self.model) if support.layout == "documents" else []
        if support.layout == "padded":
            collate = PaddedCollator(getattr(self.tokenizer, "pad_token_id", None) or 0, args.pad_to_multiple_of)
        else:
            collate = FlatCollator(support.layout == "documents", args.pad_to_multiple_of)
        self.data_collator = PairCollator(collate, args.reward_loss)
        said = "padded" if support.layout == "padded" else "flat, no padding"
        self.choices.append(
            f"batches: {said}; chosen and rejected answers in one" + f" ({support.why})" * bool(support.why)
        )
        if self.train_dataset is not None:
            self.choices.append(f"{trainable_line(self.model)} (the value head's included)")
        return support

    # ---- batches -----------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """This process's training batches, of pairs."""
        if self.train_dataset is None:
            raise ConfigError("train_dataset is missing. Give RewardTrainer the pairs to train on.")
        batches = train_batches(self.train_dataset, self.args, self._train_batch_size)
        return loader(self.train_dataset, batches, self.data_collator, self.args)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """This process's evaluation batches, in the order of the pairs."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        if dataset is None:
            raise ConfigError("eval_dataset is missing. Give it to RewardTrainer or to evaluate().")
        return loader(dataset, eval_batches(dataset, self.args), self.data_collator, self.args)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """The same for pairs to be scored."""
        return self.get_eval_dataloader(test_dataset)

    # ---- the step ----------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Σ loss of this micro-batch's pairs over the number of pairs in the whole step, on all ranks."""
        rewards = model(**self._model_inputs(inputs))
        found = pair_loss(rewards, inputs)
        if model.training:
            margins = found.chosen - found.rejected
            figures = ((margins > 0).sum(), margins.sum(), inputs["num_pairs"])
            self._figures[: len(figures)] += stacked(figures, self._figures)
        pairs = max(inputs["num_pairs"], 1) if num_items_in_batch is None else num_items_in_batch
        loss = found.loss * (self._ranks_averaged(num_items_in_batch) / pairs)
        return (loss, found) if return_outputs else loss

    def _model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {key: inputs[key] for key in MODEL_KEYS if key in inputs} | {"use_cache": False}

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Pairs of one step: over its micro-batches, and over all ranks."""
        total = sum(batch["num_pairs"] for batch in batch_samples)
        if self.args.world_size > 1:
            total = self.accelerator.reduce(torch.tensor(total, dtype=torch.float64, device=device), "sum")
        return total or 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add accuracy and margin of the pairs trained since the last log line."""
        if self.is_in_train and "loss" in logs:
            correct, margin, pairs = self.accelerator.reduce(self._figures, "sum").tolist()[:3]
            self._figures.zero_()
            logs |= {"accuracy": correct / max(pairs, 1), "margin": margin / max(pairs, 1)}
        super().log(logs, start_time)

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Scores of all pairs: `eval_loss`, `eval_accuracy` (a tie is no success), `eval_margin`, the mean difference.

        Returns: predictions (chosen scores, rejected scores), label_ids the number of each pair's example.
        """
        losses, scores = self._scored(dataloader)
        chosen, rejected = scores[:, 0], scores[:, 1]
        if not len(scores):
            raise ConfigError("the evaluation set has no pair, so it has no loss.")
        dataset = dataloader.dataset
        named = isinstance(dataset, datasets.Dataset) and "index" in dataset.column_names
        numbers = np.asarray(dataset["index"] if named else range(len(scores)))
        figures = {
            "loss": losses / len(scores),
            "accuracy": float((chosen > rejected).mean()),
            "margin": float((chosen - rejected).mean()),
        }
        if self.compute_metrics is not None:
            figures |= self.compute_metrics(EvalPrediction(predictions=(chosen, rejected), label_ids=numbers))
        metrics = {
            f"{metric_key_prefix}_{name.removeprefix(metric_key_prefix + '_')}": figures[name] for name in figures
        }
        return EvalLoopOutput((chosen, rejected), numbers, metrics, num_samples=len(scores))

    def _scored(self, dataloader: DataLoader) -> tuple[float, np.ndarray]:
        """Summed loss, and scores (pairs, 2) of all processes in the order of the dataset."""
        losses, scores = self._no_sums()[:1], []
        for model, inputs in self._evaluated(dataloader):
            with torch.no_grad(), self._attention(inputs), self.compute_loss_context_manager():
                found = pair_loss(model(**self._model_inputs(inputs)), inputs)
            losses += found.loss
            scores.append(torch.stack([found.chosen, found.rejected], dim=1))
        mine = [batch.tolist() for batch in scores]
        ranks = gather_object([mine]) if self.args.world_size > 1 else [mine]
        rows = [row for parts in zip(*ranks) for part in parts for row in part]  # a batch is shared out rank by rank
        return float(self.accelerator.reduce(losses, "sum")), np.array(rows, dtype=np.float32).reshape(-1, 2)

    def save_predictions(self, output: Any, path: str | Path | None = None) -> Path:
        """Write what `predict` returned, on rank 0, into a file: `generated_predictions.jsonl` in `output_dir`.

        Lines are `{"index", "chosen", "rejected"}` in the order of the dataset, scores rounded to 2 digits.
        """
        path = Path(path or Path(self.args.output_dir) / PREDICTIONS_FILE)
        if self.is_world_process_zero():
            lines = (
                json.dumps({"index": int(index), "chosen": round(float(good), 2), "rejected": round(float(bad), 2)})
                for index, good, bad in zip(output.label_ids, *output.predictions)
            )
            write_text(path, "".join(f"{line}\n" for line in lines))
        return path

    # ---- saving and loading ------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Adapter (or model), value head and tokenizer; no pickled arguments."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, state_dict)
        if not folder.name.startswith("checkpoint-"):
            save_plain_lora(model.base, folder)
        self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Language model and value head."""
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        if not has_head(resume_from_checkpoint):
            raise CheckpointError(
                f"resume_from_checkpoint: {resume_from_checkpoint} holds no value head, so no stage rm wrote it. "
                "Name a checkpoint of this run, or start anew from its adapter with checkpoint_dir."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, target.base)
        target.v_head.load_state_dict(read_head(resume_from_checkpoint).state_dict())

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


# What the constructor is given --------------------------------------------------------------------------------------


def as_reward_config(args: Any) -> RewardConfig:
    """`args` as a `RewardConfig` of the trainer's own.

    Raises: ConfigError for options that nothing here acts on.
    """
    found = as_sft_config(args)
    refused = {
        "packing": found.packing,
        "tokens_per_batch": found.tokens_per_batch is not None,
        "use_liger_kernel": found.use_liger_kernel,
        "compile_layers": bool(found.compile_layers),
        "share_prefix": bool(found.share_prefix),
        "label_smoothing_factor": found.label_smoothing_factor != 0,
        "loss_type": found.loss_type != "nll",
        "router_aux_loss_coef": bool(found.router_aux_loss_coef),
        **{f"dataset_kwargs[{key!r}]": key not in READ_DATASET_KWARGS for key in found.dataset_kwargs or {}},
    }
    if strange := [name for name, is_given in refused.items() if is_given]:
        raise ConfigError(f"RewardTrainer: nothing acts on {', '.join(strange)} in stage rm. Remove it.")
    found = modernized(found)
    check_output_dir(found.output_dir)
    found.reward_loss = check_reward_loss(getattr(found, "reward_loss", RewardConfig.reward_loss))
    found.token_metrics = False  # the figures of pairs are logged in their place
    return found


def parts_of(model: nn.Module | str, args: SFTConfig, quantization_config: Any) -> tuple[nn.Module, ValueHead | None]:
    """The language model that is given or named, and its value head, if it has one."""
    if isinstance(model, RewardModel):
        return model.base, model.v_head
    head = read_head(model) if isinstance(model, str | os.PathLike) and has_head(model) else None
    return named_model(model, args, quantization_config), head


def check_pairs_kind(name: str, dataset: Any) -> None:
    """Raise ConfigError for what holds no pairs that can be counted."""
    if isinstance(dataset, IterableDataset | datasets.IterableDataset):
        raise ConfigError(f"{name} is a stream, and stage rm needs all its pairs at once. Set streaming: false.")
    if isinstance(dataset, Mapping | str) or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{name} is a {type(dataset).__name__}; expected a datasets.Dataset or a list of dicts with "
            "prompt, chosen and rejected."
        )


def read_pairs(
    name: str, dataset: Any, args: SFTConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, report: Report
) -> datasets.Dataset:
    """Preference rows as rows of `Pair`."""
    on_bad_row = (args.dataset_kwargs or {}).get("on_bad_row", "error")
    examples = []
    if "margin" in columns_of(dataset):
        warnings.warn(f"{name}: the column margin is not read: every pair counts alike.", UserWarning, stacklevel=4)
    for row in numbered(name, values_of(dataset), from_table=isinstance(dataset, datasets.Dataset)):
        report.read += 1
        try:
            example = preference(row)
        except RowError as error:
            if on_bad_row == "error":
                raise
            report.dropped(error.reason, row, str(error))
            continue
        places = {key: row.value[key] for key in ("source", "line") if row.value.get(key) is not None}
        examples.append(example | places)
    pairs = encode_pairs(
        examples,
        tokenizer,
        report,
        max_length=max_length,
        too_long=args.too_long,
        on_bad_row=on_bad_row,
        chat_template_kwargs=args.chat_template_kwargs,
        max_source_length=args.max_source_length,
        max_target_length=args.max_target_length,
    )
    check_report(name, report, packing=False)
    return pairs


def ready_pairs(name: str, dataset: Any, limit: int | None) -> datasets.Dataset:
    """Token rows with the place where their conversations part, which is found where they do not name it.

    Raises: DataError for ids that the model does not know, and for a conversation without a token.
    """
    table = dataset if isinstance(dataset, datasets.Dataset) else datasets.Dataset.from_list(list(dataset))
    table = table.with_format(None)
    for side in SIDES:
        check_ids(
            name, table.select_columns(f"{side}_input_ids").rename_column(f"{side}_input_ids", "input_ids"), limit
        )
        lengths = list(map(len, table[f"{side}_input_ids"]))
        if 0 in lengths:
            raise DataError(f"{name} row {lengths.index(0) + 1}: {side}_input_ids are empty. Leave the row out.")
    if "first_difference" in table.column_names:
        return table
    found = [first_difference(row["chosen_input_ids"], row["rejected_input_ids"]) for row in table]
    return table.add_column("first_difference", found)


def largest_pairs(dataset: datasets.Dataset, args: SFTConfig) -> Batch:
    """The largest micro-batch of pairs that will come up."""
    both = (dataset.with_format("numpy")[f"{side}_input_ids"] for side in SIDES)
    lengths = np.array([len(chosen) + len(rejected) for chosen, rejected in zip(*both)], dtype=np.int64)
    return Batch(int(lengths[largest_rows(lengths, args, dataset=dataset)].sum()), trained=0)


# Scores of answers --------------------------------------------------------------------------------------------------


def score(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
) -> list[float]:
    """The reward of each conversation's last answer, at its stop token: the higher, the better.

    Args:
        examples: `{"messages"}` or `{"prompt", "completion"}`, with `tools` and `chat_template_kwargs` if need be.
        batch_size: conversations at once; it changes no score but by rounding.

    Raises: RowError, TemplateError for a conversation that cannot be rendered as in training, or has no answer.
    """
    is_training = model.training
    model.eval()
    collate = PaddedCollator(getattr(tokenizer, "pad_token_id", None) or 0)
    device, found = next(model.v_head.parameters()).device, []
    for batch in batched(examples, batch_size):
        ids = [scored_ids(example, tokenizer, len(found) + number) for number, example in enumerate(batch)]
        rows = collate([{"input_ids": one, "labels": one} for one in ids])
        with torch.no_grad():
            inputs = {key: rows[key].to(device) for key in ("input_ids", "attention_mask")}
            rewards = model(**inputs, use_cache=False)
        found += rewards[torch.arange(len(ids)), torch.tensor([len(one) - 1 for one in ids])].tolist()
    model.train(is_training)
    return found


def scored_ids(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, number: int) -> list[int]:
    """A conversation up to the stop token of its last answer."""
    train_on = "completion" if example.get("completion") is not None else "last_turn"
    side = side_of(tokenize([render(example, tokenizer, train_on=train_on)], tokenizer)[0])
    if not side.ids:
        raise RowError("there is no answer to score. Add the assistant's turn.", "no-answer").at("example", number + 1)
    return side.ids
