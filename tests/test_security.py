"""Nothing that a model folder, a checkpoint or a data file brings may run, call out, or exhaust the machine."""

import ast
import json
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.faults.runs import make_run
from tests.tiny import make_byte_tokenizer, make_tiny_model
from tests.workplace import write_rows
from tunesmith.checkpoints import seal
from tunesmith.cli import app
from tunesmith.errors import CheckpointError, ConfigError, ModelError
from tunesmith.model.load import load_model, load_tokenizer
from tunesmith.model.template_trial import too_much
from tunesmith.recipe import load_recipe

SOURCE = Path(__file__).parents[1] / "src" / "tunesmith"
EVIL = "from pathlib import Path\nPath({canary!r}).write_text('ran')\n"


class Evil:
    """Writes a canary when it is unpickled."""

    def __init__(self, canary):
        self.canary = str(canary)

    def __reduce__(self):
        return (Path(self.canary).write_text, ("ran",))


@pytest.fixture
def no_network(monkeypatch):
    """Sockets that reach out are an error; a list of what was asked for."""
    asked = []

    def connect(self, address, *args):
        asked.append(address)
        raise OSError(f"the test reached out to {address}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: connect(None, host))
    return asked


@pytest.fixture
def folder(tmp_path):
    """A model folder."""
    make_tiny_model().save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **more):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


# reliability: 67
def test_a_models_own_code_does_not_run_unasked(folder, tmp_path, no_network):
    canary = tmp_path / "canary"
    (folder / "modeling_evil.py").write_text(EVIL.format(canary=str(canary)) + "class Evil: pass\n")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"}, model_type="evil")
    with pytest.raises(ModelError):
        load_model(str(folder), trust_remote_code=False)
    assert not canary.exists()
    assert no_network == []


# reliability: 67
def test_a_config_cannot_fetch_an_attention_kernel(folder, no_network):
    change_config(folder, _attn_implementation_internal="evil/kernels", _attn_implementation="evil/kernels")
    try:
        model = load_model(str(folder), trust_remote_code=False)
    except (ModelError, ConfigError):
        pass
    else:
        assert model.config._attn_implementation in ("sdpa", "eager")
    assert no_network == []


# reliability: 67
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused(tmp_path, name):
    options = {"max_steps": 2, "save_steps": 1}
    make_run(tmp_path / "run", **options).train()
    checkpoint, canary = tmp_path / "run" / "checkpoint-1", tmp_path / "canary"
    with zipfile.ZipFile(checkpoint / name) as archive:
        entries = {entry: archive.read(entry) for entry in archive.namelist()}
    with zipfile.ZipFile(checkpoint / name, "w") as archive:
        for entry, content in entries.items():
            archive.writestr(entry, pickle.dumps(Evil(canary), 2) if entry.endswith("data.pkl") else content)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, step=1)  # whoever can write the file can write its hash
    with pytest.raises(CheckpointError, match=name):
        make_run(tmp_path / "again", **options).train(str(checkpoint))
    assert not canary.exists()


# reliability: 67
def test_pickled_weights_are_refused(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil(tmp_path / "canary")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickled weights \(\.bin\) only"):
        load_model(str(folder))
    assert not (tmp_path / "canary").exists()


BOMBS = {
    "memory": "{{ 'a' * 10**10 }}",
    "time": "{% for a in range(99999) %}{% for b in range(99999) %}{% set x = a * b %}{% endfor %}{% endfor %}",
}
CANARIES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "{{ self.__init__.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ messages.append(messages) }}",
]


# reliability: 67
@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_that_would_exhaust_the_machine_is_not_rendered(folder, kind, monkeypatch):
    monkeypatch.setattr("tunesmith.model.template_trial.SECONDS", 2)
    (folder / "chat_template.jinja").write_text(BOMBS[kind])
    with pytest.raises(ModelError, match="its chat template is not used: it takes"):
        load_tokenizer(str(folder))


# reliability: 67
@pytest.mark.parametrize("template", CANARIES)
def test_a_template_stays_in_its_sandbox(tmp_path, template, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert too_much(template) is None  # and rendered there
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(Exception):  # noqa: B017, PT011 - jinja's SecurityError, or whatever else it trips over
        tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert not list(tmp_path.iterdir())


def test_known_templates_pass_the_trial():
    for template in (
        make_byte_tokenizer().chat_template,
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    ):
        assert too_much(template) is None


# reliability: 67
def test_code_from_the_hub_needs_a_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"model_name_or_path": "someone/model", "dataset": "rows.jsonl", "trust_remote_code": True}
    with pytest.raises(ConfigError, match="trust_remote_code runs code that whoever owns someone/model may change"):
        load_recipe(None, given)
    assert load_recipe(None, {**given, "model_revision": "a" * 40}).model.trust_remote_code


# reliability: 69
def test_nothing_in_the_source_loads_or_runs_what_it_should_not():
    wrong = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wrong += [f"{path.name}:{node.lineno} {what}" for what in unsafe(node)]
    assert wrong == []


def unsafe(node):
    """What is unsafe about a piece of source."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        yield from (
            name for name in names if name.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
        )
    if not isinstance(node, ast.Call):
        return
    name, keywords = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
    if name in ("eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"):
        yield name
    if name == "torch.load" and keywords.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if keywords.get("shell") == "True":
        yield "shell=True"
    if keywords.get("allow_pickle") == "True":
        yield "allow_pickle=True"


SECRET = "hf_" + "planted" * 4


# reliability: 64
def test_a_planted_secret_is_in_no_file_of_a_run(workplace, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    recipe = {**yaml.safe_load((workplace / "recipe.yaml").read_text()), "max_steps": 2, "output_dir": "out"}
    recipe |= {
        "hub_token": SECRET,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("train", "recipe.yaml", "--hf_token", SECRET) == 0
    found = [
        path for path in (workplace / "out").rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert found == []
    card = (workplace / "out" / "README.md").read_text()
    assert str(workplace) not in card


# reliability: 60
def test_the_whole_way_passes_offline_with_sockets_blocked(workplace, no_network, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = {**yaml.safe_load((workplace / "recipe.yaml").read_text()), "max_steps": 2, "output_dir": "out"}
    recipe |= {"save_strategy": "steps", "save_steps": 1, "adapter": "lora"}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run("check", "recipe.yaml") == 0
    assert run("train", "recipe.yaml") == 0
    (workplace / "out" / "status.json").write_text('{"state": "interrupted"}')
    shutil.rmtree(workplace / "out" / "checkpoint-2")
    assert run("train", "recipe.yaml") == 0
    assert run("eval", "out", "--eval_dataset", "heldout.jsonl") == 0
    assert run("predict", "out", "--eval_dataset", "heldout.jsonl", "--max_new_tokens", "2") == 0
    assert run("merge", "out", "whole") == 0
    monkeypatch.setattr("sys.stdin", open("heldout.jsonl"))  # noqa: SIM115
    assert run("chat", "whole", "--max_new_tokens", "2") == 0
    assert no_network == []


# reliability: 61 62
def test_what_is_exported_is_read_by_the_libraries_alone(workplace):
    recipe = {**yaml.safe_load((workplace / "recipe.yaml").read_text()), "max_steps": 2, "output_dir": "out"}
    (workplace / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "adapter": "lora"}))
    assert run("train", "recipe.yaml") == 0
    assert run("merge", "out", "whole") == 0
    program = """
import json, sys
sys.modules["tunesmith"] = None
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoPeftModelForCausalLM.from_pretrained("out")
AutoModelForCausalLM.from_pretrained("whole")
tokenizer = AutoTokenizer.from_pretrained("whole")
turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
told = json.load(open("whole/generation_config.json"))
print(json.dumps([tokenizer.apply_chat_template(turns, tokenize=False), told["eos_token_id"]]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text, stops = json.loads(done.stdout.splitlines()[-1])
    tokenizer = load_tokenizer("model")
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert text == tokenizer.apply_chat_template(turns, tokenize=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in (stops if isinstance(stops, list) else [stops])


# reliability: 65
def test_escapes_in_rows_do_not_reach_the_terminal(workplace, capsys):
    asked = "\x1b[2J\x1b]0;owned\x07 \u202eabc <script>alert(1)</script>"
    write_rows(workplace / "train.jsonl", [(asked, "\x1b[31mred")] * 8)
    assert run("check", "recipe.yaml") == 0
    printed = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(printed)
    assert "<script>" in printed


def run(*words):
    """Exit code of a command in this process."""
    with pytest.raises(SystemExit) as found:
        app(list(words), prog_name="tunesmith")
    return found.value.code
