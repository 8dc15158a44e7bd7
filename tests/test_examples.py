"""Every file of `examples/` runs, with tiny local models and rows in place of what it names on the Hub."""

import ast
import importlib.util
import math
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

from tests import tiny, unsloth_shape, vision
from tunesmith import SFTConfig, SFTTrainer

EXAMPLES = Path(__file__).parent.parent / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))
GPU = torch.cuda.is_available()

# Hub model → tiny model, built below
MODELS = {
    "facebook/opt-350m": "plain",
    "EleutherAI/gpt-neo-125m": "plain",
    "unsloth/mistral-7b": "plain",
    "Qwen/Qwen2.5-0.5B": "chat",
    "meta-llama/Llama-2-7b-hf": "llama2",
    "llava-hf/llava-1.5-7b-hf": "vision",
}

CHATS = [
    {"messages": [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": f"{2 * n}."}]}
    for n in range(8)
]
QUESTIONS = [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(8)]
# Hub dataset → rows
ROWS = {
    "stanfordnlp/imdb": [{"text": "A good film. " * (1 + n), "label": n % 2} for n in range(8)],
    "lucasmccabe-lmi/CodeAlpaca-20k": [{"instruction": f"Add {n}.", "output": f"x += {n}"} for n in range(8)],
    "timdettmers/openassistant-guanaco": [
        {"text": f"### Human: Hi {n}### Assistant: Hello.### Human: Bye### Assistant: See you."} for n in range(8)
    ],
    "philschmid/dolly-15k-oai-style": CHATS,
    "trl-lib/Capybara": CHATS,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders of the tiny models, as `from_pretrained` reads them."""
    root = tmp_path_factory.mktemp("models")
    plain, llama2 = tiny.make_byte_tokenizer(), tiny.make_sentencepiece_like_tokenizer()
    plain.chat_template = None
    pairs = {
        "plain": (tiny.make_tiny_model(), plain),
        "chat": (tiny.make_tiny_model(), tiny.make_byte_tokenizer()),
        "llama2": (tiny.make_tiny_model(vocab_size=len(llama2)), llama2),
        "vision": (vision.make_vision_model(), vision.make_processor()),
    }
    for name, (model, processing) in pairs.items():
        model.save_pretrained(root / name)
        processing.save_pretrained(root / name)
    return {name: root / name for name in pairs}


@pytest.fixture
def example(models, tmp_path, monkeypatch):
    """`example("quickstart")` runs the file in an empty folder, and returns its names."""
    monkeypatch.chdir(tmp_path)
    real = datasets.load_dataset

    def load_dataset(name, split, data_files=None, streaming=False):
        if name == "json":
            return real(name, data_files=data_files, split=split, cache_dir=str(tmp_path / "cache"))
        rows = vision.rows() if "llava" in name else ROWS[name]
        found = datasets.Dataset.from_list(rows[:4] if split == "test" else rows)
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    def run(name: str) -> dict:
        path = EXAMPLES / f"{name}.py"
        source = path.read_text(encoding="utf-8").replace('"/tmp"', '"out"')
        for hub, local in MODELS.items():
            source = source.replace(f'"{hub}"', repr(str(models[local])))
        names = {"__name__": "__main__", "__file__": str(path)}
        exec(compile(source, str(path), "exec"), names)
        return names

    return run


def write_jsonl(rows: list[dict]) -> None:
    path = Path("path/to/dataset.jsonl")
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_json(path)


def losses(trainer) -> list[float]:
    """The loss of every step; all of them are numbers, and there is at least one."""
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert found
    assert all(math.isfinite(loss) for loss in found)
    assert "train_loss" in trainer.state.log_history[-1]
    return found


def assert_learned(trainer, start: Path | None = None, steps: int | None = None) -> None:
    """Steps were taken, with losses near that of an untrained model, and weights differ from those at the start."""
    found = losses(trainer)
    assert abs(found[0] - math.log(260)) < 1, "the tiny model begins at chance"
    assert steps is None or trainer.state.global_step == steps
    if start is not None:
        before = load_file(start / "model.safetensors")
        now = {name: value.detach().cpu().float() for name, value in trainer.model.named_parameters()}
        assert now.keys() <= before.keys() | {"lm_head.weight"}
        assert any(not torch.equal(now[name], before[name].float()) for name in now)


def labelled(trainer, row: int = 0) -> str:
    """The trained text of one row."""
    labels = trainer.train_dataset[row]["labels"]
    return trainer.processing_class.decode([label for label in labels if label != -100])


# ---------------------------------------------------------------------------------------------------- the folder


def test_the_examples_are_found():
    assert len(FILES) > 25


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_begins_with_what_it_shows_and_is_run_below(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "tunesmith" in modules
    assert not modules & {"trl", "argparse"}


# ---------------------------------------------------------------------------------------------------- quickstart


# trainer: C1 A14
def test_quickstart(example, models):
    trainer = example("quickstart")["trainer"]
    assert {"trl", "sft"} <= set(trainer.model.model_tags)
    assert_learned(trainer, models["plain"], steps=3)
    assert trainer.args.max_length == 512
    assert (Path("out") / "checkpoint-3" / "model.safetensors").is_file()


# trainer: C1
def test_quickstart_cuts_texts_at_512_tokens(example, monkeypatch):
    monkeypatch.setitem(ROWS, "stanfordnlp/imdb", [{"text": "abcdefgh" * 100, "label": 0}])
    trainer = example("quickstart")["trainer"]
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [512]


# trainer: C2 C3
def test_model_object(example, models):
    names = example("model_object")
    assert names["trainer"].model is names["model"]
    assert_learned(names["trainer"], models["plain"], steps=3)
    assert (names["training_args"].num_train_epochs, names["training_args"].learning_rate) == (3, 2e-5)


# ---------------------------------------------------------------------------------------------------- completions


# trainer: D10 D2
def test_completion_only(example, models):
    trainer = example("completion_only")["trainer"]
    assert_learned(trainer, models["plain"])
    for row in range(2):
        text = labelled(trainer, row)
        assert "x += " in text
        assert "Question" not in text
        assert "Answer" not in text


# trainer: D10 D3
def test_completion_only_chat(example, models):
    trainer = example("completion_only_chat")["trainer"]
    assert_learned(trainer, models["plain"])
    assert labelled(trainer).removesuffix("<|im_end|>") == " Hello. See you."


# trainer: D4 D5
def test_response_template_ids(example, capsys):
    names = example("response_template_ids")
    tokenizer, collator = names["tokenizer"], names["data_collator"]
    assert names["response_template_ids"] != tokenizer.encode(names["response_template"], add_special_tokens=False)
    labels = collator([{"input_ids": tokenizer.encode(names["prompt"])}])["labels"][0]
    assert tokenizer.decode(labels[labels != -100]).strip() == "Hi, how can I help you?"
    assert len(capsys.readouterr().out.splitlines()) == 2


# ---------------------------------------------------------------------------------------------------- formats


# trainer: E1
def test_chat_format(example, models):
    names = example("chat_format")
    trainer, tokenizer = names["trainer"], names["tokenizer"]
    losses(trainer)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) != [tokenizer.unk_token_id] * 2
    assert names["model"].get_input_embeddings().weight.shape[0] >= len(tokenizer)
    assert (Path("out") / "checkpoint-3" / "chat_template.jinja").is_file()


# trainer: F1 F4
def test_conversations(example, models):
    write_jsonl(CHATS)
    trainer = example("conversations")["trainer"]
    assert_learned(trainer, models["chat"], steps=3)
    assert len(trainer.train_dataset) < len(CHATS)
    assert labelled(trainer).count("<|im_end|>") == len(CHATS)


# trainer: F2 F4
def test_instructions(example, models):
    write_jsonl([{"prompt": f"Count to {n}.", "completion": f"{n}!"} for n in range(8)])
    trainer = example("instructions")["trainer"]
    assert_learned(trainer, models["chat"], steps=3)
    assert "Count" not in labelled(trainer)
    assert "7!<|im_end|>" in labelled(trainer)
    assert "assistant\n7!" in trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])


# trainer: F5 F7
def test_formatting_func(example, models):
    write_jsonl(QUESTIONS)
    trainer = example("formatting_func")["trainer"]
    assert_learned(trainer, models["plain"])
    first = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert "### Instruction\nWhat is 0 + 0?\n\n### Response:\nIt is 0." in first
    assert len(trainer.train_dataset) == len(QUESTIONS)


# ---------------------------------------------------------------------------------------------------- packing


# trainer: G1
def test_packing(example, models):
    trainer = example("packing")["trainer"]
    assert_learned(trainer, models["plain"])
    assert len(trainer.train_dataset) < 8
    assert trainer.args.output_dir == "tmp_trainer"


# trainer: G2
def test_packing_without_eval(example, models):
    trainer = example("packing_without_eval")["trainer"]
    assert_learned(trainer, models["plain"])
    assert len(trainer.train_dataset) < 8
    assert len(trainer.eval_dataset) == 4
    assert any("eval_loss" in entry for entry in trainer.state.log_history)


# trainer: G13 F6
def test_packing_formatting_func(example, models):
    write_jsonl(QUESTIONS)
    trainer = example("packing_formatting_func")["trainer"]
    assert_learned(trainer, models["plain"])
    packed = trainer.processing_class.decode(trainer.train_dataset[0]["input_ids"])
    assert packed.count("### Question: What is") == len(QUESTIONS)
    assert "### Question: What is 3 + 3?\n ### Answer: It is 6." in packed


# trainer: G5
def test_constant_length_dataset(example, models):
    names = example("constant_length_dataset")
    assert_learned(names["trainer"], models["plain"], steps=2)
    row = next(iter(names["train_dataset"]))
    assert row["input_ids"].shape == row["labels"].shape == (256,)


# trainer: M1
def test_streaming(example, models):
    names = example("streaming")
    assert_learned(names["trainer"], models["plain"], steps=2)
    assert_learned(names["packed_trainer"], models["plain"], steps=2)
    assert not hasattr(names["trainer"].train_dataset, "__len__")


# trainer: M2
def test_pretokenized(example, models):
    names = example("pretokenized")
    assert_learned(names["trainer"], models["plain"])
    assert names["trainer"].train_dataset["input_ids"] == names["dataset"]["input_ids"]


# ---------------------------------------------------------------------------------------------------- the model


# trainer: H1
def test_model_init_kwargs(example, models):
    trainer = example("model_init_kwargs")["trainer"]
    assert_learned(trainer)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.bfloat16}


# trainer: H2 A14
def test_lora(example):
    trainer = example("lora")["trainer"]
    assert {"trl", "sft"} <= set(trainer.model.model_tags)
    assert_learned(trainer)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert {name.split(".")[-4] for name in trained if "modules_to_save" in name} == {"lm_head", "embed_tokens"}
    folder = Path("Qwen2.5-0.5B-SFT")
    assert (folder / "adapter_model.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()


# trainer: H4
def test_lora_continue(example):
    example("lora")
    trainer = example("lora_continue")["trainer"]
    assert_learned(trainer)
    before, after = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in ("Qwen2.5-0.5B-SFT", "Qwen2.5-0.5B-SFT-2")
    )
    assert before.keys() == after.keys()  # not wrapped a second time
    assert any(not torch.equal(before[name], after[name]) for name in before)


# trainer: H5
def test_lora_8bit(example):
    pytest.importorskip("bitsandbytes")
    trainer = example("lora_8bit")["trainer"]
    assert_learned(trainer)
    assert trainer.model.base_model.model.is_loaded_in_8bit
    frozen = {parameter.dtype for parameter in trainer.model.parameters() if not parameter.requires_grad}
    assert torch.int8 in frozen


# trainer: H7
def test_flash_attention_1(example):
    trainer = example("flash_attention_1")["trainer"]
    assert_learned(trainer)
    assert len(trainer.train_dataset) < 8


# trainer: H8
@pytest.mark.gpu
@pytest.mark.skipif(not GPU or importlib.util.find_spec("flash_attn") is None, reason="needs a GPU and flash-attn")
def test_flash_attention_2(example):
    assert_learned(example("flash_attention_2")["trainer"])


# trainer: H8
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is there")
def test_flash_attention_2_says_what_is_missing(example):
    pytest.importorskip("bitsandbytes")
    with pytest.raises((ImportError, ValueError), match=r"[Ff]lash"):
        example("flash_attention_2")


# trainer: I5
def test_model_config(example, models):
    names = example("model_config")
    assert_learned(names["trainer"], models["plain"])
    assert names["quantization_config"] is None
    assert names["trainer"].model is names["model"]


# trainer: I1 I3
def test_command_line(example, models, monkeypatch):
    flags = ["--model_name_or_path", str(models["plain"]), "--use_peft", "--lora_target_modules", "all-linear"]
    monkeypatch.setattr(sys, "argv", ["command_line.py", *flags, "--output_dir", "flags", "--max_seq_length", "64"])
    trainer = example("command_line")["trainer"]
    assert_learned(trainer)
    assert trainer.args.max_length == 64
    assert Path("flags/checkpoint-3/adapter_model.safetensors").is_file()


# trainer: J1
def test_neftune(example, models):
    trainer = example("neftune")["trainer"]
    assert_learned(trainer, models["plain"])
    embeddings = trainer.model.train().get_input_embeddings()
    ids = torch.tensor([[1, 2, 3]], device=trainer.args.device)
    assert torch.equal(embeddings(ids), embeddings(ids))
    assert not embeddings._forward_hooks


# trainer: J2
def test_the_neftune_example_gives_the_papers_figures_as_the_papers():
    text = (EXAMPLES / "neftune.py").read_text(encoding="utf-8")
    for figure in ("29.79", "64.69", "10, 8 and 8 points", "25 % on MT-Bench", "UltraChat"):
        assert figure in text
    assert "None of this was measured here" in text


# trainer: J3
def test_unsloth_model(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", unsloth_shape.fake_unsloth())
    trainer = example("unsloth_model")["trainer"]
    assert_learned(trainer)
    assert trainer.args.max_length == 2048
    assert "unsloth" in trainer.model.model_tags
    assert Path("output/checkpoint-3/adapter_model.safetensors").is_file()


# trainer: J3 A2
def test_a_plain_module_that_is_no_pretrained_model_trains(tmp_path):
    model = unsloth_shape.PlainModule(tiny.make_tiny_model())
    before = model.lm_head.weight.clone()
    rows = datasets.Dataset.from_list(ROWS["stanfordnlp/imdb"])
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(tmp_path), num_train_epochs=1),
        train_dataset=rows,
        processing_class=tiny.make_byte_tokenizer(),
    )
    trainer.train()
    assert_learned(trainer)
    assert trainer.model is model
    assert not torch.equal(model.lm_head.weight, before)


# trainer: J4
@pytest.mark.skipif(GPU, reason="the error is that of a machine without a GPU")
def test_liger_says_that_it_needs_a_gpu(example):
    with pytest.raises((ImportError, ValueError), match=r"[Ll]iger"):
        example("liger")


# trainer: K5
def test_multi_gpu(example, models):
    trainer = example("multi_gpu")["trainer"]
    assert_learned(trainer, models["plain"])
    assert trainer.model.is_gradient_checkpointing
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}


# trainer: K6
def test_gptq(example, models):
    trainer = example("gptq")["trainer"]
    assert_learned(trainer, models["plain"], steps=6)  # 8 rows, 4 a step, 3 epochs
    assert "GPTQ" in (EXAMPLES / "gptq.py").read_text(encoding="utf-8")


# trainer: A13
def test_model_card(example):
    example("model_card")
    card = Path("opt-350m-imdb/README.md").read_text(encoding="utf-8")
    assert "- film-reviews" in card
    assert "- stanfordnlp/imdb" in card
    assert "# opt-350m-imdb" in card


# trainer: A13
def test_only_the_first_process_writes_the_card(example, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "is_world_process_zero", lambda self: False)
    example("model_card")
    assert not Path("opt-350m-imdb/README.md").exists()


# ---------------------------------------------------------------------------------------------------- vision


# trainer: L1 L2 L3 L4
def test_vision(example, models, capsys):
    names = example("vision")
    losses(names["trainer"])
    assert capsys.readouterr().out.startswith("USER: Who is this?<image>\n ASSISTANT: Barack Obama")
    batch, processor = names["collated_data"], names["processor"]
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}
    expected = batch["input_ids"].clone()
    tokenizer = processor.tokenizer
    expected[(expected == tokenizer.pad_token_id) | (expected == processor.image_token_id)] = -100
    assert torch.equal(batch["labels"], expected)
    before, now = vision.make_vision_model().state_dict(), names["model"].state_dict()
    eye = [name for name in before if "vision_tower" in name]
    assert any(not torch.equal(before[name], now[name].cpu()) for name in eye)  # gradients reach the eye


# trainer: L1
def test_the_loss_of_a_vision_model_is_its_own(example, models):
    names = example("vision")
    model, trainer = names["model"].eval(), names["trainer"]
    batch = {key: value.to(trainer.args.device) for key, value in names["collated_data"].items()}
    with torch.no_grad():
        expected = model(**batch).loss
        found = trainer.compute_loss(model, trainer._prepare_inputs(dict(batch)))
    tolerance = 2e-2 if trainer.args.bf16 else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
