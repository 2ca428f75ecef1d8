"""Clients that generators make of the API document: they run against the daemon, and send what their user said."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest
import requests
from PIL import Image

from tests.daemon import ROOT, Daemon

PROMPT = "a red circle moving right"
SOURCES = ROOT / "tests" / "clients"
NPM_TOOLS = SOURCES / "node_modules"
INSTALL = "install Node.js with npm (sudo apt-get install nodejs npm), then run: npm ci --prefix tests/clients"
# Programs of the environment, such as the ruff that a generator formats with, come before the machine's.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


class Recorder(BaseHTTPRequestHandler):
    """Hands a request on to the daemon, and remembers its method, its path with the query, and its body."""

    daemon_url: ClassVar[str]
    sent: ClassVar[list[tuple[str, str, bytes]]]

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.sent.append((self.command, self.path, body))
        headers = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        answer = requests.request(self.command, self.daemon_url + self.path, data=body, headers=headers, timeout=90)
        self.send_response(answer.status_code)
        self.send_header("Content-Type", answer.headers["Content-Type"])
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = forward

    def log_message(self, *_: Any) -> None:
        """Nothing: the daemon has the log."""


@pytest.fixture(scope="module")
def proxy(daemon: Daemon) -> Iterator[str]:
    """The address of a recorder in front of the daemon."""
    Recorder.daemon_url = daemon.url
    with ThreadingHTTPServer(("127.0.0.1", 0), Recorder) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def recorder(proxy: str) -> str:
    """The address of the recorder, which has recorded nothing yet."""
    Recorder.sent = []
    return proxy


@pytest.fixture(scope="module")
def document(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The API document of the running daemon, as a file."""
    path = tmp_path_factory.mktemp("document") / "openapi.json"
    path.write_bytes(requests.get(f"{daemon.url}/api/openapi.json", timeout=60).content)
    return path


def output(folder: Path, *command: Any) -> str:
    """What a program printed. It must succeed, and report no problem."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return done.stdout


def python(folder: Path, program: str, *words: str) -> str:
    """What a client in Python printed; a warning is an error."""
    shutil.copy(SOURCES / program, folder)
    return output(folder, sys.executable, "-W", "error", program, *words)


def npm_tool(folder: Path, name: str, *words: Any) -> str:
    """What a tool of tests/clients/package.json printed; `folder` sees its packages."""
    assert (NPM_TOOLS / ".bin" / name).exists(), INSTALL
    if not (folder / "node_modules").exists():
        (folder / "node_modules").symlink_to(NPM_TOOLS)
    return output(folder, NPM_TOOLS / ".bin" / name, *words)


def check_run(daemon: Daemon, printed: str) -> None:
    """The prompt alone was sent, the model's defaults were used, and the whole file came back."""
    told = json.loads(printed)
    assert [(path, json.loads(body)) for method, path, body in Recorder.sent if method == "POST"] == [
        ("/api/v1/generate", {"prompt": PROMPT})
    ]
    state = daemon.status(told["task_id"])
    assert told["warnings"] == state["warnings"] == []
    defaults = daemon.get("/models/wan_demo/settings").json()["data"]
    assert {**defaults, "prompt": PROMPT, "seed": state["seed"]}.items() <= state["settings"].items()
    assert told["bytes"] == daemon.made(state).stat().st_size > 0


def python_client(document: Path, folder: Path, *words: Any) -> str:
    """What the client of openapi-python-client printed."""
    package = folder / "wangpd_client"
    options = ["generate", "--path", document, "--output-path", package, "--meta", "none"]
    assert output(folder, "openapi-python-client", *options) == f"Generating {package}\n"
    return python(folder, "python_client.py", *words)


def test_a_client_of_openapi_python_client_sends_the_prompt_and_nothing_else(
    daemon: Daemon, recorder: str, document: Path, tmp_path: Path
) -> None:
    check_run(daemon, python_client(document, tmp_path, recorder, PROMPT))


def test_a_client_of_openapi_python_client_sends_a_picture_as_a_form(
    daemon: Daemon, recorder: str, document: Path, tmp_path: Path
) -> None:
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "start.png")
    told = json.loads(python_client(document, tmp_path, recorder, PROMPT, "start.png"))
    (form,) = [body for method, _, body in Recorder.sent if method == "POST"]
    assert re.findall(rb'; name="(\w+)"', form) == [b"prompt", b"image_start"]
    state = daemon.status(told["task_id"])
    assert (state["status"], state["settings"]["task"], state["warnings"]) == ("completed", "i2v", [])


def test_pydantic_models_of_the_document_send_the_prompt_and_nothing_else(
    daemon: Daemon, recorder: str, document: Path, tmp_path: Path
) -> None:
    words = ["--input", document, "--input-file-type", "openapi", "--output", "wangpd_models.py"]
    kind = ["--output-model-type", "pydantic_v2.BaseModel", "--formatters", "builtin"]
    assert output(tmp_path, "datamodel-codegen", *words, *kind) == ""
    check_run(daemon, python(tmp_path, "pydantic_client.py", recorder, PROMPT))


def test_a_client_of_openapi_typescript_sends_the_prompt_and_nothing_else(
    daemon: Daemon, recorder: str, document: Path, tmp_path: Path
) -> None:
    node = shutil.which("node")
    assert node, INSTALL
    assert "warn" not in npm_tool(tmp_path, "openapi-typescript", document, "-o", "schema.ts").lower()
    shutil.copy(SOURCES / "client.ts", tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    options = ["--strict", "--target", "es2022", "--module", "nodenext", "--lib", "es2022,dom,dom.iterable"]
    assert npm_tool(tmp_path, "tsc", *options, "client.ts") == ""
    check_run(daemon, output(tmp_path, node, "client.js", recorder, PROMPT))
