"""The loss formed in a model's head equals the one from its full logits, whatever peft made of that head."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tunesmith.train.collate import loss_positions
from tunesmith.train.head import HeadLoss, loss_in_head
from tunesmith.train.loss import logits_loss, loss_kind

IDS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))
KINDS = {"nll": loss_kind(), "dft": loss_kind("dft"), "smoothed": loss_kind("nll", 0.1)}


def request(**options):
    found = loss_positions(IDS)
    return HeadLoss(found["loss_index"], found["loss_targets"], **options)


def in_head(model, **options):
    """Sums of one forward pass with the loss in the head."""
    asked = request(**options)
    with loss_in_head(model.get_output_embeddings(), asked):
        return asked.from_logits(model(input_ids=IDS, use_cache=False).logits)


def from_full_logits(model, kind):
    asked = request()
    logits = model(input_ids=IDS, use_cache=False).logits
    return logits_loss(logits.reshape(-1, logits.shape[-1])[asked.index], asked.targets, kind=kind, metrics=True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def lora(model, **options):
    """An adapter whose weights have left zero, in evaluation mode as in a step without dropout."""
    wrapped = get_peft_model(model, LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", **options}))
    generator = torch.Generator().manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
    return wrapped


def frozen_backbone(model):
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    return model


MODELS = {
    "plain": lambda make: make(),
    "tied": lambda make: make(tie_word_embeddings=True),
    "LoRA beside the head": lambda make: lora(make(), target_modules=["q_proj"]),
    "LoRA on the head": lambda make: lora(make(), target_modules=["q_proj", "lm_head"]),
    "LoRA on the head alone": lambda make: lora(make(), target_modules=["lm_head"]),
    "LoRA on a tied head": lambda make: lora(make(tie_word_embeddings=True), target_modules=["q_proj", "lm_head"]),
    "DoRA on the head": lambda make: lora(make(), target_modules=["lm_head"], use_dora=True),
    "head trained whole": lambda make: lora(make(), target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "frozen backbone": lambda make: frozen_backbone(make()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_sums_and_gradients_equal_those_of_full_logits(make_tiny_model, name, kind):
    model = MODELS[name](make_tiny_model)
    found = in_head(model, kind=KINDS[kind], metrics=True)
    mine = gradients(model, found.loss)
    expected = from_full_logits(model, KINDS[kind])
    theirs = gradients(model, expected.loss)
    for ours, reference in zip(found, expected):
        torch.testing.assert_close(ours, reference)
    assert mine.keys() == theirs.keys()
    assert len(mine) == sum(weight.requires_grad for weight in model.parameters())
    for parameter, gradient in theirs.items():
        torch.testing.assert_close(mine[parameter], gradient, atol=1e-5, rtol=1e-4, msg=f"{name}: {parameter}")


def test_lora_on_the_head_stays_close_in_bfloat16(make_tiny_model):
    model = MODELS["LoRA on the head"](make_tiny_model)
    with torch.autocast("cpu", torch.bfloat16):
        found = in_head(model, metrics=True)
    expected = from_full_logits(model, loss_kind())
    for ours, reference in zip((found.loss, found.entropy), (expected.loss, expected.entropy)):
        torch.testing.assert_close(ours, reference, rtol=1e-2, atol=1e-2)


def test_dropout_on_the_head_draws_as_usual(make_tiny_model):
    options = {"target_modules": ["lm_head"], "lora_dropout": 0.5}
    model = lora(make_tiny_model(), **options).train()
    losses = [(torch.manual_seed(seed), in_head(model).loss.item())[1] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_a_head_that_is_not_plain_gives_the_same_sums(make_tiny_model):
    model = make_tiny_model()
    found, other = (in_head(model, plain_head=plain, kind=KINDS["dft"], metrics=True) for plain in (True, False))
    for ours, theirs in zip(found, other):
        torch.testing.assert_close(ours, theirs)


def test_the_model_returns_one_number(make_tiny_model):
    model, asked = make_tiny_model(), request()
    with loss_in_head(model.get_output_embeddings(), asked):
        assert model(input_ids=IDS, use_cache=False).logits.shape == (1, 1, 1)
    assert not asked.found.loss.requires_grad


@pytest.mark.parametrize("own", [True, False])
def test_the_head_is_itself_again_after_an_error(tiny_model, own):
    head = tiny_model.get_output_embeddings()
    mine = nn.Linear.forward.__get__(head)
    if own:
        head.forward = mine
    with pytest.raises(KeyboardInterrupt), loss_in_head(head, request()):
        raise KeyboardInterrupt
    assert head.__dict__.get("forward") == (mine if own else None)
