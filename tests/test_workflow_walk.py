"""Whole runs, used again as a person would: what a command says of a run directory, and what a start leaves behind."""

import json
import re

import pytest
import yaml

from tests.workplace import PAIRS, call, write_recipe, write_rows
from tunesmith.deliver.merge import merge

TEXTS = [f"{'A spider has eight legs. ' * length}" for length in (3, 5, 8, 2, 9, 4)]


def figures(folder) -> dict:
    return json.loads((folder / "all_results.json").read_text())


def eval_loss(output: str) -> str:
    return re.search(r"^loss +(\d+\.\d{4})$", output, re.MULTILINE)[1]


def train(folder, name, *words, **options):
    write_recipe(folder / f"{name}.yaml", **{"compare_rows": 0, "output_dir": name, **options})
    return call("train", f"{name}.yaml", *words)


def write_pairs(path):
    rows = [
        {"prompt": f"say {word}", "chosen": f"yes, {word}", "rejected": f"no {word}!"}
        for word in ("one", "two", "three", "four", "five", "six")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---- a run directory, used again ---------------------------------------------------------------------------------


# workflow: W3 P3
def test_a_run_of_stage_pt_repeats_and_is_evaluated_in_blocks_as_it_was(workplace):
    (workplace / "texts.txt").write_text("\n".join(TEXTS))
    how = {"stage": "pt", "dataset": "texts.txt", "eval_dataset": "texts.txt", "max_length": 32}
    train(workplace, "one", **how)
    call("train", "one/recipe.yaml", "--output_dir", "again")
    one, other = ((workplace / name / "adapter_model.safetensors").read_bytes() for name in ("one", "again"))
    assert one == other
    assert yaml.safe_load((workplace / "one" / "recipe.yaml").read_text())["packing_strategy"] == "blocks"
    assert eval_loss(call("eval", "one")) == f"{figures(workplace / 'one')['eval_loss']:.4f}"
    train(workplace, "old", **{**how, "max_length": None, "max_source_length": 32, "max_target_length": 9})
    assert (workplace / "old" / "adapter_model.safetensors").read_bytes() == one


# workflow: P3
@pytest.mark.parametrize("streaming", [False, True])
def test_the_tail_of_every_set_of_stage_pt_is_said_and_kept_in_the_report(workplace, streaming):
    (workplace / "texts.txt").write_text("\n".join(TEXTS))
    how = {"stage": "pt", "dataset": "texts.txt", "eval_dataset": "texts.txt", "max_length": 32, "max_steps": 60}
    output = train(workplace, "one", **how, streaming=streaming, do_train=True, do_eval=True)
    report = json.loads((workplace / "one" / "data_report.json").read_text())
    whole, tail = divmod(sum(len(text) + 1 for text in TEXTS), 32)
    assert tail
    assert (
        f"evaluation data: {whole} blocks of 32 tokens; the tail of {tail} tokens behind the last is left out"
        in output
    )
    behind = "behind the last block of a pass" if streaming else "behind the last"
    assert any(note.endswith(f"the tail of {tail} tokens {behind} is left out") for note in report["train"]["notes"])
    assert any(f"the tail of {tail} tokens" in note for note in report["evaluation"]["notes"])
    assert f"the tail of {tail} tokens" in call("eval", "one")


# workflow: M9 W6
def test_a_reward_model_scores_pairs_again_and_does_not_chat(workplace):
    write_pairs(workplace / "pairs.jsonl")
    how = {"stage": "rm", "dataset": "pairs.jsonl", "eval_dataset": None, "val_size": 2, "do_train": True}
    output = train(workplace, "rm", do_eval=True, do_predict=True, reward_loss="span", **how)
    assert "tunesmith eval rm --eval_dataset FILE" in output
    scores = (workplace / "rm" / "generated_predictions.jsonl").read_text()
    assert eval_loss(call("eval", "rm")) == f"{figures(workplace / 'rm')['eval_loss']:.4f}"
    call("predict", "rm", "--output", "scores.jsonl")
    assert (workplace / "scores.jsonl").read_text() == scores
    assert "rm is a reward model: it scores answers and writes none" in call("chat", "rm", code=2)


# workflow: M9 W6
def test_pairs_of_several_sets_are_scored_one_set_after_another(workplace):
    for name in ("one", "two"):
        write_pairs(workplace / f"{name}.jsonl")
    how = {"stage": "rm", "dataset": ["one.jsonl", "two.jsonl"], "eval_dataset": None, "val_size": 4}
    train(workplace, "rm", do_train=True, do_eval=True, do_predict=True, eval_on_each_dataset=True, **how)
    scores = [json.loads(line) for line in (workplace / "rm" / "generated_predictions.jsonl").open()]
    assert [score["index"] for score in scores] == [0, 1, 2, 3]
    assert {"eval_one_loss", "eval_two_loss", "predict_loss"} <= figures(workplace / "rm").keys()
    call("predict", "rm", "--output", "scores.jsonl")
    assert [json.loads(line) for line in (workplace / "scores.jsonl").open()] == scores


def test_padding_that_is_trained_is_evaluated_too(workplace):
    train(workplace, "padded", ignore_pad_token_for_loss=False, do_train=True, do_eval=True)
    assert eval_loss(call("eval", "padded")) == f"{figures(workplace / 'padded')['eval_loss']:.4f}"


# workflow: M9 W6
def test_a_recipe_scores_pairs_with_a_trained_reward_adapter(workplace):
    write_pairs(workplace / "pairs.jsonl")
    train(workplace, "rm", stage="rm", dataset="pairs.jsonl", eval_dataset=None)
    parts = {"do_eval": True, "do_predict": True, "checkpoint_dir": "rm", "dataset": None}
    output = train(workplace, "scored", stage="rm", eval_dataset="pairs.jsonl", max_steps=None, lora_r=None, **parts)
    assert len((workplace / "scored" / "generated_predictions.jsonl").read_text().splitlines()) == 6
    assert {"eval_accuracy", "predict_accuracy"} <= figures(workplace / "scored").keys()
    assert "trained parameters" not in output
    refused = call("train", "scored.yaml", "--checkpoint_dir", "none", "--output_dir", "other", code=2)
    assert "none" in refused
    call("train", "recipe.yaml", "--output_dir", "sft")
    refused = call("train", "scored.yaml", "--checkpoint_dir", "sft", "--output_dir", "other", code=2)
    assert "sft: holds no value_head.safetensors, so it is no reward model" in refused


# workflow: M8 M3
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_that_began_at_a_checkpoint_is_evaluated_as_what_it_became(workplace, adapter):
    rank = {"lora_r": 4 if adapter == "lora" else None, "learning_rate": 0.01, "adapter": adapter}
    train(workplace, "first", **rank)
    train(workplace, "second", checkpoint_dir="first", **rank)
    again, first = (f"{figures(workplace / name)['eval_loss']:.4f}" for name in ("second", "first"))
    assert eval_loss(call("eval", "second")) == again != first
    call("predict", "second", "--output", "answers.jsonl")
    if adapter == "lora":
        merge("second", "merged")
        assert eval_loss(call("eval", "merged", "--eval_dataset", "heldout.jsonl", "--bf16", "false")) == again


# workflow: R5
def test_what_val_size_held_out_is_evaluated_again_and_said(workplace):
    train(workplace, "run", eval_dataset=None, val_size=1)
    output = call("eval", "run")
    assert "the examples that val_size: 1 holds out of dataset" in output
    assert eval_loss(output) == f"{figures(workplace / 'run')['eval_loss']:.4f}"
    call("predict", "run", "--output", "answers.jsonl")
    assert len((workplace / "answers.jsonl").read_text().splitlines()) == 1
    call("eval", "run", "--eval_dataset", "heldout.jsonl")  # a set of its own wins


# workflow: D7 R5
def test_what_a_stream_held_out_is_not_guessed(workplace):
    train(workplace, "run", eval_dataset=None, val_size=1, streaming=True)
    assert "eval_dataset is not set" in call("eval", "run", code=2)


def test_figures_stand_in_one_column_and_no_dict_is_printed(workplace):
    call("train", "recipe.yaml")
    output = call("eval", "run")
    lines = [line for line in output.splitlines() if re.match(r"(loss|perplexity|mean token accuracy|entropy) ", line)]
    assert len({re.search(r"\d", line).start() for line in lines}) == 1
    assert len(lines) == 4
    assert "{" not in output


# ---- what a start leaves behind ----------------------------------------------------------------------------------


# workflow: V11
def test_a_start_that_failed_over_its_data_leaves_the_report_and_is_begun_anew(workplace):
    good = (workplace / "train.jsonl").read_text()
    (workplace / "train.jsonl").write_text(good + '{"messages": []}\n' * 9)
    output = call("train", "recipe.yaml", "--on_bad_row", "skip", code=3)
    assert "9 of 25 rows (36.0 %) would be dropped" in output
    report = json.loads((workplace / "run" / "data_report.json").read_text())["train"]
    assert len(report["dropped_rows"]) == 9
    (workplace / "train.jsonl").write_text(good)
    call("train", "recipe.yaml")


# workflow: W4
def test_prompts_that_are_asked_are_counted_as_kept(workplace):
    write_rows(workplace / "more.jsonl", PAIRS)
    train(
        workplace, "asked", do_predict=True, predict_with_generate=True, eval_dataset="more.jsonl", dataset=None,
        max_steps=None, lora_r=None, metrics="exact_match",
    )  # fmt: skip
    report = json.loads((workplace / "asked" / "data_report.json").read_text())["evaluation"]
    assert report["rows"] == {"read": 4, "kept": 4, "dropped": 0}


# ---- what a person reads -----------------------------------------------------------------------------------------


def test_a_place_for_answers_is_made_or_refused_before_the_model_loads(workplace):
    call("predict", "model", "--eval_dataset", "heldout.jsonl", "--output", "new/folder/answers.jsonl")
    assert len((workplace / "new" / "folder" / "answers.jsonl").read_text().splitlines()) == 3
    words = ("--eval_dataset", "heldout.jsonl", "--output", "train.jsonl/answers.jsonl")
    assert "--output: cannot write train.jsonl/answers.jsonl" in call("predict", "model", *words, code=2)


# workflow: W4
def test_a_prompt_that_the_model_cannot_read_is_told_before_the_training(workplace):
    write_rows(workplace / "long.jsonl", [("word " * 500, "red"), *PAIRS])
    how = {"eval_dataset": "long.jsonl", "max_drop_ratio": 0.5, "do_train": True, "do_predict": True}
    write_recipe(workplace / "long.yaml", compare_rows=0, predict_with_generate=True, metrics="exact_match", **how)
    output = call("train", "long.yaml", code=3)
    assert re.search(r"long\.jsonl:1: its prompt has \d+ tokens, but the model reads 2048", output)
    assert "step 1/3" not in output
    call("train", "long.yaml", "--max_source_length", "64", "--overwrite_output_dir", "--do_eval", "false")


# workflow: T5
def test_a_template_that_does_not_exist_is_a_mistake_of_the_recipe(workplace):
    assert "Did you mean 'alpaca'?" in call("check", "recipe.yaml", "--template", "alpacca", code=2)


def test_a_table_of_reasons_says_what_was_wrong_with_the_first_row(workplace):
    output = call("check", "recipe.yaml", "--max_length", "12", code=3)
    assert re.search(r"truncated +16 rows +train\.jsonl:1, 2", output)
    assert re.search(r"train\.jsonl:1: .*max_length", output)


def test_columns_that_are_there_and_null_are_said_to_be(workplace):
    (workplace / "null.jsonl").write_text('{"instruction": "q", "output": null}\n' * 3)
    output = call("check", "recipe.yaml", "--dataset", "null.jsonl", code=3)
    assert "output holds nothing (null)" in output
    assert "columns: {}" not in output


# workflow: D1
def test_an_entry_of_the_registry_whose_file_is_missing_is_named(workplace):
    (workplace / "data").mkdir()
    write_rows(workplace / "data" / "mine.jsonl", PAIRS)
    entry = {"file_name": "mina.jsonl", "formatting": "sharegpt"}
    (workplace / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    output = call("check", "recipe.yaml", "--dataset", "mine", code=3)
    assert "dataset mine: its entry in dataset_info.json names data/mina.jsonl, which is not there" in output
    assert "Did you mean 'mine.jsonl'?" in output


def test_a_tracker_that_is_not_installed_is_an_error_of_the_recipe(workplace, monkeypatch):
    monkeypatch.setattr("tunesmith.steps.options.get_available_reporting_integrations", list)
    output = call("train", "recipe.yaml", "--report_to", "wandb", code=2)
    assert "report_to: wandb is not installed. Install it: pip install wandb" in output


def test_a_val_size_that_leaves_nothing_and_a_folder_for_a_recipe_say_so(workplace):
    write_recipe(workplace / "all.yaml", eval_dataset=None, val_size=16, compare_rows=0)
    assert "val_size: 16 holds out 16 of 16 rows" in call("train", "all.yaml", code=3)
    assert "model is a folder. Name a .yaml or .json file" in call("train", "model", code=2)
