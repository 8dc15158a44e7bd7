"""Several sources become examples to train on and to evaluate; every row is accounted for."""

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.examples import HELLO, HI
from tests.data.registries import alpaca, asked, gather, make_file, make_registry
from tunesmith.errors import ConfigError, DataError

REAL = Path(__file__).parents[3] / "shared" / "data"
FILE = {"file_name": "a.json"}
PAIRS = [{"prompt": f"p{n}", "chosen": "good", "rejected": "bad"} for n in range(4)]


@pytest.fixture
def two(tmp_path):
    """A registry of `a`, 6 rows, and `b`, 20 rows."""
    make_file(tmp_path, "a.json", alpaca(6, "a"))
    make_file(tmp_path, "b.json", alpaca(20, "b"))
    return make_registry(tmp_path, a=FILE, b={"file_name": "b.json"})


# What each source gives


# workflow: D4
def test_max_samples_are_the_first_rows_of_each_source(two):
    assert asked(gather(two, "a,b", max_samples=5).train) == [f"{name}{n}" for name in "ab" for n in range(5)]
    assert len(gather(two, "a,b", max_samples=10).train) == 16


# workflow: D5
def test_the_system_prompt_is_one_for_all_or_one_for_each(two):
    def said(prompt):
        return [
            example["messages"][0]["content"]
            for example in gather(two, "a,b", max_samples=1, system_prompt=prompt).train
        ]

    assert said("Be brief.") == ["Be brief."] * 2
    assert said("Be brief.|Rhyme.") == said(["Be brief.", "Rhyme."]) == ["Be brief.", "Rhyme."]
    assert gather(two, "a", system_prompt="yes|no").train[0]["messages"][0]["content"] == "yes|no"


# workflow: A3 D5
def test_another_number_of_system_prompts_is_an_error(two):
    with pytest.raises(ConfigError, match=r"system_prompt: 3 are given for 2 datasets\. Give one, or one for each of"):
        gather(two, "a,b", system_prompt="x|y|z")


# workflow: D5
def test_each_source_is_read_in_its_own_format(tmp_path):
    make_file(tmp_path, "a.json", [{"q": "hi", "a": "hello"}])
    make_file(tmp_path, "b.json", [{"conversations": [HI, HELLO]}])
    path = make_file(tmp_path, "c.jsonl", [{"messages": [HI, HELLO]}])
    columns = {"prompt": "q", "response": "a"}
    make_registry(tmp_path, a={**FILE, "columns": columns}, b={"file_name": "b.json", "formatting": "sharegpt"})
    found = gather(tmp_path, ["a", "b", path], columns={"messages": "messages"})
    assert [example["messages"] for example in found.train] == [[HI, HELLO]] * 3
    assert "format and columns are for files and Hub ids" in found.report.notes[3]


@pytest.mark.parametrize(
    ("num_samples", "max_samples", "number"), [(4, None, 4), (15, None, 15), (15, 8, 8), (6, None, 6)]
)
def test_num_samples_draws_or_repeats_by_the_seed(tmp_path, num_samples, max_samples, number):
    make_file(tmp_path, "a.json", alpaca(6))
    make_registry(tmp_path, a={**FILE, "num_samples": num_samples})
    found = asked(gather(tmp_path, "a", max_samples=max_samples).train)
    counts = [found.count(f"row{n}") for n in range(6)]
    assert (sum(counts), max(counts) - min(counts) <= 1) == (number, True)
    assert found == asked(gather(tmp_path, "a", max_samples=max_samples).train)
    others = {tuple(asked(gather(tmp_path, "a", max_samples=max_samples, seed=seed).train)) for seed in range(9)}
    assert (len(others) > 1) == (number % 6 > 0)


# Mixing


# workflow: D6
def test_one_dataset_is_returned_as_it_is_and_concat_joins_in_order(two):
    assert asked(gather(two, "a", mix_strategy="interleave_under").train) == [f"a{n}" for n in range(6)]
    assert asked(gather(two, ["b", "a"]).train) == [f"b{n}" for n in range(20)] + [f"a{n}" for n in range(6)]


# workflow: D6
def test_interleave_under_ends_with_the_first_and_repeats_no_row(two):
    found = asked(gather(two, "a,b", mix_strategy="interleave_under").train)
    assert len(set(found)) == len(found) < 26
    assert found[-1] in ("a5", "b19")
    assert [row for row in found if row[0] == "b"] == [f"b{n}" for n in range(sum(row[0] == "b" for row in found))]


# workflow: D6
def test_interleave_over_ends_when_all_have_come_and_repeats_the_short_ones(two):
    found = asked(gather(two, "a,b", mix_strategy="interleave_over").train)
    assert len(set(found)) == 26
    assert found.count("a0") > 1
    assert found.count("b19") == 1


# workflow: D6
@pytest.mark.parametrize("probs", ["0.8,0.2", [0.8, 0.2]])
def test_rows_are_drawn_by_their_probabilities_and_the_seed(tmp_path, probs):
    make_file(tmp_path, "a.json", alpaca(3000, "a"))
    make_file(tmp_path, "b.json", alpaca(3000, "b"))
    make_registry(tmp_path, a=FILE, b={"file_name": "b.json"})
    options = {"mix_strategy": "interleave_under", "interleave_probs": probs}
    found = asked(gather(tmp_path, "a,b", **options).train)
    assert sum(row[0] == "a" for row in found) / len(found) == pytest.approx(0.8, abs=0.02)
    assert found == asked(gather(tmp_path, "a,b", **options).train)
    assert found != asked(gather(tmp_path, "a,b", seed=1, **options).train)


# workflow: D6
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix_strategy": "shuffle"}, r"unknown strategy 'shuffle'\. Known: concat, interleave_under, "),
        ({"interleave_probs": "0.5,0.5"}, r"interleave_probs needs mix_strategy: interleave_under"),
        ({"mix_strategy": "interleave_over", "interleave_probs": "1"}, r"interleave_probs: 1 given for 2 datasets"),
        ({"mix_strategy": "interleave_over", "interleave_probs": [0.3, 0.3]}, r"add up to 0\.6\. Give shares"),
        ({"mix_strategy": "interleave_over", "interleave_probs": [1.5, -0.5]}, r"Give shares that add up to 1"),
        ({"mix_strategy": "interleave_over", "interleave_probs": "a,b"}, r"expected numbers such as 0\.3,0\.7, got"),
    ],
)  # fmt: skip
def test_a_mixture_that_cannot_be_drawn_is_an_error(two, options, message):
    with pytest.raises(ConfigError, match=message):
        gather(two, "a,b", **options)


def test_a_dataset_with_nothing_left_cannot_be_interleaved(tmp_path):
    make_file(tmp_path, "a.json", alpaca(2, output=""))
    make_file(tmp_path, "b.json", alpaca(2))
    make_registry(tmp_path, a=FILE, b={"file_name": "b.json"})
    with pytest.raises(DataError, match="dataset a has no row left to draw from"):
        gather(tmp_path, "a,b", mix_strategy="interleave_over", on_bad_row="skip")


# What is held out


# workflow: R5
@pytest.mark.parametrize(("val_size", "number"), [(1, 1), (1.0, 1), (3, 3), (0.25, 6), (0.001, 1)])
def test_val_size_holds_out_a_share_or_a_count_of_all_sources(two, val_size, number):
    found = gather(two, "a,b", val_size=val_size)
    train, held_out = asked(found.train), asked(found.evaluation[""])
    assert (len(train), len(held_out)) == (26 - number, number)
    assert not set(train) & set(held_out)
    assert held_out == asked(gather(two, "a,b", val_size=val_size).evaluation[""])
    assert number < 6 or held_out != asked(gather(two, "a,b", val_size=val_size, seed=7).evaluation[""])


# workflow: R5
def test_without_val_size_all_is_trained_on(two):
    found = gather(two, "a,b")
    assert (len(found.train), found.evaluation) == (26, {})


def test_a_row_that_is_repeated_never_stands_on_both_sides(tmp_path):
    make_file(tmp_path, "a.json", alpaca(6, "a"))
    make_file(tmp_path, "b.json", alpaca(40, "b"))
    make_registry(tmp_path, a={**FILE, "num_samples": 30}, b={"file_name": "b.json"})
    found = gather(tmp_path, "a,b", val_size=0.5, mix_strategy="interleave_over")
    assert not set(asked(found.train)) & set(asked(found.evaluation[""]))
    assert len(set(asked(found.train)) | set(asked(found.evaluation[""]))) == 46


# workflow: R5
def test_evaluation_alone_is_of_eval_dataset_or_else_of_what_is_held_out_or_all(two):
    assert asked(gather(two, "b", eval_dataset="a", held_out_only=True).evaluation[""]) == [f"a{n}" for n in range(6)]
    assert len(gather(two, "b", held_out_only=True).evaluation[""]) == 20
    some = gather(two, "b", val_size=4, held_out_only=True)
    assert asked(some.evaluation[""]) == asked(gather(two, "b", val_size=4).evaluation[""])
    assert (some.train, some.report.read) == ([], 0)
    drawn = {"mix_strategy": "interleave_under", "interleave_probs": "0.6,0.4"}  # which are of the training data
    assert len(gather(two, "a,b", eval_dataset="a", held_out_only=True, **drawn).evaluation[""]) == 6


def test_several_evaluation_sets_are_one_or_one_each(two, tmp_path):
    path = make_file(tmp_path, "more/a.json", alpaca(2, "c"))
    names = ["a", path, "b"]
    joined = gather(two, "a", eval_dataset=names)
    assert {name: len(rows) for name, rows in joined.evaluation.items()} == {"": 28}
    assert joined.evaluation_reports[""].read == 28
    each = gather(two, "a", eval_dataset=names, eval_on_each_dataset=True)
    assert {name: len(rows) for name, rows in each.evaluation.items()} == {"a": 6, "a_2": 2, "b": 20}
    assert {name: report.read for name, report in each.evaluation_reports.items()} == {"a": 6, "a_2": 2, "b": 20}
    assert list(gather(two, "b", eval_dataset="a", eval_on_each_dataset=True).evaluation) == [""]


def test_what_is_held_out_of_several_can_be_evaluated_apart(two):
    found = gather(two, "a,b", val_size=13, eval_on_each_dataset=True)
    assert list(found.evaluation) == ["a", "b"]
    assert sum(map(len, found.evaluation.values())) == 13
    assert all(row[0] == name for name, rows in found.evaluation.items() for row in asked(rows))


# reliability: 46
def test_held_out_rows_that_are_trained_on_and_repeated_rows_are_noted(two, tmp_path):
    make_file(tmp_path, "c.json", alpaca(3, "a") + alpaca(3, "a"))
    make_registry(tmp_path, a=FILE, c={"file_name": "c.json"})
    found = gather(tmp_path, "c", eval_dataset="a")
    assert "3 of 6 examples repeat an earlier one word for word (kept)" in found.report.notes
    assert "3 of 6 held-out examples also stand in the training data" in found.evaluation_reports[""].notes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_size": 1, "eval_dataset": "a"}, "eval_dataset and val_size both say what is held out"),
        ({"names": None}, r"dataset is missing\. Name it: a file"),
        ({"names": None, "held_out_only": True}, r"eval_dataset is missing\. Name the held-out examples: a file"),
    ],
)
def test_options_that_do_not_fit_are_an_error(two, options, message):
    with pytest.raises(ConfigError, match=message):
        gather(two, options.pop("names", "a"), **options)


# workflow: R5
@pytest.mark.parametrize(("val_size", "error"), [(26, DataError), (100, DataError), (1.5, ConfigError)])
def test_a_val_size_that_leaves_nothing_or_is_no_number_of_rows_is_an_error(two, val_size, error):
    with pytest.raises(error, match="val_size: "):
        gather(two, "a,b", val_size=val_size)


# reliability: 48
def test_an_evaluation_set_without_rows_is_an_error(two, tmp_path):
    path = make_file(tmp_path, "empty.jsonl", [])
    with pytest.raises(DataError, match=r"empty\.jsonl is empty: it holds no rows"):
        gather(two, "a", eval_dataset=path)


# Stages


# workflow: V5
def test_a_ranking_is_for_stage_rm_alone_and_stage_rm_for_rankings(tmp_path):
    make_file(tmp_path, "a.json", PAIRS)
    make_file(tmp_path, "b.json", alpaca(2))
    ranking = {**FILE, "ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}}
    make_registry(tmp_path, pairs=ranking, plain={"file_name": "b.json"})
    found = gather(tmp_path, "pairs", stage="rm", val_size=1)
    assert (len(found.train), len(found.evaluation[""])) == (3, 1)
    assert found.train[0].keys() == {"prompt", "chosen", "rejected", "source", "line"}
    for stage in ("sft", "pt"):
        with pytest.raises(ConfigError, match=rf"dataset pairs is a ranking .* only stage rm trains on, not {stage}"):
            gather(tmp_path, "pairs", stage=stage)
    with pytest.raises(ConfigError, match=r"dataset plain is no ranking: stage rm compares .* ranking: true"):
        gather(tmp_path, "plain", stage="rm")
    with pytest.raises(ConfigError, match=r"dataset plain is no ranking"):
        gather(tmp_path, "pairs", eval_dataset="plain", stage="rm")


# workflow: V5
def test_a_file_of_the_wrong_kind_for_its_stage_is_an_error(tmp_path):
    pairs, plain = make_file(tmp_path, "a.jsonl", PAIRS), make_file(tmp_path, "b.jsonl", alpaca(2))
    assert len(gather(tmp_path, pairs, stage="rm").train) == 4
    with pytest.raises(DataError, match=r"a\.jsonl:1: .*these are preference pairs, and stage sft"):
        gather(tmp_path, pairs)
    with pytest.raises(DataError, match=r"b\.jsonl:1: stage rm compares two answers"):
        gather(tmp_path, plain, stage="rm")
    with pytest.raises(DataError, match=r"a\.jsonl:1: stage sft does not compare answers.*Set stage: rm"):
        gather(tmp_path, pairs, format="preference")


# workflow: P6
def test_the_oldest_rankings_have_a_list_of_two_answers(tmp_path):
    make_file(tmp_path, "a.json", [{"q": "hi", "a": ["hello", "bye"]}, {"q": "hi", "a": ["hello"]}])
    columns = {"prompt": "q", "response": "a"}
    make_registry(tmp_path, old={**FILE, "ranking": True, "columns": columns})
    found = gather(tmp_path, "old", stage="rm", on_bad_row="skip")
    assert [example["rejected"][0]["content"] for example in found.train] == ["bye"]
    assert [(problem.line, problem.reason) for problem in found.report.drops] == [(2, "one-answer")]


# workflow: P2
def test_stage_pt_learns_a_column_of_text_and_no_answers(tmp_path):
    make_file(tmp_path, "a.json", [{"body": "Once."}, {"body": " "}])
    make_file(tmp_path, "b.json", alpaca(1, input="more"))
    text = make_file(tmp_path, "c.jsonl", [{"text": "x"}])
    chat = make_file(tmp_path, "d.jsonl", [{"messages": [HI, HELLO]}])
    make_registry(tmp_path, a={**FILE, "columns": {"prompt": "body"}}, b={"file_name": "b.json"})
    found = gather(tmp_path, ["a", "b", text], stage="pt", on_bad_row="skip")
    assert [example["text"] for example in found.train] == ["Once.", "row0\nmore", "x"]
    assert [problem.reason for problem in found.report.drops] == ["empty-text"]
    assert "b: stage pt learns the prompts; the answers are not read" in found.report.notes
    with pytest.raises(DataError, match="stage pt learns plain text, and these rows are messages"):
        gather(tmp_path, chat, stage="pt")


def test_a_dataset_without_answers_or_with_marks_is_not_for_stage_sft(tmp_path):
    make_file(tmp_path, "a.json", [{"text": "Once."}])
    columns = {"prompt": "text"}
    make_registry(tmp_path, a={**FILE, "columns": columns}, k={**FILE, "columns": columns | {"kto_tag": "label"}})
    with pytest.raises(ConfigError, match=r"dataset a has no answers: .* names columns, but no response.*stage: pt"):
        gather(tmp_path, "a")
    with pytest.raises(ConfigError, match=r"dataset k marks single answers as good or bad \(kto_tag"):
        gather(tmp_path, "k")
    assert asked(gather(tmp_path, "a", held_out_only=True, answers_needed=False).evaluation[""]) == ["Once."]


# workflow: P2
def test_rows_without_an_answer_are_for_prediction_and_not_for_training(tmp_path):
    path = make_file(
        tmp_path, "a.jsonl", [*alpaca(2), {"instruction": "only asked"}, {"instruction": "x", "output": ""}]
    )
    found = gather(tmp_path, path, on_bad_row="skip")
    assert (len(found.train), found.report.read) == (2, 4)
    assert [(problem.line, problem.reason) for problem in found.report.drops] == [
        (3, "missing-column"),
        (4, "empty-answer"),
    ]
    with pytest.raises(DataError, match=r"a\.jsonl:3: there is no column 'output'"):
        gather(tmp_path, path)
    prompts = gather(tmp_path, path, held_out_only=True, answers_needed=False).evaluation[""]
    assert [len(example["messages"]) for example in prompts] == [2, 2, 1, 1]


def test_a_text_field_names_the_column_of_text(tmp_path):
    path = make_file(tmp_path, "a.jsonl", [{"body": "Once.", "text": "no"}])
    wrong = make_file(tmp_path, "b.jsonl", [{"text": "Once."}])
    from tunesmith.config import DataConfig
    from tunesmith.data.collect import collect

    assert collect(DataConfig(dataset=path), text_field="body").train[0]["text"] == "Once."
    with pytest.raises(DataError, match="dataset_text_field names the column 'body', but the row has text"):
        collect(DataConfig(dataset=wrong), text_field="body")


# Every row is accounted for


BAD = [{"instruction": "x", "output": ""}, {"instruction": "", "output": "y"}]


# workflow: P2 R5
@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_counts_of_every_source_add_up(tmp_path, data):
    sizes = data.draw(st.lists(st.tuples(st.integers(9, 12), st.integers(0, 3)), min_size=1, max_size=3))
    entries = {}
    for index, (good, bad) in enumerate(sizes):
        rows = alpaca(good, f"s{index}r") + BAD[:1] * bad
        random.Random(index).shuffle(rows)
        make_file(tmp_path, f"{index}.json", rows)
        wanted = data.draw(st.none() | st.integers(3, 30))
        entries[f"s{index}"] = {"file_name": f"{index}.json"} | ({"num_samples": wanted} if wanted else {})
    make_registry(tmp_path, **entries)
    strategy = data.draw(st.sampled_from(["concat", "interleave_under", "interleave_over"]))
    val_size = data.draw(st.sampled_from([0, 1, 0.2]))
    found = gather(tmp_path, list(entries), mix_strategy=strategy, val_size=val_size, on_bad_row="skip")
    held_out = found.evaluation.get("", [])
    for count, (good, bad) in zip(found.counts, sizes):
        assert count.read == good + bad
        assert count.dropped == bad
        assert count.read + count.repeated == count.dropped + count.held_out + count.left_out + count.trained
        assert all(number >= 0 for number in count[1:])
    assert sum(count.trained for count in found.counts) == len(found.train)
    assert sum(count.held_out for count in found.counts) == len(held_out)
    assert found.report.read == len(found.train) + found.report.num_dropped
    assert not set(asked(found.train)) & set(asked(held_out))


def test_the_report_says_what_each_source_gives(two):
    notes = gather(two, "a,b", val_size=6, mix_strategy="interleave_over", interleave_probs="0.5,0.5").report.notes
    assert notes[:2] == [f"{name}: format: alpaca (columns instruction, output)" for name in "ab"]
    assert notes[2].startswith("a: 6 rows read, ")
    assert " held out, " in notes[2]
    assert " repeated: " in notes[2]
    assert notes[3].startswith("b: 20 rows read, ")


def test_real_alpacas_mix_and_split():
    if not (REAL / "dataset_info.json").is_file():
        pytest.skip("dataset_info.json is not in ../shared/data")
    found = gather(REAL, "alpaca_en_demo,alpaca_zh_demo", val_size=0.1, mix_strategy="interleave_under")
    counts = {count.name: count for count in found.counts}
    assert sum(count.read for count in found.counts) == 1999
    assert len(found.evaluation[""]) == 200
    assert counts["alpaca_en_demo"].left_out == 0 or counts["alpaca_zh_demo"].left_out == 0
