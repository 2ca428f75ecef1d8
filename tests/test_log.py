"""The log is what a person wants to read: one line a task, faults once, floods as numbers, and nothing of libraries."""

import asyncio
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine import log as engine_log
from engine.log import Counted
from tests import stand_ins
from tests.daemon import Daemon
from tests.harness import until
from tests.processes import alive, children, command, eventually, maps, workers
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.wire import connected, head

NOISE = re.compile(r"Traceback|Warning|Exception ignored|leaked|resource_tracker")
SMALL = {"num_inference_steps": 1, "video_length": 5}
LONG = {"num_inference_steps": 100, "video_length": 33}


@dataclass
class Life:
    """What a daemon with its real worker left behind after a few tasks, an unload and kills."""

    log: str = ""
    semaphores: set[str] = field(default_factory=set)  # that any of its processes had open
    daemon_fds: list[int] = field(default_factory=list)  # after each of its workers
    zombies: set[int] = field(default_factory=set)


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Life]:
    """Three tasks, a cancel, unloads, kills of the worker at work and at rest, and a stop."""
    seen, daemon = Life(), Daemon(tmp_path_factory.mktemp("life"))
    daemon.start()
    pid = daemon.process.pid

    def look() -> None:
        for process in (pid, *workers(daemon)):
            seen.semaphores |= set(re.findall(r"/dev/shm/(sem\.\S+)", maps(process)))
        seen.daemon_fds.append(len(list(Path(f"/proc/{pid}/fd").iterdir())))

    try:
        for fields in (SMALL, SMALL, SMALL | {"video_length": 1}):
            daemon.run(**fields)
        cancelled = daemon.submit(**LONG)["task_id"]
        daemon.until(cancelled, lambda state: state["current_step"] > 1)
        daemon.delete(f"/queue/{cancelled}")
        daemon.finish(cancelled)
        for _ in range(2):
            look()
            assert daemon.post("/unload").json()["data"]["unloaded"]
            daemon.run(**SMALL)
        (worker,) = workers(daemon)
        os.kill(worker, signal.SIGKILL)
        assert eventually(lambda: not alive(worker))
        daemon.run(**SMALL)
        look()
        killed = daemon.submit(**LONG)["task_id"]
        daemon.until(killed, lambda state: state["current_step"] > 1)
        os.kill(*workers(daemon), signal.SIGKILL)
        daemon.finish(killed)
        daemon.run(**SMALL)
        look()
        seen.zombies = {child for child in children(pid) if not command(child)}
    finally:
        assert daemon.stop() == 0
    seen.log = daemon.log.read_text()
    yield seen


DONE = r"wangpd.queue: task \d completed: wan_demo, 64x64, 5 frames, 1 steps"
LINES = [
    r"wangpd: wangpd \S+ listens on http://\S+",
    *[DONE + r"; \d+\.\d s; \S+_t00000\d-[0-9a-f]{6}_\S+\.mp4"] * 3,
    r"wangpd.queue: task 4 cancelled: wan_demo, 64x64, 33 frames, 100 steps",
    *[r"wangpd.queue: task \d completed: .*"] * 2,
    r"wangpd.engine: the generation process was not fit for work any more; another one is started",
    r"wangpd.queue: task 7 completed: .*",
    r"wangpd.queue: task 8 failed: wan_demo, 64x64, 33 frames: The generation process died while \w+.*",
    r"wangpd.queue: task 9 completed: .*",
]


def test_the_log_of_an_hour_is_one_line_a_task_and_the_problems(life: Life) -> None:
    lines = life.log.splitlines()
    assert [line for line, wanted in zip(lines, LINES, strict=True) if not re.fullmatch(wanted, line)] == []


def test_no_semaphore_is_left_of_any_process(life: Life) -> None:
    assert life.semaphores
    assert [name for name in life.semaphores if (Path("/dev/shm") / name).exists()] == []


def test_each_worker_gives_its_descriptors_back_and_leaves_no_zombie(life: Life) -> None:
    assert max(life.daemon_fds) - min(life.daemon_fds) <= 2  # a connection may just be closing
    assert life.zombies == set()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_daemon_that_ends_says_nothing_of_semaphores(tmp_path: Path, number: signal.Signals) -> None:
    daemon = StubDaemon(tmp_path / "own", stand_ins.ignore, cancel_grace_s=1.0)
    with daemon:
        daemon.until(daemon.submit(prompt="denoising")["task_id"], lambda state: state["phase"] == "denoising")
        others = children(daemon.process.pid)
        daemon.stop(number)
        assert eventually(lambda: not any(map(alive, others)))
    assert not NOISE.search(daemon.log.read_text())


# ---- clients


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    running = StubDaemon(tmp_path / "own", make_clips, max_connections=8, max_queue=1)
    running.start()
    yield running
    running.stop()


def wrong(daemon: Daemon, request: bytes) -> None:
    """Send it and go away without reading the answer."""
    with connected(daemon.url) as channel:
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
        channel.sendall(request)


WRONG = {
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n",
    "half a head": b"GET /api/v1/heal",
    "half a body": head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=99) + b"{",
    "a body that is no JSON": head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=1)
    + b"{",
    "a wait": head("/api/v1/status/1?wait=60"),
    "a length that is none": head("/api/v1/generate", "POST", Content_Length="many"),
    "a download that nobody reads": head("/api/v1/download/none.mp4"),
}


@pytest.mark.parametrize("request_", WRONG.values(), ids=WRONG)
def test_what_a_client_does_wrong_is_no_line_of_the_log(daemon: Daemon, request_: bytes) -> None:
    daemon.submit()
    for _ in range(3):
        wrong(daemon, request_)
    assert daemon.finish(1)["status"] == "completed"
    assert len(daemon.log.read_text().splitlines()) == 2  # that it listens, and the task


def test_a_flood_of_connections_is_one_line(daemon: Daemon) -> None:
    held = [connected(daemon.url) for _ in range(8)]
    for _ in range(100):
        connected(daemon.url).close()
    for channel in held:
        channel.close()
    assert eventually(lambda: "connection refused: 8 are open (max_connections)\n" in daemon.log.read_text())
    assert daemon.log.read_text().count("refused") == 1


def test_refusals_that_are_repeated_are_one_line(daemon: Daemon) -> None:
    daemon.post("/queue/pause")
    codes = [daemon.post("/generate", {"prompt": "a"}).status_code for _ in range(50)]
    assert codes == [200] + [503] * 49
    assert eventually(lambda: "answered 503 to POST /api/v1/generate\n" in daemon.log.read_text())
    assert daemon.log.read_text().count("503") == 1


async def test_a_flood_is_told_as_its_number_each_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_log, "MINUTE_S", 0.05)
    refused = Counted(logging.getLogger("wangpd"))
    for number in range(1235):
        refused.happened(f"connection refused: {number}")
    await until(lambda: len(caplog.messages) > 1)
    assert caplog.messages == ["connection refused: 0", "1,234 times in a minute: connection refused: 1234"]
    await asyncio.sleep(0.2)
    refused.happened("again, after a minute without any")
    assert caplog.messages[2:] == ["again, after a minute without any"]
