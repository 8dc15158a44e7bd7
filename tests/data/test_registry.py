"""Names of datasets: entries of the registry, files, folders, Hub ids; and what an entry may not do."""

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from tests.data.registries import alpaca, asked, gather, make_file, make_registry
from tunesmith.data.registry import Source, entry_source, find_sources, list_names, read_entries
from tunesmith.errors import ConfigError, DataError

REAL = Path(__file__).parents[3] / "shared" / "data"
HUB = {"hf_hub_url": "owner/name"}
FILE = {"file_name": "a.json"}


def entry(root, **given):
    return entry_source("mine", given, str(root))


def sources(folder, names, **options):
    return find_sources(names, folder, **options)


# Where the data lies


# workflow: D1
@pytest.mark.parametrize(
    ("given", "place", "is_hub"),
    [
        ({**HUB, "script_url": "s", **FILE}, "owner/name", True),
        ({**HUB, "ms_hub_url": "m/n", **FILE}, "owner/name", True),
        ({"ms_hub_url": "m/n", **FILE}, "a.json", False),
        ({"hf_hub_url": None, **FILE}, "a.json", False),
    ],
)
def test_the_hub_comes_before_a_script_and_that_before_a_file(tmp_path, given, place, is_hub):
    found = entry(tmp_path, **given)
    assert found.place == (place if is_hub else os.path.join(tmp_path, place))
    assert found.is_hub == is_hub


# workflow: D1
def test_a_script_comes_before_a_file_and_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"mine: script_url names a loading script.*Write file_name .* or hf_hub_url"
    ):
        entry(tmp_path, script_url="some_script", **FILE)


@pytest.mark.parametrize("key", ["ms_hub_url", "om_hub_url", "cloud_file_name"])
def test_places_that_are_not_read_are_named(tmp_path, key):
    with pytest.raises(ConfigError, match=rf"{key} is not read\. Download the data .* or write hf_hub_url"):
        entry(tmp_path, **{key: "a/b"})


def test_an_entry_without_a_place_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"mine: it names no place"):
        entry(tmp_path, ranking=True)


def test_a_hub_entry_says_subset_split_folder_and_revision(tmp_path, monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, **options):
        calls.append((path, options))
        return alpaca(3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    more = {"subset": "en", "split": "test", "folder": "python", "revision": "abc"}
    make_registry(tmp_path, mine={**HUB, **more}, other=HUB)
    assert len(gather(tmp_path, "mine,other", split="validation").train) == 6
    named = {"name": "en", "split": "test", "data_dir": "python", "revision": "abc"}
    assert calls == [("owner/name", named), ("owner/name", {"split": "validation"})]


# Columns and tags


# workflow: D1
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, {"instruction": "instruction", "input": "input", "output": "output"}),
        ({"prompt": "q", "response": "a"}, {"instruction": "q", "output": "a"}),
        ({"prompt": "q", "query": "", "response": "a", "history": None}, {"instruction": "q", "output": "a"}),
        ({"prompt": "q", "query": "c", "history": "h"}, {"instruction": "q", "input": "c", "history": "h"}),
    ],
)
def test_columns_that_are_named_are_all_that_is_read_and_none_has_a_default_then(tmp_path, given, expected):
    assert entry(tmp_path, **FILE, **({} if given is None else {"columns": given})).columns == expected


# workflow: D1 D5
def test_rows_are_read_under_the_columns_of_the_entry_alone(tmp_path):
    row = {"question": "Add.", "context": "2+2", "answer": "4", "input": "no", "output": "no", "history": [["a", "b"]]}
    make_file(tmp_path, "a.json", [row])
    columns = {"prompt": "question", "query": "context", "response": "answer"}
    make_registry(tmp_path, mine={**FILE, "columns": columns}, short={**FILE, "columns": columns | {"query": None}})
    (example,) = gather(tmp_path, "mine").train
    assert [turn["content"] for turn in example["messages"]] == ["Add.\n2+2", "4"]
    assert asked(gather(tmp_path, "short").train) == ["Add."]


# workflow: D1
def test_the_history_is_read_where_the_entry_names_it(tmp_path):
    make_file(tmp_path, "a.json", alpaca(1, history=[["a", "b"]]))
    columns = {"prompt": "instruction", "response": "output", "history": "history"}
    make_registry(tmp_path, plain=FILE, long={**FILE, "columns": columns})
    assert len(gather(tmp_path, "plain").train[0]["messages"]) == 2
    assert [turn["content"] for turn in gather(tmp_path, "long").train[0]["messages"]] == ["a", "b", "row0", "0"]


def test_turns_stand_under_conversations_or_messages_unless_named():
    columns = {name: entry(".", **FILE, formatting=name).columns for name in ("sharegpt", "openai")}
    assert columns == {"sharegpt": {"conversations": "conversations"}, "openai": {"messages": "messages"}}
    named = entry(".", **FILE, formatting="sharegpt", columns={"messages": "turns", "tools": "tools"})
    assert named.columns == {"conversations": "turns", "tools": "tools"}
    assert (
        entry(".", **FILE, formatting="sharegpt", columns={"tools": "t"}).columns["conversations"] == "conversations"
    )


def test_tags_rename_the_keys_and_roles_of_turns(tmp_path):
    turns = [("S", "s"), ("U", "u"), ("A", "a"), ("F", '{"name": "f", "arguments": {}}'), ("O", "1"), ("A", "b")]
    make_file(tmp_path, "a.json", [{"turns": [{"who": who, "says": says} for who, says in turns]}])
    names = ("system_tag", "user_tag", "assistant_tag", "function_tag", "observation_tag")
    tags = {"role_tag": "who", "content_tag": "says", **dict(zip(names, "SUAFO"))}
    make_registry(tmp_path, mine={**FILE, "formatting": "sharegpt", "columns": {"messages": "turns"}, "tags": tags})
    (example,) = gather(tmp_path, "mine").train
    roles = [turn["role"] for turn in example["messages"]]
    assert roles == ["system", "user", "assistant", "assistant", "tool", "assistant"]
    assert example["messages"][3]["tool_calls"][0]["function"]["name"] == "f"


def test_a_role_without_a_tag_keeps_its_name_and_a_wrong_tag_is_named(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "me", "content": "u"}, {"role": "gpt", "content": "a"}]
    make_file(tmp_path, "a.json", [{"conversations": turns}])
    made = {**FILE, "formatting": "sharegpt", "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "me"}}
    make_registry(tmp_path, mine=made, wrong={**made, "tags": {"role_tag": "rolle"}})
    assert [turn["role"] for turn in gather(tmp_path, "mine").train[0]["messages"]] == ["system", "user", "assistant"]
    with pytest.raises(
        DataError, match=r"a\.json row 1: turn 1 has no 'rolle', which dataset_info.json names as role_"
    ):
        gather(tmp_path, "wrong")


def test_a_column_that_is_absent_is_named(tmp_path):
    make_file(tmp_path, "a.json", [{"qestion": "a", "answer": "b"}])
    columns = {"prompt": "question", "response": "answer"}
    make_registry(tmp_path, mine={**FILE, "columns": columns})
    with pytest.raises(DataError, match=r"reads 'question', but the row has qestion, answer\. Did you mean 'qestion'"):
        gather(tmp_path, "mine")


def test_an_optional_column_that_no_row_has_is_noted(tmp_path):
    make_file(tmp_path, "a.json", alpaca(2, sytem="Be brief."))
    columns = {"prompt": "instruction", "response": "output", "system": "system_prompt"}
    make_registry(tmp_path, mine={**FILE, "columns": columns})
    notes = gather(tmp_path, "mine").report.notes
    assert notes[1] == "mine: no row has the column 'system_prompt' that dataset_info.json names as system."


# What an entry may not say


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "sharegpt"}, r"mine: unknown key 'format'\. Did you mean 'formatting'\?"),
        ({"formatting": "sharegtp"}, r"unknown formatting 'sharegtp'\. Did you mean 'sharegpt'\? Known: alpaca,"),
        ({"formatting": "mine.py:read"}, r"unknown formatting 'mine\.py:read'"),
        ({"columns": {"promt": "q"}}, r"mine: columns: unknown key 'promt'\. Did you mean 'prompt'\?"),
        ({"columns": {"prompt": 1}}, r"columns: prompt: expected a text, got 1"),
        ({"columns": ["prompt"]}, r"columns: expected an object of texts"),
        ({"formatting": "sharegpt", "tags": {"roletag": "r"}}, r"tags: unknown key 'roletag'\. Did you mean 'role_"),
        ({"ranking": "yes"}, r"ranking: expected true or false, got 'yes'"),
        ({"num_samples": 0}, r"num_samples: expected a whole number, got 0"),
        ({"num_samples": True}, r"num_samples: expected a whole number, got True"),
        ({"trust_remote_code": True}, r"unknown key 'trust_remote_code'"),
    ],
)  # fmt: skip
def test_a_key_or_value_that_is_wrong_is_named(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        entry(tmp_path, **FILE, **given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{\n"a": {"file_name": }}', r"dataset_info\.json:2: not valid JSON"),
        ("[]", r"expected an object"),
        ('{"a": {}, "a": {}}', r"has the key 'a' twice"),
        ('{"a": "a.json"}', r"a: expected an object such as"),
    ],
)
def test_a_registry_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "dataset_info.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        sources(tmp_path, "a")


def test_a_broken_entry_does_not_keep_another_from_being_read(tmp_path):
    make_registry(tmp_path, good=FILE, bad={"fil_name": "a.json"})
    assert sources(tmp_path, "good")[0].place == os.path.join(tmp_path, "a.json")
    with pytest.raises(ConfigError, match=r"unknown key 'fil_name'\. Did you mean 'file_name'\?"):
        sources(tmp_path, "bad")


# Safety


# workflow: D1
# reliability: 49
@pytest.mark.parametrize(
    "name",
    ["../x.json", "a/../../x.json", "/etc/passwd", "C:\\x.json", "..\\x.json", "http://169.254.169.254/x.json",
     "link.json", "linked/x.json", "file:///etc/passwd", "a\0.json"],
)  # fmt: skip
def test_a_file_outside_the_registrys_folder_is_refused(tmp_path, name):
    make_file(tmp_path, "x.json", alpaca(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.json").symlink_to(tmp_path / "x.json")
    (folder / "linked").symlink_to(tmp_path)
    make_registry(folder, mine={"file_name": name})
    with pytest.raises(ConfigError, match=r"mine: file_name .* is refused: it must name a file or folder inside"):
        gather(folder, "mine")


# reliability: 49
def test_a_link_inside_a_folder_of_data_that_leads_out_is_refused(tmp_path):
    make_file(tmp_path, "secret.json", alpaca(1))
    make_file(tmp_path, "data/many/a.json", alpaca(1))
    make_registry(tmp_path / "data", mine={"file_name": "many"})
    assert len(gather(tmp_path / "data", "mine").train) == 1
    (tmp_path / "data" / "many" / "b.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ConfigError, match=r"file_name 'many/b\.json' is refused"):
        gather(tmp_path / "data", "mine")


def test_a_link_to_the_registrys_own_folder_is_followed(tmp_path):
    make_file(tmp_path, "real/a.json", alpaca(1))
    make_registry(tmp_path / "real", mine=FILE)
    (tmp_path / "data").symlink_to(tmp_path / "real")
    assert len(gather(tmp_path / "data", "mine").train) == 1


# reliability: 49
@pytest.mark.parametrize(
    "given",
    [{"hf_hub_url": name} for name in ("../a", "/etc", "http://a/b", "a/b/c", "~/a", "a/..")]
    + [{**HUB, "folder": name} for name in ("../x", "/etc", "http://169.254.169.254")],
)
def test_a_hub_id_that_is_a_path_or_address_is_refused(tmp_path, given):
    with pytest.raises(ConfigError, match=r"hf_hub_url: expected a Hub id|folder: expected a folder inside"):
        entry(tmp_path, **given)


def test_a_folder_here_is_not_read_in_place_of_the_hubs_dataset(tmp_path, monkeypatch):
    make_file(tmp_path, "owner/name/a.json", alpaca(1))
    make_registry(tmp_path, mine=HUB)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"hf_hub_url is owner/name, but here is a folder of that name"):
        gather(tmp_path, "mine")


# Names


def test_names_come_as_a_list_or_with_commas(tmp_path, monkeypatch):
    assert list_names("a, b,") == list_names(["a", "b"]) == ["a", "b"]
    assert list_names(["a,b", Path("c")]) == ["a", "b", "c"]
    assert list_names(None) == list_names("") == []
    monkeypatch.chdir(tmp_path)
    make_file(tmp_path, "a,b.json", [])
    assert list_names("a,b.json") == ["a,b.json"]


def test_a_registered_name_wins_over_a_file_of_that_name_and_this_is_noted(tmp_path, monkeypatch):
    make_file(tmp_path, "mine/b.json", alpaca(5))
    make_file(tmp_path, "data/a.json", alpaca(2))
    make_registry(tmp_path / "data", mine=FILE)
    monkeypatch.chdir(tmp_path)
    found = gather("data", "mine")
    assert len(found.train) == 2
    assert found.report.notes[1].startswith(
        "mine: the entry of dataset_info.json, not the file or folder of that name"
    )
    assert len(gather("data", "./mine").train) == 5


# workflow: A3 D1
def test_an_undefined_name_is_named_with_the_nearest_and_what_to_do(tmp_path):
    make_registry(tmp_path, identity=FILE)
    with pytest.raises(
        ConfigError, match=r"^Undefined dataset identiy in dataset_info\.json.*Did you mean 'identity'\? Add"
    ):
        sources(tmp_path, "identiy")
    with pytest.raises(ConfigError, match=r"^Undefined dataset identity: .* has no dataset_info\.json"):
        sources(tmp_path / "nowhere", "identity")


def test_paths_and_hub_ids_need_no_registry(tmp_path):
    path = make_file(tmp_path, "a.jsonl", alpaca(1))
    assert sources(tmp_path / "nowhere", [path, "owner/name"], split="test") == [
        Source(path, path, split="test"),
        Source("owner/name", "owner/name", is_hub=True, split="test"),
    ]
    assert read_entries(tmp_path) == {}


def test_an_absent_file_is_named_with_its_neighbours(tmp_path):
    make_file(tmp_path, "train.jsonl", alpaca(1))
    with pytest.raises(DataError, match=r"trian\.jsonl is neither a file .*Did you mean 'train\.jsonl'\?"):
        gather(tmp_path, f"{tmp_path}/trian.jsonl")
    make_registry(tmp_path, mine={"file_name": "trian.jsonl"})
    with pytest.raises(DataError, match=r"Did you mean 'train\.jsonl'\?"):
        gather(tmp_path, "mine")


# SHA-1


# workflow: D3
def test_a_sum_that_is_absent_of_several_files_or_wrong_is_told_and_the_data_read(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, logger="tunesmith")
    path = make_file(tmp_path, "many/a.json", alpaca(2))
    right = hashlib.sha1(Path(path).read_bytes()).hexdigest()
    one = {"file_name": "many/a.json"}
    make_registry(
        tmp_path,
        absent=one,
        several={"file_name": "many", "file_sha1": right},
        wrong={**one, "file_sha1": "0" * 40},
        right={**one, "file_sha1": right.upper()},
    )
    assert len(gather(tmp_path, "absent").train) == 2
    assert "absent: dataset_info.json names no file_sha1" in caplog.text
    wrong = gather(tmp_path, "wrong")
    assert len(wrong.train) == 2
    assert any(f"has the SHA-1 sum {right}, not 000" in note for note in wrong.report.notes)
    assert [r.levelname for r in caplog.records if "SHA-1 sum" in r.message] == ["WARNING"]
    assert gather(tmp_path, "right").report.notes == ["format: alpaca (columns instruction, output)"]
    make_file(tmp_path, "many/b.json", alpaca(2))
    several = gather(tmp_path, "several")
    assert len(several.train) == 4
    assert any("not checked, because it is the sum of one file, not 2" in note for note in several.report.notes)


# A real registry


# workflow: D1
def test_a_real_registry_is_read_whole_and_what_is_here_loads():
    if not (REAL / "dataset_info.json").is_file():
        pytest.skip("dataset_info.json is not in ../shared/data")
    entries = read_entries(REAL)
    assert len(entries) == 104
    for name, entry in entries.items():
        if "ms_hub_url" in entry and json.dumps(entry).count("hub_url") == 1:
            with pytest.raises(ConfigError, match="ms_hub_url is not read"):
                entry_source(name, entry, REAL)
        else:
            assert entry_source(name, entry, REAL).place
    stages = {"identity": "sft", "alpaca_en_demo": "sft", "alpaca_zh_demo": "sft", "glaive_toolcall_en_demo": "sft"}
    stages |= {"dpo_en_demo": "rm", "c4_demo": "pt", "wiki_demo": "pt"}
    sizes = {name: len(gather(REAL, name, stage=stage).train) for name, stage in stages.items()}
    assert sizes == dict(zip(stages, (91, 999, 1000, 300, 300, 300, 9)))
    with pytest.raises(DataError, match="the row has images; only text is trained on"):
        gather(REAL, "mllm_demo")
