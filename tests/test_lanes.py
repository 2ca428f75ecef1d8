"""Several engines behind one queue: the order, the faults of one of them, and what is told of all."""

import asyncio
import fcntl
import json
import math
import os
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import weights
from engine.catalog.fetch import FetchError, fetch
from engine.gpu import process, worker
from engine.job import Cancelled, EngineError
from engine.planning.machine import Machine
from engine.queue.queue import Unavailable
from engine.queue.tasks import Status, WrongState
from engine.workers import lanes
from engine.workers.local import Engine
from tests import stand_ins
from tests.daemon import Daemon
from tests.harness import CATALOG, FakeEngine, Harness, until
from tests.processes import alive, eventually, workers
from tests.stand_ins import job
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from wangpd import Supervisor

TWO = ["cpu", "cpu"]
DEMO = CATALOG.get("wan_demo")
NO_GPU = EngineError("There is no such card.", "no_device")
LONG = {"num_inference_steps": 100, "repeat_generation": 8}  # four seconds


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path, lanes=2)


def ran(harness: Harness) -> list[list[int]]:
    """What each engine was given, in order."""
    return [engine.ran for engine in harness.engines]


async def begun(harness: Harness, count: int = 3) -> list[int]:
    """The ids of so many tasks, of which the first two run, each in its lane."""
    ids = await harness.submit(count)
    await until(lambda: ran(harness) == [[ids[0]], [ids[1]]])
    return ids


def at_work(engine: FakeEngine, task_id: int) -> bool:
    return bool(engine.ran) and engine.ran[-1] == task_id


# ---- order


async def test_as_many_tasks_run_as_there_are_engines_and_the_next_takes_the_lane_that_is_free(
    harness: Harness,
) -> None:
    async with harness.open() as queue:
        first, second, third, fourth = await begun(harness, 4)
        assert [task.id for task in queue.at_work] == [first, second]
        harness.engines[1].finish()
        await harness.end(second)
        await until(lambda: at_work(harness.engines[1], third))
        assert ([task.id for task in queue.at_work], ran(harness)) == ([first, third], [[first], [second, third]])
        harness.engines[0].finish()
        await until(lambda: at_work(harness.engines[0], fourth))


async def test_of_free_engines_the_one_that_holds_the_model_is_taken(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        harness.engines[1].warm = "wan_demo"
        (task_id,) = await harness.submit()
        await queue.pause(False)
        await harness.started(task_id)
        assert ran(harness) == [[], [task_id]]


async def test_an_engine_that_holds_another_model_takes_the_next_task_all_the_same(harness: Harness) -> None:
    """The order is a promise; a warm model is only a wish."""
    async with harness.open() as queue:
        first, second = await begun(harness, 2)
        (other,) = await harness.submit(model="wan_t2v_1.3B")
        (same,) = await harness.submit()
        harness.engines[0].finish()
        await harness.end(first)
        await until(lambda: at_work(harness.engines[0], other))
        assert [task.id for task in queue.listing()] == [second, other, same]


async def test_those_that_run_are_at_position_1_and_the_others_count_on_from_them(harness: Harness) -> None:
    async with harness.open() as queue:
        await begun(harness, 4)
        assert [queue.position(task) for task in queue.listing()] == [1, 1, 3, 4]
        assert (await queue.submit(job())).answer["position"] == 5


async def test_systemd_is_told_of_all_that_run(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second, _ = await begun(harness)
        assert Supervisor(queue).status() == f"STATUS=tasks {first}, {second} run, 1 waiting"


async def test_no_task_gets_before_those_that_run(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second, third, fourth = await begun(harness, 4)
        assert await queue.move(fourth, 1) == 3
        assert harness.waiting() == [first, second, fourth, third]


async def test_a_paused_queue_lets_all_that_run_go_on(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second, third = await begun(harness)
        await queue.pause(True)
        for engine in harness.engines:
            engine.finish()
        assert {(await harness.end(task_id)).status for task_id in (first, second)} == {Status.COMPLETED}
        assert await harness.status(third) is Status.QUEUED


@pytest.mark.parametrize(
    ("count", "wait_s"), [(0, 0.0), (1, 0.0), (2, 24.0), (3, 24.0), (4, 48.0), (7, 72.0)]
)  # 24 s each
async def test_the_estimated_wait_is_until_the_first_engine_is_free(
    harness: Harness, count: int, wait_s: float
) -> None:
    async with harness.open() as queue:
        await harness.learn()
        await queue.pause(True)
        await harness.submit(count)
        assert queue.estimated_wait_s() == pytest.approx(wait_s)


async def test_a_task_without_history_says_nothing_of_the_other_engine(harness: Harness) -> None:
    async with harness.open(paused=True) as queue:
        await harness.submit()
        assert queue.estimated_wait_s() == 0.0
        await harness.submit()
        assert queue.estimated_wait_s() is None


# ---- cancel, stop, restart


async def test_to_cancel_one_leaves_the_other(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second, _ = await begun(harness)
        await queue.remove(first)
        assert (await harness.end(first)).status is Status.CANCELLED
        assert await harness.status(second) is Status.PROCESSING
        harness.engines[1].finish()
        assert (await harness.end(second)).status is Status.COMPLETED


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_a_shutdown_puts_all_back_in_the_order_of_their_start(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, order: tuple[int, int]
) -> None:
    async with harness.open() as queue:
        first, second, third = await begun(harness)
        for engine in harness.engines:
            monkeypatch.setattr(engine, "cancel", lambda _: None)
        queue.runner.interrupt()
        for place in order:
            harness.engines[place].finish(Cancelled())
            await until(lambda: len(queue.at_work) < 2)
    assert harness.stored() == dict.fromkeys((first, second, third), "queued")
    attempts = [json.loads(record)["attempts"] for record in harness.stored("record").values()]
    async with harness.open(paused=True):
        assert (harness.waiting(), attempts) == ([first, second, third], [0, 0, 0])


async def test_after_a_crash_those_that_ran_come_first_in_the_order_of_their_start(harness: Harness) -> None:
    async with harness.open(die=True) as queue:
        first, second, third, fourth = await begun(harness, 4)
        await queue.move(fourth, 1)
        harness.engines[1].finish()
        await harness.end(second)
        await until(lambda: at_work(harness.engines[1], fourth))
    async with harness.open():
        assert harness.waiting() == [first, fourth, third]
        await until(lambda: ran(harness) == [[first], [fourth]])
        assert [(await harness.queue.get(task_id)).attempts for task_id in (first, fourth)] == [2, 2]


# ---- an engine that can't work


async def test_an_engine_without_its_device_gives_its_task_to_another(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second, third = await begun(harness)
        harness.engines[0].finish(NO_GPU)
        await until(lambda: harness.waiting() == [second, first, third])
        harness.engines[1].finish()
        await until(lambda: at_work(harness.engines[1], first))
        assert (await queue.get(first)).attempts == 1
        assert (ran(harness)[0], queue.faults, queue.lanes.remarks()) == ([first], {}, ["cpu: There is no such card."])
        await queue.submit(job())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_tasks_that_are_given_back_keep_their_order(tmp_path: Path, order: tuple[int, int]) -> None:
    harness = Harness(tmp_path, lanes=3)
    async with harness.open() as queue:
        first, second, third, fourth = await harness.submit(4)
        await until(lambda: ran(harness) == [[first], [second], [third]])
        for count, place in enumerate(order, 1):
            harness.engines[place].finish(NO_GPU)
            await until(lambda count=count: len(queue.at_work) == 3 - count)
        assert harness.waiting() == [third, first, second, fourth]


async def test_where_no_engine_can_work_tasks_wait_and_the_queue_says_why(harness: Harness) -> None:
    async with harness.open() as queue:
        ids = await begun(harness)
        for engine in harness.engines:
            engine.broken = NO_GPU
            engine.finish(NO_GPU)
        await until(lambda: not queue.at_work)
        assert (harness.waiting(), queue.faults) == (ids, {"engine": "There is no such card."})
        with pytest.raises(Unavailable, match="no such card"):
            await queue.submit(job())
        assert [(await queue.get(task_id)).attempts for task_id in ids] == [0, 0, 0]


async def test_an_engine_is_checked_after_a_while_and_works_again(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open() as queue:
        for lane in queue.lanes:
            monkeypatch.setattr(lane, "check_s", 0.01)
        first, second, _ = await begun(harness)
        harness.engines[0].broken = NO_GPU
        harness.engines[0].finish(NO_GPU)
        await until(lambda: harness.engines[0].checks > 1)  # of its own accord: nothing else happens
        assert ran(harness) == [[first], [second]]
        harness.engines[0].broken = None
        await until(lambda: ran(harness) == [[first, first], [second]])
        assert (queue.lanes.remarks(), queue.lanes[0].check_s) == ([], lanes.CHECK_AGAIN_S)


async def test_to_cancel_the_task_of_an_engine_that_can_not_work_ends_it(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with harness.open() as queue:
        first, _, _ = await begun(harness)
        monkeypatch.setattr(harness.engines[0], "cancel", lambda _: None)
        await queue.remove(first)
        harness.engines[0].finish(NO_GPU)
        assert (await harness.end(first)).status.ended
        assert ran(harness)[0] == [first]


# ---- warm and cold


async def test_a_model_is_made_warm_in_one_lane(harness: Harness) -> None:
    async with harness.open() as queue:
        assert not queue.load(DEMO)
        await until(lambda: queue.lanes.loaded(DEMO.id))
        assert sorted(engine.warm for engine in harness.engines) == ["", DEMO.id]


async def test_a_warm_start_loads_the_model_in_every_lane(harness: Harness) -> None:
    async with harness.open() as queue:
        queue.warm_up(DEMO)
        await until(lambda: [engine.warm for engine in harness.engines] == [DEMO.id] * 2)


async def test_a_warm_start_leaves_the_engines_to_tasks_that_wait(harness: Harness) -> None:
    async with harness.open(paused=True, die=True) as queue:
        (task_id,) = await harness.submit(model="wan_t2v_1.3B")
        await queue.pause(False)
        queue.warm_up(DEMO)
        await harness.started(task_id)
        await asyncio.sleep(0.02)
        assert DEMO.id not in [engine.warm for engine in harness.engines]


async def test_the_model_that_was_last_in_use_outlives_the_daemon(harness: Harness) -> None:
    async with harness.open() as queue:
        assert queue.facts.last_model == ""
        await harness.learn()
    async with harness.open() as queue:
        assert queue.facts.last_model == DEMO.id


async def test_memory_is_given_back_only_when_no_engine_works(harness: Harness) -> None:
    async with harness.open() as queue:
        first, second = await begun(harness, 2)
        harness.engines[0].finish()
        await harness.end(first)
        with pytest.raises(WrongState, match="engine works"):
            queue.unload()
        harness.engines[1].finish()
        await harness.end(second)
        await until(lambda: not queue.at_work)
        assert queue.unload()
        assert [engine.unloads for engine in harness.engines] == [1, 1]


async def test_an_idle_engine_gives_its_memory_back_while_the_other_works(harness: Harness) -> None:
    async with harness.open(idle_unload_s=0.05):
        first, second = await begun(harness, 2)
        harness.engines[0].finish()
        await harness.end(first)
        await until(lambda: harness.engines[0].unloads > 0)
        assert (harness.engines[1].unloads, await harness.status(second)) == (0, Status.PROCESSING)


async def test_what_an_engine_measured_is_known_after_a_restart(harness: Harness) -> None:
    machine = Machine(0, 8 * 2**30, math.inf, 1e11)
    async with harness.open() as queue:
        assert queue.machines == []
        harness.engine.machine = machine
        await harness.learn()
    async with harness.open() as queue:
        assert queue.machines == [machine] * 2  # both are "cpu"


async def test_a_load_that_finds_no_device_is_a_fault_of_its_lane_until_a_check_succeeds(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_model: Any) -> None:
        raise NO_GPU

    async with harness.open() as queue:
        with monkeypatch.context() as patch:
            patch.setattr(harness.engines[0], "load", fail)
            queue.load(DEMO)
            await until(lambda: queue.lanes.remarks() == ["cpu: There is no such card."])
        queue.lanes[0].check_at = 0.0
        queue.runner.wake.set()
        await until(lambda: queue.lanes.remarks() == [])


def test_a_worker_waits_for_another_one_that_fetches_the_same_model(tmp_path: Path) -> None:
    with (tmp_path / f".{DEMO.id}.lock").open("a") as lock, ThreadPoolExecutor(1) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="by another process already"):
            fetch(DEMO, tmp_path)
        waiting = pool.submit(fetch, DEMO, tmp_path, wait=True)
        with pytest.raises(TimeoutError):
            waiting.result(0.2)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert waiting.result(20) == weights.locate(DEMO, tmp_path)


# ---- the cards that a worker sees


@pytest.mark.parametrize(
    ("number", "visible", "left"), [(0, None, "0"), (3, None, "3"), (1, "4,7", "7"), (2, "4,7", ""), (0, "", "")]
)
def test_a_worker_sees_its_own_card_alone(number: int, visible: str | None, left: str) -> None:
    assert process.only_card(number, visible) == left


async def test_the_process_of_a_card_is_started_with_that_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "generate", stand_ins.tell_cards)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa,GPU-bb")
    engine = Engine(stand_ins.config(tmp_path, device="cuda:1"))
    assert (await engine.run(1, job(), DEMO)).plan == "GPU-bb"
    engine.close()


# ---- real processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubDaemon]:
    """A daemon with two workers, which make small files."""
    with StubDaemon(tmp_path_factory.mktemp("pair"), make_clips, devices=TWO) as running:
        yield running


def running_pair(daemon: Daemon, **fields: Any) -> list[int]:
    """Two tasks that denoise at the same time."""
    ids = [daemon.submit(**LONG, **fields)["task_id"] for _ in range(2)]
    assert eventually(lambda: [daemon.status(task_id)["phase"] for task_id in ids] == ["denoising"] * 2)
    return ids


def queue_of(daemon: Daemon) -> dict[str, Any]:
    data: dict[str, Any] = daemon.get("/queue").json()["data"]
    return data


def test_two_tasks_run_at_the_same_time_and_the_third_waits(pair: StubDaemon) -> None:
    first, second = running_pair(pair)
    third = pair.submit(num_inference_steps=2)
    state = queue_of(pair)
    told = [(task["id"], task["status"], task["position"]) for task in state["tasks"]]
    assert told == [(first, "processing", 1), (second, "processing", 1), (third["task_id"], "queued", 3)]
    assert (state["current_task_id"], state["is_processing"], third["position"]) == (first, True, 3)
    assert len(workers(pair)) == 2
    assert {pair.finish(task_id)["status"] for task_id in (first, second, third["task_id"])} == {"completed"}


def test_the_death_of_one_worker_fails_its_task_alone(pair: StubDaemon) -> None:
    ids = running_pair(pair)
    os.kill(min(workers(pair)), signal.SIGKILL)
    ends = [pair.finish(task_id) for task_id in ids]
    assert sorted(state["status"] for state in ends) == ["completed", "failed"]
    assert [state["error"]["code"] for state in ends if state["error"]] == ["worker_died"]
    assert [pair.run(num_inference_steps=2)["status"] for _ in range(2)] == ["completed"] * 2


def test_a_cancel_over_http_ends_one_and_leaves_the_other(pair: StubDaemon) -> None:
    first, second = running_pair(pair)
    assert pair.delete(f"/queue/{second}").status_code == 200
    assert pair.finish(second)["status"] == "cancelled"
    assert pair.status(first)["status"] == "processing"
    pair.delete(f"/queue/{first}")
    assert pair.finish(first)["status"] == "cancelled"


def test_sigterm_puts_both_back_and_after_the_restart_both_finish(pair: StubDaemon) -> None:
    ids = running_pair(pair)
    waiting = pair.submit(num_inference_steps=2)["task_id"]
    pids = workers(pair)
    assert pair.stop() == 0
    assert not any(alive(pid) for pid in pids)
    with sqlite3.connect(pair.state / "journal.sqlite") as db:
        rows = db.execute(
            "SELECT id, status, record ->> '$.attempts' FROM tasks WHERE id >= ? ORDER BY rank", ids[:1]
        ).fetchall()
    db.close()
    assert rows == [(task_id, "queued", 0) for task_id in (*ids, waiting)]
    pair.start()
    ends = [pair.finish(task_id) for task_id in (*ids, waiting)]
    assert [(state["status"], state["attempts"]) for state in ends] == [("completed", 1)] * 3


def test_a_worker_whose_device_is_missing_takes_no_task_down(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "half", stand_ins.need_the_cpu, devices=["cuda:1", "cpu"]) as daemon:
        ends = [daemon.run() for _ in range(3)]
        assert [(state["status"], state["attempts"]) for state in ends] == [("completed", 1)] * 3
        ready = daemon.get("/health/ready")
        assert (ready.status_code, ready.json()["warnings"]) == (200, ["cuda:1: There is no such card."])
