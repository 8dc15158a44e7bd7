"""Metrics: percent of right answers, with no credit for nearly right ones."""

import pytest

from tunesmith.errors import ConfigError
from tunesmith.evaluate.metrics import METRICS, exact_match, json_exact_match
from tunesmith.lookup import lookup


@pytest.mark.parametrize("name", sorted(METRICS))
def test_a_metric_is_100_for_equal_texts_0_for_empty_answers_and_0_for_no_rows(name):
    references = ['{"a": 1}', '{"b": [true, null]}']
    assert METRICS[name](references, references)[name] == 100
    assert METRICS[name](["", ""], references)[name] == 0
    assert METRICS[name]([], [])[name] == 0


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
