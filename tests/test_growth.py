"""What clients make the daemon store is bounded: records, keys, inputs and the journal, however the storm looks."""

import asyncio
import base64
import io
import json
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from engine.admission import BadRequest, require_files
from engine.queue import facts
from engine.queue import journal as rows
from engine.queue.journal import Journal
from engine.queue.tasks import Status, Task, ended
from tests import stand_ins
from tests.daemon import Daemon
from tests.disks import DaemonWithDisks
from tests.harness import CATALOG, Harness
from tests.idle import idle_daemon
from tests.processes import eventually
from tests.stand_ins import job
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.test_limits import API, growth_mib
from tests.test_restart import configured
from tests.wire import connected, head

MIB = 2**20
KEPT = 20
QUICK = {"num_inference_steps": 1, "video_length": 5}
ASTRAL = "\U0001f600"  # four bytes in UTF-8, twelve in JSON
GONE = {"detail": "image_start: its file is no longer in state_path; send it again with a new request"}


def picture(shade: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (shade, 0, 0)).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def inputs(daemon: Daemon) -> set[str]:
    return {path.name for path in (daemon.state / "inputs").glob("*")}


def total(daemon: Daemon) -> int:
    """How many tasks the daemon knows."""
    count: int = daemon.get("/tasks?limit=1").json()["data"]["total"]
    return count


def journal_mib(daemon: Daemon) -> float:
    return sum(path.stat().st_size for path in daemon.state.glob("journal.sqlite*")) / MIB


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon in which accepted tasks wait for ever."""
    with idle_daemon(tmp_path_factory.mktemp("idle"), history_count=KEPT) as running:
        yield running


# ---- the history


def remove_each(daemon: Daemon, client: int) -> None:
    for number in range(15):
        key = {"Idempotency-Key": f"{client}-{number}"} if client % 2 else {}
        answer = daemon.post("/generate", {"prompt": "a cat", "seed": number}, headers=key)
        assert daemon.delete(f"/queue/{answer.json()['data']['task_id']}").status_code in (200, 400)


def remove_all(daemon: Daemon, client: int) -> None:
    for number in range(15):
        daemon.submit(seed=number, image_start=picture(client))
        if number % 5 == 4:
            assert daemon.delete("/queue").status_code == 200


def retry_and_remove(daemon: Daemon, _client: int) -> None:
    task_id = daemon.submit()["task_id"]
    for _ in range(15):
        daemon.delete(f"/queue/{task_id}")
        answer = daemon.post(f"/queue/{task_id}/retry")
        if answer.status_code == 404:  # forgotten: others have cancelled more than are kept since then
            answer = daemon.post("/generate", {"prompt": "a cat"})
        task_id = answer.json()["data"]["task_id"]


@pytest.mark.parametrize("storm", [remove_each, remove_all, retry_and_remove])
def test_a_storm_of_cancelled_tasks_leaves_no_more_than_the_history_keeps(
    idle: Daemon, storm: Callable[[Daemon, int], None]
) -> None:
    with ThreadPoolExecutor(4) as clients:
        for _ in clients.map(lambda client: storm(idle, client), range(4)):
            pass
        idle.delete("/queue")
        assert total(idle) == KEPT
        with closing(sqlite3.connect(idle.state / "journal.sqlite")) as db:
            assert db.execute("SELECT count(*) FROM tasks").fetchone()[0] == KEPT


def test_a_start_forgets_what_is_too_much_before_it_serves(tmp_path: Path) -> None:
    with idle_daemon(tmp_path) as daemon:
        for _ in range(10):
            daemon.submit()
        daemon.delete("/queue")
        assert total(daemon) == 10
        daemon.stop(signal.SIGKILL)
        configured(daemon, history_count=3)
        daemon.start()
        assert total(daemon) == 3


def test_the_disk_gets_the_room_back_that_large_tasks_took(idle: Daemon) -> None:
    texts = {"prompt": ASTRAL * 10_000, "negative_prompt": ASTRAL * 10_000}
    for _ in range(2):
        for seed in range(150):
            idle.submit(seed=seed, **texts)
        assert journal_mib(idle) > 30
        idle.delete("/queue")
        idle.post("/queue/pause")  # the first change after it takes over the room of the write-ahead log
        assert journal_mib(idle) < 30


async def test_all_rows_together_have_a_bound_and_the_oldest_go(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LEAST_BYTES", 4 * MIB)
    monkeypatch.setattr(rows, "MOST_BYTES", 4 * MIB)
    ids = []
    for number in range(400):
        task = Task(0, job(str(number) * 10_000))
        await journal.add(task, None, "", {})
        await journal.save(ended(task, Status.CANCELLED))
        ids.append(task.id)
    kept, count = await journal.history(None, 1000, 0)
    assert 0 < count < 400
    assert kept == ids[-count:][::-1]
    assert journal._path.stat().st_size < 2 * rows.MOST_BYTES + rows.FREE_PAGES * 4096


# ---- keys


@pytest.fixture
async def journal(tmp_path: Path) -> AsyncIterator[Journal]:
    opened = Journal(tmp_path / "journal.sqlite")
    await opened.open()
    yield opened
    await opened.close()


async def test_only_the_newest_keys_are_kept(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_KEYS", 3)
    for number in range(6):
        task = Task(0, job())
        await journal.add(task, f"key {number}", "digest", {})
        await journal.save(ended(task, Status.CANCELLED))
    known = [await journal.answer(f"key {number}", "digest") is not None for number in range(6)]
    assert known == [False, False, False, True, True, True]


# ---- a record


@pytest.mark.parametrize("name", ["x", "n" * 5000, ASTRAL * 1500])
def test_of_unknown_fields_only_the_first_are_named_and_none_is_stored_whole(idle: Daemon, name: str) -> None:
    count = 50 if len(name) > 1 else 3000
    data = idle.submit(**{f"{number}{name}": 1 for number in range(count)})
    assert len(data["warnings"]) == 21
    assert data["warnings"][-1].startswith(f"{count - 20} more fields")
    assert max(map(len, data["warnings"])) < 300
    state = idle.status(data["task_id"])
    assert (state["warnings"], len(json.dumps(state)) < 64 * 1024) == (data["warnings"], True)
    with closing(sqlite3.connect(idle.state / "journal.sqlite")) as db:
        (size,) = db.execute("SELECT length(record) FROM tasks WHERE id = ?", (data["task_id"],)).fetchone()
    assert size < 64 * 1024


@pytest.mark.parametrize("character", ["a", ASTRAL, "\x01", '"'])
def test_the_longest_texts_are_taken_and_told_again_whole(idle: Daemon, character: str) -> None:
    texts = dict.fromkeys(("prompt", "negative_prompt", "lyrics"), character * 10_000)
    task_id = idle.submit(**texts, loras_multipliers="1 " * 1000)["task_id"]
    assert idle.status(task_id)["prompt"] == texts["prompt"]
    assert idle.get("/tasks?limit=1").json()["data"]["tasks"][0]["settings"]["prompt"] == texts["prompt"]


def record_bytes(character: str) -> int:
    texts = dict.fromkeys(("prompt", "negative_prompt", "lyrics"), character * 10_000)
    warnings = tuple(f"{character * 101}: there is no such field, it was ignored" for _ in range(21))
    return len(Task(1, job(**texts), warnings=warnings).record())


def test_the_largest_request_has_room_in_the_journal() -> None:
    assert max(record_bytes(ASTRAL), record_bytes("\x01")) < 0.8 * rows.MOST_RECORD_BYTES


async def test_a_record_that_is_too_large_is_refused_and_leaves_nothing(journal: Journal) -> None:
    large = Task(0, job("a cat", settings={"note": "n" * rows.MOST_RECORD_BYTES}))
    with pytest.raises(BadRequest, match=r"The task would take \d+ bytes in the journal, and at most 524288 are kept"):
        await journal.add(large, "key", "digest", {})
    assert await journal.history(None, 10, 0) == ([], 0)
    assert await journal.answer("key", "digest") is None


def test_a_retry_of_a_task_that_is_too_large_by_now_is_400(tmp_path: Path) -> None:
    with idle_daemon(tmp_path) as daemon:
        task_id = daemon.submit()["task_id"]
        daemon.delete(f"/queue/{task_id}")
        with closing(sqlite3.connect(daemon.state / "journal.sqlite", isolation_level=None)) as db:
            warnings = json.dumps(["x" * 99] * 10_000)
            db.execute("UPDATE tasks SET record = json_set(record, '$.warnings', json(?))", (warnings,))
        answer = daemon.post(f"/queue/{task_id}/retry")
        assert (answer.status_code, "bytes in the journal" in answer.json()["detail"]) == (400, True)
        assert total(daemon) == 1


@pytest.mark.parametrize("fault", [stand_ins.fail_at_length, stand_ins.break_at_length, stand_ins.raise_at_length])
def test_an_error_of_any_length_is_stored_and_told_cut(tmp_path: Path, fault: Any) -> None:
    with StubDaemon(tmp_path / "own", fault) as daemon:
        state = daemon.run()
        assert state["status"] == "failed"
        assert 0 < len(state["error"]["message"]) <= 2000
        assert journal_mib(daemon) < 1
        assert daemon.get("/health/ready").status_code == 200


# ---- answers


def test_a_page_of_the_history_costs_the_memory_of_one_task(tmp_path: Path) -> None:
    texts = {"prompt": ASTRAL * 10_000, "negative_prompt": ASTRAL * 10_000}
    with idle_daemon(tmp_path) as daemon:
        ids = [daemon.submit(seed=seed, **texts)["task_id"] for seed in range(60)]

        def read_slowly() -> None:
            with ExitStack() as stack:
                for _ in range(8):
                    stack.enter_context(connected(daemon.url)).sendall(head(f"{API}/tasks?limit=200"))
                page = daemon.get("/tasks?limit=200")
                assert len(page.content) > 20 * MIB
                tasks = page.json()["data"]["tasks"]
                assert [task["task_id"] for task in tasks] == ids[::-1]
                assert tasks[0] == daemon.status(ids[-1])

        assert growth_mib(daemon, read_slowly) < 40
        assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("query", ["", "?limit=3", "?status=failed", "?offset=1000000", "?limit=200"])
def test_a_page_of_the_history_is_one_object_of_any_length(idle: Daemon, query: str) -> None:
    for _ in range(5 if query == "?limit=200" else 1):  # that page is longer than what is sent at once
        idle.submit(prompt=ASTRAL * 10_000 if query == "?limit=200" else "a cat")
    answer = idle.get(f"/tasks{query}")
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"
    assert list(answer.json()) == ["success", "message", "data"]
    assert list(answer.json()["data"]) == ["tasks", "total", "limit", "offset"]
    looked = idle.request("HEAD", f"/tasks{query}")
    assert (looked.status_code, looked.content) == (200, b"")
    assert idle.get("/health").status_code == 200


def test_a_short_page_of_the_history_has_its_length(tmp_path: Path) -> None:
    with idle_daemon(tmp_path) as daemon:
        daemon.submit()
        answer = daemon.get("/tasks")
        assert (int(answer.headers["Content-Length"]), len(answer.json()["data"]["tasks"])) == (len(answer.content), 1)


def test_estimates_for_any_number_of_sizes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "MOST_ESTIMATES", 10)
    known = facts.Facts(CATALOG)
    for steps in range(1, 60):
        known.estimate_s(job(steps=steps), warm=True)
        assert len(known._estimates) <= 10


# ---- inputs


def cancel(daemon: Daemon, task_id: int) -> None:
    assert daemon.delete(f"/queue/{task_id}").status_code == 200


def clear(daemon: Daemon, _task_id: int) -> None:
    assert daemon.delete("/queue").status_code == 200


@pytest.mark.parametrize("take_out", [cancel, clear])
def test_a_cancelled_task_gives_its_picture_back_soon(idle: Daemon, take_out: Callable[[Daemon, int], None]) -> None:
    task_id = idle.submit(image_start=picture(100))["task_id"]
    assert inputs(idle)
    take_out(idle, task_id)
    assert eventually(lambda: not inputs(idle))
    answer = idle.post(f"/queue/{task_id}/retry")
    assert (answer.status_code, answer.json()) == (400, GONE)


def test_a_task_that_is_cancelled_while_it_runs_gives_its_picture_back(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "own", stand_ins.obey) as daemon:
        task_id = daemon.submit(prompt="denoising", image_start=picture(1))["task_id"]
        daemon.until(task_id, lambda state: state["phase"] == "denoising")
        assert len(inputs(daemon)) == 1
        cancel(daemon, task_id)
        assert daemon.finish(task_id)["status"] == "cancelled"
        assert eventually(lambda: not inputs(daemon))


def test_a_picture_stays_as_long_as_one_task_needs_it(idle: Daemon) -> None:
    shared, own = picture(1), picture(2)
    first, second = (idle.submit(image_start=shared, seed=seed)["task_id"] for seed in (1, 2))
    kept = inputs(idle)
    assert kept
    third = idle.submit(image_start=own)["task_id"]
    for task_id in (first, third):
        cancel(idle, task_id)
    assert eventually(lambda: inputs(idle) == kept)
    retried = idle.post(f"/queue/{first}/retry")
    assert retried.status_code == 200, retried.text
    again = retried.json()["data"]["task_id"]
    cancel(idle, second)
    other = idle.submit(image_start=own)["task_id"]
    cancel(idle, other)
    assert eventually(lambda: inputs(idle) == kept)
    cancel(idle, again)
    assert eventually(lambda: not inputs(idle))


def test_a_completed_task_keeps_its_picture_though_another_with_it_is_cancelled(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "own", make_clips) as daemon:
        done = daemon.run(image_start=picture(1), **QUICK)["task_id"]
        kept = inputs(daemon)
        daemon.post("/queue/pause")
        for shade in (1, 2):
            cancel(daemon, daemon.submit(image_start=picture(shade), **QUICK)["task_id"])
        assert eventually(lambda: inputs(daemon) == kept)
        assert daemon.post(f"/queue/{done}/retry").status_code == 200


async def test_what_ended_tasks_need_can_be_told_from_what_is_still_to_run(journal: Journal, tmp_path: Path) -> None:
    for name, status in (("a", Status.QUEUED), ("b", Status.COMPLETED), ("c", Status.CANCELLED), ("d", Status.FAILED)):
        task = Task(0, job("a cat", inputs={"image_start": (tmp_path / "inputs" / name,)}))
        await journal.add(task, None, "", {})
        if status.ended:
            await journal.save(ended(task, status))
    assert await journal.sweep(set) == {"a", "b", "d"}
    assert await journal.sweep(set, unfinished_only=True) == {"a"}


async def test_what_an_unreadable_record_held_is_forgotten_with_its_task(journal: Journal, tmp_path: Path) -> None:
    task = Task(0, job(inputs={"image_start": (tmp_path / "inputs" / "a",)}))
    await journal.add(task, None, "", {})
    await journal._call(lambda: journal._db.execute("UPDATE tasks SET record = replace(record, '\"steps\"', '\"n\"')"))
    assert await journal.unfinished() == []
    await journal.prune(10, 3600)
    assert await journal.sweep(set) == {"a"}
    await journal.prune(0, 3600)
    assert (await journal.sweep(set), await journal.fact(f"unreadable {task.id}")) == (set(), None)


async def test_no_task_is_accepted_or_retried_between_the_look_and_the_removal(tmp_path: Path) -> None:
    looked, go_on = threading.Event(), threading.Event()
    picture_file = tmp_path / "inputs" / "a"
    harness = Harness(tmp_path)

    def remove(needed: set[str]) -> int:
        looked.set()
        go_on.wait()
        picture_file.unlink()
        return len(needed)

    async with harness.open(paused=True) as queue:
        picture_file.parent.mkdir()
        picture_file.touch()
        (old,) = await harness.submit(inputs={"image_start": (picture_file,)})
        await queue.remove(old)
        sweeping = asyncio.create_task(queue.sweep(remove))
        await asyncio.to_thread(looked.wait)
        others = [asyncio.create_task(queue.submit(job())), asyncio.create_task(queue.retry(old, require_files))]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in others)
        go_on.set()
        assert await sweeping == 0
        await others[0]
        with pytest.raises(BadRequest, match="image_start: its file is no longer in state_path"):
            await others[1]


# ---- the disk of the state


def test_thumbnails_leave_the_last_room_to_the_queue(tmp_path: Path) -> None:
    with DaemonWithDisks(tmp_path, state_mb=24) as daemon:
        name = daemon.run(**QUICK)["files"][0]["filename"]
        for width in (320, 640):
            assert daemon.get(f"/preview/{name}?width={width}").headers["Content-Type"] == "image/jpeg"
        assert not list((daemon.state_disk.seen / "thumbnails").glob("*.jpg"))


def test_pictures_that_fill_the_state_disk_are_refused_and_work_goes_on_by_itself(tmp_path: Path) -> None:
    with DaemonWithDisks(tmp_path, state_mb=64, min_free_mb=8) as daemon:
        daemon.post("/queue/pause")
        refusal = None
        for seed in range(400):
            texts = {"prompt": ASTRAL * 10_000, "negative_prompt": ASTRAL * 10_000, "seed": seed}
            answer = daemon.post("/generate", {**texts, **QUICK, "image_start": picture(seed)})
            if answer.status_code != 200:
                refusal = answer
                break
        assert refusal is not None
        assert (refusal.status_code, refusal.headers["Retry-After"]) == (503, "10")
        sentence = refusal.json()["detail"]
        assert sentence.startswith("The disk of state_path has ")
        assert daemon.get("/health/ready").json() == {"detail": sentence}
        assert daemon.get("/queue").json()["data"]["held"] == sentence
        answer = daemon.delete("/queue")
        assert answer.status_code == 200, answer.text
        daemon.post("/queue/resume")
        assert eventually(lambda: daemon.get("/health/ready").status_code == 200)
        assert daemon.run(seed=3, **QUICK)["status"] == "completed"
