"""The daemon is killed again and again under load, and keeps its promises; thousands of tasks do not fill its memory.

`make crash` runs the same at full size: CRASH_KILLS, CRASH_TASKS and CRASH_SEED are read from the environment.
"""

import os
import random
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests import crash
from tests.stand_ins import be_quick
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

KILLS = int(os.environ.get("CRASH_KILLS", "12"))
TASKS = int(os.environ.get("CRASH_TASKS", "2000"))
SEED = int(os.environ.get("CRASH_SEED", "0")) or random.randrange(1, 10**6)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def storm(tmp_path_factory: pytest.TempPathFactory) -> crash.Storm:
    """A storm that is over. Its seed is in the output of every test that fails."""
    sys.stdout.write(f"CRASH_SEED={SEED} CRASH_KILLS={KILLS}\n")
    raged = crash.Storm(StubDaemon(tmp_path_factory.mktemp("storm"), make_clips), SEED).rage(KILLS)
    sys.stdout.write(raged.story())
    return raged


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("promise", crash.PROMISES)
def test_whatever_moment_the_daemon_is_killed_at(storm: crash.Storm, promise: str) -> None:
    assert storm.faults[promise] == []


def test_the_storm_had_tasks_of_every_end_and_files(storm: crash.Storm) -> None:
    assert storm.kills.total() >= KILLS
    assert {task["status"] for task in storm.known.ended.values()} >= {"completed", "cancelled"}
    assert any(task["files"] for task in storm.known.ended.values())


def test_an_accepted_task_is_on_the_disk_before_its_answer(tmp_path: Path) -> None:
    daemon = StubDaemon(tmp_path / "own", be_quick)
    daemon.start()
    daemon.post("/queue/pause")
    for count in range(1, 6):
        task_id = daemon.submit(prompt=f"number {count}")["task_id"]
        daemon.process.kill()
        daemon.stop()
        daemon.start()
        assert daemon.status(task_id)["prompt"] == f"number {count}"
    assert [task["id"] for task in daemon.get("/queue").json()["data"]["tasks"]] == [1, 2, 3, 4, 5]
    daemon.stop()


@pytest.fixture
def quick_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: thousands of syncs of a disk would take minutes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def resident_bytes(daemon: StubDaemon) -> int:
    about = Path(f"/proc/{daemon.process.pid}/status").read_text()
    return int(re.findall(r"^VmRSS:\s+(\d+) kB$", about, re.MULTILINE)[0]) * 1024


def run_until(daemon: StubDaemon, session: requests.Session, last_id: int) -> None:
    """Submit tasks up to the id `last_id` and wait until the last has ended."""
    task_id = 0
    while task_id < last_id:
        answer = session.post(f"{daemon.url}/api/v1/generate", json={"prompt": "a red circle"})
        if answer.status_code == 503:  # the queue is full: the submitter is ahead
            time.sleep(0.5)
        else:
            task_id = answer.json()["data"]["task_id"]
    daemon.finish(last_id, timeout=600)


@pytest.mark.timeout(3600)
def test_ten_times_as_many_tasks_take_no_more_memory(tmp_path: Path, quick_disk: Path) -> None:
    daemon = StubDaemon(tmp_path / "own", be_quick, state_path=str(quick_disk))
    with daemon, requests.Session() as session:
        run_until(daemon, session, TASKS // 10)
        early_bytes = resident_bytes(daemon)
        run_until(daemon, session, TASKS)
        assert resident_bytes(daemon) < 1.2 * early_bytes
