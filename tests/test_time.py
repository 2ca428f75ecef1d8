"""Time: clocks that jump, processes that were stopped for a while, and what is told of how long a task takes."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from engine import awake
from engine.job import Phase
from engine.queue import progress
from engine.queue.facts import Pace
from engine.queue.progress import TaskClock
from engine.workers.lanes import Progress
from tests import stand_ins
from tests.daemon import Daemon
from tests.processes import workers
from tests.stub_daemon import CLOCK
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.test_restart import begun
from tests.test_service import listening
from tests.wire import answered, connected, head

PATIENCE_S = 4.0
FROZEN_S = 6.0  # longer than any patience here
YEAR_S = 365 * 24 * 3600.0

Start = Callable[..., StubDaemon]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts daemons with a worker that runs this function; killed at the end."""
    started: list[StubDaemon] = []

    def make(function: Any, **config: Any) -> StubDaemon:
        started.append(StubDaemon(tmp_path / str(len(started)), function, **config))
        started[-1].environment[CLOCK] = str(tmp_path / "clock")
        (tmp_path / "clock").write_text("0")
        started[-1].start()
        return started[-1]

    yield make
    for daemon in started:
        for pid in workers(daemon) if daemon.process.poll() is None else ():
            os.kill(pid, signal.SIGCONT)
        daemon.stop(signal.SIGKILL)


def freeze(daemon: Daemon, worker: int) -> None:
    """Stop both for longer than any patience; the worker first, and it wakes last, as it happens with a container."""
    os.kill(worker, signal.SIGSTOP)
    time.sleep(PATIENCE_S / 2)  # a part of its patience is spent
    daemon.process.send_signal(signal.SIGSTOP)
    time.sleep(FROZEN_S)
    daemon.process.send_signal(signal.SIGCONT)
    time.sleep(1.2)  # the daemon looks at the board at least once
    os.kill(worker, signal.SIGCONT)


# ---- processes that were stopped


def test_a_frozen_daemon_does_not_take_its_sleep_for_a_hang_of_the_worker(start: Start) -> None:
    daemon = start(stand_ins.take_a_moment, step_timeout_s=PATIENCE_S)
    task_id = begun(daemon, "denoising")
    freeze(daemon, *workers(daemon))
    assert daemon.finish(task_id)["status"] == "completed"


def test_a_frozen_daemon_does_not_give_files_up_that_are_being_written(start: Start) -> None:
    daemon = start(stand_ins.save_late, step_timeout_s=PATIENCE_S)
    task_id = begun(daemon, "saving")
    freeze(daemon, *workers(daemon))
    assert daemon.finish(task_id)["status"] == "completed"


def test_a_frozen_daemon_does_not_kill_a_worker_that_was_told_to_cancel(start: Start) -> None:
    daemon = start(stand_ins.obey, cancel_grace_s=PATIENCE_S)
    task_id = begun(daemon, "denoising")
    (worker,) = workers(daemon)
    os.kill(worker, signal.SIGSTOP)
    daemon.delete(f"/queue/{task_id}")
    freeze(daemon, worker)
    assert daemon.finish(task_id)["status"] == "cancelled"
    assert workers(daemon) == {worker}


def test_a_frozen_daemon_takes_the_rest_of_a_body(start: Start) -> None:
    daemon = start(make_clips, body_timeout_s=PATIENCE_S)
    body = b'{"prompt": "a red circle"}'
    with connected(daemon.url) as channel:
        fields = {"Content_Type": "application/json", "Content_Length": len(body)}
        channel.sendall(head("/api/v1/generate", "POST", **fields) + body[:5])
        time.sleep(PATIENCE_S / 2)
        daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(FROZEN_S)
        daemon.process.send_signal(signal.SIGCONT)
        time.sleep(0.5)
        channel.sendall(body[5:])
        answer = answered(channel)
    assert answer
    assert answer.status == 200


def test_a_worker_that_alone_is_stopped_for_longer_than_its_patience_hangs(start: Start) -> None:
    daemon = start(stand_ins.obey, step_timeout_s=1.0)
    task_id = begun(daemon, "denoising")
    (worker,) = workers(daemon)
    os.kill(worker, signal.SIGSTOP)
    assert daemon.finish(task_id)["error"]["code"] == "hung"


def test_the_watchdog_is_fed_at_once_after_a_freeze(tmp_path: Path) -> None:
    with listening(str(tmp_path / "notify")) as systemd:
        daemon = StubDaemon(tmp_path / "own", make_clips)
        daemon.environment |= systemd.environment(watchdog_s=4.0)
        with daemon:
            systemd.hear_until("READY=1")
            daemon.process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            list(systemd.heard())
            daemon.process.send_signal(signal.SIGCONT)
            systemd._channel.setblocking(True)
            assert systemd.hear()[0] == "WATCHDOG=1"


async def test_a_wait_that_was_slept_through_begins_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds + (100.0 if now[0] == 2.0 else 0.0)  # it is stopped in the third second

    monkeypatch.setattr(awake.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(awake.asyncio, "sleep", sleep)
    await awake.sleep(5.0)
    assert now == [2.0 + 101.0 + 5.0]


async def test_a_block_ends_after_its_time() -> None:
    with pytest.raises(TimeoutError):
        async with awake.timeout(0.01):
            await asyncio.Event().wait()
    async with awake.timeout(60.0):
        await asyncio.sleep(0)


# ---- clocks that jump


def seconds(state: dict[str, Any], name: str) -> float:
    return datetime.fromisoformat(state[name]).timestamp()


@pytest.mark.parametrize("jump_s", [2 * YEAR_S, -2 * YEAR_S, -3600.0])
def test_a_clock_that_jumps_makes_no_time_left_or_wait_absurd(start: Start, tmp_path: Path, jump_s: float) -> None:
    daemon = start(stand_ins.step_slowly)
    for _ in range(2):
        daemon.run(num_inference_steps=5)
    first, second = (daemon.submit(num_inference_steps=40)["task_id"] for _ in range(2))
    daemon.until(first, lambda state: state["current_step"] >= 5)
    (tmp_path / "clock").write_text(str(jump_s))
    while (state := daemon.status(first))["status"] == "processing":
        dry = daemon.post("/generate?dry_run=1", {"prompt": "a"}).json()["data"]
        for told in (state["eta_seconds"], daemon.status(second)["eta_seconds"], dry["estimated_wait"]):
            assert told is None or 0 <= told < 600
    for task_id in (first, second):
        state = daemon.finish(task_id)
        assert seconds(state, "created_at") <= seconds(state, "started_at") <= seconds(state, "finished_at")


def test_a_task_that_waits_while_the_clock_is_set_back_ends_after_it_was_created(start: Start, tmp_path: Path) -> None:
    daemon = start(make_clips)
    daemon.post("/queue/pause")
    removed, task_id = (daemon.submit()["task_id"] for _ in range(2))
    (tmp_path / "clock").write_text(str(-YEAR_S))
    daemon.delete(f"/queue/{removed}")
    daemon.post("/queue/resume")
    state = daemon.finish(task_id)
    assert seconds(state, "created_at") <= seconds(state, "started_at") <= seconds(state, "finished_at")
    assert seconds(daemon.status(removed), "created_at") <= seconds(daemon.status(removed), "finished_at")


# ---- how long a task takes


def test_the_first_tasks_of_a_model_are_told_rightly_or_not_at_all(start: Start) -> None:
    """Their steps take a tenth of a second, which is nearly all of them."""
    daemon, told_s = start(stand_ins.step_slowly), []
    for fields in ({"num_inference_steps": 80}, {"num_inference_steps": 30, "video_length": 5}):
        task_id, looks = daemon.submit(**fields)["task_id"], []
        while (state := daemon.status(task_id))["status"] in ("queued", "processing"):
            looks.append((time.monotonic(), state["eta_seconds"]))
            time.sleep(0.1)
        ended = time.monotonic()
        told_s += [(eta_s, ended - looked) for looked, eta_s in looks if eta_s is not None]
    assert told_s
    for eta_s, took_s in told_s:
        assert took_s / 2 - 1.5 <= eta_s <= 2 * took_s + 1.5


class Clocked:
    """A TaskClock that is shown one look after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, warm: bool = True) -> None:
        self.now = 0.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)
        self.clock = TaskClock(warm)

    def look(self, at: float, phase: Phase, step: int = 0, run: int = 0, runs: int = 1) -> None:
        self.now = at
        self.clock.look(Progress(phase, run, runs, step, 20))


PACE = Pace(extent=1.0, load_s=30.0, encode_s=1.0, step_s=1.0, rest_s=4.0, cold=False)
WORK_S = PACE.total_s(20, 1, warm=True)


def test_while_a_model_loads_the_rest_of_it_is_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, warm=False)
    assert clocked.clock.left_s(PACE, WORK_S) == 55.0
    clocked.look(10.0, Phase.LOADING)
    assert clocked.clock.left_s(PACE, WORK_S) == 45.0
    clocked.now = 500.0
    assert clocked.clock.left_s(PACE, WORK_S) == 25.0
    assert clocked.clock.left_s(None, None) is None


def test_the_time_left_follows_the_own_steps_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch)
    clocked.look(0.0, Phase.ENCODING)
    for step in range(6):
        clocked.look(0.5 + 0.9 * step, Phase.DENOISING, step)
    assert clocked.clock.left_s(PACE, WORK_S) == pytest.approx(15 * 0.9 + 4.0)
    clocked.look(20.0, Phase.DECODING, 20)
    clocked.now = 23.0
    assert clocked.clock.left_s(PACE, WORK_S) == pytest.approx(1.0)
    clocked.now = 99.0
    assert clocked.clock.left_s(PACE, WORK_S) == 0.0


def test_a_task_of_several_runs_has_those_ahead_that_it_has_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch)
    clocked.look(0.0, Phase.DENOISING, 20, run=1, runs=4)
    clocked.look(0.5, Phase.ENCODING, 0, run=2, runs=4)
    assert clocked.clock.left_s(PACE, WORK_S) == pytest.approx(2 * (20 + 4.0))


def test_without_history_only_the_first_half_of_the_steps_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocked, told = Clocked(monkeypatch), []
    for step in range(21):
        clocked.look(0.9 * step, Phase.DENOISING, step)
        told.append(clocked.clock.left_s(None, None))
    assert told[:4] == [None] * 4
    assert told[4:11] == [pytest.approx(1.1 * 0.9 * (20 - step)) for step in range(4, 11)]
    assert told[11:] == [None] * 10


def test_a_step_in_which_the_daemon_slept_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch)
    for step in range(6):
        clocked.look(0.9 * step, Phase.DENOISING, step)
    clocked.look(5000.0, Phase.DENOISING, 6)
    for step in range(7, 12):
        clocked.look(5000.0 + 0.9 * (step - 6), Phase.DENOISING, step)
        assert clocked.clock.left_s(PACE, WORK_S) == pytest.approx(0.9 * (20 - step) + 4.0)
