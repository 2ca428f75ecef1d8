"""The contract of tests/contract.py, and what the API decides beyond it, asserted against a running daemon."""

import base64
import hashlib
import io
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from tests import contract
from tests.daemon import Daemon
from tests.frames import read_video
from tests.idle import idle_daemon

QUICK = {"video_length": 5, "num_inference_steps": 2}
LONG = {"num_inference_steps": 100, "repeat_generation": 10}  # ends by being cancelled


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon in which accepted tasks wait for ever."""
    with idle_daemon(tmp_path_factory.mktemp("idle"), max_body_mb=1) as running:
        yield running


@pytest.fixture(scope="module")
def running_task(daemon: Daemon) -> Iterator[int]:
    """The id of a task that is denoising for as long as this module may look at it."""
    done = daemon.run(**QUICK)
    assert done["status"] == "completed", done
    task_id = daemon.submit(**LONG)["task_id"]
    daemon.until(task_id, lambda state: state["current_step"] >= 1)
    yield task_id
    daemon.delete(f"/queue/{task_id}")
    assert daemon.finish(task_id)["status"] == "cancelled"


@pytest.fixture(scope="module")
def answers(daemon: Daemon, running_task: int) -> dict[str, tuple[requests.Response, dict[str, Any]]]:
    """The answer to each documented request, with the parameters of its path, while one task runs and others wait."""
    waiting = [daemon.submit(**QUICK)["task_id"] for _ in range(3)]
    filename = daemon.get("/outputs").json()["data"]["files"][0]["filename"]
    parameters = {"model_type": "wan_t2v_14B", "task_id": running_task, "filename": filename}
    collected = {}
    for endpoint in contract.ENDPOINTS:
        own = {**parameters, "task_id": waiting[0]} if endpoint.method == "DELETE" else parameters
        body = {"prompt": "a blue square", **QUICK} if endpoint.method == "POST" else None
        answer = daemon.request(endpoint.method, endpoint.path.format(**own), json=body)
        collected[f"{endpoint.method} {endpoint.path}"] = (answer, own)
    return collected


ALL = pytest.mark.parametrize("endpoint", contract.ENDPOINTS, ids=lambda endpoint: f"{endpoint.method} {endpoint.path}")


@ALL
def test_every_documented_request_is_answered_200(answers: Any, endpoint: contract.Endpoint) -> None:
    answer, _ = answers[f"{endpoint.method} {endpoint.path}"]
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "application/json; charset=utf-8"), answer.text


@ALL
def test_every_message_reads_as_documented(answers: Any, endpoint: contract.Endpoint) -> None:
    answer, parameters = answers[f"{endpoint.method} {endpoint.path}"]
    body = answer.json()
    if not endpoint.message:
        assert "success" not in body
        return
    assert set(body) == {"success", "message", "data"}
    assert body["success"] is True
    words = parameters | body["data"] | {"count": len(body["data"].get("models", ()))}
    assert body["message"] == endpoint.message.format(**words)


@ALL
def test_every_documented_key_is_there_with_its_type(answers: Any, endpoint: contract.Endpoint) -> None:
    body = answers[f"{endpoint.method} {endpoint.path}"][0].json()
    assert contract.misfits(body["data"] if endpoint.message else body, endpoint.data) == []


def test_the_values_that_the_page_shows_are_those_of_the_daemon(answers: Any) -> None:
    about, health = answers["GET /"][0].json()["data"], answers["GET /health"][0].json()
    assert about["api_version"] == contract.API_VERSION
    assert health["status"] == contract.HEALTHY


def test_the_endpoints_of_the_root_name_every_documented_path(answers: Any) -> None:
    told = set(answers["GET /"][0].json()["data"]["endpoints"].values())
    wanted = {f"{endpoint.method} /api/v1{endpoint.path}" for endpoint in contract.ENDPOINTS}
    wanted |= {f"GET /api/v1{path}" for path in contract.FILES}
    assert {word.rstrip("/") for word in wanted} <= {word.rstrip("/") for word in told}


def test_the_queue_while_one_runs_tells_what_runs_and_what_waits(answers: Any, running_task: int) -> None:
    data = answers["GET /queue"][0].json()["data"]
    assert (data["current_task_id"], data["is_processing"]) == (running_task, True)
    assert [task["position"] for task in data["tasks"]] == list(range(1, data["total_tasks"] + 1))
    assert [task["status"] for task in data["tasks"]] == ["processing", *["queued"] * (data["total_tasks"] - 1)]
    assert (data["tasks"][0]["id"], data["tasks"][0]["steps"], data["tasks"][0]["length"]) == (running_task, 100, 17)


def test_removing_a_waiting_task_and_clearing_leave_the_running_one(daemon: Daemon, answers: Any) -> None:
    _, parameters = answers["DELETE /queue/{task_id}"]
    assert daemon.status(parameters["task_id"])["status"] == "cancelled"
    assert answers["DELETE /queue"][0].json()["data"]["removed_count"] == 3  # two of the three, and the POST's
    assert [task["status"] for task in daemon.get("/queue").json()["data"]["tasks"]] == ["processing"]


def test_a_status_has_its_documented_types_in_every_state(daemon: Daemon, idle: Daemon, running_task: int) -> None:
    shape = next(endpoint.data for endpoint in contract.ENDPOINTS if endpoint.path == "/status/{task_id}")
    waiting = idle.submit()["task_id"]
    states = [daemon.status(running_task), daemon.status(running_task - 1), idle.status(waiting)]
    idle.delete(f"/queue/{waiting}")
    states.append(idle.status(waiting))
    assert [state["status"] for state in states] == ["processing", "completed", "queued", "cancelled"]
    assert [fault for state in states for fault in contract.misfits(state, shape)] == []
    assert [state["position"] for state in states] == [1, None, 1, None]
    assert (states[1]["progress"], states[1]["current_step"], states[1]["total_steps"]) == (100.0, 2, 2)


@pytest.mark.parametrize(("path", "content_type"), contract.DOCUMENTS.items())
def test_the_documents_lie_where_the_page_says(daemon: Daemon, path: str, content_type: str) -> None:
    answer = requests.get(daemon.url + path, timeout=60)
    assert (answer.status_code, answer.headers["Content-Type"].partition(";")[0]) == (200, content_type)


# -- the models of the page's examples


def test_the_model_of_the_examples_is_as_shown(daemon: Daemon) -> None:
    models = {model["id"]: model for model in daemon.get("/models").json()["data"]["models"]}
    assert contract.SHOWN_MODEL.items() <= models["wan_t2v_14B"].items()
    assert models[contract.SHOWN_IMAGE_MODEL]["is_i2v"] is True


def test_the_settings_of_the_examples_are_as_shown(daemon: Daemon) -> None:
    settings = daemon.get("/models/wan_t2v_14B/settings").json()["data"]
    assert contract.SHOWN_SETTINGS.items() <= settings.items()
    assert daemon.get("/models/wan_t2v_14B").json()["data"]["default_settings"] == settings


def test_the_number_of_models_in_the_message_is_theirs(daemon: Daemon) -> None:
    body = daemon.get("/models").json()
    assert body["message"] == f"Found {len(body['data']['models'])} models"
    assert len({model["id"] for model in body["data"]["models"]}) == len(body["data"]["models"])


# -- paths, errors, content types


def test_the_base_path_answers_with_and_without_a_slash(daemon: Daemon) -> None:
    assert daemon.get("").json() == daemon.get("/").json()


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("GET", "/nothing", 404, "There is no /api/v1/nothing; GET /api/v1/ lists what there is"),
        ("GET", "/models/none", 404, "Model 'none' not found; GET /api/v1/models lists those there are"),
        ("GET", "/models/none/settings", 404, "Model 'none' not found; GET /api/v1/models lists those there are"),
        ("GET", "/status/999999", 404, "Task 999999 not found"),
        ("GET", "/status/99999999999999999999999999", 404, "Task 99999999999999999999999999 not found"),
        ("GET", "/status/-1", 404, "Task -1 not found"),
        ("GET", "/status/abc", 400, "task_id: 'abc' must be a whole number"),
        ("GET", "/status/1.5", 400, "task_id: '1.5' must be a whole number"),
        ("DELETE", "/queue/999999", 404, "Task 999999 not found"),
        ("DELETE", "/queue/x", 400, "task_id: 'x' must be a whole number"),
        ("GET", "/outputs?limit=0", 400, "limit: 0 must be between 1 and 200"),
        ("GET", "/outputs?limit=201", 400, "limit: 201 must be between 1 and 200"),
        ("GET", "/outputs?limit=many", 400, "limit: 'many' must be a whole number"),
        ("GET", "/outputs?limit=%D9%A1", 400, "limit: '\u0661' must be a whole number"),
        ("GET", "/outputs?offset=-1", 400, "offset: -1 must be 0 or more"),
        ("GET", "/outputs?offset=1e3", 400, "offset: '1e3' must be a whole number"),
        ("GET", "/outputs?file_type=gif", 400, "file_type: must be one of 'video', 'image', 'audio', not 'gif'"),
        ("GET", "/download/none.mp4", 404, "File 'none.mp4' not found; GET /api/v1/outputs lists those there are"),
        ("GET", "/preview/none.mp4", 404, "File 'none.mp4' not found; GET /api/v1/outputs lists those there are"),
        ("GET", "/preview/none.mp4?width=31", 400, "width: 31 must be between 32 and 1920"),
        ("GET", "/preview/none.mp4?width=1921", 400, "width: 1921 must be between 32 and 1920"),
    ],
)
def test_an_error_is_one_sentence_under_detail(
    daemon: Daemon, method: str, path: str, status: int, sentence: str
) -> None:
    answer = daemon.request(method, path)
    assert (answer.status_code, answer.json()) == (status, {"detail": sentence})
    assert answer.headers["Content-Type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/queue", "DELETE,GET,HEAD"),
        ("GET", "/generate", "POST"),
        ("PUT", "/health", "GET,HEAD"),
        ("PATCH", "/status/1", "GET,HEAD"),
        ("GET", "/queue/1", "DELETE,PATCH"),
    ],
)
def test_a_wrong_method_is_405_and_told_which_are_right(daemon: Daemon, method: str, path: str, allowed: str) -> None:
    answer = daemon.request(method, path)
    assert (answer.status_code, answer.headers["Allow"]) == (405, allowed)
    assert answer.json() == {"detail": f"{method} is not allowed here; allowed: {allowed}"}


def test_a_body_that_is_too_large_is_413(idle: Daemon) -> None:
    answer = idle.post("/generate", {"prompt": "a", "image_start": "A" * 2**20})
    assert (answer.status_code, answer.json()) == (413, {"detail": "The body is larger than 1 MiB (max_body_mb)"})


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/x", None])
def test_a_body_that_does_not_say_json_is_400(idle: Daemon, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    answer = idle.request("POST", "/generate", data=b'{"prompt": "a cat"}', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("Content-Type: ")


def test_json_with_a_charset_is_json(idle: Daemon) -> None:
    headers = {"Content-Type": "application/json; charset=utf-8"}
    assert idle.request("POST", "/generate", data=b'{"prompt": "a"}', headers=headers).status_code == 200


def test_unknown_fields_are_ignored_and_named_in_the_warnings(idle: Daemon) -> None:
    data = idle.submit(wavelength=5, colour="red")
    expected = [f"{name}: there is no such field, it was ignored" for name in ("wavelength", "colour")]
    assert data["warnings"] == expected
    assert idle.status(data["task_id"])["warnings"] == expected


def test_times_are_utc_with_milliseconds_and_z(daemon: Daemon, running_task: int) -> None:
    done, entry = daemon.status(running_task - 1), daemon.get("/outputs").json()["data"]["files"][0]
    times = [done[name] for name in ("created_at", "started_at", "finished_at")]
    times += [entry["created_at"], entry["modified_at"], daemon.get("/health").json()["timestamp"]]
    assert [time for time in times if not re.fullmatch(contract.TIME, time)] == []
    assert times[:3] == sorted(times[:3])


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_json_does_not_have_are_refused(idle: Daemon, number: str) -> None:
    body = f'{{"prompt": "a cat", "guidance_scale": {number}}}'
    answer = idle.request("POST", "/generate", data=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text


# -- ids


def test_ids_only_grow_also_over_a_restart(own_daemon: Daemon) -> None:
    own_daemon.start()
    first = [own_daemon.submit()["task_id"] for _ in range(3)]
    own_daemon.delete("/queue")
    own_daemon.stop()
    own_daemon.start()
    assert first == sorted(set(first))
    assert own_daemon.submit()["task_id"] > max(first)


# -- what a request means


def settled(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    """The settings that a request comes to, as its status tells them."""
    settings: dict[str, Any] = daemon.status(daemon.submit(**fields)["task_id"])["settings"]
    return settings


def test_model_type_left_out_is_the_default_model(idle: Daemon) -> None:
    assert settled(idle)["model_type"] == idle.get("/config").json()["data"]["default_model"]


def test_an_unknown_model_is_404(idle: Daemon) -> None:
    answer = idle.post("/generate", {"prompt": "a", "model_type": "none"})
    sentence = "Model 'none' not found; GET /api/v1/models lists those there are"
    assert (answer.status_code, answer.json()) == (404, {"detail": sentence})


@pytest.mark.parametrize("use", [{}, {"use_model_defaults": True}, {"use_model_defaults": None}])
def test_what_was_not_sent_is_the_models_default(idle: Daemon, use: dict[str, Any]) -> None:
    defaults = idle.get("/models/wan_demo/settings").json()["data"]
    ignored = {"seed": 1, "prompt": "a"}  # drawn, and the client's own
    assert defaults | ignored == {key: (settled(idle, **use) | ignored)[key] for key in defaults}


def test_without_the_models_defaults_the_documented_ones_hold(idle: Daemon) -> None:
    settings = settled(idle, use_model_defaults=False)
    sent = {name: value for name, value in contract.DEFAULTS.items() if name in settings and name != "seed"}
    assert sent == {name: settings[name] for name in sent}
    assert sent.keys() >= {"resolution", "video_length", "num_inference_steps", "guidance_scale", "flow_shift"}


@pytest.mark.parametrize("use", [True, False])
def test_what_was_sent_always_wins(idle: Daemon, use: bool) -> None:
    sent = {
        "prompt": "a cat",
        "negative_prompt": "dogs",
        "resolution": "96x48",
        "video_length": 9,
        "num_inference_steps": 7,
        "guidance_scale": 3.5,
        "flow_shift": 2.5,
        "seed": 11,
        "batch_size": 2,
        "repeat_generation": 3,
    }
    settings = settled(idle, use_model_defaults=use, **sent)
    assert sent.items() <= settings.items()


@pytest.mark.parametrize(
    ("resolution", "nearest"),
    [("830x480", "832x480"), ("64x65", "64x64"), ("1x1", "16x16"), ("72x40", "64x32"), ("0x64", "16x64")],
)
def test_a_resolution_off_the_step_is_told_the_nearest(idle: Daemon, resolution: str, nearest: str) -> None:
    answer = idle.post("/generate", {"prompt": "a", "resolution": resolution})
    sentence = f"resolution: '{resolution}' must be a multiple of 16; nearest is {nearest}"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})


@pytest.mark.parametrize(("sent", "rounded"), [(1, 5), (6, 5), (7, 9), (16, 17), (200, 201)])
def test_a_length_off_the_frame_rule_is_rounded_with_a_warning(idle: Daemon, sent: int, rounded: int) -> None:
    data = idle.submit(video_length=sent)
    assert len(data["warnings"]) == 1
    assert data["warnings"][0].startswith(f"video_length: {sent} was changed to {rounded}, ")
    assert idle.status(data["task_id"])["settings"]["video_length"] == rounded


def test_a_length_on_the_frame_rule_stays(idle: Daemon) -> None:
    data = idle.submit(video_length=21)
    assert data["warnings"] == []
    assert idle.status(data["task_id"])["settings"]["video_length"] == 21


def test_a_length_in_seconds_counts_at_the_models_frame_rate(idle: Daemon) -> None:
    assert settled(idle, video_length="5s")["video_length"] == 41  # 40 frames at 8 a second, and the rule's one


@pytest.mark.parametrize("name", contract.LIMITS)
def test_the_limits_of_a_field_are_allowed_themselves(idle: Daemon, name: str) -> None:
    answers = [idle.post("/generate", {"prompt": "a", name: value}) for value in contract.LIMITS[name]]
    assert [answer.status_code for answer in answers] == [200, 200], [answer.text for answer in answers]


@pytest.mark.parametrize("name", contract.BEYOND)
def test_beyond_its_limits_a_field_is_400_and_named(idle: Daemon, name: str) -> None:
    for value in contract.BEYOND[name]:
        answer = idle.post("/generate", {"prompt": "a", name: value})
        assert answer.status_code == 400, (value, answer.text)
        assert answer.json()["detail"].startswith(f"{name}: "), answer.text


def test_a_prompt_has_1_to_10000_characters(idle: Daemon) -> None:
    low, high = contract.PROMPT_CHARACTERS
    lengths = {length: idle.post("/generate", {"prompt": "ä" * length}) for length in (low - 1, low, high, high + 1)}
    assert [answer.status_code for answer in lengths.values()] == [400, 200, 200, 400]
    assert lengths[0].json() == {"detail": "prompt: must have 1 to 10000 characters"}


# -- seeds


def test_a_drawn_seed_is_told_in_the_answer_the_status_and_the_settings(idle: Daemon) -> None:
    first, second = idle.submit(seed=-1), idle.submit()
    state = idle.status(first["task_id"])
    assert first["seed"] == state["seed"] == state["settings"]["seed"] >= 0
    assert first["seed"] != second["seed"]


def test_the_same_request_and_seed_make_the_same_frames(daemon: Daemon, running_task: int) -> None:
    daemon.delete(f"/queue/{running_task}")
    drawn = daemon.run(**QUICK)
    again = daemon.run(**QUICK, seed=drawn["seed"])
    other = daemon.run(**QUICK, seed=drawn["seed"] + 1)
    frames, same, different = (read_video(daemon.made(state)) for state in (drawn, again, other))
    assert np.array_equal(frames, same)
    assert not np.array_equal(frames, different)


def test_each_file_of_a_batch_and_of_a_repetition_has_the_next_seed(daemon: Daemon, running_task: int) -> None:
    daemon.delete(f"/queue/{running_task}")
    state = daemon.run(**QUICK, seed=40, batch_size=2, repeat_generation=2)
    assert [file["seed"] for file in state["files"]] == [40, 41, 42, 43]
    assert len({file["filename"] for file in state["files"]}) == 4
    assert (state["current_step"], state["progress"]) == (state["total_steps"], 100.0)


# -- pictures


def noise(width: int, height: int) -> bytes:
    """A PNG of chance, the same at each call."""
    pixels = random.Random(0).randbytes(width * height)
    buffer = io.BytesIO()
    Image.frombytes("L", (width, height), pixels).save(buffer, "PNG")
    return buffer.getvalue()


PNG = next(png for side in range(17, 64) if (png := noise(side, 17)) and len(png) % 3 == 1)  # two signs of padding
STANDARD = base64.b64encode(PNG).decode()
FORMS = {
    "standard": STANDARD,
    "with a data: prefix": f"data:image/png;base64,{STANDARD}",
    "URL-safe": base64.urlsafe_b64encode(PNG).decode(),
    "without padding": STANDARD.rstrip("="),
    "URL-safe without padding": base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "in lines": base64.encodebytes(PNG).decode(),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_is_taken_in_every_form_of_base64(idle: Daemon, form: str) -> None:
    assert {"+", "/"} <= set(STANDARD)
    assert STANDARD.endswith("==")
    assert settled(idle, image_start=FORMS[form])["image_start"] == [hashlib.sha256(PNG).hexdigest()]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_png_jpeg_and_webp_are_taken(idle: Daemon, kind: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, kind)
    assert settled(idle, image_start=base64.b64encode(buffer.getvalue()).decode())["task"] == "i2v"


@pytest.mark.parametrize("name", ["image_end", "image_refs"])
def test_a_picture_that_the_model_does_not_take_is_400_with_those_that_do(idle: Daemon, name: str) -> None:
    answer = idle.post("/generate", {"prompt": "a", name: [STANDARD] if name == "image_refs" else STANDARD})
    assert answer.status_code == 400
    head, _, models = answer.json()["detail"].partition("; models that do: ")
    assert head == f"{name}: model 'wan_demo' takes no such image"
    known = {model["id"] for model in idle.get("/models").json()["data"]["models"]}
    assert models
    assert set(re.sub(r" and \d+ more$", "", models).split(", ")) <= known


def test_at_most_ten_references_are_taken(idle: Daemon) -> None:
    answer = idle.post("/generate", {"prompt": "a", "image_refs": ["AAAA"] * (contract.IMAGE_REFS_MOST + 1)})
    assert (answer.status_code, answer.json()) == (400, {"detail": "image_refs: must have at most 10 pictures"})


def test_a_model_without_weights_is_400_with_the_command_that_installs_them(idle: Daemon) -> None:
    answer = idle.post("/generate", {"prompt": "a", "model_type": "wan_t2v_14B"})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("model_type: 'wan_t2v_14B' is not installed; install it with: ")


# -- queue


def test_positions_count_from_the_one_that_is_next(idle: Daemon) -> None:
    idle.delete("/queue")
    tasks = [idle.submit() for _ in range(3)]
    assert [task["position"] for task in tasks] == [1, 2, 3]
    idle.delete(f"/queue/{tasks[0]['task_id']}")
    assert [idle.status(task["task_id"])["position"] for task in tasks] == [None, 1, 2]


@pytest.mark.parametrize(("length", "shown"), [(100, 100), (101, 101), (500, 101)])
def test_the_listing_cuts_a_prompt_at_100_characters(idle: Daemon, length: int, shown: int) -> None:
    idle.delete("/queue")
    task_id = idle.submit(prompt="ä" * length)["task_id"]
    listed = idle.get("/queue").json()["data"]["tasks"][0]["prompt"]
    assert listed == "ä" * 100 + "…" * (shown - 100)
    assert idle.status(task_id)["prompt"] == "ä" * length


def test_an_empty_queue_says_so(idle: Daemon) -> None:
    idle.delete("/queue")
    body = idle.get("/queue").json()
    empty = {"total_tasks": 0, "current_task_id": None, "is_processing": False, "tasks": []}
    assert (body["success"], body["message"]) == (True, "Queue has 0 tasks")
    assert {key: body["data"][key] for key in empty} == empty


def test_a_waiting_task_is_removed_and_a_second_time_has_ended(idle: Daemon) -> None:
    task_id = idle.submit()["task_id"]
    first, second = idle.delete(f"/queue/{task_id}"), idle.delete(f"/queue/{task_id}")
    assert (first.status_code, first.json()["message"]) == (200, f"Task {task_id} removed from queue")
    assert first.json()["data"] == {"removed_task_id": task_id, "status": "cancelled"}
    sentence = f"Task {task_id} has already ended (cancelled); there is nothing to remove"
    assert (second.status_code, second.json()) == (400, {"detail": sentence})


def test_a_running_task_is_cancelled_and_the_next_one_runs(daemon: Daemon, running_task: int) -> None:
    daemon.delete(f"/queue/{running_task}")
    task_id = daemon.submit(**LONG)["task_id"]
    following = daemon.submit(**QUICK)["task_id"]
    daemon.until(task_id, lambda state: state["phase"] == "denoising")
    answer = daemon.delete(f"/queue/{task_id}")
    assert (answer.status_code, answer.json()["data"]) == (200, {"removed_task_id": task_id, "status": "cancelling"})
    ended, after = daemon.finish(task_id), daemon.finish(following)
    assert (ended["status"], ended["files"], ended["position"]) == ("cancelled", [], None)
    assert after["status"] == "completed"
    assert list(daemon.outputs.glob(f"*_t{task_id:06d}_*")) == []


def test_a_full_queue_is_503_and_says_when_to_try_again(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_queue=2) as full:
        answers = [full.post("/generate", {"prompt": "a"}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [200, 200, 503]
        assert int(answers[2].headers["Retry-After"]) > 0
        assert full.get("/queue").json()["data"]["total_tasks"] == 2


# -- outputs, previews, configuration


@pytest.fixture(scope="module")
def shelf(idle: Daemon) -> Daemon:
    """A daemon with files of all types, one a second, and two of the same second."""
    names = ["e.mp4", "d.wav", "c.jpg", "b.webm", "a.png", "hidden.txt"]
    for age_s, name in zip([50, 40, 30, 20, 20, 10], names, strict=True):
        (idle.outputs / name).write_bytes(b"x" * age_s)
        os.utime(idle.outputs / name, (1_800_000_000 - age_s,) * 2)
    return idle


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("", ["a.png", "b.webm", "c.jpg", "d.wav", "e.mp4"]),
        ("?limit=2", ["a.png", "b.webm"]),
        ("?limit=2&offset=2", ["c.jpg", "d.wav"]),
        ("?offset=5", []),
        ("?offset=99999999999999999999999", []),
        ("?file_type=video", ["b.webm", "e.mp4"]),
        ("?file_type=image&limit=1", ["a.png"]),
        ("?file_type=audio", ["d.wav"]),
    ],
)
def test_outputs_are_newest_first_by_page_and_type(shelf: Daemon, query: str, names: list[str]) -> None:
    assert [entry["filename"] for entry in shelf.get(f"/outputs{query}").json()["data"]["files"]] == names


def test_a_page_of_outputs_tells_the_total_and_how_it_was_asked(shelf: Daemon) -> None:
    body, defaults = shelf.get("/outputs?limit=1&offset=1&file_type=video").json(), shelf.get("/outputs").json()["data"]
    assert body["message"] == "Found 2 files"
    assert {key: body["data"][key] for key in ("total", "limit", "offset")} == {"total": 2, "limit": 1, "offset": 1}
    assert contract.OUTPUTS_DEFAULTS.items() <= defaults.items()
    assert [shelf.get(f"/outputs?limit={limit}").status_code for limit in contract.OUTPUTS_LIMIT] == [200, 200]


def test_an_entry_tells_type_size_and_times(shelf: Daemon) -> None:
    entry = shelf.get("/outputs?offset=4").json()["data"]["files"][0]
    assert (entry["filename"], entry["type"], entry["size_bytes"]) == ("e.mp4", "video", 50)
    assert entry["modified_at"] == "2027-01-15T07:59:10.000Z"


@pytest.mark.parametrize(
    ("query", "size"),
    [("", (320, 160)), ("?width=32", (32, 16)), ("?width=100", (100, 50)), ("?width=1920", (800, 400))],
)
def test_a_preview_is_a_jpeg_of_at_most_the_width(idle: Daemon, query: str, size: tuple[int, int]) -> None:
    Image.new("RGB", (800, 400), "green").save(idle.outputs / "wide.png")
    answer = idle.get(f"/preview/wide.png{query}")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/jpeg")
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("JPEG", size)
    (idle.outputs / "wide.png").unlink()


def test_the_preview_of_a_video_is_its_first_frame(daemon: Daemon, running_task: int) -> None:
    state = daemon.status(running_task - 1)
    with Image.open(io.BytesIO(daemon.get(f"/preview/{state['files'][0]['filename']}").content)) as image:
        shown = np.asarray(image.convert("RGB")).astype(int)
    first = read_video(daemon.made(state))[0].astype(int)
    assert shown.shape == first.shape
    assert np.abs(shown - first).mean() < 8  # levels of 255; two lossy codecs lie between


def test_audio_has_no_preview(idle: Daemon) -> None:
    (idle.outputs / "song.wav").write_bytes(b"RIFF")
    answer = idle.get("/preview/song.wav")
    (idle.outputs / "song.wav").unlink()
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("'song.wav' is audio")


def test_the_configuration_tells_no_path_but_the_save_path(daemon: Daemon) -> None:
    body = daemon.get("/config")
    assert body.json()["data"]["save_path"] == "outputs"
    assert str(daemon.folder) not in body.text
    assert [key for key in body.json()["data"] if re.search("token|secret|password|state|models_dir", key)] == []
