"""BLEU and ROUGE equal nltk's and rouge_chinese's, value for value, and long texts take neither time nor stack."""

import sys
import time
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunesmith.errors import ConfigError
from tunesmith.evaluate.metrics import bleu_rouge
from tunesmith.evaluate.similarity import bleu_4, common_length, rouge, rouge_words, words

SIGNS = "abcT tc#C+&A.1%9_-é,\n\r\u3000\u00a0\x1c你好世界的。！？”’…，"
TEXTS = st.text(st.sampled_from(SIGNS), max_size=40) | st.text(max_size=40)
PAIRS = [
    ("今天天气很好。", "今天天气不错，适合出门。"),
    ("自然语言处理是人工智能的一个分支！它研究语言。", "自然语言处理是人工智能的分支？它研究人类语言……很有趣"),
    (
        "保持健康的三个提示。\n\n1. 保持身体活动。",
        "以下是保持健康的三个提示：\n\n1. 保持身体活动。每天做适当的身体运动",
    ),
    ("The answer is 42.", "The answer is 41.5%, I think."),
    ("AT&T uses C++ and c# 3.14%", "at&t uses C# and C++"),
    ("“好。”他说。……走吧", "“好！”她说。“走吧。”"),
    ("a", "a"),
    ("ab", "ab"),
    ("的", "的"),
    ("", "你好"),
    ("你好", ""),
    ("", ""),
    (" \n ", " "),
    ("。\n 。", "。 \n。"),
]


def jieba_words(text):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba's own source has escapes that Python 3.12 warns of
        jieba = pytest.importorskip("jieba")
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text))


def reference_scores(prediction, reference):
    """The contract's lines, with the packages that they name."""
    rouge_chinese = pytest.importorskip("rouge_chinese")
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    hypothesis, expected = jieba_words(prediction), jieba_words(reference)
    if not " ".join(hypothesis).split() or not " ".join(expected).split():
        found = {"rouge-1": {"f": 0.0}, "rouge-2": {"f": 0.0}, "rouge-l": {"f": 0.0}}
    else:
        found = rouge_chinese.Rouge().get_scores(" ".join(hypothesis), " ".join(expected))[0]
    smoothing = bleu.SmoothingFunction().method3
    score = bleu.sentence_bleu([list(reference)], list(prediction), smoothing_function=smoothing)
    return {name: found[name]["f"] for name in ("rouge-1", "rouge-2", "rouge-l")} | {"bleu-4": score}


def our_scores(prediction, reference):
    pytest.importorskip("jieba")
    return rouge(words(prediction), words(reference)) | {"bleu-4": bleu_4(prediction, reference)}


# workflow: R6
@pytest.mark.parametrize(("prediction", "reference"), PAIRS)
def test_scores_equal_those_of_nltk_and_rouge_chinese(prediction, reference):
    assert our_scores(prediction, reference) == reference_scores(prediction, reference)


# workflow: R6
@given(TEXTS, TEXTS)
def test_scores_of_any_two_texts_equal_those_of_nltk_and_rouge_chinese(prediction, reference):
    assert our_scores(prediction, reference) == reference_scores(prediction, reference)


# workflow: R6
@given(st.text(st.sampled_from("aATtcC#+&.1%9_- ,\n\ré🙂あ"), max_size=30) | st.text(max_size=30))
def test_words_are_those_of_jieba(text):
    assert words(text) == jieba_words(text)


def test_without_jieba_only_chinese_text_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    assert words("it is 3.14% C++, é") == ["it", " ", "is", " ", "3.14%", " ", "C++", ",", " ", "é"]
    with pytest.raises(ConfigError, match=r"tunesmith\[metrics\]"):
        words("你好")


# workflow: R6
def test_equal_texts_score_100_and_empty_predictions_0():
    pytest.importorskip("jieba")
    texts = ["今天天气很好，我们出门。", "The answer is 42."]
    assert set(bleu_rouge(texts, texts).values()) == {100.0}
    assert set(bleu_rouge(["", " "], texts).values()) == {0.0}
    assert set(bleu_rouge(["", ""], ["", ""]).values()) == {0.0}
    assert set(bleu_rouge([], []).values()) == {0.0}


# workflow: R6
def test_the_figures_are_means_of_the_rows_in_percent():
    found = bleu_rouge(["a cat sat", "the cat sat"], ["the cat sat"] * 2)
    assert found == {"rouge-1": 83.3333, "rouge-2": 75.0, "rouge-l": 83.3333, "bleu-4": 84.5654}


# workflow: R6
def test_texts_of_20000_characters_take_neither_stack_nor_time():
    texts = [" ".join(f"{number % step}" for number in range(10_000))[:20_000] for step in (97, 89)]
    began = time.monotonic()
    found = bleu_rouge(texts[:1], texts[1:])
    assert 0 < found["rouge-l"] < 100
    assert time.monotonic() - began < 5


@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_the_common_length_is_that_of_the_table(one, other):
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    assert common_length(one, other) == table[-1][-1]


def test_words_are_parted_at_sentence_ends_as_rouge_chinese_does():
    assert rouge_words(["好", "。", "”", "走"]) == ["好", "。", "”", "走"]
    assert rouge_words(["......a"]) == ["......", "a"]
    assert rouge_words([" ", "\n", "a"]) == ["", "a"]
