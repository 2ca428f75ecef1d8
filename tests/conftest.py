"""What every test may ask for."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import ROOT, Daemon

# The tiny checkpoints are made in this process, some of classes that import torchvision. Last: a real one wins.
sys.path.append(str(ROOT / "tests" / "torchvision_stand_in"))


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that leave no trace in it but tasks and files; its model is the embedded one."""
    with Daemon(tmp_path_factory.mktemp("daemon")) as running:
        yield running


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon for one test that changes or kills it. Not started; stopped at the end in any case."""
    running = Daemon(tmp_path / "own")
    try:
        yield running
    finally:
        running.stop()
