"""A named template in training: it renders the rows, and is saved with the model."""

import datasets
import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests import tiny
from tests.data.test_templates import make_tokenizer
from tests.train.rows import make_trainer
from tunesmith.errors import TemplateError
from tunesmith.evaluate.generate import stop_token_ids
from tunesmith.model.load import load_model

ROWS = [{"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}] * 4


def trainer_with(template, tmp_path, tokenizer=None, **options):
    tokenizer = tokenizer or make_tokenizer(template)
    model = tiny.make_tiny_model(vocab_size=len(tokenizer))
    options = {"chat_template": template, "max_steps": 1, **options}
    return make_trainer(model, tokenizer, datasets.Dataset.from_list(ROWS), tmp_path, **options)


# workflow: T4 T5
def test_a_named_template_trains_and_is_saved_with_its_stop_token(tmp_path):
    tokenizer = make_tokenizer("llama3")
    trainer = trainer_with("llama3", tmp_path, tokenizer)
    row = trainer.train_dataset[0]
    begin, end = "<|start_header_id|>", "<|end_header_id|>\n\n"
    text = f"<s>{begin}user{end}2+2?<|eot_id|>{begin}assistant{end}"
    assert tokenizer.decode(row["input_ids"]) == f"{text}4<|eot_id|>"
    assert tokenizer.decode([label for label in row["labels"] if label >= 0]) == "4<|eot_id|>"
    assert (tokenizer.chat_template, tokenizer.eos_token) == (None, "</s>")
    trainer.train()
    trainer.save_model()
    again, stop = AutoTokenizer.from_pretrained(tmp_path), tokenizer.convert_tokens_to_ids("<|eot_id|>")
    prompt = again.apply_chat_template(ROWS[0]["messages"][:1], tokenize=False, add_generation_prompt=True)
    assert (prompt, again.eos_token_id) == (text, stop)
    assert stop in stop_token_ids(load_model(str(tmp_path)), again)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [stop, 257]  # the model's own stays


# workflow: T4
def test_variables_of_the_template_are_an_option(tmp_path):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    trainer = trainer_with("qwen3", tmp_path, **options)
    row, tokenizer = trainer.train_dataset[0], trainer.processing_class
    assert tokenizer.decode([label for label in row["labels"] if label >= 0]) == "4<|im_end|>"
    assert "<think>\n\n</think>\n\n4" in tokenizer.decode(row["input_ids"])


# workflow: T5
def test_tokens_that_were_asked_for_win_over_the_templates(tmp_path):
    trainer = trainer_with("chatml", tmp_path, eos_token="</s>")
    assert trainer.processing_class.eos_token == "</s>"
    assert trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"]).endswith("4<|im_end|>")


# workflow: T5
def test_an_unknown_template_stops_before_training(tmp_path):
    with pytest.raises(TemplateError, match=r"no template 'alpacca', .*Did you mean 'alpaca'"):
        trainer_with("alpacca", tmp_path)


# workflow: T5
def test_a_stop_word_that_is_no_token_is_said_and_eos_is_trained_behind_it(tmp_path):
    tokenizer = make_tokenizer()
    with pytest.warns(UserWarning, match="alpaca, vicuna"):
        trainer = trainer_with("chatml", tmp_path, tokenizer)
    labels = [label for label in trainer.train_dataset[0]["labels"] if label >= 0]
    assert tokenizer.decode(labels) == "4<|im_end|></s>"
