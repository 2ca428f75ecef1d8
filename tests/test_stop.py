"""The end of the daemon: who waits is answered, every signal has an end in order, and nobody delays it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import wangpd
from tests import stand_ins
from tests.daemon import Daemon
from tests.processes import alive, children, eventually, workers
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.test_restart import begun, queued, row
from tests.wire import answered, connected, head

FILE_BYTES = 64 * 2**20  # more than the sockets of both ends hold


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[StubDaemon]:
    """A daemon whose worker stays in a phase until it is cancelled."""
    running = StubDaemon(tmp_path / "own", stand_ins.obey)
    running.start()
    yield running
    running.stop(signal.SIGKILL)


@pytest.fixture
def stubborn(tmp_path: Path) -> Iterator[StubDaemon]:
    """A daemon whose worker ends only by force, after a while."""
    running = StubDaemon(tmp_path / "own", stand_ins.ignore, cancel_grace_s=5.0)
    running.start()
    yield running
    running.stop(signal.SIGKILL)


def ended(daemon: Daemon) -> int:
    """Its exit code, once it has ended by a signal that it has got already."""
    return daemon.process.wait(60)


class Waiting(threading.Thread):
    """A client in `?wait=60`; `states` are the status that it got, and whether the daemon still ran then."""

    def __init__(self, daemon: Daemon, task_id: int) -> None:
        super().__init__()
        self.answer: tuple[int, str, bool] | None = None
        self._daemon, self._task_id, self._process = daemon, task_id, daemon.process
        self.start()

    def run(self) -> None:
        answer = self._daemon.get(f"/status/{self._task_id}?wait=60")
        self.answer = answer.status_code, answer.json()["data"]["status"], self._process.poll() is None

    def answers(self) -> tuple[int, str, bool] | None:
        """What it got, once it has."""
        self.join(30)
        return self.answer


def waiting(daemon: Daemon, *task_ids: int) -> list[Waiting]:
    """Clients that wait for these tasks, each of which the daemon has heard."""
    clients = [Waiting(daemon, task_id) for task_id in task_ids]
    time.sleep(0.5)  # a wait that the daemon has begun can't be seen from outside
    return clients


# ---- who waits is answered


def test_clients_that_wait_for_any_task_get_its_state_at_a_stop(daemon: Daemon) -> None:
    running, behind = begun(daemon, "denoising"), daemon.submit()["task_id"]
    clients = waiting(daemon, running, behind, running)
    daemon.process.send_signal(signal.SIGTERM)
    answers = [client.answers() for client in clients]
    assert [answer and answer[:2] for answer in answers] == [(200, "processing"), (200, "queued"), (200, "processing")]
    assert ended(daemon) == 0


def test_they_are_answered_before_the_running_task_is_stopped(stubborn: Daemon) -> None:
    (client,) = waiting(stubborn, begun(stubborn, "denoising"))
    stubborn.process.send_signal(signal.SIGTERM)
    assert client.answers() == (200, "processing", True)
    assert stubborn.process.poll() is None  # its worker has five seconds


def test_a_wait_that_begins_during_the_stop_is_answered_at_once(stubborn: Daemon) -> None:
    task_id = begun(stubborn, "denoising")
    stubborn.process.send_signal(signal.SIGTERM)
    assert eventually(lambda: stubborn.get("/health/ready").status_code == 503)
    assert Waiting(stubborn, task_id).answers() == (200, "processing", True)


def test_a_stop_with_clients_that_wait_takes_no_longer(daemon: Daemon) -> None:
    waiting(daemon, *[begun(daemon, "denoising")] * 5)
    began = time.monotonic()
    assert daemon.stop() == 0
    assert time.monotonic() - began < wangpd.DRAIN_S  # it was twice that with each of them


# ---- connections at a stop


def test_a_download_under_way_is_finished(daemon: Daemon) -> None:
    with (daemon.outputs / "large.mp4").open("wb") as file:
        file.truncate(FILE_BYTES)
    with connected(daemon.url) as channel:
        channel.sendall(head("/api/v1/download/large.mp4"))
        read = len(channel.recv(1000))
        daemon.process.send_signal(signal.SIGTERM)
        while data := channel.recv(2**20):
            read += len(data)
    assert read > FILE_BYTES
    assert ended(daemon) == 0


def test_clients_that_do_nothing_delay_a_stop_by_no_more_than_their_time(daemon: Daemon) -> None:
    with (daemon.outputs / "large.mp4").open("wb") as file:
        file.truncate(FILE_BYTES)
    body = head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=100)
    with connected(daemon.url) as idle, connected(daemon.url) as reader, connected(daemon.url) as sender:
        idle.sendall(head("/api/v1/health"))
        assert answered(idle)
        reader.sendall(head("/api/v1/download/large.mp4"))
        reader.recv(1000)
        sender.sendall(body + b'{"prompt":')
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < 2 * wangpd.DRAIN_S


def test_a_connection_without_a_request_is_closed_at_once(daemon: Daemon) -> None:
    with connected(daemon.url) as silent, connected(daemon.url) as idle:
        idle.sendall(head("/api/v1/health"))
        assert answered(idle)
        daemon.process.send_signal(signal.SIGTERM)
        assert (silent.recv(1), idle.recv(1)) == (b"", b"")
    assert ended(daemon) == 0


# ---- signals

ORDERLY = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


@pytest.mark.parametrize("number", ORDERLY, ids=lambda number: number.name)
def test_every_signal_that_ends_it_puts_the_task_back_without_counting_the_attempt(
    daemon: Daemon, number: signal.Signals
) -> None:
    task_id, behind = begun(daemon, "denoising"), daemon.submit()["task_id"]
    for _ in range(3):  # more than max_attempts
        assert daemon.stop(number) == 0
        assert row(daemon, task_id) == ("queued", 0, None)
        daemon.start()
        assert queued(daemon) == [task_id, behind]
        daemon.until(task_id, lambda state: state["phase"] == "denoising")


@pytest.mark.parametrize("number", ORDERLY, ids=lambda number: number.name)
def test_a_signal_that_reaches_all_processes_is_an_orderly_end_too(daemon: Daemon, number: signal.Signals) -> None:
    task_id = begun(daemon, "denoising")
    (worker,), others = workers(daemon), children(daemon.process.pid)
    for pid in (daemon.process.pid, *others):
        os.kill(pid, number)
    assert ended(daemon) == 0
    assert row(daemon, task_id) == ("queued", 0, None)
    assert not alive(worker)


@pytest.mark.parametrize("number", ORDERLY, ids=lambda number: number.name)
def test_a_signal_to_the_group_while_the_worker_is_spawned_costs_no_task(
    tmp_path: Path, number: signal.Signals
) -> None:
    with StubDaemon(tmp_path / "own", stand_ins.obey) as daemon:
        task_id = daemon.submit(prompt="denoising")["task_id"]
        assert eventually(lambda: bool(workers(daemon)))
        for pid in (daemon.process.pid, *workers(daemon)):
            os.kill(pid, number)
        assert ended(daemon) == 0
        assert row(daemon, task_id) == ("queued", 0, None)
        assert "Traceback" not in daemon.log.read_text()


def test_a_terminal_that_hangs_up_twice_is_an_orderly_end(stubborn: Daemon) -> None:
    task_id = begun(stubborn, "denoising")
    for _ in range(2):  # the shell and the kernel send it
        stubborn.process.send_signal(signal.SIGHUP)
        assert eventually(lambda: stubborn.get("/health/ready").status_code == 503)
    assert ended(stubborn) == 0
    assert row(stubborn, task_id) == ("queued", 0, None)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE], ids=lambda number: number.name)
def test_signals_that_mean_nothing_to_it_do_not_end_it(daemon: Daemon, number: signal.Signals) -> None:
    task_id = begun(daemon, "denoising")
    daemon.process.send_signal(number)
    for _ in range(10):
        assert daemon.status(task_id)["status"] == "processing"
    assert daemon.stop() == 0


def test_under_nohup_a_hangup_changes_nothing(tmp_path: Path) -> None:
    daemon = StubDaemon(tmp_path / "own", make_clips)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        daemon.start()
    finally:
        signal.signal(signal.SIGHUP, before)
    daemon.process.send_signal(signal.SIGHUP)
    assert daemon.run()["status"] == "completed"
    assert daemon.get("/health/ready").status_code == 200
    assert daemon.stop() == 0


@pytest.mark.parametrize("delay_s", [0.0, 0.2, 0.4, 0.6])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_it_starts_ends_it_and_the_next_start_works(
    tmp_path: Path, number: signal.Signals, delay_s: float
) -> None:
    daemon = StubDaemon(tmp_path / "own", make_clips)
    daemon.launch()
    time.sleep(delay_s)
    process: Any = daemon.process
    assert daemon.stop(number) in (0, -number)
    assert not alive(process.pid)
    daemon.start()
    assert daemon.run()["status"] == "completed"
    assert daemon.stop() == 0
