"""engine/planning/placement.py's estimate and its answers over HTTP: what a job will need, before it runs."""

import json
import math
import sqlite3
from collections.abc import Iterator
from typing import Any

import pytest

from engine.admission import resolve
from engine.catalog.models import Catalog
from engine.job import EngineError, Job
from engine.planning.machine import GIB, Machine
from engine.planning.placement import Estimate, estimate
from tests.daemon import Daemon
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

CATALOG = Catalog.load()
SMALL, LARGE = (Machine(size * GIB, 64 * GIB, 25e9, 100e12) for size in (12, 80))
TINY = Machine(2**20, 64 * GIB, 25e9, 100e12)
CPU = Machine(0, 16 * GIB, math.inf, 1e11)


def wan(**sent: Any) -> Job:
    return resolve(CATALOG, CATALOG.get("wan_t2v_14B"), {"prompt": "rain", **sent}, {}).job


def taken(job: Job, *machines: Machine, profile: float = 0) -> Estimate | None:
    model = CATALOG.get(job.model)
    return estimate(model, job, machines, profile=profile, quantization="none", vae_config=0)


# ---- the arithmetic


def test_nothing_is_estimated_for_a_machine_that_nobody_measured() -> None:
    assert taken(wan()) is None


def test_the_faster_machine_counts() -> None:
    assert taken(wan(), SMALL, LARGE) == taken(wan(), LARGE) != taken(wan(), SMALL)


def test_a_machine_on_which_it_does_not_fit_is_left_out() -> None:
    assert taken(wan(), TINY, LARGE) == taken(wan(), LARGE)


def test_what_fits_nowhere_says_so() -> None:
    with pytest.raises(EngineError, match=r"'wan_t2v_14B' needs about .* of GPU memory"):
        taken(wan(), TINY)


def test_the_profile_decides() -> None:
    resident, streamed = (taken(wan(), LARGE, profile=profile) for profile in (1, 5))
    assert resident and streamed
    assert resident.seconds
    assert streamed.seconds
    assert (resident.memory_bytes > streamed.memory_bytes, resident.seconds < streamed.seconds) == (True, True)


def test_without_a_card_the_memory_is_ram() -> None:
    found = taken(wan(), CPU)
    assert found and found.memory_bytes > 40e9
    assert found.plan.startswith("everything in RAM")


# ---- through HTTP


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubDaemon]:
    """A daemon, and a journal that can be told what its device is."""
    daemon = StubDaemon(tmp_path_factory.mktemp("measured"), make_clips)
    daemon.start()
    yield daemon
    daemon.stop()


def restarted(daemon: Daemon, machine: Machine) -> Daemon:
    """The daemon once it has found this machine in its journal; no worker runs."""
    daemon.stop()
    with sqlite3.connect(daemon.state / "journal.sqlite") as db:
        db.execute("INSERT OR REPLACE INTO facts VALUES ('machines', ?)", (json.dumps({"auto": vars(machine)}),))
    db.close()
    daemon.start()
    return daemon


def dry(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    data: dict[str, Any] = daemon.post("/generate?dry_run=1", {"prompt": "a", **fields}).json()["data"]
    return data


def test_a_dry_run_estimates_nothing_before_a_worker_has_measured_the_device(measured: Daemon) -> None:
    answer = dry(measured)
    assert (answer["estimate"], answer["estimated_seconds"]) == (None, None)


def test_a_dry_run_tells_memory_time_and_plan_before_any_worker_runs(measured: Daemon) -> None:
    found = dry(restarted(measured, LARGE))["estimate"]
    assert "denoiser resident" in found["plan"]
    assert 0 < found["memory_bytes"] < 2 * GIB
    assert found["seconds"] is None  # the embedded model takes a moment: only overheads, of which a plan knows nothing


def test_what_does_not_fit_is_warned_of_and_accepted(measured: Daemon) -> None:
    daemon = restarted(measured, TINY)
    answer = dry(daemon)
    assert answer["estimate"] is None
    assert "'wan_demo' needs about" in " ".join(answer["warnings"])
    task = daemon.submit()
    assert task["warnings"] == answer["warnings"]
    assert daemon.finish(task["task_id"])["status"] == "completed"


def test_what_such_tasks_took_counts_more_than_arithmetic(measured: Daemon) -> None:
    daemon = restarted(measured, CPU)
    steps = {"num_inference_steps": 100}  # much more than its file takes, which the first task says little of
    daemon.run(**steps)
    answer = dry(daemon, **steps)
    assert answer["estimate"]["seconds"] == answer["estimated_seconds"] > 0
