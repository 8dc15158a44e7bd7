"""Metrics: percent of right answers, with no credit for nearly right ones."""

import sys

import pytest

from tunesmith.errors import ConfigError
from tunesmith.evaluate.metrics import METRICS, PACKAGES, PERCENTAGES, exact_match, json_exact_match, metrics_for
from tunesmith.lookup import lookup


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_metric_is_100_for_equal_texts_0_for_empty_answers_and_0_for_no_rows(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    references = ['{"a": 1}', '{"b": [true, null]}']
    equal, empty, none = (METRICS[name](*pair) for pair in ((references,) * 2, (["", ""], references), ([], [])))
    assert equal.keys() == empty.keys() == none.keys() <= PERCENTAGES
    assert set(equal.values()) == {100}
    assert set(empty.values()) == set(none.values()) == {0}


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_metric_refuses_lists_of_unequal_length(name):
    with pytest.raises(ValueError, match="zip"):
        METRICS[name](["a"], ["a", "b"])


def test_exact_match_ignores_only_outer_spaces():
    assert exact_match([" 4\n", "a  b", "A"], ["4", "a b", "a"]) == {"exact_match": 33.33}


@pytest.mark.parametrize(
    ("prediction", "reference", "is_equal"),
    [
        ('{"b":2,"a":"x"}', '{"a": "x", "b": 2}', True),
        ("[1, 2]", "[2, 1]", False),
        ("1", "1.0", False),
        ("1", "true", False),
        ('{"a": 1}', '{"a": "1"}', False),
        ('"\\u00e9"', '"é"', True),
    ],
)
def test_json_compares_values_with_their_types(prediction, reference, is_equal):
    assert json_exact_match([prediction], [reference])["json_exact_match"] == 100 * is_equal


@pytest.mark.parametrize("text", ["", "{'a': 1}", "{", '{"a": 1} and more', "NaN", '{"a": 1, "a": 2}', "[" * 100_000])
def test_what_is_not_json_is_wrong_even_against_itself(text):
    assert json_exact_match([text], [text]) == {"json_exact_match": 0, "json_valid": 0}


def test_a_metric_can_come_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(predictions, references):\n    return {'length': len(predictions)}\n"
    )
    assert lookup(METRICS, f"{tmp_path}/mine.py:length", "metric")(["a"], ["b"]) == {"length": 1}
    with pytest.raises(ConfigError, match="Did you mean 'exact_match'"):
        lookup(METRICS, "exact_macth", "metric")


def test_several_metrics_give_the_figures_of_all():
    both = metrics_for(["exact_match", "token_f1"], "bleu_rouge")
    assert both(["4"], ["4"]) == metrics_for("exact_match, token_f1", "")(["4"], ["4"])
    assert both(["4 a"], ["4"]) == {"exact_match": 0.0, "token_f1": 66.6667}
    assert metrics_for(None, "exact_match")(["4"], ["4"]) == {"exact_match": 100.0}


# workflow: R4
def test_a_metric_of_ones_own_stands_beside_ours(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def length(predictions, references):\n    return {'length': len(predictions)}\n"
    )
    found = metrics_for([f"{tmp_path}/mine.py:length", "exact_match"], "")
    assert found(["a", "b"], ["a", "c"]) == {"length": 2.0, "exact_match": 50.0}
    assert metrics_for(lambda predictions, references: {"mine": 1}, "")([], []) == {"mine": 1.0}


@pytest.mark.parametrize(
    ("figures", "message"),
    [("{'exact_match': 1}", "figure named 'exact_match'"), ("0.5", "expected a dict"), ("{'a': 'b'}", "numbers")],
)
def test_figures_that_cannot_stand_beside_others_are_named(tmp_path, figures, message):
    (tmp_path / "mine.py").write_text(f"def mine(predictions, references):\n    return {figures}\n")
    with pytest.raises(ConfigError, match=message):
        metrics_for(["exact_match", f"{tmp_path}/mine.py:mine"], "")(["a"], ["a"])


def test_what_a_metric_lacks_is_missed_before_anything_is_answered(monkeypatch):
    for package in ("jieba", "sacrebleu"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"sacrebleu needs .* 'tunesmith\[metrics\]'"):
        metrics_for("sacrebleu", "")
    with pytest.raises(ConfigError, match=r"jieba .* 'tunesmith\[metrics\]'"):
        metrics_for("bleu_rouge", "", references=["hello", "你好"])
    metrics_for("bleu_rouge", "", references=["hello"])


def test_chinese_references_are_cut_into_characters_by_sacrebleu():
    bleu = pytest.importorskip("sacrebleu")
    predictions, references = ["今天天气很好。", "我们走吧"], ["今天天气不错。", "我们走吧"]
    expected = bleu.corpus_bleu(predictions, [references], tokenize="zh").score
    assert METRICS["sacrebleu"](predictions, references)["sacrebleu"] == pytest.approx(expected, abs=1e-4)
    expected = bleu.corpus_bleu(["a cat sat on it"], [["the cat sat on it"]]).score
    assert METRICS["sacrebleu"](["a cat sat on it"], ["the cat sat on it"])["sacrebleu"] == round(expected, 4)


def test_rouge_is_that_of_rouge_score_and_knows_chinese():
    pytest.importorskip("rouge_score")
    pytest.importorskip("jieba")
    found = METRICS["rouge"](["the cat was found under the bed"], ["the cat was under the bed"])
    assert found == {"rouge1": 92.3077, "rouge2": 72.7273, "rougeL": 92.3077}
    assert METRICS["rouge"](["今天天气很好"], ["今天天气很好"])["rougeL"] == 100
