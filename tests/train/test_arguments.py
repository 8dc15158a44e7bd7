"""What the constructor takes: the names and order of TRL 0.13, models as objects, names and makers, callables."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainerCallback

from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.train.rows import make_trainer, token_rows
from tunesmith.errors import ConfigError
from tunesmith.train import processing
from tunesmith.train.options import SFTConfig
from tunesmith.train.sft import SFTTrainer

ORDER = (
    "model args data_collator train_dataset eval_dataset processing_class model_init compute_metrics callbacks "
    "optimizers preprocess_logits_for_metrics peft_config formatting_func"
)


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "tiny"
    make_tiny_model().save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    return str(folder)


def config(tmp_path, **options):
    return SFTConfig(
        output_dir=str(tmp_path / "out"), bf16=False, save_strategy="no", disable_tqdm=True, max_steps=1, **options
    )


def trained(trainer) -> float:
    return trainer.train().training_loss


# trainer: A1
def test_arguments_have_the_names_and_order_of_the_reference():
    names = list(inspect.signature(SFTTrainer.__init__).parameters)[1:]
    assert names[: len(ORDER.split())] == ORDER.split()
    assert issubclass(SFTTrainer, Trainer)


# trainer: A1 A2
def test_a_models_name_can_stand_first(model_folder, tmp_path):
    trainer = SFTTrainer(model_folder, train_dataset=token_rows(), args=config(tmp_path))
    assert trained(trainer) > 0
    assert trainer.processing_class.get_vocab() == make_byte_tokenizer().get_vocab()


def test_a_models_folder_can_be_a_path(model_folder, tmp_path):
    trainer = SFTTrainer(Path(model_folder), train_dataset=token_rows(), args=config(tmp_path))
    assert trainer.model.config._name_or_path == str(model_folder)


# trainer: A3
def test_without_args_the_folder_is_tmp_trainer(tmp_path, monkeypatch, tiny_model, byte_tokenizer):
    monkeypatch.chdir(tmp_path)
    trainer = SFTTrainer(tiny_model, train_dataset=token_rows(), processing_class=byte_tokenizer)
    assert trainer.args.output_dir == "tmp_trainer"
    assert isinstance(trainer.args, SFTConfig)


# trainer: A6
def test_the_models_own_tokenizer_pads_with_its_stop_token_where_it_has_no_other(model_folder, tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model_folder)
    trainer = SFTTrainer(model_folder, config(tmp_path), train_dataset=token_rows())
    assert trainer.processing_class.pad_token == trainer.processing_class.eos_token


# trainer: A6
def test_a_tokenizer_that_pads_on_the_left_is_said(tmp_path, tiny_model):
    tokenizer = make_byte_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = "left", None
    with pytest.warns(UserWarning, match="padding_side is 'left'"):
        trainer = SFTTrainer(tiny_model, config(tmp_path), train_dataset=token_rows(), processing_class=tokenizer)
    assert trainer.processing_class is tokenizer
    assert tokenizer.pad_token is None


# trainer: A6 A12
def test_the_tokenizer_is_saved_in_every_checkpoint(tmp_path, tiny_model, byte_tokenizer):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, **options).train()
    for step in (1, 2):
        names = {path.name for path in (tmp_path / f"checkpoint-{step}").iterdir()}
        assert {"tokenizer.json", "chat_template.jinja", "model.safetensors", "trainer_state.json"} <= names


# trainer: A1
def test_tokenizer_is_the_older_name_of_processing_class(tmp_path, tiny_model, byte_tokenizer):
    with pytest.warns(FutureWarning, match="processing_class"):
        trainer = SFTTrainer(tiny_model, config(tmp_path), train_dataset=token_rows(), tokenizer=byte_tokenizer)
    assert trainer.processing_class is byte_tokenizer
    with pytest.raises(ValueError, match="Give processing_class only"):
        SFTTrainer(tiny_model, config(tmp_path), processing_class=byte_tokenizer, tokenizer=byte_tokenizer)


# trainer: A7
def test_model_init_makes_a_new_model_for_every_training(tmp_path, byte_tokenizer):
    made = []

    def build():
        made.append(make_tiny_model())
        return made[-1]

    trainer = SFTTrainer(
        args=config(tmp_path), model_init=build, train_dataset=token_rows(), processing_class=byte_tokenizer
    )
    assert trained(trainer) == trained(trainer)
    assert len(made) == 3
    assert trainer.model is made[-1]


# trainer: A7
def test_model_init_is_adapted_each_time(tmp_path, byte_tokenizer):
    from peft import LoraConfig, PeftModel

    trainer = SFTTrainer(
        args=config(tmp_path),
        model_init=lambda: make_tiny_model(),
        train_dataset=token_rows(),
        processing_class=byte_tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)


# trainer: A2 A7
@pytest.mark.parametrize(("model", "maker"), [(None, None), ("a model", make_tiny_model)])
def test_exactly_one_model_is_asked_for(tmp_path, model, maker):
    with pytest.raises(ConfigError, match=r"model is missing|but not both"):
        SFTTrainer(model, config(tmp_path), model_init=maker)


# trainer: B7 K4
def test_model_init_kwargs_beside_a_model_object_are_an_error(tmp_path, tiny_model):
    with pytest.raises(
        ValueError, match=r"but your model is already instantiated. Give torch_dtype to from_pretrained"
    ):
        SFTTrainer(tiny_model, config(tmp_path, model_init_kwargs={"torch_dtype": "bfloat16"}))


# trainer: H1 B7
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16, "float32"])
def test_model_init_kwargs_decide_the_type_of_the_weights(model_folder, tmp_path, dtype):
    args = config(tmp_path, model_init_kwargs={"torch_dtype": dtype})
    trainer = SFTTrainer(model_folder, args, train_dataset=token_rows())
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {expected}


# trainer: A9
def test_callbacks_and_optimizers_are_those_given(tmp_path, tiny_model, byte_tokenizer):
    steps = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    before = [parameter.clone() for parameter in tiny_model.parameters()]
    trainer = SFTTrainer(
        tiny_model,
        config(tmp_path),
        train_dataset=token_rows(),
        processing_class=byte_tokenizer,
        callbacks=[Count()],
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    assert steps == [1]
    assert all(torch.equal(one, other) for one, other in zip(before, tiny_model.parameters()))


# trainer: A9
def test_an_optimizer_class_is_used(tmp_path, tiny_model, byte_tokenizer):
    trainer = SFTTrainer(
        tiny_model,
        config(tmp_path),
        train_dataset=token_rows(),
        processing_class=byte_tokenizer,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}),
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


# trainer: A1
def test_a_loss_of_ones_own_takes_the_place_of_ours(tmp_path, tiny_model, byte_tokenizer):
    def loss(outputs, labels, num_items_in_batch=None):
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
        total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return 2 * total / num_items_in_batch

    ours = trained(make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=1))
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, max_steps=1)
    trainer.compute_loss_func = loss
    assert trained(trainer) == pytest.approx(2 * ours, rel=1e-5)


# trainer: A12
def test_the_log_has_the_losses_of_training_and_evaluation(tmp_path, tiny_model, byte_tokenizer):
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2, "eval_dataset": token_rows()}
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, **options)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    assert sum("eval_loss" in line for line in trainer.state.log_history) == 2


# trainer: A12
def test_a_checkpoint_of_an_adapter_holds_no_base_weights(tmp_path, tiny_model, byte_tokenizer):
    from peft import LoraConfig

    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "peft_config": peft_config}
    make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, **options).train()
    names = {path.name for path in (tmp_path / "checkpoint-1").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    assert "model.safetensors" not in names


# trainer: A12
def test_the_newest_checkpoint_is_resumed_from(tmp_path, byte_tokenizer):
    options = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=2, **options).train()
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=3, **options)
    trainer.train(resume_from_checkpoint=True)
    assert [line["step"] for line in trainer.state.log_history if "loss" in line] == [1, 2, 3]


def test_tokens_trained_on_are_counted_through_a_resume(tmp_path, byte_tokenizer):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=2, **options).train()
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert [line["num_tokens"] for line in trainer.state.log_history if "loss" in line] == [33, 74, 107, 148]


def test_a_resumed_run_reports_the_loss_of_all_steps_and_the_speed_of_its_own(tmp_path, byte_tokenizer):
    options = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
    first = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=3, **options).train()
    trainer = make_trainer(make_tiny_model(), byte_tokenizer, token_rows(), tmp_path, max_steps=4, **options)
    output = trainer.train(resume_from_checkpoint=True)
    history, metrics = trainer.state.log_history, output.metrics
    assert output.training_loss == metrics["train_loss"] == history[-1]["train_loss"]
    whole = 3 * first.training_loss + history[-2]["loss"]
    assert output.training_loss == pytest.approx(whole / 4, abs=1e-6)
    assert metrics["train_steps_per_second"] * metrics["train_runtime"] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(("option", "token"), [("eos_token", "<|im_end|>"), ("pad_token", "<|im_start|>")])
def test_special_tokens_are_set_on_a_copy_of_the_tokenizer(tmp_path, tiny_model, byte_tokenizer, option, token):
    before = getattr(byte_tokenizer, option)
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, **{option: token})
    assert getattr(trainer.processing_class, option) == token
    assert getattr(byte_tokenizer, option) == before


def test_a_special_token_that_does_not_exist_is_an_error(tmp_path, tiny_model, byte_tokenizer):
    with pytest.raises(ConfigError, match=r"eos_token: the tokenizer has no token '<\|im_end>'. Did you mean"):
        make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, eos_token="<|im_end>")


# trainer: B4
@pytest.mark.parametrize(
    ("limit", "asked", "found"), [(512, {}, 512), (4096, {}, 1024), (512, {"max_length": 700}, 700)]
)
def test_the_default_length_is_the_tokenizers_or_1024(tmp_path, tiny_model, limit, asked, found):
    tokenizer = make_byte_tokenizer()
    tokenizer.model_max_length = limit
    trainer = make_trainer(tiny_model, tokenizer, token_rows(), tmp_path, **asked)
    assert trainer.max_length == trainer.args.max_seq_length == found


def test_padding_with_the_stop_token_is_not_written_into_the_model(model_folder, tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(model_folder)
    model = make_tiny_model(pad_token_id=None, eos_token_id=5)
    model.save_pretrained(model_folder)
    trainer = SFTTrainer(model_folder, config(tmp_path), train_dataset=token_rows())
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    stops = saved["eos_token_id"] if isinstance(saved["eos_token_id"], list) else [saved["eos_token_id"]]
    assert tokenizer.eos_token_id in stops  # the tokenizer's stop token stops
    assert saved.get("pad_token_id") is None
    assert trainer.model.config.pad_token_id is None


def test_a_bos_that_only_the_model_names_stays(tmp_path, byte_tokenizer):
    tokenizer = make_byte_tokenizer()
    tokenizer.bos_token = None
    model = make_tiny_model(bos_token_id=7)
    make_trainer(model, tokenizer, token_rows(), tmp_path, max_steps=1).train()
    assert model.config.bos_token_id == model.generation_config.bos_token_id == 7


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_template_can_be_that_of_another_tokenizer(tmp_path, tiny_model, byte_tokenizer, named):
    other = make_byte_tokenizer("llama3")
    other.save_pretrained(tmp_path / "other")
    path = tmp_path / "other" / ("chat_template.jinja" if named == "file" else "")
    trainer = make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, chat_template_path=str(path))
    assert trainer.processing_class.chat_template == other.chat_template
    assert byte_tokenizer.chat_template != other.chat_template


def test_a_tokenizer_without_a_template_has_none_to_give(tmp_path, tiny_model, byte_tokenizer):
    other = make_byte_tokenizer()
    other.chat_template = None
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="has no chat template"):
        make_trainer(tiny_model, byte_tokenizer, token_rows(), tmp_path, chat_template_path=str(tmp_path / "other"))


def test_the_tokenizer_is_of_the_models_revision(model_folder, tmp_path, monkeypatch):
    seen = {}
    original = processing.load_tokenizer
    monkeypatch.setattr(processing, "load_tokenizer", lambda name, **given: seen.update(given) or original(name))
    SFTTrainer(model_folder, config(tmp_path, model_init_kwargs={"revision": "v1"}), train_dataset=token_rows())
    assert seen == {"revision": "v1"}


# trainer: K3
@pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
def test_quantizing_is_no_argument_of_the_trainer(tiny_model, name):
    with pytest.raises(ConfigError, match=rf"Set model_init_kwargs={{'{name}': True}}"):
        SFTTrainer(tiny_model, **{name: True})


def test_tensorboards_folder_is_the_one_that_was_named(tmp_path, tiny_model, byte_tokenizer):
    class TensorBoardCallback(TrainerCallback):  # the package is not needed to see it told
        logging_dir = None

    callback = TensorBoardCallback()
    with pytest.warns(UserWarning, match="only TensorBoard"):
        args = config(tmp_path, logging_dir="boards")
    with pytest.warns(UserWarning, match="only TensorBoard"):
        SFTTrainer(tiny_model, args, processing_class=byte_tokenizer, callbacks=[callback])
    assert callback.logging_dir == "boards"
