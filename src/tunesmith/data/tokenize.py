"""Rendered → input_ids, labels, weights: tokenized once, in batches; a token is trained iff it lies inside a span.

The ids are those of `tokenizer(text, add_special_tokens=False)`. Two kinds of rows are encoded in pieces: where the
text up to the edge of a span has other tokens when nothing follows (cut there, as generation sees it: prompt tokens,
then answer tokens), and where a person wrote what looks like a control token (that range is encoded as plain text).
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, TypedDict
from weakref import WeakKeyDictionary

import numpy as np

from tunesmith.data import IGNORE_INDEX
from tunesmith.data.render import Rendered, Span, control_tokens
from tunesmith.data.rows import RowError

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Encoding, Tokenizer
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


class Encoded:
    """Ids of a text, and the characters that each stands for, leading white space included."""

    def __init__(self, ids: list[int], starts: Sequence[int] = (), ends: Sequence[int] = (), encoding: Any = None):
        self.ids, self._encoding = ids, encoding
        if encoding is None:
            self.starts, self.ends = starts, ends

    @classmethod
    def of(cls, encoding: "Encoding") -> "Encoded":
        """What the backend found; its offsets become lists only if they are asked for, which most rows never need."""
        return cls(encoding.ids, encoding=encoding)

    @cached_property
    def starts(self) -> Sequence[int]:
        """First character of each token."""
        return [start for start, _ in self._encoding.offsets]

    @cached_property
    def ends(self) -> Sequence[int]:
        """The character behind each token."""
        return [end for _, end in self._encoding.offsets]

    def first_from(self, edge: int) -> int:
        """Index of the first token that begins at character `edge` or behind it; their number if there is none."""
        index = None if self._encoding is None else self._begins_at(edge)
        return bisect_left(self.starts, edge) if index is None else index

    def span_of(self, index: int) -> tuple[int, int]:
        """The token's first character, and the one behind it."""
        if self._encoding is not None:
            return self._encoding.token_to_chars(index)
        return self.starts[index], self.ends[index]

    def _begins_at(self, edge: int) -> int | None:
        """`first_from` where a token begins at the edge, or the text ends there, and nothing is odd around it."""
        index = self._encoding.char_to_token(edge)
        is_end = index is None
        index = len(self.ids) if is_end else index
        before_start, before_end = self.span_of(index - 1) if index else (-1, edge)
        begins = before_end <= edge if is_end else self.span_of(index)[0] == edge
        return index if begins and before_start < edge else None


def tokenize(
    rendered: Sequence[Rendered],
    tokenizer: "PreTrainedTokenizerBase",
    on_change: Callable[[int, str], None] | None = None,
    on_error: Callable[[int, RowError], None] | None = None,
    straight: "Sequence[Encoding] | None" = None,
) -> list[Tokens]:
    """Ids and labels of a batch of rendered rows.

    Args:
        rendered: the rows; a few hundred at once use all cores.
        tokenizer: read, not changed. Without offsets (not fast) each span edge costs one more encoding.
        on_change: called with the row's index and "split-at-boundary" when prompt and answer had to be encoded apart.
        on_error: called for a row that cannot be labelled exactly; its result is then empty. `None`: the error is
            raised.
        straight: what `encode_straight` made of the same rows; `None`: it is called here.

    Raises: RowError ("no-offsets", "no-clean-split", "control-token-in-content").
    """
    encoder = encoder_of(tokenizer) if tokenizer.is_fast else None
    prefix, suffix = added_tokens(tokenizer)
    found = iter(encode_straight(rendered, encoder) if straight is None else straight)
    results: list[Tokens] = []
    for index, row in enumerate(rendered):
        encoding = None if encoder is None or row.literal else next(found)
        try:
            if encoder is None:
                tokens = _by_prefixes(row, tokenizer)
            else:
                encoded, is_split = encoder.encode(row, encoding)
                if is_split and on_change:
                    on_change(index, "split-at-boundary")
                tokens = _label(encoded, row.spans)
                _stop(tokens, encoded, row.stops, tokenizer.eos_token_id)
            tokens = _begun(tokens, prefix) if row.add_bos else tokens
            results.append(_ended(tokens, suffix) if row.add_suffix else tokens)
        except RowError as error:
            if on_error is None:
                raise
            on_error(index, error)
            results.append({"input_ids": [], "labels": []})
    return results


def encode_straight(rendered: Sequence[Rendered], encoder: "Encoder | None") -> "list[Encoding]":
    """Encode whole the rows that no person's control token forces into pieces: nearly all the work of `tokenize`.

    The tokenizers library holds no lock of Python's meanwhile, so another thread may do it beside the rendering.
    """
    texts = [row.text for row in rendered if not row.literal]
    return encoder.backend.encode_batch(texts, add_special_tokens=False) if encoder is not None else []


def truncate(tokens: Tokens, max_length: int, side: Literal["right", "left"] = "right") -> Tokens:
    """The first `max_length` tokens, or the last, cut on the `side`.

    No stop token is added: a cut row must not teach the model to stop there. A cut on the left takes BOS, too.
    """
    kept = slice(max_length) if side == "right" else slice(-max_length, None)
    return {key: values[kept] for key, values in tokens.items()}


def token_table(rows: Sequence[Tokens]) -> "pa.Table":
    """Token rows as an Arrow table; `weights` only if some row has them."""
    import pyarrow as pa

    def column(lists: Sequence[Sequence[Any]], kind: type) -> "pa.ListArray":
        # ten times faster than pa.array, which looks at the type of every number
        offsets = np.cumsum([0, *map(len, lists)])
        values = np.fromiter(chain.from_iterable(lists), kind, offsets[-1])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)

    columns = {name: column([row[name] for row in rows], np.int64) for name in ("input_ids", "labels")}
    if any(row.get("weights") is not None for row in rows):
        weights = [row.get("weights") or [1.0] * len(row["input_ids"]) for row in rows]
        columns["weights"] = column(weights, np.float32)
    return pa.table(columns)


def _label(encoded: Encoded, spans: Sequence[Span]) -> Tokens:
    ids = encoded.ids
    tokens: Tokens = {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}
    if any(span.weight != 1 for span in spans):
        tokens["weights"] = [1.0] * len(ids)
    for span in spans:
        # Several tokens may share a character; those of the span are the ones that start in it.
        first, stop = encoded.first_from(span.start), encoded.first_from(span.end)
        tokens["labels"][first:stop] = ids[first:stop]
        if "weights" in tokens:
            tokens["weights"][first:stop] = [span.weight] * (stop - first)
    return tokens


def _stop(tokens: Tokens, encoded: Encoded, stops: Sequence[tuple[int, float]], eos_id: int | None) -> None:
    """Label the token behind an answer as the stop token, where the text has none there."""
    for edge, weight in stops:
        at = encoded.first_from(edge)
        if tokens["labels"][at] == IGNORE_INDEX:
            tokens["labels"][at] = eos_id
            if "weights" in tokens:
                tokens["weights"][at] = weight


def _straddled(encoded: Encoded, spans: Sequence[Span], control_ids: set[int]) -> list[int]:
    """Edges of spans that lie inside a token.

    A control token may reach over the end of its span: some (Phi-3's) swallow the white space behind them.
    """
    cuts = []
    for span in spans:
        for edge in (span.start, span.end):
            before = encoded.first_from(edge) - 1
            if before < 0 or encoded.span_of(before)[1] <= edge:
                continue
            if edge == span.start or encoded.ids[before] not in control_ids:
                cuts.append(edge)
    return cuts


def encoder_of(tokenizer: "PreTrainedTokenizerBase") -> "Encoder":
    """The encoder of a fast tokenizer as it is now, made once."""
    key = (len(tokenizer), control_tokens(tokenizer))
    cached = _ENCODERS.get(tokenizer)
    if cached is None or cached[0] != key:
        cached = _ENCODERS[tokenizer] = (key, Encoder(tokenizer))
    return cached[1]


_ENCODERS: WeakKeyDictionary = WeakKeyDictionary()
MAX_HEADERS = 1024  # texts whose ids are remembered; a template writes only a few before its answers


class Encoder:
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
        self._literal_backend: Tokenizer | None = None
        self._headers: dict[str, list[int]] = {}
        alone, behind = self._encode("x", False), self._encode("\nx", False)
        self.adds_prefix = behind.ids[bisect_left(behind.starts, 1) :] != alone.ids

    def encode(self, row: Rendered, encoding: "Encoding | None" = None) -> tuple[Encoded, bool]:
        """The row's ids, from its `encoding` if it was encoded whole; and whether an answer had to be encoded apart.

        Raises: RowError where the edge of an answer lies inside a token and cannot be freed.
        """
        if encoding is None and not row.literal:
            (encoding,) = encode_straight([row], self)
        encoded = self.encode_pieces(row, []) if encoding is None else Encoded.of(encoding)
        answers = [*row.spans, *row.untrained]
        cuts = _straddled(encoded, answers, self.control_ids) + self.read_ahead(row, answers, encoded)
        return (self.encode_pieces(row, cuts), True) if cuts else (encoded, False)

    def encode_pieces(self, row: Rendered, cuts: Sequence[int]) -> Encoded:
        """The text cut at `cuts` and around its literal ranges, each piece as it continues the text before it."""
        edges = {0, len(row.text), *cuts, *(edge for literal in row.literal for edge in literal)}
        ids, starts, ends = [], [], []
        for start, end in pairwise(sorted(edges)):
            is_literal = any(begin <= start and end <= stop for begin, stop in row.literal)
            piece = self._encode_piece(row, start, end, is_literal)
            if is_literal and not self.control_ids.isdisjoint(piece.ids):
                raise RowError(
                    f"the tokenizer makes a control token of the plain text {row.text[start:end]!r}. Remove it from "
                    "the message.",
                    "control-token-in-content",
                )
            ids.extend(piece.ids)
            starts.extend(start + s for s in piece.starts)
            ends.extend(start + e for e in piece.ends)
        whole = Encoded(ids, starts, ends)
        if _straddled(whole, [Span(edge, edge) for edge in cuts], set()):
            raise _no_clean_split(row.text, cuts[0])
        return whole

    def read_ahead(self, row: Rendered, answers: Sequence[Span], encoded: Encoded) -> list[int]:
        """Starts of spans before which the tokens are others than those of the same text without a continuation.

        GPT-2's pattern splits white space by what follows: two line breaks are one token, or two before a letter.
        """
        return [span.start for span in answers if span.start > 0 and self._reads_ahead(row, encoded, span.start)]

    def _reads_ahead(self, row: Rendered, encoded: Encoded, edge: int) -> bool:
        stop = encoded.first_from(edge)
        if row.literal:
            literal = [(start, min(end, edge)) for start, end in row.literal if start < edge]
            return self.encode_pieces(Rendered(row.text[:edge], [], literal), []).ids != encoded.ids[:stop]
        # Tokenizers cut the text at control tokens first, so what stands before the last of them plays no part.
        first = next((i for i in range(stop - 1, 0, -1) if encoded.ids[i] in self.control_ids), 0)
        begin = encoded.span_of(first)[0] if first else 0
        return self._header_ids(row.text[begin:edge]) != encoded.ids[first:stop]

    def _header_ids(self, text: str) -> list[int]:
        """The ids of a text that stands before many answers."""
        ids = self._headers.get(text)
        if ids is None:
            ids = self._encode(text, False).ids
            if len(self._headers) < MAX_HEADERS:
                self._headers[text] = ids
        return ids

    def _encode_piece(self, row: Rendered, start: int, end: int, is_literal: bool) -> Encoded:
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
                return Encoded(
                    encoded.ids[first:],
                    [s - shift for s in encoded.starts[first:]],
                    [e - shift for e in encoded.ends[first:]],
                )
        raise _no_clean_split(row.text, start)

    def _encode(self, text: str, is_literal: bool) -> Encoded:
        if is_literal and self._literal_backend is None:
            # a copy of its own: the other may be at work in another thread
            self._literal_backend = copy.deepcopy(self.backend)
            self._literal_backend.encode_special_tokens = True
        backend = self._literal_backend if is_literal else self.backend
        return Encoded.of(backend.encode(text, add_special_tokens=False))

    def _begins_with_added_space(self, encoded: Encoded, first: int, piece: str) -> bool:
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
    encoded = Encoded(ids, list(range(len(ids))), [])
    tokens = _label(encoded, spans)
    _stop(tokens, encoded, [(counts[edge], weight) for edge, weight in row.stops], tokenizer.eos_token_id)
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
