"""TaskQueue with one engine, in this process; test_lanes.py has it with several."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.files import place
from engine.job import DEVICE_FAULT, STORAGE_FAULT, Cancelled, EngineError, Phase
from engine.queue import endings, facts, runner, store
from engine.queue import queue as task_queue
from engine.queue.events import EventKind
from engine.queue.journal import Journal, JournalFault, KeyReused
from engine.queue.progress import advanced
from engine.queue.queue import Unavailable
from engine.queue.tasks import NoSuchTask, Status, WrongState
from engine.workers import lanes
from engine.workers.lanes import Progress
from tests.harness import CATALOG, FILE, PATIENCE_S, TIMINGS, Harness, until
from tests.stand_ins import job


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path)


class BrokenDisk:
    """The journal's writes fail while it is `broken`."""

    def __init__(self, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self._house = False, harness
        for name in ("save", "add"):
            monkeypatch.setattr(Journal, name, self._failing(getattr(Journal, name)))

    def _failing(self, method: Any) -> Any:
        async def call(journal: Journal, *arguments: Any, **facts: Any) -> Any:
            if self.broken:
                await asyncio.sleep(0)
                raise JournalFault("the disk is gone")
            return await method(journal, *arguments, **facts)

        return call


@pytest.fixture
def disk(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> BrokenDisk:
    monkeypatch.setattr(store, "SAVE_AGAIN_S", 0.01)
    return BrokenDisk(harness, monkeypatch)


# ---- the way of a task


async def test_a_task_is_in_the_file_before_its_answer(harness: Harness) -> None:
    async with harness.open(paused=True):
        ids = await harness.submit(3)
        assert harness.stored() == dict.fromkeys(ids, "queued")


async def test_times_that_can_not_be_learnt_cost_no_task_its_end(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts, "_extent", lambda _: 1 / 0)
    async with harness.open():
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.engine.finish()
        assert (await harness.end(task_id)).status is Status.COMPLETED


async def test_what_a_task_taught_is_on_the_disk_together_with_its_end(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[Any] = []
    save = Journal.save

    async def noted(journal: Journal, *tasks: Any, **facts: Any) -> None:
        commits.append(([task.status for task in tasks], list(facts)))
        await save(journal, *tasks, **facts)

    monkeypatch.setattr(Journal, "save", noted)
    async with harness.open():
        await harness.learn()
    assert commits[-1] == ([Status.COMPLETED], ["model", "paces"])


async def test_who_waits_while_a_task_runs_is_told_of_its_end_without_a_look_at_the_disk(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        waiting = asyncio.create_task(queue.wait(task_id, 20))
        await asyncio.sleep(0)
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "get", lambda *_: 1 / 0)
            harness.engine.finish()
            assert (await waiting).status is Status.COMPLETED
        assert harness.stored()[task_id] == "completed"


async def test_what_can_not_be_forgotten_costs_the_queue_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Journal, "_forget", lambda *_: 1 / 0)
    async with harness.open():
        for task_id in await harness.submit(2):
            await harness.started(task_id)
            harness.engine.finish()
            assert (await harness.end(task_id)).status is Status.COMPLETED


async def test_a_task_goes_from_queued_by_processing_to_completed(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        (task_id,) = await harness.submit()
        assert await harness.status(task_id) is Status.QUEUED
        await queue.pause(False)
        await harness.started(task_id)
        assert (await harness.status(task_id), harness.stored()[task_id]) == (Status.PROCESSING, "processing")
        harness.engine.finish()
        task = await harness.end(task_id)
        assert (task.status, task.files, task.timings, task.attempts) == (Status.COMPLETED, (FILE,), TIMINGS, 1)
        assert harness.stored()[task_id] == "completed"


async def test_tasks_run_one_at_a_time_in_their_order(harness: Harness) -> None:
    async with harness.open():
        ids = await harness.submit(3)
        for place, task_id in enumerate(ids, 1):
            await harness.started(task_id)
            assert harness.engine.ran == ids[:place]
            harness.engine.finish()
            await harness.end(task_id)


async def test_a_failed_task_fails_alone_with_its_sentence(harness: Harness) -> None:
    async with harness.open():
        first, second = await harness.submit(2)
        await harness.started(first)
        harness.engine.finish(EngineError("Out of ideas.", "no_ideas"))
        task = await harness.end(first)
        assert (task.status, task.error) == (Status.FAILED, {"code": "no_ideas", "message": "Out of ideas."})
        assert ("attempt", first) in harness.outputs.told
        await harness.started(second)


async def test_a_task_of_a_model_that_is_gone_fails_alone(harness: Harness) -> None:
    async with harness.open():
        (gone,) = await harness.submit(model="gone")
        assert (await harness.end(gone)).error["code"] == "unknown_model"
        (task_id,) = await harness.submit()
        await harness.started(task_id)


async def test_a_fault_of_the_daemon_itself_ends_the_task_and_not_the_queue(harness: Harness) -> None:
    async with harness.open():
        first, second = await harness.submit(2)
        await harness.started(first)
        harness.engine.finish(RuntimeError("nobody thought of this"))
        task = await harness.end(first)
        assert (task.status, task.error["code"], harness.stored()[first]) == (Status.FAILED, "internal_error", "failed")
        assert "RuntimeError" in task.error["message"]
        assert "nobody" not in task.error["message"]
        await harness.started(second)


async def test_tasks_wait_while_the_disk_is_full_and_start_by_themselves(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "PLACE_S", 0.01)
    harness.outputs.full = "The disk is full: delete something"
    async with harness.open() as queue:
        harness.outputs.full = ""
        first, second = await harness.submit(2)
        await harness.started(first)
        harness.outputs.full = "The disk is full: delete something"
        harness.engine.finish()
        await harness.end(first)
        await until(lambda: queue.faults == {"place": "The disk is full: delete something"})
        with pytest.raises(Unavailable, match="delete something"):
            await queue.submit(job())
        with pytest.raises(Unavailable, match="delete something"):
            await queue.retry(first)
        assert (harness.waiting(), harness.engine.ran) == ([second], [first])
        harness.outputs.full = ""
        await harness.started(second)
        assert (queue.faults, (await queue.get(second)).attempts) == ({}, 1)


async def test_files_that_can_not_be_saved_are_kept_until_they_can(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "PLACE_S", 0.01)
    async with harness.open() as queue:
        first, second = await harness.submit(2)
        await harness.started(first)
        harness.outputs.kept = "The disk is read-only"
        harness.engine.finish()
        await until(lambda: queue.faults == {"place": "The disk is read-only"})
        assert (await harness.status(first), harness.engine.ran) == (Status.PROCESSING, [first])
        harness.outputs.kept = ""
        assert [file.filename for file in (await harness.end(first)).files] == ["a.mp4"]
        assert second in harness.waiting()


async def test_a_folder_of_unsaved_files_that_can_not_be_read_ends_neither_task_nor_queue(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def publish(_names: object = None) -> str:
        return "state_path can't be used now (Permission denied)"

    monkeypatch.setattr(endings, "PLACE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(harness.outputs, "publish_kept", publish)
        async with harness.open() as queue:
            (task_id,) = await harness.submit()
            await harness.started(task_id)
            harness.engine.finish()
            await until(lambda: "Permission denied" in queue.faults.get("place", ""))
            assert (await harness.status(task_id), queue._work.done()) == (Status.PROCESSING, False)
    async with harness.open():
        assert (await harness.end(task_id)).status is Status.COMPLETED


async def test_a_task_is_moved_to_the_front_while_one_that_is_made_waits_to_be_saved(harness: Harness) -> None:
    async with harness.open(die=True):
        first, second, third = await harness.submit(3)
        await harness.started(first)
        harness.outputs.kept = "The disk is read-only"
        harness.engine.finish()
        await until(lambda: '"files": [{' in harness.stored("record")[first])
    async with harness.open() as queue:
        await queue.remove(first)
        await queue.move(third, 1)
        assert [task.id for task in queue.listing() if task.id != first] == [third, second]
        harness.outputs.kept = ""


@pytest.mark.parametrize("code", [STORAGE_FAULT, DEVICE_FAULT, "engine_unavailable", "save_failed"])
async def test_a_task_that_is_being_cancelled_is_cancelled_whatever_it_ends_in(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        monkeypatch.setattr(harness.engine, "cancel", lambda _: None)
        assert await queue.remove(task_id) is Status.CANCELLING
        harness.engine.finish(EngineError("Out of ideas.", code))
        task = await harness.end(task_id)
        assert (task.status, task.error) == (Status.CANCELLED, None)


@pytest.mark.parametrize("die", [True, False])
async def test_what_is_made_and_not_saved_outlives_the_daemon(harness: Harness, die: bool) -> None:
    async with harness.open(die=die) as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.outputs.kept = "The disk is read-only"
        harness.engine.finish()
        await until(lambda: '"files": [{' in harness.stored("record")[task_id])
        assert (queue.position(await queue.get(task_id)), harness.stored()[task_id]) == (1, "processing")
    harness.outputs.kept = ""
    async with harness.open():
        task = await harness.end(task_id)
        assert (task.status, task.attempts, len(task.files)) == (Status.COMPLETED, 1, 1)
        assert ("attempt", task_id) not in harness.outputs.told
        assert harness.engine.ran == []


async def test_a_cancel_ends_a_task_whose_files_can_not_be_saved(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endings, "PLACE_S", 0.01)
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.outputs.kept = "The disk is read-only"
        harness.engine.finish()
        await until(lambda: "place" in queue.faults)
        await queue.remove(task_id)
        assert (await harness.end(task_id)).status is Status.CANCELLED


async def test_a_disk_that_fails_under_every_attempt_of_one_task_ends_that_task_alone(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "HOLD_S", 0.01)
    monkeypatch.setattr(runner, "PLACE_S", 0.01)
    async with harness.open():
        first, second = await harness.submit(2)
        for attempts in (1, 2):
            await until(lambda attempts=attempts: harness.engine.ran == [first] * attempts and harness.engine.busy)
            harness.engine.finish(EngineError("No space left on device.", STORAGE_FAULT))
        task = await harness.end(first)
        assert (task.status, task.attempts, task.error["code"]) == (Status.FAILED, 2, STORAGE_FAULT)
        await harness.started(second)


async def test_a_disk_that_fails_for_all_costs_no_attempt(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "HOLD_S", 0.01)
    monkeypatch.setattr(runner, "PLACE_S", 0.01)
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        for attempts in range(1, 5):
            await until(lambda attempts=attempts: harness.engine.ran == [task_id] * attempts and harness.engine.busy)
            harness.outputs.full = "The disk is full."
            harness.engine.finish(EngineError("No space left on device.", STORAGE_FAULT))
            await until(lambda: harness.waiting() == [task_id] and not queue.at_work)
            assert (await queue.get(task_id)).attempts == 0
            harness.outputs.full = ""


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_a_task_that_is_broken_off_lists_the_files_that_were_whole(harness: Harness, how: str) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.engine.whole[task_id] = [FILE, replace(FILE, filename="b.mp4")]
        if how == "failed":
            harness.engine.finish(EngineError("It died.", "worker_died"))
        else:
            await queue.remove(task_id)
        task = await harness.end(task_id)
        assert (task.status, [file.filename for file in task.files]) == (how, ["a.mp4", "b.mp4"])


async def test_after_a_fault_of_the_device_it_is_checked_before_the_next_task(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second = await harness.submit(2)
        await harness.started(first)
        for attempts in (1, 2):  # once more, for the card may have failed and not the task
            await until(lambda attempts=attempts: harness.engine.ran == [first] * attempts and harness.engine.busy)
            assert (harness.engine.checks, queue.faults) == (attempts - 1, {})
            harness.engine.finish(EngineError("The device failed.", DEVICE_FAULT))
        assert (await harness.end(first)).error["code"] == DEVICE_FAULT
        await harness.started(second)
        assert (harness.engine.checks, queue.faults) == (2, {})


async def test_a_device_that_fails_its_check_after_a_task_is_checked_again_only_after_a_while(harness: Harness) -> None:
    async with harness.open() as queue:
        (first,) = await harness.submit(1)
        await harness.started(first)
        harness.engine.broken = EngineError("There is no GPU.", "no_device")
        harness.engine.finish(EngineError("The device failed.", DEVICE_FAULT))
        await until(lambda: queue.faults == {"engine": "There is no GPU."})
        for _ in range(100):
            await asyncio.sleep(0)
        assert (harness.engine.checks, queue.lanes.take_to_check()) == (1, None)


async def test_a_fault_of_the_engine_that_only_one_task_meets_ends_that_task(harness: Harness) -> None:
    """Such as a package that is missing for one model: the engine passes each check."""
    async with harness.open() as queue:
        first, second = await harness.submit(2)
        for attempts in (1, 2, 3):
            await until(lambda attempts=attempts: harness.engine.ran == [first] * attempts and harness.engine.busy)
            harness.engine.finish(EngineError("No module named 'x'.", "engine_unavailable"))
            await until(lambda: not harness.engine.busy)
            queue.lanes[0].check_at = 0.0
            queue.runner.wake.set()
        task = await harness.end(first)
        assert (task.status, task.error["code"]) == (Status.FAILED, "engine_unavailable")
        await until(lambda: bool(queue.lanes[0].fault) or second in harness.engine.ran)


async def test_a_device_that_stays_broken_gets_no_further_task(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "CHECK_AGAIN_S", 0.01)
    async with harness.open() as queue:
        first, second = await harness.submit(2)
        await harness.started(first)
        harness.engine.broken = EngineError("There is no GPU.", "no_device")
        harness.engine.finish(EngineError("The device failed.", DEVICE_FAULT))
        await until(lambda: queue.faults == {"engine": "There is no GPU."})
        assert (harness.engine.ran, harness.waiting()) == ([first], [first, second])
        harness.engine.broken = None
        queue.lanes[0].check_at = 0.0
        queue.runner.wake.set()
        await until(lambda: harness.engine.ran == [first, first])
        assert queue.faults == {}


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_an_output_folder_that_can_not_be_tidied_keeps_no_task_from_its_end(harness: Harness, how: str) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.outputs.fault = PermissionError(13, "Permission denied")
        if how == "cancelled":
            await queue.remove(task_id)
        else:
            harness.engine.finish(EngineError("It failed.", "failed"))
        assert (await harness.end(task_id)).status == how


async def test_a_fault_of_the_retention_costs_the_task_nothing(harness: Harness) -> None:
    harness.outputs.fault = OSError(5, "Input/output error")
    async with harness.open():
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.engine.finish()
        assert (await harness.end(task_id)).status is Status.COMPLETED


async def test_an_unknown_task_is_told_so(harness: Harness) -> None:
    async with harness.open() as queue:
        for ask in (queue.get(1), queue.remove(1), queue.move(1, 1), queue.retry(1), queue.wait(1, 1)):
            with pytest.raises(NoSuchTask, match="Task 1 not found"):
                await ask


# ---- cancel


async def test_a_waiting_task_that_is_removed_never_runs(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        first, second = await harness.submit(2)
        assert await queue.remove(first) is Status.CANCELLED
        assert (harness.stored()[first], harness.waiting()) == ("cancelled", [second])
        await queue.pause(False)
        await harness.started(second)
        assert harness.engine.ran == [second]


async def test_a_running_task_is_cancelling_until_its_work_has_ended(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        with monkeypatch.context() as patch:
            patch.setattr(harness.engine, "cancel", lambda _: None)  # its worker takes a while
            assert await queue.remove(task_id) is Status.CANCELLING
            assert (await harness.status(task_id), harness.stored()[task_id]) == (Status.CANCELLING, "cancelling")
        harness.engine.finish(Cancelled())
        assert (await harness.end(task_id)).status is Status.CANCELLED


async def test_a_cancel_that_comes_after_the_last_file_still_ends_as_cancelled(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        monkeypatch.setattr(harness.engine, "cancel", lambda _: None)
        await queue.remove(task_id)
        harness.engine.finish()
        assert (await harness.end(task_id)).status is Status.CANCELLED


def held_in_preparation(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold a task before the engine knows of it: the first event says that it is there, the second lets it go on."""
    preparing, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def prepare(_own: object) -> list[str]:
        loop.call_soon_threadsafe(preparing.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE_S)
        return []

    monkeypatch.setattr(harness.outputs, "prepare", prepare)
    return preparing, go_on


async def test_a_cancel_before_the_engine_knows_of_the_task_runs_nothing(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing, go_on = held_in_preparation(harness, monkeypatch)
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await preparing.wait()
        assert await queue.remove(task_id) is Status.CANCELLING
        go_on.set()
        assert (await harness.end(task_id)).status is Status.CANCELLED
        assert harness.engine.ran == []


async def test_an_ended_task_can_not_be_removed(harness: Harness) -> None:
    async with harness.open():
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.engine.finish()
        await harness.end(task_id)
        with pytest.raises(WrongState, match=rf"Task {task_id} has already ended \(completed\)"):
            await harness.queue.remove(task_id)


async def test_clearing_takes_out_all_that_wait_and_leaves_the_running_one(harness: Harness) -> None:
    async with harness.open() as queue:
        ids = await harness.submit(4)
        await harness.started(ids[0])
        assert await queue.clear() == 3
        assert harness.waiting() == ids[:1]
        assert harness.stored() == {ids[0]: "processing", **dict.fromkeys(ids[1:], "cancelled")}
        assert await queue.clear() == 0


# ---- pause


async def test_a_paused_queue_starts_nothing_and_its_running_task_goes_on(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second = await harness.submit(2)
        await harness.started(first)
        await queue.pause(True)
        harness.engine.finish()
        assert (await harness.end(first)).status is Status.COMPLETED
        await asyncio.sleep(0.05)
        assert (harness.engine.ran, await harness.status(second)) == ([first], Status.QUEUED)
        await queue.pause(False)
        await harness.started(second)


@pytest.mark.parametrize("die", [False, True])
async def test_a_pause_is_remembered_over_a_restart(harness: Harness, die: bool) -> None:
    async with harness.open(paused=True, die=die):
        pass
    async with harness.open() as queue:
        assert queue.paused


# ---- move


@pytest.mark.parametrize(
    ("moved", "position", "order", "told"),
    [
        (3, 1, [3, 1, 2, 4], 1),
        (3, 2, [1, 3, 2, 4], 2),
        (1, 4, [2, 3, 4, 1], 4),
        (1, 99, [2, 3, 4, 1], 4),
        (2, 2, [1, 2, 3, 4], 2),
        (4, 0, [4, 1, 2, 3], 1),
    ],
)
async def test_a_waiting_task_can_be_moved(
    harness: Harness, moved: int, position: int, order: list[int], told: int
) -> None:
    async with harness.open(paused=True, die=True) as queue:
        await harness.submit(4)
        assert (await queue.move(moved, position), harness.waiting()) == (told, order)
        assert queue.position(await queue.get(moved)) == told
    async with harness.open():
        assert harness.waiting() == order


@pytest.mark.parametrize("position", [1, 2])
async def test_no_task_gets_before_the_running_one(harness: Harness, position: int) -> None:
    async with harness.open() as queue:
        first, second, third = await harness.submit(3)
        await harness.started(first)
        assert await queue.move(third, position) == 2
        assert harness.waiting() == [first, third, second]


async def test_only_a_waiting_task_can_be_moved(harness: Harness) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        with pytest.raises(WrongState, match=f"Task {task_id} is processing; only a waiting task can be moved"):
            await queue.move(task_id, 1)


async def test_what_is_submitted_after_a_move_comes_last(harness: Harness) -> None:
    async with harness.open(paused=True, die=True) as queue:
        first, second = await harness.submit(2)
        await queue.move(second, 1)
        (third,) = await harness.submit()
    async with harness.open():
        assert harness.waiting() == [second, first, third]


# ---- retry, history, wait


async def test_a_retry_is_a_new_task_with_everything_that_the_old_one_had(harness: Harness, tmp_path: Path) -> None:
    async with harness.open() as queue:
        (tmp_path / "picture").touch()
        old = job("a cat", seed=42, inputs={"image_start": (tmp_path / "picture",)})
        task_id = (await queue.submit(old, ["a warning"])).answer["task_id"]
        await harness.started(task_id)
        harness.engine.finish(EngineError("It failed.", "failed"))
        await harness.end(task_id)
        again = await queue.get((await queue.retry(task_id)).answer["task_id"])
        assert again.id > task_id
        assert (again.job, again.warnings) == (old, ("a warning",))
        assert await harness.status(task_id) is Status.FAILED


async def test_a_task_that_has_not_ended_can_not_be_retried(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        (task_id,) = await harness.submit()
        with pytest.raises(WrongState, match="is queued; only an ended task can be retried"):
            await queue.retry(task_id)


async def test_history_tells_of_running_waiting_and_ended_tasks(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second, third = await harness.submit(3)
        await harness.started(first)
        harness.engine.finish()
        await harness.started(second)
        ids, total = await queue.journal.history(None, 10, 0)
        assert [(task_id, await harness.status(task_id)) for task_id in ids] == [
            (third, Status.QUEUED),
            (second, Status.PROCESSING),
            (first, Status.COMPLETED),
        ]
        assert total == 3


async def test_records_beyond_the_limit_are_forgotten(harness: Harness) -> None:
    async with harness.open(history_count=2):
        ids = await harness.submit(4)
        for task_id in ids:
            await harness.started(task_id)
            harness.engine.finish()
        await until(lambda: list(harness.stored()) == ids[2:])


async def test_waiting_for_a_task_ends_with_the_task_or_with_the_time(harness: Harness) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        assert (await queue.wait(task_id, 0.02)).status in (Status.QUEUED, Status.PROCESSING)
        await harness.started(task_id)
        waiting = [asyncio.create_task(queue.wait(task_id, PATIENCE_S)) for _ in range(3)]
        harness.engine.finish()
        assert [task.status for task in await asyncio.gather(*waiting)] == [Status.COMPLETED] * 3


async def test_waiting_for_a_task_ends_with_its_removal(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        (task_id,) = await harness.submit()
        waiting = asyncio.create_task(queue.wait(task_id, PATIENCE_S))
        await asyncio.sleep(0.01)
        await queue.remove(task_id)
        assert (await waiting).status is Status.CANCELLED


# ---- keys and limits


async def test_a_key_brings_the_first_answer_again_also_after_a_restart(harness: Harness) -> None:
    async with harness.open(paused=True, die=True) as queue:
        first = await queue.submit(job(), key="key", request="digest")
        again = await queue.submit(job(), key="key", request="digest")
        assert (again.answer, again.replayed, first.replayed) == (first.answer, True, False)
    async with harness.open() as queue:
        assert (await queue.submit(job(), key="key", request="digest")).answer == first.answer
        assert harness.waiting() == [first.answer["task_id"]]


async def test_a_key_of_another_request_is_refused(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        await queue.submit(job(), key="key", request="digest")
        with pytest.raises(KeyReused):
            await queue.submit(job(), key="key", request="another")
        assert len(harness.waiting()) == 1


async def test_the_same_key_twice_at_once_makes_one_task(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        both = await asyncio.gather(*(queue.submit(job(), key="key", request="digest") for _ in range(2)))
        assert both[0].answer == both[1].answer
        assert sorted(receipt.replayed for receipt in both) == [False, True]


async def test_a_full_queue_takes_nothing_more_however_many_ask_at_once(harness: Harness) -> None:
    async with harness.open(paused=True, max_queue=3) as queue:
        done = await asyncio.gather(*(queue.submit(job()) for _ in range(10)), return_exceptions=True)
        assert ["queue is full" in str(receipt) for receipt in done] == [False] * 3 + [True] * 7
        assert len(harness.waiting()) == 3


async def test_positions_in_answers_count_up_however_many_ask_at_once(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        done = await asyncio.gather(*(queue.submit(job()) for _ in range(5)))
        assert [receipt.answer["position"] for receipt in done] == [1, 2, 3, 4, 5]
        assert [receipt.answer["task_id"] for receipt in done] == harness.waiting()


async def test_a_closed_queue_takes_nothing_and_starts_nothing(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        await harness.submit()
        queue.runner.interrupt()
        await queue.pause(False)
        with pytest.raises(Unavailable, match="shutting down"):
            await queue.submit(job())
        await asyncio.sleep(0.02)
        assert harness.engine.ran == []


@pytest.mark.parametrize("code", ["no_device", "engine_unavailable"])
async def test_an_engine_that_can_not_start_keeps_work_away_until_it_works(harness: Harness, code: str) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        harness.engine.broken = EngineError("There is no GPU.", code)
        harness.engine.finish(harness.engine.broken)
        await until(lambda: harness.waiting() == [task_id] and not queue.at_work)
        for refused in (queue.submit(job()), queue.submit(job())):
            with pytest.raises(Unavailable, match="There is no GPU"):
                await refused
        harness.engine.broken = None
        queue.lanes[0].check_at = 0.0
        queue.runner.wake.set()
        await until(lambda: harness.engine.busy)
        harness.engine.finish()
        task = await harness.end(task_id)
        assert (task.status, task.attempts, queue.faults) == (Status.COMPLETED, 1, {})


# ---- warm and cold


async def test_a_model_is_made_warm_when_the_engine_is_free(harness: Harness) -> None:
    async with harness.open() as queue:
        model = CATALOG.get("wan_demo")
        assert not queue.load(model)
        await until(lambda: harness.engine.warm == model.id)
        assert queue.load(model)


async def test_memory_is_given_back_when_nothing_runs(harness: Harness) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        with pytest.raises(WrongState, match="engine works"):
            queue.unload()
        harness.engine.finish()
        await harness.end(task_id)
        await until(lambda: not queue.at_work)
        assert queue.unload()


async def test_an_idle_queue_gives_its_memory_back(harness: Harness) -> None:
    async with harness.open(idle_unload_s=0.02):
        await until(lambda: harness.engine.unloads > 0)
        (task_id,) = await harness.submit()
        await harness.started(task_id)


# ---- estimates


async def test_nothing_is_estimated_without_history(harness: Harness) -> None:
    async with harness.open() as queue:
        receipts = [await queue.submit(job()) for _ in range(2)]
        assert [receipt.answer["estimated_wait"] for receipt in receipts] == [0.0, None]
        assert queue.eta_s(queue.listing()[1]) is None


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 24.0),
        ({"steps": 40}, 44.0),
        ({"frames": 18}, 47.0),
        ({"width": 128}, 47.0),
        ({"repeat_generation": 2}, 47.0),
        ({"batch_size": 2}, 47.0),
    ],
)
async def test_an_estimate_follows_pixels_frames_steps_and_files(
    harness: Harness, changes: dict[str, int], seconds: float
) -> None:
    async with harness.open() as queue:
        await harness.learn()
        assert queue.estimate_s(job(**changes)) == pytest.approx(seconds)


async def test_a_cold_model_takes_its_loading_time_as_well(harness: Harness) -> None:
    async with harness.open() as queue:
        await harness.learn()
        queue.unload()
        assert queue.estimate_s(job()) == pytest.approx(34.0)


async def test_a_model_without_history_has_no_estimate(harness: Harness) -> None:
    async with harness.open() as queue:
        await harness.learn()
        assert queue.estimate_s(job(model="wan_t2v_14B")) is None


async def test_estimates_outlive_the_daemon(harness: Harness) -> None:
    async with harness.open(die=True):
        await harness.learn()
    async with harness.open() as queue:
        assert queue.estimate_s(job()) == pytest.approx(34.0)


async def test_the_estimated_wait_is_the_work_ahead(harness: Harness) -> None:
    async with harness.open() as queue:
        await harness.learn()
        await queue.pause(True)
        receipts = [await queue.submit(job()) for _ in range(3)]
        assert [receipt.answer["estimated_wait"] for receipt in receipts] == pytest.approx([0.0, 24.0, 48.0])


async def test_a_submission_costs_the_same_however_many_tasks_wait(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    estimate_s = facts.Facts.estimate_s
    monkeypatch.setattr(task_queue, "ADDED_UP_S", 60.0)
    async with harness.open(paused=True) as queue:
        await harness.submit(50)
        monkeypatch.setattr(facts.Facts, "estimate_s", lambda *given: counted.append("a look") or estimate_s(*given))
        await harness.submit(50)
        assert len(counted) == 50
        await queue.clear()
        assert queue.estimated_wait_s() == 0.0


async def test_progress_lets_no_submission_count_all_that_wait_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    estimate_s = facts.Facts.estimate_s
    monkeypatch.setattr(task_queue, "ADDED_UP_S", 60.0)
    async with harness.open(paused=True) as queue:
        (first, *_) = await harness.submit(50)
        monkeypatch.setattr(facts.Facts, "estimate_s", lambda *given: counted.append("a look") or estimate_s(*given))
        for _ in range(10):
            queue.events.publish(EventKind.PROGRESS, queue.active(first))
            await harness.submit()
        assert len(counted) == 10


async def test_the_eta_of_a_waiting_task_counts_no_time_in_the_queue(harness: Harness) -> None:
    async with harness.open() as queue:
        await harness.learn()
        await queue.pause(True)
        await harness.submit(5)
        assert [queue.eta_s(task) for task in queue.listing()] == pytest.approx([24.0] * 5)


async def test_a_slow_model_may_take_twenty_of_its_own_steps(harness: Harness) -> None:
    async with harness.open(step_timeout_s=5.0):
        await harness.learn()
        (task_id,) = await harness.submit(frames=81)
        await harness.started(task_id)
        assert harness.engine.patience == pytest.approx([5.0, 20 * 9.0])  # a second a step, for a ninth of the frames


async def test_progress_only_grows_and_is_100_with_the_end(harness: Harness) -> None:
    async with harness.open() as queue:
        (task_id,) = await harness.submit(repeat_generation=2)
        await harness.started(task_id)
        seen = []
        way = [(Phase.LOADING, 0, 0), (Phase.ENCODING, 0, 0), (Phase.DENOISING, 0, 10), (Phase.DECODING, 0, 20)]
        way += [(Phase.ENCODING, 1, 0), (Phase.DENOISING, 1, 20), (Phase.SAVING, 1, 20), (Phase.DENOISING, 0, 3)]
        for phase, run, step in way:
            harness.engine.shown = Progress(phase, run, 2, step, 20)
            await queue.advance(task_id, lambda task: advanced(task, harness.engine.shown))
            seen.append(queue.progress_percent(await queue.get(task_id)))
        assert seen == sorted(seen)
        assert seen[-1] < 100
        harness.engine.finish()
        assert queue.progress_percent(await harness.end(task_id)) == 100


# ---- restarts


async def test_waiting_tasks_wait_again_in_their_order(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        first, second, third = await harness.submit(3)
        await queue.move(third, 1)
    async with harness.open():
        assert harness.waiting() == [third, first, second]


async def test_the_task_that_ran_comes_first_again_as_another_attempt(harness: Harness) -> None:
    async with harness.open(die=True):
        first, second = await harness.submit(2)
        await harness.started(first)
    async with harness.open(die=True):
        await harness.started(first)
        assert (harness.waiting(), (await harness.queue.get(first)).attempts) == ([first, second], 2)
        assert ("attempt", first) in harness.outputs.told


async def test_a_task_that_ran_comes_before_those_that_were_moved_to_the_front(harness: Harness) -> None:
    async with harness.open(die=True) as queue:
        first, _, third = await harness.submit(3)
        await harness.started(first)
        await queue.move(third, 1)
    async with harness.open():
        assert harness.waiting()[:2] == [first, third]


async def test_after_max_attempts_a_task_fails_and_says_so(harness: Harness) -> None:
    (task_id, other) = (1, 2)
    for _ in range(2):
        async with harness.open(die=True, max_attempts=2):
            await harness.submit(2) if not harness.stored() else None
            await harness.started(task_id)
    async with harness.open(max_attempts=2) as queue:
        task = await queue.get(task_id)
        sentence = "wangpd ended 2 times while this task ran; max_attempts is 2."
        assert (task.status, task.error) == (Status.FAILED, {"code": "too_many_attempts", "message": sentence})
        await harness.started(other)


async def test_a_shutdown_puts_the_task_back_and_costs_no_attempt(harness: Harness) -> None:
    for _ in range(4):
        async with harness.open(max_attempts=2):
            await harness.submit(2) if not harness.stored() else None
            await harness.started(1)
        assert harness.stored() == {1: "queued", 2: "queued"}
    async with harness.open():
        assert harness.waiting() == [1, 2]
        await harness.started(1)
        assert (await harness.queue.get(1)).attempts == 1


async def test_a_shutdown_before_the_engine_knows_of_the_task_puts_it_back(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing, go_on = held_in_preparation(harness, monkeypatch)
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await preparing.wait()
        queue.runner.interrupt()
        go_on.set()
    assert (harness.stored()[task_id], harness.engine.ran) == ("queued", [])
    record = json.loads(harness.stored("record")[task_id])
    assert (record["attempts"], record["started_at"]) == (0, None)


async def test_a_task_that_is_put_back_is_listed_once(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    async with harness.open() as queue:
        ids = await harness.submit(2)
        await harness.started(ids[0])
        listed = []
        save = harness.journal.save

        async def look(*tasks: Any, **more: Any) -> None:
            listed.append(harness.waiting())
            await save(*tasks, **more)

        monkeypatch.setattr(harness.journal, "save", look)
        queue.runner.interrupt()
        await until(lambda: harness.stored()[ids[0]] == "queued")
        assert listed == [ids]


async def test_a_cancel_during_a_shutdown_is_kept(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the files of the attempt are being removed."""
    async with harness.open() as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        loop = asyncio.get_running_loop()

        def remove_attempt(number: int, _made: object = ()) -> int:
            status = asyncio.run_coroutine_threadsafe(queue.remove(number), loop).result(PATIENCE_S)
            assert status is Status.CANCELLING
            return 0

        monkeypatch.setattr(harness.outputs, "remove_attempt", remove_attempt)
        queue.runner.interrupt()
    assert harness.stored()[task_id] == "cancelled"


async def test_a_task_that_was_being_cancelled_is_cancelled_after_a_crash(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open(die=True) as queue:
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        monkeypatch.setattr(harness.engine, "cancel", lambda _: None)
        await queue.remove(task_id)
    async with harness.open():
        assert await harness.status(task_id) is Status.CANCELLED
        assert ("attempt", task_id) in harness.outputs.told


async def test_on_restart_fail_fails_the_interrupted_task_alone(harness: Harness) -> None:
    async with harness.open(die=True):
        first, second = await harness.submit(2)
        await harness.started(first)
    async with harness.open(on_restart="fail") as queue:
        task = await queue.get(first)
        assert (task.status, task.error["code"]) == (Status.FAILED, "restarted")
        assert 'on_restart is "fail"' in task.error["message"]
        await harness.started(second)


async def test_on_restart_pause_puts_it_back_and_starts_nothing_until_somebody_resumes(harness: Harness) -> None:
    async with harness.open(die=True):
        first, second = await harness.submit(2)
        await harness.started(first)
    for _ in range(2):  # the second time nothing was interrupted, and the queue is paused all the same
        async with harness.open(on_restart="pause", die=True) as queue:
            await asyncio.sleep(0.02)
            assert (queue.paused, harness.waiting(), harness.engine.ran) == (True, [first, second], [])
    async with harness.open(on_restart="pause") as queue:
        await queue.pause(False)
        await harness.started(first)


async def test_on_restart_pause_with_nothing_interrupted_goes_on(harness: Harness) -> None:
    async with harness.open(paused=True):
        (task_id,) = await harness.submit()
        await harness.queue.pause(False)
        harness.queue.runner.interrupt()
    async with harness.open(on_restart="pause") as queue:
        assert not queue.paused
        await harness.started(task_id)


# ---- a disk that fails


async def test_a_journal_that_can_not_be_written_is_logged_when_that_begins_and_when_it_ends(
    harness: Harness, disk: BrokenDisk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "wangpd.queue")
    async with harness.open():
        (task_id,) = await harness.submit()
        await harness.started(task_id)
        disk.broken = True
        harness.engine.finish()
        await until(lambda: bool(harness.queue.journal_fault))
        await asyncio.sleep(0.1)  # several tries
        disk.broken = False
        await harness.end(task_id)
    told = [message for message in caplog.messages if "journal" in message or "disk" in message]
    assert told == ["the disk is gone", "the journal can be used again"]


async def test_a_submission_that_can_not_be_written_down_is_refused(harness: Harness, disk: BrokenDisk) -> None:
    async with harness.open(paused=True) as queue:
        disk.broken = True
        with pytest.raises(JournalFault):
            await queue.submit(job())
        assert harness.waiting() == []
        disk.broken = False
        assert (await queue.submit(job())).answer["position"] == 1


async def test_a_removal_that_can_not_be_written_down_leaves_the_queue_as_it_was(
    harness: Harness, disk: BrokenDisk
) -> None:
    async with harness.open(paused=True) as queue:
        ids = await harness.submit(4)
        disk.broken = True
        for ask in (queue.remove(ids[1]), queue.clear()):
            with pytest.raises(JournalFault):
                await ask
            assert harness.waiting() == ids
        assert {task.status for task in queue.listing()} == {Status.QUEUED}
        disk.broken = False


async def test_a_task_that_starts_during_a_failing_removal_is_not_queued_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open(paused=True) as queue:
        first, second, third = await harness.submit(3)
        begun = asyncio.Event()
        save = harness.journal.save

        async def slow_fault(*tasks: Any, **more: Any) -> None:
            if [task.id for task in tasks] != [second]:
                await save(*tasks, **more)
                return
            await begun.wait()
            raise JournalFault("the disk is gone")

        monkeypatch.setattr(harness.journal, "save", slow_fault)
        removing = asyncio.create_task(queue.remove(second))
        await asyncio.sleep(0)
        resuming = asyncio.create_task(queue.pause(False))
        begun.set()
        with pytest.raises(JournalFault):
            await removing
        await resuming
        await harness.started(first)
        assert harness.waiting() == [first, second, third]
        monkeypatch.undo()


async def test_a_move_that_can_not_be_written_down_moves_nothing(harness: Harness, disk: BrokenDisk) -> None:
    async with harness.open(paused=True) as queue:
        ids = await harness.submit(4)
        disk.broken = True
        with pytest.raises(JournalFault):
            await queue.move(ids[3], 1)
        assert harness.waiting() == ids
        disk.broken = False


async def test_a_pause_that_can_not_be_written_down_pauses_nothing(harness: Harness, disk: BrokenDisk) -> None:
    async with harness.open() as queue:
        disk.broken = True
        with pytest.raises(JournalFault):
            await queue.pause(True)
        assert not queue.paused
        disk.broken = False


async def test_an_end_that_can_not_be_written_down_is_written_when_it_can(harness: Harness, disk: BrokenDisk) -> None:
    async with harness.open() as queue:
        first, second = await harness.submit(2)
        await harness.started(first)
        disk.broken = True
        harness.engine.finish()
        await until(lambda: "journal" in queue.faults)
        assert (harness.engine.ran, harness.stored()[first]) == ([first], "processing")
        disk.broken = False
        assert (await harness.end(first)).status is Status.COMPLETED
        await harness.started(second)
        assert queue.faults == {}
        assert harness.stored()[first] == "completed"


async def test_a_start_that_can_not_be_written_down_waits_for_the_disk(harness: Harness, disk: BrokenDisk) -> None:
    async with harness.open(paused=True) as queue:
        (task_id,) = await harness.submit()
        await queue.pause(False)
        disk.broken = True
        await until(lambda: "journal" in queue.faults)
        assert harness.engine.ran == []
        disk.broken = False
        await harness.started(task_id)
