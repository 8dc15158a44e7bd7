"""The CUDA path against float32 references; `scripts/gpu_check.sh` runs these where a GPU is at hand."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.gpu.device import (
    DEVICE,
    GPU,
    LORA,
    ON_CUDA,
    adapters_that_do_something,
    build,
    cuda_only,
    distance,
    marks,
)
from tests.train.rows import assert_same, first_gradients, make_trainer, reference_gradients, token_rows
from tunesmith.model import attention
from tunesmith.model.adapt import attach
from tunesmith.model.attention import document_attention, window_mask
from tunesmith.train.loss import head_loss

pytestmark = marks

MANY_SHORT = tuple(1 + (7 * index) % 23 for index in range(150))
LENGTHS = {"few": (5, 1, 90), "many short": MANY_SHORT, "long": (700, 1, 300)}


# ---- attention ---------------------------------------------------------------------------------------------------


def states(lengths, heads, kv_heads, dim, dtype):
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(1, count, sum(lengths), dim, generator=generator) for count in (heads, kv_heads, kv_heads)]
    return [tensor.to(DEVICE, dtype).requires_grad_() for tensor in made]


def written_out(query, key, value, lengths, window):
    """softmax(q·k) v in float32, one document at a time; shapes as in `document_attention`."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)):
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        seen = window_mask(q.shape[2], window or 10**6, q.device)
        outputs.append(scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v)
    return torch.cat(outputs, 2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 32), (14, 2, 64), (8, 1, 128)])
@pytest.mark.parametrize("kind", sorted(LENGTHS))
def test_document_attention_equals_float32(dtype, window, heads, kv_heads, dim, kind):
    lengths = LENGTHS[kind]
    leaves = states(lengths, heads, kv_heads, dim, dtype)
    references = [leaf.detach().float().requires_grad_() for leaf in leaves]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    found, _ = document_attention(
        nn.Module(), *leaves, None, document_lengths=lengths, cu_seq_lens_q=bounds, sliding_window=window
    )
    expected = written_out(*references, lengths, window)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (found.float() * weights).sum().backward()
    (expected * weights).sum().backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert distance(found, expected) < tolerance
    for leaf, reference in zip(leaves, references):
        assert distance(leaf.grad, reference.grad) < tolerance


@cuda_only
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_torchs_kernel_shares_key_heads_without_copies(kv_heads):
    """If this holds, `varlen` need not repeat keys and values where torch (2.11) has no `enable_gqa`."""
    from tunesmith.model.attention import varlen, varlen_function

    function, known = varlen_function()
    lengths = LENGTHS["few"]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    query, key, value = (
        state[0].detach().transpose(0, 1).contiguous().requires_grad_()
        for state in states(lengths, 8, kv_heads, 64, torch.bfloat16)
    )
    more = {"enable_gqa": True} if "enable_gqa" in known else {}
    shared = function(query, key, value, bounds, bounds, 90, 90, window_size=(-1, 0), **more)
    found = torch.autograd.grad(shared.float().pow(2).sum(), [query, key, value])
    expected = torch.autograd.grad(
        varlen(query, key, value, bounds, 90, None, None).float().pow(2).sum(), [query, key, value]
    )
    assert [gradient.shape for gradient in found] == [gradient.shape for gradient in expected]
    for ours, theirs in zip(found, expected):
        assert distance(ours, theirs) < 2e-2


# ---- the loss ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocabulary", [1_000, 151_936])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_equals_float32(dtype, vocabulary, weighted):
    """151,936 entries take several blocks of rows, and several tiles of each block."""
    torch.manual_seed(0)
    rows, hidden = (2_000 if ON_CUDA else 40), 64
    head = nn.Linear(hidden, vocabulary, bias=False).to(DEVICE)
    states = torch.randn(rows, hidden, device=DEVICE).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    weights = torch.rand(rows, device=DEVICE) if weighted else None
    each = nn.functional.cross_entropy(head(states), targets, reduction="none")
    expected = (each if weights is None else each * weights).sum()
    expected.backward()
    half, given = copy.deepcopy(head).to(dtype), states.detach().to(dtype).requires_grad_()
    half.zero_grad()
    found = head_loss(half, half.forward, given, targets, weights, metrics=True)
    found.loss.backward()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    assert distance(found.loss, expected) < tolerance
    assert distance(given.grad, states.grad) < tolerance
    assert distance(half.weight.grad, head.weight.grad) < tolerance
    assert 0 < found.entropy.item() / rows < 1.01 * torch.tensor(float(vocabulary)).log().item()


# ---- layouts and steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"padding_free": False}, {"packing": True, "max_length": 32}])
def test_every_layout_equals_the_float32_loop_on_the_cpu(byte_tokenizer, tmp_path, layout):
    rows = token_rows()
    expected = reference_gradients(build(), rows)
    loss, gradients = first_gradients(make_trainer(build(), byte_tokenizer, rows, tmp_path, **GPU, **layout))
    assert_same((loss, {name: gradient.cpu() for name, gradient in gradients.items()}), expected, tolerance=1e-4)


def test_packed_split_and_accumulated_steps_are_one_step_in_bfloat16(byte_tokenizer, tmp_path):
    rows, found = token_rows(), []
    layouts = (
        {},
        {"packing": True, "max_length": 32},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"tokens_per_batch": 40, "gradient_accumulation_steps": 2},
        {"pad_to_multiple_of": 64},
        {"gradient_checkpointing": True},
    )
    for layout in layouts:
        trainer = make_trainer(build(), byte_tokenizer, rows, tmp_path, bf16=True, **GPU, **layout)
        assert trainer.support.layout == "documents"
        found.append(first_gradients(trainer))
    losses = [loss for loss, _ in found]
    assert losses == pytest.approx([losses[0]] * len(layouts), rel=2e-3)
    for _, gradients in found[1:]:
        for name, gradient in gradients.items():
            assert distance(gradient, found[0][1][name]) < 5e-2, name


@pytest.mark.parametrize("lora", [False, True])
def test_gradients_in_bfloat16_are_those_of_float32(byte_tokenizer, tmp_path, lora):
    rows, models = token_rows(), []
    for _ in range(2):
        model = build()
        if lora:
            model = attach(model, LoraConfig(**LORA))
            adapters_that_do_something(model)
        models.append(model)
    expected = reference_gradients(models[0], rows)
    loss, gradients = first_gradients(make_trainer(models[1], byte_tokenizer, rows, tmp_path, bf16=True, **GPU))
    assert loss == pytest.approx(expected[0], rel=5e-3)
    assert gradients.keys() == expected[1].keys()
    for name, gradient in gradients.items():
        assert distance(gradient, expected[1][name]) < 8e-2, name


def test_thirty_steps_in_bfloat16_follow_a_float32_loop(byte_tokenizer, tmp_path):
    rows, model = token_rows(), build().to(DEVICE)
    optimizer, expected = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), []
    for _ in range(30):
        total, count = 0.0, 0
        for row in rows:
            ids, labels = (torch.tensor([row[name]], device=DEVICE) for name in ("input_ids", "labels"))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total = total + nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum", ignore_index=-100)
            count += int((labels[0, 1:] != -100).sum())
        loss = total / count
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    options = {"bf16": True, "max_steps": 30, "learning_rate": 1e-3, **GPU}
    trainer = make_trainer(build(), byte_tokenizer, rows, tmp_path, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses[-1] < losses[0] - 0.5


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(byte_tokenizer, tmp_path):
    """Weights after 8 steps. Flash attention's backward adds with atomics, so that two runs differ in last bits."""
    options = {"bf16": True, "max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-3, **GPU}
    options |= {"per_device_train_batch_size": 2, "train_sampling_strategy": "random"}
    whole = make_trainer(build(), byte_tokenizer, token_rows(), tmp_path, **options)
    whole.train()
    resumed = make_trainer(build(), byte_tokenizer, token_rows(), tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for (name, found), expected in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert distance(found, expected) < 3e-3, name
    assert resumed.state.log_history[-2]["loss"] == pytest.approx(whole.state.log_history[-2]["loss"], rel=3e-3)


@cuda_only
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_steps_attend_with_the_flash_kernel(byte_tokenizer, tmp_path, monkeypatch, lora, dtype):
    """Rotary positions of a model with float32 weights make float32 of queries and keys, also under autocast."""

    def refuse(*_):
        raise AssertionError("one attention call per document")

    peft_config = LoraConfig(**LORA) if lora else None
    options = {"bf16": True, "peft_config": peft_config, **GPU}
    trainer = make_trainer(build().to(dtype), byte_tokenizer, token_rows(), tmp_path, **options)
    monkeypatch.setattr(attention, "looped_documents", refuse)
    first_gradients(trainer)


# ---- the host does not wait --------------------------------------------------------------------------------------


@cuda_only
@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}, {"token_metrics": False}])
@pytest.mark.parametrize("lora", [False, True])
def test_a_micro_step_never_waits_for_the_device(byte_tokenizer, tmp_path, options, lora):
    more = {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, **GPU}
    peft_config = LoraConfig(**LORA) if lora else None
    trainer = make_trainer(
        build(), byte_tokenizer, token_rows(), tmp_path, peft_config=peft_config, **{**more, **options}
    )
    trainer.train()  # what is made once is made
    batches = iter(trainer.get_train_dataloader())
    samples = [next(batches)]  # `get_batch_samples` gives none after the last step
    items = trainer._get_num_items_in_batch(samples, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(trainer.model, samples[0], items)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.training_step(trainer.model, samples[0], items)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- compiled layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_compiled_layers_compute_the_same(byte_tokenizer, tmp_path, lora):
    from tunesmith.train.options import SFTConfig

    if "compile_layers" not in SFTConfig.__dataclass_fields__:
        pytest.skip("SFTConfig has no compile_layers yet")
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer(
            build(), byte_tokenizer, token_rows(), tmp_path,
            peft_config=LoraConfig(**LORA) if lora else None, bf16=True, max_steps=4, learning_rate=1e-3,
            per_device_train_batch_size=4, compile_layers=compiled, **GPU,
        )  # fmt: skip
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-2)


@pytest.mark.parametrize("bf16", [True, False])
def test_twenty_steps_lower_the_loss(byte_tokenizer, tmp_path, bf16):
    options = {"bf16": bf16, "max_steps": 20, "num_train_epochs": 20, "learning_rate": 5e-3, **GPU}
    trainer = make_trainer(build(), byte_tokenizer, token_rows(), tmp_path, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
