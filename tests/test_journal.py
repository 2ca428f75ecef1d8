"""The journal: what is written outlives the process, and a file that can't be read is never thrown away."""

import dataclasses
import sqlite3
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.job import OutputFile
from engine.queue.journal import KEY_LIFETIME_S, Journal, JournalFault, KeyReused
from engine.queue.order import ranks_of
from engine.queue.tasks import Status, Task
from tests.stand_ins import job


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
async def journal(path: Path) -> AsyncIterator[Journal]:
    opened = Journal(path)
    await opened.open()
    yield opened
    await opened.close()


async def added(journal: Journal, prompt: str = "a cat") -> Task:
    """A new task with its row."""
    task = Task(0, job(prompt))
    await journal.add(task, None, "", {})
    return task


async def found(journal: Journal, task_id: int) -> dict[str, Any]:
    task = await journal.get(task_id)
    assert task is not None
    return dataclasses.asdict(task)


async def reopened(path: Path, id_floor: int = 0) -> Journal:
    journal = Journal(path)
    await journal.open(id_floor)
    return journal


async def ended(journal: Journal, finished_at: float | None = None) -> Task:
    task = await added(journal)
    task.status, task.finished_at = Status.COMPLETED, finished_at or time.time()
    await journal.save(task)
    return task


# ---- rows


async def test_a_task_comes_back_as_it_was(journal: Journal, tmp_path: Path) -> None:
    task = Task(0, job("a cat", inputs={"image_refs": (tmp_path / "a", tmp_path / "b")}), warnings=("one", "two"))
    await journal.add(task, None, "", {})
    task.status, task.started_at, task.finished_at, task.attempts = Status.FAILED, 1.5, 2.5, 2
    task.error = {"code": "hung", "message": "It hung."}
    task.files = (OutputFile("a.mp4", "video", 5, 64, 32, 9, 8, 2**63 - 1),)
    task.timings, task.peak_memory_bytes = {"loading": 0.25}, 2**40
    await journal.save(task)
    assert await found(journal, task.id) == dataclasses.asdict(task)


async def test_rows_outlive_the_connection(path: Path) -> None:
    journal = await reopened(path)
    task = await added(journal)
    await journal.close()
    journal = await reopened(path)
    assert await found(journal, task.id) == dataclasses.asdict(task)
    await journal.close()


async def test_a_row_is_committed_and_synced_when_add_returns(journal: Journal, path: Path) -> None:
    task = await added(journal)
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as other:
        assert other.execute("SELECT id FROM tasks").fetchall() == [(task.id,)]
    synchronous, mode = await journal._call(
        lambda: [journal._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    )
    assert (synchronous, mode) == (2, "wal")  # FULL: the WAL is synced at every commit


@pytest.mark.parametrize("task_id", [0, -1, 2, 2**63, -(2**63), 10**30])
async def test_an_unknown_id_is_none(journal: Journal, task_id: int) -> None:
    await added(journal)
    assert await journal.get(task_id) is None


async def test_history_comes_newest_first_in_pages_with_the_total(journal: Journal) -> None:
    ids = [(await added(journal)).id for _ in range(5)]
    assert await journal.history(None, 2, 1) == ([ids[3], ids[2]], 5)


async def test_history_of_one_state_counts_only_that(journal: Journal) -> None:
    await added(journal)
    done = await ended(journal)
    assert await journal.history(Status.COMPLETED, 10, 0) == ([done.id], 1)


# ---- ids


async def test_ids_go_on_after_the_rows_are_forgotten(journal: Journal) -> None:
    last = await ended(journal)
    await journal.prune(0, 0)
    assert (await journal.history(None, 10, 0))[1] == 0
    assert (await added(journal)).id == last.id + 1


async def test_ids_go_on_after_a_restart_with_no_rows_left(path: Path) -> None:
    journal = await reopened(path)
    last = await ended(journal)
    await journal.prune(0, 0)
    await journal.close()
    journal = await reopened(path)
    assert (await added(journal)).id == last.id + 1
    await journal.close()


async def test_ids_begin_above_the_floor(path: Path) -> None:
    journal = await reopened(path, id_floor=41)
    assert [(await added(journal)).id, (await added(journal)).id] == [42, 43]
    await journal.close()


async def test_a_low_floor_changes_nothing(path: Path) -> None:
    journal = await reopened(path, id_floor=41)
    await added(journal)
    await journal.close()
    journal = await reopened(path, id_floor=7)
    assert (await added(journal)).id == 43
    await journal.close()


# ---- order


async def test_tasks_wait_in_the_order_of_their_submission(journal: Journal) -> None:
    ids = [(await added(journal)).id for _ in range(3)]
    assert [task.id for task in await journal.unfinished()] == ids


async def test_a_new_order_is_remembered_and_what_comes_later_comes_behind(path: Path) -> None:
    journal = await reopened(path)
    first, second, third = [(await added(journal)).id for _ in range(3)]
    await journal.save(ranks=ranks_of([third, first, second]))
    fourth = (await added(journal)).id
    await journal.close()
    journal = await reopened(path)
    assert [task.id for task in await journal.unfinished()] == [third, first, second, fourth]
    await journal.close()


async def test_what_has_ended_does_not_wait(journal: Journal) -> None:
    await ended(journal)
    waiting = await added(journal)
    assert [task.id for task in await journal.unfinished()] == [waiting.id]


# ---- keys


async def test_a_key_that_was_used_brings_its_first_answer_and_no_row(journal: Journal) -> None:
    first, second = Task(0, job()), Task(0, job())
    assert await journal.add(first, "key", "digest", {"position": 1}) is None
    assert await journal.add(second, "key", "digest", {"position": 9}) == {"position": 1, "task_id": first.id}
    with pytest.raises(KeyReused):
        await journal.add(second, "key", "other digest", {"position": 9})
    assert (await journal.history(None, 10, 0))[1] == 1


async def test_a_key_outlives_the_process(path: Path) -> None:
    journal = await reopened(path)
    task = Task(0, job())
    await journal.add(task, "key", "digest", {})
    await journal.close()
    journal = await reopened(path)
    assert await journal.add(Task(0, job()), "key", "digest", {}) == {"task_id": task.id}
    await journal.close()


async def test_a_key_is_free_again_after_its_life(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    task, another = Task(0, job()), Task(0, job())
    await journal.add(task, "key", "digest", {})
    later = time.time() + KEY_LIFETIME_S + 1
    monkeypatch.setattr(journal._clock, "now", lambda: later)
    assert await journal.add(another, "key", "digest", {}) is None
    assert another.id == task.id + 1


# ---- what is forgotten


async def test_the_newest_records_are_kept(journal: Journal) -> None:
    ids = [(await ended(journal)).id for _ in range(5)]
    await journal.prune(2, 3600)
    assert (await journal.history(None, 10, 0))[0] == [ids[4], ids[3]]


async def test_records_are_forgotten_by_age(journal: Journal) -> None:
    await ended(journal, time.time() - 100)
    young = await ended(journal)
    await journal.prune(10, 50)
    assert (await journal.history(None, 10, 0))[0] == [young.id]


@pytest.mark.parametrize("jump_s", [2 * 365 * 86400.0, 7200.0, -86400.0])
async def test_a_clock_that_jumps_between_an_end_and_its_commit_forgets_nothing(
    journal: Journal, jump_s: float
) -> None:
    task = await ended(journal, time.time() - jump_s)
    await journal.prune(10, 3600)
    assert await found(journal, task.id) is not None


@pytest.mark.parametrize("status", [Status.QUEUED, Status.PROCESSING, Status.CANCELLING])
async def test_an_active_task_is_never_forgotten(journal: Journal, status: Status) -> None:
    task = await added(journal)
    task.status = status
    await journal.save(task)
    await journal.prune(0, 0)
    assert await found(journal, task.id) == dataclasses.asdict(task)


async def test_the_pictures_of_every_kept_task_are_needed(journal: Journal, tmp_path: Path) -> None:
    await added(journal)
    folder = tmp_path / "inputs"
    await journal.add(Task(0, job(inputs={"image_start": (folder / "a",)})), None, "", {})
    await journal.add(Task(0, job(inputs={"image_refs": (folder / "b", folder / "c")})), None, "", {})
    assert await journal.sweep(set) == {"a", "b", "c"}


# ---- facts


async def test_a_fact_is_json_that_outlives_the_process(path: Path) -> None:
    journal = await reopened(path)
    await journal.save(paused=True)
    await journal.save(speeds={"wan": {"load_s": 1.5}})
    await journal.close()
    journal = await reopened(path)
    assert await journal.fact("paused", False) is True
    assert await journal.fact("speeds") == {"wan": {"load_s": 1.5}}
    assert await journal.fact("nothing", "default") == "default"
    await journal.close()


async def test_a_task_and_a_fact_that_are_saved_together_are_kept_or_lost_together(journal: Journal) -> None:
    task = await added(journal)
    task.attempts = 1
    await journal.save(task, speeds={"wan": 1.5})
    assert ((await found(journal, task.id))["attempts"], await journal.fact("speeds")) == (1, {"wan": 1.5})
    await journal._call(lambda: journal._db.execute("DROP TABLE facts"))
    task.attempts = 2
    with pytest.raises(JournalFault):
        await journal.save(task, speeds={})
    assert (await found(journal, task.id))["attempts"] == 1


# ---- files that can't be read


def spoiled(path: Path, case: str) -> bytes:
    """Spoil the journal at `path`, and return its bytes as they are then."""
    data = path.read_bytes()
    rows = {
        "a missing table": "DROP TABLE tasks",
    }
    if case in rows:
        with sqlite3.connect(path) as db:
            db.execute(rows[case])
        db.close()
    else:
        path.write_bytes(
            {
                "nonsense": b"nonsense " * 1000,
                "a damaged page": data[:5000] + b"\xff" * 4000 + data[9000:],
                "cut off": data[: len(data) // 2],
                "a damaged header": b"\0" * 50 + data[50:],
            }[case]
        )
    return path.read_bytes()


UNREADABLE = [
    "nonsense",
    "a damaged page",
    "cut off",
    "a damaged header",
    "a missing table",
]


@pytest.mark.parametrize("case", UNREADABLE)
async def test_an_unreadable_journal_is_set_aside_whole_and_an_empty_one_works(path: Path, case: str) -> None:
    journal = await reopened(path)
    for _ in range(20):
        await added(journal)
    await journal.close()
    data = spoiled(path, case)
    journal = await reopened(path, id_floor=20)
    assert journal.set_aside is not None
    assert journal.set_aside.read_bytes() == data
    assert await journal.unfinished() == []
    assert (await added(journal)).id == 21
    await journal.close()


async def test_a_whole_journal_is_not_set_aside(path: Path) -> None:
    await (await reopened(path)).close()
    journal = await reopened(path)
    assert journal.set_aside is None
    await journal.close()


async def test_a_crash_of_the_writer_loses_nothing_that_was_committed(path: Path, tmp_path: Path) -> None:
    """A copy of the files as they are while it is open is what a power cut would leave."""
    journal = await reopened(path)
    ids = [(await added(journal)).id for _ in range(3)]
    (tmp_path / "copy").mkdir()
    for file in path.parent.iterdir():
        if not file.name.endswith("-shm"):
            (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    await journal.close()
    copy = await reopened(tmp_path / "copy" / path.name)
    assert ([task.id for task in await copy.unfinished()], copy.set_aside) == (ids, None)
    await copy.close()


# ---- a disk that fails


async def test_a_full_disk_at_the_start_is_a_fault_and_the_journal_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = await reopened(path)
    task = await added(journal)
    await journal.close()
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL

    def connect(*_: object, **__: object) -> None:
        raise full

    with monkeypatch.context() as patch, pytest.raises(JournalFault, match="database or disk is full"):
        patch.setattr(sqlite3, "connect", connect)
        await reopened(path)
    journal = await reopened(path)
    assert ([found.id for found in await journal.unfinished()], journal.set_aside) == ([task.id], None)
    await journal.close()


async def test_a_place_that_can_not_be_opened_is_a_fault_and_stays(tmp_path: Path) -> None:
    with pytest.raises(JournalFault, match="unable to open"):
        await reopened(tmp_path)  # a folder


async def fill(journal: Journal) -> None:
    """Let the journal's disk be full, as its page limit: nothing more fits."""
    await journal._call(lambda: journal._db.execute("PRAGMA max_page_count = 1").fetchone())


async def free(journal: Journal) -> None:
    await journal._call(lambda: journal._db.execute("PRAGMA max_page_count = 1000000").fetchone())


async def test_a_full_disk_is_a_sentence_with_the_remedy(journal: Journal) -> None:
    await fill(journal)
    with pytest.raises(JournalFault, match=r"can't be used now .*full.*free its disk, then try again"):
        await journal.add(Task(0, job("x" * 10_000)), None, "", {})


async def test_what_failed_is_not_there_and_the_next_one_works(journal: Journal) -> None:
    first = await added(journal)
    await fill(journal)
    with pytest.raises(JournalFault):
        await journal.add(Task(0, job("x" * 10_000)), "key", "digest", {})
    await free(journal)
    second = await added(journal)
    assert [task.id for task in await journal.unfinished()] == [first.id, second.id]
    assert second.id == first.id + 1
