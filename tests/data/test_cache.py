"""What is kept is used again only where nothing has changed, and never where it is damaged."""

import json
import os
import threading
import time

import pytest

from tests import tiny
from tunesmith.data import cache as module
from tunesmith.data.cache import ENTRY, TOKENS, Cache, cache_of, key_of
from tunesmith.data.prepare import encode_examples
from tunesmith.data.report import Report
from tunesmith.errors import DataError


def examples(num=4):
    return [
        {
            "messages": [{"role": "user", "content": "x" * line}, {"role": "assistant", "content": "yes"}],
            "source": "a.jsonl",
            "line": line,
        }
        for line in range(1, num + 1)
    ]


@pytest.fixture
def encode(tmp_path, byte_tokenizer):
    """Encode through a cache in a folder of the test's own; says whether tokens were made or read."""

    def run(rows=None, tokenizer=byte_tokenizer, overwrite=False, **options):
        report = Report()
        rows = examples() if rows is None else rows
        report.read = len(rows)
        cache = Cache(tmp_path / "cache", overwrite, min_rows=1)
        dataset = encode_examples(rows, tokenizer, report, cache=cache, **{"max_length": 27, **options})
        return dataset, report, any("read from the cache" in note for note in report.notes)

    return run


def entry_of(tmp_path):
    (found,) = [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    return found


def counts(report):
    return {key: value for key, value in report.to_json().items() if key != "notes"}


# workflow: P7
def test_the_second_run_reads_what_the_first_made_and_reports_the_same(encode):
    made, first, was_read = encode()
    again, second, is_read = encode()
    assert (was_read, is_read) == (False, True)
    assert made[:] == again[:]
    assert made.features == again.features
    assert counts(first) == counts(second)
    assert first.num_dropped == 1


# workflow: P7
# reliability: 47
def test_a_changed_row_template_tokenizer_or_option_is_never_read_from_the_cache(encode):
    encode()
    edited = examples()
    edited[1]["messages"][1]["content"] = "no"
    moved = [*examples()[1:], {**examples()[0], "line": 9}]
    other = tiny.make_byte_tokenizer()
    other.chat_template = other.chat_template.replace("tool_call", "call")
    grown = tiny.make_byte_tokenizer()
    grown.add_tokens("yes")
    changes = [
        {"rows": edited},
        {"rows": moved},
        {"rows": examples(3)},
        {"tokenizer": other},
        {"tokenizer": grown},
        {"max_length": 26},
        {"train_on": "all"},
        {"max_target_length": 2},
        {"on_bad_row": "skip"},
    ]
    assert [encode(**change)[2] for change in changes] == [False] * len(changes)
    assert encode()[2]


def test_an_edited_program_makes_tokens_anew(encode, monkeypatch):
    encode()
    monkeypatch.setattr(module, "_code", lambda: ["another"])
    assert not encode()[2]


def test_what_the_last_call_left_in_the_tokenizer_does_not_matter(encode):
    tokenizer = tiny.make_byte_tokenizer()
    encode(tokenizer=tokenizer)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert encode(tokenizer=tokenizer)[2]


def test_a_template_that_writes_the_date_is_rendered_every_day(monkeypatch, byte_tokenizer):
    class Tomorrow(module.date):
        @classmethod
        def today(cls):
            return cls(2999, 1, 1)

    def key(template):
        tokenizer = tiny.make_byte_tokenizer()
        tokenizer.chat_template = template
        return key_of(examples(), tokenizer, {})

    templates = "{{ strftime_now('%d') }}", "{{ messages }}"
    before = [key(template) for template in templates]
    monkeypatch.setattr(module, "date", Tomorrow)
    assert [key(template) == old for template, old in zip(templates, before)] == [False, True]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": lambda entry: flip(entry / TOKENS),
    "a cut file": lambda entry: (entry / TOKENS).write_bytes((entry / TOKENS).read_bytes()[:-9]),
    "an empty file": lambda entry: (entry / TOKENS).write_bytes(b""),
    "no tokens": lambda entry: (entry / TOKENS).unlink(),
    "no entry": lambda entry: (entry / ENTRY).unlink(),
    "a flipped bit in the entry": lambda entry: flip(entry / ENTRY),
    "no JSON": lambda entry: (entry / ENTRY).write_bytes(b"\xff"),
}


# workflow: P7
# reliability: 47
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_made_anew_and_said(encode, tmp_path, damage):
    made, _, _ = encode()
    expected = made[:]
    DAMAGES[damage](entry_of(tmp_path))
    again, report, is_read = encode()
    assert not is_read
    assert again[:] == expected
    assert any("are damaged" in note and "made anew" in note for note in report.notes)
    assert encode()[2]


# workflow: P7
def test_overwriting_makes_anew(encode):
    made, _, _ = encode()
    assert not encode(overwrite=True)[2]
    assert encode()[2]
    assert made[:]["input_ids"]  # the first is still mapped, though its file is gone


# workflow: P7
def test_of_several_processes_one_builds_and_the_others_read(tmp_path):
    built, found = [], []

    def build(report):
        built.append(1)
        time.sleep(0.2)
        report.kept = 7
        return encode_examples(examples(), tiny.make_byte_tokenizer(), Report())

    def rank(overwrite):
        report = Report()
        Cache(tmp_path, overwrite, min_rows=1).fetch("0" * 32, build, report, 4)
        found.append(report.kept)

    for overwrite in (False, True):
        threads = [threading.Thread(target=rank, args=(overwrite,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert built == [1, 1]
    assert found == [7] * 8


def test_nothing_is_kept_of_a_run_that_failed(encode, tmp_path):
    with pytest.raises(DataError, match="max_length is 10"):
        encode(max_length=10, too_long="error")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_small_set_is_not_kept(tmp_path, byte_tokenizer):
    encode_examples(examples(), byte_tokenizer, Report(), cache=Cache(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_what_cannot_be_hashed_by_content_is_not_kept(encode, tmp_path):
    def labels(ids):
        return ids

    assert not any(encode(label_with=labels)[2] for _ in range(2))
    odd = [{**row, "chat_template_kwargs": {"x": object()}} for row in examples()]
    assert not any(encode(odd)[2] for _ in range(2))


def test_where_nothing_can_be_written_tokens_are_made_and_it_is_said(tmp_path, byte_tokenizer):
    (tmp_path / "file").touch()
    report = Report()
    cache = Cache(tmp_path / "file", min_rows=1)
    assert len(encode_examples(examples(), byte_tokenizer, report, cache=cache)) == 4
    assert any("tokens are not kept" in note for note in report.notes)


def test_old_and_unfinished_entries_go_and_the_longest_unused_above_the_limit(tmp_path, encode, monkeypatch):
    encode()
    folder = tmp_path / "cache"
    size = sum(file.stat().st_size for file in entry_of(tmp_path).iterdir())
    others = {"1" * 32: 40, "2" * 32: 3, "3" * 32: 2, f".{'4' * 32}.12-34": 2, "notes": 99}
    for name, days in others.items():
        (folder / name).mkdir()
        (folder / name / TOKENS).write_bytes(b"x" * size)
        os.utime(folder / name / TOKENS, times=(time.time() - days * 86400,) * 2)
    monkeypatch.setattr(module, "MAX_BYTES", int(3.5 * size))
    encode(max_length=26)
    left = {path.name for path in folder.iterdir() if path.is_dir() and path.name in others}
    assert left == {"3" * 32, "notes"}


def test_reading_makes_an_entry_recent(tmp_path, encode):
    encode()
    entry = entry_of(tmp_path) / ENTRY
    os.utime(entry, (0, 0))
    encode()
    assert time.time() - entry.stat().st_mtime < 60


def test_the_users_folder_is_found_and_can_be_switched_off(monkeypatch, tmp_path):
    monkeypatch.delenv("TUNESMITH_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_of(None).folder == tmp_path / "tunesmith" / "data"
    assert cache_of("mine").folder.name == "mine"
    assert cache_of("off") is None
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "other"))
    assert cache_of(None).folder == tmp_path / "other" / "data"
    monkeypatch.setenv("TUNESMITH_CACHE", "off")
    assert cache_of(None) is None


def test_a_report_survives_being_written_as_json(encode):
    _, report, _ = encode(max_length=26, too_long="truncate")
    assert Report.of(json.loads(json.dumps(report.state()))).to_json() == report.to_json()
    assert report.changes or report.drops
