"""What lies beside a trained adapter, and that a folder with it is enough to load from."""

import dataclasses
import json

import pytest
import torch

from tests.model.folders import for_answers, for_training, logits, randomize, save_adapter, save_base
from tests.train.rows import make_trainer, token_rows
from tunesmith.config import ModelFields
from tunesmith.deliver.merge import merge
from tunesmith.errors import ModelError
from tunesmith.model.load import load_model
from tunesmith.model.saved import load_arguments, save_arguments
from tunesmith.model.value_head import RewardModel, load_reward_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def base(tmp_path, tiny_model, byte_tokenizer):
    return save_base(tmp_path / "base", tiny_model, byte_tokenizer)


# workflow: A4 R1
def test_model_options_come_back_from_their_file(tmp_path):
    options = ModelFields("base", lora_r=3, lora_target_modules=["W_pack"], rope_scaling="yarn", load_in_4bit=True)
    save_arguments(tmp_path, options)
    assert load_arguments(tmp_path) == options
    with pytest.raises(ModelError, match=r"nowhere/finetuning_args\.json cannot be read"):
        load_arguments("nowhere")


# workflow: R1
def test_no_secret_is_written(tmp_path):
    options = ModelFields("base", hf_token="hf_abcdefgh123", cache_dir="/home/lovelace/cache", trust_remote_code=True)
    written = save_arguments(tmp_path, options).read_text()
    assert not any(word in written for word in ("hf_", "lovelace", "trust_remote_code"))
    assert load_arguments(tmp_path) == ModelFields("base")
    assert dataclasses.asdict(options)["hf_token"]  # the options themselves stay as they are


# workflow: R1
def test_a_run_of_lora_leaves_an_adapter_and_its_options_and_no_base(base, byte_tokenizer, tmp_path):
    options = {"model_name_or_path": base, "lora_r": 2}
    model = for_training(tokenizer=byte_tokenizer, **options)
    trainer = make_trainer(model, byte_tokenizer, token_rows(), tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model()
    save_arguments(tmp_path / "run", ModelFields(**options), trainer.model)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "finetuning_args.json"} <= names
    assert not [name for name in names if name.startswith("model") or name.endswith((".bin", ".pt", ".pkl"))]
    assert json.loads((tmp_path / "run" / "finetuning_args.json").read_text())["lora_r"] == 2


# workflow: M8 W7
@pytest.mark.parametrize("place", ["run", "run/checkpoint-3"])
def test_an_adapter_finds_those_that_it_was_trained_on_top_of(base, tmp_path, place):
    first = save_adapter(tmp_path / "first", base)
    options = {"model_name_or_path": base, "checkpoint_dir": first, "resume_lora_training": False}
    model = for_training(**options)
    randomize(model, seed=5)
    model.save_pretrained(tmp_path / place)
    save_arguments(tmp_path / "run", ModelFields(**options), model)
    expected, folder = logits(model), str(tmp_path / place)
    assert torch.allclose(logits(for_answers(model_name_or_path=folder)), expected, atol=1e-5)
    assert torch.allclose(logits(for_answers(model_name_or_path=base, checkpoint_dir=folder)), expected, atol=1e-5)
    again = for_answers(model_name_or_path=base, checkpoint_dir=[first, folder])
    assert torch.allclose(logits(again), expected, atol=1e-5)
    merge(folder, tmp_path / "merged")
    assert torch.allclose(logits(load_model(str(tmp_path / "merged"))), expected, atol=1e-4)


def test_a_reward_models_adapter_tells_of_its_ground_as_any_other(base, tmp_path):
    first = save_adapter(tmp_path / "first", base)
    options = {"model_name_or_path": base, "checkpoint_dir": first, "resume_lora_training": False}
    model = RewardModel(for_training(**options))
    randomize(model, seed=5)
    model.save_pretrained(tmp_path / "run")
    save_arguments(tmp_path / "run", ModelFields(**options), model)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids)
        assert torch.allclose(load_reward_model(str(tmp_path / "run"))(input_ids=ids), expected, atol=1e-5)


# workflow: M8
def test_an_adapter_whose_ground_is_gone_says_which(base, tmp_path):
    folder = save_adapter(tmp_path / "second", base)
    (tmp_path / "second" / "finetuning_args.json").write_text(json.dumps({"merged_before": [str(tmp_path / "gone")]}))
    with pytest.raises(ModelError, match=r"with the adapter .*gone merged into it, and that folder is gone"):
        for_answers(model_name_or_path=folder)
