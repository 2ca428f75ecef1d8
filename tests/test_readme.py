"""README.md and docs/ agree with the code: tables, commands, names, links and examples are compared with it."""

import ast
import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import requests
from huggingface_hub import constants

import wangpd
from engine.admission import BadRequest, resolve
from engine.catalog import weights
from engine.catalog.abilities import INPUTS, TASKS
from engine.catalog.models import Catalog, Model, Pipeline
from tests.daemon import ROOT
from tests.idle import idle_daemon

README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
MAKEFILE = (ROOT / "Makefile").read_text()
UNIT = (ROOT / "wangpd.service").read_text()
MODELS = list(Catalog.load())


def table(header: str) -> list[list[str]]:
    """The cells of each row of the one table, on any page, that begins with this line."""
    _, *found = TEXT.split(f"\n{header}\n")
    assert len(found) == 1, f"{len(found)} tables {header}"
    rows = found[0].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def blocks(language: str, text: str = TEXT) -> list[str]:
    """The code blocks of this language; an empty one finds those without."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def code(cell: str) -> str:
    """The first thing in backticks."""
    found = re.search(r"`([^`]+)`", cell)
    assert found, cell
    return found[1]


# ---- the configuration


def key_rows() -> dict[str, list[str]]:
    """The rows of the table of configuration keys, by key."""
    return {code(row[0]): row for row in table("| key | default | what it is |")}


def literal(value: Any) -> Any:
    """A default as TOML reads it."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def test_the_table_of_keys_has_every_key_and_no_other() -> None:
    assert set(key_rows()) == set(wangpd.KEYS)


@pytest.mark.parametrize("name", wangpd.KEYS)
def test_a_key_has_its_default_and_configs_own_words(name: str) -> None:
    _, default, why = key_rows()[name]
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


def test_the_form_of_a_catalogue_file_is_described_key_by_key() -> None:
    form = (ROOT / "engine" / "catalog" / "models" / "README.md").read_text()
    cells = re.findall(r"^\| (`.*?) \|", form, re.MULTILINE)
    described = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    keys = {field.name for kind in (Pipeline, Model) for field in dataclasses.fields(kind)}
    assert described == keys - {"cls"}


def test_the_command_that_installs_a_model_is_the_one_that_the_daemon_prints(tmp_path: Path) -> None:
    (command,) = set(re.findall(r"^\.venv/bin/(wangpd models download \S+)$", TEXT, re.MULTILINE))
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


PREFIX = "/api/v1"


def listed_calls() -> set[tuple[str, str]]:
    """Method and path of each row."""
    words = [code(row[0]).split() for row in table("| call | | what it does |")]
    return {(method, path if path.startswith("/api") else f"{PREFIX}{path}") for method, path in words}


def test_the_table_of_calls_has_every_call_and_no_other(tmp_path: Path) -> None:
    config = wangpd.Config(save_path=tmp_path, state_path=tmp_path / "state", models_dir=tmp_path)
    resources = [(route.method, route.resource) for route in wangpd.make_app(config).router.routes()]
    paths = {(method, resource.canonical) for method, resource in resources if resource and method != "HEAD"}
    assets = {(method, path) for method, path in paths if re.match(r"/api/(docs|redoc)/", path)}
    doors = {("GET", path) for path in ("/", "/api", "/api/", PREFIX)}  # the same as a row, or the way to one
    assert listed_calls() == paths - assets - doors


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The OpenAPI document as a daemon serves it."""
    with idle_daemon(tmp_path_factory.mktemp("fields")) as idle:
        served: dict[str, Any] = requests.get(f"{idle.url}/api/openapi.json", timeout=60).json()
    return served


def answer_fields(document: dict[str, Any], call: str) -> dict[str, Any]:
    """The fields of the answer to a call, "METHOD PATH"; `.files` after it: those of the objects in that list."""
    method, path, *inner = call.replace(".", " ").split()
    answer = document["paths"][f"{PREFIX}{path}"][method.lower()]["responses"]["200"]
    schema = answer["content"]["application/json"]["schema"]
    for name in ("data", *inner):
        schema = properties(document, schema)[name]
    return properties(document, schema.get("items", schema))


def properties(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The properties of a schema, or of the one that it refers to."""
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = (document["components"]["schemas"][name] if name else schema)["properties"]
    return found


@pytest.mark.parametrize(
    ("header", "call"),
    [
        ("| answer field | what it is |", "POST /generate"),
        ("| status field | what it is |", "GET /status/{task_id}"),
        ("| file field | what it is |", "GET /status/{task_id}.files"),
        ("| model field | what it is |", "GET /models/{model_type}"),
        ("| download field | what it is |", "GET /models/{model_type}/download"),
    ],
)
def test_the_table_of_an_answers_fields_has_every_field_and_no_other(
    header: str, call: str, document: dict[str, Any]
) -> None:
    described = [name for row in table(header) for name in re.findall(r"`(\w+)`", row[0])]
    assert len(described) == len(set(described))
    assert set(described) == set(answer_fields(document, call))


def test_the_table_of_statuses_has_every_error_that_the_api_documents(document: dict[str, Any]) -> None:
    answers = {status for path in document["paths"].values() for call in path.values() for status in call["responses"]}
    assert {row[0] for row in table("| status | meaning |")} == {status for status in answers if status >= "400"}


def test_the_page_of_the_api_has_a_place_for_the_generated_settings() -> None:
    assert len(re.findall(r"^<!-- settings -->\n(?s:.*)^<!-- /settings -->$", PAGES["docs/api.md"], re.MULTILINE)) == 1


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


def error_codes() -> set[str]:
    """The codes that the engine's code gives to an EngineError."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / "engine").rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    raised = [call.args[1] for call in calls if ast.unparse(call.func) == "EngineError" and len(call.args) > 1]
    return {str(value.value) for value in raised if isinstance(value, ast.Constant)}


CODE_ROWS = table("| `code` | what happened | what helps |")


@pytest.mark.parametrize("row", CODE_ROWS, ids=lambda row: code(row[0]))
def test_a_code_of_the_errors_is_one_that_the_engine_gives(row: list[str]) -> None:
    sources = [path.read_text() for path in (ROOT / "engine").rglob("*.py")]
    assert any(f'"{code(row[0])}"' in source for source in sources)


def test_every_code_that_the_engine_raises_is_in_the_table() -> None:
    assert error_codes() >= {"out_of_memory", "no_weights"}
    assert error_codes() - {code(row[0]) for row in CODE_ROWS} == set()


# ---- names

PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", PROSE)))
# With an underscore or a second capital letter, else it may be a plain word; `name = value` and `name()` count too.
NAME = re.compile(r"([a-z]+(?:_[a-z0-9]+)+|[A-Z][a-z]+(?:[A-Z]\w*)+)(?: = .*|: .*|\(\))?")
PATH = re.compile(r"(?:\.ci|engine|tests|tools|bench|docs)/[\w./]*|\w+\.(?:py|md|toml|service|txt)")
CODE_PLACES = ("wangpd.py", "engine/**/*.py", "engine/**/*.toml")
KNOWN_WORDS = {
    word for place in CODE_PLACES for path in ROOT.glob(place) for word in re.findall(r"\w+", path.read_text())
}
TESTS = {
    name
    for path in ROOT.glob("tests/test_*.py")
    for name in re.findall(r"^(?:async )?def (\w+)", path.read_text(), re.M)
}


@pytest.mark.parametrize("name", sorted({found[1] for text in QUOTED if (found := NAME.fullmatch(text))}))
def test_a_name_in_the_text_is_one_that_the_code_knows(name: str) -> None:
    assert name in (TESTS if name.startswith("test_") else KNOWN_WORDS)


@pytest.mark.parametrize("path", [text for text in QUOTED if PATH.fullmatch(text) and "FAMILY" not in text])
def test_a_path_in_the_text_exists(path: str) -> None:
    assert (ROOT / path).exists() or (ROOT / "docs" / path).exists()


# ---- commands


def test_every_make_target_that_is_named_exists() -> None:
    named = set(re.findall(r"^(?:sudo )?make ([a-z]+)", "\n".join(blocks("")), re.MULTILINE))
    named |= set(re.findall(r"`(?:sudo )?make ([a-z]+)", TEXT))
    assert named >= {"demo", "run", "test", "check", "fix", "install"}
    assert all(re.search(rf"^{target}:", MAKEFILE, re.MULTILINE) for target in named)


def test_every_curl_example_is_run_by_a_test() -> None:
    for text in PAGES.values():
        assert all(block.startswith(("curl ", "B=")) for block in blocks("bash", text))


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
    listed = {code(row[0]) for row in table("| where | what |")}
    (state,) = re.findall(r"^StateDirectory=(.*)$", UNIT, re.MULTILINE)
    (cache,) = re.findall(r"^CacheDirectory=(.*)$", UNIT, re.MULTILINE)
    made = {f"/var/lib/{name}" for name in state.split()[1:]} | {f"/var/cache/{cache.split()[0]}"}
    assert listed == made


def test_the_drop_in_for_another_save_path_changes_nothing_else() -> None:
    (shown,) = [shlex.split(line) for line in TEXT.splitlines() if line.startswith("ExecStart=/")]
    (own,) = [shlex.split(line) for line in UNIT.splitlines() if line.startswith("ExecStart=/")]
    place = own.index("--save-path") + 1
    assert shown == [*own[:place], "/mnt/videos", *own[place + 1 :]]


# ---- the pages


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 300


def test_the_number_of_models_is_right() -> None:
    numbers = re.findall(r"over (\d+)\s+larger ones", TEXT)
    assert numbers == ["150"]
    assert len(MODELS) > 151


def test_every_page_is_listed_in_the_readme() -> None:
    listed = set(re.findall(r"^\| \[(docs/[\w-]+\.md)\]\(\1\)", PAGES["README.md"], re.MULTILINE))
    assert listed == set(PAGES) - {"README.md"}


def slug(heading: str) -> str:
    """The anchor that a heading gets on the usual sites."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    """The anchors of a page."""
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)}


LINKS = sorted({(page, target) for page, text in PAGES.items() for target in re.findall(r"\]\(([^)]+)\)", text)})


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_a_link_leads_somewhere(page: str, target: str) -> None:
    if target.startswith("https://"):
        return
    path, _, anchor = target.partition("#")
    linked = (ROOT / page).parent / path if path else ROOT / page
    assert linked.exists()
    assert not anchor or anchor in anchors(linked)


def test_the_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert all(picture.stat().st_size <= 200 * 1024 for picture in pictures)
