"""Every file type: what is read, what is refused, and the line that the refusal names."""

import json

import pytest

from tests.data.files import load, values, write
from tunesmith.data import readers
from tunesmith.data.readers import READERS
from tunesmith.data.report import Report
from tunesmith.data.rows import Row, RowError
from tunesmith.errors import DataError

GOOD = b'{"prompt": "a", "completion": "b"}\n'


# reliability: 34
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": "1"}\n{"a": "2"}\n'),
        ("a.JSONL", b'{"a": "1"}\n{"a": "2"}\n'),
        ("a.jsonl", b'\xef\xbb\xbf{"a": "1"}\r\n\r\n{"a": "2"}'),
        ("a.json", b'[{"a": "1"}, {"a": "2"}]'),
        ("a.json", b'\xef\xbb\xbf\r\n[\r\n{"a": "1"}\r\n,\r\n{"a": "2"}]\r\n'),
        ("a.json", b'{"a": "1"}\n{"a": "2"}\n'),
        ("a.csv", b"a\n1\n2\n"),
        ("a.csv", b'\xef\xbb\xbfa\r\n\r\n"1"\r\n2\r\n'),
        ("a.csv", b'\xef\xbb\xbfa\r1\r"2"\r'),
        ("a.jsonl", b'{"a": "1"}\r{"a": "2"}'),
        ("a.json", b'[{"a": "1"},\r{"a": "2"}]\r'),
    ],
)
def test_one_table_is_read_alike_from_every_layout(tmp_path, name, content):
    assert values(load(write(tmp_path, name, content))) == [{"a": "1"}, {"a": "2"}]


def test_parquet_rows_are_numbered(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    table = [{"messages": [{"role": "user", "content": "é"}]}, {"messages": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    assert load(path) == [Row(table[0], path, 1), Row(table[1], path, 2)]


# reliability: 34
@pytest.mark.parametrize(
    "kind", ["timestamp[ms]", "timestamp[us, tz=UTC]", "date32[day]", "date64[ms]", "duration[s]"]
)
def test_times_that_python_cannot_hold_stop_no_reading(tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / "a.parquet")
    types = {str(found): found for found in (pyarrow.date32(), pyarrow.date64(), pyarrow.duration("s"))}
    types |= {"timestamp[ms]": pyarrow.timestamp("ms"), "timestamp[us, tz=UTC]": pyarrow.timestamp("us", "UTC")}
    far = pyarrow.array([2 * 10**9 if kind == "date32[day]" else 864 * 10**15, None], types[kind])
    pyarrow.parquet.write_table(pyarrow.table({"a": ["1", "2"], "when": far}), path)
    assert [row["a"] for row in values(load(path))] == ["1", "2"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_two_columns_of_one_name_are_an_error(tmp_path, suffix):
    import pyarrow
    import pyarrow.parquet

    path = str(tmp_path / f"a{suffix}")
    table = pyarrow.table([["1"], ["2"]], names=["a", "a"])
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=r"two columns are named 'a'\. Rename one"):
        load(path)


@pytest.mark.parametrize("format", ["stream", "file"])
def test_arrow_rows_are_read_from_both_of_its_formats(tmp_path, format):
    import pyarrow

    path = str(tmp_path / "a.arrow")
    table = pyarrow.Table.from_pylist([{"a": 1}, {"a": 2}, {"a": 3}])
    with getattr(pyarrow.ipc, f"new_{format}")(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert load(path) == [Row({"a": 1}, path, 1), Row({"a": 2}, path, 2), Row({"a": 3}, path, 3)]


def test_a_dataset_saved_to_disk_is_read_without_the_nulls_that_its_table_adds(tmp_path):
    import datasets

    turns = [[{"role": "user", "content": "hi"}], [{"role": "tool", "content": "1", "name": "f"}]]
    datasets.Dataset.from_dict({"messages": turns}).save_to_disk(tmp_path / "saved")
    assert [row.value["messages"] for row in load(tmp_path / "saved")] == turns


def test_a_text_file_gives_one_row_per_line_that_is_not_blank(tmp_path):
    path = write(tmp_path, "a.txt", "\ufeff one\r\n \t\n\u3000\ntwo\u2028three\n".encode())
    assert load(path) == [Row({"text": " one"}, path, 1), Row({"text": "two\u2028three"}, path, 4)]


# workflow: D7
def test_a_json_array_is_read_in_parts(tmp_path, monkeypatch):
    rows = [{"a": [n, "x" * (40 * (n == 7)), "é\u2028"], "b": {"c": None}} for n in range(50)]
    content = json.dumps(rows, ensure_ascii=False, indent=1).encode()
    path = write(tmp_path, "a.json", content)
    for part in (1, 2, 7, 64, 10_000):
        monkeypatch.setattr(readers, "PART", part)
        assert [row.value for row in readers.read_json(path)] == rows
    monkeypatch.setattr(readers, "PART", 64)
    monkeypatch.setattr(readers.Path, "read_bytes", None)  # what reads the whole file
    stream = readers.read_json(write(tmp_path, "b.json", content[:2000] + b"broken"))
    assert next(stream) == Row(rows[0], str(tmp_path / "b.json"), 1)


def test_an_array_that_breaks_after_many_parts_is_named_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PART", 16)
    path = write(tmp_path, "a.json", b"[" + b'{"a": 1},\n' * 30 + b'{"a" 1}]')
    stream = readers.read_json(path)
    assert [next(stream).line for _ in range(30)] == list(range(1, 31))
    with pytest.raises(RowError, match=r"a\.json:31: not valid JSON: Expecting ':' delimiter .*\(row 31\)"):
        next(stream)


def test_lines_are_counted_over_blank_ones_and_array_elements_one_by_one(tmp_path):
    assert [row.line for row in load(write(tmp_path, "a.jsonl", b'\n{"a": 1}\n\n{"a": 2}\n'))] == [2, 4]
    assert [row.line for row in load(write(tmp_path, "a.json", b'[{"a": 1},\n\n\n{"a": 2}]'))] == [1, 2]
    assert [row.line for row in load(write(tmp_path, "a.csv", b'a,b\n"x\ny",1\n\nz,2\n'))] == [2, 5]


# reliability: 43
def test_unicode_survives(tmp_path):
    text = "👩‍👩‍👧 e\u0301 مرحبا 你好 \u2028 \\ud83d"
    content = (json.dumps({"a": text}) + "\n" + json.dumps({"a": text}, ensure_ascii=False)).encode()
    assert values(load(write(tmp_path, "a.jsonl", content))) == [{"a": text}, {"a": text}]


def test_a_csv_field_may_be_longer_than_the_modules_limit(tmp_path):
    import csv

    before = csv.field_size_limit()
    rows = load(write(tmp_path, "a.csv", b"a\n" + b"x" * 200_000 + b"\n"))
    assert len(rows[0].value["a"]) == 200_000
    assert csv.field_size_limit() == before


# Bad files


# reliability: 34
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl is empty"),
        ("a.jsonl", b"\n\r\n \n", r"a\.jsonl is empty"),
        ("a.jsonl", b"\xef\xbb\xbf", r"a\.jsonl is empty"),
        ("a.json", b"", r"a\.json is empty"),
        ("a.json", b"[ ]", r"a\.json is empty"),
        ("a.csv", b"", r"a\.csv is empty"),
        ("a.csv", b"a,b\n", r"a\.csv is empty"),
        ("a.txt", b"\n \n", r"a\.txt is empty"),
        ("a.json", b'{\n "data": []}', r"one JSON object over several lines.*jq \.KEY"),
        ("a.csv", b"a,b,a\n1,2,3\n", r"a\.csv:1: the header names column 'a' twice"),
        ("a.csv", b"\na,,c\n1,2,3\n", r"a\.csv:2: column 2 of the header has no name"),
        ("a.csv", b"a;b\n1;2\n", r"a\.csv:1: the columns are separated by ';'"),
        ("a.csv", b"a\rb,c\n1,2\n", r"a\.csv:1: not valid CSV: new-line character"),
        ("a.jsonl", b"\x1f\x8b\x08\0", r"a\.jsonl is packed \(gzip\)\. Unpack it: gzip -dc < a\.jsonl > "),
        ("a.json", b"\x1f\x8b\x08\0", r"a\.json is packed"),
        ("a.csv", b"PK\x03\x04\0", r"a\.csv is packed \(funzip\)"),
        ("a.parquet", b"PAR1", r"a\.parquet: not readable as Parquet"),
        (
            "a.jsonl.gz",
            b"x",
            r"cannot read a file that ends in '\.gz'\. File extension must be txt, csv, json or jsonl, or parquet or",
        ),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), r"is UTF-16, not UTF-8. Convert it with iconv -f UTF-16"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_bad_file_is_an_error_whatever_on_bad_row_says(tmp_path, name, content, message, on_bad_row):
    with pytest.raises(DataError, match=message) as caught:
        load(write(tmp_path, name, content), on_bad_row=on_bad_row)
    assert not isinstance(caught.value, RowError)


# reliability: 34
@pytest.mark.parametrize("suffix", READERS)
def test_every_reader_says_that_an_empty_file_is_empty_or_broken(tmp_path, suffix):
    with pytest.raises(DataError, match=r"is empty|not readable as (Parquet|Arrow)"):
        load(write(tmp_path, f"a{suffix}", b""))


# Bad rows

BAD_LINES = [
    (b'{"a": 1 "b": 2}', "bad-json", r"not valid JSON: Expecting ',' delimiter at column 9: '{\"a\": 1 \"b\": 2}'"),
    (b'{"a": "cut off', "bad-json", r"Unterminated string starting at column 7.*Was the file cut off"),
    (b"{", "bad-json", r"convert it with jq -c"),
    (b"{'a': 1}", "bad-json", r"double quotes; write the file with json\.dumps"),
    (b'{"a": 1}, ', "bad-json", r"Take the commas between the rows out"),
    (b'[{"a": 1},', "bad-json", r"A file that is one JSON array must be named \.json"),
    (b"[" * 100_000, "bad-json", r"not readable as JSON: maximum recursion depth"),
    (b'{"a": ' + b"1" * 5000 + b"}", "bad-json", r"not readable as JSON: Exceeds the limit"),
    (b'[{"a": 1}]', "not-an-object", r"the row is a list, not an object.*must be named \.json"),
    (b"3.5", "not-an-object", r"the row is a number, not an object"),
    (b"true", "not-an-object", r"the row is true or false, not an object"),
    (b"null", "not-an-object", r"the row is null, not an object"),
    (b'"text"', "not-an-object", r"the row is a string, not an object"),
    (b'{"a": 1, "b": 2, "a": 3}', "duplicate-key", r"the key 'a' is given twice"),
    (b'{"a": [{"b": 1, "b": 1}]}', "duplicate-key", r"the key 'b' is given twice"),
    (b'{"a": NaN}', "not-finite", r"NaN is not JSON"),
    (b'{"a": -Infinity}', "not-finite", r"-Infinity is not JSON"),
    (b'{"a": 1e999}', "not-finite", r"the number 1e999 is too large"),
    (b'{"a": ["x\\ud83d"]}', "lone-surrogate", r"lone surrogate \\ud83d in 'x\\ud83d'"),
    (b'{"\\uDC00": 1}', "lone-surrogate", r"lone surrogate \\udc00"),
    (b'{"a": "x\0"}', "nul-byte", r"NUL byte at byte 9 of the line. Remove it"),
    (b'{"a": "x\\u0000"}', "nul-byte", r"NUL character in 'x\\x00'"),
    ('{"a": "b"}'.encode("utf-16-le"), "nul-byte", r"iconv -f UTF-16 -t UTF-8 a\.jsonl"),
    ('{"a": "你好吗"}'.encode("gbk"), "not-utf-8", r"byte 0xC4 at byte 8.*decodes as GBK. .*iconv -f GBK -t UTF-8"),
    ('{"a": "café déjà"}'.encode("latin-1"), "not-utf-8", r"byte 0xE9 .*after '{\"a\": \"caf'. It decodes as LATIN1"),
]


# reliability: 33, 34
@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_a_bad_line_is_named(tmp_path, line, reason, message):
    path = write(tmp_path, "a.jsonl", GOOD + GOOD + line + b"\n")
    with pytest.raises(RowError, match=rf"a\.jsonl:3: .*{message}") as caught:
        load(path)
    assert (caught.value.reason, caught.value.source, caught.value.line) == (reason, path, 3)
    assert caught.value.exit_code == 3


# reliability: 33, 34
@pytest.mark.parametrize(("line", "reason", "message"), BAD_LINES)
def test_a_bad_line_is_skipped_and_counted(tmp_path, line, reason, message):
    report = Report()
    rows = load(write(tmp_path, "a.jsonl", GOOD + line + b"\n" + GOOD), on_bad_row="skip", report=report)
    assert [row.line for row in rows] == [1, 3]
    assert report.read == 3
    assert [(problem.line, problem.reason) for problem in report.drops] == [(2, reason)]
    assert not report.drops[0].detail.startswith(str(tmp_path))


def test_json_lines_in_a_json_file_are_named_by_line(tmp_path):
    with pytest.raises(RowError, match=r"a\.json:3: not valid JSON"):
        load(write(tmp_path, "a.json", GOOD + b"\n{bad\n"))


# reliability: 33, 34
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'[{"a": 1},\n {"a": 2}\n {"a": 3}]',
            r"a\.json:2: not valid JSON: Expecting ',' or '\]' at column 10: .*row 2",
        ),
        (b'[{"a": 1},\n {"a": ]', r"a\.json:2: not valid JSON: Expecting value at column 8: .*\(row 2\)"),
        (b'[{"a": 1},', r"a\.json:1: .*row 2.*Was the file cut off"),
        (b'[{"a": 1}', r"a\.json:1: .*row 1.*Was the file cut off"),
        (b'[{"a": 1},]', r"a\.json:1: .*row 2"),
        (b'[{"a": 1}] x', r"a\.json:1: .*Extra data after the array"),
        (b'[{"a": NaN, "b": }]', r"a\.json:1: not valid JSON: Expecting value"),
        (b'[{"a":\n "\xc4\xe3\xba\xc3"}]', r"a\.json:2: not UTF-8: byte 0xC4 at byte 3.*GBK"),
        (b'[{"a":\n "\0"}]', r"a\.json:2: NUL byte"),
        (b"[" * 100_000, r"a\.json row 1: not readable as JSON"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_broken_array_is_named_by_line_and_column_and_never_skipped(tmp_path, content, message, on_bad_row):
    with pytest.raises(RowError, match=message):
        load(write(tmp_path, "a.json", content), on_bad_row=on_bad_row)


# reliability: 34
@pytest.mark.parametrize(
    ("element", "reason"),
    [
        (b'{"a": 1, "a": 2}', "duplicate-key"),
        (b'{"a": [NaN, {"b": "]"}]}', "not-finite"),
        (b'{"a": "\\udc00"}', "lone-surrogate"),
        (b"[1, 2]", "not-an-object"),
        (b"7", "not-an-object"),
    ],
)
def test_a_bad_element_of_an_array_is_named_by_row_and_can_be_skipped(tmp_path, element, reason):
    path = write(tmp_path, "a.json", b'[{"a": 1},\n' + element + b',\n{"a": 3}]')
    with pytest.raises(RowError, match=r"a\.json row 2: "):
        load(path)
    report = Report()
    assert [row.line for row in load(path, on_bad_row="skip", report=report)] == [1, 3]
    assert [problem.reason for problem in report.drops] == [reason]


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b"1,2,3", "ragged-row", r"3 fields where the header has 2 \(a, b\)"),
        (b"1", "ragged-row", r"1 fields where the header has 2"),
        (b'"x"y,z', "bad-csv", r"not valid CSV: ',' expected after"),
        (b"\xff,1", "not-utf-8", r"not UTF-8: byte 0xFF at byte 1 of the line. It"),
        (b"\0,1", "nul-byte", r"NUL byte at byte 1"),
    ],
)
def test_a_bad_csv_record_is_named_by_line(tmp_path, line, reason, message):
    path = write(tmp_path, "a.csv", b'a,b\n1,"2\n2"\n' + line + b"\n3,4\n")
    with pytest.raises(RowError, match=rf"a\.csv:4: {message}"):
        load(path)
    report = Report()
    assert [row.line for row in load(path, on_bad_row="skip", report=report)] == [2, 5]
    assert [(problem.line, problem.reason) for problem in report.drops] == [(4, reason)]


def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path):
    with pytest.raises(RowError, match=r"a\.csv:2: not valid CSV: unexpected end of data"):
        load(write(tmp_path, "a.csv", b'a,b\n"1,2\n3,4\n'))


@pytest.mark.parametrize(("line", "reason"), [(b"x\0", "nul-byte"), (b"\xe4", "not-utf-8")])
def test_a_bad_line_of_text_is_named(tmp_path, line, reason):
    with pytest.raises(RowError, match=r"a\.txt:2: ") as caught:
        load(write(tmp_path, "a.txt", b"good\n" + line + b"\n"))
    assert caught.value.reason == reason


def test_excerpts_are_short_and_cannot_reach_the_terminal(tmp_path):
    line = b'{"a": "' + b"\x1b]8;;http://evil\x07\xe2\x80\xae" * 200 + b'" '
    with pytest.raises(RowError) as caught:
        load(write(tmp_path, "a.jsonl", line))
    message = str(caught.value).removeprefix(str(tmp_path))
    assert message.isprintable()
    assert len(message) < 250


# reliability: 34
def test_one_row_of_many_megabytes_is_read(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"a": "' + b"x" * 50_000_000 + b'"}\n')
    assert len(load(path)[0].value["a"]) == 50_000_000
