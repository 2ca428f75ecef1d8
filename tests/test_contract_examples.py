"""The examples of the contract's page, README.md and docs/, run as they stand; only host and port are the daemon's."""

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests import tiny
from tests.daemon import ROOT, Daemon
from tests.proof import CATALOG

PAGE_ORIGIN = "http://localhost:7860"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def page_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has the image model of the page, and a file of the name that its curl example fetches."""
    daemon = Daemon(tmp_path_factory.mktemp("page"), cancel_grace_s=1.0)
    tiny.build(CATALOG.get("wan_i2v_14B"), daemon.models)
    with daemon:
        (daemon.outputs / "video_001.mp4").write_bytes(b"a video")
        yield daemon


@pytest.fixture
def emptied(page_daemon: Daemon) -> Iterator[Daemon]:
    """The daemon, whose tasks are cancelled after the test: the page's jobs have the size of a large model."""
    yield page_daemon
    page_daemon.delete("/queue")
    running = page_daemon.get("/queue").json()["data"]["current_task_id"]
    if running is not None:
        page_daemon.delete(f"/queue/{running}")
        page_daemon.finish(running)


def test_the_python_example_works_call_by_call(
    emptied: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    api_base = f"{emptied.url}/api/v1"

    # List models
    response = requests.get(f"{api_base}/models")
    models = response.json()["data"]["models"]
    assert len(models) > 20

    # Generate video from text
    response = requests.post(
        f"{api_base}/generate",
        json={"prompt": "A cat playing piano in a jazz club", "video_length": 81, "num_inference_steps": 30},
    )
    task_id = response.json()["data"]["task_id"]
    assert response.json()["message"] == "Generation task added to queue"

    # Check status
    response = requests.get(f"{api_base}/status/{task_id}")
    windows = 3  # in which the embedded model makes 81 frames
    assert response.json()["data"]["total_steps"] == 30 * windows

    # Download output (when complete)
    response = requests.get(f"{api_base}/outputs")
    files = response.json()["data"]["files"]
    assert files
    latest = files[0]["filename"]
    response = requests.get(f"{api_base}/download/{latest}")
    Path(f"downloaded_{latest}").write_bytes(response.content)
    assert Path("downloaded_video_001.mp4").read_bytes() == b"a video"


def test_the_image_example_works_as_shown(emptied: Daemon, tmp_path: Path) -> None:
    picture = tmp_path / "my_image.png"
    Image.new("RGB", (832, 480), "orange").save(picture)
    image_b64 = base64.b64encode(picture.read_bytes()).decode()
    response = requests.post(
        f"{emptied.url}/api/v1/generate",
        json={
            "prompt": "The person in the image starts dancing",
            "model_type": "wan_i2v_14B",
            "image_start": image_b64,
            "video_length": 81,
        },
    )
    assert response.status_code == 200, response.text
    state = emptied.status(response.json()["data"]["task_id"])
    assert (state["model_type"], state["settings"]["task"]) == ("wan_i2v_14B", "i2v")
    assert (state["settings"]["video_length"], state["settings"]["resolution"]) == (81, "832x480")


# -- curl

PAGE_CURL = r"""
# List models
curl http://localhost:7860/api/v1/models

# Generate video
curl -X POST http://localhost:7860/api/v1/generate \
  -H "Content-Type: application/json" \
  -d '{"prompt": "A beautiful mountain landscape"}'

# Get queue status
curl http://localhost:7860/api/v1/queue

# Download file
curl -O http://localhost:7860/api/v1/download/video_001.mp4
"""
CURL = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")


def shell(script: str, folder: Path) -> str:
    """What a bash script prints, run in `folder`; it ends at the first command that fails."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, (script, done.stdout, done.stderr)
    return done.stdout


@CURL
def test_the_curl_examples_work_as_shown(emptied: Daemon, tmp_path: Path) -> None:
    assert PAGE_CURL.count(PAGE_ORIGIN) == 4
    printed = shell(PAGE_CURL.replace(PAGE_ORIGIN, emptied.url).replace("\ncurl ", "\ncurl -fsS "), tmp_path)
    for message in ("Found ", "Generation task added to queue", "Queue has "):
        assert f'"message": "{message}' in printed
    assert (tmp_path / "video_001.mp4").read_bytes() == b"a video"


def curl_script(page: Path) -> str:
    """The ```bash blocks of a page in their order; tests/test_readme.py keeps that they begin with `curl` or `B=`."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", page.read_text("utf-8"), re.M | re.S))


@CURL
@pytest.mark.parametrize("page", [page for page in PAGES if curl_script(page)], ids=lambda page: page.name)
def test_the_curl_examples_of_a_page_work_in_their_order(page: Path, emptied: Daemon, tmp_path: Path) -> None:
    script, port = curl_script(page), emptied.url.rpartition(":")[2]
    Image.new("RGB", (64, 64), "red").save(tmp_path / "my_image.png")
    printed = shell(re.sub(r"\bcurl ", "curl -fS ", script.replace(":7860", f":{port}")), tmp_path)
    assert '"success": true' in printed
    assert '"detail"' not in printed


def test_the_readme_and_the_page_of_the_api_have_examples() -> None:
    counts = {page.name: len(re.findall(r"\bcurl ", curl_script(page))) for page in PAGES}
    assert counts["README.md"] >= 10
    assert counts["api.md"] >= 8
