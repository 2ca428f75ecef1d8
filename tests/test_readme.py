"""What README.md says is so: its tables, commands, links and examples are compared with the code."""

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import wangpd
from engine.admission import BadRequest, resolve
from engine.api.viewers import VIEWERS
from engine.catalog import weights
from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.models import Catalog, Model, Pipeline
from tests.daemon import ROOT

TEXT = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
UNIT = (ROOT / "wangpd.service").read_text()
MODELS = list(Catalog.load())


def table(header: str) -> list[list[str]]:
    """The cells of each row of the table that begins with this line."""
    _, _, rest = TEXT.partition(f"\n{header}\n")
    assert rest, f"README has no table {header}"
    rows = rest.split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def blocks(language: str) -> list[str]:
    """The code blocks of this language; an empty one finds those without."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def code(cell: str) -> str:
    """The first thing in backticks."""
    found = re.search(r"`([^`]+)`", cell)
    assert found, cell
    return found[1]


# ---- the configuration

KEY_ROWS = {code(row[0]): row for row in table("| key | default | what it is |")}


def literal(value: Any) -> Any:
    """A default as TOML reads it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def test_the_table_of_keys_has_every_key_and_no_other() -> None:
    assert set(KEY_ROWS) == set(wangpd.KEYS)


@pytest.mark.parametrize("name", wangpd.KEYS)
def test_a_key_has_its_default_and_configs_own_words(name: str) -> None:
    _, default, why = KEY_ROWS[name]
    field = wangpd.KEYS[name]
    assert tomllib.loads(f"{name} = {code(default)}") == {name: literal(field.default)}
    assert why == field.metadata["why"]


# ---- the models

FAMILY_ROWS = {row[0]: row for row in table("| family | kind | models | tasks |")}
FAMILIES = sorted({model.family for model in MODELS})


def test_the_table_of_families_has_every_family_and_no_other() -> None:
    assert list(FAMILY_ROWS) == FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_described_as_the_catalogue_has_it(family: str) -> None:
    _, kinds, ids, tasks = FAMILY_ROWS[family]
    members = [model for model in MODELS if model.family == family]
    assert kinds.split(", ") == sorted({model.kind for model in members})
    assert re.findall(r"`([^`]+)`", ids) == [model.id for model in members]
    assert tasks.split(", ") == [task for task in TASKS if any(task in model.pipelines for model in members)]


def test_the_table_of_inputs_has_every_input_and_its_tasks() -> None:
    rows = {code(row[0]): row[1:] for row in table("| field | what it is | tasks |")}
    tasks = {name: [task for task in TASKS if name in TASKS[task].inputs] for name in INPUTS}
    assert rows == {name: [about.about, ", ".join(tasks[name])] for name, about in INPUTS.items()}


def test_the_form_of_a_catalogue_file_is_told_key_by_key() -> None:
    form = (ROOT / "engine" / "catalog" / "models" / "README.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", form, re.MULTILINE)
    told = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    keys = {field.name for kind in (Pipeline, Model) for field in dataclasses.fields(kind)}
    assert told == keys - {"cls"}


def test_the_command_that_installs_a_model_is_the_one_that_the_daemon_tells(tmp_path: Path) -> None:
    (command,) = re.findall(r"^\.venv/bin/(wangpd models download \S+)$", TEXT, re.MULTILINE)
    model = Catalog.load().get(command.split()[-1])
    assert weights.remedy(model, tmp_path) == f"install it with: {command}"


def test_the_variables_that_are_named_are_those_that_the_hubs_client_reads() -> None:
    known = Path(constants.__file__).read_text()
    named = set(re.findall(r"`(HF_[A-Z_]+)", TEXT))
    assert named >= {"HF_HOME", "HF_HUB_CACHE", "HF_TOKEN", "HF_HUB_OFFLINE", "HF_ENDPOINT"}
    assert [name for name in named if f'"{name}"' not in known and name != "HF_TOKEN"] == []


def test_the_example_of_a_new_model_is_one(tmp_path: Path) -> None:
    (entry,) = blocks("toml")
    (tmp_path / "anything.toml").write_text(entry)
    models = Catalog.load(tmp_path)
    job = resolve(models, models.get("my_wan"), {"prompt": "a cat"}, {}).job
    assert (job.frames, job.steps) == (81, 8)


# ---- the API


def told_calls() -> set[tuple[str, str]]:
    """Method and path of each row."""
    words = [code(row[0]).split() for row in table("| call | | what it does |")]
    return {(method, path if path.startswith("/api") else f"{wangpd.API}{path}") for method, path in words}


def test_the_table_of_calls_has_every_call_and_no_other() -> None:
    paths = {(route.method, re.sub(r"\{(\w+):.+\}", r"{\1}", route.path)) for route in wangpd.routes}
    there = {(method, path) for method, path in paths if path != wangpd.API}
    pages = {("GET", f"/api/{name}") for name in VIEWERS}
    assert told_calls() == there | pages


def test_a_call_is_marked_exactly_if_wangps_api_does_not_have_it() -> None:
    marked = {code(row[0]) for row in table("| call | | what it does |") if row[1] == "+"}
    added = (
        "/health/ready",
        "/load",
        "}/download",
        "/unload",
        "/loras",
        "/pause",
        "/resume",
        "/retry",
        "/tasks",
        "PATCH ",
    )
    rows = {code(row[0]) for row in table("| call | | what it does |")}
    assert marked == {call for call in rows if any(part in call for part in added)}


def test_the_example_of_an_error_is_what_the_daemon_says() -> None:
    (example,) = blocks("json")
    models = Catalog.load()
    with pytest.raises(BadRequest) as caught:
        resolve(models, models.get("wan_t2v_14B"), {"prompt": "a cat", "resolution": "830x480"}, {})
    assert json.loads(example) == {"detail": str(caught.value)}


@pytest.mark.parametrize("row", table("| `code` | what happened | what helps |"), ids=lambda row: code(row[0]))
def test_a_code_of_the_errors_is_one_that_the_engine_gives(row: list[str]) -> None:
    sources = [path.read_text() for path in (ROOT / "engine").rglob("*.py")]
    assert any(f'"{code(row[0])}"' in source for source in sources)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?: = [^`]*)?`", TEXT))))
def test_a_name_with_underscores_in_the_text_is_one_that_the_code_knows(name: str) -> None:
    sources = [
        ROOT / "wangpd.py",
        *(ROOT / "engine").rglob("*.py"),
        *(ROOT / "engine" / "catalog" / "models").glob("*.toml"),
    ]
    assert any(re.search(rf"\b{name}\b", path.read_text()) for path in sources)


# ---- commands


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"^(?:sudo )?make ([a-z]+)", "\n".join(blocks("")), re.MULTILINE))
    named |= set(re.findall(r"`(?:sudo )?make ([a-z]+)", TEXT))
    assert named >= {"demo", "run", "test", "check", "fix", "install"}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in named)


def test_every_curl_example_is_run_by_a_test() -> None:
    assert blocks("bash")
    assert all(block.startswith(("curl ", "B=")) for block in blocks("bash"))


def test_every_flag_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["models"]):
        with pytest.raises(SystemExit):
            wangpd.main([*command, "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= known


def test_the_service_is_installed_where_the_text_says() -> None:
    assert re.search(r"^PREFIX \?= /opt/wangpd#", MAKEFILE, re.MULTILINE)
    assert re.search(r"^SYSCONFDIR \?= /etc/wangpd$", MAKEFILE, re.MULTILINE)
    assert re.search(r"^ExecStart=/opt/wangpd/.venv/bin/wangpd --config /etc/wangpd/wangpd.toml ", UNIT, re.MULTILINE)


def test_the_folders_of_the_service_are_those_that_the_unit_makes() -> None:
    told = {code(row[0]) for row in table("| where | what |")}
    (state,) = re.findall(r"^StateDirectory=(.*)$", UNIT, re.MULTILINE)
    (cache,) = re.findall(r"^CacheDirectory=(.*)$", UNIT, re.MULTILINE)
    made = {f"/var/lib/{name}" for name in state.split()[1:]} | {f"/var/cache/{cache.split()[0]}"}
    assert told == made


def test_the_drop_in_for_another_save_path_changes_nothing_else() -> None:
    (told,) = [shlex.split(line) for line in TEXT.splitlines() if line.startswith("ExecStart=/")]
    (own,) = [shlex.split(line) for line in UNIT.splitlines() if line.startswith("ExecStart=/")]
    place = own.index("--save-path") + 1
    assert told == [*own[:place], "/mnt/videos", *own[place + 1 :]]


# ---- links


def slug(heading: str) -> str:
    """The anchor that a heading gets on the usual sites."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


HEADINGS = {slug(heading) for heading in re.findall(r"^#+ (.+)$", TEXT, re.MULTILINE)}


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)]+)\)", TEXT))))
def test_a_link_leads_somewhere(target: str) -> None:
    path, _, anchor = target.partition("#")
    assert target.startswith("https://") or ((ROOT / path).exists() if path else anchor in HEADINGS)
