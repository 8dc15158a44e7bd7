"""What scripts of TRL's users ran into: each test is a defect that was found by trying them."""

from dataclasses import dataclass

import datasets
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.train.rows import assert_same, first_gradients, make_trainer
from tunesmith.errors import ConfigError, DataError
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}</tool>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def trained_text(trainer, row=0) -> str:
    labels = trainer.train_dataset[row]["labels"]
    return trainer.processing_class.decode([label for label in labels if label != -100])


def tool_call(arguments, **turn) -> dict:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    said = {"role": "assistant", **turn, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "2+2?"}, said]}


@pytest.mark.parametrize("turn", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("as_table", [True, False])
def test_a_tool_call_without_content_is_trained(tiny_model, tmp_path, turn, as_table):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    rows = [tool_call({"x": 2}, **turn)]
    rows = datasets.Dataset.from_list(rows) if as_table else rows
    trainer = make_trainer(tiny_model, tokenizer, rows, tmp_path)
    assert trained_text(trainer) == '<tool>add {"x": 2}</tool><|im_end|>'


AS_JSON = "{{ c.function.arguments | tojson }}"
AS_IT_IS = "{{ c.function.arguments }}"
JOINED = "{{ 'json ' + c.function.arguments }}"
EITHER = "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
ITEMS = "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}"


@pytest.mark.parametrize("arguments", [{"x": "ü"}, '{"x": "ü"}'])
@pytest.mark.parametrize(
    ("way", "written"),
    [
        (AS_JSON, '{"x": "ü"}'),
        (AS_IT_IS, '{"x": "ü"}'),
        (JOINED, 'json {"x": "ü"}'),
        (EITHER, '{"x": "ü"}'),
        (ITEMS, "x=ü"),
    ],
)
def test_arguments_of_tool_calls_reach_a_template_as_it_takes_them(tiny_model, tmp_path, arguments, way, written):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE.replace(AS_JSON, way)
    trainer = make_trainer(tiny_model, tokenizer, [tool_call(arguments)], tmp_path)
    assert trained_text(trainer) == f"<tool>add {written}</tool><|im_end|>"


def test_arguments_that_are_no_json_stay_as_they_are(tiny_model, tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    trainer = make_trainer(tiny_model, tokenizer, [tool_call("{x: 2")], tmp_path)
    assert trained_text(trainer) == '<tool>add "{x: 2"</tool><|im_end|>'


CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(12)
]


def sizes_of_batches(trainer) -> list[int]:
    """Rows of each batch that the model is given, while it runs out of memory above 3."""
    seen = []

    def hook(module, args, kwargs):
        if not module.training:
            return
        seen.append(len(kwargs["document_lengths"]))
        if seen[-1] > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


@pytest.mark.parametrize("streamed", [False, True])
def test_a_batch_that_does_not_fit_is_made_smaller(tiny_model, byte_tokenizer, tmp_path, streamed):
    rows = datasets.Dataset.from_list(CHATS)
    rows = rows.to_iterable_dataset() if streamed else rows
    options = {"auto_find_batch_size": True, "per_device_train_batch_size": 8, "max_steps": 2}
    trainer = make_trainer(tiny_model, byte_tokenizer, rows, tmp_path, **options)
    seen = sizes_of_batches(trainer)
    trainer.train()
    assert seen == [8, 4, 2, 2, 2, 2, 2, 2], "halved; steps train on the same 8 and 4 rows"
    counted = [line["num_tokens"] for line in trainer.state.log_history if "loss" in line]
    assert counted[-1] == trainer.tokens_seen


def test_parts_of_a_batch_come_to_the_device_as_the_batch_did(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    """NEFTune reads them before the model's forward pass would bring them there."""
    rows, prepared = datasets.Dataset.from_list(CHATS), []
    trainer = make_trainer(tiny_model, byte_tokenizer, rows, tmp_path, neftune_noise_alpha=5.0, max_steps=1)
    prepare, of = trainer._prepare_inputs, trainer._noise.of
    monkeypatch.setattr(trainer, "_prepare_inputs", lambda inputs: prepared.append(prepare(inputs)) or prepared[-1])
    read = []
    monkeypatch.setattr(type(trainer._noise), "of", lambda noise, inputs: read.append(inputs) or of(inputs))
    trainer.rows_at_once = 4
    trainer.train()
    assert len(read) == 2
    assert all(any(inputs is one for one in prepared) for inputs in read)


def test_dropping_the_last_batch_may_not_drop_the_only_one(tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(tiny_model, byte_tokenizer, CHATS[:3], tmp_path, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match="dataloader_drop_last: 3 rows are fewer than the 8 of one batch"):
        trainer.train()


# Collators -----------------------------------------------------------------------------------------------------------


def test_the_default_collator_of_the_reference_given_by_hand_is_the_default(tiny_model, byte_tokenizer, tmp_path):
    collator = DataCollatorForLanguageModeling(byte_tokenizer, mlm=False)
    losses = [
        make_trainer(make_tiny_model(), byte_tokenizer, CHATS, tmp_path, data_collator=one, max_steps=1)
        .train()
        .training_loss
        for one in (collator, None)
    ]
    assert losses[0] == losses[1]


def test_masking_words_is_refused(tiny_model, tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.mask_token = tokenizer.pad_token
    collator = DataCollatorForLanguageModeling(tokenizer)
    with pytest.raises(ConfigError, match="data_collator: mlm=True masks words"):
        make_trainer(tiny_model, tokenizer, CHATS, tmp_path, data_collator=collator)


def test_a_subclass_of_that_collator_gets_rows_without_labels(tiny_model, byte_tokenizer, tmp_path):
    class Own(DataCollatorForLanguageModeling):
        def torch_call(self, examples):
            assert all("labels" not in example for example in examples)
            return super().torch_call(examples)

    collator = Own(byte_tokenizer, mlm=False)
    options = {"data_collator": collator, "max_steps": 1}
    assert make_trainer(tiny_model, byte_tokenizer, CHATS, tmp_path, **options).train().training_loss > 0


def test_a_collator_that_pads_labels_gets_those_of_texts_too(byte_tokenizer, tmp_path):
    rows = [{"text": "one"}, {"text": "one two three"}]
    losses = [
        make_trainer(make_tiny_model(), byte_tokenizer, rows, tmp_path, data_collator=one, max_steps=1)
        .train()
        .training_loss
        for one in (DataCollatorForSeq2Seq(byte_tokenizer), None)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda rows: rows, "expected a dict of tensors, got a list"),
        (lambda rows: {"input_ids": torch.ones(1, 3, dtype=torch.int64)}, "its batch has no labels, only input_ids"),
    ],
)
def test_a_batch_that_cannot_be_trained_is_the_collators(tiny_model, byte_tokenizer, tmp_path, batch, words):
    trainer = make_trainer(tiny_model, byte_tokenizer, CHATS, tmp_path, data_collator=batch, eval_dataset=CHATS)
    for run in (trainer.train, trainer.evaluate):
        with pytest.raises(ConfigError, match=f"data_collator: {words}"):
            run()


def test_packed_rows_for_a_collator_of_ones_own_are_warned_of(tiny_model, byte_tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="train_dataset: packed rows hold several documents"):
        make_trainer(tiny_model, byte_tokenizer, CHATS, tmp_path, packing=True, data_collator=lambda rows: rows)


# A loss of one's own -------------------------------------------------------------------------------------------------


def tenfold(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return 10 * cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class Tenfold(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = tenfold(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Seven(SFTTrainer):
    def prediction_step(self, *args, **kwargs):
        _, logits, labels = super().prediction_step(*args, **kwargs)
        return torch.tensor(7.0), logits, labels


def evaluating(cls, tokenizer, tmp_path, **options):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_eval_batch_size=5)
    kwargs = {"eval_dataset": CHATS, "processing_class": tokenizer, **options}
    return cls(make_tiny_model(), args, **kwargs)


@pytest.mark.parametrize("metrics", [None, lambda prediction: {}])
def test_evaluation_reports_the_loss_that_is_trained(byte_tokenizer, tmp_path, metrics):
    options = {"compute_metrics": metrics}
    plain = evaluating(SFTTrainer, byte_tokenizer, tmp_path, **options).evaluate()
    for cls, more in ((Tenfold, {}), (SFTTrainer, {"compute_loss_func": tenfold})):
        found = evaluating(cls, byte_tokenizer, tmp_path, **options, **more).evaluate()
        assert found["eval_loss"] == pytest.approx(10 * plain["eval_loss"], rel=1e-3)
    assert evaluating(Seven, byte_tokenizer, tmp_path, **options).evaluate()["eval_loss"] == 7


def test_a_loss_of_ones_own_gets_a_row_for_each_example(byte_tokenizer, tmp_path):
    trainer = evaluating(Tenfold, byte_tokenizer, tmp_path, train_dataset=CHATS)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape[0] == 8
    assert any("a loss of one's own" in line for line in trainer.choices)


# Arguments -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_seq_length": 5}, r"max_seq_length: is an option of SFTConfig: .*SFTConfig\(max_seq_length=5\)"),
        ({"train_datset": []}, r"train_datset: there is no such argument. Did you mean 'train_dataset'\?"),
        ({"compute_metrics": "accuracy"}, "compute_metrics: expected a function, got 'accuracy'"),
        ({"callbacks": TrainerCallback()}, "callbacks: expected a list"),
        ({"callbacks": [TrainerCallback, 5]}, "callbacks: expected TrainerCallbacks, got 5 among them"),
        ({"optimizers": None}, "optimizers: expected a pair"),
        ({"model": 5}, "model: expected a model, a folder or a Hub id, got int 5"),
        ({"model": torch.nn.Linear}, "model: expected a model, .* got the class"),
    ],
)
def test_wrong_arguments_say_what_was_meant(tiny_model, byte_tokenizer, tmp_path, options, words):
    given = {"model": tiny_model, "train_dataset": CHATS, "processing_class": byte_tokenizer, **options}
    with pytest.raises(ConfigError, match=words):
        SFTTrainer(args=SFTConfig(output_dir=str(tmp_path), use_cpu=True), **given)


def test_an_output_dir_that_is_a_file_is_refused_before_anything_is_trained(tiny_model, byte_tokenizer, tmp_path):
    (tmp_path / "out").write_text("precious")
    args = SFTConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ConfigError, match=r"output_dir: .*out is a file"):
        SFTTrainer(tiny_model, args, train_dataset=CHATS, processing_class=byte_tokenizer)


def test_only_a_folder_can_be_gone_on_from(tiny_model, byte_tokenizer, tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
    trainer = SFTTrainer(tiny_model, args, train_dataset=CHATS, processing_class=byte_tokenizer)
    with pytest.raises(ConfigError, match="resume_from_checkpoint: expected a checkpoint's folder or True, got 5"):
        trainer.train(resume_from_checkpoint=5)


def test_a_hub_that_does_not_take_the_model_is_said_before_training(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr("transformers.Trainer.init_hf_repo", refuse)
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, push_to_hub=True, hub_model_id="me/mine")
    with pytest.raises(ConfigError, match=r"push_to_hub: the Hub does not take me/mine: no network\. Log in"):
        SFTTrainer(tiny_model, args, train_dataset=CHATS, processing_class=byte_tokenizer)


def test_a_hook_of_the_reference_that_nothing_calls_is_an_error(tiny_model, byte_tokenizer, tmp_path):
    class Own(SFTTrainer):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    with pytest.raises(ConfigError, match=r"Own\._prepare_dataset overrides a hook of TRL that nothing calls"):
        Own(tiny_model, SFTConfig(output_dir=str(tmp_path)), train_dataset=CHATS, processing_class=byte_tokenizer)


def test_an_optimizer_of_other_weights_is_an_error(byte_tokenizer, tmp_path, tiny_model):
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="optimizers: the optimizer holds none of the weights that train"):
        SFTTrainer(
            tiny_model,
            SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=CHATS,
            processing_class=byte_tokenizer,
            optimizers=(optimizer, None),
            peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
        )


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("per_device_train_batch_size", 0, "expected int ≥ 1, got 0"),
        ("per_device_eval_batch_size", "8", "expected int ≥ 1, got '8'"),
        ("gradient_accumulation_steps", 0, "expected int ≥ 1, got 0"),
        ("load_best_model_at_end", "False", "expected True or False, got 'False'"),
        ("weight_decay", "little", "expected float, got 'little'"),
        ("seed", "x", "expected int, got 'x'"),
    ],
)
def test_options_of_transformers_are_checked_too(tmp_path, option, value, words):
    with pytest.raises(ConfigError, match=f"SFTConfig: {option}: {words}"):
        SFTConfig(output_dir=str(tmp_path), **{option: value})


def test_numbers_that_are_meant_are_taken(tmp_path):
    args = SFTConfig(output_dir=str(tmp_path), num_train_epochs="2", max_steps=10.0, weight_decay="1e-2")
    assert (args.num_train_epochs, args.max_steps, args.weight_decay) == (2.0, 10, 0.01)


def test_what_a_subclass_of_the_options_does_at_construction_is_done_once(tiny_model, byte_tokenizer, tmp_path):
    @dataclass
    class Own(SFTConfig):
        bonus: int = 3

        def __post_init__(self):
            self.bonus += 1
            super().__post_init__()

    args = Own(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    trainer = SFTTrainer(tiny_model, args, train_dataset=CHATS, processing_class=byte_tokenizer)
    assert trainer.args.bonus == args.bonus == 4


def test_an_evaluation_set_that_does_not_exist_is_named(tiny_model, byte_tokenizer, tmp_path):
    trainer = make_trainer(tiny_model, byte_tokenizer, CHATS, tmp_path, eval_dataset={"chats": CHATS})
    with pytest.raises(ConfigError, match=r"no evaluation set 'chat'. Did you mean 'chats'\?.* Known: chats"):
        trainer.evaluate("chat")


# Models --------------------------------------------------------------------------------------------------------------


def test_float16_on_a_cpu_is_an_error(tiny_model, byte_tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="fp16: nothing multiplies in float16 on a cpu"):
        make_trainer(tiny_model, byte_tokenizer, CHATS, tmp_path, fp16=True)


@pytest.mark.parametrize("peft", [None, ["lm_head"], ["embed_tokens", "lm_head"]])
def test_half_precision_models_that_train_in_part_do_without_autocast(tiny_model, byte_tokenizer, tmp_path, peft):
    model = tiny_model.to(torch.bfloat16)
    model.model.layers[0].requires_grad_(False)
    config = peft and LoraConfig(r=2, target_modules="all-linear", modules_to_save=peft, task_type="CAUSAL_LM")
    trainer = make_trainer(model, byte_tokenizer, CHATS, tmp_path, peft_config=config, max_steps=1)
    assert trainer.train().training_loss > 0
    assert any("frozen tensors held in float32 too" in line for line in trainer.choices)


def test_virtual_tokens_are_refused(tiny_model, byte_tokenizer, tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ConfigError, match="peft_config: PromptTuningConfig puts virtual tokens in front of each row"):
        make_trainer(tiny_model, byte_tokenizer, CHATS, tmp_path, peft_config=config)
    with pytest.raises(ConfigError, match="virtual tokens"):
        make_trainer(get_peft_model(tiny_model, config), byte_tokenizer, CHATS, tmp_path)


def test_a_module_that_is_no_model_of_transformers_trains(byte_tokenizer, tmp_path):
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Embedding(259, 8), torch.nn.Linear(8, 259))

        def forward(self, input_ids, attention_mask=None):
            return CausalLMOutput(logits=self.layers(input_ids))

    trainer = make_trainer(Own(), byte_tokenizer, CHATS, tmp_path, max_steps=2, eval_dataset=CHATS)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": "abc"}, "train_dataset: input_ids are string"),
        ({"input_ids": [1.5]}, "train_dataset: input_ids are list<item: double>"),
        (
            {"input_ids": [1, 259]},
            "train_dataset row 2: input_ids hold 259, but the model has embeddings for 0 to 258",
        ),
        ({"input_ids": [1, -100]}, "train_dataset row 2: input_ids hold -100"),
        ({"input_ids": None}, "train_dataset row 2: input_ids are null"),
    ],
)
def test_ids_that_the_model_does_not_know_are_named(tiny_model, byte_tokenizer, tmp_path, row, words):
    good = {"input_ids": [1, 2, 3]}
    rows = [row, row] if isinstance(row["input_ids"], str) else [good, row]
    with pytest.raises(DataError, match=words):
        make_trainer(tiny_model, byte_tokenizer, datasets.Dataset.from_list(rows), tmp_path)


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, list])
def test_rows_of_which_nothing_is_trained_stop_the_run(tiny_model, byte_tokenizer, tmp_path, kind):
    rows = kind([{"input_ids": [1, 2, 3], "labels": [-100] * 3}] * 2)
    with pytest.raises(DataError, match="train_dataset: nothing is trained: 0 of 6 tokens"):
        make_trainer(tiny_model, byte_tokenizer, rows, tmp_path)


def test_rows_that_nobody_prepared_say_what_they_lack(tiny_model, byte_tokenizer, tmp_path):
    rows = datasets.Dataset.from_list([{"labels": [1, 2, 3]}])
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_steps": 1}
    with pytest.raises(DataError, match="a row has no input_ids, only labels"):
        make_trainer(tiny_model, byte_tokenizer, rows, tmp_path, **options).train()


def test_rows_of_ids_that_nobody_prepared_are_trained_whole(make_tiny_model, byte_tokenizer, tmp_path):
    ids = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}]
    rows = [
        datasets.Dataset.from_list(ids),
        datasets.Dataset.from_list([row | {"labels": row["input_ids"]} for row in ids]),
    ]
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    losses = [
        first_gradients(make_trainer(make_tiny_model(), byte_tokenizer, data, tmp_path, **options))[0] for data in rows
    ]
    assert losses[0] == losses[1]


class MeanLoss(SFTTrainer):
    """A loss as older scripts have it: the mean of a micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = cross_entropy(outputs.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class FlaggedLoss(MeanLoss):
    """The remedy that transformers documents."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


@pytest.mark.parametrize("kind", [MeanLoss, FlaggedLoss])
def test_a_mean_of_ones_own_is_no_larger_for_being_accumulated(make_tiny_model, byte_tokenizer, tmp_path, kind):
    rows = datasets.Dataset.from_list([{"input_ids": [65 + i, 66, 67], "labels": [65 + i, 66, 67]} for i in range(4)])
    found = []
    for size in (4, 2):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_grad_norm=0.0, disable_tqdm=True, **options)
        found.append(
            first_gradients(kind(make_tiny_model(), args, train_dataset=rows, processing_class=byte_tokenizer))
        )
    assert_same(*found)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rows": {"text": "abc"}, "assistant_only_loss": True}, "assistant_only_loss=True trains answers alone, and"),
        ({"rows": {"text": "abc"}, "train_on": "last_turn"}, "train_on='last_turn' trains answers alone, and the row"),
        ({"rows": {"input_ids": [1, 2]}, "assistant_only_loss": True}, "the token rows have neither labels nor masks"),
        (
            {"rows": {"q": "a"}, "formatting_func": lambda row: row["q"], "completion_only_loss": True},
            "formatting_func returns plain text, which has none",
        ),
    ],
)
@pytest.mark.parametrize("as_stream", [False, True])
def test_answers_alone_are_not_asked_of_rows_without(tiny_model, byte_tokenizer, tmp_path, given, words, as_stream):
    given = dict(given)
    rows, function = datasets.Dataset.from_list([given.pop("rows")] * 2), given.pop("formatting_func", None)
    rows = rows.to_iterable_dataset() if as_stream else rows
    args = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, max_steps=1, save_strategy="no", **given)
    with pytest.raises(ConfigError, match=words.replace("token rows have", "(token rows have|row has)")):
        SFTTrainer(
            tiny_model, args, train_dataset=rows, processing_class=byte_tokenizer, formatting_func=function
        ).train()


@pytest.mark.parametrize(
    ("row", "field", "trained"),
    [
        ({"prompt": "p", "completion": "c"}, "prompt", "c<|im_end|>"),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
            "messages",
            "a<|im_end|>",
        ),
        ({"instruction": "i", "output": "o"}, "instruction", "i<|im_end|>"),
        ({"prompt": "p", "completion": "c", "story": "s"}, "story", "s<|im_end|>"),
    ],
)
def test_a_text_column_that_is_part_of_a_format_is_read_as_that(
    tiny_model, byte_tokenizer, tmp_path, row, field, trained
):
    trainer = make_trainer(tiny_model, byte_tokenizer, [row], tmp_path, dataset_text_field=field)
    assert trained_text(trainer) == trained


def test_a_column_text_beside_another_format_is_not_left_in_silence(tiny_model, byte_tokenizer, tmp_path):
    rows = [{"instruction": "i", "output": "o", "text": "whole"}]
    with pytest.warns(
        UserWarning, match="train_dataset row 1: the rows are read as alpaca, and their column text is not"
    ):
        trainer = make_trainer(tiny_model, byte_tokenizer, rows, tmp_path)
    assert trained_text(trainer) == "o<|im_end|>"
    trainer = make_trainer(tiny_model, byte_tokenizer, rows, tmp_path, dataset_kwargs={"format": "text"})
    assert trained_text(trainer) == "whole<|im_end|>"
