"""Models and tokenizers from folders, and what is said when they are not there."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from tests.train.rows import make_trainer, token_rows
from tunesmith.errors import ConfigError, ModelError
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


# reliability: 59
def test_a_folder_without_tokenizer(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match=r"bare: no tokenizer can be loaded from there .* copy them from the base"):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"config.json is missing. It holds: notes.txt"):
        load_model(str(tmp_path))


# reliability: 59
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


# ---- arguments of from_pretrained


# trainer: H1 A2 B7
@pytest.mark.parametrize("option", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", ["bfloat16", torch.bfloat16])
def test_parameters_have_the_asked_type(model_folder, option, value):
    model = load_model(str(model_folder), **{option: value})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# trainer: H1 B7
@pytest.mark.parametrize("value", ["auto", None])
def test_auto_keeps_the_checkpoints_type(model_folder, value):
    load_model(str(model_folder), dtype="float16").save_pretrained(model_folder)
    assert load_model(str(model_folder), torch_dtype=value).dtype == torch.float16


# trainer: H1 B7
@pytest.mark.parametrize("value", ["bfloat61", "Tensor", 16, -1, int])
def test_a_type_that_does_not_exist_is_named(model_folder, value):
    with pytest.raises(ValueError, match=r"expected 'auto', a torch.dtype or the name of one .*, got "):
        load_model(str(model_folder), torch_dtype=value)


def test_two_types_at_once(model_folder):
    with pytest.raises(ConfigError, match=r"dtype \(float32\) and torch_dtype \(bfloat16\) name one option"):
        load_model(str(model_folder), dtype="float32", torch_dtype="bfloat16")
    assert load_model(str(model_folder), dtype=torch.float16, torch_dtype="float16").dtype == torch.float16


# trainer: B7
def test_an_argument_that_from_pretrained_does_not_know(model_folder):
    with pytest.raises(ConfigError, match=r"load_in_4bits.* Check the arguments of from_pretrained"):
        load_model(str(model_folder), load_in_4bits=True)


# trainer: H8
def test_flash_attention_without_its_package_says_what_to_do(model_folder):
    if is_flash_attn_2_available():
        pytest.skip("flash-attn is installed here")
    with pytest.raises(ModelError, match=r"flash_attention_2 needs a package of its own. Leave it"):
        load_model(str(model_folder), attn_implementation="flash_attention_2")


# trainer: A2 H1
def test_a_trainer_loads_a_model_by_its_name(model_folder, byte_tokenizer, tmp_path):
    options = {"model_init_kwargs": {"dtype": "bfloat16"}, "upcast_trainable": False}
    trainer = make_trainer(str(model_folder), byte_tokenizer, token_rows(), tmp_path, **options)
    assert type(trainer.model).__name__ == "LlamaForCausalLM"
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


# trainer: E2
def test_padding_that_is_the_stop_token_leaves_its_row_trainable(tmp_path, make_tiny_model):
    make_tiny_model(pad_token_id=257).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    model(torch.tensor([[1, 257, 2]]), labels=torch.tensor([[1, 257, 2]])).loss.backward()
    assert model.model.embed_tokens.weight.grad[257].abs().sum() > 0


def test_an_adapter_with_rows_that_its_base_lacks(model_folder, tmp_path):
    model = load_model(str(model_folder))
    model.resize_token_embeddings(300)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 299]])
    assert torch.equal(load_any(str(tmp_path / "adapter")).eval()(ids).logits, wrapped.eval()(ids).logits)


@pytest.mark.parametrize("damage", ["one is missing", "other names", "one layer more"])
def test_weights_that_are_not_there_are_no_random_numbers(tiny_model, tmp_path, damage):
    tiny_model.save_pretrained(tmp_path)
    path, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights = load_file(path)
    if damage == "one is missing":
        weights.pop("model.norm.weight")
    elif damage == "other names":
        weights = {f"other.{name}": tensor for name, tensor in weights.items()}
    else:
        found = json.loads(config.read_text())
        config.write_text(
            json.dumps({**found, "num_hidden_layers": found["num_hidden_layers"] + 1, "layer_types": None})
        )
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"of the model's weights are not in its files, such as (model\.|lm_head)"):
        load_model(str(tmp_path))


def test_weights_that_nobody_reads_are_named(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 1, "layer_types": None}))
    with pytest.warns(UserWarning, match=r"weights in its files are no part of the model, such as model\.layers\.1\."):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"hidden_size": 64},
            r"21 of its weights have other shapes .* such as lm_head\.weight: \[259, 32\] in its files",
        ),
        ({"vocab_size": 200}, r"its config\.json describes no model \(Padding_idx"),
        (None, r"config\.json cannot be read: Expecting .* Copy or download it again"),
    ],
)
def test_a_config_that_is_not_of_its_weights_is_named(tiny_model, byte_tokenizer, tmp_path, change, said):
    tiny_model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{" if change is None else json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ModelError, match=said):
        load_tokenizer(str(tmp_path)) and load_model(str(tmp_path))


@pytest.mark.parametrize(("key", "value"), [("peft_type", "NEWKIND"), ("lora_alpha", "x")])
def test_an_adapter_config_that_peft_cannot_read_is_named(model_folder, tmp_path, key, value):
    folder = tmp_path / "adapter"
    get_peft_model(load_any(model_folder), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(ModelError, match=r"adapter_config\.json: peft cannot read it: KeyError|does not fit .* 'str'"):
        load_any(str(folder))
