"""wangpd.service: systemd understands it, it shuts what it can, and it leaves open what CUDA needs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parent.parent / "wangpd.service"
MAX_EXPOSURE = 2.0

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None,
    reason="needs systemd-analyze (Debian package systemd; .ci/run installs it)",
)


def directives() -> list[tuple[str, str]]:
    """Every `Key=value` of the unit, in order; comments and section heads left out."""
    lines = [line.partition("=") for line in UNIT.read_text().splitlines() if line and line[0] not in "#["]
    return [(key, value) for key, _, value in lines]


def values(key: str) -> list[str]:
    return [value for name, value in directives() if name == key]


@pytest.fixture
def runnable(tmp_path: Path) -> Path:
    """A copy of the unit whose program exists on every machine: the real one is there only after `make install`."""
    copy = tmp_path / UNIT.name
    copy.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text(), flags=re.MULTILINE))
    return copy


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, check=False)


@needs_systemd_analyze
def test_systemd_has_no_complaint_about_the_unit(runnable: Path) -> None:
    result = analyze("verify", "--man=no", str(runnable))
    assert (result.returncode, result.stdout, result.stderr) == (
        0,
        "",
        "",
    )  # an unknown key is only a warning: exit code 0


@needs_systemd_analyze
def test_the_exposure_that_systemd_computes_is_low(runnable: Path) -> None:
    result = analyze("security", "--offline=true", "--no-pager", str(runnable))
    overall = re.search(r"Overall exposure level for wangpd.service: ([\d.]+)", result.stdout)
    assert overall, result.stderr
    assert float(overall[1]) <= MAX_EXPOSURE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("WatchdogSec", "30"),
        ("KillMode", "mixed"),
        ("TimeoutStopSec", "30"),
        ("Restart", "on-failure"),
        ("RestartPreventExitStatus", "2"),
        ("OOMPolicy", "continue"),
        ("ProtectSystem", "strict"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
    ],
)
def test_the_unit_says(key: str, value: str) -> None:
    assert values(key) == [value]


@pytest.mark.parametrize("nodes", ["char-nvidia*", "char-drm", "char-kfd"])
def test_gpu_device_nodes_stay_reachable(nodes: str) -> None:
    assert values("PrivateDevices") == ["no"]
    assert nodes in [value.split()[0] for value in values("DeviceAllow")]


@pytest.mark.parametrize("key", ["MemoryDenyWriteExecute", "IPAddressDeny", "PrivateNetwork"])
def test_what_would_stop_cuda_or_the_lan_is_left_out(key: str) -> None:
    assert values(key) == []


def test_cuda_can_read_the_kernels_tables() -> None:
    assert values("ProcSubset") == ["all"]  # `pid` hides /proc/devices and /proc/driver/nvidia


def test_every_folder_the_daemon_is_told_to_write_is_one_the_unit_makes() -> None:
    (command,) = values("ExecStart")
    told = re.findall(r"--(?:save|state)-path (\S+)", command)
    made = [f"/var/lib/{name}" for name in values("StateDirectory")[0].split()]
    assert len(told) == 2
    assert set(told) <= set(made)


def test_caches_of_compiled_kernels_and_weights_outlive_a_restart() -> None:
    places = dict(pair.split("=") for value in values("Environment") for pair in value.split())
    cached = [f"/var/cache/{name}" for name in values("CacheDirectory")[0].split()]
    assert {"HOME", "HF_HOME", "TORCHINDUCTOR_CACHE_DIR"} <= set(places)
    assert all(any(place.startswith(folder) for folder in cached) for place in places.values())
