"""A half-precision base with parts that train in float32, as adapters with `modules_to_save` make it."""

import pytest
import torch
from peft import LoraConfig

from tests.train.rows import make_trainer, token_rows
from tunesmith import RewardConfig, RewardTrainer
from tunesmith.evaluate.generate import generate_texts
from tunesmith.model.mixed_types import device_and_half, types_joined

WHOLE = [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]]
PAIRS = [{"chosen_input_ids": [65, 66, 67, 257], "rejected_input_ids": [65, 66, 68, 257]}] * 4


def lora(whole=None) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", modules_to_save=whole)


@pytest.mark.parametrize("whole", WHOLE)
def test_such_a_model_trains_and_answers_before_and_after(make_tiny_model, byte_tokenizer, tmp_path, whole):
    model = make_tiny_model().to(torch.bfloat16)
    trainer = make_trainer(
        model, byte_tokenizer, token_rows(), tmp_path, bf16=True, max_steps=1, peft_config=lora(whole)
    )
    assert device_and_half(trainer.model) == ("cpu", torch.bfloat16)
    for train in (lambda: None, trainer.train):
        train()
        answers = dict(generate_texts(trainer.model, byte_tokenizer, [[65, 66]], decoding={"max_new_tokens": 3}))
        assert isinstance(answers[0], str)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("whole", WHOLE)
def test_a_reward_model_of_such_types_trains(make_tiny_model, byte_tokenizer, tmp_path, whole):
    args = RewardConfig(
        str(tmp_path), bf16=True, use_cpu=True, report_to="none", save_strategy="no", max_steps=1, disable_tqdm=True
    )
    model = make_tiny_model().to(torch.bfloat16)
    trainer = RewardTrainer(model, args, train_dataset=PAIRS, processing_class=byte_tokenizer, peft_config=lora(whole))
    assert trainer.support.layout == "documents"
    assert trainer.train().training_loss > 0


def test_a_model_of_one_type_and_its_adapter_are_left_alone(make_tiny_model, byte_tokenizer, tmp_path):
    for dtype in (torch.float32, torch.bfloat16):
        model = make_tiny_model().to(dtype)
        trainer = make_trainer(model, byte_tokenizer, token_rows(), tmp_path, bf16=True, peft_config=lora())
        assert device_and_half(trainer.model) == ("cpu", None)
        with types_joined(trainer.model):
            assert not torch.is_autocast_enabled("cpu")
