"""Folders of tiny models and adapters, for the tests of what is loaded from them."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tunesmith.config import ModelFields
from tunesmith.model.open import open_for_answers, open_for_training

IDS = torch.arange(40)[None]


def save_base(folder, model, tokenizer, dtype=torch.float32) -> str:
    """A whole model with its tokenizer."""
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(folder, base, seed=1, **options) -> str:
    """An adapter as if trained: every weight of it is random, drawn by `seed`."""
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    randomize(model, seed)
    model.save_pretrained(folder)
    return str(folder)


def randomize(model, seed=1) -> None:
    """New values for all that trains."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def for_training(say=lambda line: None, tokenizer=None, max_length=None, **options):
    """The model that a recipe with these options trains on a CPU."""
    fields = ModelFields(**options)
    return open_for_training(fields, tokenizer, seed=0, max_length=max_length, use_cpu=True, say=say)


def for_answers(say=lambda line: None, **options):
    """The model that a recipe with these options answers with on a CPU."""
    return open_for_answers(ModelFields(**options), use_cpu=True, say=say)


def logits(model, ids=IDS, **inputs):
    """What it says, without dropout and gradients."""
    training = model.training
    with torch.no_grad():
        found = model.eval()(input_ids=ids, use_cache=False, **inputs).logits.float()
    model.train(training)
    return found


def trained(model) -> set[str]:
    """Names of what trains."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
