"""A merged model answers as base and adapter do, also after it was read back, or it is not there."""

import copy
import io
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from tunesmith.deliver import merge as merging
from tunesmith.deliver.merge import merge, remove_abandoned
from tunesmith.errors import ConfigError, ModelError

IDS = torch.arange(40)[None]


# peft warns of tied weights and of saved embeddings; that the merge is right all the same is what is tested here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*save_embedding_layers.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


@pytest.fixture
def quiet():
    return Console(file=io.StringIO(), width=40)


def make_base(folder, model, tokenizer, tied=False, dtype=torch.float32):
    model.config.tie_word_embeddings = tied
    model = type(model)(model.config)  # ties, or not, as the config says
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(folder, base, **options):
    """An adapter as if trained: every weight of it is random."""
    config = LoraConfig(
        **({"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options)
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "norm" not in name:
            parameter.data = torch.randn_like(parameter) * 0.1
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model.eval().float()(IDS).logits


# workflow: W7
# reliability: 61
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()) or "all-linear",
)
def test_merged_logits_equal_those_of_base_and_adapter(tmp_path, tiny_model, byte_tokenizer, quiet, tied, options):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer, tied)
    adapter = make_adapter(tmp_path / "adapter", base, **options)
    result = merge(adapter, tmp_path / "merged", console=quiet)
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (expected - found).abs().max() <= 1e-4 * expected.abs().max()
    assert result["relative_difference"] <= result["tolerance"] == 1e-4
    assert not torch.allclose(found, logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-2)


def test_a_merged_folder_is_a_whole_model_without_pickles(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    result = merge(make_adapter(tmp_path / "adapter", base), tmp_path / "out" / "merged", console=quiet)
    files = {entry.name for entry in (tmp_path / "out" / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt")) or "adapter" in name}
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["merged"]
    assert (result["dtype"], result["same_first_choice"]) == ("float32", 1.0)
    assert "logits differ from base + adapter by at most" in quiet.file.getvalue()
    assert quiet.file.getvalue().count("\n") == 1


# workflow: W7
# reliability: 62
def test_the_adapters_own_tokenizer_and_template_are_taken(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    trained = copy.deepcopy(byte_tokenizer)
    trained.eos_token = trained.pad_token
    trained.chat_template += "{# trained #}"
    trained.save_pretrained(adapter)
    merge(adapter, tmp_path / "merged", console=quiet)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template.endswith("{# trained #}")
    stops = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert {trained.pad_token_id, trained.convert_tokens_to_ids("<|im_end|>")} <= set(stops)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_kept_and_its_looser_tolerance_stated(tmp_path, tiny_model, byte_tokenizer, quiet, dtype):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer, dtype=getattr(torch, dtype))
    result = merge(make_adapter(tmp_path / "adapter", base), tmp_path / "merged", console=quiet)
    assert result["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)
    assert 1e-5 < result["relative_difference"] < result["tolerance"]
    assert f"allowed {result['tolerance']:.0e}" in quiet.file.getvalue()


def test_a_dtype_can_be_asked_for(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    assert merge(adapter, tmp_path / "merged", dtype="bfloat16", console=quiet)["dtype"] == "bfloat16"
    with pytest.raises(ConfigError, match="expected one of float32, float16, bfloat16, got 'int8'"):
        merge(adapter, tmp_path / "other", dtype="int8", console=quiet)


def test_what_a_killed_merge_left_is_cleared_away(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", ""])
    other.wait()
    left = {number: tmp_path / f".merged.{number}.staged" for number in (other.pid, os.getpid())}
    for folder in (*left.values(), tmp_path / f".others.{other.pid}.staged"):
        folder.mkdir()
    remove_abandoned(tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == sorted([left[os.getpid()], tmp_path / f".others.{other.pid}.staged"])


def test_a_merge_that_changes_the_answers_leaves_nothing(tmp_path, tiny_model, byte_tokenizer, quiet, monkeypatch):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    monkeypatch.setattr(merging, "merged", lambda model: model.unload())
    with pytest.raises(ModelError, match="answers differently from base and adapter: logits differ by"):
        merge(adapter, tmp_path / "merged", console=quiet)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_weight_that_changed_on_the_way_to_disk_is_found(tmp_path, tiny_model, byte_tokenizer, quiet, monkeypatch):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer, dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    save = merging._save

    def save_and_drift(model, *rest):
        save(model, *rest)
        model.model.norm.weight.data[0] += 0.01

    monkeypatch.setattr(merging, "_save", save_and_drift)
    with pytest.raises(ModelError, match=r"differs in 1 of \d+ weights, e\.g\. model\.norm\.weight; nothing was kept"):
        merge(adapter, tmp_path / "merged", console=quiet)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_folder_in_the_way_is_kept(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    for output, overwrite, message in [
        ("mine", False, "is not empty"),
        ("mine", True, "is not a model folder"),
        ("base", True, "holds the base model"),
        ("adapter", True, "holds the adapter"),
        (".", True, "holds the adapter"),
        ("mine/thesis.txt", True, "is a file"),
    ]:
        with pytest.raises(ConfigError, match=message):
            merge(adapter, tmp_path / output, overwrite=overwrite, console=quiet)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_overwrite_replaces_an_older_merged_model(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "merged", console=quiet)
    (tmp_path / "merged" / "old.txt").write_text("")
    merge(adapter, tmp_path / "merged", overwrite=True, console=quiet)
    assert not (tmp_path / "merged" / "old.txt").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["adapter", "base", "merged"]


def test_a_base_that_moved_is_named_and_can_be_given(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match=r"belongs to '.*base', which cannot be loaded: .* --base"):
        merge(adapter, tmp_path / "merged", console=quiet)
    assert merge(adapter, tmp_path / "merged", base=tmp_path / "moved", console=quiet)["base"] == str(
        tmp_path / "moved"
    )


def test_what_is_not_an_adapter_is_said(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    with pytest.raises(ModelError, match=r"is not an adapter: .* It is a whole model already"):
        merge(base, tmp_path / "merged", console=quiet)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"base_model_name_or_path is missing, .* --base"):
        merge(tmp_path / "empty", tmp_path / "merged", console=quiet)


# ---- several adapters, and the shape of the folder


# workflow: W7
def test_several_adapters_are_merged_in_their_order(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapters = [make_adapter(tmp_path / "first", base), make_adapter(tmp_path / "second", base, r=2)]
    byte_tokenizer.save_pretrained(adapters[1])
    (adapters[1] / "chat_template.jinja").write_text("{{ 'second' }}")
    result = merge(adapters, tmp_path / "merged", console=quiet)
    model = AutoModelForCausalLM.from_pretrained(base)
    for adapter in adapters:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert torch.allclose(found, logits(model), atol=1e-4)
    assert result["base"] == str(base)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ 'second' }}"


# workflow: W7
def test_weights_are_cut_into_files_of_the_asked_size(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    merge(adapter, tmp_path / "merged", max_shard_size="50KB", console=quiet)
    shards = sorted((tmp_path / "merged").glob("model-*.safetensors"))
    assert len(shards) == 3
    assert all(shard.stat().st_size < 55_000 for shard in shards)
    assert (tmp_path / "merged" / "model.safetensors.index.json").exists()
    for size in ("fifty", "50", "-1GB", "5GiB"):
        with pytest.raises(ConfigError, match=f"max_shard_size: expected a size such as 10GB or 500MB, got '{size}'"):
            merge(adapter, tmp_path / "other", max_shard_size=size, console=quiet)


# workflow: W7
def test_the_bases_ways_to_generate_are_kept(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    settings = {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}
    (base / "generation_config.json").write_text(json.dumps(settings))
    merge(make_adapter(tmp_path / "adapter", base), tmp_path / "merged", console=quiet)
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text()).items() >= settings.items()


def test_a_base_that_is_an_adapter_itself_is_named(tmp_path, tiny_model, byte_tokenizer, quiet):
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.raises(
        ModelError, match=r"adapter: is an adapter, which has no weights of a base model. Name its base"
    ):
        merge(adapter, tmp_path / "merged", base=adapter, console=quiet)


def test_a_merge_of_nothing_and_a_damaged_tokenizer_are_said(tmp_path, tiny_model, byte_tokenizer, quiet):
    with pytest.raises(ConfigError, match="no adapter is named"):
        merge([], tmp_path / "merged", console=quiet)
    base = make_base(tmp_path / "base", tiny_model, byte_tokenizer)
    adapter = make_adapter(tmp_path / "adapter", base)
    (tmp_path / "adapter" / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="no tokenizer can be loaded from there"):
        merge(adapter, tmp_path / "merged", console=quiet)
