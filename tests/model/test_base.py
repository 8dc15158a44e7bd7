"""An adapter goes onto the base that it was trained on, or it is said that this is another one."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model.folders import for_training, logits, randomize, save_base
from tests.tiny import make_tiny_model
from tunesmith.config import ModelFields
from tunesmith.model.base import sample, warn_of_another
from tunesmith.model.chain import adapter_base, remembered
from tunesmith.model.load import load_any, load_model
from tunesmith.model.open import open_for_training
from tunesmith.model.saved import save_arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_model, byte_tokenizer):
    """In a project's folder: `model`, and the adapter `runs/mine` that was trained on it by that name."""
    monkeypatch.chdir(tmp_path)
    save_base("model", tiny_model, byte_tokenizer)
    trained = for_training(model_name_or_path="model")
    randomize(trained)
    trained.save_pretrained("runs/mine")
    save_arguments("runs/mine", ModelFields("model"), trained)
    return trained


def edit(path, change):
    file = Path(path)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))


def rename(adapter, base):
    """Another name of its base in an adapter's own file, as a person writes one."""
    edit(f"{adapter}/adapter_config.json", lambda config: config | {"base_model_name_or_path": base})


def change_the_base(folder="model"):
    """Another value in one tensor, the smallest thing that training some layers does."""
    path = f"{folder}/model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.input_layernorm.weight"] += 0.01
    save_file(weights, path, metadata={"format": "pt"})


def test_a_relative_base_is_the_one_beside_the_run_wherever_one_stands(run, tmp_path, byte_tokenizer, monkeypatch):
    expected = logits(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    other = make_tiny_model()
    randomize(other, seed=9)
    save_base("model", other, byte_tokenizer)
    assert adapter_base("../runs/mine") == str(tmp_path / "model")
    assert torch.equal(logits(load_any("../runs/mine")), expected)


def test_where_one_stood_before_the_name_stays_as_it_was_given(run):
    assert adapter_base("runs/mine") == "model"
    told = remembered("runs/mine")["base"]
    assert told["folder"] == os.path.join("..", "..", "model")
    assert told["sample"] == sample(load_model("model"))


def test_a_run_that_moved_without_its_base_finds_it_by_name(run, tmp_path):
    shutil.move("runs/mine", tmp_path / "moved")
    assert adapter_base("moved") == "model"


def test_a_project_that_moved_is_found_by_an_absolute_name(run, tmp_path):
    before = str(tmp_path / "before" / "model")
    rename("runs/mine", before)
    edit("runs/mine/finetuning_args.json", lambda told: told | {"base": told["base"] | {"name": before}})
    assert adapter_base("runs/mine") == str(tmp_path / "model")


def test_a_name_corrected_by_hand_counts_as_it_stands(run):
    rename("runs/mine", "gone/for/ever")
    assert adapter_base("runs/mine") == "gone/for/ever"


def test_another_base_under_the_same_name_is_said(run):
    change_the_base()
    with pytest.warns(UserWarning, match="the weights in model are not those that runs/mine was trained on"):
        load_any("runs/mine")


def test_an_adapter_is_said_to_be_on_another_that_was_trained_again(run):
    """Of a chain: `second` was trained upon `runs/mine`, which was merged into the base then."""
    options = ModelFields("model", checkpoint_dir="runs/mine", resume_lora_training=False)
    second = open_for_training(options, None, seed=1, max_length=None, use_cpu=True, say=print)
    randomize(second, seed=3)
    second.save_pretrained("second")
    save_arguments("second", options, second)
    load_any("second")
    randomize(run, seed=4)
    run.save_pretrained("runs/mine")
    with pytest.warns(UserWarning, match="the weights in model, or the adapters that were merged into them, are not"):
        load_any("second")


def test_files_of_other_sizes_hold_the_same_weights(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "one")
    tiny_model.save_pretrained(tmp_path / "many", max_shard_size="10KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    assert sample(load_model(str(tmp_path / "one"))) == sample(load_model(str(tmp_path / "many")))


def test_a_model_from_memory_has_no_sample(tiny_model):
    assert sample(tiny_model) is None
    warn_of_another(tiny_model, {"sample": "0" * 16}, "adapter")  # a warning is an error here
