"""The shape of the code: the limits hold, and tools/shape.py finds each kind of fault."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon import ROOT
from tools import shape

FILES = shape.sources(ROOT)


@pytest.mark.parametrize("rule", shape.RULES)
def test_the_code_keeps(rule: str) -> None:
    assert list(shape.RULES[rule](FILES)) == []


def test_every_file_of_the_product_is_measured() -> None:
    paths = {ROOT / "wangpd.py", *(ROOT / "engine").rglob("*.py")}
    assert {ROOT / source.path for source in FILES} == paths
    assert shape.figures(FILES)["product lines"] == sum(len(path.read_text().splitlines()) for path in paths)


# ------------------------------------------------------------------------------------------------------- the checker


def house(folder: Path, **texts: str) -> Path:
    """A product of small files: its spine, and `texts`, a double underscore for each slash."""
    for path in shape.SPINE:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("")
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def found(folder: Path, **texts: str) -> dict[str, list[str]]:
    """The faults of a house, by rule; rules that hold are left out."""
    files = shape.sources(house(folder, **texts))
    return {name: faults for name, rule in shape.RULES.items() if (faults := list(rule(files)))}


def function(lines: int) -> str:
    return "def long() -> None:\n" + "    print()\n" * (lines - 1)


def class_of(lines: int) -> str:
    return "class Long:\n" + "    a = 1\n" * (lines - 1)


def test_a_house_without_faults_has_none(tmp_path: Path) -> None:
    good = {
        "wangpd": "from engine.api import views\nfrom engine import job\n",
        "engine__api__views": "from engine.queue.runner import Runner\n" + function(40),
        "engine__queue__runner": "class Runner:\n    def views(self, runner: int) -> int:\n        return runner\n",
        "engine__workers__local": "from engine.gpu import worker\n",
        "engine__gpu__worker": "import torch\nfrom engine import job\n" + class_of(250),
        "engine__queue__tasks": "a = 1\n" * 400,
    }
    assert found(tmp_path, **good) == {}


@pytest.mark.parametrize(
    ("rule", "texts", "fault"),
    [
        ("no file is too long", {"engine__job": "a = 1\n" * 401}, "engine/job.py: 401 lines, at most 400"),
        ("no file is too long", {"wangpd": "a = 1\n" * 901}, "wangpd.py: 901 lines, at most 900"),
        ("no class is too long", {"engine__job": class_of(251)}, "engine/job.py: Long has 251 lines, at most 250"),
        ("no function is too long", {"engine__job": function(41)}, "engine/job.py: long has 41 lines, at most 40"),
        (
            "no function is too long",
            {"engine__job": "class Job:\n" + "".join(f"    {line}\n" for line in function(41).splitlines())},
            "engine/job.py: long has 41 lines, at most 40",
        ),
        (
            "the spine is read in an hour",
            dict.fromkeys(("wangpd", "engine__job", "engine__settings", "engine__queue__runner"), "a = 1\n" * 400)
            | {"engine__workers__local": "a = 1\n" * 400, "wangpd": "a = 1\n" * 900, "engine__gpu__worker": "a = 1\n"},
            "2501 spine lines, at most 2500",
        ),
        (
            "the product is small",
            {f"engine__part{number}": "a = 1\n" * 400 for number in range(33)},
            "13200 product lines, at most 12850",
        ),
        (
            "no file name is used twice",
            {"engine__queue__job": ""},
            "file name job twice: engine/job.py and engine/queue/job.py",
        ),
        (
            "no class name is used twice",
            {"engine__job": "class Task:\n    pass\n", "engine__queue__tasks": "class Task:\n    pass\n"},
            "class Task twice: engine/job.py and engine/queue/tasks.py",
        ),
        (
            "no local hides a name of its module",
            {"engine__job": "def key() -> int:\n    return 1\n\n\ndef other() -> int:\n    key = 2\n    return key\n"},
            "engine/job.py:5: key hides key of the module",
        ),
        (
            "no local hides a name of its module",
            {"engine__job": "class Key:\n    def of(self, Key: int) -> int:\n        return Key\n"},
            "engine/job.py:2: Key hides Key of the module",
        ),
        (
            "no local hides a name of its module",
            {"engine__job": "def key() -> int:\n    return 1\n\n\ntwice = lambda key: 2 * key\n"},
            "engine/job.py:5: key hides key of the module",
        ),
        (
            "imports point down",
            {
                "engine__queue__tasks": "def late() -> None:\n    from engine.api import views\n",
                "engine__api__views": "",
            },
            "engine/queue/tasks.py: imports engine.api.views, which stands above it",
        ),
        (
            "imports point down",
            {"engine__job": "import wangpd\n"},
            "engine/job.py: imports wangpd, which stands above it",
        ),
        (
            "only the GPU's side imports torch",
            {"engine__job": "def size() -> int:\n    from torch.nn import Module\n"},
            "engine/job.py: imports torch, which only engine/gpu may",
        ),
        (
            "the worker is the only door between daemon and GPU",
            {"engine__workers__local": "from engine.gpu.run.render import frames\n"},
            "engine/workers/local.py: imports engine.gpu.run.render; outside engine/gpu only its worker is named",
        ),
        (
            "the worker is the only door between daemon and GPU",
            {"engine__gpu__worker": "from engine.queue import runner\n"},
            "engine/gpu/worker.py: imports engine.queue.runner, which the daemon owns",
        ),
    ],
)
def test_a_fault_is_found_and_no_other(rule: str, texts: dict[str, str], fault: str, tmp_path: Path) -> None:
    assert found(tmp_path, **texts) == {rule: [fault]}


def test_a_circle_is_found_through_type_checking_and_functions(tmp_path: Path) -> None:
    texts = {
        "engine__job": "def late() -> None:\n    from engine.settings import ROWS\n",
        "engine__settings": "if TYPE_CHECKING:\n    from engine import other\n",
        "engine__other": "from engine.job import Job\n",
    }
    ((rule, (fault,)),) = found(tmp_path, **texts).items()
    assert rule == "no import circle"
    steps = fault.removeprefix("import circle: ").split(" → ")
    assert set(steps) == {"engine.job", "engine.settings", "engine.other"}
    assert steps[0] == steps[-1]


def test_a_spine_that_lacks_a_file_is_found(tmp_path: Path) -> None:
    (house(tmp_path) / "engine" / "settings.py").unlink()
    files = shape.sources(tmp_path)
    assert list(shape.RULES["the spine is complete"](files)) == ["the spine lacks engine/settings.py"]


@pytest.mark.parametrize(("text", "code"), [("", 0), (function(41), 1)])
def test_the_command_prints_the_figures_and_ends_with_1_at_a_fault(text: str, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.shape", str(house(tmp_path, engine__other=text))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert f"product lines: {41 * code}\n" in done.stdout
    assert ("long has 41 lines" in done.stdout) == bool(code)
