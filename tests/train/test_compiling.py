"""Compiled layers train as the layers do: the same loss, the same gradients, the same run again."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig

from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.errors import ConfigError
from tunesmith.model import turned_linear
from tunesmith.model.compiled import compiler, keep_apart, separate_layers
from tunesmith.model.cpu import instructions
from tunesmith.train import compiling
from tunesmith.train.compiling import LONG_RUN, planned_tokens

needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler on this machine")
PREFIX = 5


@needs_compiler
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"tokens_per_batch": 30, "gradient_accumulation_steps": 8},
        {"share_prefix": False},
    ],
)
def test_compiled_layers_equal_a_plain_loop(make_tiny_model, byte_tokenizer, tmp_path, options):
    rows = token_rows(prefix=PREFIX, weights=True)
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, compile_layers=True, **options)
    assert_same(first_gradients(trainer), reference_gradients(make_tiny_model(), rows))
    assert trainer._compiled is not None
    assert "layers: compiled in" in trainer.choices[-1]
    assert (
        len(separate_layers(trainer.model)) == trainer.model.config.num_hidden_layers
    )  # outside they are as they were


@needs_compiler
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_in_bfloat16_turn_their_weight_gradients(
    make_tiny_model, byte_tokenizer, tmp_path, monkeypatch, checkpointing
):
    monkeypatch.setattr(turned_linear, "has_tiles", lambda: True)
    rows = token_rows(prefix=PREFIX, weights=True)
    found = {}
    for name, compiles in {"turned": True, "plain": False}.items():
        options = {"bf16": True, "gradient_checkpointing": checkpointing, "compile_layers": compiles}
        trainer = make_trainer(make_tiny_model(intermediate_size=96), byte_tokenizer, rows, tmp_path / name, **options)
        found[name] = first_gradients(trainer)
        layers = trainer._compiled.linears if compiles else ()
        assert {layer.weight.shape for layer, _ in layers} == ({(96, 32), (32, 96), (16, 32)} if compiles else set())
    exact = reference_gradients(make_tiny_model(intermediate_size=96), rows)[1]
    for name, gradient in exact.items():
        errors = [float((found[way][1][name] - gradient).norm() / gradient.norm()) for way in ("turned", "plain")]
        assert errors[0] < 0.02 + 1.2 * errors[1], name


@needs_compiler
def test_compiled_layers_equal_a_plain_loop_with_lora(make_tiny_model, byte_tokenizer, tmp_path):
    from peft import get_peft_model
    from transformers import set_seed

    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    rows, model = token_rows(prefix=PREFIX), make_tiny_model()
    set_seed(7)
    expected = reference_gradients(get_peft_model(model, config), rows)
    options = {"peft_config": config, "seed": 7, "compile_layers": True}
    assert_same(first_gradients(make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)), expected)


@needs_compiler
def test_a_resumed_compiled_run_equals_an_uninterrupted_one(make_tiny_model, byte_tokenizer, tmp_path):
    from torch._dynamo.utils import counters

    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 2}
    saving |= {"train_sampling_strategy": "random", "compile_layers": True}
    whole = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(prefix=PREFIX), tmp_path / "a", **saving)
    whole._compile()
    graphs = counters["stats"]["unique_graphs"]
    whole.train()
    assert counters["stats"]["unique_graphs"] == graphs  # every shape of batch runs what the trial compiled
    torch.compiler.reset()
    again = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(prefix=PREFIX), tmp_path / "b", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@needs_compiler
def test_a_long_run_compiles_after_its_first_step_and_resumes_the_same(
    make_tiny_model, byte_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(compiling, "LONG_RUN", 0)
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 3}
    whole = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(prefix=PREFIX), tmp_path / "a", **options)
    steps = []
    monkeypatch.setattr(
        whole, "_compile", lambda compile=whole._compile: (steps.append(whole.state.global_step), compile())
    )
    assert whole.choices[-1].startswith("layers: compiled after the first step")
    whole.train()
    assert steps == [1, 2]
    assert whole._compiled is not None
    torch.compiler.reset()
    again = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(prefix=PREFIX), tmp_path / "b", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"padding_free": False}, "this trainer's batches are not flat"),
        ({"torch_compile": True}, "torch_compile compiles the whole model"),
        ({}, "there is no C\\+\\+ compiler"),
    ],
)
def test_what_cannot_be_compiled_is_said(make_tiny_model, byte_tokenizer, tmp_path, monkeypatch, options, why):
    monkeypatch.setattr(compiling, "compiler", lambda: None)
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options)
    assert not trainer._compiles
    assert any(line.startswith("layers: not compiled (") for line in trainer.choices)
    with pytest.raises(ConfigError, match=f"compile_layers: {why}.* Leave it out"):
        make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, compile_layers=True, **options)


def test_short_runs_are_not_compiled_unless_asked(make_tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "compiler", lambda: "c++")
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path)
    assert (trainer._compiles, trainer.choices[-1]) == (False, "layers: not compiled (a short run)")
    tokens = sum(len(ids) for ids in token_rows()["input_ids"])
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    epochs = LONG_RUN / (6 * tokens * parameters) + 1
    assert make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, num_train_epochs=epochs)._compiles


def test_tokens_of_a_run_are_those_of_its_steps_or_epochs(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()
    tokens = sum(len(ids) for ids in rows["input_ids"])

    def planned(**options):
        return planned_tokens(make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options).args, rows)

    assert planned(num_train_epochs=2) == 2 * tokens
    assert planned(max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2) == 3 * tokens
    assert planned(max_steps=3, tokens_per_batch=50) == 150
    assert planned_tokens(None, iter(())) is None


@pytest.mark.parametrize("fault", ["raises", "is wrong"])
def test_a_failed_trial_leaves_the_layers_as_they_are(
    make_tiny_model, byte_tokenizer, tmp_path, monkeypatch, caplog, fault
):
    def broken(forward, **_):
        def run(*args, **kwargs):
            if fault == "raises":
                raise RuntimeError("InvalidCxxCompiler: none\nmore")
            output = forward(*args, **kwargs)
            return output + output.roll(1, -1)

        return run

    monkeypatch.setattr(compiling, "compiler", lambda: "c++")
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(compiling, "LONG_RUN", 0)
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path)
    with caplog.at_level(logging.WARNING):
        found = first_gradients(trainer)
    assert_same(found, reference_gradients(make_tiny_model(), token_rows()))
    words = "RuntimeError: InvalidCxxCompiler: none)" if fault == "raises" else "in place of"
    assert "not compiled after all" in caplog.text
    assert words in caplog.text
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, compile_layers=True)
    with pytest.raises(ConfigError, match="compile_layers: the trial failed"):
        trainer.train()


@needs_compiler
def test_the_trial_moves_no_generator_and_leaves_no_gradient(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, compile_layers=True)
    before, weights = torch.get_rng_state(), {name: w.clone() for name, w in trainer.model.state_dict().items()}
    trainer._compile()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert all(torch.equal(trainer.model.state_dict()[name], value) for name, value in weights.items())


NORM = """
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from tunesmith.model.compiled import keep_apart
keep_apart()
norm, states = LlamaRMSNorm(64), torch.randn(1, 48, 64, generator=torch.Generator().manual_seed(0))
print(torch.allclose(torch.compile(norm.forward, dynamic=True)(states), norm(states), atol=1e-5))
"""


@needs_compiler
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="needs a CPU with AVX-512")
def test_what_was_compiled_for_other_instructions_is_not_used(tmp_path):
    for capability in ("avx512", "avx2"):
        variables = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        environment = {**os.environ, "PYTHONPATH": "src", **variables}
        done = subprocess.run([sys.executable, "-c", NORM], capture_output=True, text=True, env=environment)
        assert done.stdout == "True\n", done.stderr
    assert [folder.name.split("-")[0] for folder in sorted(tmp_path.iterdir())] == ["avx2", "avx512"]


def test_the_cache_is_inside_the_folder_that_a_person_chose(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        keep_apart()
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / instructions())
