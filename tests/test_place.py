"""A fault of the place is no fault of the task: disks, devices and processes that fail, and come back."""

import asyncio
import base64
import errno
import fcntl
import io
import os
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import av
import pytest
from PIL import Image

from engine.files.place import Folder, Place
from engine.gpu.load import devices
from engine.job import EngineError
from tests.daemon import Daemon
from tests.disks import DaemonWithDisks
from tests.processes import eventually, workers

QUICK = {"num_inference_steps": 2, "video_length": 5}
LONG = {"num_inference_steps": 40, "video_length": 17}


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonWithDisks]:
    """One for all tests that leave it well."""
    with DaemonWithDisks(tmp_path_factory.mktemp("disks"), state_mb=16) as running:
        running.run(**QUICK)
        yield running


def waiting(daemon: Daemon, count: int = 3) -> list[int]:
    """The ids of tasks that wait in a paused queue."""
    daemon.post("/queue/pause")
    return [daemon.submit(seed=seed, **QUICK)["task_id"] for seed in range(count)]


def refused(daemon: Daemon) -> str:
    """The sentence with which work is refused, by every door alike."""
    ended = daemon.get("/tasks?status=completed&limit=1").json()["data"]["tasks"]
    doors = [daemon.get("/health/ready"), daemon.post("/generate", {"prompt": "a cat"})]
    doors += [daemon.post(f"/queue/{task['task_id']}/retry") for task in ended]
    assert [(answer.status_code, answer.headers.get("Retry-After")) for answer in doors] == [(503, "10")] * len(doors)
    sentences = {answer.json()["detail"] for answer in doors}
    assert len(sentences) == 1, sentences
    return str(sentences.pop())


def held(daemon: Daemon, ids: list[int]) -> str:
    """These tasks wait, none of them was tried, and work is refused: why."""
    daemon.post("/queue/resume")
    assert eventually(lambda: daemon.get("/health/ready").status_code == 503)
    sentence = refused(daemon)
    states = [daemon.status(task_id) for task_id in ids]
    assert [(state["status"], state["attempts"], state["error"]) for state in states] == [("queued", 0, None)] * len(
        ids
    )
    return sentence


def all_done(daemon: Daemon, ids: list[int]) -> None:
    """These tasks run to their end by themselves, each at its first attempt."""
    ends = [daemon.finish(task_id) for task_id in ids]
    assert [(state["status"], state["attempts"]) for state in ends] == [("completed", 1)] * len(ids)
    assert daemon.get("/health/ready").status_code == 200


def frames(path: Path) -> int:
    """How many frames can be decoded."""
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


# ---- the disk of the outputs


def test_tasks_wait_while_the_disk_is_full(disks: DaemonWithDisks) -> None:
    ids = waiting(disks)
    disks.outputs_disk.fill()
    assert held(disks, ids) == "The disk of save_path has 0 MiB free and min_free_mb asks for 1: delete old outputs"
    disks.outputs_disk.free()
    all_done(disks, ids)


def test_tasks_wait_while_the_folder_is_read_only(disks: DaemonWithDisks) -> None:
    ids = waiting(disks)
    disks.outputs_disk.read_only(True)
    assert "save_path can't be written to now" in held(disks, ids)
    disks.outputs_disk.read_only(False)
    all_done(disks, ids)


def test_tasks_wait_while_the_disk_is_not_mounted(disks: DaemonWithDisks) -> None:
    """The empty folder below it could be written to, and would hide what is written."""
    ids = waiting(disks)
    disks.outputs_disk.take_away()
    assert "not mounted any more" in held(disks, ids)
    disks.outputs_disk.bring_back()
    all_done(disks, ids)


def test_the_lock_is_taken_in_another_folder_that_is_there_now(disks: DaemonWithDisks) -> None:
    disks.outputs_disk.take_away()
    disks.outputs_disk.bring_back()
    assert eventually(lambda: disks.get("/health/ready").status_code == 200)
    with (disks.outputs_disk.seen / ".wangpd.lock").open() as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_lock_does_not_keep_the_disk_from_being_remounted_read_only(disks: DaemonWithDisks) -> None:
    disks.run(**QUICK)
    disks.outputs_disk.remount("ro")
    assert "save_path can't be written to now" in refused(disks)
    disks.outputs_disk.remount("rw")
    assert eventually(lambda: disks.get("/health/ready").status_code == 200)


@pytest.mark.parametrize("fault", ["read-only", "full", "away"])
def test_a_video_that_can_not_be_saved_is_kept_and_saved_later(disks: DaemonWithDisks, fault: str) -> None:
    disk = disks.outputs_disk
    task_id = disks.submit(seed=5, **LONG)["task_id"]
    behind = disks.submit(seed=6, **QUICK)["task_id"]
    disks.until(task_id, lambda state: state["phase"] == "denoising")
    begin = {"read-only": lambda: disk.read_only(True), "full": disk.fill, "away": disk.take_away}
    begin[fault]()
    assert eventually(lambda: any(disks.state_disk.seen.glob("unsaved/*.mp4")))
    assert eventually(lambda: disks.get("/health/ready").status_code == 503)
    assert (disks.status(task_id)["status"], disks.status(behind)["status"]) == ("processing", "queued")
    refused(disks)
    end = {"read-only": lambda: disk.read_only(False), "full": disk.free, "away": disk.bring_back}
    end[fault]()
    all_done(disks, [task_id, behind])
    (file,) = disks.status(task_id)["files"]
    assert frames(disk.seen / file["filename"]) == 17
    assert (disk.seen / file["filename"]).stat().st_size == file["size_bytes"]
    assert not list(disks.state_disk.seen.glob("unsaved/*.mp4"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_video_that_is_made_and_not_saved_outlives_the_daemon(tmp_path: Path, end: signal.Signals) -> None:
    with DaemonWithDisks(tmp_path) as daemon:
        task_id = daemon.submit(seed=5, **LONG)["task_id"]
        daemon.until(task_id, lambda state: state["phase"] == "denoising")
        daemon.outputs_disk.read_only(True)
        assert eventually(lambda: daemon.status(task_id)["files"])
        made = daemon.status(task_id)
        daemon.stop(end)
        daemon.start()  # with an empty disk
        state = daemon.finish(task_id)
        assert (state["status"], state["attempts"], state["timings"]) == ("completed", 1, made["timings"])
        assert frames(daemon.outputs_disk.seen / state["files"][0]["filename"]) == 17
        assert workers(daemon) == set()  # nothing was made again


def test_a_cancelled_task_keeps_what_was_made_and_its_files_come_when_they_can(disks: DaemonWithDisks) -> None:
    task_id = disks.submit(seed=5, **LONG)["task_id"]
    disks.until(task_id, lambda state: state["phase"] == "denoising")
    disks.outputs_disk.read_only(True)
    assert eventually(lambda: disks.status(task_id)["files"])
    disks.delete(f"/queue/{task_id}")
    state = disks.finish(task_id)
    assert (state["status"], len(state["files"])) == ("cancelled", 1)
    disks.outputs_disk.read_only(False)
    path = disks.outputs_disk.seen / state["files"][0]["filename"]
    assert eventually(path.exists)
    assert frames(path) == 17
    assert eventually(lambda: disks.get("/health/ready").status_code == 200)


# ---- the disk of the state


def picture() -> str:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_full_state_folder_is_503_with_and_without_a_picture(disks: DaemonWithDisks) -> None:
    disks.state_disk.fill()
    sentence = refused(disks)
    assert sentence == "The disk of state_path has 0 MiB free and 1 are needed for the queue: free some"
    answer = disks.post("/generate", {"prompt": "a cat", "image_start": picture()})
    assert (answer.status_code, answer.json()) == (503, {"detail": sentence})
    for path in ("/queue/pause", "/queue/resume"):
        assert disks.post(path).status_code in (200, 503)
    disks.state_disk.free()
    assert disks.run(seed=3, **QUICK)["status"] == "completed"


def test_a_state_folder_that_can_not_be_written_to_is_503(disks: DaemonWithDisks) -> None:
    disks.state_disk.read_only(True)
    for body in ({"prompt": "a cat"}, {"prompt": "a cat", "image_start": picture()}):
        assert disks.post("/generate", body).status_code == 503
    assert "state_path can't be written to now" in disks.get("/health/ready").json()["detail"]
    disks.state_disk.read_only(False)
    assert disks.run(seed=3, image_start=picture(), **QUICK)["status"] == "completed"


def test_a_folder_for_pictures_that_is_none_is_503(disks: DaemonWithDisks) -> None:
    folder = disks.state_disk.seen / "inputs"
    disks.run(seed=3, image_start=picture(), **QUICK)
    folder.rename(folder.with_name("moved"))
    folder.write_bytes(b"")
    answer = disks.post("/generate", {"prompt": "a cat", "image_start": picture()})
    assert (answer.status_code, "state_path can't take the files that were sent" in answer.text) == (503, True)
    folder.unlink()
    folder.with_name("moved").rename(folder)
    assert disks.run(seed=3, image_start=picture(), **QUICK)["status"] == "completed"


def test_a_task_whose_video_finds_no_room_waits_for_it(disks: DaemonWithDisks) -> None:
    ids = [disks.submit(seed=seed, **LONG)["task_id"] for seed in (1, 2)]
    disks.until(ids[0], lambda state: state["phase"] == "denoising")
    disks.state_disk.fill()
    assert eventually(lambda: disks.get("/health/ready").status_code == 503)
    assert eventually(lambda: f"task {ids[0]} waits again" in disks.log.read_text())
    assert disks.status(ids[1])["status"] == "queued"
    disks.state_disk.free()
    all_done(disks, ids)


# ---- engines


def test_tasks_wait_while_the_card_is_gone(tmp_path: Path) -> None:
    with Daemon(tmp_path, device="cuda:7") as daemon:
        ids = waiting(daemon)
        daemon.post("/queue/resume")
        assert eventually(lambda: daemon.get("/health/ready").status_code == 503)
        assert "'cuda:7' is not available" in refused(daemon)
        assert eventually(lambda: daemon.status(ids[0])["status"] == "queued")
        assert [daemon.status(task_id)["attempts"] for task_id in ids] == [0, 0, 0]


SITE = """
import os, sys
FLAG = {flag!r}
if os.path.exists(FLAG) and "multiprocessing.spawn" in " ".join(sys.orig_argv):
    os._exit(3)
"""
POISON = """
import importlib.abc, importlib.util, sys

class Poison(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "engine.gpu.session":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            import torch
            own, dead = module.ModelSession._attempt, []
            fault = lambda: torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
            def attempt(self, task_id, job, *rest):
                if "poison" in job.prompt:
                    dead.append(1)
                if dead:  # as CUDA does: for the life of the process
                    raise fault()
                return own(self, task_id, job, *rest)
            def give_back(self):
                if dead:
                    raise fault()
            module.ModelSession._attempt, module.ModelSession.give_back = attempt, give_back
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Poison())
"""


def with_site(daemon: Daemon, source: str) -> None:
    """Let this run at the start of the daemon and of its workers."""
    folder = daemon.folder / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(source)
    daemon.environment["PYTHONPATH"] = str(folder)


def test_tasks_wait_while_no_process_can_be_started(own_daemon: Daemon) -> None:
    flag = own_daemon.folder / "no-process"
    flag.touch()
    with_site(own_daemon, SITE.format(flag=str(flag)))
    own_daemon.start()
    ids = waiting(own_daemon)
    own_daemon.post("/queue/resume")
    assert eventually(lambda: own_daemon.get("/health/ready").status_code == 503)
    assert refused(own_daemon).startswith("No generation process can be started: it died at its start")
    flag.unlink()
    all_done(own_daemon, ids)


def test_tasks_wait_while_no_file_is_left_to_open(own_daemon: Daemon) -> None:
    own_daemon.start()
    own_daemon.get("/health")
    ids = waiting(own_daemon)
    open_files = len(list(Path(f"/proc/{own_daemon.process.pid}/fd").iterdir()))
    _, most = resource.prlimit(own_daemon.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(own_daemon.process.pid, resource.RLIMIT_NOFILE, (open_files + 3, most))
    own_daemon.post("/queue/resume")
    assert eventually(lambda: own_daemon.get("/health/ready").status_code == 503)
    assert eventually(lambda: {own_daemon.status(task_id)["status"] for task_id in ids} == {"queued"})
    resource.prlimit(own_daemon.process.pid, resource.RLIMIT_NOFILE, (most, most))
    all_done(own_daemon, ids)


@pytest.mark.parametrize("before", [0, 1])
def test_a_poisoned_device_ends_its_process_and_the_tasks_behind_run_in_another(
    own_daemon: Daemon, before: int
) -> None:
    with_site(own_daemon, POISON)
    own_daemon.start()
    made = [own_daemon.submit(seed=seed, **QUICK)["task_id"] for seed in range(before)]
    poisoned = own_daemon.submit(prompt="poison", **QUICK)["task_id"]
    behind = [own_daemon.submit(seed=seed, **QUICK)["task_id"] for seed in range(3)]
    state = own_daemon.finish(poisoned)
    assert (state["status"], state["error"]["code"], state["attempts"]) == ("failed", "device_fault", 2)
    assert "an illegal memory access" in state["error"]["message"]
    all_done(own_daemon, made + behind)


def test_the_worker_gives_no_exception_of_torch_to_the_daemon(own_daemon: Daemon) -> None:
    with_site(own_daemon, POISON)
    own_daemon.start()
    own_daemon.run(prompt="poison", **QUICK)
    maps = Path(f"/proc/{own_daemon.process.pid}/maps").read_text()
    assert "libtorch" not in maps


def test_a_task_whose_worker_is_killed_lists_the_files_that_were_whole(own_daemon: Daemon) -> None:
    own_daemon.start()
    task_id = own_daemon.submit(repeat_generation=4, seed=7, **LONG)["task_id"]
    own_daemon.until(task_id, lambda state: state["current_step"] > 2.5 * LONG["num_inference_steps"])
    (worker,) = workers(own_daemon)
    os.kill(worker, signal.SIGKILL)
    state = own_daemon.finish(task_id)
    assert (state["status"], state["error"]["code"]) == ("failed", "worker_died")
    assert [file["seed"] for file in state["files"]] == [7, 8]
    assert [frames(own_daemon.outputs / file["filename"]) for file in state["files"]] == [17, 17]
    assert all(own_daemon.get(f"/download/{file['filename']}").status_code == 200 for file in state["files"])


def test_a_cancelled_task_lists_the_files_that_were_whole(own_daemon: Daemon) -> None:
    own_daemon.start()
    task_id = own_daemon.submit(repeat_generation=4, seed=7, **LONG)["task_id"]
    own_daemon.until(task_id, lambda state: state["current_step"] > 2.5 * LONG["num_inference_steps"])
    own_daemon.delete(f"/queue/{task_id}")
    state = own_daemon.finish(task_id)
    assert (state["status"], [file["seed"] for file in state["files"]]) == ("cancelled", [7, 8])
    listed = {file["filename"] for file in own_daemon.get("/outputs").json()["data"]["files"]}
    assert listed == {file["filename"] for file in state["files"]}


# ---- a card whose driver is broken


def card(folder: Path, address: str, vendor: str, kind: str, driver: str | None) -> None:
    about = folder / address
    about.mkdir(parents=True)
    (about / "vendor").write_text(vendor + "\n")
    (about / "class").write_text(kind + "\n")
    if driver:
        (folder / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        (about / "driver").symlink_to(folder / "drivers" / driver)


@pytest.mark.parametrize(
    ("vendor", "kind", "driver", "found"),
    [
        ("0x10de", "0x030000", "nvidia", True),
        ("0x10de", "0x030200", None, True),
        ("0x10de", "0x030000", "nouveau", False),
        ("0x10de", "0x040300", "snd_hda_intel", False),
        ("0x8086", "0x030000", "i915", False),
    ],
)
def test_a_card_without_a_working_driver_is_found(
    tmp_path: Path, vendor: str, kind: str, driver: str | None, found: bool
) -> None:
    card(tmp_path, "0000:01:00.0", vendor, kind, driver)
    assert devices.broken_card(tmp_path) == ("0000:01:00.0" if found else "")


@pytest.mark.parametrize("cuda_build", [True, False])
def test_auto_is_never_the_cpu_because_a_driver_broke(monkeypatch: pytest.MonkeyPatch, cuda_build: bool) -> None:
    monkeypatch.setattr(devices.torch.version, "cuda", "13.0" if cuda_build else None)
    monkeypatch.setattr(devices, "broken_card", lambda: "0000:01:00.0")
    if cuda_build:
        with pytest.raises(EngineError, match=r"0000:01:00\.0 does not work with this driver") as caught:
            devices.choose_device("auto")
        assert caught.value.code == "no_device"
    else:  # torch for the CPU was installed on purpose
        assert devices.choose_device("auto").type == "cpu"


def test_a_write_that_failed_is_tried_before_the_folder_counts_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quota shows in no other way."""

    def over_quota(*_: Any, **__: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    folder = Folder(tmp_path, "save_path", 1, "1 is needed")
    with monkeypatch.context() as patch:
        patch.setattr("engine.files.place.TemporaryFile", over_quota)
        assert folder.fault() == ""
        folder.suspect = True
        assert folder.fault() == "save_path can't be used now (Disk quota exceeded); bring the folder back"
    assert (folder.fault(), folder.suspect, list(tmp_path.iterdir())) == ("", False, [])


async def test_a_write_that_fails_during_a_look_is_tried_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/health/ready` looks whenever somebody asks it."""
    looking, going_on = threading.Event(), threading.Event()

    def slow_access(*_: Any) -> bool:
        looking.set()
        return going_on.wait(60)

    def over_quota(*_: Any, **__: Any) -> NoReturn:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("engine.files.place.PATIENCE_S", 60)
    monkeypatch.setattr("engine.files.place.TemporaryFile", over_quota)
    place = Place([Folder(tmp_path, "save_path", 1, "1 is needed")])
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", slow_access)
        first = asyncio.create_task(place.look())
        assert await asyncio.to_thread(looking.wait, 60)
        second = asyncio.create_task(place.doubt())
        await asyncio.sleep(0)
        going_on.set()
        assert await first == ""
    assert await second == "save_path can't be used now (Disk quota exceeded); bring the folder back"


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES])
def test_a_folder_whose_disk_fails_is_no_exception_for_whoever_asks_whether_it_is_mounted(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue asks between two tasks, where an exception would end it."""
    folder = Folder(tmp_path, "save_path", 1, "1 is needed")

    def failing(*_: Any, **__: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", failing)
        assert folder.away() == ""
    assert folder.fault() == ""
