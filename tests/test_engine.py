"""The engine with real processes: cancels, deaths and restarts, in every phase.

Above: `Engine` itself with stand-ins that hold a phase open. Below: the daemon and its real worker.
"""

import asyncio
import base64
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest

from engine.gpu import worker
from engine.job import Cancelled, EngineError, Phase
from engine.workers.local import Engine
from tests import proof, stand_ins, tiny
from tests.daemon import ENDED, ROOT, Daemon
from tests.processes import alive, children, command, eventually, maps, workers
from tests.stand_ins import DEMO, DONE, job

PHASES = ["loading", "encoding", "denoising", "decoding", "saving"]
every_phase = pytest.mark.parametrize("phase", PHASES)

# --------------------------------------------------------------------------------------------- Engine with stand-ins


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine that is patient with a cancelled worker."""
    running = Engine(stand_ins.config(tmp_path), cancel_grace_s=60)
    yield running
    running.close()


@pytest.fixture
async def impatient(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine that gives a cancelled worker half a second."""
    running = Engine(stand_ins.config(tmp_path), cancel_grace_s=0.5)
    yield running
    running.close()


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Puts a stand-in in the place of the worker's `generate`."""
    return lambda function: monkeypatch.setattr(worker, "generate", function)


def begun(engine: Engine, task_id: int, phase: str) -> "asyncio.Task[Any]":
    return asyncio.create_task(engine.run(task_id, job(phase), DEMO, math.inf))


def pid_of(engine: Engine) -> int:
    """Of the generation process that the engine has now."""
    assert engine._worker
    child = engine._worker._context.child
    assert child
    assert child.pid
    return child.pid


async def until(engine: Engine, task_id: int, phase: str) -> None:
    """Wait until the worker says that the task is in `phase`."""

    def there() -> bool:
        progress = engine.progress(task_id)
        return progress is not None and progress.phase == Phase[phase.upper()]

    assert await asyncio.to_thread(eventually, there, 60)


async def run(engine: Engine, task_id: int, phase: str = "denoising") -> Any:
    return await engine.run(task_id, job(phase), DEMO, math.inf)


@every_phase
async def test_a_cancel_ends_the_task_in_any_phase_and_the_process_stays(
    phase: str, engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.obey)
    task = begun(engine, 1, phase)
    await until(engine, 1, phase)
    pid = pid_of(engine)
    engine.cancel(1)
    with pytest.raises(Cancelled):
        await task
    becomes(stand_ins.be_quick)
    assert await run(engine, 2) == DONE
    assert pid_of(engine) == pid


@every_phase
async def test_a_worker_that_ignores_a_cancel_is_killed_and_the_next_task_runs(
    phase: str, impatient: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.ignore)
    task = begun(impatient, 1, phase)
    await until(impatient, 1, phase)
    pid = pid_of(impatient)
    impatient.cancel(1)
    with pytest.raises(Cancelled):
        await task
    assert await asyncio.to_thread(eventually, lambda: not alive(pid))
    becomes(stand_ins.be_quick)
    assert await run(impatient, 2) == DONE
    assert pid_of(impatient) != pid


async def test_a_cancel_before_the_process_has_started_ends_the_task(
    impatient: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.ignore)
    task = begun(impatient, 1, "loading")
    await asyncio.sleep(0)
    impatient.cancel(1)
    with pytest.raises(Cancelled):
        await task


async def test_a_cancel_of_an_ended_task_does_not_touch_the_next(
    impatient: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.take_a_moment)
    assert await run(impatient, 1) == DONE
    task = begun(impatient, 2, "denoising")
    await until(impatient, 2, "denoising")
    impatient.cancel(1)
    assert await task == DONE


async def test_the_grace_of_a_cancelled_task_does_not_end_the_next(
    impatient: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.obey)
    task = begun(impatient, 1, "denoising")
    await until(impatient, 1, "denoising")
    impatient.cancel(1)
    with pytest.raises(Cancelled):
        await task
    becomes(stand_ins.take_a_moment)  # longer than the grace
    assert await run(impatient, 2) == DONE


async def test_a_cancel_that_is_left_on_the_board_names_another_task(
    engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.take_a_moment)
    task = begun(engine, 2, "denoising")
    await until(engine, 2, "denoising")
    engine._board.cancel = 1
    assert await task == DONE


DEATHS = {"SIGKILL": None, "os._exit": stand_ins.exit_at_once, "a crash": stand_ins.crash}


@pytest.mark.parametrize("death", DEATHS)
@every_phase
async def test_a_death_fails_its_task_naming_phase_and_step_and_the_next_runs_in_another_process(
    phase: str, death: str, engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(DEATHS[death] or stand_ins.ignore)
    task = begun(engine, 1, phase)
    if death == "SIGKILL":
        await until(engine, 1, phase)
        os.kill(pid_of(engine), signal.SIGKILL)
    with pytest.raises(EngineError) as failed:
        await task
    where = "while denoising, at step 7 of 20." if phase == "denoising" else f"while {phase}."
    assert failed.value.message.startswith(f"The generation process died {where}")
    assert failed.value.code == "worker_died"
    becomes(stand_ins.be_quick)
    assert await run(engine, 2) == DONE


async def test_a_worker_that_died_while_it_was_idle_costs_no_task(
    engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.be_quick)
    assert await run(engine, 1) == DONE
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.to_thread(eventually, lambda: not alive(pid))
    assert await run(engine, 2) == DONE


async def test_a_worker_that_died_while_it_was_idle_does_not_cost_the_task_that_it_ran_last(
    engine: Engine, becomes: Callable[[Any], None]
) -> None:
    """That one may have been put back, and be the next."""
    becomes(stand_ins.take_a_moment)
    assert await run(engine, 1) == DONE
    pid = pid_of(engine)
    os.kill(pid, signal.SIGKILL)
    assert await asyncio.to_thread(eventually, lambda: not alive(pid))
    assert await run(engine, 1) == DONE


async def test_a_run_that_was_broken_off_leaves_no_file_in_the_result_of_the_next(
    engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.save_half)
    with pytest.raises(EngineError, match="No space left"):
        await run(engine, 1)
    becomes(stand_ins.save_all)
    assert [file.filename for file in (await run(engine, 1)).files] == ["whole.png"]


async def test_a_cancel_ends_the_process_that_writes_and_gets_no_more_work(
    impatient: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.never_save)
    task = begun(impatient, 1, "saving")
    await until(impatient, 1, "saving")
    pid = pid_of(impatient)
    becomes(stand_ins.lose_the_device)
    with pytest.raises(EngineError, match="The device failed"):
        await run(impatient, 2)
    impatient.cancel(1)
    with pytest.raises(Cancelled):
        await task
    assert await asyncio.to_thread(eventually, lambda: not alive(pid))


async def test_a_worker_without_progress_is_ended_by_its_patience(
    engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.ignore)
    with pytest.raises(EngineError, match=r"made no progress for .* while denoising, at step 7 of 20") as failed:
        await engine.run(1, job("denoising"), DEMO, 2.0)
    assert failed.value.code == "hung"


async def test_loading_may_take_longer_than_any_other_phase(engine: Engine, becomes: Callable[[Any], None]) -> None:
    becomes(stand_ins.ignore)
    with pytest.raises(EngineError, match=r"made no progress for [3-9] s while loading") as failed:
        await engine.run(1, job("loading"), DEMO, 0.5)
    assert failed.value.code == "hung"


async def test_files_that_are_never_written_end_the_process_too(engine: Engine, becomes: Callable[[Any], None]) -> None:
    becomes(stand_ins.never_save)
    with pytest.raises(EngineError, match=r"made no progress for .* while saving") as failed:
        await engine.run(1, job("saving"), DEMO, 2.0)
    assert failed.value.code == "hung"
    becomes(stand_ins.be_quick)
    assert await run(engine, 2) == DONE


async def test_closing_the_engine_ends_the_process(engine: Engine, becomes: Callable[[Any], None]) -> None:
    becomes(stand_ins.ignore)
    task = begun(engine, 1, "denoising")
    await until(engine, 1, "denoising")
    pid = pid_of(engine)
    engine.close()
    with pytest.raises((EngineError, Cancelled, asyncio.CancelledError)):
        await task
    assert await asyncio.to_thread(eventually, lambda: not alive(pid))


async def test_closing_an_engine_leaves_the_processes_of_the_others_alone(
    engine: Engine, impatient: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.be_quick)
    assert [await run(one, 1) for one in (engine, impatient)] == [DONE, DONE]
    pid = pid_of(engine)
    engine.close()
    assert not alive(pid)
    assert alive(pid_of(impatient))
    assert await run(impatient, 2) == DONE


async def test_an_engine_that_is_closed_while_its_process_is_spawned_leaves_none(
    engine: Engine, becomes: Callable[[Any], None]
) -> None:
    becomes(stand_ins.ignore)
    task = begun(engine, 1, "denoising")
    await asyncio.sleep(0)
    pid = pid_of(engine)
    engine.close()
    assert not alive(pid)
    with pytest.raises((EngineError, Cancelled)):
        await task


FAULTS = {  # what is raised in the worker → what the task's error says
    "tensor": "RuntimeError while denoising: ",
    "unpicklable": "Unpicklable while denoising: ",
    "exit": "SystemExit while denoising: 1",
    "interrupt": "KeyboardInterrupt while denoising: no message",
    "memory": "Out of memory while denoising. ",
    "disk": "No space left on device while denoising.",
    "import": "The generation process can't work: No module named 'ftfy'",
    "sentence": "Nothing works today.",
    "no words": "RuntimeError while denoising: no message",
    "many lines": "ValueError while denoising: first line",
}


@pytest.fixture(scope="module")
def faults() -> dict[str, Any]:
    """What became of each fault in a fresh interpreter, one after the other in the same worker."""
    code = "from tests.stand_ins import fail_in_a_fresh_process as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code, *FAULTS], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_any_fault_of_the_worker_becomes_one_sentence(fault: str, faults: dict[str, Any]) -> None:
    sentence = faults["sentences"][fault]
    assert sentence.startswith(FAULTS[fault])
    assert "\n" not in sentence
    assert "/secret" not in sentence


def test_no_fault_of_the_worker_brings_torch_into_the_daemon(faults: dict[str, Any]) -> None:
    assert faults["heavy"] == []


# ------------------------------------------------------------------------------------------- the daemon and its worker

LONG = {"num_inference_steps": 100, "video_length": 81}
HELD = {  # phase → a request that stays in it long enough to be found there
    "loading": {"model_type": "wan_t2v_1.3B", "resolution": "32x32", "video_length": 5, "num_inference_steps": 1},
    "encoding": {"model_type": "wan_flf2v_720p_14B", "resolution": "320x320", "video_length": 81},
    "denoising": LONG,
    "decoding": {"resolution": "256x256", "video_length": 33, "num_inference_steps": 1},
    "saving": {"video_length": 5, "num_inference_steps": 1},
}
QUICK = {"video_length": 5, "num_inference_steps": 1}
SLOW_FFMPEG = """#!/bin/sh
[ -e {flag} ] && sleep 600
exec {ffmpeg} "$@"
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with two more models, and an ffmpeg that hangs while there is a file `slow` in its folder."""
    daemon = Daemon(tmp_path_factory.mktemp("house"), cancel_grace_s=2.0)
    for model_id in ("wan_t2v_1.3B", "wan_flf2v_720p_14B"):
        tiny.build(proof.CATALOG.get(model_id), daemon.models)
    slow_ffmpeg(daemon)
    with daemon:
        yield daemon


def slow_ffmpeg(daemon: Daemon) -> None:
    script = daemon.folder / "ffmpeg"
    script.write_text(SLOW_FFMPEG.format(flag=daemon.folder / "slow", ffmpeg=imageio_ffmpeg.get_ffmpeg_exe()))
    script.chmod(0o755)
    daemon.environment = os.environ | {"IMAGEIO_FFMPEG_EXE": str(script), "OMP_NUM_THREADS": "1"}


def picture() -> str:
    return base64.b64encode(proof.png(proof.blocks(64, 0))).decode()


def held(daemon: Daemon, phase: str) -> int:
    """The id of a task that is in `phase` now."""
    if phase == "loading":
        daemon.run(**QUICK)  # of another model, so that there is something to load
    (daemon.folder / "slow").touch() if phase == "saving" else None
    pictures = {name: picture() for name in ("image_start", "image_end") if phase == "encoding"}
    task_id: int = daemon.submit(**HELD[phase], **pictures)["task_id"]
    state = daemon.until(task_id, lambda state: state["phase"] == phase or state["status"] in ENDED)
    assert state["phase"] == phase
    return task_id


def relieved(daemon: Daemon) -> None:
    (daemon.folder / "slow").unlink(missing_ok=True)


def left_by(daemon: Daemon, task_id: int) -> list[str]:
    return [path.name for path in daemon.outputs.iterdir() if f"_t{task_id:06d}-" in path.name]


@every_phase
def test_a_task_that_is_deleted_while_it_runs_ends_as_cancelled_and_leaves_nothing(house: Daemon, phase: str) -> None:
    task_id = held(house, phase)
    answer = house.delete(f"/queue/{task_id}")
    assert (answer.status_code, answer.json()["data"]["status"]) == (200, "cancelling")
    state = house.finish(task_id)
    relieved(house)
    assert (state["status"], state["error"], state["files"]) == ("cancelled", None, [])
    assert left_by(house, task_id) == []
    assert house.run(**QUICK)["status"] == "completed"
    assert house.status(task_id)["status"] == "cancelled"


@every_phase
def test_a_worker_that_is_killed_fails_its_task_alone(house: Daemon, phase: str) -> None:
    task_id = held(house, phase)
    (pid,) = workers(house)
    os.kill(pid, signal.SIGKILL)
    waiting = house.submit(**QUICK)["task_id"]
    state = house.finish(task_id)
    relieved(house)
    assert state["status"] == "failed"
    assert state["error"]["message"].startswith(f"The generation process died while {phase}")
    assert state["error"]["code"] == "worker_died"
    assert left_by(house, task_id) == []
    assert house.finish(waiting)["status"] == "completed"
    assert workers(house).isdisjoint({pid})


def test_a_task_that_is_deleted_at_once_ends_as_cancelled(house: Daemon) -> None:
    """The cancel may come while the task is being taken up, before any process knows of it."""
    house.run(**QUICK)
    for _ in range(10):
        task_id = house.submit(**LONG)["task_id"]
        assert house.delete(f"/queue/{task_id}").status_code == 200
        assert house.finish(task_id)["status"] == "cancelled"
        assert left_by(house, task_id) == []


def test_the_daemon_stays_free_of_torch_whatever_its_worker_met(house: Daemon) -> None:
    broken = house.models / "wan_t2v_1.3B" / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:100])
    house.run(**QUICK)
    state = house.run(**HELD["loading"])
    broken.write_bytes(whole)
    assert state["status"] == "failed"
    assert " while loading: " in state["error"]["message"]
    assert house.run(**HELD["loading"])["status"] == "completed"
    assert not [name for name in stand_ins.HEAVY if name in maps(house.process.pid)]


# ------------------------------------------------------------------------------------------------------ whole lives


@dataclass
class Life:
    """What was seen of a daemon that was ended while it worked and then started again."""

    exit_code: int = 0
    health: dict[str, list[int]] = field(default_factory=dict)  # phase → status codes of /health during it
    waited: list[int] = field(default_factory=list)  # ids in the queue at the end, in order
    orphans: set[int] = field(default_factory=set)
    left: list[str] = field(default_factory=list)  # files in the outputs before the restart
    states: list[dict[str, Any]] = field(default_factory=list)  # of all tasks, at their end
    next_id: int = 0


def lived(daemon: Daemon, signal_number: int) -> Life:
    """Ask for health from the first task's start on; end the daemon while that saves; let it finish after a restart."""
    life = Life()
    (daemon.folder / "slow").touch()
    with daemon:
        ids = [daemon.submit(**QUICK, prompt=f"number {number}")["task_id"] for number in range(3)]
        while (phase := daemon.status(ids[0])["phase"]) != "saving":
            life.health.setdefault(str(phase), []).append(daemon.get("/health").status_code)
        assert eventually(lambda: any("ffmpeg" in command(pid) for pid in offspring(daemon.process.pid)))
        everybody = offspring(daemon.process.pid)
        life.waited = [task["id"] for task in daemon.get("/queue").json()["data"]["tasks"]]
        life.exit_code = daemon.stop(signal_number)
        eventually(lambda: not any(map(alive, everybody)))
        life.orphans = {pid for pid in everybody if alive(pid)}
        life.left = [path.name for path in daemon.outputs.iterdir() if not path.name.startswith(".")]
        relieved(daemon)
        daemon.start()
        life.states = [daemon.finish(task_id) for task_id in ids]
        life.next_id = daemon.submit(**QUICK)["task_id"]
        daemon.finish(life.next_id)
    return life


def offspring(pid: int) -> set[int]:
    """The live descendants of a process, less the one that only tracks shared memory."""
    own = {child for child in children(pid) if "resource_tracker import main" not in command(child)}
    return own.union(*(offspring(child) for child in own))


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory) -> Life:
    daemon = Daemon(tmp_path_factory.mktemp("terminated"), cancel_grace_s=1.0)
    slow_ffmpeg(daemon)
    return lived(daemon, signal.SIGTERM)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Life:
    daemon = Daemon(tmp_path_factory.mktemp("killed"))
    slow_ffmpeg(daemon)
    return lived(daemon, signal.SIGKILL)


def test_health_answers_while_a_model_loads(terminated: Life) -> None:
    codes = terminated.health["loading"]
    assert len(codes) >= 10
    assert set(codes) == {200}


def test_health_answers_every_time_whatever_the_engine_does(terminated: Life, killed: Life) -> None:
    assert {code for life in (terminated, killed) for codes in life.health.values() for code in codes} == {200}


def test_a_terminated_daemon_ends_in_order(terminated: Life) -> None:
    assert terminated.exit_code == 0


def test_a_terminated_daemon_leaves_no_process_and_no_file(terminated: Life) -> None:
    assert (terminated.orphans, terminated.left) == (set(), [])


def test_a_killed_daemon_leaves_no_process_and_no_file(killed: Life) -> None:
    assert killed.exit_code == -signal.SIGKILL
    assert (killed.orphans, killed.left) == (set(), [])


def test_a_task_that_was_put_back_runs_again_as_if_for_the_first_time(terminated: Life) -> None:
    first = terminated.states[0]
    assert (first["status"], first["attempts"], len(first["files"])) == ("completed", 1, 1)


def test_a_task_that_a_kill_interrupted_runs_again_as_its_second_attempt(killed: Life) -> None:
    first = killed.states[0]
    assert (first["status"], first["attempts"], len(first["files"])) == ("completed", 2, 1)


@pytest.mark.parametrize("life", ["terminated", "killed"])
def test_the_queue_goes_on_in_its_order_and_its_ids_go_on(life: str, request: pytest.FixtureRequest) -> None:
    seen: Life = request.getfixturevalue(life)
    assert seen.waited == [state["task_id"] for state in seen.states]
    assert [state["status"] for state in seen.states] == ["completed"] * 3
    assert [state["prompt"] for state in seen.states] == ["number 0", "number 1", "number 2"]
    started = [state["started_at"] for state in seen.states]
    assert started == sorted(started)
    assert seen.next_id == seen.states[-1]["task_id"] + 1


def test_health_answers_while_a_task_is_denoised(house: Daemon) -> None:
    task_id = held(house, "denoising")
    codes = []
    while len(codes) < 50:
        assert house.status(task_id)["phase"] == "denoising"
        codes.append(house.get("/health").status_code)
    house.delete(f"/queue/{task_id}")
    assert codes == [200] * 50
    assert house.finish(task_id)["status"] == "cancelled"
