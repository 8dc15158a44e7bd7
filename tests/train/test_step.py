"""The step: figures of the trained tokens, balance of experts, options that only some machines have."""

import numpy as np
import pytest
import torch

from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.data import IGNORE_INDEX
from tunesmith.errors import ConfigError
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer


def logged(trainer) -> list[dict]:
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def reference_figures(model, rows) -> tuple[float, float]:
    """Accuracy and entropy of the trained tokens, from full logits."""
    hits, entropies = [], []
    with torch.no_grad():
        for row in rows:
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(row["labels"])[1:]
            kept = targets != IGNORE_INDEX
            hits += (logits.argmax(-1) == targets)[kept].tolist()
            entropies += torch.distributions.Categorical(logits=logits).entropy()[kept].tolist()
    return float(np.mean(hits)), float(np.mean(entropies))


@pytest.mark.parametrize("layout", [{}, {"padding_free": False}, {"packing": True, "max_length": 32}])
def test_accuracy_entropy_and_tokens_are_logged(make_tiny_model, byte_tokenizer, tmp_path, layout):
    rows = token_rows()
    accuracy, entropy = reference_figures(make_tiny_model(), rows)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 1}
    (line,) = logged(make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options, **layout))
    assert line["mean_token_accuracy"] == pytest.approx(accuracy)
    assert line["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert line["num_tokens"] == sum(len(row["input_ids"]) for row in rows)


def test_figures_are_means_since_the_last_log_line(make_tiny_model, byte_tokenizer, tmp_path):
    options = {"per_device_train_batch_size": 4, "max_steps": 4, "logging_steps": 2, "learning_rate": 1e-30}
    lines = logged(make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options))
    accuracy, entropy = reference_figures(make_tiny_model(), token_rows())
    assert [line["entropy"] for line in lines] == pytest.approx([entropy] * 2, abs=1e-5)
    assert [line["mean_token_accuracy"] for line in lines] == pytest.approx([accuracy] * 2)


def test_token_metrics_can_be_turned_off(make_tiny_model, byte_tokenizer, tmp_path):
    options = {"max_steps": 1, "token_metrics": False}
    (line,) = logged(make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options))
    assert "entropy" not in line
    assert line["num_tokens"] == 74


def build_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM, set_seed

    set_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
        )
    )


@pytest.mark.parametrize("batch", [(8, 1), (4, 2)])
def test_the_balance_of_experts_is_added_to_the_loss(byte_tokenizer, tmp_path, batch):
    rows = token_rows((9,) * 8)
    expected, _ = reference_gradients(build_mixtral(), rows)
    size, accumulation = batch
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    trainer = make_trainer(build_mixtral(), byte_tokenizer, rows, tmp_path, router_aux_loss_coef=0.5, **options)
    with torch.no_grad():
        parts = torch.tensor(rows["input_ids"]).split(size)
        balances = [trainer.model(input_ids=part, output_router_logits=True).aux_loss for part in parts]
    (line,) = logged(trainer)
    assert line["loss"] == pytest.approx(expected + 0.5 * torch.stack(balances).mean().item(), abs=1e-4)


def test_a_model_without_experts_has_nothing_to_balance(tiny_model, byte_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="router_aux_loss_coef: LlamaForCausalLM has no experts"):
        make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, router_aux_loss_coef=0.1)


def test_offloading_activations_needs_a_gpu(tiny_model, byte_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="activation_offloading: this machine trains on its cpu"):
        make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, activation_offloading=True)


@pytest.mark.parametrize("options", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_other_losses_shape_training_and_nll_is_logged(byte_tokenizer, make_tiny_model, tmp_path, options):
    expected, _ = reference_gradients(make_tiny_model(), token_rows())
    evaluation = {"eval_dataset": token_rows(), "max_steps": 1}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options, **evaluation)
    before = trainer.evaluate()
    (line,) = logged(trainer)
    assert line["nll"] == pytest.approx(expected, abs=1e-5)
    assert before["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert abs(line["loss"] - expected) > 1e-4


def test_two_losses_that_nobody_has_defined_together_are_refused(byte_tokenizer, tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="not defined together"):
        make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, loss_type="dft", label_smoothing_factor=0.1)


def test_a_step_that_trains_no_token_is_said(make_tiny_model, byte_tokenizer, tmp_path, caplog):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}, {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    trainer = make_trainer(
        make_tiny_model(), byte_tokenizer, rows, tmp_path, per_device_train_batch_size=1, num_train_epochs=1
    )
    first, second = logged(trainer)
    assert first["loss"] == 0.0 < second["loss"]
    assert [record.message for record in caplog.records if "is trained" in record.message] == [
        "step 1: none of the tokens since the last log line is trained"
    ]


class WithLogits(SFTTrainer):
    """As many subclasses do: the reference's own `compute_loss` asks for outputs."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("more", [{}, {"loss_type": "dft"}, {"label_smoothing_factor": 0.3}])
@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (1, 4)])
def test_a_loss_with_outputs_is_the_loss_without(make_tiny_model, byte_tokenizer, tmp_path, size, accumulate, more):
    found = []
    for cls, batch in ((SFTTrainer, (4, 1)), (WithLogits, (size, accumulate))):
        args = SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, save_strategy="no", train_sampling_strategy="sequential",
            per_device_train_batch_size=batch[0], gradient_accumulation_steps=batch[1], disable_tqdm=True, **more,
        )  # fmt: skip
        trainer = cls(
            make_tiny_model(), args, train_dataset=token_rows((60, 4, 5, 6)), processing_class=byte_tokenizer
        )
        found.append(first_gradients(trainer))
    assert_same(found[1], found[0])
