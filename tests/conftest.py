"""What every test may ask for, and how the tests are spread over the processes of `pytest -n`."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.daemon import ROOT, Daemon

# Before torch is imported: the models are tiny, and threads that spin for each other on a busy machine cost more than
# they compute. Daemons, workers and commands inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Ctrl-C is ignored in what nohup or a script started in the background, and every child would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# By default an example that takes more than 0.2 s fails: on a busy machine any may.
# The same examples each time, and none kept in a file: a fault that is found once is found again.
settings.register_profile(
    "wangpd", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("wangpd")

# The tiny checkpoints are made in this process, some of classes that import torchvision. Last: a real one wins.
sys.path.append(str(ROOT / "tests" / "torchvision_stand_in"))

# Started first, so that no process is left alone with one of them at the end; in the order of their CPU seconds.
LONGEST = (
    "team",
    "bench",
    "engine",
    "models",
    "downloads",
    "openapi",
    "soak",
    "crash",
    "compiling",
    "caching",
    "generation",
)


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that leave no trace in it but tasks and files; its model is the embedded one."""
    with Daemon(tmp_path_factory.mktemp("daemon"), log_level="debug") as running:
        yield running


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon for one test that changes or kills it. Not started; stopped at the end in any case."""
    running = Daemon(tmp_path / "own")
    try:
        yield running
    finally:
        running.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, the others in the order of their names."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))  # stable


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out whole files, whose tests share daemons and models; of the proofs, all tasks of a model."""
    from xdist.scheduler import LoadScopeScheduling

    from engine.catalog.models import Catalog

    bases = {model.id: model.base or model.id for model in Catalog.load()}

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            model_id = test.partition("[")[2].rpartition("-")[0]
            return f"{file}::{bases[model_id]}" if file.endswith("test_models.py") and model_id in bases else file

    config.option.loadscopereorder = False  # it would put the files with the most tests first, not the longest
    return Units(config, log)
