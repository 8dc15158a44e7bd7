"""What scripts of TRL's users ran into: each test is a defect that was found by trying them."""

import datasets
import pytest
import torch

from tests.tiny import make_byte_tokenizer
from tests.train.rows import make_trainer
from tunesmith.errors import ConfigError

TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained_text(trainer, row=0) -> str:
    labels = trainer.train_dataset[row]["labels"]
    return trainer.processing_class.decode([label for label in labels if label != -100])


def tool_call(arguments, **turn) -> dict:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    said = {"role": "assistant", **turn, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "2+2?"}, said]}


@pytest.mark.parametrize("turn", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("as_table", [True, False])
def test_a_tool_call_without_content_is_trained(tiny_model, tmp_path, turn, as_table):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    rows = [tool_call({"x": 2}, **turn)]
    rows = datasets.Dataset.from_list(rows) if as_table else rows
    trainer = make_trainer(tiny_model, tokenizer, rows, tmp_path)
    assert trained_text(trainer) == '<tool>add {"x": 2}</tool><|im_end|>'


AS_JSON = "{{ c.function.arguments | tojson }}"
AS_IT_IS = "{{ c.function.arguments }}"
JOINED = "{{ 'json ' + c.function.arguments }}"
EITHER = "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
ITEMS = "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"


@pytest.mark.parametrize("arguments", [{"x": "ü"}, '{"x": "ü"}'])
@pytest.mark.parametrize(
    ("way", "written"),
    [
        (AS_JSON, '{"x": "ü"}'),
        (AS_IT_IS, '{"x": "ü"}'),
        (JOINED, 'json {"x": "ü"}'),
        (EITHER, '{"x": "ü"}'),
        (ITEMS, "x=ü"),
    ],
)
def test_arguments_of_tool_calls_reach_a_template_as_it_takes_them(tiny_model, tmp_path, arguments, way, written):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE.replace(AS_JSON, way)
    trainer = make_trainer(tiny_model, tokenizer, [tool_call(arguments)], tmp_path)
    assert trained_text(trainer) == f"<tool>add {written}</tool><|im_end|>"


def test_arguments_that_are_no_json_stay_as_they_are(tiny_model, tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    trainer = make_trainer(tiny_model, tokenizer, [tool_call("{x: 2")], tmp_path)
    assert trained_text(trainer) == '<tool>add "{x: 2"</tool><|im_end|>'


CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(12)
]


def sizes_of_batches(trainer) -> list[int]:
    """Rows of each batch that the model is given, while it runs out of memory above 3."""
    seen = []

    def hook(module, args, kwargs):
        if not module.training:
            return
        seen.append(len(kwargs["document_lengths"]))
        if seen[-1] > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_that_does_not_fit_is_made_smaller(tiny_model, byte_tokenizer, tmp_path, streamed):
    rows = datasets.Dataset.from_list(CHATS)
    rows = rows.to_iterable_dataset() if streamed else rows
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 2}
    trainer = make_trainer(tiny_model, byte_tokenizer, rows, tmp_path, **options)
    seen = sizes_of_batches(trainer)
    trainer.train()
    assert seen == [8, 7, 6, 5, 4, 3, 3]
    counted = [line["num_tokens"] for line in trainer.state.log_history if "loss" in line]
    assert counted[-1] == trainer.tokens_seen < 2 * counted[0]


def test_dropping_the_last_batch_may_not_drop_the_only_one(tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(tiny_model, byte_tokenizer, CHATS[:3], tmp_path, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match="dataloader_drop_last: 3 rows are fewer than the 8 of one batch"):
        trainer.train()
