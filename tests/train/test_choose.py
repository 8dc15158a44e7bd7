"""What is chosen or refused for a model and a machine, where a test has neither that GPU nor those processes."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.training_args import ParallelMode

from tests.train.rows import first_gradients, make_trainer, token_rows
from tunesmith.errors import ConfigError
from tunesmith.model.adapt import attach
from tunesmith.train.choose import check, choose_unused_search, settled
from tunesmith.train.options import SFTConfig

LORA = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


# ---- precision


# workflow: V9
# reliability: 54
def test_bf16_on_a_gpu_that_would_emulate_it_is_an_error(monkeypatch, tiny_model):
    native = [True, False]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native.pop(0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    args = SimpleNamespace(
        bf16=True, fp16=False, device=torch.device("cuda"), activation_offloading=False, router_aux_loss_coef=None
    )
    check(args, tiny_model)
    with pytest.raises(ConfigError, match=r"bf16: Tesla T4 has no bfloat16 arithmetic .* Set fp16: true"):
        check(args, tiny_model)


# workflow: V9
# reliability: 54
@pytest.mark.parametrize(
    ("asked", "is_faster", "said"), [(True, False, "as asked"), (True, True, None), (None, False, "float32 products")]
)
def test_bf16_that_is_slower_on_this_cpu_is_said(monkeypatch, tiny_model, tmp_path, asked, is_faster, said):
    monkeypatch.setattr("tunesmith.train.choose.bf16_is_faster", lambda device, **limits: is_faster)
    args, lines = settled(SFTConfig(output_dir=str(tmp_path), bf16=asked, use_cpu=True), tiny_model, None)
    precision = [line for line in lines if line.startswith("precision")]
    assert args.bf16 is bool(asked)
    assert said in precision[0] if said else precision == []


# ---- several processes


def distributed(**options):
    return SimpleNamespace(
        **{"parallel_mode": ParallelMode.DISTRIBUTED, "ddp_find_unused_parameters": None, **options}
    )


# workflow: V10
def test_lora_on_several_processes_spares_the_search_for_unused_parameters(tiny_model):
    args = distributed()
    assert choose_unused_search(args, attach(tiny_model, LoraConfig(**LORA)))
    assert args.ddp_find_unused_parameters is False


# workflow: V10
def test_the_search_stays_where_it_was_asked_for_or_is_needed(tiny_model, make_tiny_model):
    wrapped = attach(make_tiny_model(), LoraConfig(**LORA))
    tiny_model.model.layers[0].mlp.experts = nn.Linear(2, 2)
    experts = attach(tiny_model, LoraConfig(**{**LORA, "target_modules": ["experts"]}))
    for args, model in [
        (distributed(ddp_find_unused_parameters=True), wrapped),
        (distributed(parallel_mode=ParallelMode.NOT_PARALLEL), wrapped),
        (distributed(), make_tiny_model()),
        (distributed(), experts),
    ]:
        before = args.ddp_find_unused_parameters
        assert not choose_unused_search(args, model)
        assert args.ddp_find_unused_parameters is before


# ---- what training switches


# workflow: M6
def test_no_cache_is_kept_in_training_and_the_saved_config_still_has_it(tiny_model, byte_tokenizer, tmp_path):
    seen = []
    tiny_model.model.register_forward_hook(
        lambda module, inputs, options, output: seen.append((options.get("use_cache"), output.past_key_values)),
        with_kwargs=True,
    )
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.save_model()
    assert {cache for _, cache in seen} == {None}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["use_cache"] is True


# workflow: M6
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_first_adapter_of_a_frozen_base(tiny_model, byte_tokenizer, tmp_path, checkpointing):
    wrapped = attach(tiny_model, LoraConfig(**LORA, init_lora_weights=False))
    options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(wrapped, byte_tokenizer, token_rows(), tmp_path, max_steps=1, **options)
    trainer.train()
    trainer.state.global_step = 0  # a run that is over is handed no more batches
    gradients = first_gradients(trainer)[1]
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())


# workflow: M6
def test_the_loss_is_formed_in_float32_whatever_the_heads_type(tiny_model, byte_tokenizer, tmp_path):
    options = {"upcast_trainable": False, "bf16": True}
    trainer = make_trainer(tiny_model.bfloat16(), byte_tokenizer, token_rows(), tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert tiny_model.lm_head.weight.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() != loss.bfloat16().item()
