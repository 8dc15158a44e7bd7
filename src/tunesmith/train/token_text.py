"""Token ids → which of them write a given text, for any tokenizer.

The bytes of each token are read off its name, in the two ways that vocabularies write them, and that is trusted for a
row only if all its bytes together are what `decode` says. Otherwise the edges of tokens are found by decoding
beginnings of the row, which takes some 20 times as long and asks nothing of the tokenizer.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import accumulate, groupby
from typing import Any

from transformers import PreTrainedTokenizerBase


class RawByte(bytes):
    """A token that is one byte of a character which the vocabulary does not have."""


def byte_level(name: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary (GPT-2, Llama 3, Qwen)."""
    byte_of = _byte_of_character()
    if all(character in byte_of for character in name):
        return bytes(byte_of[character] for character in name)
    return name.encode("utf-8", "replace")  # an added token


def sentencepiece(name: str) -> bytes:
    """The bytes of a token of a sentencepiece vocabulary (Llama 2, Mistral, Gemma)."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
        return RawByte([int(name[3:5], 16)])
    return name.replace("▁", " ").encode("utf-8", "replace")


WAYS = (byte_level, sentencepiece)


@cache
def _byte_of_character() -> dict[str, int]:
    """A byte whose character prints is named by it, the others by the characters from 256 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)) - set(prints))
    return {chr(byte): byte for byte in prints} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenText:
    """Reads rows of one tokenizer, which is not changed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.written: dict[str, tuple[str, ...]] = {}
        self.ways = [(way, {}) for way in WAYS]  # bytes of the tokens seen so far; the way that fitted last is first

    def __getstate__(self) -> dict:
        """Without what was learned on the way, so that the fingerprint of a `datasets` map stays the same."""
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["tokenizer"])

    def read(self, ids: list[int]) -> "RowText":
        """The row's text; about 0.2 ms for 200 tokens, of which decoding is a half."""
        text = self.decode(ids)
        for index, (way, bytes_of) in enumerate(self.ways):
            missing = list({one for one in ids if one not in bytes_of})
            for one, name in zip(missing, self.tokenizer.convert_ids_to_tokens(missing)):
                bytes_of[one] = name if isinstance(name, bytes) else way(str(name))
            pieces = [bytes_of[one] for one in ids]
            # Decoders drop the space that sentencepiece puts before a text; its token has it nevertheless.
            if _as_decoded(pieces) in (text, f" {text}"):
                self.ways.insert(0, self.ways.pop(index))
                return RowText(self, ids, text, pieces)
        return RowText(self, ids, text, None)

    def decode(self, ids: Sequence[int]) -> str:
        """All that the ids write, control tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def forms(self, text: str) -> tuple[str, ...]:
        """The text, and the text as this tokenizer writes it if that is another."""
        if text not in self.written:
            again = self.decode(self.tokenizer.encode(text, add_special_tokens=False))
            self.written[text] = tuple(form for form in dict.fromkeys((text, again)) if form)
        return self.written[text]


class RowText:
    """The text of one row and, if known, the bytes of each of its tokens."""

    def __init__(self, reader: TokenText, ids: list[int], text: str, pieces: list[bytes] | None):
        self.reader, self.ids, self.text = reader, ids, text
        self.bytes = None if pieces is None else b"".join(pieces)
        self.edges = None if pieces is None else list(accumulate(map(len, pieces), initial=0))

    def find(self, text: str) -> list[tuple[int, int]]:
        """For each place of `text`, overlapping ones too: first token that holds a part of it, first one behind it.

        If it occurs nowhere, it is looked for as the tokenizer writes it: some drop white space at its ends, put some
        behind control tokens, or write other characters.
        """
        for form in self.reader.forms(text):
            found = self._by_bytes(form) if self.edges else self._by_beginnings(form)
            if found:
                return found
        return []

    def _by_bytes(self, text: str) -> list[tuple[int, int]]:
        places = _occurrences(text.encode("utf-8", "replace"), self.bytes)
        return [(bisect_right(self.edges, start) - 1, bisect_left(self.edges, end)) for start, end in places]

    def _by_beginnings(self, text: str) -> list[tuple[int, int]]:
        """The same, by how many characters are complete after so many tokens."""
        decoded = cache(lambda count: self.reader.decode(self.ids[:count]))

        @cache
        def complete(count: int) -> tuple[int, bool]:
            """Characters that are complete, and whether there is a part of another."""
            size = 0
            # An incomplete character may spoil complete ones before it, so go back to where there is none.
            for earlier in range(count, -1, -1):
                size = max(size, _shared(decoded(earlier), self.text))
                if size == len(decoded(earlier)):
                    break
            return size, earlier < count

        counts = range(len(self.ids) + 1)
        found = []
        for start, end in _occurrences(text, self.text):
            first = bisect_right(counts, start, key=lambda count: sum(complete(count))) - 1
            found.append((first, bisect_left(counts, end, key=lambda count: complete(count)[0])))
        return found


def _as_decoded(pieces: list[bytes]) -> str:
    """The text of the pieces; raw bytes side by side that are no text become � each, as decoders of tokenizers say."""
    text = b"".join(pieces).decode("utf-8", "replace")
    if "�" not in text:
        return text
    parts = []
    for is_raw, run in groupby(pieces, lambda piece: isinstance(piece, RawByte)):
        written = b"".join(run)
        text = written.decode("utf-8", "replace")
        parts.append("�" * len(written) if is_raw and text.encode() != written else text)
    return "".join(parts)


def _shared(beginning: str, whole: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if whole.startswith(beginning):
        return len(beginning)
    return next((i for i, (one, other) in enumerate(zip(beginning, whole)) if one != other), len(whole))


def _occurrences(part: Any, whole: Any) -> Iterator[tuple[int, int]]:
    start = whole.find(part)
    while start >= 0:
        yield start, start + len(part)
        start = whole.find(part, start + 1)
