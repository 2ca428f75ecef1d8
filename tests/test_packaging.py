"""What is installed, what an import drags in, and what a fresh clone can do."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DIRECT = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
TARGETS = ("demo", "run", "test", "check", "fix", "clean", "install")
SELF_SUFFICIENT = ("demo", "run", "test", "check", "fix")
HEAVY = {"torch", "numpy", "diffusers", "transformers", "accelerate", "peft", "safetensors"}
GPU_SIDE = sorted((ROOT / "engine" / "gpu").rglob("*.py"))
DAEMON_SIDE = [ROOT / "wangpd.py", *sorted({*(ROOT / "engine").rglob("*.py")} - {*GPU_SIDE})]


def name_of(requirement: str) -> str:
    """The distribution's name as PEP 503 spells it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def pins() -> dict[str, str]:
    """Name to version, of every line of constraints.txt that is not a comment."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name_of(name): version for name, _, version in (line.partition("==") for line in lines)}


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those below `if TYPE_CHECKING:`, which only the type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from at_run_time(node)


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, at its top or inside a function; `from a import b` may mean `a.b`."""
    for node in at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(path: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported(path)}


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
    assert {str(path.relative_to(ROOT)) for path in [*DAEMON_SIDE, *GPU_SIDE]} <= set(wheel)


def test_the_wheel_carries_nothing_else(wheel: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info" not in name} == {"wangpd.py", "engine"}


def test_importing_the_daemon_brings_in_neither_torch_nor_numpy() -> None:
    code = f"import sys, wangpd; print(*sorted({HEAVY} & set(sys.modules)))"
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert fresh.stdout.split() == []


@pytest.mark.parametrize("path", DAEMON_SIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_gpu_side_imports_the_heavy_libraries(path: Path) -> None:
    assert top_level(path) & HEAVY == set()


@pytest.mark.parametrize("path", [*DAEMON_SIDE, *GPU_SIDE], ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_imports_the_daemon(path: Path) -> None:
    assert "wangpd" not in top_level(path)


@pytest.mark.parametrize("path", GPU_SIDE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_gpu_side_never_reaches_for_what_the_daemon_owns(path: Path) -> None:
    owned = ("engine.api", "engine.queue", "engine.workers", "engine.files.outputs")
    assert [module for module in imported(path) if module.startswith(owned)] == []
