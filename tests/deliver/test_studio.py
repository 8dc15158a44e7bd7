"""The studio over hand-made run directories: what it shows, what it never serves, training that needs no server."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("starlette", reason="needs the extra studio")
pytest.importorskip("uvicorn", reason="needs the extra studio")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from starlette.testclient import TestClient

from tunesmith.deliver.web import access, launch, run_folder
from tunesmith.deliver.web import studio as door
from tunesmith.deliver.web.board import create_board
from tunesmith.errors import ConfigError
from tunesmith.lookup import lookup
from tunesmith.recipe import load_recipe
from tunesmith.runs import Run, read_status

HERE = "http://127.0.0.1:7860"
EVIL = "<script>alert(1)</script> \x1b[31mred\u202e ![](http://evil.example/beacon.png)"
RECIPE = "model_name_or_path: model\ndataset: rows.jsonl\noutput_dir: runs/mine\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of runs below the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    return Path("runs")


@pytest.fixture
def client(folder):
    with TestClient(create_board(folder, partial(load_recipe, task="train")), base_url=HERE) as client:
        yield client


def make_run(path, state="completed", **status):
    """A run directory of 20 steps with every file that the page shows."""
    path.mkdir(parents=True)
    run = Run(path)
    for step in range(1, 21):
        run.log_metrics({"step": step, "loss": 2.0 - step / 20, "learning_rate": 1e-4})
    run.log_metrics({"step": 20, "eval_loss": 1.25, "eval_chats_loss": 1.5})
    for when, answer in (("before", "?"), ("after", EVIL)):
        line = {"index": 0, "prompt": EVIL, "label": "Paris", "predict": answer}
        (path / f"predictions_{when}.jsonl").write_text(json.dumps(line) + "\n")
    run.save_json("data_report.json", {"train": {"rows": {"read": 9, "kept": 8, "dropped": 1}}, "evaluation": None})
    run.save_json("all_results.json", {"train_loss": 1.5})
    run.event("choice", EVIL)
    run.save_recipe({"learning_rate": 1e-4, "hub_token": "abc"})
    (path / "README.md").write_text(f"# Card\n{EVIL}")
    figures = {"step": 20, "total_steps": 20, "loss": 1.0, "eval_loss": 1.25, "tokens_per_second": 400.0}
    run.write_status(state, **{**figures, **status})
    return run


def listed(client):
    return {run["id"]: run for run in client.get("/api/runs").json()["runs"]}


# ---------------------------------------------------------------------------------------------------- what is shown


# workflow: W8
def test_the_list_tells_where_each_run_stands(client, folder):
    make_run(folder / "mine", state="running", step=12, eta_seconds=34.0)
    make_run(folder / "group" / "seed-1")
    (folder / "notes").mkdir()
    runs = listed(client)
    assert sorted(runs) == ["group~seed-1", "mine"]
    expected = {"state": "running", "is_going": True, "step": 12, "total_steps": 20, "loss": 1.0, "eval_loss": 1.25}
    assert expected.items() <= runs["mine"].items()
    assert (runs["mine"]["eta_seconds"], runs["mine"]["tokens_per_second"]) == (34.0, 400.0)
    assert runs["group~seed-1"]["state"] == "completed"


# workflow: W8
def test_a_runs_page_has_its_curve_answers_data_recipe_card_and_events(client, folder):
    make_run(folder / "mine")
    run = client.get("/api/runs/mine").json()
    assert run["data"]["train"]["rows"] == {"read": 9, "kept": 8, "dropped": 1}
    assert run["answers"][0]["expected"] == "Paris"
    assert run["answers"][0]["before"] == "?"
    assert run["results"] == {"train_loss": 1.5}
    assert "learning_rate: 0.0001" in run["recipe"]
    assert run["card"].startswith("# Card\n")
    assert run["events"][0]["kind"] == "choice"
    curve = client.get("/api/runs/mine/curve").json()
    assert curve["loss"][:2] == [[1, 1.95], [2, 1.9]]
    assert curve["eval_loss"] == [[20, 1.25]]
    assert curve["eval_chats_loss"] == [[20, 1.5]]


# reliability: 65
def test_rows_of_the_data_come_as_json_with_their_invisible_characters_shown(client, folder):
    make_run(folder / "mine")
    response = client.get("/api/runs/mine")
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "script-src 'self'" in response.headers["content-security-policy"]
    run = response.json()
    for text in (run["answers"][0]["after"], run["events"][0]["message"], run["card"]):
        assert "<script>alert(1)</script> \\x1b[31mred\\u202e !" in text


def test_a_run_of_another_program_is_shown_from_its_trainer_log(client, folder):
    (folder / "other").mkdir()
    lines = [{"current_steps": step, "total_steps": 9, "loss": 3 - step} for step in (1, 2)]
    (folder / "other" / "trainer_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "other" / "generated_predictions.jsonl").write_text('{"prompt": "a", "label": "b", "predict": "c"}\n')
    assert {"state": "unknown", "step": 2, "total_steps": 9, "loss": 1}.items() <= listed(client)["other"].items()
    assert client.get("/api/runs/other/curve").json() == {"loss": [[1, 2], [2, 1]]}
    assert client.get("/api/runs/other").json()["answers"] == [{"prompt": "a", "expected": "b", "after": "c"}]


def test_files_that_are_damaged_or_missing_leave_the_rest(client, folder):
    (folder / "bare").mkdir()
    (folder / "bare" / "status.json").write_text('{"state": "running", "host": "elsewhere", "loss": NaN}')
    (folder / "bare" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": "nan"}\n{"st')
    (folder / "bare" / "all_results.json").write_text("{")
    (folder / "bare" / "predictions_after.jsonl").write_text('[1]\n{"predict": 3}\n')
    assert client.get("/api/runs/bare/curve").json() == {"loss": [[1, 2.0]]}
    run = client.get("/api/runs/bare").json()
    assert (run["state"], run["loss"], run["results"], run["recipe"]) == ("running", "nan", None, None)
    assert run["answers"] == [{"prompt": None, "expected": None, "after": None}]


def test_a_folder_that_is_a_run_is_shown_and_an_empty_or_missing_one_has_none(tmp_path):
    make_run(tmp_path / "mine")
    assert list(run_folder.find_runs(tmp_path / "mine")) == ["mine"]
    assert run_folder.find_runs(tmp_path / "nothing") == {}


def test_a_long_curve_keeps_its_shape_and_its_last_point():
    points = [[step, 1 / step] for step in range(1, 100_001)]
    few = run_folder.thinned(points)
    assert 1000 < len(few) <= run_folder.MAX_POINTS
    assert few[-1] == points[-1]
    assert all(one[0] < other[0] for one, other in itertools.pairwise(few))
    assert run_folder.thinned(points[:7]) == points[:7]


# ---------------------------------------------------------------------------------------------------- what is not


# reliability: 66
@pytest.mark.parametrize(
    "path",
    ["/runs/..%2f..", "/api/runs/..%2f..", "/api/runs/%2e%2e", "/api/runs/..", "/api/runs/mine%2f..%2f..%2fsecret",
     "/api/runs/~", "/api/runs/..~..", "/api/runs/secret/curve", "/studio.js/../../../secret", "/api/runs/mine%00"],
)  # fmt: skip
def test_a_run_is_named_by_its_id_and_by_no_path(client, folder, path):
    make_run(folder / "mine")
    make_run(folder.parent / "secret")
    response = client.get(path)
    assert response.status_code == 404, response.text
    assert "Paris" not in response.text


def test_links_that_lead_out_of_the_folder_are_not_followed(client, folder):
    make_run(folder.parent / "elsewhere")
    (folder / "linked").symlink_to(folder.parent.resolve() / "elsewhere")
    make_run(folder / "mine")
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "mine" / "README.md").unlink()
    (folder / "mine" / "README.md").symlink_to(folder.parent.resolve() / "secret.txt")
    assert list(listed(client)) == ["mine"]
    assert client.get("/api/runs/mine").json()["card"] is None


def test_the_access_rules_are_the_servers(folder, monkeypatch):
    monkeypatch.delenv(access.TOKEN_VARIABLE, raising=False)
    assert door.studio.__kwdefaults__["host"] == "127.0.0.1"
    with TestClient(create_board(folder, load_recipe, token="a-token"), base_url="http://gpu-box:7860") as client:
        assert client.get("/api/runs").status_code == 401
        assert client.post("/api/runs", json={"recipe": RECIPE}).status_code == 401
        assert client.get("/api/runs", headers={"authorization": "Bearer a-token"}).status_code == 200


@pytest.mark.parametrize("path", ["/api/runs", "/api/check", "/api/runs/mine/stop"])
def test_a_foreign_page_starts_and_stops_nothing(client, folder, monkeypatch, path):
    monkeypatch.setattr(launch, "start_training", lambda *args: pytest.fail("started"))
    monkeypatch.setattr(launch, "stop_training", lambda *args: pytest.fail("stopped"))
    make_run(folder / "mine", state="running")
    assert client.post(path, json={"recipe": RECIPE}, headers={"origin": "http://evil.example"}).status_code == 403
    assert client.post(path, json={"recipe": RECIPE}, headers={"host": "evil.example"}).status_code == 403
    assert client.post(path, data={"recipe": RECIPE}).status_code == 415  # what a form can send


# ---------------------------------------------------------------------------------------------------- to start one


# workflow: W8
def test_a_recipe_is_checked_with_all_its_problems_in_one_report(client):
    wrong = "model_name_or_path: model\ndataset: rows.jsonl\nlearnin_rate: 1\npacking: maybe\noutput_dir: runs/mine\n"
    response = client.post("/api/check", json={"recipe": wrong})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "recipe.yaml:3: unknown key 'learnin_rate'. Did you mean 'learning_rate'?" in message
    assert "recipe.yaml:4: packing: expected true or false" in message
    assert "/tmp" not in message
    assert client.post("/api/check", json={"recipe": RECIPE}).json() == {"output_dir": "runs/mine"}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Give the path of a recipe, or paste one"),
        ({"recipe": 3}, "Give the path of a recipe, or paste one"),
        ({"path": "/etc/passwd"}, "there is no such recipe"),
        ({"path": "../other.yaml"}, "there is no such recipe"),
        ({"path": "missing.yaml"}, "there is no such recipe"),
        ({"path": "a\0.yaml"}, "there is no such recipe"),
        ({"recipe": RECIPE + "format: evil.py:read\n"}, "'evil.py:read' names code"),
        ({"recipe": RECIPE + "format: os.path:join\n"}, "'os.path:join' names code"),
        ({"recipe": RECIPE + "metrics: 'exact_match, my evil.py:f'\n"}, "'my evil.py:f' names code"),
        ({"recipe": RECIPE + "metrics: [exact_match, ' evil.py:f']\n"}, "'evil.py:f' names code"),
        ({"recipe": RECIPE.replace("runs/mine", '"runs/a\\0b"')}, "null byte"),
        (
            {"recipe": RECIPE.replace("runs/mine", "/tmp/mine")},
            "output_dir is /tmp/mine. Name a folder that",
        ),
        ({"recipe": RECIPE.replace("runs/mine", "runs/../mine")}, "output_dir is runs/../mine"),
        ({"recipe": RECIPE.replace("runs/mine", "runs")}, "output_dir is runs."),
        ({"recipe": RECIPE.replace("output_dir: runs/mine\n", "")}, "output_dir is missing"),
    ],
)
def test_nothing_is_started_from_what_may_not_be(client, folder, monkeypatch, body, message):
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: pytest.fail("started"))
    (folder.parent.parent / "other.yaml").write_text(RECIPE)
    for address in ("/api/check", "/api/runs"):
        response = client.post(address, json=body)
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]["message"]
    assert list(folder.iterdir()) == []


STUB = """
import json, pathlib, sys, time
from datetime import UTC, datetime
recipe = sys.argv[-1]
print("training", sys.argv[1:], flush=True)
if "BROKEN" in open(recipe).read():
    sys.exit("ConfigError: no such model")
import os, socket
run = pathlib.Path("runs/mine"); run.mkdir(exist_ok=True)
def say(state, **more):
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    text = json.dumps({"state": state, "pid": os.getpid(), "host": socket.gethostname(), "started": now, **more})
    (run / "new").write_text(text); (run / "new").rename(run / "status.json")
say("running", has_token="TUNESMITH_TOKEN" in os.environ, may_import="TUNESMITH_NO_CODE" not in os.environ)
try:
    time.sleep(30)
except KeyboardInterrupt:
    say("interrupted")
    sys.exit(130)
"""


@pytest.fixture
def stub(folder, monkeypatch):
    """A `python -m tunesmith train` that writes a status and waits, so that no test trains for seconds."""
    (folder.parent / "tunesmith").mkdir()
    (folder.parent / "tunesmith" / "__init__.py").touch()  # without it, an installed tunesmith would be found instead
    (folder.parent / "tunesmith" / "__main__.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(folder.parent.resolve()))
    monkeypatch.setenv(access.TOKEN_VARIABLE, "a-token")
    started, popen = [], subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_for(what, seconds=15):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found


# workflow: W8
def test_a_pasted_recipe_is_trained_by_a_process_that_the_page_can_stop(client, folder, stub):
    response = client.post("/api/runs", json={"recipe": RECIPE})
    assert (response.status_code, response.json()["id"]) == (201, "mine")
    assert listed(client)["mine"]["state"] in ("starting", "running")
    wait_for(lambda: listed(client)["mine"]["state"] == "running")
    assert (folder / "mine.yaml").read_text() == RECIPE
    assert f"training ['train', '{(folder / 'mine.yaml').resolve()}']" in client.get("/api/runs/mine").json()["output"]
    assert read_status(folder / "mine")["has_token"] is False
    again = client.post("/api/runs", json={"recipe": RECIPE})
    assert (again.status_code, "still going" in again.json()["error"]["message"]) == (400, True)
    assert os.getpgid(stub[0].pid) != os.getpgid(0)  # Ctrl-C in the server's terminal does not reach it
    assert client.post("/api/runs/mine/stop", json={}).json() == {"pid": stub[0].pid}
    wait_for(lambda: listed(client)["mine"]["state"] == "interrupted")
    assert stub[0].wait() == 130
    assert "nothing was stopped" in client.post("/api/runs/mine/stop", json={}).json()["error"]["message"]


def test_a_recipe_file_is_trained_where_it_lies(client, folder, stub):
    Path("recipe.yaml").write_text(RECIPE)
    client.post("/api/runs", json={"path": "recipe.yaml"})
    assert stub[0].args == [sys.executable, "-m", "tunesmith", "train", str(Path("recipe.yaml").resolve())]
    assert not (folder / "mine.yaml").exists()
    wait_for(lambda: listed(client)["mine"]["state"] == "running")
    assert read_status(folder / "mine")["may_import"] is True


# reliability: 66
@pytest.mark.parametrize("how", ["pasted", "pasted before"])
def test_a_process_whose_recipe_came_over_the_network_imports_nothing(client, folder, stub, how):
    (folder / "mine.yaml").write_text(RECIPE)
    client.post("/api/runs", json={"recipe": RECIPE} if how == "pasted" else {"path": "runs/mine.yaml"})
    wait_for(lambda: listed(client)["mine"]["state"] == "running")
    assert read_status(folder / "mine")["may_import"] is False


def test_such_a_process_refuses_what_its_recipe_names(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("function = len\n")
    assert lookup({}, f"{tmp_path}/mine.py:function", "metrics") is len
    monkeypatch.setenv("TUNESMITH_NO_CODE", "1")
    with pytest.raises(ConfigError, match=r"mine\.py:function' names code, which a pasted recipe may not"):
        lookup({}, f"{tmp_path}/mine.py:function", "metrics")


def test_files_of_a_run_that_make_no_sense_hide_no_other_run(client, folder):
    make_run(folder / "good")
    odd = make_run(folder / "odd").path
    (odd / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": "x", "loss": 3.0}\n' + "[" * 100_000 + "\n")
    (folder / "odd.start.json").write_text('{"pid": 1e400, "host": "h", "started": "s"}')
    assert listed(client).keys() == {"good", "odd"}
    assert client.get("/api/runs/odd/curve").json() == {"loss": [[1, 2.0]]}
    for text in ("[" * 100_000, '{"a":' * 100_000):
        (folder / "odd.start.json").write_text(text)
        (odd / "status.json").write_text(text)
        (odd / "all_results.json").write_text(text)
        assert listed(client).keys() == {"good", "odd"}
        assert client.get("/api/runs/odd").status_code == 200


def test_a_start_that_fails_before_its_run_says_why_and_leaves_an_earlier_run_as_it_was(client, folder, stub):
    client.post("/api/runs", json={"recipe": RECIPE + "# BROKEN\n"})
    wait_for(lambda: listed(client)["mine"]["state"] == "failed")
    run = client.get("/api/runs/mine").json()
    assert run["start_failed"] is True
    assert "ConfigError: no such model" in run["output"]
    (folder / "mine.start.json").unlink()
    make_run(folder / "mine")
    client.post("/api/runs", json={"recipe": RECIPE + "# BROKEN again\n"})
    wait_for(lambda: listed(client)["mine"]["start_failed"])
    assert listed(client)["mine"]["state"] == "completed"
    assert sorted(path.name for path in folder.glob("*.yaml")) == ["mine-2.yaml", "mine.yaml"]


# workflow: W8
# reliability: 68
def test_training_goes_on_without_the_server_and_a_new_one_finds_it(folder, stub):
    Path("recipe.yaml").write_text(RECIPE)
    code = (
        "from pathlib import Path; from tunesmith.deliver.web import launch; import os, signal\n"
        "print(launch.start_training(Path('recipe.yaml'), Path('runs/mine')).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    source = str(Path(launch.__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": source}
    killed = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    pid = int(killed.stdout)
    try:
        wait_for(lambda: read_status(folder / "mine"))
        boards = [TestClient(create_board(folder, load_recipe), base_url=HERE) for _ in range(2)]
        one, other = (board.get("/api/runs/mine").json() for board in boards)
        assert one == other
        assert one["state"] == "running"
        assert boards[0].post("/api/runs/mine/stop", json={}).json() == {"pid": pid}
        wait_for(lambda: read_status(folder / "mine")["state"] == "interrupted")
    finally:
        if launch.is_training(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_process_that_is_not_ours_is_never_stopped(client, folder, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda pid, sign: None if sign == 0 else pytest.fail("stopped"))
    make_run(folder / "reused", state="running", pid=os.getppid())
    make_run(folder / "elsewhere", state="running", host="another-machine")
    make_run(folder / "done", pid=os.getppid())
    make_run(folder / "odd", state="running", pid=-1)
    for run_id in ("reused", "elsewhere", "done", "odd"):
        response = client.post(f"/api/runs/{run_id}/stop", json={})
        assert (response.status_code, "nothing was stopped" in response.text) == (400, True)


# ---------------------------------------------------------------------------------------------------- the door


def test_the_door_says_where_the_page_is_and_takes_no_file(folder, monkeypatch):
    monkeypatch.delenv(access.TOKEN_VARIABLE, raising=False)
    monkeypatch.setattr(door, "run_app", lambda app, listener: listener.close())
    console = Console(file=io.StringIO(), width=40)
    door.studio(folder, load=load_recipe, port=0, console=console)
    assert "http://127.0.0.1:" in console.file.getvalue()
    assert "token" not in console.file.getvalue()
    Path("file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        door.studio("file", load=load_recipe, port=0)


# reliability: 58
def test_missing_libraries_are_named_with_the_extra(folder, monkeypatch):
    monkeypatch.setattr(access.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'tunesmith\[studio\]'"):
        door.studio(folder, load=load_recipe)


def test_the_studio_needs_no_torch():
    code = "import sys, tunesmith.deliver.web.board, tunesmith.deliver.web.studio; sys.exit('torch' in sys.modules)"
    source = str(Path(launch.__file__).parents[3])
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": source}).returncode == 0
