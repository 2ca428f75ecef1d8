"""Ends and starts of the daemon: SIGTERM in every phase, the modes of on_restart, lost journals, and disks that fail.

Real daemons, with a worker that needs no torch. What a SIGKILL at a random moment does is shown by test_crash.py.
"""

import os
import re
import resource
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.files.place import Folder
from tests import stand_ins
from tests.daemon import Daemon
from tests.processes import alive, eventually, workers
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.test_service import listening

PHASES = ["loading", "encoding", "denoising", "decoding", "saving"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "own"


@pytest.fixture
def clips(folder: Path) -> Iterator[StubDaemon]:
    """A daemon that makes small files. Not started."""
    daemon = StubDaemon(folder, make_clips)
    yield daemon
    daemon.stop(signal.SIGKILL)


def configured(daemon: Daemon, **config: Any) -> None:
    """Add keys to its configuration, for its next start."""
    lines = [
        f"{key} = {str(value).lower() if isinstance(value, int) else repr(value)}" for key, value in config.items()
    ]
    with (daemon.folder / "wangpd.toml").open("a") as file:
        file.write("\n".join(lines) + "\n")


def begun(daemon: Daemon, phase: str) -> int:
    """A task that is in `phase` now."""
    task_id: int = daemon.submit(prompt=phase)["task_id"]
    daemon.until(task_id, lambda state: state["phase"] == phase)
    return task_id


def queued(daemon: Daemon) -> list[int]:
    return [task["id"] for task in daemon.get("/queue").json()["data"]["tasks"]]


def row(daemon: Daemon, task_id: int) -> tuple[Any, ...]:
    """State, attempts and start of a task as its journal tells them."""
    query = "SELECT status, record ->> '$.attempts', record ->> '$.started_at' FROM tasks WHERE id = ?"
    with sqlite3.connect(daemon.state / "journal.sqlite") as db:
        found: tuple[Any, ...] = db.execute(query, (task_id,)).fetchone()
    db.close()
    return found


# ---- SIGTERM


@pytest.fixture(scope="module", params=["obey", "ignore"])
def stopped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose worker stays in a phase, and ends for a cancel or only for SIGKILL."""
    function = getattr(stand_ins, request.param)
    with StubDaemon(tmp_path_factory.mktemp("stopped"), function, cancel_grace_s=0.5) as daemon:
        yield daemon


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_in_any_phase_puts_the_task_back_as_if_it_had_never_started(stopped: Daemon, phase: str) -> None:
    task_id = begun(stopped, phase)
    waiting = stopped.submit()["task_id"]
    (worker,) = workers(stopped)
    assert stopped.stop() == 0
    assert not alive(worker)
    assert (row(stopped, task_id), row(stopped, waiting)) == (("queued", 0, None), ("queued", 0, None))
    stopped.start()
    assert queued(stopped) == [task_id, waiting]
    assert stopped.until(task_id, lambda state: state["phase"] == phase)["attempts"] == 1
    stopped.delete("/queue")
    stopped.delete(f"/queue/{task_id}")
    assert stopped.finish(task_id)["status"] == "cancelled"


def test_sigterm_while_the_worker_is_being_spawned_puts_the_task_back(folder: Path) -> None:
    with StubDaemon(folder, stand_ins.ignore, cancel_grace_s=0.5) as daemon:
        task_id = daemon.submit(prompt="loading")["task_id"]
        assert daemon.stop() == 0
        assert row(daemon, task_id) == ("queued", 0, None)


def test_sigterm_while_a_task_is_being_cancelled_leaves_it_cancelled(folder: Path) -> None:
    with StubDaemon(folder, stand_ins.ignore, cancel_grace_s=2.0) as daemon:
        task_id = begun(daemon, "denoising")
        assert daemon.delete(f"/queue/{task_id}").json()["data"]["status"] == "cancelling"
        assert daemon.stop() == 0
        assert row(daemon, task_id)[0] == "cancelled"


def test_while_the_task_is_being_stopped_new_work_is_told_to_come_again(folder: Path) -> None:
    with StubDaemon(folder, stand_ins.ignore, cancel_grace_s=3.0) as daemon:
        task_id = begun(daemon, "denoising")
        daemon.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: daemon.get("/health/ready").status_code == 503)
        answers = [daemon.post("/generate", {"prompt": "too late"}), daemon.get("/health/ready")]
        assert daemon.get("/health").status_code == 200
        assert daemon.status(task_id)["status"] == "processing"
        assert daemon.process.wait(30) == 0
        assert row(daemon, task_id) == ("queued", 0, None)
    assert [(answer.status_code, answer.headers["Retry-After"]) for answer in answers] == [(503, "10")] * 2
    assert answers[0].json() == {"detail": "wangpd is shutting down and takes no new work"}


# ---- SIGKILL and what becomes of the task


def killed(daemon: Daemon) -> int:
    """The id of a task under which the daemon was killed; another waits."""
    task_id = begun(daemon, "denoising")
    daemon.submit(prompt="denoising")
    daemon.stop(signal.SIGKILL)
    return task_id


@pytest.fixture
def obeying(folder: Path) -> Iterator[StubDaemon]:
    daemon = StubDaemon(folder, stand_ins.obey)
    daemon.start()
    yield daemon
    daemon.stop(signal.SIGKILL)


def test_on_restart_resume_runs_it_again_at_once(obeying: Daemon) -> None:
    task_id = killed(obeying)
    configured(obeying, on_restart="resume")
    obeying.start()
    state = obeying.until(task_id, lambda state: state["status"] == "processing")
    assert state["attempts"] == 2
    assert queued(obeying) == [task_id, task_id + 1]


def test_on_restart_pause_waits_for_a_person(obeying: Daemon) -> None:
    task_id = killed(obeying)
    configured(obeying, on_restart="pause")
    obeying.start()
    assert obeying.get("/queue").json()["data"]["paused"] is True
    assert queued(obeying) == [task_id, task_id + 1]
    assert obeying.status(task_id)["status"] == "queued"
    obeying.post("/queue/resume")
    assert obeying.until(task_id, lambda state: state["status"] == "processing")["attempts"] == 2


def test_on_restart_fail_fails_it_and_runs_the_next(obeying: Daemon) -> None:
    task_id = killed(obeying)
    configured(obeying, on_restart="fail")
    obeying.start()
    sentence = 'wangpd ended while this task ran; on_restart is "fail".'
    assert obeying.status(task_id)["error"] == {"code": "restarted", "message": sentence}
    obeying.until(task_id + 1, lambda state: state["status"] == "processing")


def test_a_task_that_takes_the_daemon_with_it_again_and_again_fails_and_says_so(obeying: Daemon) -> None:
    task_id = killed(obeying)
    obeying.start()
    obeying.until(task_id, lambda state: state["status"] == "processing")
    obeying.stop(signal.SIGKILL)
    obeying.start()
    state = obeying.status(task_id)
    sentence = "wangpd ended 2 times while this task ran; max_attempts is 2."
    assert (state["status"], state["attempts"]) == ("failed", 2)
    assert state["error"] == {"code": "too_many_attempts", "message": sentence}
    obeying.until(task_id + 1, lambda state: state["status"] == "processing")


def test_what_a_broken_attempt_left_disappears_and_nothing_else(clips: StubDaemon) -> None:
    clips.start()
    kept = clips.made(clips.run(num_inference_steps=2))
    task_id = clips.submit(num_inference_steps=20, repeat_generation=10)["task_id"]
    assert eventually(lambda: len(list(clips.outputs.glob(f"*_t{task_id:06d}-*"))) >= 2)
    clips.stop(signal.SIGKILL)
    configured(clips, on_restart="pause")
    instance = (clips.state / "instance").read_text().strip()
    (clips.outputs / f".20250101-000000_t000002-{instance}_stub_s9.mp4.part").write_bytes(b"half")
    strange = clips.outputs / "trip_t000002_.mp4"
    strange.write_bytes(b"a person's own")
    clips.start()
    assert set(clips.outputs.iterdir()) == {kept, strange, clips.outputs / ".wangpd.lock"}


# ---- a journal that can't be read


@pytest.fixture
def spoiled(clips: StubDaemon) -> StubDaemon:
    """A daemon that has made files and is stopped; its journal is spoiled."""
    clips.start()
    for _ in range(3):
        clips.run(num_inference_steps=1)
    clips.stop()
    (clips.state / "journal.sqlite").write_bytes(b"nonsense " * 1000)
    return clips


def aside(daemon: Daemon) -> Path:
    (path,) = daemon.state.glob("journal.sqlite.unreadable-*")
    return path


def test_an_unreadable_journal_is_set_aside_and_the_daemon_works(spoiled: StubDaemon) -> None:
    spoiled.start()
    assert aside(spoiled).read_bytes() == b"nonsense " * 1000
    assert queued(spoiled) == []
    assert spoiled.run(num_inference_steps=1)["status"] == "completed"


def test_the_log_says_loudly_that_a_journal_was_set_aside(spoiled: StubDaemon) -> None:
    spoiled.start()
    sentence = f"the journal could not be read and was moved to {aside(spoiled)}; the queue starts empty"
    assert sentence in spoiled.log.read_text()


def test_readiness_warns_of_a_journal_that_was_set_aside(spoiled: StubDaemon) -> None:
    spoiled.start()
    answer = spoiled.get("/health/ready")
    warning = f"The queue's journal could not be read and was moved to {aside(spoiled).name}; its tasks are lost"
    assert (answer.status_code, answer.json()["warnings"]) == (200, [warning])


def test_systemd_is_told_of_a_journal_that_was_set_aside(spoiled: StubDaemon) -> None:
    with listening(str(spoiled.folder / "notify")) as systemd:
        spoiled.environment |= {"NOTIFY_SOCKET": systemd.address}
        spoiled.start()
        (said,) = [line for line in systemd.hear_until("READY=1")[-1] if line.startswith("STATUS=")]
    assert f"could not be read and was moved to {aside(spoiled).name}" in said


def test_ids_go_on_after_a_lost_journal_by_the_names_of_the_files(spoiled: StubDaemon) -> None:
    spoiled.start()
    assert spoiled.submit()["task_id"] == 4


def test_a_deleted_journal_is_no_fault_and_ids_go_on(spoiled: StubDaemon) -> None:
    for path in spoiled.state.glob("journal.sqlite*"):
        path.unlink()
    spoiled.start()
    assert spoiled.get("/health/ready").json()["warnings"] == []
    assert spoiled.submit()["task_id"] == 4


def test_a_journal_that_can_not_be_opened_stops_the_start_with_a_sentence(clips: StubDaemon) -> None:
    (clips.state / "journal.sqlite").mkdir(parents=True)
    clips.launch()
    assert clips.process.wait(30) == 1
    assert re.fullmatch(r"wangpd: can't go on: .*unable to open database file.*\n", clips.log.read_text())


# ---- a full disk


def free_mb(path: Path) -> int:
    return shutil.disk_usage(path).free // 2**20


def test_with_too_little_room_work_is_refused_with_what_is_free_and_what_is_asked(clips: StubDaemon) -> None:
    wanted_mb = free_mb(clips.folder) + 100_000
    configured(clips, min_free_mb=wanted_mb)
    clips.start()
    answer = clips.post("/generate", {"prompt": "a cat"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    said = re.fullmatch(
        rf"The disk of save_path has (\d+) MiB free and min_free_mb asks for {wanted_mb}: delete old outputs",
        answer.json()["detail"],
    )
    assert said
    assert int(said[1]) < wanted_mb
    ready = clips.get("/health/ready")
    assert ready.status_code == 503
    assert "min_free_mb" in ready.json()["detail"]
    assert clips.get("/health").status_code == 200


def test_a_task_goes_on_waiting_when_the_disk_has_filled_up(clips: StubDaemon) -> None:
    clips.start()
    clips.post("/queue/pause")
    task_id = clips.submit()["task_id"]
    clips.stop()
    configured(clips, min_free_mb=free_mb(clips.folder) + 100_000)
    clips.start()
    clips.post("/queue/resume")
    assert clips.get("/health/ready").status_code == 503
    assert (queued(clips), workers(clips)) == ([task_id], set())
    clips.stop()
    (clips.folder / "wangpd.toml").write_text("port = 0\n")
    clips.start()
    assert clips.finish(task_id)["status"] == "completed"


@pytest.mark.parametrize(("free_bytes", "refused"), [(1000, False), (999, True), (0, True), (10**15, False)])
def test_the_floor_of_free_disk_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, refused: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free_bytes))
    assert bool(Folder(tmp_path, "save_path", 1000, "at least 1 are needed").fault()) is refused


def test_a_disk_that_is_full_while_a_task_runs_lets_it_try_again_and_then_fails_it_alone(folder: Path) -> None:
    """A look at the folders shows nothing, so it may be the task that is too large for them."""
    with StubDaemon(folder, stand_ins.fail) as daemon:
        state = daemon.run(prompt="disk")
        sentence = "No space left on device while denoising."
        assert (state["status"], state["error"]["message"], state["attempts"]) == ("failed", sentence, 2)
        assert eventually(lambda: daemon.get("/health/ready").status_code == 200)
        assert daemon.run(prompt="sentence")["error"]["message"] == "Nothing works today."


# ---- an output folder that can't be used


def test_a_file_in_the_place_of_the_output_folder_holds_the_tasks(clips: StubDaemon) -> None:
    """Nothing can be written there, by root neither."""
    clips.start()
    running = clips.submit(num_inference_steps=100)["task_id"]
    waiting = clips.submit(num_inference_steps=1)["task_id"]
    clips.until(running, lambda state: state["phase"] == "denoising")
    moved = clips.folder / "moved"
    clips.outputs.rename(moved)
    clips.outputs.write_bytes(b"")
    assert eventually(lambda: queued(clips) == [running, waiting])
    assert eventually(lambda: clips.get("/health/ready").status_code == 503)
    assert clips.get("/outputs").status_code == 503
    clips.outputs.unlink()
    moved.rename(clips.outputs)
    ends = [clips.finish(task_id) for task_id in (running, waiting)]
    assert [(state["status"], state["attempts"]) for state in ends] == [("completed", 1)] * 2


def test_an_output_folder_that_is_gone_is_a_reason_not_to_be_ready(clips: StubDaemon) -> None:
    clips.start()
    moved = clips.folder / "moved"
    clips.outputs.rename(moved)
    sentence = "save_path can't be used now (No such file or directory); bring the folder back"
    for answer in (clips.get("/health/ready"), clips.post("/generate", {"prompt": "a cat"})):
        assert (answer.status_code, answer.json()) == (503, {"detail": sentence})
    moved.rename(clips.outputs)
    assert clips.get("/health/ready").status_code == 200
    assert clips.run(num_inference_steps=1)["status"] == "completed"


# ---- the journal's disk fails


def let_files_grow(daemon: Daemon, to_bytes: int) -> None:
    """Let the daemon write no file beyond this size, so that its journal's disk looks full."""
    _, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (to_bytes, hard))


def test_a_submission_that_can_not_be_written_down_is_503_and_the_next_one_works(clips: StubDaemon) -> None:
    clips.start()
    clips.post("/queue/pause")
    first = clips.submit()["task_id"]
    let_files_grow(clips, 4096)
    answer = clips.post("/generate", {"prompt": "a cat"})
    let_files_grow(clips, resource.RLIM_INFINITY)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
    assert re.fullmatch(
        r"The queue's journal can't be used now \(.+\); free its disk, then try again", answer.json()["detail"]
    )
    second = clips.submit()["task_id"]
    assert queued(clips) == [first, second]


def test_an_end_that_can_not_be_written_down_yet_is_a_reason_not_to_be_ready(clips: StubDaemon) -> None:
    clips.start()
    clips.run(num_inference_steps=1)
    task_id = clips.submit(num_inference_steps=100)["task_id"]
    clips.until(task_id, lambda state: state["phase"] == "denoising")
    let_files_grow(clips, 4096)
    assert eventually(lambda: clips.get("/health/ready").status_code == 503)
    assert "journal can't be used now" in clips.get("/health/ready").json()["detail"]
    let_files_grow(clips, resource.RLIM_INFINITY)
    assert clips.finish(task_id)["status"] == "completed"
    assert eventually(lambda: clips.get("/health/ready").status_code == 200)
    os.kill(clips.process.pid, signal.SIGKILL)
    clips.stop()
    clips.start()
    assert clips.status(task_id)["status"] == "completed"
