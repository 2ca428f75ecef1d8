"""Versions go both ways: journals of every earlier version are taken up, those of a newer one stay as they are.

`tests/journals/` has what real daemons of those revisions left when they were killed: tasks 1 to 4 have ended, 5 ran,
then 8, 6 and 7 waited (before tasks could be moved: 6, 7, 8). Two of them have a picture, and 5 has a key.
"""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.queue.journal import MIGRATIONS, Journal
from engine.queue.tasks import Task
from tests.processes import eventually, workers
from tests.stand_ins import job
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

JOURNALS = sorted((Path(__file__).parent / "journals").glob("*.sql"))
STATUSES = {1: "completed", 2: "failed", 3: "completed", 4: "cancelled"}
QUICK = {"num_inference_steps": 1}


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(file, "png")
    return file.getvalue()


def encoded(colour: str) -> str:
    return base64.b64encode(png(colour)).decode()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    """A daemon that makes small files. Not started."""
    made = StubDaemon(tmp_path / "own", make_clips)
    yield made
    made.stop(signal.SIGKILL)


def journal_of(daemon: StubDaemon) -> sqlite3.Connection:
    daemon.state.mkdir(exist_ok=True)
    return sqlite3.connect(daemon.state / "journal.sqlite", isolation_level=None)


def change(daemon: StubDaemon, *statements: str) -> None:
    with closing(journal_of(daemon)) as db:
        for statement in statements:
            db.execute(statement)


def stored(daemon: StubDaemon, query: str) -> list[Any]:
    with closing(journal_of(daemon)) as db:
        return [row[0] for row in db.execute(query)]


def left_by(file: Path, daemon: StubDaemon) -> None:
    """Let the daemon find the journal of an older version, with the pictures and files that it names, today's."""
    text = file.read_text().replace("@HOME@", str(daemon.folder))
    first_s = float(re.findall(r'"created_at": ([0-9.]+)', text)[0])
    later_s = round(time.time() - first_s - 60)
    with closing(journal_of(daemon)) as db:
        db.executescript(text)
        for name in ("created_at", "started_at", "finished_at"):
            moved = f"json_set(record, '$.{name}', (record ->> '$.{name}') + {later_s})"
            db.execute(f"UPDATE tasks SET record = {moved} WHERE record ->> '$.{name}' IS NOT NULL")
        db.execute(f"UPDATE tasks SET finished_at = finished_at + {later_s}")
        db.execute(f"UPDATE replies SET created_at = created_at + {later_s}")
        query = "SELECT f.value ->> '$.filename', finished_at FROM tasks, json_each(record, '$.files') AS f"
        made = db.execute(query).fetchall()
    for colour in ("red", "blue"):
        stored_picture = daemon.state / "inputs" / hashlib.sha256(png(colour)).hexdigest()
        stored_picture.parent.mkdir(exist_ok=True)
        stored_picture.write_bytes(png(colour))
    daemon.outputs.mkdir()
    for name, finished_at in made:
        shutil.copy(daemon.folder / "clip.mp4", daemon.outputs / name)
        os.utime(daemon.outputs / name, (finished_at, finished_at))


# ---------------------------------------------------------------------------------------------------------------- older


@pytest.mark.parametrize("file", JOURNALS, ids=lambda file: file.stem)
def test_the_journal_of_every_older_version_is_taken_up_whole(file: Path, daemon: StubDaemon) -> None:
    left_by(file, daemon)
    daemon.start()
    daemon.post("/queue/pause")
    tasks = {task["task_id"]: task for task in daemon.get("/tasks").json()["data"]["tasks"]}
    assert set(tasks) == set(range(1, 9))
    assert {task_id: tasks[task_id]["status"] for task_id in STATUSES} == STATUSES
    assert tasks[2]["error"] == {"code": "generation_failed", "message": "Nothing works today."}
    assert tasks[1]["timings"]["denoising"] == 2.0
    assert daemon.get(f"/download/{tasks[3]['files'][0]['filename']}").status_code == 200
    daemon.post("/queue/resume")
    assert [daemon.finish(task_id)["status"] for task_id in (5, 6, 7, 8)] == ["completed"] * 4
    starts = {task_id: daemon.status(task_id)["started_at"] for task_id in (5, 6, 7, 8)}
    order = [5, 6, 7, 8] if file.stem == "2e638e7" else [5, 8, 6, 7]
    assert sorted(starts, key=starts.__getitem__) == order
    assert [len(daemon.status(task_id)["files"]) for task_id in (7, 8)] == [1, 2]
    assert daemon.status(6)["settings"]["negative_prompt"] == "blue"
    retried = daemon.post("/queue/3/retry").json()["data"]["task_id"]
    assert retried == 9
    assert daemon.finish(retried)["status"] == "completed"
    assert daemon.get("/health/ready").json()["warnings"] == []
    assert "can't be read" not in daemon.log.read_text()


@pytest.mark.parametrize("file", JOURNALS, ids=lambda file: file.stem)
def test_pictures_of_an_older_version_are_kept_with_their_tasks(file: Path, daemon: StubDaemon) -> None:
    left_by(file, daemon)
    daemon.start()
    job_inputs = stored(daemon, "SELECT record FROM tasks WHERE id IN (3, 7)")
    assert all("state/inputs/" in record for record in job_inputs)
    assert {path.name for path in (daemon.state / "inputs").iterdir()} == {
        hashlib.sha256(png(colour)).hexdigest() for colour in ("red", "blue")
    }


@pytest.mark.parametrize("file", JOURNALS, ids=lambda file: file.stem)
def test_the_files_of_an_older_version_are_own_ones_and_those_beside_them_are_not(
    file: Path, daemon: StubDaemon
) -> None:
    left_by(file, daemon)
    with (daemon.folder / "wangpd.toml").open("a") as config:
        config.write("keep_outputs_days = 7\n")
    own = set(daemon.outputs.iterdir())
    assert len(own) == 2
    mine = daemon.outputs / "mine.mp4"
    mine.write_bytes(b"film")
    for path in (*own, mine):
        os.utime(path, (1e9, 1e9))
    daemon.start()
    daemon.finish(8)
    assert set(daemon.outputs.glob("*.mp4")) & {*own, mine} == {mine}


def shape(db: sqlite3.Connection) -> dict[str, Any]:
    """What an older version depends on: the version, its tables' columns, and the keys in the records."""
    columns = {
        name: [row[1] for row in db.execute(f"PRAGMA table_info({name})")] for name in ("tasks", "replies", "facts")
    }
    keys = {
        path: {key for (key,) in db.execute(f"SELECT DISTINCT key FROM tasks, json_each(record, '{path}')")}
        for path in ("$", "$.job", "$.files[0]")
    }
    return {"version": db.execute("PRAGMA user_version").fetchone(), "columns": columns, "keys": keys}


@pytest.mark.parametrize("file", JOURNALS, ids=lambda file: file.stem)
def test_a_rollback_finds_a_journal_that_the_version_before_can_read(file: Path, daemon: StubDaemon) -> None:
    left_by(file, daemon)
    daemon.start()
    daemon.finish(8)
    daemon.post("/queue/1/retry")
    daemon.stop()
    with closing(sqlite3.connect(":memory:")) as before, closing(journal_of(daemon)) as after:
        before.executescript((file.parent / "7fd2f3c.sql").read_text())
        wanted, found = shape(before), shape(after)
    assert (found["version"], found["columns"]) == (wanted["version"], wanted["columns"])
    older = {"images"}  # which the version before 6e6a6c6 wrote
    assert {path: found["keys"][path] - older for path in found["keys"]} == wanted["keys"]


def test_what_an_older_version_made_after_a_rollback_is_known_too(daemon: StubDaemon) -> None:
    left_by(next(file for file in JOURNALS if file.stem == "7fd2f3c"), daemon)
    daemon.start()
    daemon.finish(8)
    new = daemon.run(**QUICK)["task_id"]
    daemon.stop()
    change(daemon, f"DELETE FROM files WHERE task_id = {new}")  # as a version would leave it that knows no such table
    daemon.start()
    assert set(stored(daemon, "SELECT task_id FROM files")) == {1, 3, 5, 6, 7, 8, new}


# ---------------------------------------------------------------------------------------------------------------- newer


@pytest.fixture
def used(daemon: StubDaemon) -> StubDaemon:
    """Stopped; task 1 has ended, and 2 and 3 wait."""
    daemon.start()
    daemon.run(**QUICK)
    daemon.post("/queue/pause")
    for _ in range(2):
        daemon.submit(**QUICK)
    daemon.stop()
    return daemon


def look(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def leave_wal(daemon: StubDaemon) -> None:
    """As after a SIGKILL: the new version is only in the WAL."""
    with closing(journal_of(daemon)) as db:
        db.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 5}")
        kept = {
            path: path.read_bytes() for path in daemon.state.glob("journal.sqlite*") if path.suffix != ".sqlite-shm"
        }
    for path, data in kept.items():
        path.write_bytes(data)


@pytest.mark.parametrize("case", ["the next version", "a far one", "a WAL"])
def test_a_newer_journal_stops_the_start_with_a_sentence_and_stays(used: StubDaemon, case: str) -> None:
    newest = len(MIGRATIONS)
    version = {"the next version": newest + 1, "a far one": 99, "a WAL": newest + 5}[case]
    if case == "a WAL":
        leave_wal(used)
    else:
        change(used, f"PRAGMA user_version = {version}", "ALTER TABLE tasks RENAME COLUMN rank TO place")
    before = look(used.state)
    offset = used.launch()
    assert used.process.wait(30) == 1
    found = f"{used.state / 'journal.sqlite'} has version {version}, of a newer wangpd"
    remedy = "start the newer one again, or choose another state_path"
    sentence = f"wangpd: state_path: {found}, and this one reads up to version {newest}; {remedy}\n"
    assert used.log.read_text()[offset:] == sentence
    after = look(used.state)
    assert {name: after[name] for name in after if name != "lock"} == {n: before[n] for n in before if n != "lock"}


NEIGHBOURS = {
    "an ended row": "UPDATE tasks SET record = json_set(record, '$.priority', 5) WHERE id = 1",
    "a waiting row": "UPDATE tasks SET record = json_set(record, '$.priority', 5) WHERE id = 2",
    "its job": "UPDATE tasks SET record = json_set(record, '$.job.new_field', 5)",
    "a file": "UPDATE tasks SET record = json_set(record, '$.files[0].sha256', 'abc') WHERE id = 1",
    "a row that lacks defaults": "UPDATE tasks SET record = json_remove(record, '$.phase', '$.plan', '$.job.settings')",
    "a pace": 'INSERT OR REPLACE INTO facts VALUES (\'paces\', \'{"wan_demo": [{"extent": 1, "load_s": 1,'
    ' "encode_s": 1, "step_s": 1, "rest_s": 1, "cold": true, "new": 2}]}\')',
    "a machine": "INSERT OR REPLACE INTO facts VALUES ('machines',"
    ' \'{"auto": {"free_vram_bytes": 1, "free_ram_bytes": 1, "new": 2}}\')',
    "a column": "ALTER TABLE tasks ADD COLUMN priority INTEGER",
    "a column of files": "ALTER TABLE files ADD COLUMN sha256 TEXT",
    "a column of facts": "ALTER TABLE facts ADD COLUMN changed_at REAL",
    "a table": "CREATE TABLE users (name TEXT)",
    "a state": "UPDATE tasks SET status = 'held', record = json_set(record, '$.status', 'held') WHERE id = 2",
}


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_what_a_neighbouring_version_added_is_ignored(used: StubDaemon, case: str) -> None:
    change(used, NEIGHBOURS[case])
    used.start()
    tasks = used.get("/tasks").json()["data"]["tasks"]
    assert [(task["task_id"], task["status"]) for task in tasks] == [(3, "queued"), (2, "queued"), (1, "completed")]
    assert used.status(1)["files"][0]["type"] == "video"
    assert used.get("/health/ready").json()["warnings"] == []
    retried = used.post("/queue/1/retry").json()["data"]["task_id"]
    used.post("/queue/resume")
    assert [used.finish(task_id)["status"] for task_id in (2, 3, retried)] == ["completed"] * 3


FACTS = {"paces": ['{"wan_demo": 5}', '[1]', 'nonsense', '{"wan_demo": [{"load_s": 1}, "a"]}'],
         "machines": ["null", "{"],
         "model": ["5", '["a"]'], "paused": ['"yes"', "{"], "clock": ["1", '["a", "b"]', "null", "{"]}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in FACTS for value in FACTS[name]])
def test_a_fact_that_can_not_be_read_is_ignored(used: StubDaemon, name: str, value: str) -> None:
    change(used, f"INSERT OR REPLACE INTO facts VALUES ('{name}', '{value}')")
    used.start()
    used.post("/queue/resume")
    assert [used.finish(task_id)["status"] for task_id in (2, 3)] == ["completed"] * 2
    assert used.get("/health/ready").json()["warnings"] == []


ROWS = {
    "no JSON": "'nonsense'",
    "no keys": "'{}'",
    "another shape": "'[1]'",
    "a job of another shape": "json_set(record, '$.job', 5)",
    "a field of another type": "json_set(record, '$.created_at', 'yesterday')",
    "a job's field of another type": "json_set(record, '$.job.width', json('[64]'))",
    "files of another shape": "json_set(record, '$.files', json('{\"a\": 1}'))",
    "times of another shape": "json_set(record, '$.timings', json('{\"loading\": \"long\"}'))",
}


@pytest.mark.parametrize("case", ROWS)
def test_an_ended_row_that_can_not_be_read_costs_itself_alone(used: StubDaemon, case: str) -> None:
    change(used, f"UPDATE tasks SET record = {ROWS[case]} WHERE id = 1")
    before = stored(used, "SELECT record FROM tasks WHERE id = 1")
    used.start()
    for _ in range(3):
        answer = used.get("/tasks")
        assert answer.status_code == 200
        assert [task["task_id"] for task in answer.json()["data"]["tasks"]] == [3, 2]
        assert [used.request(*call).status_code for call in (("GET", "/status/1"), ("POST", "/queue/1/retry"))] == [
            404
        ] * 2
    assert used.log.read_text().count("the record of task 1 can't be read") == 1
    assert stored(used, "SELECT record FROM tasks WHERE id = 1") == before
    used.post("/queue/resume")
    assert [used.finish(task_id)["status"] for task_id in (2, 3)] == ["completed"] * 2


@pytest.mark.parametrize("case", ROWS)
def test_a_waiting_row_that_can_not_be_read_fails_alone_and_is_kept(used: StubDaemon, case: str) -> None:
    change(used, f"UPDATE tasks SET record = {ROWS[case]} WHERE id = 2")
    before = stored(used, "SELECT record FROM tasks WHERE id = 2")
    used.start()
    state = used.status(2)
    assert (state["status"], state["error"]["code"]) == ("failed", "unreadable")
    assert state["error"]["message"].startswith("The record of this task can't be read by this version of wangpd")
    assert stored(used, "SELECT value ->> '$' FROM facts WHERE name = 'unreadable 2'") == before
    assert [task["id"] for task in used.get("/queue").json()["data"]["tasks"]] == [3]
    assert used.get("/health/ready").json()["warnings"] == []
    assert used.post("/queue/2/retry").status_code == 400
    used.post("/queue/resume")
    assert used.finish(3)["status"] == "completed"


async def test_the_pictures_of_a_row_that_can_not_be_read_are_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    await journal.open()
    await journal.add(Task(0, job(inputs={"image_start": (tmp_path / "inputs" / "abc",)})), None, "", {})
    await journal._call(lambda: journal._db.execute("UPDATE tasks SET record = replace(record, '\"steps\"', '\"n\"')"))
    assert await journal.unfinished() == []
    assert "abc" in await journal.sweep(set)
    await journal.close()


def test_pictures_stay_as_long_as_a_journal_that_was_set_aside_may_need_them(daemon: StubDaemon) -> None:
    daemon.start()
    daemon.post("/queue/pause")
    daemon.submit(image_start=encoded("red"), **QUICK)
    daemon.stop()
    (daemon.state / "journal.sqlite").write_bytes(b"nonsense" * 1000)
    for _ in range(2):
        daemon.start()
        assert daemon.run(**QUICK)["status"] == "completed"
        daemon.stop()
    assert len(list((daemon.state / "inputs").iterdir())) == 1
    (aside,) = daemon.state.glob("journal.sqlite.unreadable-*")
    aside.unlink()
    daemon.start()
    assert eventually(lambda: not list((daemon.state / "inputs").iterdir()))


# -------------------------------------------------------------------------------------------------- what is gone by now


def test_a_picture_that_is_gone_is_said_at_retry_and_in_its_turn(daemon: StubDaemon) -> None:
    daemon.start()
    ended = daemon.run(image_start=encoded("red"), **QUICK)["task_id"]
    daemon.post("/queue/pause")
    waits = daemon.submit(image_start=encoded("red"), **QUICK)["task_id"]
    other = daemon.submit(**QUICK)["task_id"]
    (picture,) = (daemon.state / "inputs").iterdir()
    picture.unlink()
    sentence = "image_start: its file is no longer in state_path; send it again with a new request"
    answer = daemon.post(f"/queue/{ended}/retry")
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})
    daemon.post("/queue/resume")
    assert daemon.finish(waits)["error"] == {"code": "file_gone", "message": sentence}
    assert daemon.finish(other)["status"] == "completed"
    daemon.run(image_start=encoded("red"), **QUICK)
    assert daemon.post(f"/queue/{ended}/retry").status_code == 200


def test_pictures_are_found_after_the_state_folder_was_moved(daemon: StubDaemon) -> None:
    daemon.start()
    ended = daemon.run(image_start=encoded("red"), **QUICK)["task_id"]
    daemon.post("/queue/pause")
    waits = daemon.submit(image_start=encoded("blue"), **QUICK)["task_id"]
    daemon.stop()
    daemon.state.rename(daemon.folder / "moved")
    with (daemon.folder / "wangpd.toml").open("a") as config:
        config.write('state_path = "moved"\n')
    daemon.start()
    retried = daemon.post(f"/queue/{ended}/retry").json()["data"]["task_id"]
    daemon.post("/queue/resume")
    assert [daemon.finish(task_id)["status"] for task_id in (waits, retried)] == ["completed"] * 2


def test_a_model_that_is_gone_is_said_at_retry(daemon: StubDaemon) -> None:
    daemon.models.mkdir()
    (daemon.models / "mine.toml").write_text(
        '[[models]]\nid = "mine"\nbase = "wan_demo"\nname = "Mine"\ndescription = "x"\n'
    )
    daemon.start()
    ended = daemon.run(model_type="mine", **QUICK)["task_id"]
    daemon.post("/queue/pause")
    waits = daemon.submit(model_type="mine", **QUICK)["task_id"]
    daemon.stop()
    (daemon.models / "mine.toml").unlink()
    daemon.start()
    answer = daemon.post(f"/queue/{ended}/retry")
    sentence = "model_type: 'mine' is no longer in the catalogue; bring it back, or take another"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})
    daemon.post("/queue/resume")
    assert daemon.finish(waits)["error"]["code"] == "unknown_model"
    assert {daemon.status(task_id)["model_type"] for task_id in (ended, waits)} == {"mine"}


def test_a_lora_that_is_gone_is_said_at_retry(used: StubDaemon) -> None:
    lora = {"path": str(used.folder / "loras" / "wan" / "style.safetensors"), "phases": [[1.0]]}
    change(
        used, f"UPDATE tasks SET record = json_set(record, '$.job.loras', json('{json.dumps([lora])}')) WHERE id < 3"
    )
    used.start()
    answer = used.post("/queue/1/retry")
    sentence = "activated_loras: 'style.safetensors' is no longer in loras_dir; put it back"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})
    used.post("/queue/resume")
    assert used.finish(2)["error"] == {"code": "file_gone", "message": sentence}
    assert used.finish(3)["status"] == "completed"


def test_weights_that_are_gone_are_said_at_retry(used: StubDaemon) -> None:
    change(used, "UPDATE tasks SET record = json_set(record, '$.job.model', 'wan_t2v_14B') WHERE id = 1")
    used.start()
    answer = used.post("/queue/1/retry")
    assert answer.status_code == 400
    assert "is not installed" in answer.json()["detail"]
    assert workers(used) == set()
