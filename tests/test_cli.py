"""The command line: what each command calls, what it prints, its exit code, and how fast it starts."""

import gc
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from tunesmith import errors
from tunesmith.cli import app, keep_what_is_imported
from tunesmith.runs import prepare_output_dir

RECIPE = ["--model", "m", "--dataset", "d.jsonl"]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Replace what the commands call; the list fills with (name, arguments, keywords)."""
    found = []
    monkeypatch.chdir(tmp_path)

    def replace(module, *names):
        fake = types.ModuleType(module)
        for name in names:
            setattr(fake, name, lambda *args, _name=name, **kwargs: found.append((_name, args, kwargs)))
        monkeypatch.setitem(sys.modules, module, fake)
        monkeypatch.setattr(tunesmith, module.removeprefix("tunesmith."), fake, raising=False)
        return fake

    replace("tunesmith.allocator", "tune")
    replace("tunesmith.deliver", "nothing")
    replace("tunesmith.deliver.merge", "merge")
    workflow = replace("tunesmith.workflow", "train", "check", "evaluate", "predict")
    replace("tunesmith.delivery", "chat", "serve", "export")
    workflow.env = lambda: {"torch": "2.13.0", "device": "cpu"}
    return types.SimpleNamespace(list=found, workflow=workflow)


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# ---- starting


def test_garbage_is_collected_again_once_all_is_imported():
    gc.disable()
    keep_what_is_imported()
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    assert gc.isenabled()
    assert frozen > 0
    keep_what_is_imported()  # a program that calls a command itself keeps its collector as it is
    assert gc.get_freeze_count() == 0


# reliability: 69
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["--version"]])
def test_help_and_version_are_fast_and_import_nothing_heavy(words):
    heavy = {"torch", "transformers", "datasets", "numpy", "rich"}
    heavy |= {"pydantic"} if words != ["train", "--help"] else set()  # typer reads a command's parameters with it
    done = run_python(
        "import sys, time\n"
        f"sys.argv = ['tunesmith', *{words!r}]\n"
        "from tunesmith.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"assert not set({sorted(heavy)}) & set(sys.modules)\n"
        "assert time.process_time() < 0.5, time.process_time()\n"
    )
    assert done.returncode == 0, done.stderr


def test_importing_tunesmith_imports_nothing_else():
    done = run_python(
        "import sys\nbefore = set(sys.modules)\nimport tunesmith\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'tunesmith', 'importlib', 'typing', 'warnings'} | set(sys.stdlib_module_names), new\n"
    )
    assert done.returncode == 0, done.stderr


def test_help_lists_every_own_option_and_names_those_of_transformers():
    text = invoke("train", "--help").output
    assert "--lora_r int ≥ 1" in text
    assert "--max_new_tokens int ≥ 1" in text
    assert "Seq2SeqTrainingArguments" in text
    assert "\x1b[" not in text


def test_version_is_printed():
    assert invoke("--version").output == f"tunesmith {tunesmith.__version__}\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith", "--version"], capture_output=True, text=True, check=False
    )
    assert done.stdout == f"tunesmith {tunesmith.__version__}\n"


# ---- what is called


def test_train_sets_up_memory_and_then_trains_the_recipe_with_its_flags(calls):
    Path("recipe.yaml").write_text("model: m\ndataset: d\nlora_r: 8\n")
    result = invoke("train", "recipe.yaml", "--learning_rate", "1e-4", "--max_steps", "-1", "--packing")
    assert result.exit_code == 0, result.output
    assert [name for name, *_ in calls.list] == ["tune", "train"]
    recipe = calls.list[1][1][0]
    assert recipe.model.lora_r == 8
    assert recipe.training == {"learning_rate": 1e-4, "max_steps": -1, "packing": True}


@pytest.mark.parametrize(
    "words", [[*RECIPE, "--seed=3"], ["--seed", "3", *RECIPE], ["--packing", *RECIPE, "--seed", "3"]]
)
def test_flags_alone_make_a_recipe(calls, words):
    assert invoke("train", *words).exit_code == 0
    assert calls.list[1][1][0].training["seed"] == 3


def test_check_shows_as_many_rows_as_asked(calls):
    assert invoke("check", *RECIPE, "--rows", "5").exit_code == 0
    name, (recipe,), keywords = calls.list[0]
    assert (name, recipe.data.dataset, keywords) == ("check", "d.jsonl", {"rows": 5, "as_json": False})


def test_eval_predict_and_chat_take_the_model_first(calls):
    assert invoke("eval", "org/m", "--eval_dataset", "e.jsonl").exit_code == 0
    assert (
        invoke("predict", "org/m", "--eval_dataset", "e.jsonl", "--output", "o.jsonl", "--num_beams", "2").exit_code
        == 0
    )
    assert invoke("chat", "org/m", "--system", "Be brief.", "--temperature", "0.5", "--do_sample").exit_code == 0
    assert [(name, keywords) for name, _, keywords in calls.list] == [
        ("evaluate", {"as_json": False}),
        ("predict", {"output": Path("o.jsonl"), "as_json": False}),
        ("chat", {"system": "Be brief."}),
    ]
    recipes = [arguments[0] for _, arguments, _ in calls.list]
    assert {recipe.model.model_name_or_path for recipe in recipes} == {"org/m"}
    assert recipes[1].decoding.num_beams == 2
    assert recipes[2].decoding.do_sample


def test_eval_without_examples_says_what_to_add(calls):
    result = invoke("eval", "org/m")
    assert result.exit_code == 2
    assert "eval_dataset is not set. Name the held-out examples: --eval_dataset FILE." in result.output


def test_merge_passes_its_folders(calls):
    assert invoke("merge", "runs/a, runs/b", "merged", "--overwrite", "--max_shard_size", "1GB").exit_code == 0
    how = {"base": None, "max_shard_size": "1GB", "overwrite": True}
    assert calls.list == [("merge", (["runs/a", "runs/b"], Path("merged")), how)]


def test_merge_takes_the_base_model_that_its_messages_ask_for(calls):
    assert invoke("merge", "runs/a", "merged", "--base", "org/base").exit_code == 0
    assert calls.list[0][2] == {"base": "org/base", "max_shard_size": "10GB", "overwrite": False}


def test_env_prints_a_table(calls):
    assert invoke("env").output == "torch   2.13.0\ndevice  cpu\n"


# ---- what goes wrong


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("no."), 2),
        (errors.ModelError("no."), 2),
        (errors.DataError("no."), 3),
        (errors.TemplateError("no."), 3),
        (errors.CheckpointError("no."), 4),
        (errors.MemoryLimitError("no."), 5),
        (errors.NonFiniteError("no."), 6),
        (errors.TunesmithError("no."), 1),
    ],
)
def test_an_error_is_one_sentence_on_stderr_and_an_exit_code(calls, monkeypatch, error, code):
    monkeypatch.setattr(calls.workflow, "train", lambda recipe: (_ for _ in ()).throw(error))
    result = invoke("train", *RECIPE)
    assert (result.exit_code, result.stderr, result.stdout) == (code, f"{type(error).__name__}: no.\n", "")


# reliability: 58
def test_a_package_that_a_library_asks_for_is_no_crash(calls, monkeypatch):
    error = ImportError("You need galore_torch. Install it with `pip install galore_torch`")
    monkeypatch.setattr(calls.workflow, "train", lambda recipe: (_ for _ in ()).throw(error))
    result = invoke("train", *RECIPE)
    assert (result.exit_code, result.stderr) == (2, f"ImportError: {error}\n")


# reliability: 50
def test_a_recipe_error_exits_with_2_before_torch_is_imported(calls):
    result = invoke("train", *RECIPE, "--learnin_rate", "1e-4")
    assert result.exit_code == 2
    assert result.stderr == "ConfigError: unknown flag '--learnin_rate'. Did you mean 'learning_rate'?\n"
    assert [name for name, *_ in calls.list] == ["tune"]


def test_ctrl_c_exits_with_130(calls, monkeypatch):
    monkeypatch.setattr(calls.workflow, "train", lambda recipe: (_ for _ in ()).throw(KeyboardInterrupt))
    result = invoke("train", *RECIPE)
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")


def crash_once_prepared(recipe):
    run = Path(recipe.training["output_dir"])
    run.mkdir(parents=True)
    (run / "status.json").write_text("{}")
    return 1 / 0


def test_an_unexpected_error_leaves_its_traceback_in_the_run_directory(calls, monkeypatch):
    monkeypatch.setattr(calls.workflow, "train", crash_once_prepared)
    result = invoke("train", *RECIPE, "--output_dir", "runs/a")
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "ZeroDivisionError: division by zero",
        f"This is not a mistake in your recipe. The traceback is in {Path('runs/a/crash.txt')}.",
    ]
    assert "1 / 0" in Path("runs/a/crash.txt").read_text()


@pytest.mark.parametrize("exists", [False, True])
def test_a_crash_before_the_run_directory_is_prepared_leaves_it_free(calls, monkeypatch, exists):
    monkeypatch.setattr(calls.workflow, "train", lambda recipe: 1 / 0)
    if exists:
        Path("runs/a").mkdir(parents=True)
    result = invoke("train", *RECIPE, "--output_dir", "runs/a")
    assert "The traceback is in tunesmith-crash.txt." in result.stderr
    assert "1 / 0" in Path("tunesmith-crash.txt").read_text()
    assert prepare_output_dir("runs/a", overwrite=False) == Path("runs/a")


def test_traceback_shows_where_an_error_arose(calls, monkeypatch):
    monkeypatch.setattr(calls.workflow, "train", lambda recipe: 1 / 0)
    result = invoke("train", *RECIPE, "--traceback")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert not list(Path().rglob("*crash.txt"))


def test_a_reader_that_leaves_is_no_error():
    code = (
        "import sys, types, tunesmith\n"
        "tunesmith.workflow = types.SimpleNamespace(env=lambda: {str(i): 'x' * 99 for i in range(20000)})\n"
        "from tunesmith.cli import main\nsys.argv = ['tunesmith', 'env']\nmain()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_terminal_without_utf8_shows_question_marks():
    code = (
        "import sys, types, tunesmith\n"
        "tunesmith.workflow = types.SimpleNamespace(env=lambda: print('caf\\xe9') or {})\n"
        "from tunesmith.cli import main\nsys.argv = ['tunesmith', 'env']\nmain()\n"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, b"caf?", b"")
