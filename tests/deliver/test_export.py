"""An exported model answers as the one it was made of, also after it was read back, or it is not there."""

import io
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from typer.testing import CliRunner

from tests import tiny
from tunesmith import delivery
from tunesmith.cli import app
from tunesmith.deliver import export as exporting
from tunesmith.deliver.export import TOLERANCE, export_gguf, export_ollama, vllm_command
from tunesmith.deliver.gguf_file import REST, SPLITTERS, TYPES, WORDS, neighbours, splitter_of
from tunesmith.deliver.modelfile import TRIALS, modelfile, parts_of, rendered
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model.chain import ARGUMENTS

gguf = pytest.importorskip("gguf", reason="pip install 'tunesmith[gguf]'")
QUIET = Console(file=io.StringIO(), width=200)
IDS = torch.arange(40)[None]
SIZES = {
    "vocab_size": 450,  # more rows than tokens
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def with_rule(tokenizer, rule="gpt-2"):
    """The tokenizer, splitting text as `rule` of llama.cpp does."""
    digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in digits)
    steps = {"gpt-2": [level], "smollm": [pre_tokenizers.Digits(individual_digits=True), level]}
    if rule in digits:
        steps[rule] = [pre_tokenizers.Split(Regex(WORDS + digits[rule] + REST), "isolated"), level]
    found = pre_tokenizers.Sequence(steps[rule]) if len(steps[rule]) > 1 else level
    tokenizer.backend_tokenizer.pre_tokenizer = found
    if rule == "llama-bpe":
        tokenizer.backend_tokenizer.model.ignore_merges = True
    return tokenizer


@pytest.fixture
def tokenizer():
    return with_rule(tiny.make_bpe_tokenizer())


def shaken(model):
    """With norms and biases that are no ones and zeros."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


MODELS = {
    "llama": lambda: tiny.make_tiny_model(**SIZES),
    "tied": lambda: tiny.make_tiny_model(**SIZES, tie_word_embeddings=True),
    "biases": lambda: tiny.make_tiny_model(**SIZES, attention_bias=True),
    "long": lambda: tiny.make_tiny_model(**SIZES, rope_parameters=LLAMA3),
    "linear": lambda: tiny.make_tiny_model(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=128)),
}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


# reliability: 63
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("family", MODELS)
def test_the_file_read_by_transformers_answers_as_the_model(tmp_path, tokenizer, family, kind):
    model = shaken(MODELS[family]())
    path = tmp_path / "new" / "model.gguf"
    found = export_gguf(model, tokenizer, path, kind=kind, name="mine", overwrite=False, console=QUIET)
    scaled = {"config": model.config} if family in ("long", "linear", "biases") else {}
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **scaled)
    difference = (logits(read.eval()) - logits(model)).abs().max() / logits(model).abs().max()
    assert difference < TOLERANCE[kind]
    assert found["relative_difference"] < TOLERANCE[kind]
    assert found["bytes"] == path.stat().st_size
    assert [one.name for one in path.parent.iterdir()] == ["model.gguf"]


def test_a_tokenizer_read_by_transformers_gives_the_same_tokens(tmp_path, tokenizer):
    path = tmp_path / "model.gguf"
    model = MODELS["llama"]()
    export_gguf(model, tokenizer, path, kind="f16", name="mine", overwrite=False, console=QUIET)
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("one two  three", "Grüße, 東京 🙂", "<|im_start|>user\nHi<|im_end|>\n", "def f(a):\n\treturn 12345"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert read.chat_template == tokenizer.chat_template
    fields = gguf.GGUFReader(path).fields
    said = {
        name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("pre", "eos_token_id", "tokens", "token_type")
    }
    assert said["pre"] == "gpt-2"
    assert said["eos_token_id"] == tokenizer.eos_token_id
    kinds = dict(zip(said["tokens"], said["token_type"]))
    assert kinds["<|im_end|>"] == gguf.TokenType.CONTROL
    assert kinds["a"] == gguf.TokenType.NORMAL
    assert len(said["tokens"]) == model.config.vocab_size


def test_llama3_positions_are_told_to_llama_cpp(tmp_path, tokenizer):
    model, path = MODELS["long"](), tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path, kind="f16", name="mine", overwrite=False, console=QUIET)
    factors = next(one.data for one in gguf.GGUFReader(path).tensors if one.name == "rope_freqs.weight")
    plain = 10000.0 ** -(np.arange(8) / 8)
    np.testing.assert_allclose(plain / factors, model.model.rotary_emb.inv_freq.numpy(), rtol=1e-5)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(8.0)


def test_rows_that_turn_together_stand_side_by_side():
    rows = torch.arange(8)[:, None]  # one head of eight rows: i turns with i + 4
    assert neighbours(rows, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert neighbours(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("rule", SPLITTERS)
def test_the_rule_that_splits_text_is_recognized(rule):
    assert splitter_of(with_rule(tiny.make_bpe_tokenizer(), rule)) == rule


@pytest.mark.parametrize("make", [tiny.make_bpe_tokenizer, tiny.make_sentencepiece_like_tokenizer])
def test_a_rule_that_is_not_known_is_refused(make):
    with pytest.raises(ModelError, match=r"none of the rules.*convert_hf_to_gguf"):
        splitter_of(make())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "type 'gpt2' are not written here"),
        ({"sliding_window": 64}, "sliding windows"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope scaling 'yarn'"),
    ],
)
def test_what_would_not_be_exact_is_refused_before_anything_is_written(tmp_path, tokenizer, change, said):
    model = MODELS["llama"]()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=said):
        export_gguf(model, tokenizer, tmp_path / "a.gguf", kind="f16", name="a", overwrite=False, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_asked(tmp_path, tokenizer):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"exists\. Add --overwrite"):
        export_gguf(MODELS["llama"](), tokenizer, path, kind="f16", name="a", overwrite=False, console=QUIET)
    with pytest.raises(ConfigError, match="is a folder"):
        export_gguf(MODELS["llama"](), tokenizer, tmp_path, kind="f16", name="a", overwrite=True, console=QUIET)
    with pytest.raises(ConfigError, match="type: expected one of f16"):
        export_gguf(MODELS["llama"](), tokenizer, path, kind="q9", name="a", overwrite=True, console=QUIET)
    assert path.read_bytes() == b"old"
    export_gguf(MODELS["llama"](), tokenizer, path, kind="f16", name="a", overwrite=True, console=QUIET)
    assert path.read_bytes()[:4] == b"GGUF"


# reliability: 63
def test_an_interrupted_export_leaves_no_file_under_its_name(tmp_path, tokenizer, monkeypatch):
    path, write = tmp_path / "a.gguf", gguf.GGUFWriter.write_tensor_data
    path.write_bytes(b"old")
    model, seen = MODELS["llama"](), []

    def dies(self, *given):
        seen.append(given)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *given)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", dies)
    if (child := os.fork()) == 0:
        export_gguf(model, tokenizer, path, kind="f16", name="a", overwrite=True, console=QUIET)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", write)
    export_gguf(model, tokenizer, path, kind="f16", name="a", overwrite=True, console=QUIET)
    assert [one.name for one in tmp_path.iterdir()] == ["a.gguf"]  # what the dead one left is gone


def test_a_file_that_answers_otherwise_is_not_kept(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(exporting, "read_back", lambda path, model: shaken(model))
    with pytest.raises(ModelError, match="answers differently"):
        export_gguf(
            MODELS["llama"](), tokenizer, tmp_path / "a.gguf", kind="f32", name="a", overwrite=False, console=QUIET
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_a_sentence(tmp_path, tokenizer, monkeypatch):
    def full(self, *given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        export_gguf(
            MODELS["llama"](), tokenizer, tmp_path / "a.gguf", kind="f16", name="a", overwrite=False, console=QUIET
        )
    assert not list(tmp_path.iterdir())


def test_without_the_package_it_says_what_to_install(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[gguf\]'"):
        export_gguf(
            MODELS["llama"](), tokenizer, tmp_path / "a.gguf", kind="f16", name="a", overwrite=False, console=QUIET
        )


# ---- Ollama


@pytest.mark.parametrize("family", ["chatml", "llama3"])
def test_a_template_in_parts_renders_what_the_chat_template_does(family):
    tokenizer = tiny.make_byte_tokenizer(family)
    parts = parts_of(tokenizer)
    for trial in (*TRIALS, (("system", "x y"), ("user", "1\n2"), ("assistant", "ä"), ("user", "last"))):
        assert parts.render(trial) == rendered(tokenizer, trial)


def test_a_default_system_message_stands_where_there_is_none(byte_tokenizer):
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        + tokenizer.chat_template
    )
    text, said = modelfile("a.gguf", tokenizer, ["<|im_end|>"], system=None)
    assert not said
    assert text == (
        'FROM ./a.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}'
        "<|im_start|>system\nBe good.<|im_end|>\n{{ end }}{{ range .Messages }}"
        '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
        '<|im_start|>assistant\n"""\nPARAMETER stop "<|im_end|>"\n'
    )


def test_a_template_that_does_more_is_left_to_ollama():
    tokenizer = tiny.make_byte_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "message['content'] | upper"
    ).replace("message.content", "message.content | upper")
    text, said = modelfile("a.gguf", tokenizer, [], system="Be brief.")
    assert "cannot be said in Ollama's language" in said
    assert text == 'FROM ./a.gguf\nSYSTEM """Be brief."""\n'
    text, said = modelfile("a.gguf", tokenizer, [], system='Say """.')
    assert "system message is left out" in said
    assert "SYSTEM" not in text


def test_ollama_s_folder_holds_both_files(tmp_path, tokenizer):
    console = Console(file=io.StringIO(), width=200)
    found = export_ollama(
        MODELS["llama"](),
        tokenizer,
        tmp_path / "out",
        kind="q8_0",
        name="org/my model",
        overwrite=False,
        console=console,
    )
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == ["Modelfile", "org-my-model.q8_0.gguf"]
    assert found["modelfile"] == str(tmp_path / "out" / "Modelfile")
    assert "ollama create org-my-model -f " in console.file.getvalue()
    assert (tmp_path / "out" / "Modelfile").read_text().startswith("FROM ./org-my-model.q8_0.gguf\n")
    with pytest.raises(ConfigError, match="Modelfile exists"):
        export_ollama(
            MODELS["llama"](), tokenizer, tmp_path / "out", kind="f16", name="m", overwrite=False, console=console
        )


# ---- vLLM


def test_vllm_s_command_serves_a_model_or_an_adapter_beside_its_base(tmp_path):
    (tmp_path / "a b").mkdir()
    assert vllm_command(str(tmp_path / "a b")) == f"vllm serve '{tmp_path}/a b' --served-model-name 'a b'"
    adapter = tmp_path / "mine"
    adapter.mkdir()
    told = '{"peft_type": "LORA", "r": 24, "base_model_name_or_path": "org/base"%s}'
    (adapter / "adapter_config.json").write_text(told % "")
    assert vllm_command(str(adapter)) == (
        f"vllm serve org/base --enable-lora --lora-modules mine={adapter} --max-lora-rank 32"
    )
    (adapter / "chat_template.jinja").touch()
    assert vllm_command(str(adapter)).endswith(f" --chat-template {adapter}/chat_template.jinja")
    for more, said in (
        (', "use_dora": true', "use_dora"),
        (', "trainable_token_indices": [7]', "trainable_token_indices"),
        (', "rank_pattern": {"q_proj": 600}', "a rank over 512"),
    ):
        (adapter / "adapter_config.json").write_text(told % more)
        with pytest.raises(ModelError, match=f"this one has {said}.*Merge it"):
            vllm_command(str(adapter))


def test_vllm_is_not_told_of_half_a_chain(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 8, "base_model_name_or_path": "org/base"}'
        )
    (tmp_path / "second" / ARGUMENTS).write_text(json.dumps({"merged_before": [str(tmp_path / "first")]}))
    with pytest.raises(ModelError, match="adapters merged before it"):
        vllm_command(str(tmp_path / "second"))


# ---- the command


@pytest.mark.parametrize("bits", [[], ["--load_in_4bit", "true"]], ids=["whole base", "trained on 4 bits"])
def test_a_trained_adapter_is_merged_into_what_is_exported(workplace, bits):
    from peft import LoraConfig, get_peft_model

    from tunesmith.recipe import load_for_model

    with_rule(AutoTokenizer.from_pretrained("model")).save_pretrained("model")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("model"), config).eval()
    model.save_pretrained("adapter")
    recipe = load_for_model("model", flags=["--checkpoint_dir", "adapter", *bits], task="chat")
    delivery.export(recipe, workplace / "a.gguf", to="gguf", kind="f32", name="mine")
    read = AutoModelForCausalLM.from_pretrained(workplace, gguf_file="a.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "model"], "output: name the GGUF file"),
        (["export", "model", "a.gguf", "--to", "gguff"], "unknown --to 'gguff'. Did you mean 'gguf'?"),
        (["export", "model", "model"], "is a folder. Name a file"),
        (["export", "model", "recipe.yaml", "--to", "ollama"], "recipe.yaml cannot be made"),
        (["export", "model", "a.gguf", "--type", "q4"], "type: expected one of f16"),
    ],
)
def test_mistakes_at_the_command_are_sentences(workplace, words, said):
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert said in done.stderr
