"""Whatever clients, the machine and time do to the daemon, it keeps its promises: see tests/soak.py.

`make soak` runs the same for ten minutes: SOAK_S, SOAK_SEED and SOAK_PHASES are read from the environment.
"""

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import soak
from tests.daemon import ROOT
from tests.processes import alive, children, eventually
from tests.raiders import RAIDS

SECONDS = float(os.environ.get("SOAK_S", "60"))
SEED = int(os.environ.get("SOAK_SEED", "0")) or random.randrange(1, 10**6)
PHASES = [name for name in os.environ.get("SOAK_PHASES", "").split(",") if name]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a soak that is over. Its seed, and what was played, is in the output of every test that fails."""
    missing = sorted(set(PHASES or soak.PHASES) - set(soak.possible(PHASES)))
    sys.stdout.write(f"SOAK_SEED={SEED} SOAK_S={SECONDS:.0f}\n")
    sys.stdout.write(f"not played, since no disk can be mounted here: {', '.join(missing)}\n" if missing else "")
    told = soak.launched(tmp_path_factory.mktemp("soak"), SECONDS, SEED, PHASES)
    sys.stdout.write("\n".join([*told["diary"], told["story"], told["crashed"]]))
    return told


def test_the_soak_is_played_to_its_end(report: dict[str, Any]) -> None:
    assert report["crashed"] == ""


@pytest.mark.parametrize("promise", soak.PROMISES)
def test_in_all_weathers(report: dict[str, Any], promise: str) -> None:
    assert report["faults"][promise] == []


def test_every_phase_that_the_machine_allows_is_played(report: dict[str, Any]) -> None:
    assert set(report["phases"]) == set(soak.possible(PHASES))


def test_every_hostile_client_comes_and_tasks_of_every_end_are_seen(report: dict[str, Any]) -> None:
    assert set(report["raids"]) == set(RAIDS)
    assert {"completed", "cancelled"} <= set(report["ends"])
    assert report["ready"]["all is well"] > 0


def test_a_soak_whose_starter_is_killed_leaves_no_process_and_no_disk(tmp_path: Path) -> None:
    command = f"from tests import soak; from pathlib import Path; soak.launched(Path({str(tmp_path)!r}), 60, 1)"
    with subprocess.Popen([sys.executable, "-c", command], cwd=ROOT) as starter:
        assert eventually(lambda: (tmp_path / "own" / "log").exists() and len(family(starter.pid)) > 3, 60)
        left = family(starter.pid)
        starter.kill()
    assert eventually(lambda: not any(map(alive, left)), 60)
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def family(pid: int) -> set[int]:
    """The pids of all that it has started."""
    try:
        born = children(pid)
    except OSError:
        return set()
    return born.union(*map(family, born))
