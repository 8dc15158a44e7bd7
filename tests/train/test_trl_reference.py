"""TRL on the same rows and weights takes the same first steps, where the two mean the same thing."""

import datasets
import pytest

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.train.rows import make_trainer

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: bench)")

TEXTS = [{"text": "abc " * count + "end"} for count in (3, 9, 1, 14, 6, 2, 11, 5)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": "How many " + "x" * count},
            {"role": "assistant", "content": "There are " + "y" * (17 - count)},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "z" * count},
        ]
    }
    for count in (3, 9, 1, 14)
]
PAIRS = [{"prompt": chat["messages"][:3], "completion": chat["messages"][3:]} for chat in CHATS]
CASES = {
    "text": (TEXTS, {"train_on": "all"}, {}),
    "text packed": (TEXTS, {"packing": True, "max_length": 64}, {"packing": True, "max_length": 64}),
    "text cut": (TEXTS, {"max_length": 20}, {"max_length": 20}),
    "text dft": (TEXTS, {"loss_type": "dft"}, {"loss_type": "dft"}),
    "answers": (CHATS, {}, {"assistant_only_loss": True}),
    "answers packed": (
        CHATS,
        {"packing": True, "max_length": 256},
        {"packing": True, "max_length": 256, "assistant_only_loss": True},
    ),
    "whole conversations": (CHATS, {"train_on": "all"}, {}),
    "completions": (PAIRS, {"train_on": "completion"}, {}),
    "accumulated": (TEXTS, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {}),
}
SAME = {
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "max_steps": 3,
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


def tokenizer():
    """One that writes nothing behind the stop token: TRL would train on it in a completion, tunesmith does not."""
    made = make_byte_tokenizer("chatml-generation")
    made.chat_template = made.chat_template.replace("{{ '\n' }}", "")
    return made


def figures(trainer) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step."""
    trainer.train()
    return [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]


def theirs(rows, tmp_path, options):
    args = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, **{**SAME, **options}
    )
    dataset = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(make_tiny_model(), args, train_dataset=dataset, processing_class=tokenizer())


@pytest.mark.parametrize("name", CASES)
def test_the_first_steps_are_those_of_trl(tmp_path, name):
    rows, ours, reference = CASES[name]
    dataset = datasets.Dataset.from_list(rows)
    found = figures(make_trainer(make_tiny_model(), tokenizer(), dataset, tmp_path, **{**SAME, **ours}))
    expected = figures(theirs(rows, tmp_path, reference))
    assert len(found) == 3
    for ours_step, their_step in zip(found, expected):
        assert ours_step == pytest.approx(their_step, abs=1e-4, rel=1e-4)
