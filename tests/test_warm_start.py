"""`warm_start`, and what is told of the model that is loaded: the real worker, and the embedded model."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.processes import eventually, workers
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon

QUICK = {"video_length": 5, "num_inference_steps": 2}
LOADED_S = 120  # far above what it takes, so that it only ends a hang


def loads(daemon: Daemon) -> int:
    """How often a model was loaded, by the log."""
    return daemon.log.read_text().count("loaded model wan_demo ")


def is_loaded(daemon: Daemon) -> bool:
    return daemon.get("/models/wan_demo").json()["data"]["loaded"] is True


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that nobody has sent a task, once its model is loaded."""
    with Daemon(tmp_path_factory.mktemp("warm"), warm_start=True, log_level="debug") as daemon:
        assert eventually(lambda: is_loaded(daemon), LOADED_S)
        yield daemon


def test_the_model_is_loaded_before_the_first_task_which_loads_nothing(warm: Daemon) -> None:
    assert loads(warm) == 1
    state = warm.run(**QUICK)
    assert (state["status"], loads(warm)) == ("completed", 1)
    assert state["timings"]["loading"] < state["timings"]["denoising"]  # it is next to nothing


def test_the_configuration_shows_where_the_loaded_model_lies(warm: Daemon) -> None:
    plan = warm.get("/config").json()["data"]["memory_plan"]
    assert plan.startswith("wan_demo: everything in RAM")


def test_what_the_worker_measured_makes_an_estimate(warm: Daemon) -> None:
    found = warm.post("/generate?dry_run=1", {"prompt": "a"}).json()["data"]["estimate"]
    assert found["plan"].startswith("everything in RAM")
    assert found["memory_bytes"] > 10**9


def test_the_plan_goes_with_the_model(warm: Daemon) -> None:
    """The last of this daemon: to load it again for others would take seconds."""
    warm.post("/unload")
    assert warm.get("/config").json()["data"]["memory_plan"] is None


def test_without_warm_start_no_worker_is_started(tmp_path: Path) -> None:
    with StubDaemon(tmp_path / "cold", make_clips) as daemon:
        daemon.post("/queue/pause")
        assert (workers(daemon), is_loaded(daemon)) == (set(), False)
        assert daemon.get("/config").json()["data"]["memory_plan"] is None
        daemon.post("/queue/resume")
        daemon.run(**QUICK)
        assert len(workers(daemon)) == 1
