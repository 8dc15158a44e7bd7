"""Evaluation per trained token: the same figures for every batch size, layout and number of processes."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput, has_length

from tunesmith.errors import ConfigError
from tunesmith.lookup import did_you_mean
from tunesmith.train.collate import PaddedCollator
from tunesmith.train.step import TokenTrainer, loss_request, stacked, step_weight


class EvaluatingTrainer(TokenTrainer):
    """Adds `evaluate` and `predict` to the step.

    `_prepared(name, dataset)` is the subclass's: raw rows become token rows.
    """

    _prepared: Callable[[str, Any], Any]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """Loss, perplexity, accuracy and entropy per trained token; a dict of datasets gives `eval_<key>_loss`, ...

        Args:
            eval_dataset: rows in any format that the constructor takes, or a dict of them; `None`: its `eval_dataset`.
        """
        if isinstance(eval_dataset, str):
            self._check_key(eval_dataset)
        elif eval_dataset is not None:
            eval_dataset = self._prepared("eval_dataset", eval_dataset)
        with undisturbed(self.model, self.args.device):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)

    def _check_key(self, key: str) -> None:
        """Raise ConfigError for a name that none of the evaluation sets has."""
        known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if key not in known:
            names = f" Known: {', '.join(known)}." if known else " Give it rows, or the trainer a dict of datasets."
            raise ConfigError(f"evaluate: there is no evaluation set '{key}'.{did_you_mean(key, known)}{names}")

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """Logits (rows, tokens, V) and labels of every row, padded with -100, and the metrics of `evaluate`.

        For written answers use `evaluate.predict.predict`, or `tunesmith predict`.
        """
        if isinstance(test_dataset, Mapping):
            names = ", ".join(map(str, list(test_dataset)[:6]))
            raise ConfigError(f"test_dataset is a dict of datasets ({names}). Give one of them.")
        test_dataset = self._prepared("test_dataset", test_dataset)
        with undisturbed(self.model, self.args.device):
            return super().predict(test_dataset, ignore_keys, metric_key_prefix, **gen_kwargs)

    @contextmanager
    def _padded_batches(self):
        """Inside, batches are padded rows, unless the caller brought a collator."""
        before = self.data_collator
        if self._own_batches:
            self.data_collator = self._padding_collator()
        try:
            yield
        finally:
            self.data_collator = before

    def _padding_collator(self) -> PaddedCollator:
        """One row for each document, padded as the options say."""
        args, pad = self.args, getattr(self.processing_class, "pad_token_id", None)
        if pad is None and not args.ignore_pad_token_for_loss:
            raise ConfigError(
                "ignore_pad_token_for_loss: false trains the padding, and the tokenizer has no padding token. Set "
                "pad_token, or leave the option out."
            )
        return PaddedCollator(
            0 if pad is None else pad, args.pad_to_multiple_of, args.padding_side, args.ignore_pad_token_for_loss
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The sums over all batches, with all logits too where somebody asked for them; one forward either way."""
        self._sums = self._no_sums()
        with self._own_loss_weighed():
            if prediction_loss_only if prediction_loss_only is not None else self.args.prediction_loss_only:
                output = EvalLoopOutput(None, None, {}, num_samples=self._sum(dataloader))
            else:
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        if sums[1] == 0 and not self.has_own_loss and description == "Evaluation":
            raise ConfigError("the evaluation set has no trained token, so it has no loss.")
        figures = figures_of(*sums)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def _no_sums(self) -> Tensor:
        exact = torch.float32 if self.args.device.type == "mps" else torch.float64  # mps has no float64
        return torch.zeros(5, dtype=exact, device=self.args.device)

    def _sum(self, dataloader: DataLoader) -> int:
        """Run all batches, and count rows; nothing waits for the device."""
        batches = 0
        for model, inputs in self._evaluated(dataloader):
            if self.has_own_loss:
                self.prediction_step(model, inputs, prediction_loss_only=True)
            else:
                with torch.no_grad(), self._attention(inputs), self.compute_loss_context_manager():
                    found, _ = self._token_loss(model, inputs, metrics=True)
                self._add(found, inputs)
            batches += 1
        rows = dataloader.dataset
        return len(rows) if has_length(rows) else batches * self.args.eval_batch_size * self.args.world_size

    @contextmanager
    def _own_loss_weighed(self) -> Iterator[None]:
        """Inside, a person's loss of each batch is summed, weighed by its trained tokens: no batch size changes it."""
        step = self.prediction_step

        def weighed(model: nn.Module, inputs: dict[str, Any], *how: Any, **options: Any) -> Any:
            before, inputs = self._sums[:2].clone(), self._prepare_inputs(inputs)
            with self._attention(inputs):
                found = step(model, inputs, *how, **options)
            if found[0] is not None:
                weight = step_weight(inputs)
                self._sums[:2] = before + stacked((found[0].detach() * weight, weight), before)
            return found

        try:
            if self.has_own_loss:
                self.prediction_step = weighed
            yield
        finally:
            self.__dict__.pop("prediction_step", None)

    def _evaluated(self, dataloader: DataLoader) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """Each batch on the device, with the model in evaluation mode; callbacks hear of each that is done."""
        model = self.model_wrapped
        if not self.is_in_train and not self.accelerator._models:
            model = self.accelerator.prepare_model(self.model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        for inputs in dataloader:
            yield model, self._prepare_inputs(inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def _add(self, found: Any, inputs: dict[str, Any]) -> None:
        count = loss_request(inputs).targets.numel()
        weight = step_weight(inputs) if count else 0.0
        self._sums += stacked((found.loss, weight, found.correct, found.entropy, count), self._sums)

    def _loss_with_logits(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> tuple[Tensor, Any]:
        loss, outputs = super()._loss_with_logits(model, inputs, num_items_in_batch)
        if not model.training:
            request = loss_request(inputs, plain_head=False, metrics=True)
            rows = outputs.logits.reshape(-1, outputs.logits.shape[-1])[request.index]
            self._add(request.from_logits(rows), inputs)
        return loss, outputs


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards each module trains or not as before, and random numbers go on as if nothing had been evaluated.

    A DataLoader draws a seed whenever it is read, and callbacks may sample; dropout in the next step would differ.
    """
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        for module, training in modes:
            module.training = training


def figures_of(loss: float, weight: float, correct: float, entropy: float, count: float) -> dict[str, float]:
    """Means per trained token, from their sums; those of which nothing was summed are left out."""
    figures = {"loss": loss / weight, "perplexity": perplexity(loss / weight)} if weight else {}
    return figures | ({"mean_token_accuracy": correct / count, "entropy": entropy / count} if count else {})


def perplexity(loss: float) -> float:
    """E to the loss; infinite where that overflows."""
    return float(torch.tensor(loss, dtype=torch.float64).exp())
