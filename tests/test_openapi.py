"""The OpenAPI document: valid, complete, true of the running daemon, and shown by two viewers without any internet."""

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import jsonschema
import pytest
import requests
from openapi_spec_validator import OpenAPIV31SpecValidator
from PIL import Image

from engine.api.answers import MAX_LISTED_CHARS
from engine.catalog.download import Stage
from engine.queue.tasks import Status
from tests import contract
from tests.daemon import ROOT, Daemon
from tests.idle import idle_daemon
from wangpd import Config, make_app


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon in which accepted tasks wait for ever."""
    with idle_daemon(tmp_path_factory.mktemp("openapi")) as running:
        yield running


@pytest.fixture(scope="module")
def document(idle: Daemon) -> dict[str, Any]:
    """The document as the daemon serves it."""
    served: dict[str, Any] = requests.get(f"{idle.url}/api/openapi.json", timeout=60).json()
    return served


# -- the document


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1")
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []


def test_every_operation_has_an_id_of_its_own_a_tag_and_a_summary(document: dict[str, Any]) -> None:
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert all(operation["tags"] and operation["summary"] for operation in operations)


def test_the_document_names_every_route_of_the_app(document: dict[str, Any], tmp_path: Path) -> None:
    app = make_app(Config(save_path=tmp_path / "outputs", state_path=tmp_path / "state", models_dir=tmp_path))
    routes = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}
    api = {(method, path.rstrip("/")) for method, path in routes if path.startswith("/api/v1") and method != "HEAD"}
    named = {(method.upper(), path.rstrip("/")) for path, item in document["paths"].items() for method in item}
    assert named == api


def test_the_document_names_every_path_of_the_contract(document: dict[str, Any]) -> None:
    wanted = {(endpoint.method, f"/api/v1{endpoint.path}") for endpoint in contract.ENDPOINTS}
    wanted |= {("GET", f"/api/v1{path}") for path in contract.FILES}
    assert wanted <= {(method.upper(), path) for path, item in document["paths"].items() for method in item}


def request_properties(document: dict[str, Any]) -> dict[str, Any]:
    """The fields of the body of POST /generate."""
    properties: dict[str, Any] = document["components"]["schemas"]["GenerateRequest"]["properties"]
    return properties


def test_the_document_names_every_request_field(document: dict[str, Any]) -> None:
    documented = {"prompt", "model_type", *contract.DEFAULTS, *contract.IMAGES}
    assert documented <= request_properties(document).keys()
    assert document["components"]["schemas"]["GenerateRequest"]["required"] == ["prompt"]


def test_no_client_is_given_a_value_to_send(document: dict[str, Any]) -> None:
    """A `default` becomes a client's argument, which it sends: the model's own default would never apply."""
    sent = [document["components"]["schemas"][name] for name in ("GenerateRequest", "GenerateForm", "MoveRequest")]
    sent += [item for path in document["paths"].values() for about in path.values() for item in parameters(about)]
    assert "default" not in {key for schema in sent for key in keys(schema)}


def parameters(operation: dict[str, Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = operation.get("parameters", [])
    return found


def keys(value: Any) -> Iterator[str]:
    """Every key in a JSON value."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)


def test_the_descriptions_name_the_contracts_defaults(document: dict[str, Any]) -> None:
    properties = request_properties(document)
    for name, default in contract.DEFAULTS.items():
        named = re.search(r"Default: (.*?)(, or the model's own)?\.$", properties[name]["description"])
        assert named and json.loads(named[1]) == default, properties[name]


def test_nothing_is_required_of_a_client_but_the_prompt(document: dict[str, Any]) -> None:
    for path in document["paths"].values():
        for operation in path.values():
            assert {item["in"] for item in parameters(operation) if item.get("required")} <= {"path"}
    assert document["components"]["schemas"]["GenerateForm"]["required"] == ["prompt"]


def test_the_document_names_every_state_and_how_much_of_a_prompt_is_listed(document: dict[str, Any]) -> None:
    about = {name: schema.get("properties", {}) for name, schema in document["components"]["schemas"].items()}
    assert about["TaskState"]["status"]["description"] == "; ".join(Status)
    assert about["DownloadState"]["status"]["description"] == "`installed`; " + "; ".join(Stage)
    assert f" {MAX_LISTED_CHARS} characters" in about["QueuedTask"]["prompt"]["description"]


def test_the_example_of_every_body_can_be_sent_as_it_is(idle: Daemon, document: dict[str, Any]) -> None:
    body = document["paths"]["/api/v1/generate"]["post"]["requestBody"]["content"]["application/json"]
    assert body["example"] == {"prompt": "a red circle moving right"}
    answer = idle.post("/generate", body["example"])
    assert (answer.status_code, answer.json()["data"]["warnings"]) == (200, [])
    move = document["paths"]["/api/v1/queue/{task_id}"]["patch"]["requestBody"]["content"]["application/json"]
    task_id = answer.json()["data"]["task_id"]
    assert idle.request("PATCH", f"/queue/{task_id}", json=move["example"]).status_code == 200


def test_the_same_fields_are_described_as_json_and_as_a_form(document: dict[str, Any]) -> None:
    content = document["paths"]["/api/v1/generate"]["post"]["requestBody"]["content"]
    assert content["multipart/form-data"]["schema"] == {"$ref": "#/components/schemas/GenerateForm"}
    form = document["components"]["schemas"]["GenerateForm"]["properties"]
    assert form.keys() == request_properties(document).keys()
    assert form["image_start"]["format"] == form["image_refs"]["items"]["format"] == "binary"


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("/api/v1/download/{filename}", {"video/mp4", "image/png", "image/jpeg", "image/webp", "audio/wav"}),
        ("/api/v1/preview/{filename}", {"image/jpeg"}),
    ],
)
def test_the_bytes_of_a_file_are_typed(document: dict[str, Any], path: str, kinds: set[str]) -> None:
    for status in ("200", "206"):
        content = document["paths"][path]["get"]["responses"][status]["content"]
        assert kinds <= content.keys()
        assert {about["schema"]["format"] for about in content.values()} == {"binary"}


def test_the_token_is_described_and_can_be_left_out(document: dict[str, Any]) -> None:
    scheme = document["components"]["securitySchemes"]["token"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    assert document["security"] == [{}, {"token": []}]


def test_an_answer_of_a_newer_server_fits_the_document(document: dict[str, Any]) -> None:
    """A client made from the document must not refuse a field that a later version adds."""
    closed = [name for name, schema in document["components"]["schemas"].items() if "additionalProperties" in schema]
    assert closed == []


def test_a_choice_that_may_be_null_is_one_choice(document: dict[str, Any]) -> None:
    """Of an enum with null in it, generators make three types."""
    assert [item for item in walk(document) if None in item.get("enum", ())] == []


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from walk(inner)


@pytest.mark.parametrize("name", contract.LIMITS)
def test_the_schema_draws_the_limits_where_the_daemon_does(document: dict[str, Any], name: str) -> None:
    schema = request_properties(document)[name]
    assert [value for value in contract.LIMITS[name] if not fits(value, schema)] == []
    assert [value for value in contract.BEYOND[name] if fits(value, schema)] == []


def fits(value: Any, schema: dict[str, Any]) -> bool:
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_the_schema_limits_prompt_and_references(document: dict[str, Any]) -> None:
    properties = request_properties(document)
    assert (properties["prompt"]["minLength"], properties["prompt"]["maxLength"]) == contract.PROMPT_CHARACTERS
    assert properties["image_refs"]["maxItems"] == contract.IMAGE_REFS_MOST
    assert properties["image_start"]["contentEncoding"] == "base64"


def test_the_document_has_the_query_parameters_with_limits_and_their_defaults_in_words(
    document: dict[str, Any],
) -> None:
    paths = document["paths"]
    outputs = {item["name"]: item for item in parameters(paths["/api/v1/outputs"]["get"])}
    assert outputs["limit"]["schema"] == {"type": "integer", "minimum": 1, "maximum": 200}
    assert outputs["offset"]["schema"] == {"type": "integer", "minimum": 0}
    assert outputs["file_type"]["schema"]["enum"] == list(contract.FILE_TYPES)
    preview = {item["name"]: item for item in parameters(paths["/api/v1/preview/{filename}"]["get"])}
    assert preview["width"]["schema"] == {"type": "integer", "minimum": 32, "maximum": 1920}
    told = [item["description"].rpartition("Default: ")[2] for item in (*outputs.values(), preview["width"])]
    assert told == ["50.", "0.", "Only files of this type.", "320."]


ERRORS = {
    ("post", "/api/v1/generate"): {"400", "404", "413", "500", "503"},
    ("get", "/api/v1/models/{model_type}"): {"404", "500"},
    ("get", "/api/v1/status/{task_id}"): {"400", "404", "500"},
    ("delete", "/api/v1/queue/{task_id}"): {"400", "404", "500"},
    ("get", "/api/v1/outputs"): {"400", "500"},
    ("get", "/api/v1/download/{filename}"): {"206", "304", "404", "416", "500"},
    ("get", "/api/v1/preview/{filename}"): {"206", "304", "400", "404", "416", "500"},
}


@pytest.mark.parametrize(("method", "path"), ERRORS)
def test_the_document_names_every_answer(document: dict[str, Any], method: str, path: str) -> None:
    responses = document["paths"][path][method]["responses"]
    assert ERRORS[method, path] | {"200"} <= responses.keys()
    failures = [responses[status] for status in responses if status >= "400"]
    schemas = [failure["content"]["application/json"]["schema"] for failure in failures]
    assert all(schema == {"$ref": "#/components/schemas/Failure"} for schema in schemas)


# -- is it true?


def answer_schema(document: dict[str, Any], method: str, path: str, status: int) -> dict[str, Any]:
    """The schema of an answer, complete in itself, and closed: what the daemon sends today is all described."""
    response = document["paths"][path][method.lower()]["responses"][str(status)]
    components = copy.deepcopy(document["components"])
    for schema in components["schemas"].values():
        schema["additionalProperties"] = False
    return {**response["content"]["application/json"]["schema"], "components": components}


@pytest.mark.parametrize("endpoint", contract.ENDPOINTS, ids=lambda endpoint: f"{endpoint.method} {endpoint.path}")
def test_a_real_answer_is_what_the_document_says(
    idle: Daemon, document: dict[str, Any], endpoint: contract.Endpoint
) -> None:
    task_id = idle.submit()["task_id"]
    body = {"prompt": "a cat"} if endpoint.method == "POST" else None
    answer = idle.request(endpoint.method, endpoint.path.format(task_id=task_id, model_type="wan_demo"), json=body)
    jsonschema.validate(answer.json(), answer_schema(document, endpoint.method, f"/api/v1{endpoint.path}", 200))


@pytest.mark.parametrize("model_type", ["wan_t2v_14B", "wan22_i2v_14B", "anyflow_t2v_1.3B"])
def test_the_settings_of_every_kind_of_model_are_what_the_document_says(
    idle: Daemon, document: dict[str, Any], model_type: str
) -> None:
    for path in ("/models/{model_type}", "/models/{model_type}/settings"):
        answer = idle.get(path.format(model_type=model_type))
        jsonschema.validate(answer.json(), answer_schema(document, "GET", f"/api/v1{path}", 200))


def test_the_status_of_a_finished_task_is_what_the_document_says(daemon: Daemon, document: dict[str, Any]) -> None:
    state = daemon.run(video_length=5, num_inference_steps=2)
    assert state["files"]
    answer = daemon.get(f"/status/{state['task_id']}").json()
    jsonschema.validate(answer, answer_schema(document, "GET", "/api/v1/status/{task_id}", 200))


def test_an_error_is_what_the_document_says(idle: Daemon, document: dict[str, Any]) -> None:
    answer = idle.post("/generate", {})
    jsonschema.validate(answer.json(), answer_schema(document, "POST", "/api/v1/generate", answer.status_code))


@pytest.mark.slow
# Resuming is attacked while nothing waits: what the other operations left in the queue must never run.
@pytest.mark.parametrize("selection", ["--exclude-operation-id", "--include-operation-id"])
def test_schemathesis_finds_nothing(tmp_path: Path, selection: str) -> None:
    """All its checks over every operation; what can't apply is in tests/schemathesis.toml, with the reason."""
    options = ["--config-file", str(ROOT / "tests" / "schemathesis.toml")]
    with idle_daemon(tmp_path / "attacked") as attacked:
        Image.new("RGB", (64, 48), "teal").save(attacked.outputs / "picture.png")
        document = f"{attacked.url}/api/openapi.json"
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *options, "run", document, "--no-color", selection, RESUME],
            cwd=tmp_path,  # it leaves its notes where it runs
            env={**os.environ, "SCHEMATHESIS_HOOKS": str(ROOT / "tests" / "schemathesis_hooks.py")},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


RESUME = "resume_queue"


# -- the viewers


@pytest.mark.parametrize("name", ["docs", "redoc"])
def test_a_viewer_and_all_that_it_loads_come_from_the_daemon(idle: Daemon, name: str) -> None:
    address = f"{idle.url}/api/{name}"
    page = requests.get(address, timeout=60)
    links = re.findall(r"""(?:src|href)=["']([^"']+)""", page.text)
    assert len(links) >= 3
    assert [link for link in links if not link.startswith("data:") and re.match(r"/|[a-z]+:", link)] == []
    assets = [requests.get(urljoin(address, link), timeout=60) for link in links if not link.startswith("data:")]
    assert [asset.status_code for asset in assets] == [200] * len(assets)
    assert all(asset.content for asset in assets)


@pytest.mark.parametrize("name", ["docs", "redoc"])
def test_a_viewer_may_load_nothing_from_elsewhere(idle: Daemon, name: str) -> None:
    page = requests.get(f"{idle.url}/api/{name}", timeout=60)
    policy = page.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'self';")
    assert "http" not in policy
    assert "unsafe-eval" not in policy


@pytest.mark.parametrize("name", ["docs", "redoc"])
def test_the_start_script_of_a_viewer_asks_for_the_document_beside_it(idle: Daemon, name: str) -> None:
    page = requests.get(f"{idle.url}/api/{name}", timeout=60)
    last = re.findall(r'<script src="([^"]+)"', page.text)[-1]
    script = requests.get(urljoin(page.url, last), timeout=60).text
    assert re.findall(r"'([^']*openapi\.json)'", script) == ["openapi.json"]


def test_the_style_sheets_name_no_other_host(idle: Daemon) -> None:
    for name in ("docs", "redoc"):
        page = requests.get(f"{idle.url}/api/{name}", timeout=60)
        for link in re.findall(r'<link rel="stylesheet" href="([^"]+)"', page.text):
            sheet = requests.get(urljoin(page.url, link), timeout=60).text
            assert re.findall(r"url\(\s*['\"]?((?:https?:)?//[^)]*)", sheet) == []
