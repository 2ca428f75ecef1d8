"""TaskQueue with one engine, in this process; test_lanes.py has it with several."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from engine.job import Cancelled, EngineError, Phase
from engine.queue import facts, store
from engine.queue import queue as task_queue
from engine.queue.journal import Journal, JournalFault, KeyReused
from engine.queue.progress import advanced
from engine.queue.queue import Unavailable
from engine.queue.tasks import NoSuchTask, Status, WrongState
from engine.workers import lanes
from engine.workers.lanes import Progress
from tests.house import CATALOG, FILE, PATIENCE_S, TIMINGS, House, until
from tests.stand_ins import job


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path)


class BrokenDisk:
    """The journal's writes fail while it is `broken`."""

    def __init__(self, house: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.broken, self._house = False, house
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
def disk(house: House, monkeypatch: pytest.MonkeyPatch) -> BrokenDisk:
    monkeypatch.setattr(store, "SAVE_AGAIN_S", 0.01)
    return BrokenDisk(house, monkeypatch)


# ---- the way of a task


async def test_a_task_is_in_the_file_before_its_answer(house: House) -> None:
    async with house.open(paused=True):
        ids = await house.submit(3)
        assert house.stored() == dict.fromkeys(ids, "queued")


async def test_times_that_can_not_be_learnt_cost_no_task_its_end(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_mean", lambda *_, **__: 1 / 0)
    async with house.open():
        (task_id,) = await house.submit()
        await house.started(task_id)
        house.desk.finish()
        assert (await house.end(task_id)).status is Status.COMPLETED


async def test_what_a_task_taught_is_on_the_disk_together_with_its_end(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits: list[Any] = []
    save = Journal.save

    async def noted(journal: Journal, *tasks: Any, **facts: Any) -> None:
        commits.append(([task.status for task in tasks], list(facts)))
        await save(journal, *tasks, **facts)

    monkeypatch.setattr(Journal, "save", noted)
    async with house.open():
        await house.learn()
    assert commits[-1] == ([Status.COMPLETED], ["model", "speeds"])


async def test_who_waits_while_a_task_runs_is_told_of_its_end_without_a_look_at_the_disk(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        waiting = asyncio.create_task(queue.wait(task_id, 20))
        await asyncio.sleep(0)
        with monkeypatch.context() as patched:
            patched.setattr(Journal, "get", lambda *_: 1 / 0)
            house.desk.finish()
            assert (await waiting).status is Status.COMPLETED
        assert house.stored()[task_id] == "completed"


async def test_what_can_not_be_forgotten_costs_the_queue_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "prune", lambda *_: 1 / 0)
    async with house.open():
        for task_id in await house.submit(2):
            await house.started(task_id)
            house.desk.finish()
            assert (await house.end(task_id)).status is Status.COMPLETED


async def test_a_task_goes_from_queued_by_processing_to_completed(house: House) -> None:
    async with house.open(paused=True) as queue:
        (task_id,) = await house.submit()
        assert await house.status(task_id) is Status.QUEUED
        await queue.pause(False)
        await house.started(task_id)
        assert (await house.status(task_id), house.stored()[task_id]) == (Status.PROCESSING, "processing")
        house.desk.finish()
        task = await house.end(task_id)
        assert (task.status, task.files, task.timings, task.attempts) == (Status.COMPLETED, (FILE,), TIMINGS, 1)
        assert house.stored()[task_id] == "completed"


async def test_tasks_run_one_at_a_time_in_their_order(house: House) -> None:
    async with house.open():
        ids = await house.submit(3)
        for place, task_id in enumerate(ids, 1):
            await house.started(task_id)
            assert house.desk.ran == ids[:place]
            house.desk.finish()
            await house.end(task_id)


async def test_a_failed_task_fails_alone_with_its_sentence(house: House) -> None:
    async with house.open():
        first, second = await house.submit(2)
        await house.started(first)
        house.desk.finish(EngineError("Out of ideas.", "no_ideas"))
        task = await house.end(first)
        assert (task.status, task.error) == (Status.FAILED, {"code": "no_ideas", "message": "Out of ideas."})
        assert ("parts", first) in house.shelf.told
        await house.started(second)


async def test_a_task_of_a_model_that_is_gone_fails_alone(house: House) -> None:
    async with house.open():
        (gone,) = await house.submit(model="gone")
        assert (await house.end(gone)).error["code"] == "unknown_model"
        (task_id,) = await house.submit()
        await house.started(task_id)


async def test_a_fault_of_the_daemon_itself_ends_the_task_and_not_the_queue(house: House) -> None:
    async with house.open():
        first, second = await house.submit(2)
        await house.started(first)
        house.desk.finish(RuntimeError("nobody thought of this"))
        task = await house.end(first)
        assert (task.status, task.error["code"], house.stored()[first]) == (Status.FAILED, "internal_error", "failed")
        assert "RuntimeError" in task.error["message"]
        assert "nobody" not in task.error["message"]
        await house.started(second)


async def test_a_full_disk_fails_the_task_before_it_starts(house: House) -> None:
    house.shelf.full = "The disk is full: delete something"
    async with house.open():
        (task_id,) = await house.submit()
        task = await house.end(task_id)
        assert task.error == {"code": "disk_full", "message": "The disk is full: delete something"}
        assert house.desk.ran == []


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_an_output_folder_that_can_not_be_tidied_keeps_no_task_from_its_end(house: House, how: str) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        house.shelf.fault = PermissionError(13, "Permission denied")
        if how == "cancelled":
            await queue.remove(task_id)
        else:
            house.desk.finish(EngineError("It failed.", "failed"))
        assert (await house.end(task_id)).status == how


async def test_an_output_folder_that_raises_at_the_start_fails_the_task(house: House) -> None:
    house.shelf.fault = OSError(5, "Input/output error")
    async with house.open():
        (task_id,) = await house.submit()
        assert (await house.end(task_id)).error["code"] == "internal_error"


async def test_an_unknown_task_is_told_so(house: House) -> None:
    async with house.open() as queue:
        for ask in (queue.get(1), queue.remove(1), queue.move(1, 1), queue.retry(1), queue.wait(1, 1)):
            with pytest.raises(NoSuchTask, match="Task 1 not found"):
                await ask


# ---- cancel


async def test_a_waiting_task_that_is_removed_never_runs(house: House) -> None:
    async with house.open(paused=True) as queue:
        first, second = await house.submit(2)
        assert await queue.remove(first) is Status.CANCELLED
        assert (house.stored()[first], house.waiting()) == ("cancelled", [second])
        await queue.pause(False)
        await house.started(second)
        assert house.desk.ran == [second]


async def test_a_running_task_is_cancelling_until_its_work_has_ended(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        with monkeypatch.context() as patch:
            patch.setattr(house.desk, "cancel", lambda _: None)  # its worker takes a while
            assert await queue.remove(task_id) is Status.CANCELLING
            assert (await house.status(task_id), house.stored()[task_id]) == (Status.CANCELLING, "cancelling")
        house.desk.finish(Cancelled())
        assert (await house.end(task_id)).status is Status.CANCELLED


async def test_a_cancel_that_comes_after_the_last_file_still_ends_as_cancelled(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        monkeypatch.setattr(house.desk, "cancel", lambda _: None)
        await queue.remove(task_id)
        house.desk.finish()
        assert (await house.end(task_id)).status is Status.CANCELLED


def held_in_preparation(house: House, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Hold a task before the engine knows of it: the first event says that it is there, the second lets it go on."""
    preparing, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def prepare() -> None:
        loop.call_soon_threadsafe(preparing.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result(PATIENCE_S)

    monkeypatch.setattr(house.shelf, "prepare", prepare)
    return preparing, go_on


async def test_a_cancel_before_the_engine_knows_of_the_task_runs_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing, go_on = held_in_preparation(house, monkeypatch)
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await preparing.wait()
        assert await queue.remove(task_id) is Status.CANCELLING
        go_on.set()
        assert (await house.end(task_id)).status is Status.CANCELLED
        assert house.desk.ran == []


async def test_an_ended_task_can_not_be_removed(house: House) -> None:
    async with house.open():
        (task_id,) = await house.submit()
        await house.started(task_id)
        house.desk.finish()
        await house.end(task_id)
        with pytest.raises(WrongState, match=rf"Task {task_id} has already ended \(completed\)"):
            await house.queue.remove(task_id)


async def test_clearing_takes_out_all_that_wait_and_leaves_the_running_one(house: House) -> None:
    async with house.open() as queue:
        ids = await house.submit(4)
        await house.started(ids[0])
        assert await queue.clear() == 3
        assert house.waiting() == ids[:1]
        assert house.stored() == {ids[0]: "processing", **dict.fromkeys(ids[1:], "cancelled")}
        assert await queue.clear() == 0


# ---- pause


async def test_a_paused_queue_starts_nothing_and_its_running_task_goes_on(house: House) -> None:
    async with house.open() as queue:
        first, second = await house.submit(2)
        await house.started(first)
        await queue.pause(True)
        house.desk.finish()
        assert (await house.end(first)).status is Status.COMPLETED
        await asyncio.sleep(0.05)
        assert (house.desk.ran, await house.status(second)) == ([first], Status.QUEUED)
        await queue.pause(False)
        await house.started(second)


@pytest.mark.parametrize("die", [False, True])
async def test_a_pause_is_remembered_over_a_restart(house: House, die: bool) -> None:
    async with house.open(paused=True, die=die):
        pass
    async with house.open() as queue:
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
    house: House, moved: int, position: int, order: list[int], told: int
) -> None:
    async with house.open(paused=True, die=True) as queue:
        await house.submit(4)
        assert (await queue.move(moved, position), house.waiting()) == (told, order)
        assert queue.position(await queue.get(moved)) == told
    async with house.open():
        assert house.waiting() == order


@pytest.mark.parametrize("position", [1, 2])
async def test_no_task_gets_before_the_running_one(house: House, position: int) -> None:
    async with house.open() as queue:
        first, second, third = await house.submit(3)
        await house.started(first)
        assert await queue.move(third, position) == 2
        assert house.waiting() == [first, third, second]


async def test_only_a_waiting_task_can_be_moved(house: House) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        with pytest.raises(WrongState, match=f"Task {task_id} is processing; only a waiting task can be moved"):
            await queue.move(task_id, 1)


async def test_what_is_submitted_after_a_move_comes_last(house: House) -> None:
    async with house.open(paused=True, die=True) as queue:
        first, second = await house.submit(2)
        await queue.move(second, 1)
        (third,) = await house.submit()
    async with house.open():
        assert house.waiting() == [second, first, third]


# ---- retry, history, wait


async def test_a_retry_is_a_new_task_with_everything_that_the_old_one_had(house: House, tmp_path: Path) -> None:
    async with house.open() as queue:
        old = job("a cat", seed=42, inputs={"image_start": (tmp_path / "picture",)})
        task_id = (await queue.submit(old, ["a warning"])).answer["task_id"]
        await house.started(task_id)
        house.desk.finish(EngineError("It failed.", "failed"))
        await house.end(task_id)
        again = await queue.get((await queue.retry(task_id)).answer["task_id"])
        assert again.id > task_id
        assert (again.job, again.warnings) == (old, ("a warning",))
        assert await house.status(task_id) is Status.FAILED


async def test_a_task_that_has_not_ended_can_not_be_retried(house: House) -> None:
    async with house.open(paused=True) as queue:
        (task_id,) = await house.submit()
        with pytest.raises(WrongState, match="is queued; only an ended task can be retried"):
            await queue.retry(task_id)


async def test_history_tells_of_running_waiting_and_ended_tasks(house: House) -> None:
    async with house.open() as queue:
        first, second, third = await house.submit(3)
        await house.started(first)
        house.desk.finish()
        await house.started(second)
        tasks, total = await queue.history(None, 10, 0)
        assert [(task.id, task.status) for task in tasks] == [
            (third, Status.QUEUED),
            (second, Status.PROCESSING),
            (first, Status.COMPLETED),
        ]
        assert total == 3


async def test_records_beyond_the_limit_are_forgotten(house: House) -> None:
    async with house.open(history_count=2):
        ids = await house.submit(4)
        for task_id in ids:
            await house.started(task_id)
            house.desk.finish()
        await until(lambda: list(house.stored()) == ids[2:])


async def test_waiting_for_a_task_ends_with_the_task_or_with_the_time(house: House) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        assert (await queue.wait(task_id, 0.02)).status in (Status.QUEUED, Status.PROCESSING)
        await house.started(task_id)
        waiting = [asyncio.create_task(queue.wait(task_id, PATIENCE_S)) for _ in range(3)]
        house.desk.finish()
        assert [task.status for task in await asyncio.gather(*waiting)] == [Status.COMPLETED] * 3


async def test_waiting_for_a_task_ends_with_its_removal(house: House) -> None:
    async with house.open(paused=True) as queue:
        (task_id,) = await house.submit()
        waiting = asyncio.create_task(queue.wait(task_id, PATIENCE_S))
        await asyncio.sleep(0.01)
        await queue.remove(task_id)
        assert (await waiting).status is Status.CANCELLED


# ---- keys and limits


async def test_a_key_brings_the_first_answer_again_also_after_a_restart(house: House) -> None:
    async with house.open(paused=True, die=True) as queue:
        first = await queue.submit(job(), key="key", request="digest")
        again = await queue.submit(job(), key="key", request="digest")
        assert (again.answer, again.replayed, first.replayed) == (first.answer, True, False)
    async with house.open() as queue:
        assert (await queue.submit(job(), key="key", request="digest")).answer == first.answer
        assert house.waiting() == [first.answer["task_id"]]


async def test_a_key_of_another_request_is_refused(house: House) -> None:
    async with house.open(paused=True) as queue:
        await queue.submit(job(), key="key", request="digest")
        with pytest.raises(KeyReused):
            await queue.submit(job(), key="key", request="another")
        assert len(house.waiting()) == 1


async def test_the_same_key_twice_at_once_makes_one_task(house: House) -> None:
    async with house.open(paused=True) as queue:
        both = await asyncio.gather(*(queue.submit(job(), key="key", request="digest") for _ in range(2)))
        assert both[0].answer == both[1].answer
        assert sorted(receipt.replayed for receipt in both) == [False, True]


async def test_a_full_queue_takes_nothing_more_however_many_ask_at_once(house: House) -> None:
    async with house.open(paused=True, max_queue=3) as queue:
        done = await asyncio.gather(*(queue.submit(job()) for _ in range(10)), return_exceptions=True)
        assert ["queue is full" in str(receipt) for receipt in done] == [False] * 3 + [True] * 7
        assert len(house.waiting()) == 3


async def test_positions_in_answers_count_up_however_many_ask_at_once(house: House) -> None:
    async with house.open(paused=True) as queue:
        done = await asyncio.gather(*(queue.submit(job()) for _ in range(5)))
        assert [receipt.answer["position"] for receipt in done] == [1, 2, 3, 4, 5]
        assert [receipt.answer["task_id"] for receipt in done] == house.waiting()


async def test_a_closed_queue_takes_nothing_and_starts_nothing(house: House) -> None:
    async with house.open(paused=True) as queue:
        await house.submit()
        queue.runner.close()
        await queue.pause(False)
        with pytest.raises(Unavailable, match="shutting down"):
            await queue.submit(job())
        await asyncio.sleep(0.02)
        assert house.desk.ran == []


@pytest.mark.parametrize("code", ["no_device", "engine_unavailable"])
async def test_an_engine_that_can_not_start_keeps_work_away_until_it_works(
    house: House, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        house.desk.finish(EngineError("There is no GPU.", code))
        await house.end(task_id)
        with pytest.raises(Unavailable, match="There is no GPU"):
            await queue.submit(job())
        monkeypatch.setattr(lanes, "ENGINE_FAULT_S", 0.0)
        (task_id,) = await house.submit()
        await house.started(task_id)
        house.desk.finish()
        await house.end(task_id)
        assert queue.faults == {}


# ---- warm and cold


async def test_a_model_is_made_warm_when_the_engine_is_free(house: House) -> None:
    async with house.open() as queue:
        model = CATALOG.get("wan_demo")
        assert not queue.load(model)
        await until(lambda: house.desk.warm == model.id)
        assert queue.load(model)


async def test_memory_is_given_back_when_nothing_runs(house: House) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        with pytest.raises(WrongState, match="engine works"):
            queue.unload()
        house.desk.finish()
        await house.end(task_id)
        await until(lambda: not queue.at_work)
        assert queue.unload()


async def test_an_idle_queue_gives_its_memory_back(house: House) -> None:
    async with house.open(idle_unload_s=0.02):
        await until(lambda: house.desk.unloads > 0)
        (task_id,) = await house.submit()
        await house.started(task_id)


# ---- estimates


async def test_nothing_is_estimated_without_history(house: House) -> None:
    async with house.open() as queue:
        receipts = [await queue.submit(job()) for _ in range(2)]
        assert [receipt.answer["estimated_wait"] for receipt in receipts] == [0.0, None]
        assert queue.eta_s(queue.listing()[1]) is None


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 24.0),
        ({"steps": 40}, 44.0),
        ({"frames": 18}, 48.0),
        ({"width": 128}, 48.0),
        ({"repeat_generation": 2}, 48.0),
        ({"batch_size": 3}, 72.0),
    ],
)
async def test_an_estimate_follows_pixels_frames_steps_and_files(
    house: House, changes: dict[str, int], seconds: float
) -> None:
    async with house.open() as queue:
        await house.learn()
        assert queue.estimate_s(job(**changes)) == pytest.approx(seconds)


async def test_a_cold_model_takes_its_loading_time_as_well(house: House) -> None:
    async with house.open() as queue:
        await house.learn()
        queue.unload()
        assert queue.estimate_s(job()) == pytest.approx(34.0)


async def test_a_model_without_history_has_no_estimate(house: House) -> None:
    async with house.open() as queue:
        await house.learn()
        assert queue.estimate_s(job(model="wan_t2v_14B")) is None


async def test_estimates_outlive_the_daemon(house: House) -> None:
    async with house.open(die=True):
        await house.learn()
    async with house.open() as queue:
        assert queue.estimate_s(job()) == pytest.approx(34.0)


async def test_the_estimated_wait_is_the_work_ahead(house: House) -> None:
    async with house.open() as queue:
        await house.learn()
        await queue.pause(True)
        receipts = [await queue.submit(job()) for _ in range(3)]
        assert [receipt.answer["estimated_wait"] for receipt in receipts] == pytest.approx([0.0, 24.0, 48.0])


async def test_a_submission_costs_the_same_however_many_tasks_wait(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    estimate_s = facts.Facts.estimate_s
    monkeypatch.setattr(task_queue, "ADDED_UP_S", 60.0)
    async with house.open(paused=True) as queue:
        await house.submit(50)
        monkeypatch.setattr(facts.Facts, "estimate_s", lambda *given: counted.append("a look") or estimate_s(*given))
        await house.submit(50)
        assert len(counted) == 50
        await queue.clear()
        assert queue.estimated_wait_s() == 0.0


async def test_the_eta_of_a_waiting_task_counts_no_time_in_the_queue(house: House) -> None:
    async with house.open() as queue:
        await house.learn()
        await queue.pause(True)
        await house.submit(5)
        assert [queue.eta_s(task) for task in queue.listing()] == pytest.approx([24.0] * 5)


async def test_a_slow_model_may_take_twenty_of_its_own_steps(house: House) -> None:
    async with house.open(step_timeout_s=5.0):
        await house.learn()
        (task_id,) = await house.submit(frames=81)
        await house.started(task_id)
        assert house.desk.patience == pytest.approx([5.0, 20 * 9.0])  # a second a step, for a ninth of the frames


async def test_progress_only_grows_and_is_100_with_the_end(house: House) -> None:
    async with house.open() as queue:
        (task_id,) = await house.submit(repeat_generation=2)
        await house.started(task_id)
        seen = []
        way = [(Phase.LOADING, 0, 0), (Phase.ENCODING, 0, 0), (Phase.DENOISING, 0, 10), (Phase.DECODING, 0, 20)]
        way += [(Phase.ENCODING, 1, 0), (Phase.DENOISING, 1, 20), (Phase.SAVING, 1, 20), (Phase.DENOISING, 0, 3)]
        for phase, run, step in way:
            house.desk.shown = Progress(phase, run, 2, step, 20)
            await queue.advance(lambda task: advanced(task, house.desk.shown))
            seen.append(queue.progress_percent(await queue.get(task_id)))
        assert seen == sorted(seen)
        assert seen[-1] < 100
        house.desk.finish()
        assert queue.progress_percent(await house.end(task_id)) == 100


# ---- restarts


async def test_waiting_tasks_wait_again_in_their_order(house: House) -> None:
    async with house.open(paused=True) as queue:
        first, second, third = await house.submit(3)
        await queue.move(third, 1)
    async with house.open():
        assert house.waiting() == [third, first, second]


async def test_the_task_that_ran_comes_first_again_as_another_attempt(house: House) -> None:
    async with house.open(die=True):
        first, second = await house.submit(2)
        await house.started(first)
    async with house.open(die=True):
        await house.started(first)
        assert (house.waiting(), (await house.queue.get(first)).attempts) == ([first, second], 2)
        assert ("attempt", first) in house.shelf.told


async def test_a_task_that_ran_comes_before_those_that_were_moved_to_the_front(house: House) -> None:
    async with house.open(die=True) as queue:
        first, _, third = await house.submit(3)
        await house.started(first)
        await queue.move(third, 1)
    async with house.open():
        assert house.waiting()[:2] == [first, third]


async def test_after_max_attempts_a_task_fails_and_says_so(house: House) -> None:
    (task_id, other) = (1, 2)
    for _ in range(2):
        async with house.open(die=True, max_attempts=2):
            await house.submit(2) if not house.stored() else None
            await house.started(task_id)
    async with house.open(max_attempts=2) as queue:
        task = await queue.get(task_id)
        sentence = "wangpd ended 2 times while this task ran; max_attempts is 2."
        assert (task.status, task.error) == (Status.FAILED, {"code": "too_many_attempts", "message": sentence})
        await house.started(other)


async def test_a_shutdown_puts_the_task_back_and_costs_no_attempt(house: House) -> None:
    for _ in range(4):
        async with house.open(max_attempts=2):
            await house.submit(2) if not house.stored() else None
            await house.started(1)
        assert house.stored() == {1: "queued", 2: "queued"}
    async with house.open():
        assert house.waiting() == [1, 2]
        await house.started(1)
        assert (await house.queue.get(1)).attempts == 1


async def test_a_shutdown_before_the_engine_knows_of_the_task_puts_it_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    preparing, go_on = held_in_preparation(house, monkeypatch)
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await preparing.wait()
        queue.runner.interrupt()
        go_on.set()
    assert (house.stored()[task_id], house.desk.ran) == ("queued", [])
    record = json.loads(house.stored("record")[task_id])
    assert (record["attempts"], record["started_at"]) == (0, None)


async def test_a_task_that_is_put_back_is_listed_once(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async with house.open() as queue:
        ids = await house.submit(2)
        await house.started(ids[0])
        listed = []
        save = house.journal.save

        async def look(*tasks: Any, **more: Any) -> None:
            listed.append(house.waiting())
            await save(*tasks, **more)

        monkeypatch.setattr(house.journal, "save", look)
        queue.runner.interrupt()
        await until(lambda: house.stored()[ids[0]] == "queued")
        assert listed == [ids]


async def test_a_cancel_during_a_shutdown_is_kept(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes while the files of the attempt are being removed."""
    async with house.open() as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        loop = asyncio.get_running_loop()

        def remove_attempt(number: int) -> int:
            status = asyncio.run_coroutine_threadsafe(queue.remove(number), loop).result(PATIENCE_S)
            assert status is Status.CANCELLING
            return 0

        monkeypatch.setattr(house.shelf, "remove_attempt", remove_attempt)
        queue.runner.interrupt()
    assert house.stored()[task_id] == "cancelled"


async def test_a_task_that_was_being_cancelled_is_cancelled_after_a_crash(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open(die=True) as queue:
        (task_id,) = await house.submit()
        await house.started(task_id)
        monkeypatch.setattr(house.desk, "cancel", lambda _: None)
        await queue.remove(task_id)
    async with house.open():
        assert await house.status(task_id) is Status.CANCELLED
        assert ("attempt", task_id) in house.shelf.told


async def test_on_restart_fail_fails_the_interrupted_task_alone(house: House) -> None:
    async with house.open(die=True):
        first, second = await house.submit(2)
        await house.started(first)
    async with house.open(on_restart="fail") as queue:
        task = await queue.get(first)
        assert (task.status, task.error["code"]) == (Status.FAILED, "restarted")
        assert 'on_restart is "fail"' in task.error["message"]
        await house.started(second)


async def test_on_restart_pause_puts_it_back_and_starts_nothing_until_somebody_resumes(house: House) -> None:
    async with house.open(die=True):
        first, second = await house.submit(2)
        await house.started(first)
    for _ in range(2):  # the second time nothing was interrupted, and the queue is paused all the same
        async with house.open(on_restart="pause", die=True) as queue:
            await asyncio.sleep(0.02)
            assert (queue.paused, house.waiting(), house.desk.ran) == (True, [first, second], [])
    async with house.open(on_restart="pause") as queue:
        await queue.pause(False)
        await house.started(first)


async def test_on_restart_pause_with_nothing_interrupted_goes_on(house: House) -> None:
    async with house.open(paused=True):
        (task_id,) = await house.submit()
        await house.queue.pause(False)
        house.queue.runner.close()
    async with house.open(on_restart="pause") as queue:
        assert not queue.paused
        await house.started(task_id)


# ---- a disk that fails


async def test_a_submission_that_can_not_be_written_down_is_refused(house: House, disk: BrokenDisk) -> None:
    async with house.open(paused=True) as queue:
        disk.broken = True
        with pytest.raises(JournalFault):
            await queue.submit(job())
        assert house.waiting() == []
        disk.broken = False
        assert (await queue.submit(job())).answer["position"] == 1


async def test_a_removal_that_can_not_be_written_down_leaves_the_queue_as_it_was(
    house: House, disk: BrokenDisk
) -> None:
    async with house.open(paused=True) as queue:
        ids = await house.submit(4)
        disk.broken = True
        for ask in (queue.remove(ids[1]), queue.clear()):
            with pytest.raises(JournalFault):
                await ask
            assert house.waiting() == ids
        assert {task.status for task in queue.listing()} == {Status.QUEUED}
        disk.broken = False


async def test_a_task_that_starts_during_a_failing_removal_is_not_queued_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house.open(paused=True) as queue:
        first, second, third = await house.submit(3)
        begun = asyncio.Event()
        save = house.journal.save

        async def slow_fault(*tasks: Any, **more: Any) -> None:
            if [task.id for task in tasks] != [second]:
                await save(*tasks, **more)
                return
            await begun.wait()
            raise JournalFault("the disk is gone")

        monkeypatch.setattr(house.journal, "save", slow_fault)
        removing = asyncio.create_task(queue.remove(second))
        await asyncio.sleep(0)
        resuming = asyncio.create_task(queue.pause(False))
        begun.set()
        with pytest.raises(JournalFault):
            await removing
        await resuming
        await house.started(first)
        assert house.waiting() == [first, second, third]
        monkeypatch.undo()


async def test_a_move_that_can_not_be_written_down_moves_nothing(house: House, disk: BrokenDisk) -> None:
    async with house.open(paused=True) as queue:
        ids = await house.submit(4)
        disk.broken = True
        with pytest.raises(JournalFault):
            await queue.move(ids[3], 1)
        assert house.waiting() == ids
        disk.broken = False


async def test_a_pause_that_can_not_be_written_down_pauses_nothing(house: House, disk: BrokenDisk) -> None:
    async with house.open() as queue:
        disk.broken = True
        with pytest.raises(JournalFault):
            await queue.pause(True)
        assert not queue.paused
        disk.broken = False


async def test_an_end_that_can_not_be_written_down_is_written_when_it_can(house: House, disk: BrokenDisk) -> None:
    async with house.open() as queue:
        first, second = await house.submit(2)
        await house.started(first)
        disk.broken = True
        house.desk.finish()
        await until(lambda: "journal" in queue.faults)
        assert (house.desk.ran, house.stored()[first]) == ([first], "processing")
        disk.broken = False
        assert (await house.end(first)).status is Status.COMPLETED
        await house.started(second)
        assert queue.faults == {}
        assert house.stored()[first] == "completed"


async def test_a_start_that_can_not_be_written_down_waits_for_the_disk(house: House, disk: BrokenDisk) -> None:
    async with house.open(paused=True) as queue:
        (task_id,) = await house.submit()
        await queue.pause(False)
        disk.broken = True
        await until(lambda: "journal" in queue.faults)
        assert house.desk.ran == []
        disk.broken = False
        await house.started(task_id)
