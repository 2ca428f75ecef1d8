"""Getting weights: `POST /models/{id}/download`, `wangpd models` and `allow_download`, against a hub on localhost.

The hub's own client fetches real bytes from it, in the process that the daemon starts for it.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.catalog.models import PACKAGE, Catalog, Model
from tests import processes
from tests.daemon import ROOT, Daemon
from tests.hub import Hub, serving

CATALOG = Catalog.load()
PLAIN = CATALOG.get("wan_t2v_14B")
OTHER = CATALOG.get("wan_t2v_1.3B")
LONG_S = 250  # for a worker to start, and torch in it
CHUNK_BYTES = 10 * 2**20  # what the hub's client writes at a time
BIG = "transformer/diffusion_pytorch_model.safetensors"
BIG_BYTES = random.Random(0).randbytes(2 * CHUNK_BYTES + 12345)
PARTS = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "image_encoder": [None, None],
}
NEEDED = {
    "model_index.json": json.dumps({"_class_name": "WanPipeline", **PARTS}).encode(),
    "transformer/config.json": b"{}",
    BIG: BIG_BYTES,
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"a small VAE",
    "scheduler/scheduler_config.json": b"{}",
    "tokenizer/tokenizer.json": b"{}",
    "tokenizer/spiece.model": b"words",
}
NEEDED_BYTES = sum(map(len, NEEDED.values()))
NOT_NEEDED = {
    "README.md": b"# A model",
    "Wan2.1-whole.safetensors": b"all of it once more",
    "run.py": b"raise SystemExit",
    "transformer/diffusion_pytorch_model.fp16.safetensors": b"another variant",
    "vae/diffusion_pytorch_model.bin": b"a pickle",
    "vae/model.onnx": b"another format",
    "image_encoder/model.safetensors": b"a part that the index leaves out",
    "examples/cat.json": b"{}",
}
REPO = {**NEEDED, **NOT_NEEDED}


@pytest.fixture(scope="module")
def running_hub() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(running_hub: Hub) -> Iterator[Hub]:
    """A hub that has both models and does everything right."""
    running_hub.reset()
    running_hub.repos = {PLAIN.repo: REPO, OTHER.repo: NEEDED}
    yield running_hub
    running_hub.reset()


def against(hub: Hub, daemon: Daemon) -> Daemon:
    """The daemon, configured to use this hub and a cache of its own."""
    cache = {"HF_HOME": str(daemon.folder / "hf"), "HF_TOKEN": "hf_secret"}
    patience = {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}  # a hub that holds an answer must not be taken for a broken one
    daemon.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", **cache, **patience}
    return daemon


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, running_hub: Hub) -> Iterator[Daemon]:
    with against(
        running_hub, Daemon(tmp_path_factory.mktemp("downloads"), min_free_mb=1, allow_api_download=True)
    ) as daemon:
        yield daemon


@pytest.fixture
def own_daemon(tmp_path: Path) -> Iterator[Daemon]:
    running = Daemon(tmp_path / "own", allow_api_download=True)
    yield running
    running.stop()


@pytest.fixture
def local(shared: Daemon, hub: Hub) -> Iterator[Daemon]:
    """A daemon without any weights."""
    yield shared
    hub.go_on.set()
    for model in (PLAIN, OTHER):
        shared.delete(f"/models/{model.id}/download")
    shutil.rmtree(shared.models, ignore_errors=True)


def post(daemon: Daemon, model: Model = PLAIN) -> dict[str, Any]:
    answer = daemon.post(f"/models/{model.id}/download")
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def state(daemon: Daemon, model: Model = PLAIN) -> dict[str, Any]:
    data: dict[str, Any] = daemon.get(f"/models/{model.id}/download").json()["data"]
    return data


def ended(daemon: Daemon, model: Model = PLAIN) -> dict[str, Any]:
    """The download once it has ended."""
    return until(daemon, lambda now: now["status"] not in ("waiting", "downloading"), model)


def assert_completed(daemon: Daemon, model: Model = PLAIN) -> None:
    now = ended(daemon, model)
    assert now["status"] == "completed", now["error"]


def until(daemon: Daemon, test: Callable[[dict[str, Any]], bool], model: Model = PLAIN) -> dict[str, Any]:
    deadline = time.monotonic() + LONG_S
    while not test(now := state(daemon, model)):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


def half_way(daemon: Daemon, hub: Hub) -> dict[str, Any]:
    """A download that has its first chunk and gets no further; returns its state."""
    hub.held_after = CHUNK_BYTES + 2**20
    post(daemon)
    return until(daemon, lambda now: now["downloaded_bytes"] >= CHUNK_BYTES)


def installed(daemon: Daemon, model: Model = PLAIN) -> bool:
    return bool(daemon.get(f"/models/{model.id}").json()["data"]["installed"])


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def starts(hub: Hub) -> list[int]:
    """The bytes from which the big file was asked for."""
    return [start for name, start in hub.fetched if name == BIG]


# ------------------------------------------------------------------------------------------------------- what it brings


def test_a_download_brings_what_the_pipeline_needs_and_nothing_else(local: Daemon) -> None:
    assert post(local)["status"] in ("waiting", "downloading")
    assert_completed(local)
    assert files(local.models / PLAIN.id) == NEEDED
    assert installed(local)


def test_a_completed_download_reports_its_bytes(local: Daemon) -> None:
    post(local)
    done = ended(local)
    assert (done["downloaded_bytes"], done["total_bytes"], done["progress"]) == (NEEDED_BYTES, NEEDED_BYTES, 100.0)
    assert done["started_at"] <= done["finished_at"]


def test_half_a_download_reports_its_progress_and_is_not_installed(local: Daemon, hub: Hub) -> None:
    now = half_way(local, hub)
    assert (now["status"], now["total_bytes"], now["file"]) == ("downloading", NEEDED_BYTES, BIG)
    assert now["progress"] == round(100 * now["downloaded_bytes"] / NEEDED_BYTES, 1)
    assert CHUNK_BYTES <= now["downloaded_bytes"] < NEEDED_BYTES
    assert not installed(local)


def test_the_token_of_the_environment_is_sent(local: Daemon, hub: Hub) -> None:
    post(local)
    ended(local)
    assert hub.tokens == {"Bearer hf_secret"}


def test_the_revision_of_the_catalogue_is_fetched(local: Daemon, hub: Hub) -> None:
    model = CATALOG.get("cosmos25_2B")
    hub.repos[model.repo] = NEEDED
    post(local, model)
    assert_completed(local, model)
    assert hub.revisions == [model.revision]


def test_the_variant_of_the_catalogue_is_fetched(local: Daemon, hub: Hub) -> None:
    model = CATALOG.get("svd")
    small = {name: data for name, data in REPO.items() if name != BIG}
    hub.repos[model.repo] = {**small, BIG: b"not this one"}
    post(local, model)
    assert_completed(local, model)
    folder = local.models / model.id / "transformer"
    assert [path.name for path in folder.glob("*.safetensors")] == ["diffusion_pytorch_model.fp16.safetensors"]


def test_a_recipe_brings_its_bases_weights_and_its_loras(local: Daemon, hub: Hub) -> None:
    recipe = CATALOG.get("wan_t2v_14B_lightx2v")
    (lora,) = recipe.recipe_loras
    hub.repos[lora["repo"]] = {lora["file"]: b"a LoRA", "README.md": b"", "other.safetensors": b"another LoRA"}
    post(local, recipe)
    assert_completed(local, recipe)
    assert files(local.models / recipe.id) == {f"loras/{lora['file']}": b"a LoRA"}
    assert installed(local, recipe) and installed(local, PLAIN)


def test_a_component_of_another_repository_goes_beside_the_others(local: Daemon, hub: Hub) -> None:
    model = CATALOG.get("skyreels_v1_i2v_13B")
    own = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"its own", "README.md": b""}
    hub.repos |= {model.repo: NEEDED, model.extra_repos["transformer"]: own}
    post(local, model)
    assert_completed(local, model)
    found = files(local.models / model.id)
    assert found["transformer/diffusion_pytorch_model.safetensors"] == b"its own"
    assert found.keys() == NEEDED.keys()
    assert BIG not in hub.names()


# -------------------------------------------------------------------------------------------- broken off, and going on


def test_a_connection_that_breaks_is_taken_up_where_it_broke(local: Daemon, hub: Hub) -> None:
    hub.breaks_after = [CHUNK_BYTES + 2**20]
    post(local)
    assert_completed(local)
    assert starts(hub) == [0, CHUNK_BYTES]
    assert files(local.models / PLAIN.id) == NEEDED


def test_a_cancelled_download_ends_and_the_next_one_goes_on(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    answer = local.delete(f"/models/{PLAIN.id}/download")
    assert (answer.status_code, answer.json()["data"]["status"]) == (200, "cancelled")
    assert fetching(local) == []
    assert not installed(local)
    hub.go_on.set()
    post(local)
    assert_completed(local)
    assert starts(hub) == [0, CHUNK_BYTES]
    assert files(local.models / PLAIN.id) == NEEDED


def fetching(daemon: Daemon) -> list[int]:
    """The processes that download for this daemon."""
    return [pid for pid in processes.children(daemon.process.pid) if "engine.catalog.fetch" in processes.command(pid)]


def test_a_daemon_that_is_killed_takes_its_download_along_and_the_next_goes_on(own_daemon: Daemon, hub: Hub) -> None:
    against(hub, own_daemon).start()
    half_way(own_daemon, hub)
    (child,) = fetching(own_daemon)
    own_daemon.stop(signal.SIGKILL)
    assert processes.eventually(lambda: not processes.alive(child))
    hub.go_on.set()
    own_daemon.start()
    assert own_daemon.get(f"/models/{PLAIN.id}/download").status_code == 404
    post(own_daemon)
    assert_completed(own_daemon)
    assert starts(hub) == [0, CHUNK_BYTES]


def test_a_daemon_that_stops_ends_its_download(own_daemon: Daemon, hub: Hub) -> None:
    against(hub, own_daemon).start()
    half_way(own_daemon, hub)
    (child,) = fetching(own_daemon)
    assert own_daemon.stop() == 0
    assert processes.eventually(lambda: not processes.alive(child))


def test_a_partial_file_that_is_too_long_is_fetched_from_its_beginning(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    local.delete(f"/models/{PLAIN.id}/download")
    (part,) = (local.models / PLAIN.id).rglob("*.incomplete")
    os.truncate(part, len(BIG_BYTES) + 1)
    hub.go_on.set()
    post(local)
    assert_completed(local)
    assert starts(hub) == [0, 0]
    assert files(local.models / PLAIN.id) == NEEDED


def test_a_download_whose_process_is_killed_has_failed(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    (child,) = fetching(local)
    os.kill(child, signal.SIGKILL)
    failed = ended(local)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "process_died")
    assert "ended with code -9" in failed["error"]["message"]


def test_a_file_that_arrives_damaged_is_fetched_again(local: Daemon, hub: Hub) -> None:
    hub.spoiled = {"vae/diffusion_pytorch_model.safetensors"}
    post(local)
    failed = ended(local)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "damaged")
    assert not installed(local)
    hub.spoiled = set()
    post(local)
    assert_completed(local)
    assert files(local.models / PLAIN.id) == NEEDED


# ----------------------------------------------------------------------------------------------------- one at a time


def test_a_second_download_waits_for_the_first(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    assert post(local, OTHER)["status"] == "waiting"
    assert state(local, OTHER)["total_bytes"] is None
    hub.go_on.set()
    assert_completed(local)
    assert_completed(local, OTHER)


def test_a_download_that_waits_can_be_cancelled(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    post(local, OTHER)
    assert local.delete(f"/models/{OTHER.id}/download").json()["data"]["status"] == "cancelled"
    hub.go_on.set()
    assert_completed(local)
    assert not (local.models / OTHER.id).exists()


def test_the_same_download_is_not_begun_twice(local: Daemon, hub: Hub) -> None:
    now = half_way(local, hub)
    assert post(local)["started_at"] == now["started_at"]
    assert len(fetching(local)) == 1


def test_two_processes_do_not_write_the_same_files(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    done = command(local, "download", PLAIN.id)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is being downloaded by another process already" in done.stderr


@pytest.mark.slow
def test_a_task_runs_while_a_download_does(local: Daemon, hub: Hub) -> None:
    half_way(local, hub)
    task = local.submit(video_length=5, num_inference_steps=1)
    assert local.finish(task["task_id"], LONG_S)["status"] == "completed"
    assert state(local)["status"] == "downloading"


# ----------------------------------------------------------------------------------------------------------- refused


def test_a_disk_without_room_is_reported_before_the_first_byte(local: Daemon, hub: Hub) -> None:
    hub.claimed_bytes[BIG] = 10**15
    post(local)
    failed = ended(local)
    assert (failed["status"], failed["error"]["code"]) == ("failed", "disk_full")
    assert failed["error"]["message"].startswith("models_dir: 1000000.0 GB are still to be fetched")
    assert hub.names() == ["model_index.json"]


REFUSALS = {
    "gated": ((403, "GatedRepo"), f"the hub wants the licence of {PLAIN.repo} accepted first"),
    "not_found": ((404, "RepoNotFound"), f"the hub has no {PLAIN.repo}, or shows it only to"),
    "hub_fault": ((500, ""), f"the hub can't give {PLAIN.repo} now"),
}


@pytest.mark.parametrize("code", REFUSALS)
def test_what_the_hub_refuses_is_reported_in_a_sentence(code: str, local: Daemon, hub: Hub) -> None:
    hub.refused[PLAIN.repo], sentence = REFUSALS[code]
    post(local)
    failed = ended(local)
    assert (failed["status"], failed["error"]["code"]) == ("failed", code)
    assert failed["error"]["message"].startswith(sentence)


def test_a_repository_in_another_layout_is_reported(local: Daemon, hub: Hub) -> None:
    hub.repos[PLAIN.repo] = {"wan.safetensors": b"all of it"}
    post(local)
    message = ended(local)["error"]["message"]
    assert message == f"the hub's {PLAIN.repo} holds no model_index.json: it is not in diffusers layout"


def test_offline_nothing_is_fetched(local: Daemon, hub: Hub) -> None:
    done = command(local, "download", PLAIN.id, HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE is set" in done.stderr
    assert hub.names() == []


def test_an_unreachable_hub_is_reported(local: Daemon) -> None:
    done = command(local, "download", PLAIN.id, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 1
    assert "the hub at http://127.0.0.1:9 can't be reached" in done.stderr


def test_an_installed_model_is_not_fetched(local: Daemon, hub: Hub) -> None:
    model = CATALOG.get("wan_demo")
    assert post(local, model)["status"] == state(local, model)["status"] == "installed"
    assert hub.names() == []


@pytest.mark.parametrize(("method", "status"), [("GET", 404), ("DELETE", 400)])
def test_a_download_that_was_not_requested_is_unknown(method: str, status: int, local: Daemon) -> None:
    answer = local.request(method, "/models/wan_vace_14B/download")
    assert answer.status_code == status
    assert "wan_vace_14B" in answer.json()["detail"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_model_has_no_download(method: str, local: Daemon) -> None:
    assert local.request(method, "/models/no_such_model/download").status_code == 404


# --------------------------------------------------------------------------------------------------- the command line


def words(daemon: Daemon, *arguments: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "wangpd.py"),
        "models",
        "--config",
        str(daemon.folder / "wangpd.toml"),
        *arguments,
    ]


def command(daemon: Daemon, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """`wangpd models …` with the daemon's configuration."""
    environment = {**daemon.environment, **variables}
    return subprocess.run(
        words(daemon, *arguments), env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_the_command_lists_each_model_in_a_line(local: Daemon) -> None:
    lines = command(local).stdout.splitlines()
    assert lines[0].split() == ["id", "kind", "installed", "size", "licence"]
    assert [line.split()[0] for line in lines[1:]] == [model.id for model in CATALOG]
    (demo,) = [line for line in lines if line.startswith("wan_demo ")]
    assert demo.split() == ["wan_demo", "video", "yes", "in", "the", "package", "Apache-2.0"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--installed"], lambda model: model.id == "wan_demo"),
        (["--family", "flux"], lambda model: model.family == "flux"),
        (["--task", "t2a"], lambda model: "t2a" in model.tasks),
    ],
    ids=["installed", "family", "task"],
)
def test_the_command_lists_those_that_are_asked_for(
    arguments: list[str], wanted: Callable[[Model], bool], local: Daemon
) -> None:
    lines = command(local, *arguments).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [model.id for model in CATALOG if wanted(model)]


def test_the_command_downloads_a_model(local: Daemon) -> None:
    done = command(local, "download", PLAIN.id)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"wangpd: model '{PLAIN.id}' is installed\n")
    assert files(local.models / PLAIN.id) == NEEDED
    again = command(local, "download", PLAIN.id)
    assert (again.returncode, again.stdout) == (0, f"wangpd: model '{PLAIN.id}' is installed already\n")


def test_the_command_stops_at_ctrl_c_and_goes_on_the_next_time(local: Daemon, hub: Hub) -> None:
    hub.held_after = CHUNK_BYTES + 2**20
    running = subprocess.Popen(
        words(local, "download", PLAIN.id),
        env=local.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stdout
    while BIG not in running.stdout.readline():
        pass
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert (running.returncode, said) == (130, "\nwangpd: stopped; the same command goes on where it stopped\n")
    hub.go_on.set()
    assert command(local, "download", PLAIN.id).returncode == 0
    assert starts(hub) == [0, CHUNK_BYTES]


def test_the_command_knows_the_models(local: Daemon) -> None:
    done = command(local, "download", "no_such_model")
    assert (done.returncode, done.stderr) == (2, "wangpd: there is no model 'no_such_model'; see: wangpd models\n")


# ------------------------------------------------------------------------------------------------------ allow_download

OWN = """
[[models]]
id = "shared_demo"
base = "wan_demo"
builtin = ""
repo = "somebody/shared-demo"
name = "The demo, published"
description = "The embedded model as somebody would publish it."
"""


@pytest.mark.slow
def test_a_task_fetches_what_it_lacks_where_that_is_allowed(tmp_path: Path, hub: Hub) -> None:
    hub.repos["somebody/shared-demo"] = files(PACKAGE / "demo")
    daemon = against(hub, Daemon(tmp_path / "own", allow_download=True))
    daemon.models.mkdir()
    (daemon.models / "own.toml").write_text(OWN)
    with daemon:
        task = daemon.submit(model_type="shared_demo", video_length=5, num_inference_steps=1)
        done = daemon.finish(task["task_id"], LONG_S)
        assert done["status"] == "completed", done["error"]
        assert installed(daemon, Catalog.load(daemon.models).get("shared_demo"))


@pytest.mark.slow
def test_a_task_that_can_not_fetch_says_why(tmp_path: Path, hub: Hub) -> None:
    with against(hub, Daemon(tmp_path / "own", allow_download=True)) as daemon:
        failed = daemon.finish(daemon.submit(model_type="wan_vace_14B")["task_id"], LONG_S)
    repo = CATALOG.get("wan_vace_14B").repo
    sentence = f"Model 'wan_vace_14B' could not be downloaded: the hub has no {repo}, or shows it only to"
    assert (failed["status"], failed["error"]["code"]) == ("failed", "no_weights")
    assert failed["error"]["message"].startswith(sentence)


# ------------------------------------------------------------------------------------------------ allow_api_download


@pytest.mark.parametrize("model", [PLAIN.id, "wan_vace_14B", "wan_demo"])
def test_a_request_downloads_nothing_unless_that_is_allowed(tmp_path: Path, hub: Hub, model: str) -> None:
    with against(hub, Daemon(tmp_path / "own")) as daemon:
        answer = daemon.post(f"/models/{model}/download")
        assert answer.status_code == 403
        assert answer.json()["detail"].startswith("allow_api_download is false, so nothing is downloaded")
        assert f"wangpd models download {model}" in answer.json()["detail"]
        assert daemon.get(f"/models/{model}/download").status_code == (200 if model == "wan_demo" else 404)
        assert daemon.delete(f"/models/{model}/download").status_code == 400
        assert hub.names() == hub.revisions == []


def test_the_command_downloads_where_requests_may_not(tmp_path: Path, hub: Hub) -> None:
    with against(hub, Daemon(tmp_path / "own")) as daemon:
        assert daemon.post(f"/models/{PLAIN.id}/download").status_code == 403
        assert command(daemon, "download", PLAIN.id).returncode == 0
        assert installed(daemon, PLAIN)


# ------------------------------------------------------------------------------------- a hub that means no good

OUTSIDE = {
    "above": "../../victim",
    "above, in the middle": "vae/../../../victim",
    "here": "./vae",
    "nothing": "vae//more",
    "a drive": "C:victim",
    "a backslash": "..\\..\\victim",
    "a control character": "vae\x01",
    "absolute": "/tmp/wangpd-victim",
}


@pytest.mark.parametrize("component", OUTSIDE.values(), ids=OUTSIDE)
def test_a_name_that_leads_out_of_the_models_folder_is_refused(local: Daemon, hub: Hub, component: str) -> None:
    index = json.loads(NEEDED["model_index.json"]) | {component: ["diffusers", "X"]}
    hub.repos[PLAIN.repo] = NEEDED | {
        "model_index.json": json.dumps(index).encode(),
        f"{component}/config.json": b"{}",
        f"{component}/model.safetensors": b"x" * 10,
    }
    before = everything(local.folder)
    post(local)
    now = ended(local)
    assert now["status"] == "failed"
    if "//" in component:  # no file has such a name, so it is not found
        assert now["error"]["code"] == "incomplete"
    else:
        assert "outside the model's folder" in now["error"]["message"]
    new = everything(local.folder) - before
    assert {path for path in new if not path.startswith("models") or "victim" in path} <= {"hf", "hf/hub"}
    assert not Path("/tmp/wangpd-victim").exists()


@pytest.mark.parametrize("folder", ["transformer", "vae", "scheduler"])
def test_a_link_inside_the_models_folder_is_not_followed_out_of_it(local: Daemon, folder: str, tmp_path: Path) -> None:
    (local.models / PLAIN.id).mkdir(parents=True)
    (local.models / PLAIN.id / folder).symlink_to(tmp_path)
    post(local)
    assert ended(local)["error"]["code"] == "unsafe"
    assert list(tmp_path.iterdir()) == []


def test_a_models_folder_on_another_disk_is_used(local: Daemon, tmp_path: Path) -> None:
    local.models.mkdir(exist_ok=True)
    (local.models / PLAIN.id).symlink_to(tmp_path)
    post(local)
    assert_completed(local)
    assert files(tmp_path) == NEEDED


@pytest.mark.parametrize("size", [-1, -(2**70), 1.5])
def test_a_size_that_cannot_be_true_is_refused(local: Daemon, hub: Hub, size: int) -> None:
    hub.claimed_bytes["transformer/config.json"] = size
    post(local)
    assert ended(local)["error"]["code"] == "unsafe"


@pytest.mark.parametrize(
    "index", [b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b'{"vae": ["x", "y"' + b" " * 2**21]
)
def test_an_index_that_is_none_ends_the_download_with_a_sentence(local: Daemon, hub: Hub, index: bytes) -> None:
    hub.repos[PLAIN.repo] = NEEDED | {"model_index.json": index}
    post(local)
    now = ended(local)
    assert now["status"] == "failed"
    assert now["error"]["code"] != "process_died", now["error"]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
