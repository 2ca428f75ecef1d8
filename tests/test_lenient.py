"""Clients are taken as they come: values as text, empty fields, encodings, paths, and fields under other names."""

import base64
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from engine.settings import SETTINGS
from tests.daemon import Daemon
from tests.idle import idle_daemon
from tests.wire import exchange, head

PROMPT = {"prompt": "a cat"}
JSON = "application/json"
API = "/api/v1"


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon in which accepted tasks wait for ever."""
    with idle_daemon(tmp_path_factory.mktemp("lenient"), max_body_mb=4) as running:
        Image.new("RGB", (64, 48), "teal").save(running.outputs / "picture.png")
        yield running


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "png")
    return buffer.getvalue()


def resolved(daemon: Daemon, **fields: Any) -> dict[str, Any]:
    """The settings of a request, and its warnings; nothing is queued."""
    answer = daemon.post("/generate?dry_run=true", PROMPT | fields)
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    return {**data["settings"], "warnings": data["warnings"]}


# ---- values

MEANT: list[tuple[str, Any, Any]] = [
    *(("num_inference_steps", text, 30) for text in ("30", " 30 ", "30.0", "+30", "30.", "030")),
    *(("guidance_scale", text, 5.0) for text in ("5", "5.0", " 5.", "0.5e1", "50E-1")),
    ("seed", "9007199254740993", 9007199254740993),
    ("seed", "9007199254740993.0", 9007199254740993),
    ("batch_size", "2", 2),
    *(
        ("resolution", text, "64x96")
        for text in ("64X96", "64 x 96", "64\u00d796", "64*96", " 64x96 ", "64x96\n", "064x096")
    ),
    *(("video_length", text, 41) for text in ("5s", "5 s", "5S", "5sec", "5 seconds", "5.0 s", "41", "41.0", 41.0)),
]


@pytest.mark.parametrize(("name", "value", "meaning"), MEANT)
def test_a_value_as_text_is_taken_for_what_it_means(idle: Daemon, name: str, value: Any, meaning: Any) -> None:
    settings = resolved(idle, **{name: value})
    assert (settings[name], settings["warnings"]) == (meaning, [])


@pytest.mark.parametrize(
    ("value", "frames"),
    [
        *((word, 81) for word in ("false", "False", " FALSE ", "0", 0, "off", "no", False)),
        *((word, 17) for word in ("true", "True", "1", 1, "on", "yes", True)),
    ],
)
def test_a_flag_as_text_or_number_is_taken_for_what_it_means(idle: Daemon, value: Any, frames: int) -> None:
    assert resolved(idle, use_model_defaults=value)["video_length"] == frames


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "prompt"])
def test_an_empty_text_counts_as_left_out(idle: Daemon, name: str) -> None:
    for empty in ("", None) if name in ("negative_prompt", "skip_steps_cache_type") else ("", " ", None):
        assert resolved(idle, seed=1, **({} if name == "seed" else {name: empty})) == resolved(idle, seed=1)
    assert name != "seed" or resolved(idle, seed="")["seed"] >= 0


@pytest.mark.parametrize(
    "fields",
    [
        {"image_start": "", "image_end": "", "video_source": "", "audio_source": " "},
        {"image_refs": []},
        {"image_refs": [""]},
        {"image_refs": ""},
        {"activated_loras": []},
        {"activated_loras": ["", ""]},
        {"activated_loras": ""},
    ],
)
def test_an_input_that_is_empty_counts_as_left_out(idle: Daemon, fields: dict[str, Any]) -> None:
    settings = resolved(idle, **fields)
    assert (settings["task"], settings["warnings"]) == ("t2v", [])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_refs": "<picture>"}, "image_refs: model 'wan_demo' takes no such image"),
        ({"image_refs": ["", "<picture>"]}, "image_refs: model 'wan_demo' takes no such image"),
        ({"activated_loras": "cat.safetensors"}, "activated_loras: 'cat.safetensors' "),
    ],
)
def test_one_value_is_a_list_of_one(idle: Daemon, fields: dict[str, Any], sentence: str) -> None:
    sent = json.loads(json.dumps(fields).replace("<picture>", base64.b64encode(picture()).decode()))
    answer = idle.post("/generate", PROMPT | sent)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(sentence)


@pytest.mark.parametrize("query", ["limit=1", "limit=%201%20", "limit=1.0", "limit=&file_type=&offset=0", "offset=+0"])
def test_a_query_is_taken_for_what_it_means(idle: Daemon, query: str) -> None:
    answer = idle.get(f"/outputs?{query}")
    assert [entry["filename"] for entry in answer.json()["data"]["files"]] == ["picture.png"]


def test_an_empty_query_has_the_defaults(idle: Daemon) -> None:
    assert idle.get("/outputs?limit=&offset=").json()["data"].items() >= {"limit": 50, "offset": 0}.items()
    preview = Image.open(io.BytesIO(idle.get("/preview/picture.png?width=").content))
    assert preview.size == Image.open(io.BytesIO(idle.get("/preview/picture.png").content)).size
    task_id = idle.submit()["task_id"]
    assert idle.get(f"/status/{task_id}?wait=").status_code == 200
    assert len(idle.get("/models?installed=&family=").json()["data"]["models"]) > 10


@pytest.mark.parametrize(("word", "installed"), [("1", True), ("True", True), ("0", False), ("no", False)])
def test_a_flag_in_a_query_is_taken_for_what_it_means(idle: Daemon, word: str, installed: bool) -> None:
    found = idle.get(f"/models?installed={word}").json()["data"]["models"]
    assert {model["installed"] for model in found} == {installed}


@pytest.mark.parametrize("position", ["1", " 1 ", "1.0", 1.0])
def test_a_position_as_text_moves_the_task(idle: Daemon, position: Any) -> None:
    task_id = idle.submit()["task_id"]
    answer = idle.request("PATCH", f"/queue/{task_id}", json={"position": position})
    assert (answer.status_code, answer.json()["data"]["position"]) == (200, 1)


# ---- forms


def test_a_form_of_a_browser_with_everything_left_empty_is_a_request(idle: Daemon) -> None:
    """As a browser sends it: each input that nothing was typed into, and each file input without a file."""
    boundary = "----WebKitFormBoundary7MA4"
    lines = [f'--{boundary}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na cat\r\n']
    for name in ("resolution", "seed", "video_length", "use_model_defaults", "negative_prompt", "model_type"):
        lines.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n\r\n')
    for name in ("image_start", "image_refs", "video_source"):
        disposition = f'Content-Disposition: form-data; name="{name}"; filename=""'
        lines.append(f"--{boundary}\r\n{disposition}\r\nContent-Type: application/octet-stream\r\n\r\n\r\n")
    body = "".join([*lines, f"--{boundary}--\r\n"]).encode()
    content_type = f"multipart/form-data; boundary={boundary}"
    answer = idle.request("POST", "/generate?dry_run=1", data=body, headers={"Content-Type": content_type})
    assert answer.status_code == 200, answer.text
    found, bare = answer.json()["data"]["settings"], resolved(idle)
    assert {name: value for name, value in found.items() if name != "seed"}.items() <= bare.items()


def test_an_empty_file_that_was_chosen_is_refused(idle: Daemon) -> None:
    answer = idle.request("POST", "/generate", data=PROMPT, files={"image_start": ("empty.png", b"")})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("image_start: the picture is not ")


def test_a_picture_in_base64_is_taken_in_a_form_too(idle: Daemon) -> None:
    data = PROMPT | {"image_start": base64.b64encode(picture()).decode()}
    answer = idle.request("POST", "/generate?dry_run=1", files={name: (None, value) for name, value in data.items()})
    assert answer.json()["data"]["settings"]["task"] == "i2v"


@pytest.mark.parametrize("charset", ["bogus", "zip", "x" * 30])
def test_a_part_of_a_form_with_an_unknown_charset_is_400(idle: Daemon, charset: str) -> None:
    answer = idle.request("POST", "/generate", files={"prompt": (None, "a cat", f"text/plain; charset={charset}")})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("The form is malformed")


def test_a_part_of_a_form_is_read_in_the_charset_that_it_declares(idle: Daemon) -> None:
    part = (None, "gr\u00f6\u00dfe".encode("latin-1"), "text/plain; charset=iso-8859-1")
    answer = idle.request("POST", "/generate?dry_run=1", files={"prompt": part})
    assert answer.json()["data"]["settings"]["prompt"] == "gr\u00f6\u00dfe"


@pytest.mark.parametrize("part", [(None, b"gr\xf6\xdfe"), (None, b"gr\xf6\xdfe", "application/octet-stream")])
def test_a_part_of_a_form_that_is_not_utf_8_is_400_with_the_remedy(idle: Daemon, part: tuple[Any, ...]) -> None:
    answer = idle.request("POST", "/generate", files={"prompt": part})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("A part of the form is not UTF-8; send text as UTF-8 or with its charset")


# ---- encodings and content types

TEXT = '{"prompt": "gr\u00f6\u00dfe", "seed": 1}'
CHARSETS = {
    "utf-8": f"{JSON}; charset=utf-8",
    "utf-8-sig": JSON,
    "latin-1": f"{JSON}; charset=iso-8859-1",
    "cp1252": f'{JSON}; charset="windows-1252"',
    "iso8859-15": f"{JSON};charset=ISO-8859-15",
    "utf-16": JSON,
    "utf-16-le": f"{JSON}; charset=utf-16le",
    "utf-32": f"{JSON}; charset=utf-32",
    "cp850": f"{JSON}; charset=cp850",
}


def posted(daemon: Daemon, body: bytes, content_type: str = JSON, **headers: str) -> requests.Response:
    return daemon.request("POST", "/generate?dry_run=1", data=body, headers={"Content-Type": content_type, **headers})


@pytest.mark.parametrize("codec", CHARSETS)
def test_a_body_is_read_in_the_charset_that_it_declares(idle: Daemon, codec: str) -> None:
    answer = posted(idle, TEXT.encode(codec), CHARSETS[codec])
    assert answer.json()["data"]["settings"]["prompt"] == "gr\u00f6\u00dfe"


@pytest.mark.parametrize("charset", ["bogus", "punycode", "idna", "unicode_escape", "zip", "utf-9", "cp99"])
def test_an_unknown_charset_is_400_and_named(idle: Daemon, charset: str) -> None:
    answer = posted(idle, TEXT.encode(), f"{JSON}; charset={charset}")
    sentence = f"Content-Type: '{charset}' is no known charset; send UTF-8"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})


@pytest.mark.parametrize(
    ("body", "content_type", "sentence"),
    [
        (TEXT.encode("latin-1"), JSON, "The body is not UTF-8: byte 0xF6 at line 1, column 15; "),
        (b'{\n"prompt": "\x93a cat\x94"}', JSON, "The body is not UTF-8: byte 0x93 at line 2, column 12; "),
        (TEXT.encode(), f"{JSON}; charset=us-ascii", "The body is not US-ASCII: byte 0xC3 at line 1, column 15; "),
    ],
)
def test_a_body_that_is_not_in_its_charset_is_400_with_the_place_and_the_remedy(
    idle: Daemon, body: bytes, content_type: str, sentence: str
) -> None:
    answer = posted(idle, body, content_type)
    remedy = "send UTF-8, or declare the encoding: Content-Type: application/json; charset=iso-8859-1"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence + remedy})


@pytest.mark.parametrize(
    "content_type", ["text/json", "application/vnd.api+json", "application/ld+json; charset=utf-8", "APPLICATION/JSON"]
)
def test_every_name_of_json_is_json(idle: Daemon, content_type: str) -> None:
    assert posted(idle, TEXT.encode(), content_type).status_code == 200


ENCODED = {
    "gzip": gzip.compress(TEXT.encode()),
    "x-gzip": gzip.compress(TEXT.encode()),
    "deflate": zlib.compress(TEXT.encode()),
    "br": b"\x0b\x02\x80",
    "zstd": b"\x28\xb5\x2f\xfd",
    "gzip, gzip": gzip.compress(gzip.compress(TEXT.encode())),
    "identity, br": b"\x0b\x02\x80",
    "unheard-of": TEXT.encode(),
}


@pytest.mark.parametrize("encoding", ENCODED)
@pytest.mark.parametrize(("method", "path"), [("POST", "/generate"), ("PATCH", "/queue/1")])
def test_an_encoded_body_is_415_naming_its_encoding(idle: Daemon, encoding: str, method: str, path: str) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": encoding}
    answer = idle.request(method, path, data=ENCODED[encoding], headers=headers)
    sentence = f"Content-Encoding: '{encoding}' is not supported; send the body as it is"
    assert (answer.status_code, answer.json()) == (415, {"detail": sentence})


def test_an_encoded_body_is_refused_before_it_is_sent(idle: Daemon) -> None:
    """The answer is there though the body is not."""
    request = head(f"{API}/generate", "POST", Content_Type=JSON, Content_Encoding="gzip", Content_Length=1000)
    answer = exchange(idle.url, request)
    assert answer is not None and answer.status == 415


@pytest.mark.parametrize("encoding", ["identity", "", "IDENTITY"])
def test_a_body_that_says_it_is_not_encoded_is_taken(idle: Daemon, encoding: str) -> None:
    assert posted(idle, TEXT.encode(), **{"Content-Encoding": encoding}).status_code == 200


# ---- fields under other names

MISSES = {
    "steps": "num_inference_steps",
    "numInferenceSteps": "num_inference_steps",
    "num_inference_step": "num_inference_steps",
    "cfg": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "CFG-scale": "guidance_scale",
    "guidence_scale": "guidance_scale",
    "width": 'resolution, such as "832x480"',
    "height": 'resolution, such as "832x480"',
    "frames": "video_length",
    "num_frames": "video_length",
    "seconds": 'video_length, such as "5s"',
    "n": "batch_size",
    "init_image": "image_start",
    "lora": "activated_loras",
    "model": "model_type",
    "negative": "negative_prompt",
    "Seed": "seed",
}


@pytest.mark.parametrize("name", MISSES)
def test_a_near_miss_names_the_right_field(idle: Daemon, name: str) -> None:
    warning = f"{name}: there is no such field, it was ignored; did you mean {MISSES[name]}?"
    assert resolved(idle, **{name: 5})["warnings"] == [warning]


@pytest.mark.parametrize("name", ["callback", "x", "__proto__", "k" * 90, ""])
def test_a_field_that_resembles_none_is_named_without_a_guess(idle: Daemon, name: str) -> None:
    assert resolved(idle, **{name: 5})["warnings"] == [f"{name}: there is no such field, it was ignored"]


def test_very_many_unknown_fields_are_counted(idle: Daemon) -> None:
    warnings = resolved(idle, **{f"key{number}": 1 for number in range(50_000)})["warnings"]
    assert len(warnings) == 21
    assert warnings[-1] == "49980 more fields do not exist and were ignored"


# ---- paths


@pytest.mark.parametrize(
    "path",
    [
        *("/api/v1/health/", "//api/v1/health", "/api//v1//health", "/api/v1/health//", "///api/v1/health/ready///"),
        *("/api/v1/", "/api/v1//", "/api/v1/queue/", "//api/v1/outputs/?limit=1", "/api/openapi.json/", "/api//docs"),
    ],
)
def test_a_slash_too_many_is_forgiven(idle: Daemon, path: str) -> None:
    answer = exchange(idle.url, head(path, Connection="close"))
    assert answer is not None and answer.status == 200, answer


def test_a_slash_too_many_is_forgiven_where_something_is_sent(idle: Daemon) -> None:
    """Served as it is: a redirect would lose the body of a POST."""
    base = idle.url + "/api"
    made = requests.post(f"{base}//v1/generate/?dry_run=0", json=PROMPT, timeout=60, allow_redirects=False)
    task_id = made.json()["data"]["task_id"]
    assert requests.patch(f"{base}/v1/queue//{task_id}/", json={"position": 1}, timeout=60).status_code == 200
    assert requests.get(f"{base}/v1/status/{task_id}/", timeout=60).json()["data"]["task_id"] == task_id
    assert requests.delete(f"{base}/v1//queue/{task_id}//", timeout=60).status_code == 200


@pytest.mark.parametrize("path", ["/download/picture.png/", "/download//picture.png/", "/preview/picture.png//"])
def test_a_file_name_with_a_slash_is_404(idle: Daemon, path: str) -> None:
    assert exchange(idle.url, head(API + path)).status == 404  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["docs", "redoc"])
def test_a_viewer_with_a_slash_leads_to_the_page_whose_links_work(idle: Daemon, name: str) -> None:
    for slashes in ("/", "//"):
        page = requests.get(f"{idle.url}/api/{name}{slashes}", timeout=60)
        assert (page.status_code, page.url) == (200, f"{idle.url}/api/{name}")


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that asks for a token."""
    folder: Path = tmp_path_factory.mktemp("locked")
    (folder / "token").write_text("secret")
    with Daemon(folder, token_file=str(folder / "token")) as running:
        yield running


@pytest.mark.parametrize(
    "path",
    [
        *("/api/v1/queue", "//api/v1/queue", "/api//v1/queue", "/api/v1//queue//", "/api/v1/queue/", "///api///v1///"),
        *("/api/v1/./queue", "/./api/v1/queue", "/x/../api/v1/queue", "/api/docs/../v1/queue", "/%61pi/v1/queue"),
        *(
            "/api%2fv1/queue",
            "/api/%761/queue",
            "/API/v1/queue",
            "/api/v1/health/../queue",
            "//api/v1/health//../queue",
        ),
        *("http://127.0.0.1//api/v1/queue", "http://x//api//v1/queue/", "/api/v1;/queue", "/api\\v1\\queue"),
        *(
            "/api/v1/health/ready/../../queue",
            "/api/v1/queue?/api/v1/health",
            "/api/v1/queue#/api/v1/health",
            "//api/v1",
        ),
    ],
)
def test_no_form_of_a_path_gets_past_the_token(locked: Daemon, path: str) -> None:
    answer = exchange(locked.url, head(path, Connection="close"))
    assert answer is not None and answer.status in (400, 401, 404), answer
    assert b"total_tasks" not in answer.body and b"endpoints" not in answer.body


@pytest.mark.parametrize("path", ["/api/v1/health/", "//api/v1/health", "/api/v1//health/ready/"])
def test_what_is_open_without_a_token_stays_open_with_a_slash_too_many(locked: Daemon, path: str) -> None:
    answer = exchange(locked.url, head(path, Connection="close"))
    assert answer is not None and answer.status == 200


def test_a_token_opens_a_path_with_a_slash_too_many(locked: Daemon) -> None:
    headers = {"Authorization": "Bearer secret"}
    assert requests.get(f"{locked.url}//api/v1//queue/", headers=headers, timeout=60).status_code == 200
