"""What scripts of TRL's users ran into: each test is a defect that was found by trying them."""

import datasets
import pytest

from tests.tiny import make_byte_tokenizer
from tests.train.rows import make_trainer
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool>{% endfor %}"
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
