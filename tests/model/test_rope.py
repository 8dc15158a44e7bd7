"""Rotary positions stretched: by how much, with which numbers, and that a trained model takes them along."""

import pytest
import torch
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config

from tests.model.folders import for_answers, for_training, logits, randomize, save_base
from tunesmith.config import ModelFields
from tunesmith.deliver.merge import merge
from tunesmith.model.load import load_any, load_model, model_max_length
from tunesmith.model.open import longest_text
from tunesmith.model.rope import stretched
from tunesmith.model.saved import save_arguments

KINDS = ["linear", "dynamic", "yarn", "llama3"]
LONG = torch.arange(100)[None]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def base(tmp_path, make_tiny_model, byte_tokenizer):
    """A model made for 64 tokens, whose weights are large enough to tell positions apart."""
    return save_base(
        tmp_path / "base", make_tiny_model(max_position_embeddings=64, initializer_range=0.2), byte_tokenizer
    )


def rope(model) -> dict:
    return model.config.rope_parameters


# workflow: M4
def test_linear_by_two_halves_every_position(base):
    model = for_training(model_name_or_path=base, adapter="full", rope_scaling="linear", max_length=100)
    assert (rope(model)["factor"], model.config.max_position_embeddings) == (2.0, 128)
    every = torch.ones_like(LONG)  # says that these are no documents end to end
    half = logits(load_model(base), LONG, position_ids=torch.arange(100)[None] / 2, attention_mask=every)
    assert torch.allclose(logits(model, LONG, attention_mask=every), half, atol=1e-5)


# workflow: M4
@pytest.mark.parametrize(("max_length", "factor"), [(65, 2.0), (128, 2.0), (129, 3.0)])
def test_training_stretches_in_whole_steps_to_the_longest_text(base, max_length, factor):
    said = []
    options = {"model_name_or_path": base, "rope_scaling": "yarn"}
    model = for_training(said.append, max_length=max_length, **options)
    assert rope(model)["factor"] == factor
    assert longest_text(ModelFields(**options), max_length) == 64 * factor >= max_length
    assert said[0] == f"rope_scaling: yarn, {factor:g} times the model's 64 positions"


# workflow: M4
@pytest.mark.parametrize("max_length", [64, 10, None])
def test_nothing_is_stretched_for_texts_that_fit(base, max_length):
    said = []
    model = for_training(said.append, max_length=max_length, model_name_or_path=base, rope_scaling="linear")
    assert rope(model)["rope_type"] == "default"
    assert said == ["rope_scaling: texts are no longer than the model's 64 positions, so nothing is stretched"]


# workflow: M4
def test_answering_stretches_by_two_unless_a_factor_is_given(base):
    assert rope(for_answers(model_name_or_path=base, rope_scaling="linear"))["factor"] == 2.0
    assert rope(for_answers(model_name_or_path=base, rope_scaling="linear", rope_factor=4))["factor"] == 4.0
    model = for_training(model_name_or_path=base, rope_scaling="linear", rope_factor=4, max_length=10)
    assert rope(model)["factor"] == 4.0


# workflow: M4
@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_takes_its_positions_along(base, tmp_path, kind):
    model = for_training(model_name_or_path=base, adapter="full", rope_scaling=kind, max_length=100)
    model.save_pretrained(tmp_path / "trained")
    again = for_answers(model_name_or_path=str(tmp_path / "trained"))
    assert (rope(again)["rope_type"], rope(again)["factor"]) == (kind, 2.0)
    assert torch.equal(logits(again, LONG), logits(model, LONG))
    assert not torch.allclose(logits(again, LONG), logits(load_model(base), LONG), atol=1e-3)


# workflow: M4
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_remembers_the_positions_of_its_base(base, tmp_path, byte_tokenizer, kind):
    options = {"model_name_or_path": base, "rope_scaling": kind}
    model = for_training(max_length=100, **options)
    randomize(model)
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    save_arguments(folder, ModelFields(**options), model)
    merge(folder, tmp_path / "merged")
    on_top = for_training(model_name_or_path=base, checkpoint_dir=folder, rope_scaling="linear", max_length=900)
    for again in (load_any(folder), for_answers(model_name_or_path=folder), on_top):
        assert rope(again) == rope(model)
        assert torch.equal(logits(again, LONG), logits(model, LONG))
    assert torch.allclose(logits(load_model(str(tmp_path / "merged")), LONG), logits(model, LONG), atol=1e-4)
    assert model_max_length(folder) == (64 if kind == "dynamic" else 128)


# workflow: M4
def test_dynamic_changes_nothing_until_a_text_is_too_long(base):
    """Growing `max_position_embeddings`, as for the others, would put off the stretch to where it no longer helps."""
    said = []
    options = {"model_name_or_path": base, "rope_scaling": "dynamic"}
    model = for_training(said.append, max_length=100, adapter="full", **options)
    short = torch.arange(64)[None]
    assert torch.equal(logits(model, short), logits(load_model(base), short))
    assert model.config.max_position_embeddings == 64
    assert longest_text(ModelFields(**options), 100) == 128
    assert "texts depend on each other" in said[0]


# workflow: M4
def test_models_without_rotary_positions_and_models_already_stretched_say_so():
    said = []
    for config in (
        GPT2Config(),
        AutoConfig.for_model("llama", rope_parameters={"rope_type": "linear", "factor": 4.0}),
    ):
        assert stretched(config, "yarn", None, max_length=None, training=False, say=said.append) is config
    assert said == [
        "rope_scaling: gpt2 has no rotary positions, so nothing is stretched",
        "rope_scaling: the model's positions are scaled already (linear, 2,048 tokens) and stay so",
    ]


# workflow: M4
def test_only_layers_that_see_everything_are_stretched():
    config = Gemma3TextConfig(max_position_embeddings=64)
    found = stretched(config, "linear", 2.0, max_length=None, training=True, say=lambda line: None)
    assert found.rope_parameters["full_attention"]["factor"] == 2.0
    assert found.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert config.rope_parameters["full_attention"]["rope_type"] == "default"
