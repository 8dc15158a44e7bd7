"""NEFTune: noise of the paper's size for every document, in training only, and nothing left behind."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.train.rows import LENGTHS, token_rows
from tunesmith.errors import ConfigError
from tunesmith.train.collate import FlatCollator, PaddedCollator
from tunesmith.train.neftune import document_lengths, noisy_embeddings, real_lengths

ALPHA, H = 5.0, 32


def noise_of(model, inputs, alpha=ALPHA, seed=0, told=True):
    """What the hook adds to the embeddings of `inputs`, (B, S, H)."""
    embeddings = model.get_input_embeddings()
    clean = embeddings(inputs["input_ids"]).detach()
    torch.manual_seed(seed)
    with noisy_embeddings(model.train(), alpha) as noise, noise.of(inputs if told else {}):
        return (embeddings(inputs["input_ids"]) - clean).detach()


def limit(length):
    return ALPHA / (length * H) ** 0.5


def fills(noise, length):
    """Uniform between plus and minus the limit: never beyond, and with its mean size, half of it."""
    return noise.abs().max() <= limit(length) * 1.0001 and abs(noise.abs().mean() / limit(length) - 0.5) < 0.1


# trainer: J1
@pytest.mark.parametrize("boundaries", [True, False])
def test_flat_documents_get_noise_of_their_own_length(tiny_model, boundaries):
    noise = noise_of(tiny_model, FlatCollator(boundaries)(token_rows()))
    assert noise.shape == (1, sum(LENGTHS), H)
    for part, length in zip(noise.split(LENGTHS, dim=1), LENGTHS):
        assert fills(part, length)


# trainer: J1
def test_padded_rows_get_noise_of_their_real_length(tiny_model):
    noise = noise_of(tiny_model, PaddedCollator()(token_rows()))
    for row, length in zip(noise, LENGTHS):
        assert fills(row[:length], length)


# trainer: J1
def test_without_any_lengths_the_row_counts_as_in_the_paper(tiny_model):
    inputs = {"input_ids": torch.zeros(3, 20, dtype=torch.int64)}
    assert fills(noise_of(tiny_model, inputs), 20)
    assert fills(noise_of(tiny_model, PaddedCollator()(token_rows()), told=False), max(LENGTHS))


# trainer: J1
def test_a_seed_repeats_the_noise_and_another_changes_it(tiny_model):
    inputs = FlatCollator()(token_rows())
    first, again, other = (noise_of(tiny_model, inputs, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


# trainer: J1
def test_evaluation_has_no_noise(tiny_model):
    ids = torch.arange(10).unsqueeze(0)
    with noisy_embeddings(tiny_model, ALPHA):
        tiny_model.train()
        assert not torch.equal(*(tiny_model.get_input_embeddings()(ids) for _ in range(2)))
        tiny_model.eval()
        assert torch.equal(*(tiny_model.get_input_embeddings()(ids) for _ in range(2)))


# trainer: J1
@pytest.mark.parametrize("end", [None, RuntimeError, KeyboardInterrupt])
def test_the_hook_is_gone_however_training_ends(tiny_model, end):
    embeddings = tiny_model.train().get_input_embeddings()
    mine = embeddings.register_forward_hook(lambda *_: None)
    try:
        with noisy_embeddings(tiny_model, ALPHA) as noise, noise.of({}):
            assert len(embeddings._forward_hooks) == 2
            if end is not None:
                raise end
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert list(embeddings._forward_hooks) == [mine.id]
    ids = torch.arange(10).unsqueeze(0)
    assert torch.equal(embeddings(ids), embeddings(ids))


# trainer: J1
@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
)
def test_peft_models_get_the_noise_once_and_keep_no_hook(tiny_model, config):
    model = get_peft_model(tiny_model, LoraConfig(r=2, task_type="CAUSAL_LM", **config))
    inputs = FlatCollator()(token_rows())
    noise = noise_of(model, inputs)
    for part, length in zip(noise.split(LENGTHS, dim=1), LENGTHS):
        assert fills(part, length)
    seen = []
    tiny_model.model.layers[0].register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].detach()))
    torch.manual_seed(0)
    with noisy_embeddings(model, ALPHA) as source, source.of(inputs):
        model(input_ids=inputs["input_ids"], use_cache=False)
    torch.testing.assert_close(seen[0] - model.get_input_embeddings()(inputs["input_ids"]), noise)
    assert not any(module._forward_hooks for module in model.modules())


# trainer: J1
def test_gradient_checkpointing_sees_the_same_noise(make_tiny_model):
    gradients = []
    for checkpointing in (False, True):
        model = make_tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        with noisy_embeddings(model, ALPHA):
            model(input_ids=torch.arange(12).unsqueeze(0), use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients):
        torch.testing.assert_close(plain, checkpointed)


# trainer: J1
def test_only_this_model_is_noisy(make_tiny_model):
    other, ids = make_tiny_model().train(), torch.arange(10).unsqueeze(0)
    with noisy_embeddings(make_tiny_model(), ALPHA):
        assert torch.equal(other.get_input_embeddings()(ids), other.get_input_embeddings()(ids))


# trainer: J1
@pytest.mark.parametrize("alpha", [None, 0, 0.0])
def test_no_alpha_registers_nothing(tiny_model, alpha):
    with noisy_embeddings(tiny_model, alpha) as noise, noise.of(FlatCollator()(token_rows())):
        assert not tiny_model.get_input_embeddings()._forward_hooks


def test_a_negative_alpha_is_refused(tiny_model):
    with (
        pytest.raises(ConfigError, match="neftune_noise_alpha: expected a number of 0 or more, got -1"),
        noisy_embeddings(tiny_model, -1.0),
    ):
        pass


def test_embeddings_in_half_precision_stay_there(make_tiny_model):
    model = make_tiny_model().to(torch.bfloat16)
    assert noise_of(model, FlatCollator()(token_rows())).dtype == torch.bfloat16


def test_a_call_of_another_shape_is_no_error():
    embeddings = nn.Embedding(10, H)
    embeddings.get_input_embeddings = lambda: embeddings
    with noisy_embeddings(embeddings, ALPHA) as noise, noise.of({"attention_mask": torch.ones(2, 5)}):
        assert embeddings(torch.arange(7)).shape == (7, H)
        assert embeddings(torch.zeros(3, 4, dtype=torch.int64)).shape == (3, 4, H)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_beside_padding_count_no_padding(side):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for position_ids in (positions, torch.arange(4).unsqueeze(0)):
        lengths = real_lengths({"attention_mask": mask, "position_ids": position_ids}).expand(2, 4)
        assert lengths[mask.bool()].tolist() == [3, 3, 3, 4, 4, 4, 4]


def test_documents_begin_wherever_positions_do():
    assert document_lengths(torch.tensor([[5, 6, 7, 0, 0, 1]])).tolist() == [[3, 3, 3, 1, 2, 2]]
