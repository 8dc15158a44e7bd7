"""METRICS: how well predicted texts match the expected ones; name → function(predictions, references) → figures.

Figures are 0 to 100. An empty prediction scores 0, and so does an empty list.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from statistics import fmean
from typing import Any

from tunesmith.errors import ConfigError
from tunesmith.evaluate.similarity import HAN, bleu_4, rouge, words
from tunesmith.lookup import lookup

Metric = Callable[[Sequence[str], Sequence[str]], dict[str, float]]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that equal their reference, spaces around both ignored.

    >>> exact_match(["4 ", "5"], ["4", "6"])
    {'exact_match': 50.0}
    """
    pairs = zip(predictions, references, strict=True)
    return {"exact_match": percent([prediction.strip() == reference.strip() for prediction, reference in pairs])}


def json_exact_match(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Percent of predictions that are the same JSON value as their reference, and percent that are JSON at all.

    Spaces and the order of keys do not count; types do: `1`, `1.0`, `true` and `"1"` are four values. Invalid JSON is
    wrong, also where the reference itself is invalid.

    >>> json_exact_match(['{"b": 2, "a": 1}', "{'a': 1}"], ['{"a": 1, "b": 2}', '{"a": 1}'])
    {'json_exact_match': 50.0, 'json_valid': 50.0}
    """
    parsed = [
        (_parse(prediction), _parse(reference)) for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {
        "json_exact_match": percent(
            [prediction is not None and prediction == reference for prediction, reference in parsed]
        ),
        "json_valid": percent([prediction is not None for prediction, _ in parsed]),
    }


def percent(hits: Sequence[bool]) -> float:
    """Share of hits as 0–100, rounded to two places; 0 for none at all."""
    return round(100 * sum(hits) / len(hits), 2) if hits else 0.0


def _parse(text: str) -> str | None:
    """A canonical spelling of the JSON value, or None. Spelled out because Python holds `1 == 1.0 == True`."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# ---- likeness ------------------------------------------------------------------------------------------------------


def bleu_rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU-4 of characters and ROUGE of words, as LLaMA-Factory reports them: means over the rows.

    Words are jieba's, ROUGE is rouge_chinese's definition, BLEU nltk's with its third smoothing (`similarity`).

    >>> bleu_rouge(["a cat sat"], ["the cat sat"])
    {'rouge-1': 66.6667, 'rouge-2': 50.0, 'rouge-l': 66.6667, 'bleu-4': 69.1309}
    """
    rows = []
    for prediction, reference in zip(predictions, references, strict=True):
        scores = rouge(words(prediction), words(reference))
        rows.append({**scores, "bleu-4": bleu_4(prediction, reference)})
    names = ("rouge-1", "rouge-2", "rouge-l", "bleu-4")
    return {name: mean([round(100 * row[name], 4) for row in rows]) for name in names}


def token_f1(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of the words that prediction and reference share, however they stand, as SQuAD scores answers; upper and
    lower case and spaces do not count.

    >>> token_f1(["Paris, France"], ["in Paris"])
    {'token_f1': 40.0}
    """
    scores = []
    for prediction, reference in zip(predictions, references, strict=True):
        found, expected = (Counter(word for word in words(t.lower()) if word.strip()) for t in (prediction, reference))
        shared = (found & expected).total()
        scores.append(200 * shared / (found.total() + expected.total()) if shared else 0.0)
    return {"token_f1": mean(scores)}


def sacrebleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU of the whole set as sacrebleu counts it (Post 2018, arXiv:1804.08771), the figure that papers report.

    References that are mostly Chinese are cut by its `zh` tokenizer, others by `13a`.
    """
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        return {"sacrebleu": 0.0}
    require("sacrebleu", "sacrebleu")
    from sacrebleu.metrics import BLEU

    text = "".join(references)
    tokenize = "zh" if 2 * len(HAN.findall(text)) > len("".join(text.split())) else "13a"
    return {"sacrebleu": round(BLEU(tokenize=tokenize).corpus_score(predictions, [references]).score, 4)}


def rouge_score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F-measures of the rouge-score package, the one that English papers report: means over the rows.

    Its own tokenizer knows ASCII letters only, so rows with Chinese are cut as in `bleu_rouge`.
    """
    names = ("rouge1", "rouge2", "rougeL")
    pairs = list(zip(predictions, references, strict=True))
    if not pairs:
        return dict.fromkeys(names, 0.0)
    require("rouge", "rouge_score")
    from rouge_score.rouge_scorer import RougeScorer

    scorers = {False: RougeScorer(list(names)), True: RougeScorer(list(names), tokenizer=_ChineseWords())}
    rows = [scorers[bool(HAN.search(a + b))].score(target=b, prediction=a) for a, b in pairs]
    return {name: mean([100 * row[name].fmeasure for row in rows]) for name in names}


class _ChineseWords:
    """Words in the form that rouge-score asks for."""

    def tokenize(self, text: str) -> list[str]:
        return [word for word in words(text.lower()) if word.strip()]


def mean(scores: Sequence[float]) -> float:
    """Rounded to four places; 0 for none at all."""
    return round(fmean(scores), 4) if scores else 0.0


def require(metric: str, package: str) -> None:
    """Raise ConfigError if a metric's package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"metrics: {metric} needs another package. Install it: pip install 'tunesmith[metrics]'.")


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "json_exact_match": json_exact_match,
    "bleu_rouge": bleu_rouge,
    "token_f1": token_f1,
    "sacrebleu": sacrebleu,
    "rouge": rouge_score,
}
PERCENTAGES = frozenset(  # figures shown with a percent sign
    {"exact_match", "json_exact_match", "json_valid", "token_f1"}
    | {"rouge-1", "rouge-2", "rouge-l", "bleu-4", "sacrebleu", "rouge1", "rouge2", "rougeL"}
)
PACKAGES = {"sacrebleu": "sacrebleu", "rouge": "rouge_score"}  # metric → what it cannot do without


# ---- several at once -----------------------------------------------------------------------------------------------


def metrics_for(
    names: str | Sequence[str] | Metric | None, default: str | Sequence[str], references: Iterable[str] = ()
) -> Metric:
    """One metric that gives the figures of all that are named.

    Args:
        names: names in `METRICS`, or `file.py:function`; several as a list or separated by commas; or a function.
        default: what `None` or an empty list stands for.
        references: expected texts, if they are known already: what they need is then missed here, and not after
            hours of generation.

    Raises: ConfigError for an unknown name or a package that is not installed; and from the metric itself for two
        figures of one name, or figures that are no numbers.
    """
    if callable(names):
        return _joined({"metric": names})
    names = names or default
    names = names.split(",") if isinstance(names, str) else list(names)
    found: dict[str, Metric] = {name.strip(): lookup(METRICS, name.strip(), "metric") for name in names}
    for name in found:
        if name in PACKAGES:
            require(name, PACKAGES[name])
    if found.keys() & {"bleu_rouge", "token_f1", "rouge"}:
        words(next((text for text in references if HAN.search(text)), ""))
    return _joined(found)


def _joined(metrics: Mapping[str, Metric]) -> Metric:
    def score(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, metric in metrics.items():
            found = checked_figures(name, metric(predictions, references))
            if twice := sorted(found.keys() & figures.keys()):
                raise ConfigError(f"metrics: two of {', '.join(metrics)} give a figure named '{twice[0]}'. Drop one.")
            figures |= found
        return figures

    return score


def checked_figures(name: str, found: Any) -> dict[str, float]:
    """The figures of a person's metric.

    Raises: ConfigError for anything but a dict of names and numbers.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"metrics: {name}: expected a dict such as {{'score': 0.5}} from (predictions, references), got {found!r}."
        )
    for key, value in found.items():
        if not isinstance(key, str) or not (isinstance(value, Real) or getattr(value, "ndim", None) == 0):
            raise ConfigError(f"metrics: {name}: expected names and numbers, got {key!r}: {value!r}.")
    return {key: float(value) for key, value in found.items()}
