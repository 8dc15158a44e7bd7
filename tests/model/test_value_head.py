"""The value head: what it computes, where it is saved, and that its base is what the trainer thinks it is."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.tiny import make_tiny_model
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.value_head import RewardModel, ValueHead, has_head, load_reward_model, read_head

IDS = torch.arange(12).reshape(2, 6)
LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


def saved_base(folder, **config):
    make_tiny_model(**config).save_pretrained(folder / "base")
    return str(folder / "base")


def with_lora(base) -> RewardModel:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    return RewardModel(get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA), seed=1).eval()


# workflow: M9
def test_a_reward_is_the_head_over_the_last_hidden_state():
    model = RewardModel(make_tiny_model())
    hidden = model.base(input_ids=IDS, output_hidden_states=True).hidden_states[-1]
    expected = hidden @ model.v_head.summary.weight[0]
    torch.testing.assert_close(model(input_ids=IDS), expected)


# workflow: M9 R1
def test_an_adapter_is_saved_with_its_head_and_without_the_base(tmp_path):
    model = with_lora(saved_base(tmp_path))
    model.save_pretrained(tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "value_head.safetensors"} <= names
    assert not {name for name in names if name.startswith("model") or name.endswith(".bin")}
    assert not [name for name in load_file(tmp_path / "run" / "adapter_model.safetensors") if "lora" not in name]
    loaded = load_reward_model(str(tmp_path / "run"))
    assert torch.equal(loaded(input_ids=IDS), model(input_ids=IDS))


# workflow: M9
def test_a_whole_model_is_saved_with_its_head_and_the_head_is_not_among_its_weights(tmp_path):
    model = RewardModel(make_tiny_model(), seed=2)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "v_head" in name]
    assert torch.equal(load_reward_model(str(tmp_path))(input_ids=IDS), model(input_ids=IDS))


# workflow: M9
def test_gathered_weights_are_saved_as_the_modules_own_are(tmp_path):
    model = with_lora(saved_base(tmp_path))
    model.save_pretrained(tmp_path / "own")
    model.save_pretrained(tmp_path / "gathered", {name: value + 0 for name, value in model.state_dict().items()})
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        own, gathered = (load_file(tmp_path / folder / name) for folder in ("own", "gathered"))
        assert own.keys() == gathered.keys()
        assert all(torch.equal(own[key], gathered[key]) for key in own)


# workflow: M9
@pytest.mark.parametrize("prefix", ["v_head.summary.", "summary."])
def test_a_head_of_the_era_is_read_and_its_code_is_not_run(tmp_path, prefix):
    head = ValueHead(8, seed=5)
    head.summary.bias.data.fill_(0.5)
    torch.save(
        {prefix + name: value for name, value in head.summary.state_dict().items()}, tmp_path / "value_head.bin"
    )
    hidden = torch.randn(1, 3, 8)
    assert torch.equal(read_head(tmp_path)(hidden), head(hidden))


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


def test_a_head_that_brings_code_is_refused(tmp_path, capsys):
    torch.save({"summary.weight": Evil()}, tmp_path / "value_head.bin")
    with pytest.raises(ModelError, match="Weights only load failed"):
        read_head(tmp_path)
    assert "ran" not in capsys.readouterr().out


def test_the_file_has_the_names_that_other_programs_read(tmp_path):
    RewardModel(make_tiny_model()).save_pretrained(tmp_path)
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / "value_head.safetensors").items()}
    assert shapes == {"v_head.summary.weight": (1, 32), "v_head.summary.bias": (1,)}


def test_a_folder_without_a_head_says_so(tmp_path):
    base = saved_base(tmp_path)
    assert not has_head(base)
    with pytest.raises(ModelError, match=r"base: holds no value_head\.safetensors, so it is no reward model"):
        load_reward_model(base)


@pytest.mark.parametrize("name", ["value_head.safetensors", "value_head.bin"])
def test_a_damaged_head_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(ModelError, match=rf"{name}: cannot be read"):
        read_head(tmp_path)


def test_a_file_without_the_heads_weights_says_what_it_holds(tmp_path):
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "value_head.bin")
    with pytest.raises(ModelError, match=r"no tensor v_head\.summary\.weight .*only lm_head\.weight"):
        read_head(tmp_path)


def test_a_merged_reward_model_scores_as_its_adapter_does(tmp_path):
    model = with_lora(saved_base(tmp_path))
    expected = model(input_ids=IDS)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["half weights", "autocast"])
def test_rewards_are_float32_below_half_precision(way):
    model = RewardModel(make_tiny_model())
    model = model.bfloat16() if way == "half weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        assert model(input_ids=IDS).dtype == torch.float32


def test_a_new_head_depends_on_its_seed_alone():
    torch.manual_seed(1)
    first = ValueHead(8, seed=4).summary.weight
    torch.manual_seed(2)
    assert torch.equal(first, ValueHead(8, seed=4).summary.weight)
    assert not torch.equal(first, ValueHead(8, seed=5).summary.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_head_rests_unless_the_embeddings_share_it(tied):
    model = RewardModel(make_tiny_model(tie_word_embeddings=tied))
    assert model.get_output_embeddings().weight.requires_grad == tied
    model(input_ids=IDS).sum().backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without  # several processes wait for the gradient of every trained weight


def test_a_classifier_is_refused():
    from transformers import LlamaForSequenceClassification

    with pytest.raises(ConfigError, match=r"got LlamaForSequenceClassification\. Load it with AutoModelForCausalLM"):
        RewardModel(LlamaForSequenceClassification(make_tiny_model().config))
