"""Files, folders, Hub ids and lists of these; held-out rows."""

import pytest

from tests.data.files import load, values, write
from tunesmith.data.load import split_rows
from tunesmith.data.report import Report
from tunesmith.data.rows import Row
from tunesmith.errors import ConfigError, DataError


def test_a_list_of_sources_is_joined_and_each_gives_at_most_max_samples(tmp_path):
    first = write(tmp_path, "1.jsonl", b'{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    second = write(tmp_path, "2.json", b'[{"a": 4}, {"a": 5}, {"a": 6}]')
    report = Report()
    assert values(load([first, second], max_samples=2, report=report)) == [{"a": 1}, {"a": 2}, {"a": 4}, {"a": 5}]
    assert report.read == 4


def test_a_folder_is_read_in_name_order_without_hidden_and_other_files(tmp_path):
    for name, content in {"b.txt": b"2", "a.txt": b"1", ".c.txt": b"3", "README.md": b"x"}.items():
        write(tmp_path, name, content)
    report = Report()
    assert values(load(tmp_path, report=report)) == [{"text": "1"}, {"text": "2"}]
    assert report.notes == [f"{tmp_path}: not read: README.md"]


def test_folders_in_a_folder_and_links_to_nothing_are_named(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.txt").symlink_to("gone.txt")
    (tmp_path / ".a.txt").symlink_to("gone.txt")
    with pytest.raises(DataError, match=r"holds no data file\..* Its folders are not looked into; name one: more/\."):
        load(tmp_path)
    write(tmp_path, "b.txt", b"1")
    report = Report()
    assert values(load(tmp_path, report=report)) == [{"text": "1"}]
    assert report.notes == [f"{tmp_path}: not read: more/, a.txt (a link to nothing)"]
    with pytest.raises(DataError, match=r"a\.txt is a link to gone\.txt, which is not there"):
        load(tmp_path / "a.txt")


def test_a_saved_dataset_of_several_splits_names_them(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"in splits\. Name one of them: .*saved/test, .*saved/train\."):
        load(tmp_path / "saved")
    assert values(load(tmp_path / "saved" / "train")) == [{"text": "a"}]


def test_a_split_of_files_is_said_to_be_read_whole(tmp_path):
    report = Report()
    path = write(tmp_path, "a.txt", b"1")
    assert values(load(path, split="test", report=report)) == [{"text": "1"}]
    assert report.notes == [f"{path}: split test is for Hub datasets; files are read whole"]


# workflow: D2
@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".csv", b"text\na\nb\n"),
        (".json", b'[{"text": "a"}, {"text": "b"}]'),
        (".jsonl", b'{"text": "a"}\n{"text": "b"}\n'),
        (".txt", b"a\nb\n"),
    ],
)
def test_a_file_and_a_folder_of_files_are_read_of_every_type(tmp_path, suffix, content):
    one = write(tmp_path, f"1{suffix}", content)
    assert values(load(one)) == [{"text": "a"}, {"text": "b"}]
    write(tmp_path, f"2{suffix}", content)
    assert [(row.value["text"], row.line > 0) for row in load(tmp_path)] == [(text, True) for text in "abab"]


# workflow: D2
def test_a_folder_of_two_types_is_an_error(tmp_path):
    write(tmp_path, "a.txt", b"1")
    write(tmp_path, "b.csv", b"a\n1\n")
    with pytest.raises(DataError, match=r"file type does not match: it mixes types: a\.txt and b\.csv\. Move one"):
        load(tmp_path)


def test_a_folder_may_hold_json_as_arrays_and_in_lines(tmp_path):
    write(tmp_path, "a.json", b'[{"a": 1}]')
    write(tmp_path, "b.jsonl", b'{"a": 2}\n')
    assert values(load(tmp_path)) == [{"a": 1}, {"a": 2}]


# workflow: D2
@pytest.mark.parametrize("name", ["a.xlsx", "a", "a.json.zip"])
def test_another_ending_is_an_error(tmp_path, name):
    path = write(tmp_path, name, b"x")
    with pytest.raises(DataError, match=r"File extension must be txt, csv, json or jsonl"):
        load(path)
    with pytest.raises(DataError, match=r"holds no data file\. It must hold files ending in \.json,.*File extension"):
        load(tmp_path)


# Hub ids and absent files


def test_a_hub_id_is_loaded_with_its_split(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [{"a": 1}])
    assert load("some-owner/some.name", split="validation") == [Row({"a": 1}, "some-owner/some.name", 1)]
    assert asked == [("some-owner/some.name", "validation")]


def test_a_dataset_the_hub_does_not_give_is_a_data_error(monkeypatch):
    import datasets

    def refuse(name, split):
        raise ConnectionError("Couldn't reach the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"'a/b' is no file or folder here .*split 'train'\): Couldn't reach the Hub\."
    ):
        load("a/b")


@pytest.mark.parametrize("name", ["trian.jsonl", "{folder}/trian.jsonl", "./trian.jsonl"])
def test_an_absent_file_is_named_with_its_nearest_neighbour(tmp_path, monkeypatch, name):
    write(tmp_path, "train.jsonl", b'{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"neither a file nor a folder.*Did you mean 'train\.jsonl'\?"):
        load(name.format(folder=tmp_path))


def test_a_path_under_a_folder_that_is_here_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="neither a file nor a folder"):
        load("data/chats")


def test_an_absent_folder_is_named(tmp_path):
    with pytest.raises(DataError, match=r"There is no folder .*nowhere either"):
        load(tmp_path / "nowhere" / "a.jsonl")


# Held-out rows


@pytest.mark.parametrize(
    ("val_size", "num_held_out"), [(0, 0), (0.001, 1), (0.2, 2), (0.25, 2), (1, 1), (1.0, 1), (4, 4), (9, 9)]
)
def test_val_size_is_a_share_below_one_and_a_count_from_one_on(val_size, num_held_out):
    rows = list(range(10))
    train, held_out = split_rows(rows, val_size, seed=0)
    assert len(held_out) == num_held_out
    assert train == [row for row in rows if row not in held_out]
    assert held_out == sorted(held_out)


def test_the_split_depends_on_the_seed_alone():
    rows = list(range(1000))
    assert split_rows(rows, 0.1, seed=3) == split_rows(rows, 0.1, seed=3)
    assert split_rows(rows, 0.1, seed=3) != split_rows(rows, 0.1, seed=4)


@pytest.mark.parametrize(("rows", "val_size"), [([1], 0.1), ([1, 2], 2), ([1, 2, 3], 0.99)])
def test_a_split_that_leaves_nothing_to_train_on_is_an_error(rows, val_size):
    with pytest.raises(DataError, match=rf"val_size: {val_size} holds out .* none is left to train on"):
        split_rows(rows, val_size, seed=0)


@pytest.mark.parametrize("val_size", [1.5, -0.1])
def test_a_count_must_be_whole(val_size):
    with pytest.raises(ConfigError, match="expected a share below 1 or a whole number of rows"):
        split_rows([1, 2, 3], val_size, seed=0)
