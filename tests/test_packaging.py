"""What is installed, what an import drags in, and what a fresh clone can do."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from tools.shape import HEAVY

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
TARGETS = ("demo", "run", "test", "check", "fix", "clean", "install")
SELF_SUFFICIENT = ("demo", "run", "test", "check", "fix")
MODULES = [ROOT / "wangpd.py", *(ROOT / "engine").rglob("*.py")]


def name_of(requirement: str) -> str:
    """The distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def pins() -> dict[str, str]:
    """Name to version, of every line of constraints.txt that is not a comment."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name_of(name): version for name, _, version in (line.partition("==") for line in lines)}


@pytest.mark.parametrize("requirement", DIRECT)
def test_every_dependency_says_what_it_is_for(requirement: str) -> None:
    (line,) = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if f'    "{requirement}",' in line]
    assert re.search(r",  # \w.{10,}", line)


@pytest.mark.parametrize("requirement", DIRECT)
def test_every_direct_dependency_is_pinned(requirement: str) -> None:
    assert name_of(requirement) in pins()


def test_pins_are_plain_versions() -> None:
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins().values())  # no +cpu, no file, no editable line


@pytest.mark.parametrize("target", TARGETS)
def test_make_knows_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("target", SELF_SUFFICIENT)
def test_the_target_sets_up_its_own_environment(target: str, tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    plan = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert plan.index("-m venv .venv") < plan.index("pip install") < plan.index("touch .venv/.installed")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names in a wheel built from a copy of the sources (a build leaves files behind), with no network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "wangpd.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "engine", source / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "-w", target, source], check=True)
    (built,) = target.glob("wangpd-*.whl")
    return zipfile.ZipFile(built).namelist()


@pytest.mark.parametrize("folder", ["engine/catalog", "engine/demo"])
def test_the_wheel_carries_the_data(wheel: list[str], folder: str) -> None:
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix != ".pyc")
    there = {str(path.relative_to(ROOT)) for path in files}
    assert there
    assert there <= set(wheel)


def test_the_wheel_carries_every_module(wheel: list[str]) -> None:
    assert {str(path.relative_to(ROOT)) for path in MODULES} <= set(wheel)


def test_the_wheel_carries_nothing_else(wheel: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info" not in name} == {"wangpd.py", "engine"}


def test_importing_the_daemon_brings_in_neither_torch_nor_numpy() -> None:
    code = f"import sys, wangpd; print(*sorted({set(HEAVY)} & set(sys.modules)))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == []
