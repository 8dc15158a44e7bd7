"""Rendered → input_ids, labels, weights: tokenized once, in batches; a token is trained iff it lies inside a span.

The ids are those of `tokenizer(text, add_special_tokens=False)`. Two kinds of rows are encoded in pieces: where the
text up to the edge of a span has other tokens when nothing follows (cut there, as generation sees it: prompt tokens,
then answer tokens), and where a person wrote what looks like a control token (that range is encoded as plain text).
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict
from weakref import WeakKeyDictionary

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.render import Rendered, Span, control_tokens
from tunesmith.data.rows import RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Put in front of a piece so that tokenizers which begin every text with a space do not begin the piece with one.
ANCHORS = ("\n", "a", ".", "1", "я")


class Tokens(TypedDict, total=False):
    """One document, or several laid end to end."""

    input_ids: list[int]
    labels: list[int]
    """The id where the token is trained, IGNORE_INDEX elsewhere. Not shifted. Behind an answer that the template ends
    with no stop token stands the stop token's id, whatever the text goes on with."""
    weights: list[float]
    """Factor of each token's loss; the key is there only if some trained span has a weight other than 1."""


class _Encoded(NamedTuple):
    ids: list[int]
    starts: list[int]
    """First character of each token in the text, leading white space included."""
    ends: list[int]


def tokenize(
    rendered: Sequence[Rendered],
    tokenizer: "PreTrainedTokenizerBase",
    on_change: Callable[[int, str], None] | None = None,
    on_error: Callable[[int, RowError], None] | None = None,
) -> list[Tokens]:
    """Ids and labels of a batch of rendered rows.

    Args:
        rendered: the rows; a few hundred at once use all cores.
        tokenizer: read, not changed. Without offsets (not fast) each span edge costs one more encoding.
        on_change: called with the row's index and "split-at-boundary" when prompt and answer had to be encoded apart.
        on_error: called for a row that cannot be labelled exactly; its result is then empty. `None`: the error is
            raised.

    Raises: RowError ("no-offsets", "no-clean-split", "control-token-in-content").
    """
    encoder = _encoder(tokenizer) if tokenizer.is_fast else None
    prefix, suffix = added_tokens(tokenizer)
    straight = iter(encoder.encode_texts([row.text for row in rendered if not row.literal]) if encoder else ())
    results: list[Tokens] = []
    for index, row in enumerate(rendered):
        try:
            if encoder is None:
                tokens = _by_prefixes(row, tokenizer)
            else:
                encoded = encoder.encode_pieces(row, []) if row.literal else next(straight)
                answers = [*row.spans, *row.untrained]
                cuts = _straddled(encoded, answers, encoder.control_ids) + encoder.read_ahead(row, answers, encoded)
                if cuts:
                    encoded = encoder.encode_pieces(row, cuts)
                    if on_change:
                        on_change(index, "split-at-boundary")
                tokens = _label(encoded, row.spans)
                _stop(tokens, encoded.starts, row, tokenizer)
            tokens = _begun(tokens, prefix) if row.add_bos else tokens
            results.append(_ended(tokens, suffix) if row.add_suffix else tokens)
        except RowError as error:
            if on_error is None:
                raise
            on_error(index, error)
            results.append({"input_ids": [], "labels": []})
    return results


def truncate(tokens: Tokens, max_length: int, side: Literal["right", "left"] = "right") -> Tokens:
    """The first `max_length` tokens, or the last, cut on the `side`.

    No stop token is added: a cut row must not teach the model to stop there. A cut on the left takes BOS, too.
    """
    kept = slice(max_length) if side == "right" else slice(-max_length, None)
    return {key: values[kept] for key, values in tokens.items()}


def _label(encoded: _Encoded, spans: Sequence[Span]) -> Tokens:
    ids, starts = encoded.ids, encoded.starts
    tokens: Tokens = {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}
    if any(span.weight != 1 for span in spans):
        tokens["weights"] = [1.0] * len(ids)
    for span in spans:
        # Several tokens may share a character; those of the span are the ones that start in it.
        first, stop = bisect_left(starts, span.start), bisect_left(starts, span.end)
        tokens["labels"][first:stop] = ids[first:stop]
        if "weights" in tokens:
            tokens["weights"][first:stop] = [span.weight] * (stop - first)
    return tokens


def _stop(tokens: Tokens, starts: list[int], row: Rendered, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Label the token behind an answer as the stop token, where the text has none there."""
    for edge, weight in row.stops:
        at = bisect_left(starts, edge)
        if tokens["labels"][at] == IGNORE_INDEX:
            tokens["labels"][at] = tokenizer.eos_token_id
            if "weights" in tokens:
                tokens["weights"][at] = weight


def _straddled(encoded: _Encoded, spans: Sequence[Span], control_ids: set[int]) -> list[int]:
    """Edges of spans that lie inside a token.

    A control token may reach over the end of its span: some (Phi-3's) swallow the white space behind them.
    """
    cuts = []
    for span in spans:
        for edge in (span.start, span.end):
            before = bisect_left(encoded.starts, edge) - 1
            if before < 0 or encoded.ends[before] <= edge:
                continue
            if edge == span.start or encoded.ids[before] not in control_ids:
                cuts.append(edge)
    return cuts


def _encoder(tokenizer: "PreTrainedTokenizerBase") -> "_Encoder":
    key = (len(tokenizer), control_tokens(tokenizer))
    cached = _ENCODERS.get(tokenizer)
    if cached is None or cached[0] != key:
        cached = _ENCODERS[tokenizer] = (key, _Encoder(tokenizer))
    return cached[1]


_ENCODERS: WeakKeyDictionary = WeakKeyDictionary()


class _Encoder:
    """A private copy of a fast tokenizer's backend, whose offsets are exact.

    A byte-level post-processor trims white space off the offsets, which hides that ` yes` straddles the edge before
    `yes`; the copy has none. (Post-processors otherwise only add special tokens, which the text already contains.)
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.control_ids = {tokenizer.convert_tokens_to_ids(token) for token in control_tokens(tokenizer)}
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.post_processor = None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = False
        alone, behind = self.encode_texts(["x", "\nx"])
        self.adds_prefix = behind.ids[bisect_left(behind.starts, 1) :] != alone.ids

    def encode_texts(self, texts: Sequence[str]) -> list[_Encoded]:
        """Each text as one piece."""
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [_Encoded(e.ids, [s for s, _ in o], [t for _, t in o]) for e in encodings for o in (e.offsets,)]

    def encode_pieces(self, row: Rendered, cuts: Sequence[int]) -> _Encoded:
        """The text cut at `cuts` and around its literal ranges, each piece as it continues the text before it."""
        edges = {0, len(row.text), *cuts, *(edge for literal in row.literal for edge in literal)}
        whole = _Encoded([], [], [])
        for start, end in pairwise(sorted(edges)):
            is_literal = any(begin <= start and end <= stop for begin, stop in row.literal)
            piece = self._encode_piece(row, start, end, is_literal)
            if is_literal and not self.control_ids.isdisjoint(piece.ids):
                raise RowError(
                    f"the tokenizer makes a control token of the plain text {row.text[start:end]!r}. Remove it from "
                    "the message.",
                    "control-token-in-content",
                )
            whole.ids.extend(piece.ids)
            whole.starts.extend(start + s for s in piece.starts)
            whole.ends.extend(start + e for e in piece.ends)
        if _straddled(whole, [Span(edge, edge) for edge in cuts], set()):
            raise _no_clean_split(row.text, cuts[0])
        return whole

    def read_ahead(self, row: Rendered, answers: Sequence[Span], encoded: _Encoded) -> list[int]:
        """Starts of spans before which the tokens are others than those of the same text without a continuation.

        GPT-2's pattern splits white space by what follows: two line breaks are one token, or two before a letter.
        """
        return [span.start for span in answers if span.start > 0 and self._reads_ahead(row, encoded, span.start)]

    def _reads_ahead(self, row: Rendered, encoded: _Encoded, edge: int) -> bool:
        stop = bisect_left(encoded.starts, edge)
        if row.literal:
            literal = [(start, min(end, edge)) for start, end in row.literal if start < edge]
            return self.encode_pieces(Rendered(row.text[:edge], [], literal), []).ids != encoded.ids[:stop]
        # Tokenizers cut the text at control tokens first, so what stands before the last of them plays no part.
        first = next((i for i in range(stop - 1, 0, -1) if encoded.ids[i] in self.control_ids), 0)
        begin = encoded.starts[first] if first else 0
        return self._encode(row.text[begin:edge], False).ids != encoded.ids[first:stop]

    def _encode_piece(self, row: Rendered, start: int, end: int, is_literal: bool) -> _Encoded:
        """Ids and offsets (from the piece's own start) of text[start:end]."""
        piece = row.text[start:end]
        if start == 0 or not self.adds_prefix:
            return self._encode(piece, is_literal)
        for anchor in ANCHORS:
            encoded = self._encode(anchor + piece, is_literal)
            first = bisect_left(encoded.starts, len(anchor))
            has_clean_edge = first == 0 or encoded.ends[first - 1] <= len(anchor)
            if has_clean_edge and not self._begins_with_added_space(encoded, first, piece):
                shift = len(anchor)
                return _Encoded(
                    encoded.ids[first:],
                    [s - shift for s in encoded.starts[first:]],
                    [e - shift for e in encoded.ends[first:]],
                )
        raise _no_clean_split(row.text, start)

    def _encode(self, text: str, is_literal: bool) -> _Encoded:
        self.backend.encode_special_tokens = is_literal
        try:
            return self.encode_texts([text])[0]
        finally:
            self.backend.encode_special_tokens = False

    def _begins_with_added_space(self, encoded: _Encoded, first: int, piece: str) -> bool:
        token = self.backend.id_to_token(encoded.ids[first]) if first < len(encoded.ids) else ""
        return token[:1] in ("▁", "Ġ") and piece[:1] not in (" ", token[:1])


def _no_clean_split(text: str, at: int) -> RowError:
    return RowError(
        f"the tokenizer joins the end of {text[max(at - 12, 0) : at]!r} with the beginning of {text[at : at + 12]!r} "
        "and cannot encode them apart. Put a line break between prompt and answer, or use a chat template that does.",
        "no-clean-split",
    )


def _by_prefixes(row: Rendered, tokenizer: "PreTrainedTokenizerBase") -> Tokens:
    """Labels without offsets: the ids up to each edge must be a beginning of all ids."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    ids = encode(row.text)
    counts = {}
    for edge in {edge for span in (*row.spans, *row.literal) for edge in span[:2]} | {edge for edge, _ in row.stops}:
        prefix = encode(row.text[:edge])
        if row.literal or ids[: len(prefix)] != prefix:
            raise RowError(
                f"{type(tokenizer).__name__} gives no offsets, and without them it cannot be told which tokens "
                f"write {row.text[edge : edge + 24]!r}. Use the model's fast tokenizer.",
                "no-offsets",
            )
        counts[edge] = len(prefix)
    spans = [Span(counts[span.start], counts[span.end], span.weight) for span in row.spans]
    places = list(range(len(ids)))
    tokens = _label(_Encoded(ids, places, []), spans)
    _stop(tokens, places, row._replace(stops=[(counts[edge], weight) for edge, weight in row.stops]), tokenizer)
    return tokens


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and behind every text."""
    bare = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    full = tokenizer("a", verbose=False)["input_ids"]
    begin = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), None)
    return ([], []) if begin is None else (full[:begin], full[begin + len(bare) :])


def _begun(tokens: Tokens, prefix: list[int]) -> Tokens:
    """The tokens behind `prefix`, which is not trained."""
    if not prefix or tokens["input_ids"][: len(prefix)] == prefix:
        return tokens
    front: Tokens = {"input_ids": prefix, "labels": [IGNORE_INDEX] * len(prefix), "weights": [1.0] * len(prefix)}
    return {key: front[key] + values for key, values in tokens.items()}


def _ended(tokens: Tokens, suffix: list[int]) -> Tokens:
    """The tokens before `suffix`, which is trained as the end of the text."""
    if not suffix or tokens["input_ids"][-len(suffix) :] == suffix:
        return tokens
    weight = tokens["weights"][-1:] if "weights" in tokens else [1.0]
    back: Tokens = {"input_ids": suffix, "labels": suffix, "weights": weight * len(suffix)}
    return {key: values + back[key] for key, values in tokens.items()}
