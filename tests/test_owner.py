"""Only what wangpd made is ever deleted, by a clock that can be believed, and a folder has one owner."""

import errno
import fcntl
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine import clock as clock_module
from engine.clock import Clock
from engine.files.inputs import Inputs
from engine.files.outputs import Outputs
from engine.files.owner import FolderLock, instance_id
from tests.processes import eventually
from tests.stub_daemon import CLOCK
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

DAY_S = 86400
YEAR_S = 365 * DAY_S
QUICK = {"num_inference_steps": 1}


def made_by(daemon: StubDaemon) -> Path:
    return daemon.made(daemon.run(**QUICK))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".wangpd.lock"}


def old(path: Path, age_s: float = YEAR_S) -> Path:
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Any]:
    """Daemons with small files by name, and the folder's clock; all are stopped at the end."""
    daemons: list[StubDaemon] = []

    def maker(name: str = "one", **config: Any) -> StubDaemon:
        daemon = StubDaemon(tmp_path / name, make_clips, **config)
        daemon.environment[CLOCK] = str(tmp_path / "clock")
        (tmp_path / "clock").write_text("0")
        daemons.append(daemon)
        return daemon

    yield maker
    for daemon in daemons:
        daemon.stop(signal.SIGKILL)


def wrong_by(daemon: StubDaemon, seconds: float) -> None:
    """Set the wall clock wrong."""
    (daemon.folder.parent / "clock.new").write_text(str(seconds))
    (daemon.folder.parent / "clock.new").rename(daemon.folder.parent / "clock")


# ------------------------------------------------------------------------------------- only what wangpd made is deleted


@pytest.fixture
def keeper(make: Any) -> StubDaemon:
    """A daemon that keeps files for a week. Not started."""
    daemon: StubDaemon = make(keep_outputs_days=7)
    daemon.outputs.mkdir()
    return daemon


def test_a_users_own_files_outlive_retention(keeper: StubDaemon) -> None:
    own = ["wedding 2019.mp4", "holiday.jpg", "voice memo.wav", "20190101-120000_t000001-abcdef_mine_s1.mp4"]
    for name in own:
        old(keeper.outputs / name) if (keeper.outputs / name).write_bytes(b"film") else None
    (keeper.outputs / "link.mp4").symlink_to(keeper.outputs / own[0])
    keeper.start()
    old(made_by(keeper))
    kept = made_by(keeper)
    assert names(keeper.outputs) == {*own, "link.mp4", kept.name}


def test_a_file_with_the_name_of_an_own_one_is_a_users_if_he_wrote_it(keeper: StubDaemon) -> None:
    keeper.start()
    longer, same_size, link, gone = (made_by(keeper) for _ in range(4))
    longer.write_bytes(longer.read_bytes() + b"more")
    old(longer)
    same_size.write_bytes(b"x" * same_size.stat().st_size)
    os.utime(same_size, (time.time() + 60,) * 2)
    link.rename(keeper.folder / "moved.mp4")
    link.symlink_to(old(keeper.folder / "moved.mp4"))
    gone.unlink()
    made_by(keeper)
    for path in (longer, same_size):  # also later: they have been given up
        old(path)
    made_by(keeper)
    assert {longer.name, same_size.name, link.name} <= names(keeper.outputs)


def test_own_files_are_known_after_their_records_are_forgotten(make: Any) -> None:
    daemon = make(keep_outputs_days=7, history_count=1)
    daemon.start()
    first, second = made_by(daemon), made_by(daemon)
    assert eventually(lambda: daemon.get("/tasks").json()["data"]["total"] == 1)
    daemon.stop()
    old(first)
    daemon.start()
    third = made_by(daemon)
    assert names(daemon.outputs) == {second.name, third.name}


def test_only_own_files_count_towards_the_room_that_they_may_take(make: Any) -> None:
    daemon = make(keep_outputs_mb=1)
    daemon.start()
    (daemon.outputs / "long film.mp4").write_bytes(bytes(5 * 2**20))
    first = made_by(daemon)
    large = made_by(daemon)
    with sqlite3.connect(daemon.state / "journal.sqlite") as db:  # as if it had been so large from the start
        large.write_bytes(bytes(2**20))
        about = (2**20, large.stat().st_mtime_ns, large.name)
        db.execute("UPDATE files SET size_bytes = ?, mtime_ns = ? WHERE name = ?", about)
    db.close()
    old(first, 60)
    third = made_by(daemon)
    assert names(daemon.outputs) == {"long film.mp4", large.name, third.name}


def test_the_whole_files_of_a_cancelled_task_are_own_ones_too(keeper: StubDaemon) -> None:
    keeper.start()
    task_id = keeper.submit(num_inference_steps=100, repeat_generation=10)["task_id"]
    assert eventually(lambda: len(list(keeper.outputs.glob("*.mp4"))) >= 2)
    keeper.delete(f"/queue/{task_id}")
    keeper.finish(task_id)
    for path in keeper.outputs.glob("*.mp4"):
        old(path)
    kept = made_by(keeper)
    assert names(keeper.outputs) == {kept.name}


def test_a_folder_that_is_away_makes_no_file_anybody_elses(keeper: StubDaemon) -> None:
    keeper.start()
    file, kept = old(made_by(keeper)), made_by(keeper)
    file.write_bytes(b"")  # not the same any more
    old(kept)
    keeper.stop()
    keeper.outputs.rename(keeper.folder / "away")
    keeper.start()
    made_by(keeper)
    for path in (keeper.folder / "away").glob("*.mp4"):
        path.rename(keeper.outputs / path.name)
    made_by(keeper)
    assert file.name in names(keeper.outputs)
    assert kept.name not in names(keeper.outputs)


# ----------------------------------------------------------------------------------------- a clock that can be believed


def key_replays(daemon: StubDaemon, key: str) -> bool:
    answer = daemon.post("/generate", {"prompt": key, **QUICK}, headers={"Idempotency-Key": key})
    assert answer.status_code == 200
    return answer.headers.get("Idempotency-Replayed") == "true"


def all_there(daemon: StubDaemon, files: list[Path]) -> None:
    """Nothing is deleted, no record and no key forgotten, though another task has ended by now."""
    ids = {task["task_id"] for task in daemon.get("/tasks?limit=200").json()["data"]["tasks"]}
    assert all(path.exists() for path in files)
    assert set(range(1, max(ids) + 1)) == ids
    assert key_replays(daemon, "one")


@pytest.mark.parametrize("jump_s", [2 * YEAR_S, 60 * DAY_S, -2 * YEAR_S, -40 * YEAR_S])
def test_a_clock_that_jumps_while_the_daemon_runs_deletes_nothing(keeper: StubDaemon, jump_s: float) -> None:
    keeper.start()
    assert not key_replays(keeper, "one")
    files = [made_by(keeper)]
    wrong_by(keeper, jump_s)
    files += [made_by(keeper), made_by(keeper)]
    all_there(keeper, files)
    wrong_by(keeper, 0)
    files += [made_by(keeper), made_by(keeper)]
    all_there(keeper, files)


@pytest.mark.parametrize("jump_s", [2 * YEAR_S, 31 * DAY_S, -2 * YEAR_S])
def test_a_clock_that_jumps_over_a_restart_deletes_nothing(keeper: StubDaemon, jump_s: float) -> None:
    keeper.start()
    assert not key_replays(keeper, "one")
    files = [made_by(keeper), made_by(keeper)]
    for wrong_s in (jump_s, 0.0, jump_s):
        keeper.stop()
        wrong_by(keeper, wrong_s)
        offset = len(keeper.log.read_text())
        keeper.start()
        files += [made_by(keeper), made_by(keeper)]
        all_there(keeper, files)
        assert keeper.log.read_text()[offset:].count("days off what it was") == 1


def test_what_a_machine_was_off_counts(keeper: StubDaemon) -> None:
    keeper.start()
    assert not key_replays(keeper, "one")
    first = made_by(keeper)
    keeper.stop()
    wrong_by(keeper, 3 * DAY_S)
    keeper.start()
    second = made_by(keeper)
    assert first.exists()
    assert not key_replays(keeper, "one")
    keeper.stop()
    wrong_by(keeper, 8 * DAY_S)
    keeper.start()
    made_by(keeper)
    assert not first.exists()
    assert second.exists()
    assert "days off" not in keeper.log.read_text()


def test_the_first_start_believes_the_clock_and_a_correction_of_it_costs_nothing(keeper: StubDaemon) -> None:
    wrong_by(keeper, 2 * YEAR_S)
    keeper.start()
    assert not key_replays(keeper, "one")
    files = [made_by(keeper)]
    wrong_by(keeper, 0)
    files += [made_by(keeper), made_by(keeper)]
    all_there(keeper, files)


def test_the_clock_goes_on_with_the_uptime(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, uptime = [1000.0], [10.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(clock_module, "_uptime_s", lambda: uptime[0])
    clock = Clock()
    wall[0], uptime[0] = 1e9, 15.0
    assert (clock.now(), clock.dated(1e9 - 2)) == (1005.0, 1003.0)
    clock.resume(500.0, 1e9 - DAY_S)
    assert clock.now() == 500.0 + DAY_S


async def test_inputs_of_a_request_under_way_are_kept_whatever_the_clock_shows(tmp_path: Path) -> None:
    folder, inputs = tmp_path / "inputs", Inputs(tmp_path / "inputs", 2**20)
    folder.mkdir()
    (folder / "left").write_bytes(b"of an earlier daemon")
    (folder / "needed").write_bytes(b"of a task")
    (tmp_path / ".sent-left").write_bytes(b"of a request that died with an earlier daemon")
    inputs.remove_parts()
    assert not (tmp_path / ".sent-left").exists()
    async with inputs.receiving() as receive:
        stored, other = receive([b"ne", b"w"]), receive([b"other"])
        inputs.store(stored)
        old(inputs.path(stored))
        assert inputs.sweep({"needed"}) == 1
        assert names(folder) == {stored.sha256, "needed"}
        assert other.path.read_bytes() == b"other"
    assert names(tmp_path) == {"inputs"}
    assert inputs.sweep({"needed"}) == 1
    assert names(folder) == {"needed"}


# ------------------------------------------------------------------------------------------------ one folder, one owner


def refused(daemon: StubDaemon) -> str:
    """What a daemon says that must not start."""
    offset = daemon.launch()
    assert daemon.process.wait(30) == 1
    return daemon.log.read_text()[offset:]


@pytest.mark.parametrize("way", ["itself", "a link", "a mount"])
def test_a_second_daemon_does_not_start_on_the_same_output_folder(make: Any, tmp_path: Path, way: str) -> None:
    one = make("one", save_path=str(tmp_path / "shared"))
    one.outputs = tmp_path / "shared"
    one.start()
    file = made_by(one)
    place, mounted = tmp_path / "shared", False
    if way == "a link":
        place = tmp_path / "link"
        place.symlink_to(tmp_path / "shared")
    elif mounted := way == "a mount" and os.geteuid() == 0:
        place = tmp_path / "mount"
        place.mkdir()
        subprocess.run(["mount", "--bind", tmp_path / "shared", place], check=True)
    part = one.outputs / f".20261122-210533_t000009-{instance_id(one.state)}_x_s1.mp4.part"
    part.write_bytes(b"half")
    try:
        said = refused(make("two", save_path=str(place)))
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)
    sentence = rf"wangpd: save_path: {place} is in use by another wangpd \(process {one.process.pid} on .+, state_path"
    assert re.fullmatch(rf"{sentence} {one.state}\); one folder, one daemon\n", said)
    assert {file.name, part.name} <= names(one.outputs)
    assert one.run(**QUICK)["status"] == "completed"


def test_daemons_in_folders_of_each_other_leave_each_others_files_alone(make: Any, tmp_path: Path) -> None:
    """The output folder of one is in that of the other, and so is its state folder."""
    outer = make("outer", keep_outputs_days=7, save_path=str(tmp_path / "videos"))
    inner = make(
        "inner", keep_outputs_days=7, save_path=str(tmp_path / "videos" / "inner"), state_path="../videos/state"
    )
    outer.outputs, inner.outputs, inner.state = (
        tmp_path / "videos",
        tmp_path / "videos" / "inner",
        tmp_path / "videos/state",
    )
    for daemon in (outer, inner):
        daemon.start()
    files = [made_by(daemon) for daemon in (outer, inner)]
    (inner.outputs / files[0].name).write_bytes(b"a copy")
    old(inner.outputs / files[0].name)
    for daemon in (outer, inner):
        made_by(daemon)
        daemon.stop(signal.SIGKILL)
        daemon.start()
        made_by(daemon)
    assert all(path.exists() for path in (*files, inner.outputs / files[0].name))


def made_twice(folder: Path, instance: str) -> bool:
    return len(list(folder.glob(f"*-{instance}_*.mp4"))) >= 2


def test_a_daemon_that_comes_after_another_touches_none_of_its_files(make: Any, tmp_path: Path) -> None:
    """Both have a task 1, and both are killed in the middle of it."""
    one, two = (make(name, save_path=str(tmp_path / "shared"), on_restart="pause") for name in ("one", "two"))
    for daemon in (one, two):
        daemon.outputs = tmp_path / "shared"
        daemon.start()
        daemon.submit(num_inference_steps=100, repeat_generation=10)
        instance = instance_id(daemon.state)
        assert eventually(partial(made_twice, daemon.outputs, instance))
        (daemon.outputs / f".20261122-210533_t000001-{instance}_x_s1.mp4.part").write_bytes(b"half")
        daemon.stop(signal.SIGKILL)
    before = {name for name in names(one.outputs) if instance_id(one.state) in name}
    two.start()
    assert names(two.outputs) == before
    two.stop()
    one.start()
    assert names(one.outputs) == set()


def test_a_daemon_whose_folder_was_replaced_locks_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    first, second = (FolderLock("save_path", tmp_path / "folder" / "lock", name) for name in ("first", "second"))
    assert (first.take(), first.take()) == ("", "")
    sentence = f"save_path: {tmp_path / 'folder'} is in use by another wangpd (first); one folder, one daemon"
    assert second.take() == sentence
    (tmp_path / "folder").rename(tmp_path / "away")
    assert first.take() == ""  # it is gone, which others tell
    (tmp_path / "folder").mkdir()
    assert (first.take(), second.take()) == ("", sentence)
    (tmp_path / "folder" / "lock").unlink()
    assert (first.take(), second.take()) == ("", sentence)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EROFS])
def test_a_folder_that_can_not_be_locked_is_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FolderLock("save_path", tmp_path / "lock", "first")
    assert [lock.take() for _ in range(3)] == [""] * 3
    assert [record.getMessage() for record in caplog.records] == [
        f"save_path: {tmp_path} can't be locked ({os.strerror(number)}); no other wangpd may use it"
    ]


def test_a_link_in_the_place_of_a_lock_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "film.mp4").write_bytes(b"film")
    (tmp_path / "lock").symlink_to(tmp_path / "film.mp4")
    assert FolderLock("save_path", tmp_path / "lock", "first").take() == ""
    assert (tmp_path / "film.mp4").read_bytes() == b"film"


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path: Path) -> None:
    program = "import sys, time; from pathlib import Path; from engine.files.owner import FolderLock"
    program += "; lock = FolderLock('save_path', Path(sys.argv[1]), 'first'); print(lock.take(), flush=True)"
    command = [sys.executable, "-c", f"{program}; time.sleep(600)", str(tmp_path / "lock")]
    lock = FolderLock("save_path", tmp_path / "lock", "second")
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent) as other:
        assert other.stdout
        assert other.stdout.readline() == b"\n"
        assert "(first)" in lock.take()
        other.kill()
    assert lock.take() == ""


def test_the_id_of_a_daemon_is_in_its_files_and_stays(make: Any) -> None:
    daemon = make()
    daemon.start()
    first = made_by(daemon)
    daemon.stop()
    daemon.start()
    second = made_by(daemon)
    instance = (daemon.state / "instance").read_text().strip()
    assert re.fullmatch("[0-9a-f]{6}", instance)
    assert [path.name.split("_")[1] for path in (first, second)] == [f"t000001-{instance}", f"t000002-{instance}"]


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff\xfe\xfd\xfc\xfb\xfa", b"../../x", b"ABCDEF"])
def test_a_broken_id_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "instance").write_bytes(content)
    new = instance_id(tmp_path)
    assert re.fullmatch("[0-9a-f]{6}", new)
    assert instance_id(tmp_path) == new


@pytest.mark.parametrize("name", ["20250101-000000_t000041_a_s1.mp4", ".20250101-000000_t000041-abcdef_a_s1.mp4.part"])
def test_ids_go_on_by_the_names_of_any_daemon_and_version(make: Any, name: str) -> None:
    daemon = make()
    daemon.outputs.mkdir()
    (daemon.outputs / name).write_bytes(b"x")
    daemon.start()
    assert daemon.submit()["task_id"] == 42
    assert Outputs(daemon.outputs, daemon.state).highest_task_id() >= 41
