"""The command line from recipe to answers, on the tiny model; and what each kind of bad input says."""

import json
import re

import pytest

from tests.test_mistakes import said
from tests.workplace import call, write_recipe
from tunesmith.data.prepare import as_dataset
from tunesmith.runs import read_metrics, read_status
from tunesmith.workflow import run


# reliability: 57
def test_a_recipe_becomes_a_trained_adapter(workplace):
    output = call("train", "recipe.yaml")
    run_dir = workplace / "run"
    for name in (
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml",
        "metrics.jsonl", "trainer_log.jsonl", "status.json", "data_report.json", "training_loss.png",
        "predictions_before.jsonl", "predictions_after.jsonl", "all_results.json", "trainer_state.json",
    ):  # fmt: skip
        assert (run_dir / name).is_file(), name
    assert read_status(run_dir)["state"] == "completed"
    assert [row["step"] for row in read_metrics(run_dir) if "loss" in row] == [1, 2, 3]
    for words in ("16 rows read, 16 kept, 0 dropped", "format: messages", "exact match: ", "tunesmith chat run"):
        assert words in output
    assert "\x1b" not in output
    assert "\r" not in output


@pytest.mark.parametrize("adapter", ["full", "freeze", "lora"])
def test_what_was_trained_can_be_scored_asked_and_merged(workplace, adapter):
    write_recipe(workplace / "recipe.yaml", adapter=adapter, lora_r=None, do_merge=adapter == "lora")
    call("train", "recipe.yaml")
    trained = json.loads((workplace / "run" / "all_results.json").read_text())
    scored = call("eval", "run", "--bf16", "false")
    assert re.search(rf"^loss +{trained['eval_loss']:.4f}$", scored, re.MULTILINE)
    call("predict", "run", "--output", "answers.jsonl")
    answers = [json.loads(line) for line in (workplace / "answers.jsonl").read_text().splitlines()]
    assert [row["label"] for row in answers] == ["red", "up", "left"]
    after = [json.loads(line) for line in (workplace / "run" / "predictions_after.jsonl").read_text().splitlines()]
    assert [row["predict"] for row in answers[:2]] == [row["predict"] for row in after]
    if adapter == "lora":
        merged = call("eval", "run/merged", "--eval_dataset", "heldout.jsonl", "--bf16", "false")
        assert re.search(rf"^loss +{trained['eval_loss']:.4f}$", merged, re.MULTILINE)
        call("merge", "run", "elsewhere")
        assert (workplace / "elsewhere" / "model.safetensors").is_file()


def test_training_lowers_the_loss_and_goes_on_from_an_adapter(workplace):
    write_recipe(workplace / "recipe.yaml", max_steps=30, learning_rate=0.01, lora_r=8)
    call("train", "recipe.yaml")
    losses = [row["loss"] for row in read_metrics(workplace / "run") if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    call("train", "recipe.yaml", "--model_name_or_path", "run", "--output_dir", "again", "--max_steps", "1")
    first = next(row["loss"] for row in read_metrics(workplace / "again") if "loss" in row)
    assert first < losses[0] - 0.3


# reliability: 55
def test_a_saved_recipe_repeats_the_run(workplace):
    call("train", "recipe.yaml", "--learning_rate", "1e-2")
    call("train", "run/recipe.yaml", "--output_dir", "again")
    one, other = ((workplace / name / "adapter_model.safetensors").read_bytes() for name in ("run", "again"))
    assert one == other


def test_python_runs_the_same_recipe(workplace):
    figures = run("recipe.yaml", output_dir="python", max_steps=1, compare_rows=0)
    assert figures["train_tokens"] > 0
    assert (workplace / "python" / "adapter_model.safetensors").is_file()


# reliability: 55
def test_check_shows_what_would_be_trained_and_writes_nothing(workplace):
    before = sorted(path.name for path in workplace.iterdir())
    output = call("check", "recipe.yaml", "--rows", "1")
    assert "⟦red<|im_end|>⟧" in output.replace("\n", "")
    assert "16 rows read, 16 kept" in output
    assert sorted(path.name for path in workplace.iterdir()) == before


def test_check_looks_at_the_first_rows_of_a_stream(workplace):
    output = call("check", "recipe.yaml", "--streaming", "--rows", "1")
    assert "⟦red<|im_end|>⟧" in output.replace("\n", "")
    assert "16 rows read, 16 kept" in output
    assert "of a stream the first 16 rows are looked at" in output
    (workplace / "broken.jsonl").write_text("no json\n")
    output = call("check", "recipe.yaml", "--streaming", "--dataset", "broken.jsonl", code=3)
    assert "broken.jsonl:1: not valid JSON" in output
    assert "left out, and counted, with on_bad_row: skip" in output


def test_check_finds_what_training_would_stop_at_before_any_row_is_read(workplace, monkeypatch):
    monkeypatch.setattr("tunesmith.steps.options.get_available_reporting_integrations", lambda: [])
    for command in ("check", "train"):
        output = call(command, "recipe.yaml", "--report_to", "wandb", code=2)
        assert "report_to: wandb is not installed" in output
        assert "rows read" not in output


def test_answers_are_not_written_over_others_that_nobody_named(workplace):
    write_recipe(
        workplace / "asks.yaml", output_dir="asked", eval_dataset="heldout.jsonl", dataset=None, max_new_tokens=2
    )
    (workplace / "generated_predictions.jsonl").write_text("precious")
    assert "answers: asked/generated_predictions.jsonl" in call("predict", "asks.yaml")
    assert "holds answers already. Name another file with --output" in call("predict", "asks.yaml", code=2)
    how = ("--eval_dataset", "heldout.jsonl", "--max_new_tokens", "2", "--use_cpu", "true")
    call("predict", "model", *how, code=2)
    call("predict", "model", *how, "--output", "asked/generated_predictions.jsonl")
    for name in ("generated_predictions.jsonl", "train.jsonl", "model/config.json"):
        before = (workplace / name).read_text()
        output = call("predict", "model", *how, "--output", name, code=2)
        assert f"--output: {name} is there, and holds no answers of predict. Name another file." in said(output)
        assert (workplace / name).read_text() == before


def test_check_looks_at_data_without_weights_and_says_so(workplace):
    (workplace / "model" / "model.safetensors").unlink()
    output = call("check", "recipe.yaml")
    assert "model holds no weights: enough for this report, not for training" in output
    assert "16 rows read" in output


@pytest.fixture
def texts(workplace):
    """Flags of a run over 8 texts of 25 tokens, in blocks of 64."""
    (workplace / "texts.txt").write_text("A spider has eight legs.\n" * 8)
    (workplace / "few.txt").write_text("Few.\n")
    more = {"dataset": "texts.txt", "eval_dataset": "texts.txt", "max_length": 64, "compare_rows": 0}
    write_recipe(workplace / "texts.yaml", stage="pt", **more)
    return "texts.yaml"


def test_check_of_texts_says_what_blocks_leave_out(texts):
    assert "3 blocks of 64 tokens; the tail of 8 tokens behind the last is left out" in call("check", texts)


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_set_of_texts_that_fills_no_block_is_named(texts, command):
    output = call(command, texts, "--dataset", "few.txt", code=3)
    assert "DataError: all texts together have 5 tokens, less than one block of max_length 64" in output
    output = call(command, texts, "--eval_dataset", "few.txt", code=3)
    assert "DataError: the texts of the evaluation set have 5 tokens, less than one block of max_length 64" in output


@pytest.mark.parametrize("command", ["check", "train"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("spda", "attn_implementation: there is no 'spda'. Did you mean 'sdpa'?"),
        ("evil/kernels", "attn_implementation: evil/kernels is code on the Hub. Add --trust_remote_code true"),
    ],
)
def test_attention_that_does_not_exist_or_runs_code_is_refused(workplace, command, name, expected):
    output = call(command, "recipe.yaml", "--attn_implementation", name, code=2)
    assert expected in said(output)
    assert "rows read" not in output


def test_what_to_type_next_can_be_typed(workplace):
    output = call("train", "recipe.yaml", "--max_steps", "1", "--output_dir", "my run", "--compare_rows", "0")
    assert said(output).endswith("tunesmith chat 'my run'")


def test_vllm_is_given_no_file_that_nobody_would_write(workplace):
    output = call("export", "model", "out.gguf", "--to", "vllm", code=2)
    assert "--to vllm prints a command and writes no file. Leave out out.gguf." in said(output)


def test_merge_says_which_folders_of_a_recipe_it_takes(workplace):
    for words in (("recipe.yaml",), ("recipe.yaml", "out")):
        assert "its adapter_name_or_path and export_dir" in call("merge", *words, code=2)


def test_part_of_the_data_can_be_held_out(workplace):
    output = call("check", "recipe.yaml", "--val_size", "0.25")
    assert "12 rows read, 12 kept" in output
    assert "4 rows read, 4 kept" in output


# reliability: 46
def test_held_out_rows_that_are_trained_on_are_named(workplace):
    assert "3 of 3 held-out examples also stand in the training data" in call("check", "recipe.yaml")


@pytest.mark.parametrize("stage", ["train", "check"])
@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--learnin_rate", "1"], 2, r"unknown flag '--learnin_rate'. Did you mean 'learning_rate'?"),
        (["--lora_r", "eight"], 2, "lora_r: expected a whole number"),
        (["--dataset", "absent.jsonl"], 3, "absent.jsonl"),
        (["--model_name_or_path", "bare"], 2, "no tokenizer can be loaded from there"),
        (["--dataset", "broken.jsonl"], 3, "broken.jsonl:3: not valid JSON"),
        (["--dataset", "renamed.jsonl"], 3, "mesages"),
        (["--dataset", "empty.jsonl"], 3, "empty.jsonl is empty"),
        (["--max_length", "12"], 3, "nothing is left to train on: all 16 rows were dropped"),
    ],
)
def test_bad_input_says_what_and_where(workplace, tiny_model, stage, words, code, message):
    tiny_model.save_pretrained(workplace / "bare")
    good = (workplace / "train.jsonl").read_text().splitlines(keepends=True)
    (workplace / "broken.jsonl").write_text("".join([*good[:2], '{"messages": [}\n', *good[2:]]))
    (workplace / "renamed.jsonl").write_text("".join(good).replace("messages", "mesages"))
    (workplace / "empty.jsonl").write_text("")
    assert message in call(stage, "recipe.yaml", *words, code=code)


# reliability: 50, 52
def test_all_mistakes_of_a_recipe_come_in_one_report(workplace):
    (workplace / "bad.yaml").write_text(
        "model_name_or_path: model\ndataset: train.jsonl\nlora_rnak: 8\nmax_steps: many\n"
    )
    output = call("train", "bad.yaml", code=2)
    assert "bad.yaml:3: unknown key 'lora_rnak'. Did you mean 'lora_rank'?" in output
    assert "bad.yaml:4: max_steps: expected a whole number, got 'many'" in output


# reliability: 56
def test_a_folder_that_holds_a_run_is_not_touched(workplace):
    call("train", "recipe.yaml")
    before = (workplace / "run" / "adapter_model.safetensors").read_bytes()
    assert "--overwrite_output_dir" in call("train", "recipe.yaml", "--seed", "7", code=2)
    assert (workplace / "run" / "adapter_model.safetensors").read_bytes() == before
    call("train", "recipe.yaml", "--seed", "7", "--overwrite_output_dir")
    assert (workplace / "run" / "adapter_model.safetensors").read_bytes() != before


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (
            ("--model_name_or_path", "run"),
            2,
            "run holds what this run reads (model_name_or_path: run), and overwrite_",
        ),
        (("--checkpoint_dir", "run/checkpoint-3"), 2, "(checkpoint_dir: run/checkpoint-3)"),
        (("--dataset", "run/rows.jsonl"), 2, "(dataset: run/rows.jsonl)"),
        (("--dataset", "trian.jsonl"), 3, "Did you mean 'train.jsonl'?"),
        (("--model_name_or_path", "modle"), 2, "modle: there is no such folder"),
        (("--report_to", "wandbb"), 2, "there is no tracker 'wandbb'"),
    ],
)
def test_a_run_is_not_overwritten_by_one_that_reads_it_or_cannot_begin(workplace, words, code, expected):
    call("train", "recipe.yaml", "--save_strategy", "steps", "--save_steps", "3")
    (workplace / "run" / "rows.jsonl").write_bytes((workplace / "train.jsonl").read_bytes())
    before = sorted(workplace.glob("run/**/*"))
    assert expected in call("train", "recipe.yaml", *words, "--overwrite_output_dir", code=code)
    assert sorted(workplace.glob("run/**/*")) == before


# reliability: 57
def test_a_finished_run_whose_model_is_gone_writes_it_again(workplace):
    words = ("train", "recipe.yaml", "--save_strategy", "steps", "--save_steps", "3")
    call(*words)
    model = workplace / "run" / "adapter_model.safetensors"
    before = model.read_bytes()
    model.unlink()
    call(*words, "--resume_from_checkpoint", "true")
    assert model.read_bytes() == before


def test_an_evaluation_leaves_the_status_of_the_run_that_was(workplace):
    call("train", "recipe.yaml")
    before = (workplace / "run" / "status.json").read_bytes()
    words = ("train", "recipe.yaml", "--do_train", "false", "--do_eval", "true", "--compare_rows", "0")
    call(*words)
    assert (workplace / "run" / "status.json").read_bytes() == before
    (workplace / "bad.jsonl").write_text('{"oops": 1}\n')
    call(*words, "--eval_dataset", "bad.jsonl", code=3)
    assert (workplace / "run" / "status.json").read_bytes() == before
    call(*words, "--output_dir", "new")
    assert read_status(workplace / "new")["state"] == "completed"


def test_a_failed_run_says_so_in_its_folder(workplace):
    call("train", "recipe.yaml", "--max_length", "12", code=3)
    status = read_status(workplace / "run")
    assert status["state"] == "failed"
    assert "nothing is left to train on" in status["reason"]


@pytest.mark.parametrize(
    ("how", "kept", "words"),
    [("drop", 16, "4 dropped"), ("truncate", 20, "changed  cut"), ("keep_last_turns", 20, "turns-dropped")],
)
def test_long_rows_are_counted_whatever_becomes_of_them(workplace, how, kept, words):
    turns = [{"role": role, "content": "word " * 8} for _ in range(3) for role in ("user", "assistant")]
    with (workplace / "train.jsonl").open("a") as file:
        file.write((json.dumps({"messages": turns}) + "\n") * 4)
    output = call("check", "recipe.yaml", "--max_length", "200", "--too_long", how, "--max_drop_ratio", "0.5")
    assert f"20 rows read, {kept} kept" in output
    assert words in output


def test_an_error_stops_at_the_first_long_row(workplace):
    output = call("check", "recipe.yaml", "--max_length", "12", "--too_long", "error", code=3)
    assert "train.jsonl:1: " in output
    assert "tokens, max_length is 12" in output


def test_bad_rows_can_be_skipped_and_are_counted(workplace):
    with (workplace / "train.jsonl").open("a") as file:
        file.write('{"messages": []}\n{"messages": [{"role": "usr", "content": "x"}]}\nnot json\n')
    words = ("--on_bad_row", "skip", "--max_drop_ratio", "0.2")
    output = call("check", "recipe.yaml", *words)
    assert "19 rows read, 16 kept, 3 dropped" in output
    assert "train.jsonl:19" in output
    call("train", "recipe.yaml", *words)
    report = json.loads((workplace / "run" / "data_report.json").read_text())["train"]
    assert report["rows"] == {"read": 19, "kept": 16, "dropped": 3}
    assert len(report["dropped_rows"]) == 3


def test_env_names_versions_and_no_paths(workplace):
    output = call("env")
    assert "torch" in output
    assert "products are the faster here" in output
    assert str(workplace) not in output


def test_weights_make_a_column_only_where_some_differ():
    plain = {"input_ids": [1, 2], "labels": [-100, 2]}
    assert as_dataset([plain]).column_names == ["input_ids", "labels"]
    assert as_dataset([plain, {**plain, "weights": [1.0, 2.0]}])["weights"] == [[1.0, 1.0], [1.0, 2.0]]


def test_samples_are_answered_at_every_evaluation(workplace):
    write_recipe(workplace / "recipe.yaml", sample_rows=2, eval_strategy="steps", eval_steps=1, compare_rows=0)
    call("train", "recipe.yaml", "--max_steps", "2")
    samples = [json.loads(line) for line in (workplace / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["label"]) for row in samples[:4]] == [(1, "red"), (1, "up"), (2, "red"), (2, "up")]
    assert all(isinstance(row["predict"], str) for row in samples)


def test_a_run_goes_on_from_its_checkpoint(workplace):
    saving = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3")
    call("train", "recipe.yaml", *saving)
    whole = (workplace / "run" / "adapter_model.safetensors").read_bytes()
    call("train", "recipe.yaml", *saving, "--resume_from_checkpoint", "run/checkpoint-2", "--output_dir", "again")
    assert (workplace / "again" / "adapter_model.safetensors").read_bytes() == whole
    call("train", "recipe.yaml", *saving, "--resume_from_checkpoint", "run/checkpoint-2")
    assert (workplace / "run" / "adapter_model.safetensors").read_bytes() == whole
    assert [row["step"] for row in read_metrics(workplace / "run") if "loss" in row] == [1, 2, 3]


def test_a_checkpoint_that_is_none_is_named(workplace):
    output = call("train", "recipe.yaml", "--resume_from_checkpoint", "model", code=4)
    assert "model holds no trainer_state.json" in output


# reliability: 53
@pytest.mark.parametrize("bits", ["--load_in_4bit", "--load_in_8bit"])
def test_an_adapter_trains_on_a_base_of_few_bits_and_answers_after(workplace, make_tiny_model, bits):
    pytest.importorskip("bitsandbytes")
    make_tiny_model(hidden_size=64, intermediate_size=128).save_pretrained("model")
    output = call("train", "recipe.yaml", bits, "--learning_rate", "1e-2")
    losses = [line["loss"] for line in read_metrics("run") if "loss" in line]
    assert losses[-1] < losses[0]
    assert "exact match" in output
    assert (workplace / "run" / "adapter_model.safetensors").is_file()


def test_a_base_of_few_bits_without_an_adapter_is_an_error(workplace):
    assert "4- or 8-bit base has no weights" in call(
        "train", "recipe.yaml", "--load_in_4bit", "--adapter", "full", code=2
    )
