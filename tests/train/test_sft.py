"""The invariances of the training step: however rows are laid out, the loss and the gradients are the same."""

import datasets
import pytest
import torch
from peft import LoraConfig
from transformers import set_seed

from tests.train.rows import (
    LENGTHS,
    assert_same,
    first_gradients,
    make_trainer,
    reference_gradients,
    token_rows,
)
from tunesmith.data.pack import pack
from tunesmith.errors import ConfigError, ModelError
from tunesmith.train.collate import FlatCollator, PaddedCollator
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

LAYOUTS = {
    "flat": {},
    "padded": {"padding_free": False},
    "packed": {"packing": True, "max_length": 32},
    "one by one": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(LENGTHS)},
    "token budget": {"tokens_per_batch": 30, "gradient_accumulation_steps": len(LENGTHS)},
    "checkpointed": {"gradient_checkpointing": True},
    "prefixes apart": {"share_prefix": False},
}
PREFIX = 5
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("prefix", [0, PREFIX])
def test_every_layout_equals_a_plain_loop(make_tiny_model, byte_tokenizer, tmp_path, layout, tied, weights, prefix):
    rows = token_rows(weights=weights, prefix=prefix)
    expected = reference_gradients(make_tiny_model(tie_word_embeddings=tied), rows)
    model = make_tiny_model(tie_word_embeddings=tied)
    trainer = make_trainer(model, byte_tokenizer, rows, tmp_path, **LAYOUTS[layout])
    assert_same(first_gradients(trainer), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_every_layout_equals_a_plain_loop_with_lora(make_tiny_model, byte_tokenizer, tmp_path, layout, extra):
    from peft import get_peft_model

    rows, config = token_rows(prefix=PREFIX), LoraConfig(**{**LORA.to_dict(), **extra})
    model = make_tiny_model()
    set_seed(7)
    expected = reference_gradients(get_peft_model(model, config), rows)
    options = {**LAYOUTS[layout], "peft_config": config, "seed": 7}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
    assert_same(first_gradients(trainer), expected)


@pytest.mark.parametrize("lengths", [(12,), LENGTHS])
def test_one_document_and_eight_give_the_plain_loss(make_tiny_model, byte_tokenizer, tmp_path, lengths):
    rows = token_rows(lengths)
    expected = reference_gradients(make_tiny_model(), rows)
    assert_same(first_gradients(make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path)), expected)


@pytest.mark.parametrize("window", [3, 6])
@pytest.mark.parametrize("layout", ["flat", "padded", "packed"])
def test_sliding_windows_are_exact(byte_tokenizer, tmp_path, layout, window):
    from transformers import MistralConfig, MistralForCausalLM, set_seed

    def build():
        set_seed(0)
        return MistralForCausalLM(
            MistralConfig(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=window,
                attn_implementation="sdpa",
            )
        )

    rows = token_rows(prefix=PREFIX)
    trainer = make_trainer(build(), byte_tokenizer, rows, tmp_path, **LAYOUTS[layout])
    assert trainer.support.layout == ("padded" if layout == "padded" else "documents")
    assert_same(first_gradients(trainer), reference_gradients(build(), rows))


def test_a_model_that_caps_its_logits_goes_through_its_own_head(byte_tokenizer, tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM, set_seed

    def build():
        set_seed(0)
        return Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=260,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                final_logit_softcapping=2.0,
                attn_logit_softcapping=1.0,
                sliding_window=5,
                query_pre_attn_scalar=8,
                attn_implementation="eager",
            )
        )

    rows = token_rows()
    trainer = make_trainer(build(), byte_tokenizer, rows, tmp_path)
    assert trainer.support.layout == "packed"  # soft-capped scores: transformers' own attention with a block mask
    assert not trainer.support.plain_head
    assert_same(first_gradients(trainer), reference_gradients(build(), rows))


def test_a_model_with_state_across_tokens_trains_on_padded_rows(byte_tokenizer, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM, set_seed

    def build():
        set_seed(0)
        config = MambaConfig(vocab_size=260, hidden_size=16, state_size=4, num_hidden_layers=2, expand=2)
        return MambaForCausalLM(config)

    rows = token_rows((6, 9, 4))
    trainer = make_trainer(build(), byte_tokenizer, rows, tmp_path)
    assert trainer.support.layout == "padded"
    assert_same(first_gradients(trainer), reference_gradients(build(), rows), tolerance=1e-4)


def test_a_model_that_attends_in_chunks_trains_on_padded_rows(byte_tokenizer, tmp_path):
    from transformers import Llama4ForCausalLM, Llama4TextConfig, set_seed

    def build():
        set_seed(0)
        return Llama4ForCausalLM(
            Llama4TextConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=32,
                intermediate_size_mlp=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                num_local_experts=2,
                attention_chunk_size=8,
                pad_token_id=258,
            )
        )

    trainer = make_trainer(build(), byte_tokenizer, token_rows(), tmp_path)
    assert trainer.support.layout == "padded"
    found, expected = first_gradients(trainer), reference_gradients(build(), token_rows())
    assert found[0] == pytest.approx(expected[0], abs=1e-5)


def test_changing_one_document_changes_no_other(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path)
    rows = [dict(row) for row in token_rows()]
    changed = [*rows[:3], {**rows[3], "input_ids": [7] * len(rows[3]["input_ids"])}, *rows[4:]]

    def hidden_states(batch):
        batch = {key: value for key, value in batch.items() if key in FORWARD_KEYS}
        with torch.no_grad(), trainer._attention({"document_lengths": ()}):
            return trainer.model.model(**batch, use_cache=False).last_hidden_state[0].split(LENGTHS)

    before, after = (hidden_states(FlatCollator()(batch)) for batch in (rows, changed))
    same = [torch.equal(one, other) for one, other in zip(before, after)]
    assert same == [True] * 3 + [False] + [True] * 4


FORWARD_KEYS = ("input_ids", "position_ids", "document_lengths", "cu_seq_lens_q", "cu_seq_lens_k")


def weights_after(model, tokenizer, rows, tmp_path, **options):
    trainer = make_trainer(model, tokenizer, rows, tmp_path, max_steps=3, **options)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("layout", ["flat", "packed", "token budget"])
def test_what_all_documents_begin_with_is_computed_once(make_tiny_model, byte_tokenizer, tmp_path, layout):
    rows, sizes = token_rows(prefix=PREFIX), []
    for options in ({}, {"share_prefix": False}):
        options = {**LAYOUTS[layout], **options} | ({"max_length": 44} if layout == "packed" else {})
        trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
        batches = list(trainer.get_train_dataloader())
        assert sum(batch["num_tokens"] for batch in batches) == sum(len(ids) for ids in rows["input_ids"])
        sizes.append([batch["input_ids"].shape[1] for batch in batches])
    saved = [apart - shared for shared, apart in zip(*sizes)]
    documents = [len(batch["document_lengths"]) for batch in batches]
    assert saved == [PREFIX * (count - 1) for count in documents]
    assert sum(documents) == len(rows)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"neftune_noise_alpha": 5.0}, "NEFTune"),
        ({"padding_free": False}, "flat"),
        ({"peft_config": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")}, "dropout"),
    ],
)
def test_prefixes_stay_apart_where_they_must(make_tiny_model, byte_tokenizer, tmp_path, options, why):
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(prefix=PREFIX), tmp_path, **options)
    assert not getattr(trainer.data_collator, "share_prefix", False)
    with pytest.raises(ConfigError, match=f"share_prefix: .*{why}"):
        make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, share_prefix=True, **options)


@pytest.mark.parametrize("batch", [(1, 8), (2, 4), (4, 2)])
def test_accumulated_equals_whole(make_tiny_model, byte_tokenizer, tmp_path, batch):
    rows, size = token_rows(LENGTHS * 3), ("per_device_train_batch_size", "gradient_accumulation_steps")

    def run(*sizes):  # AdamW divides by tiny second moments: rounding grows with the learning rate
        options = dict(zip(size, sizes), learning_rate=1e-3)
        return weights_after(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)

    whole, parts = run(8, 1), run(*batch)
    assert parts[0] == pytest.approx(whole[0], abs=1e-5)
    for name, value in whole[1].items():
        torch.testing.assert_close(parts[1][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", [{}, {"padding_free": False}, {"eval_packing": True, "max_length": 40}])
def test_evaluation_does_not_depend_on_the_batch_size(make_tiny_model, byte_tokenizer, tmp_path, layout):
    rows = token_rows(prefix=PREFIX)
    expected, _ = reference_gradients(make_tiny_model(), rows)
    for size in (1, 3, 8):
        options = {**layout, "per_device_eval_batch_size": size, "eval_dataset": rows}
        metrics = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options).evaluate()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["eval_perplexity"] == pytest.approx(torch.tensor(expected).exp().item(), rel=1e-5)


def test_mean_token_accuracy_counts_likeliest_tokens(make_tiny_model, byte_tokenizer, tmp_path):
    rows, model = token_rows(), make_tiny_model()
    hits = total = 0
    for row in rows:
        best = model(torch.tensor([row["input_ids"]])).logits[0, :-1].argmax(-1)
        targets = torch.tensor(row["labels"])[1:]
        hits += (best == targets).sum().item()
        total += (targets != -100).sum().item()
    metrics = make_trainer(model, byte_tokenizer, rows, tmp_path, eval_dataset=rows).evaluate()
    assert metrics["eval_mean_token_accuracy"] == pytest.approx(hits / total)


def test_a_collator_of_ones_own_is_used_as_it_is(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()

    def collate(features):
        batch = PaddedCollator(258)(features)
        return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}

    trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, data_collator=collate)
    assert_same(first_gradients(trainer), reference_gradients(make_tiny_model(), rows))


def test_the_tokenizer_and_the_model_config_stay_as_they_are(make_tiny_model, byte_tokenizer, tmp_path):
    model = make_tiny_model()
    config, length = model.config.to_dict(), len(byte_tokenizer)
    make_trainer(model, byte_tokenizer, token_rows(), tmp_path, max_steps=1).train()
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == "sdpa"
    assert len(byte_tokenizer) == length
    assert "forward" not in vars(model.lm_head)


def test_two_trainers_in_one_process_do_not_disturb_each_other(make_tiny_model, byte_tokenizer, tmp_path):
    rows = token_rows()
    alone = weights_after(make_tiny_model(), byte_tokenizer, rows, tmp_path, num_train_epochs=3)
    one = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, max_steps=3)
    make_trainer(make_tiny_model(hidden_size=64), byte_tokenizer, rows, tmp_path, max_steps=2).train()
    one.train()
    for name, value in alone[1].items():
        assert torch.equal(one.model.state_dict()[name], value), name


@pytest.mark.parametrize("bf16", [False, True])
def test_options_made_later_do_not_disturb_a_trainer(make_tiny_model, byte_tokenizer, tmp_path, bf16):
    """They empty the state that all accelerators of a program share."""
    alone = weights_after(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path)
    one = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=3)
    later = SFTConfig(output_dir=str(tmp_path / "later"), use_cpu=True, bf16=bf16)
    one.evaluate(token_rows())
    one.train()
    two = SFTTrainer(make_tiny_model(), later, train_dataset=token_rows(), processing_class=byte_tokenizer)
    assert two.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    for name, value in alone[1].items():
        assert torch.equal(one.model.state_dict()[name], value), name


def test_the_arguments_of_the_caller_stay_as_they_are(make_tiny_model, byte_tokenizer, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    trainer = SFTTrainer(make_tiny_model(), args, train_dataset=token_rows(), processing_class=byte_tokenizer)
    assert args.bf16 is None
    assert isinstance(trainer.args.bf16, bool)


def test_rows_are_rendered_tokenized_and_packed_by_the_trainer(make_tiny_model, byte_tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([{"instruction": "Say hi", "output": f"hi {n}"} for n in range(12)])
    trainer = make_trainer(
        make_tiny_model(), byte_tokenizer, rows, tmp_path, packing=True, max_length=256, max_steps=1
    )
    assert trainer.reports["train_dataset"].kept == 12
    assert 1 < len(trainer.train_dataset) < 12
    assert trainer.train().metrics["train_loss"] > 0


def test_packing_twice_is_packing_once(make_tiny_model, byte_tokenizer, tmp_path):
    packed = pack(token_rows(), 32)
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, packed, tmp_path, packing=True, max_length=32)
    assert trainer.train_dataset is packed


def test_half_precision_weights_are_trained_in_float32(make_tiny_model, byte_tokenizer, tmp_path):
    model = make_tiny_model().to(torch.bfloat16)
    trainer = make_trainer(model, byte_tokenizer, token_rows(), tmp_path)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert any("held in float32" in line for line in trainer.choices)


def test_precision_is_chosen_and_said(make_tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tunesmith.train.choose.bf16_is_faster", lambda device: True)
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, bf16=None, max_steps=1)
    assert trainer.args.bf16
    assert trainer.accelerator.mixed_precision == "bf16"
    assert any(line.startswith("precision: bfloat16") for line in trainer.choices)
    assert trainer.train().metrics["train_loss"] == pytest.approx(
        reference_gradients(make_tiny_model(), token_rows())[0], rel=2e-2
    )


def test_checkpointing_is_turned_on_where_activations_would_not_fit(
    make_tiny_model, byte_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr("tunesmith.model.main_memory.free_bytes", lambda: 1.0)
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path)
    assert trainer.args.gradient_checkpointing
    assert_same(first_gradients(trainer), reference_gradients(make_tiny_model(), token_rows()))


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 32}, {"tokens_per_batch": 30}])
def test_resumed_equals_uninterrupted(make_tiny_model, byte_tokenizer, tmp_path, options):
    shared = {"per_device_train_batch_size": 2, "train_sampling_strategy": "random", "num_train_epochs": 2, **options}
    whole = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path / "a", **shared)
    whole.train()
    saving = {**shared, "save_strategy": "steps", "save_steps": 1, "max_steps": whole.state.max_steps}
    first = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path / "b", **saving)
    first.train()
    step = whole.state.max_steps - 1
    again = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path / "c", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / f"checkpoint-{step}"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_epochs_differ_and_seeds_repeat(make_tiny_model, byte_tokenizer, tmp_path):
    options = {"train_sampling_strategy": "random", "per_device_train_batch_size": 1, "seed": 3}

    def orders():
        trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options)
        loader = trainer.get_train_dataloader()
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            yield [batch["input_ids"].shape[1] for batch in loader]

    first, second = orders()
    assert first != second
    assert sorted(first) == sorted(second) == sorted(LENGTHS)
    assert list(orders()) == [first, second]


def test_no_pickle_is_saved(make_tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path / "run", max_steps=1)
    trainer.save_model()
    assert {path.suffix for path in (tmp_path / "run").iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"model_init_kwargs": {"dtype": "float32"}}, ConfigError, "already instantiated"),
        ({"eval_dataset": [{"question": "?"}]}, Exception, "question"),
    ],
)
def test_wrong_arguments_are_named(make_tiny_model, byte_tokenizer, tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options)


def test_a_model_with_nothing_to_train_is_refused(make_tiny_model, byte_tokenizer, tmp_path):
    with pytest.raises(ModelError, match="no parameter of the model is trainable"):
        make_trainer(make_tiny_model().requires_grad_(False), byte_tokenizer, token_rows(), tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(make_tiny_model, byte_tokenizer, tmp_path):
    small = make_tiny_model(vocab_size=100, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    with pytest.raises(ModelError, match=r"259 tokens but the model only 100 embeddings"):
        make_trainer(small, byte_tokenizer, token_rows(), tmp_path)


def test_a_template_of_ones_own_is_used_and_the_callers_tokenizer_stays(make_tiny_model, byte_tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([{"instruction": "Say hi", "output": "hi"}] * 4)
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    before = byte_tokenizer.chat_template
    options = {"chat_template": template, "max_length": None}
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, **options)
    assert byte_tokenizer.decode(trainer.train_dataset[0]["input_ids"]).startswith("[user]Say hi")
    assert trainer.processing_class.chat_template == template
    assert byte_tokenizer.chat_template == before
    assert trainer.max_length == 2048  # what the model was built for


def test_the_seed_decides_an_adapters_first_weights(make_tiny_model, byte_tokenizer, tmp_path):
    def first_weights(seed):
        torch.manual_seed(torch.seed() % 2**31)
        config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        trainer = make_trainer(
            make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, seed=seed, peft_config=config
        )
        return next(value for name, value in trainer.model.named_parameters() if "lora_A" in name)

    assert torch.equal(first_weights(1), first_weights(1))
    assert not torch.equal(first_weights(1), first_weights(2))


def test_several_gpus_in_one_process_are_not_used_by_splitting_batches(make_tiny_model, monkeypatch, tmp_path):
    from tunesmith.train.choose import settled

    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    args._n_gpu = 4
    chosen, lines = settled(args, make_tiny_model(), None)
    assert (chosen.n_gpu, args.n_gpu) == (1, 4)
    assert "one of 4 GPUs" in lines[0]


@pytest.mark.parametrize(("strategy", "same"), [("sequential", True), ("random", False)])
def test_a_token_budget_keeps_the_order_where_it_is_asked_to(
    make_tiny_model, byte_tokenizer, tmp_path, strategy, same
):
    options = {"tokens_per_batch": 20, "train_sampling_strategy": strategy}
    loader = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, **options).get_train_dataloader()
    orders = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        orders.append([batch["document_lengths"] for batch in loader])
    assert (orders[0] == orders[1]) is same
    assert sorted(orders[0]) == sorted(orders[1])


def test_a_batch_without_labels_is_an_error(tiny_model, byte_tokenizer, tmp_path):
    collator = lambda rows: {"input_ids": torch.tensor([[1, 2, 3]] * len(rows))}  # noqa: E731
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, data_collator=collator)
    with pytest.raises(ConfigError, match="its batch has no labels, only input_ids"):
        trainer.train()
