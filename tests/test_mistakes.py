"""Mistakes in a recipe, a model folder or a machine: what the command line says, and its exit code."""

import importlib.util
import json
import shutil

import pytest
import yaml

from tests import tiny
from tests.workplace import PAIRS, call, said, write_recipe, write_rows

NEEDED = "model_name_or_path: model\ndataset: train.jsonl\n"


# ---- the recipe ----------------------------------------------------------------------------------------------------


# reliability: 53
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16: true\nfp16: true\n", "bad.yaml:3, bad.yaml:4: bf16 and fp16 cannot both be true"),
        ("packing: true\ngroup_by_length: true\n", "bad.yaml:3, bad.yaml:4: packing fills every row"),
        ("adapter: full\nlora_r: 8\n", "bad.yaml:3, bad.yaml:4: LoRA options have no effect with adapter: full"),
        ("load_best_model_at_end: true\n", "bad.yaml:3: load_best_model_at_end needs evaluations"),
        ("warmup_steps: 20\nmax_steps: 10\n", "bad.yaml:3, bad.yaml:4: warmup_steps (20) is more than max_steps (10)"),
        ("load_in_4bit: true\nadapter: full\n", "bad.yaml:3, bad.yaml:4: a 4- or 8-bit base has no weights"),
        ("eval_strategy: steps\n", "bad.yaml:3: eval_strategy: steps needs held-out examples"),
    ],
)
def test_a_contradiction_exits_with_2_and_names_its_lines(workplace, text, expected):
    (workplace / "bad.yaml").write_text(NEEDED + text)
    for command in ("train", "check"):
        assert said(call(command, "bad.yaml", code=2)).startswith(f"ConfigError: {expected}")


# reliability: 53
@pytest.mark.parametrize(("epochs", "code"), [(1, 2), (2, 2), (3, 0)])
def test_a_warmup_that_outlasts_the_epochs_is_an_error_before_a_step(workplace, epochs, code):
    """16 rows in batches of 2 × 2 are 4 steps an epoch."""
    write_recipe(
        workplace / "recipe.yaml", max_steps=None, num_train_epochs=epochs, warmup_steps=9, compare_rows=0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    output = call("train", "recipe.yaml", code=code)
    if code:
        assert "warmup_steps (9) is more than the " in said(output)
        assert f"{4 * epochs} steps of {epochs} epochs over these rows" in said(output)
        assert "step 1/" not in output
        call("train", "recipe.yaml", "--warmup_steps", "0.5")  # nothing is in the way


# reliability: 53
@pytest.mark.parametrize(
    ("given", "train_on"),
    [
        ("train_on: assistant", "assistant"),
        ("train_on: last_turn", "last_turn"),
        ("train_on: completion", "completion"),
        ("assistant_only_loss: true", "assistant"),
        ("completion_only_loss: true", "completion"),
    ],
)
def test_turns_of_plain_text_cannot_be_chosen(workplace, given, train_on):
    (workplace / "texts.txt").write_text("A spider has eight legs.\n" * 8)
    (workplace / "bad.yaml").write_text(f"model_name_or_path: model\ndataset: texts.txt\n{given}\n")
    for command in ("check", "train"):
        output = call(command, "bad.yaml", code=2)
        assert f"bad.yaml:3: train_on: {train_on} chooses among turns, and the examples are plain" in said(output)


def test_plain_text_is_trained_whole_where_nobody_chose_turns_and_again_from_the_saved_recipe(workplace):
    (workplace / "texts.txt").write_text("A spider has eight legs.\n" * 8)
    words = ("--dataset", "texts.txt", "--compare_rows", "0", "--max_steps", "1")
    assert "192 trained" in call("train", "recipe.yaml", *words)
    assert yaml.safe_load((workplace / "run" / "recipe.yaml").read_text())["train_on"] == "assistant"
    assert "192 trained" in call("train", "run/recipe.yaml", "--output_dir", "again")
    call("check", "recipe.yaml", *words, "--train_on", "all")


def test_text_beside_conversations_goes_with_any_choice_of_turns(workplace):
    (workplace / "texts.txt").write_text("A spider has eight legs.\n" * 8)
    call("check", "recipe.yaml", "--dataset", "texts.txt,train.jsonl", "--train_on", "last_turn")


# reliability: 50
def test_a_misspelled_column_is_told_before_the_rows_are(workplace):
    (workplace / "rows.jsonl").write_text('{"question": "a", "output": "b"}\n')
    words = ("--dataset", "rows.jsonl", "--columns", "{instrution: question}")
    hint = "'instrution'. Did you mean 'instruction'?"
    assert f"columns: no format reads {hint}" in said(call("check", "recipe.yaml", *words, code=2))
    assert f"columns: format alpaca reads no {hint}" in said(
        call("check", "recipe.yaml", *words, "--format", "alpaca", code=2)
    )


# reliability: 58
def test_a_tracker_that_does_not_exist_names_the_nearest(workplace):
    output = call("train", "recipe.yaml", "--report_to", "trackoi", code=2)
    assert "report_to: there is no tracker 'trackoi'. Did you mean 'trackio'?" in said(output)


# ---- packages that are not there -----------------------------------------------------------------------------------


# reliability: 58
@pytest.mark.parametrize(
    ("package", "words", "expected"),
    [
        ("gguf", ["check", "recipe.yaml", "--gguf_file", "m.gguf"], "pip install 'tunesmith[gguf]'"),
        ("bitsandbytes", ["train", "recipe.yaml", "--load_in_4bit"], "pip install 'tunesmith[quant]'"),
        ("sacrebleu", ["train", "recipe.yaml", "--metrics", "sacrebleu"], "pip install 'tunesmith[metrics]'"),
        ("uvicorn", ["serve", "model"], "pip install 'tunesmith[serve]'"),
        ("uvicorn", ["studio", "."], "pip install 'tunesmith[studio]'"),
        (
            "deepspeed",
            ["train", "recipe.yaml", "--deepspeed", "{zero_optimization: {stage: 2}}"],
            "pip install deepspeed",
        ),
    ],
)
def test_a_missing_package_is_one_line_with_what_to_install(workplace, monkeypatch, package, words, expected):
    (workplace / "model" / "m.gguf").touch()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else find_spec(name, *more)
    )
    assert expected in said(call(*words, code=2))


# reliability: 58
def test_a_missing_tracker_is_one_line_with_what_to_install(workplace, monkeypatch):
    monkeypatch.setattr("tunesmith.steps.options.get_available_reporting_integrations", list)
    output = call("train", "recipe.yaml", "--report_to", "trackio", code=2)
    assert "report_to: trackio is not installed. Install it: pip install trackio" in said(output)


# ---- models that do not fit ----------------------------------------------------------------------------------------


@pytest.fixture
def models(workplace):
    """Beside `model`: one without a tokenizer, one with too few embeddings, one cut short, adapters of other kinds."""
    tokenizer = tiny.make_byte_tokenizer()
    small = {"vocab_size": 250, "bos_token_id": 248, "eos_token_id": 249, "pad_token_id": None}
    tiny.make_tiny_model().save_pretrained("bare")
    tiny.make_tiny_model(**small).save_pretrained("small")
    tiny.make_tiny_model().save_pretrained("cut")
    for name in ("small", "cut"):
        tokenizer.save_pretrained(name)
    weights = workplace / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    call("train", "recipe.yaml", "--max_steps", "1", "--compare_rows", "0", "--output_dir", "adapter")
    for name, base in (("lost", "gone/for/ever"), ("upon", "adapter")):
        shutil.copytree("adapter", name)
        config = workplace / name / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    return workplace


# reliability: 59
def test_a_model_that_cannot_be_used_is_told_precisely(models):
    table = {
        "nowhere": "nowhere: there is no such folder, and it is not a Hub id (owner/name).",
        "train.jsonl": "train.jsonl: is no model folder, config.json is missing. It holds: nothing, it is a file.",
        "bare": "bare: no tokenizer can be loaded from there",
        "small": "the tokenizer has 259 tokens but the model only 250 embeddings",
        "cut": "cut: its weights are damaged or cut short",
        "lost": "lost: its adapter_config.json names the base model gone/for/ever, and there is no such folder. "
        "Correct base_model_name_or_path there, or name the base as model_name_or_path",
        "upon": "upon names adapter as its base, which is an adapter too",
        "adapter --adapter full --lora_r 16": "adapter is a LoRA adapter, which only goes on as lora",
        "adapter --checkpoint_dir adapter": "adapter is an adapter already, and checkpoint_dir names others",
        "model --checkpoint_dir nowhere": "checkpoint_dir: there is no folder nowhere",
    }
    for number, (words, expected) in enumerate(table.items()):
        options = ("--max_steps", "1", "--output_dir", f"run-{number}")
        output = call("train", "recipe.yaml", "--model_name_or_path", *words.split(), *options, code=2)
        assert expected in said(output), words


# reliability: 59
@pytest.mark.parametrize("name", ["small", "cut", "lost"])
def test_a_model_that_cannot_answer_is_told_precisely(models, name):
    output = call("eval", name, "--eval_dataset", "heldout.jsonl", code=2)
    assert said(output).startswith("ModelError: ")


# ---- looking without touching --------------------------------------------------------------------------------------


def contents(folder, but=()) -> dict:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.relative_to(folder).parts[0] not in but}


# reliability: 55
def test_check_writes_into_the_cache_alone_and_needs_no_gpu(workplace, monkeypatch):
    """Liger's kernels run on GPUs only."""
    monkeypatch.setenv("HOME", str(workplace))
    write_rows(workplace / "train.jsonl", PAIRS * 500)
    before = contents(workplace)
    words = ("recipe.yaml", "--data_cache_dir", "cache", "--use_liger_kernel")
    assert "2,000 rows read, 2,000 kept" in call("check", *words)
    assert contents(workplace, but=["cache"]) == before
    assert contents(workplace / "cache")
    assert "use_liger_kernel" in said(call("train", *words, code=2))


# reliability: 56
@pytest.mark.parametrize("words", [(), ("--overwrite_output_dir",)])
def test_a_folder_of_somebody_elses_is_refused_and_left_as_it_is(workplace, words):
    (workplace / "run").mkdir()
    (workplace / "run" / "thesis.tex").write_text("words")
    before = contents(workplace)
    assert "output_dir: run is not empty (thesis.tex)" in said(call("train", "recipe.yaml", *words, code=2))
    assert contents(workplace) == before
