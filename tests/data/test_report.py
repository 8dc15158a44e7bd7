import io
import json
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from tunesmith.data.report import Bin, Report, draw, first_row_lines, histogram, place, preview, visible
from tunesmith.data.rows import Row
from tunesmith.errors import DataError

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class ByteTokenizer:
    """One byte, one id; 256 and 257 are special."""

    def __init__(self):
        self.names = {256: "<|start|>", 257: "<|end|>"}
        self.all_special_ids = [257]
        self.added_tokens_decoder = {256: SimpleNamespace(special=True)}

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert (skip_special_tokens, clean_up_tokenization_spaces) == (False, False)
        return b"".join(self.names[i].encode() if i in self.names else bytes([i]) for i in ids).decode(
            errors="replace"
        )


class SpacedTokenizer:
    """As SentencePiece: a word's leading space is lost where decoding begins."""

    all_special_ids = ()

    def decode(self, ids, **_):
        return " ".join("abcdef"[i] for i in ids)


def tokens(*parts, weight=1.0):
    """Parts are masked texts and, in a list, trained ones; `^` and `$` stand for the special tokens."""
    row = {"input_ids": [], "labels": [], "weights": []}
    for part in parts:
        text = part[0] if isinstance(part, list) else part
        ids = [{ord("^"): 256, ord("$"): 257}.get(byte, byte) for byte in text.encode()]
        row["input_ids"] += ids
        row["labels"] += ids if isinstance(part, list) else [-100] * len(ids)
        row["weights"] += [weight] * len(ids)
    return row


def terminal(width=80, **options):
    options = {"force_terminal": True, "color_system": "truecolor", "no_color": False} | options
    return Console(file=io.StringIO(), width=width, **options)


def filled():
    report = Report()
    report.read, report.kept = 20, 13
    for line in range(1, 7):
        report.dropped("too-long", Row({}, "a.jsonl", line), f"a.jsonl:{line}: 900 tokens")
    report.dropped("bad-json", Row({}, "b.json", 2), "b.json row 2: not valid JSON")
    report.changed("cut", {"text": "x", "source": "a.jsonl", "line": 9})
    report.changed("turns-dropped", {"text": "x", "source": "a.jsonl", "line": 9})
    report.note("format: text (column text)")
    report.add_tokens([tokens("a" * 12, ["b" * 3]), tokens("c" * 5, ["d" * 40])])
    return report


# Words for a terminal


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x1b]8;;http://x\x07", "\\x1b]8;;http://x\\x07"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x7f\x9b31m", "\\x7f\\x9b31m"),
        ("\u202eabc\u2066\u200f", "\\u202eabc\\u2066\\u200f"),
        ("\u2028\ufeff\u200b", "\\u2028\\ufeff\\u200b"),
        ("\ud83d \U000e0041", "\\ud83d \\U000e0041"),
        ("é 你好 👩‍👩‍👧 [bold]", "é 你好 👩‍👩‍👧 [bold]"),
    ],
)
def test_nothing_unsafe_is_printed(text, safe):
    assert visible(text) == safe


def test_a_limit_holds_after_escaping_and_kept_characters_stay():
    assert visible("\x1b" * 100, 10) == "\\x1b\\x1b\\…"
    assert visible("a\nb\t", keep="\n") == "a\nb\\t"


def test_places_are_lines_where_files_count_lines():
    assert place("a.jsonl", 3) == "a.jsonl:3"
    assert place("d/a.TXT", 3) == "d/a.TXT:3"
    assert place("a.json", 3) == "a.json row 3"
    assert place("owner/name", 3) == "owner/name row 3"
    assert place("train_dataset", 0) == "train_dataset"


# Counts


def test_counts_add_up():
    rows = filled().to_json()
    assert rows["rows"] == {"read": 20, "kept": 13, "dropped": 7}
    assert rows["rows"]["read"] == rows["rows"]["kept"] + sum(entry["rows"] for entry in rows["dropped"].values())
    assert len(rows["dropped_rows"]) == 7
    assert sum(entry["rows"] for entry in rows["changed"].values()) == len(rows["changed_rows"]) == 2


def test_the_json_names_each_row_and_the_first_few_of_each_reason():
    made = json.loads(json.dumps(filled().to_json()))
    assert list(made["dropped"]) == ["too-long", "bad-json"]
    assert [row["line"] for row in made["dropped"]["too-long"]["first"]] == [1, 2, 3, 4, 5]
    assert made["dropped_rows"][5] == {"source": "a.jsonl", "line": 6, "reason": "too-long", "detail": "900 tokens"}
    assert made["dropped_rows"][6]["detail"] == "not valid JSON"
    assert made["changed_rows"][0] == {"source": "a.jsonl", "line": 9, "reason": "cut", "detail": ""}


def test_token_statistics_are_exact():
    report = Report()
    assert report.token_statistics() is None
    report.add_tokens({"input_ids": [0] * n, "labels": [-100] * (n - 1) + [0]} for n in range(1, 101))
    statistics = report.token_statistics()
    histogram = statistics.pop("histogram")
    assert statistics == {
        "num_tokens": 5050,
        "num_trained": 99,  # the token of the first row has nothing before it
        "trained_share": 0.0196,
        "min": 1,
        "median": 51,
        "mean": 50.5,
        "p95": 95,
        "max": 100,
    }
    assert sum(bin["rows"] for bin in histogram) == 100


@pytest.mark.parametrize("lengths", [[1], [5, 5, 5], [1, 10], [0, 9, 10], [3, 1024], [7, 999_999], list(range(1, 98))])
def test_a_histogram_has_at_most_ten_round_bins_that_hold_every_row(lengths):
    bins = histogram(lengths)
    assert len(bins) <= 10
    assert sum(bin.rows for bin in bins) == len(lengths)
    assert all(str(bin.high - bin.low + 1).strip("0") in ("1", "2", "5") for bin in bins)
    assert bins[0].low <= min(lengths)
    assert bins[-1].high >= max(lengths)


def test_a_histogram_is_drawn_to_the_width():
    lines = list(draw([Bin(0, 99, 200), Bin(100, 199, 1), Bin(200, 299, 0)], width=30))
    assert lines == ["   0–99 200 " + "█" * 18, "100–199   1 █", "200–299   0"]


# The check before training


def test_a_report_within_the_limit_passes():
    filled().check(0.5)


# reliability: 39
def test_nothing_kept_is_an_error_with_the_reasons():
    report = filled()
    report.read, report.kept = 7, 0
    with pytest.raises(DataError, match=r"all 7 rows were dropped") as caught:
        report.check(1.0)
    assert "  too-long    6 rows  a.jsonl:1, 2, 3, 4, 5, ...\n  bad-json     1 row  b.json row 2\n" in str(
        caught.value
    )


@pytest.mark.parametrize(("use", "option"), [("train on", "dataset"), ("evaluate", "eval_dataset")])
def test_no_rows_at_all_is_an_error(use, option):
    with pytest.raises(DataError, match=f"no rows were read, so there is nothing to {use}. Check what {option} names"):
        Report().check(1.0, use)


# reliability: 39
def test_too_many_dropped_rows_are_an_error_that_says_how_to_allow_them():
    report = filled()
    with pytest.raises(
        DataError,
        match=r"7 of 20 rows \(35\.0 %\) .*allows 5 %\.\n  too-long .*\n.*\n"
        r"  a\.jsonl:1: 900 tokens\n.*\n.*max_drop_ratio: 0\.35",
    ):
        report.check(0.05)
    report.check(0.35)


@pytest.mark.parametrize(
    ("num_trained", "message"),
    [(0, r"nothing is trained: 0 of 1,000 tokens"), (4, r"^4 of 1,000 tokens would be trained \(0\.4 %\)"), (5, None)],
)
def test_a_suspiciously_low_share_of_trained_tokens_is_an_error(num_trained, message):
    report = Report()
    report.read = report.kept = 1
    report.add_tokens([{"input_ids": [1] * 1000, "labels": [-100] * (1000 - num_trained) + [1] * num_trained}])
    if message is None:
        report.check(0.0)
    else:
        with pytest.raises(DataError, match=message):
            report.check(0.0)


# The table

TABLE = """\
20 rows read, 13 kept, 7 dropped, 1 changed
format: text (column text)
  dropped  too-long    6 rows  a.jsonl:1, 2, 3, 4, 5, ...
  dropped  bad-json     1 row  b.json row 2
  changed  cut               1 row  a.jsonl:9
  changed  turns-dropped     1 row  a.jsonl:9
60 tokens, 43 trained (71.7 %)
tokens per row: min 15, median 45, mean 30.0, p95 45, max 45
  15–19 1 ██████████████████████████████████████████████████
  20–24 0
  25–29 0
  30–34 0
  35–39 0
  40–44 0
  45–49 1 ██████████████████████████████████████████████████"""


def test_the_table_is_plain_lines():
    assert filled().table() == TABLE


def test_the_table_is_the_same_in_a_pipe():
    console = Console(file=io.StringIO(), width=80)
    filled().table(console)
    assert console.file.getvalue().replace("#", "█") == TABLE + "\n"


@pytest.mark.parametrize("width", [40, 120])
def test_the_table_on_a_terminal_says_the_same_and_fits(width):
    console = terminal(width)
    filled().table(console)
    lines = ANSI.sub("", console.file.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    assert re.findall(r"\w+", "".join(lines))[:3] == ["20", "rows", "read"]
    assert "\x1b[31m" in console.file.getvalue()


def test_names_and_details_cannot_format_or_reach_the_terminal():
    report = Report()
    report.read = 1
    report.dropped("bad-json", Row({}, "[red]\x1b[31m.jsonl", 1), "[bold]\x1b")
    console = terminal()
    report.table(console)
    assert r"[red]\x1b[31m.jsonl:1" in console.file.getvalue()


# The preview


def test_trained_text_stands_in_marks():
    shown = preview([tokens("^user\nhi$\n^assistant\n", ["hello$"], "\n")], ByteTokenizer())
    assert shown == (
        "── example 1: 28 tokens, 6 trained\n<|start|>user\nhi<|end|>\n<|start|>assistant\n⟦hello<|end|>⟧\n"
    )


def test_several_turns_and_several_rows_are_shown_up_to_the_limit():
    rows = [tokens("a", ["b"], "c", ["d"]), tokens("a", ["e"]), tokens("a", ["f"]), tokens("a", ["g"])]
    shown = preview(rows, ByteTokenizer())
    assert re.findall("^a.*", shown, re.MULTILINE) == ["a⟦b⟧c⟦d⟧", "a⟦e⟧", "a⟦f⟧"]


def test_a_first_token_is_never_marked_for_nothing_stands_before_it():
    shown = preview([tokens(["abc"])], ByteTokenizer())
    assert "3 tokens, 2 trained" in shown
    assert shown.endswith("a⟦bc⟧")


def test_characters_of_many_bytes_survive():
    assert "é 你好 ⟦👩‍👩‍👧⟧" in preview([tokens("é 你好 ", ["👩‍👩‍👧"])], ByteTokenizer())


def test_leading_spaces_of_words_survive():
    row = {"input_ids": [0, 1, 2, 3, 4], "labels": [-100, -100, 2, 3, -100]}
    assert "a b⟦ c d⟧ e" in preview([row], SpacedTokenizer())


def test_weights_other_than_one_are_shown():
    row = tokens("a", ["b"], weight=0.5)
    assert "a⟦×0.5 b⟧" in preview([row], ByteTokenizer())
    console = terminal()
    preview([row], ByteTokenizer(), console)
    assert "a×0.5b" in ANSI.sub("", console.file.getvalue())


@pytest.mark.parametrize("console", [None, terminal(), terminal(no_color=True), Console(file=io.StringIO())])
def test_sample_text_cannot_reach_the_terminal(console):
    row = tokens("\x1b[31mred\x1b]8;;x\x07", ["\u202e[bold]:smile:\n\x9b"])
    shown = preview([row], ByteTokenizer(), console) or ANSI.sub("", console.file.getvalue())
    assert r"\x1b[31mred\x1b]8;;x\x07" in shown
    assert "\\u202e[bold]:smile:\n\\x9b" in shown
    assert not set(shown) & set("\x1b\x07\u202e\x9b")


def test_marks_in_a_text_are_told_from_ours():
    assert r"\u27e6a\u27e7⟦b⟧" in preview([tokens("⟦a⟧", ["b"])], ByteTokenizer())


def test_a_terminal_gets_colours_and_a_pipe_gets_marks():
    row = tokens("^a", ["b$"])
    console, pipe = terminal(), Console(file=io.StringIO())
    assert preview([row], ByteTokenizer(), console) is None
    assert preview([row], ByteTokenizer(), pipe) is None
    coloured = console.file.getvalue()
    for run in ("\x1b[35m<|start|>", "\x1b[2ma", "\x1b[1;32mb", "\x1b[1;7;35m<|end|>"):
        assert run in coloured
    assert pipe.file.getvalue() == "── example 1: 4 tokens, 2 trained\n<|start|>a⟦b<|end|>⟧\n"


def test_long_stretches_lose_their_middle_and_say_so():
    shown = preview([tokens("a" * 5000, ["b" * 2000 + "$"])], ByteTokenizer())
    assert "a ⋯ 4,400 characters ⋯ a" in shown
    assert "b ⋯ 1,400 characters ⋯ b" in shown
    assert len(shown) < 1400


def test_a_row_of_many_stretches_loses_its_middle():
    shown = preview([tokens(*["a", ["b"]] * 500)], ByteTokenizer())
    assert "⋯ 940 stretches ⋯" in shown
    assert shown.count("⟦b⟧") == 30


# workflow: P7
def test_the_first_row_is_shown_as_ids_and_as_text():
    row = tokens("^hi\n", ["yes\x1b[2J$"])
    assert first_row_lines([row, tokens("other")], ByteTokenizer()) == [
        "input_ids:",
        "[256, 104, 105, 10, 121, 101, 115, 27, 91, 50, 74, 257]",
        "inputs:",
        "<|start|>hi",
        "yes\\x1b[2J<|end|>",
        "label_ids:",
        "[-100, -100, -100, -100, 121, 101, 115, 27, 91, 50, 74, 257]",
        "labels:",
        "yes\\x1b[2J<|end|>",
    ]


def test_rows_without_labels_and_rows_of_pairs_are_shown_as_far_as_they_go():
    row = {"chosen_ids": [97], "rejected_ids": [98], "line": 3}
    lines = ["chosen_ids:", "[97]", "chosen:", "a", "rejected_ids:", "[98]", "rejected:", "b"]
    assert first_row_lines(iter([row]), ByteTokenizer()) == lines
    assert first_row_lines([], ByteTokenizer()) == []
