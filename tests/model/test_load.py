"""Models and tokenizers from folders, and what is said when they are not there."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tunesmith.errors import ModelError, TemplateError
from tunesmith.model.load import adapter_base, load_any, load_model, load_tokenizer, model_max_length


@pytest.fixture
def model_folder(tiny_model, byte_tokenizer, tmp_path):
    folder = tmp_path / "model"
    tiny_model.save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_a_saved_model_loads_with_the_asked_type(model_folder):
    assert load_model(str(model_folder)).dtype == torch.float32
    assert load_model(str(model_folder), dtype="bfloat16").dtype == torch.bfloat16
    assert model_max_length(str(model_folder)) == 2048


def test_an_adapter_folder_loads_with_its_base(model_folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(load_model(str(model_folder)), config)
    model.save_pretrained(tmp_path / "adapter")
    again = load_any(str(tmp_path / "adapter"), trainable_adapter=True)
    ids = torch.tensor([[1, 2, 3]])
    assert adapter_base(str(tmp_path / "adapter")) == str(model_folder)
    assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)
    assert any(parameter.requires_grad for parameter in again.parameters())


def test_a_template_file_replaces_the_tokenizers(model_folder, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    for template in (str(tmp_path / "t.jinja"), "{{ messages[0].content }}"):
        tokenizer = load_tokenizer(str(model_folder), chat_template=template)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


def test_a_template_file_that_is_not_there(model_folder):
    with pytest.raises(TemplateError, match=r"there is no file nowhere.jinja"):
        load_tokenizer(str(model_folder), chat_template="nowhere.jinja")


def test_a_folder_without_tokenizer(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"bare: no tokenizer can be loaded from there .* copy them from the base"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"config.json is missing. It holds: notes.txt"):
        load_model(str(tmp_path))


def test_a_name_that_is_neither_folder_nor_hub_id():
    with pytest.raises(ModelError, match="there is no such folder, and it is not a Hub id"):
        load_model("smollm")


def test_a_hub_id_that_cannot_be_reached():
    with pytest.raises(ModelError, match="owner/absent: no model can be loaded from there"):
        load_model("owner/absent")


def test_pickled_weights_are_refused(model_folder):
    (model_folder / "model.safetensors").unlink()
    (model_folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"pickled weights \(.bin\) only"):
        load_model(str(model_folder))


def test_an_adapter_that_does_not_name_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    with pytest.raises(ModelError, match="base_model_name_or_path is missing"):
        load_any(str(tmp_path))


def test_remote_code_is_not_run(model_folder):
    config = json.loads((model_folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}, "model_type": "evil"}
    (model_folder / "config.json").write_text(json.dumps(config))
    (model_folder / "modeling_evil.py").write_text("open('canary', 'w').close()")
    with pytest.raises(ModelError):
        load_model(str(model_folder))
    assert not (model_folder / "canary").exists()
