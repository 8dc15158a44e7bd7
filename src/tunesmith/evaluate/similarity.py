"""Two texts → how alike they are: words as jieba cuts them, BLEU-4 on characters, ROUGE as rouge_chinese defines it.

Written out here because the packages that define them recurse (rouge), keep an n × m table in a dict (rouge_chinese),
or bring in far more than these lines. Tests hold them against nltk 3 and rouge_chinese 1.0.3, value for value.
"""

import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from tunesmith.errors import ConfigError

HAN = re.compile("[\u4e00-\u9fd5]")  # what jieba takes for Chinese
_JIEBA_BLOCK = re.compile("([\u4e00-\u9fd5a-zA-Z0-9+#&._%\\-]+)")
_JIEBA_SPACE = re.compile(r"(\r\n|\s)")
_JIEBA_WORD = re.compile(r"([a-zA-Z0-9]+(?:\.\d+)?%?)")
_JIEBA_NAMES = re.compile(r"(AT&T|[cC]#|[cC]\+\+)")  # all words of its dictionary without a Chinese character
_SENTENCE_ENDS = (  # rouge_chinese's
    re.compile("([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile("(…{2})([^”’])"),
    re.compile("([。！？?][”’])([^，。！？?])"),
)


def words(text: str) -> list[str]:
    """The words and signs of a text, spaces among them, as `jieba.cut` gives them.

    Without a Chinese character the dictionary has no say, so jieba is not needed.

    Raises: ConfigError for Chinese text where jieba is not installed.
    """
    if not HAN.search(text):
        return list(_words_without_chinese(text))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its source has escapes that Python 3.12 warns of
            import jieba
    except ImportError as error:
        raise ConfigError(
            "jieba is not installed, and only it can cut Chinese text into words. "
            "Install it: pip install 'tunesmith[metrics]'."
        ) from error
    jieba.setLogLevel("WARNING")  # it says on stderr that it loads its dictionary
    return list(jieba.cut(text))


def _words_without_chinese(text: str) -> Iterator[str]:
    for place, block in enumerate(_JIEBA_BLOCK.split(text)):
        if place % 2 == 0:
            for part in _JIEBA_SPACE.split(block):
                yield from [part] if _JIEBA_SPACE.match(part) else part
            continue
        for number, piece in enumerate(_JIEBA_NAMES.split(block)):
            yield from [piece] if number % 2 else filter(None, _JIEBA_WORD.split(piece))


# ---- BLEU ----------------------------------------------------------------------------------------------------------


def bleu_4(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """Sentence BLEU of up to 4-grams, 0 to 1; an order without a match counts as 1 / (2^k · n-grams), k = 1, 2, ...

    Strings are compared by characters. It is nltk's `sentence_bleu` with `SmoothingFunction().method3`, which the
    contract takes; a text of fewer than four characters is therefore below 1 even against itself.
    Source: Papineni et al. 2002, "BLEU"; smoothing: Chen and Cherry 2014, method 3.
    """
    precisions, misses = [], 0
    for n in range(1, 5):
        found, expected = _ngrams(prediction, n), _ngrams(reference, n)
        matches, total = sum((found & expected).values()), max(1, found.total())
        if n == 1 and not matches:
            return 0.0
        misses += not matches
        precisions.append(matches / total if matches else 1 / (2**misses * total))
    brevity = 1.0
    if len(prediction) <= len(reference):
        brevity = math.exp(1 - len(reference) / len(prediction))
    return brevity * math.exp(math.fsum(0.25 * math.log(precision) for precision in precisions))


def _ngrams(text: Sequence[str], n: int) -> Counter:
    if isinstance(text, str):  # a slice says the same as a tuple of its characters
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))
    return Counter(zip(*(text[i:] for i in range(n))))


# ---- ROUGE ---------------------------------------------------------------------------------------------------------


def rouge(prediction: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """F-measures `rouge-1`, `rouge-2` and `rouge-l` of two lists of words, 0 to 1.

    As rouge_chinese has it: n-grams are counted once however often they occur, ROUGE-L compares whole texts, and a
    hair in the denominator keeps it from 0. A text of one word has no bigram, so its `rouge-2` is 0.
    """
    found, expected = rouge_words(prediction), rouge_words(reference)
    if not any(found) or not any(expected):
        return {"rouge-1": 0.0, "rouge-2": 0.0, "rouge-l": 0.0}
    scores = {}
    for n in (1, 2):
        mine, theirs = set(_ngrams(found, n)), set(_ngrams(expected, n))
        scores[f"rouge-{n}"] = _f_measure(len(mine & theirs), len(mine), len(theirs))
    return scores | {"rouge-l": _f_measure(common_length(found, expected), len(found), len(expected))}


def rouge_words(cut: Sequence[str]) -> list[str]:
    """The words that rouge_chinese compares: joined, parted again at sentence ends, an empty sentence as one word."""
    text = " ".join(cut)
    for end in _SENTENCE_ENDS:
        text = end.sub(r"\1\n\2", text)
    sentences = [sentence for sentence in text.rstrip().split("\n") if sentence]
    return list(chain.from_iterable(sentence.split() or [""] for sentence in sentences))


def common_length(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    A column of the usual table is one integer, a bit for each word of `one`, so 20,000 words against 20,000 take a
    fraction of a second. Source: Hyyrö 2004, "Bit-Parallel LCS-length Computation Revisited".
    """
    places: dict[str, int] = {}
    for place, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << place
    full = (1 << len(one)) - 1
    column = full  # a zero bit where the length grows
    for word in other:
        matches = column & places.get(word, 0)
        column = ((column + matches) | (column - matches)) & full
    return len(one) - column.bit_count()


def _f_measure(common: int, found: int, expected: int) -> float:
    precision, recall = (common / found if found else 0.0), (common / expected if expected else 0.0)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))
