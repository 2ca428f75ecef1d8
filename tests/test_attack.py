"""No client and no request takes the daemon down, or keeps honest clients waiting: see tests/attack.py.

`make attack` makes all attacks at full size and asserts the limits in time too; `make test` makes a small sample of
each, on a machine that may be busy, and asserts what does not depend on time. ATTACK_SCALE and ATTACK_ONLY (names,
parted by commas) are read from the environment.
"""

import os
import sys
from collections.abc import Iterator

import pytest

from tests.attack import SETTLE_S, TITLE, Siege
from tests.attacks import ATTACKS
from tests.processes import eventually

SCALE = float(os.environ.get("ATTACK_SCALE", "0.01"))
ONLY = [name for name in os.environ.get("ATTACK_ONLY", "").split(",") if name]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300 + 900 * min(1.0, SCALE))]


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    """One daemon, one proxy and the honest clients, for all attacks."""
    with Siege(tmp_path_factory.mktemp("siege"), SCALE) as running:
        sys.stdout.write(f"\n{TITLE}\n")
        yield running
        sys.stdout.write(f"\n\n{running.report()}\n")


@pytest.mark.parametrize("name", ONLY or list(ATTACKS))
def test_no_attack_hurts(siege: Siege, name: str) -> None:
    row = siege.endure(name, ATTACKS[name])
    sys.stdout.write(f"\r{row}\n")
    assert row.broken + (row.slow if SCALE >= 1 else []) == []


def test_all_attacks_together_leave_nothing_behind(siege: Siege) -> None:
    siege.endure("quiet", lambda _: None)
    assert eventually(lambda: siege.left_behind() == [], SETTLE_S), siege.left_behind()
