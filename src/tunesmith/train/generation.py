"""predict_with_generate: evaluation writes an answer for each row, from the very tokens that training shows.

A row `prompt ‖ answer ‖ rest` of token ids and labels is asked with what stands before its last trained run, and that
run is the expected answer. Nothing is rendered again, so a prompt cannot differ from training's.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import DataLoader
from transformers import GenerationConfig
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, PredictionOutput

from tunesmith.config import DecodingConfig
from tunesmith.data import IGNORE_INDEX
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluate.generate import (
    answer_decoding,
    decode_answer,
    generate_ids,
    generation_config,
    padding_id,
    stop_token_ids,
)
from tunesmith.evaluate.metrics import Metric, checked_figures, exact_match
from tunesmith.evaluate.predict import json_line, prefixed
from tunesmith.lookup import did_you_mean
from tunesmith.ranks import gathered, rank_and_world
from tunesmith.runs import PREDICTIONS_FILE, write_text
from tunesmith.train.collate import split_documents
from tunesmith.train.evaluation import EvaluatingTrainer
from tunesmith.train.loaders import RankShares
from tunesmith.train.processing import tokenizer_in


class Answered(NamedTuple):
    """One row, asked and answered, as token ids."""

    prompt: list[int]
    target: list[int]
    """Empty where the row trains nothing."""
    answer: list[int]
    """With the stop token, if there is one."""


class WrittenAnswers(PredictionOutput):
    """What `predict` returns: predictions and labels as in transformers, and the prompts beside.

    `predictions` holds new tokens only, padded with the padding token; `label_ids` is padded with -100.
    """

    prompts: Sequence[Sequence[int]] = ()


class GeneratingTrainer(EvaluatingTrainer):
    """Adds written answers to `evaluate` and `predict`, where `args.predict_with_generate` asks for them.

    Attributes:
        decoding: how answers are generated; `None`: as `args.generation_max_length`, `generation_num_beams` and
            `max_target_length` say. A `generation_config` in the arguments takes the place of all.
        text_metric: scores answers as texts. `None`: `exact_match`, unless there is a `compute_metrics`, which gets
            transformers' `EvalPrediction` of token ids.

    The loss is computed beside the answers, from the expected ones. (LLaMA-Factory drops `eval_loss` and
    `predict_loss` here, because its prompts and answers were in different tensors; ours is the loss of training, so
    it stays, and `load_best_model_at_end` may go by it.)
    """

    decoding: DecodingConfig | Mapping[str, Any] | None = None
    text_metric: Metric | None = None
    _given: Mapping[str, Any] = {}
    _written: Sequence[Answered] = ()

    # ---- the doors -------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """As `EvaluatingTrainer.evaluate`, with the scores of written answers.

        Args:
            gen_kwargs: options of `DecodingConfig` or transformers' `GenerationConfig` for this call.
        """
        with self._decoding_as(gen_kwargs):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Logits as in `EvaluatingTrainer.predict`; with `predict_with_generate` a `WrittenAnswers`.

        Rows keep their order and are not packed. A row that training would drop is left out (`trainer.reports`);
        to answer prompts without answers use `evaluate.predict.predict`.
        """
        packing, self.args.eval_packing = self.args.eval_packing, False
        try:
            with self._decoding_as(gen_kwargs):
                output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.args.eval_packing = packing
        if not self._writes:
            return output
        found = WrittenAnswers(*output)
        found.prompts = [row.prompt for row in self._written]
        return found

    def save_predictions(self, results: PredictionOutput, path: str | Path | None = None) -> Path:
        """Write what `predict` returned as `{"index", "prompt", "label", "predict"}` lines, on the first process only.

        Args:
            path: `None`: `generated_predictions.jsonl` in `output_dir`.
        """
        path = Path(self.args.output_dir) / PREDICTIONS_FILE if path is None else Path(path)
        if not self.is_world_process_zero():
            return path
        prompts = getattr(results, "prompts", None) or [()] * len(results.predictions)
        stops, lines = self._answer_config().eos_token_id, []
        for index, row in enumerate(zip(prompts, results.label_ids, results.predictions, strict=True)):
            prompt, label, predict = ([token for token in ids if token != IGNORE_INDEX] for ids in row)
            texts = {
                "prompt": self._tokenizer.decode(prompt, clean_up_tokenization_spaces=False) if prompt else None,
                "label": self._text(label, stops) if label else None,
                "predict": self._text(predict, stops),
            }
            lines.append(json_line({"index": index, **texts}))
        path.parent.mkdir(parents=True, exist_ok=True)
        return write_text(path, "".join(lines))

    # ---- the loop --------------------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        return bool(self.args.predict_with_generate) and not self.args.prediction_loss_only

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The figures of the loss, then an answer for each row and its scores."""
        loss_only = True if self._writes else prediction_loss_only
        output = super().evaluation_loop(dataloader, description, loss_only, ignore_keys, metric_key_prefix)
        if not self._writes:
            return output
        config = self._answer_config()
        written = self._written = self._answers(whole_dataset(dataloader.dataset), config)
        found = self._as_prediction(written, config.pad_token_id)
        figures = prefixed(self._scores(written, found, config.eos_token_id), metric_key_prefix)
        return output._replace(
            predictions=found.predictions,
            label_ids=found.label_ids,
            metrics={**output.metrics, **figures},
            num_samples=len(written),
        )

    def _answers(self, dataset: Any, config: GenerationConfig) -> list[Answered]:
        """An answer for each document of the dataset, in its order, on every process."""
        pairs = [pair for number, row in enumerate(dataset) for pair in self._split(row, number)]
        answers = generate_ids(
            self.accelerator.unwrap_model(self.model),
            {number: prompt for number, (prompt, _) in enumerate(pairs)},
            config,
            batch_size=known_size(self.decoding) or self.args.eval_batch_size,
            seed=self.args.seed,
            share=rank_and_world(),
            progress=self._count_answers,
        )
        with self.accelerator.autocast():
            mine = list(answers)
        found = dict(gathered(mine))
        return [Answered(*pair, found[number]) for number, pair in enumerate(pairs)]

    def _count_answers(self, done: int, total: int) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _split(self, row: Mapping[str, Any], number: int) -> Iterator[tuple[list[int], list[int]]]:
        """Prompt and target of each document of a row.

        Raises: DataError for one that is trained from its first token, so that there is nothing to answer.
        """
        if not self._own_batches and row.get("labels") is None:
            row = collated_row(self.data_collator, row)
        for document in split_documents(dict(row)):
            prompt, target = asked(document["input_ids"].tolist(), document["labels"].tolist())
            if not prompt:
                raise DataError(
                    f"predict_with_generate: row {number + 1} of the evaluation set is trained from its first token, "
                    "so there is no prompt to answer. Give rows with a prompt, train_on: assistant, and no "
                    "eval_packing that cuts rows; or set predict_with_generate: false."
                )
            yield prompt, target

    # ---- decoding --------------------------------------------------------------------------------------------------

    @property
    def _tokenizer(self) -> Any:
        tokenizer = tokenizer_in(self.processing_class)
        if tokenizer is None:
            raise ConfigError("predict_with_generate: answers need a tokenizer. Give it as processing_class.")
        return tokenizer

    @contextmanager
    def _decoding_as(self, given: Mapping[str, Any]) -> Iterator[None]:
        """Inside, answers are generated with these options too; several sets are evaluated one inside the other."""
        before = self._given
        self._given = {**before, **given}
        try:
            yield
        finally:
            self._given = before

    def _answer_config(self) -> GenerationConfig:
        """How answers are generated now.

        Raises: ConfigError for an option that neither `DecodingConfig` nor `GenerationConfig` has.
        """
        args, given = self.args, dict(self._given)
        if given.get("max_length") is not None:  # transformers' name; here it counts new tokens, like all others
            given.setdefault("max_new_tokens", given["max_length"])
        given.pop("max_length", None)
        options = answer_decoding(
            self.decoding,
            generation_max_length=args.generation_max_length,
            generation_num_beams=args.generation_num_beams,
            max_target_length=args.max_target_length,
        )
        options |= {name: given.pop(name) for name in options.keys() & given.keys()}
        stop_ids = stop_token_ids(self.accelerator.unwrap_model(self.model), self._tokenizer)
        config = generation_config(answer_decoding(options), stop_ids, padding_id(self._tokenizer, stop_ids))
        if args.generation_config is not None:
            config = filled(self.load_generation_config(args.generation_config), config, self._given)
        unknown = config.update(**given)
        if unknown:
            name = next(iter(unknown))
            hint = did_you_mean(name, [*options, *config.to_dict()])
            raise ConfigError(f"evaluate: there is no decoding option '{name}'.{hint}")
        if isinstance(config.eos_token_id, int):
            config.eos_token_id = [config.eos_token_id]
        return config

    def _text(self, ids: Sequence[int], stops: list[int] | None) -> str:
        return decode_answer(self._tokenizer, ids, stops or ())

    # ---- scores ----------------------------------------------------------------------------------------------------

    def _as_prediction(self, written: Sequence[Answered], pad: int) -> EvalPrediction:
        """Ids as transformers hands them to `compute_metrics`: (rows, longest), padding behind.

        Its predictions hold the padding token or -100, which `batch_decode` cannot read; ours hold only the former.
        """
        inputs = padded([row.prompt for row in written], pad) if "inputs" in self.args.include_for_metrics else None
        return EvalPrediction(
            predictions=padded([row.answer for row in written], pad),
            label_ids=padded([row.target for row in written], IGNORE_INDEX),
            inputs=inputs,
        )

    def _scores(self, written: Sequence[Answered], found: EvalPrediction, stops: list[int] | None) -> dict[str, float]:
        figures: dict[str, float] = {}
        if self.compute_metrics is not None:
            last = {"compute_result": True} if self.args.batch_eval_metrics else {}
            figures |= self.compute_metrics(found, **last) or {}
        metric = self.text_metric or (exact_match if self.compute_metrics is None else None)
        scored = [row for row in written if row.target]
        if metric is None or not scored:
            return figures
        texts = [self._text(row.answer, stops) for row in scored], [self._text(row.target, stops) for row in scored]
        return figures | checked_figures("text_metric", metric(*texts))


def asked(input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """What stands before the last trained run of a document, and that run; without one, all of it and nothing.

    >>> asked([1, 2, 3, 4, 5, 6], [-100, 2, -100, 4, 5, -100])
    ([1, 2, 3], [4, 5])
    """
    end = next((i + 1 for i in reversed(range(len(labels))) if labels[i] != IGNORE_INDEX), None)
    if end is None:
        return list(input_ids), []
    begin = next((i + 1 for i in reversed(range(end)) if labels[i] == IGNORE_INDEX), 0)
    return list(input_ids[:begin]), list(input_ids[begin:end])


def whole_dataset(dataset: Any) -> Any:
    """All rows of a stream, of which each process is otherwise shown its share."""
    if isinstance(dataset, RankShares):
        return dataset.rows
    return dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset


def collated_row(collator: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """One row with the labels that a person's collator gives it, without padding."""
    batch = collator([dict(row)])
    mask = batch.get("attention_mask")
    kept = torch.ones_like(batch["input_ids"][0]) if mask is None else mask[0]
    return {name: batch[name][0][kept.bool()] for name in ("input_ids", "labels")}


def filled(config: GenerationConfig, ours: GenerationConfig, given: Mapping[str, Any]) -> GenerationConfig:
    """A person's own generation config, with what it leaves open, and what a call said, from `ours`."""
    config = copy.deepcopy(config)
    own = config.max_new_tokens or config.max_length
    config.max_new_tokens = own if own and "max_new_tokens" not in given else ours.max_new_tokens
    config.max_length = None
    for name in given.keys() & ours.to_dict().keys():
        setattr(config, name, getattr(ours, name))
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = list(dict.fromkeys([s for s in stops if s is not None] + (ours.eos_token_id or []))) or None
    config.pad_token_id = ours.pad_token_id
    config.remove_invalid_values = True
    return config


def padded(rows: Sequence[Sequence[int]], fill: int) -> np.ndarray:
    """Rows of unequal length as one array (rows, longest), filled behind."""
    found = np.full((len(rows), max(map(len, rows), default=0)), fill, dtype=np.int64)
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def known_size(decoding: DecodingConfig | Mapping[str, Any] | None) -> int | None:
    """The batch size that the decoding options name, if there are any."""
    if isinstance(decoding, DecodingConfig):
        return decoding.generation_batch_size
    return (decoding or {}).get("generation_batch_size")
