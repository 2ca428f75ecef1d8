"""Requests as multipart/form-data: the same fields, with files as they are."""

import base64
import hashlib
import io
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from engine.gpu.save import encode
from tests.daemon import Daemon
from tests.idle import idle_daemon

BOUNDARY = "b0undary"
HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with idle_daemon(tmp_path_factory.mktemp("forms"), max_body_mb=1) as daemon:
        yield daemon


def picture(colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), colour).save(buffer, "png")
    return buffer.getvalue()


def sent(daemon: Daemon, files: dict[str, bytes], key: str = "", **words: str) -> requests.Response:
    """A form with these words and files."""
    fields: dict[str, Any] = {name: (None, value) for name, value in {"prompt": "a cat", **words}.items()}
    fields |= {name: ("any name.bin", data) for name, data in files.items()}
    return daemon.request("POST", "/generate", files=fields, headers={"Idempotency-Key": key} if key else {})


def settings(daemon: Daemon, answer: requests.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    state = daemon.status(answer.json()["data"]["task_id"])
    found: dict[str, Any] = state["settings"]
    return found


def test_a_file_in_a_form_is_the_same_input_as_in_base64(idle: Daemon) -> None:
    data = picture()
    made = settings(idle, sent(idle, {"image_start": data}))
    assert (made["task"], made["image_start"]) == ("i2v", [hashlib.sha256(data).hexdigest()])


def test_numbers_and_words_in_a_form_are_those_of_json(idle: Daemon) -> None:
    words = {"seed": "42", "guidance_scale": "3.5", "video_length": "2s", "negative_prompt": "5", "resolution": "64x96"}
    made = settings(idle, sent(idle, {}, **words))
    assert {name: made[name] for name in words} == {
        "seed": 42,
        "guidance_scale": 3.5,
        "video_length": 17,
        "negative_prompt": "5",
        "resolution": "64x96",
    }


def test_a_flag_in_a_form_is_a_flag(idle: Daemon) -> None:
    assert settings(idle, sent(idle, {}, use_model_defaults="false"))["video_length"] == 81


def test_an_unknown_field_of_a_form_is_named(idle: Daemon) -> None:
    warning = "stpes: there is no such field, it was ignored; did you mean num_inference_steps?"
    assert sent(idle, {}, stpes="4").json()["data"]["warnings"] == [warning]


def test_an_unknown_file_of_a_form_is_named_with_the_field_for_it(idle: Daemon) -> None:
    warning = "init_image: there is no such field, it was ignored; did you mean image_start?"
    assert sent(idle, {"init_image": picture()}).json()["data"]["warnings"] == [warning]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [({"seed": "many"}, "seed: "), ({"prompt": ""}, "prompt: "), ({"guidance_scale": "NaN"}, "guidance_scale: ")],
)
def test_a_wrong_value_in_a_form_is_400_with_the_field(idle: Daemon, words: dict[str, str], sentence: str) -> None:
    answer = sent(idle, {}, **words)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(sentence)


def test_a_repeated_form_with_its_key_is_answered_once_more(idle: Daemon) -> None:
    first, again = (sent(idle, {"image_start": picture()}, key="form") for _ in range(2))
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json() == first.json()


def test_another_file_with_the_same_key_is_another_request(idle: Daemon) -> None:
    sent(idle, {"image_start": picture("red")}, key="two")
    assert sent(idle, {"image_start": picture("blue")}, key="two").status_code == 400


@pytest.mark.parametrize("other", [("ab", "c"), ("a", ""), ("a' 1 'b", "c"), ("", "abc")])
def test_a_form_with_other_borders_is_another_request(idle: Daemon, other: tuple[str, str]) -> None:
    key = f"borders {other}"
    assert sent(idle, {}, key=key, prompt="a", negative_prompt="bc").status_code == 200
    prompt, negative = other
    assert sent(idle, {}, key=key, prompt=prompt, negative_prompt=negative).status_code == 400
    assert sent(idle, {}, key=key, prompt="a", negative_prompt="bc").headers["Idempotency-Replayed"] == "true"


@pytest.mark.parametrize("letter", ["a", "ß", "猫", "🐈"])
def test_a_prompt_in_a_form_has_the_limit_of_json(idle: Daemon, letter: str) -> None:
    assert sent(idle, {}, prompt=letter * 10_000).status_code == 200
    for length in (10_001, 48_001, 60_000):
        answer = sent(idle, {}, prompt="a" + letter * (length - 1))
        assert (answer.status_code, answer.json()["detail"]) == (400, "prompt: must have 1 to 10000 characters")


# A name beyond ASCII as older libraries write it, an encoding as e-mail has it, and no name at all.
WRITTEN = {
    "a name in UTF-8": (b"; filename*=utf-8''%C3%BC.png", picture()),
    "both names": (b"; filename=u.png; filename*=utf-8''%C3%BC.png", picture()),
    "base64 and its name": (b'; filename="a.png"\r\nContent-Transfer-Encoding: BASE64', base64.encodebytes(picture())),
    "binary": (b'; filename="a.png"\r\nContent-Transfer-Encoding: binary', picture()),
    "a type alone": (b"\r\nContent-Type: image/png", picture()),
    "base64 alone": (b"", base64.b64encode(picture())),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_is_taken_however_its_part_is_written(idle: Daemon, name: str) -> None:
    more, data = WRITTEN[name]
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image_start"'.encode()
    body = part("prompt", b"a") + head + more + b"\r\n\r\n" + data + b"\r\n" + END
    made = settings(idle, idle.request("POST", "/generate", data=body, headers=HEADERS))
    assert made["image_start"] == [hashlib.sha256(picture()).hexdigest()]


def film(folder: Path) -> bytes:
    path = folder / "film.mp4"
    encode.write_video(path, np.zeros((9, 32, 32, 3), np.uint8), 8, None)
    return path.read_bytes()


def test_a_video_that_the_model_does_not_take_is_400_with_models_that_do(idle: Daemon, tmp_path: Path) -> None:
    answer = sent(idle, {"video_source": film(tmp_path)})
    assert answer.status_code == 400
    sentence = "video_source: model 'wan_demo' takes no such video; models that do: "
    assert re.fullmatch(re.escape(sentence) + r"\w[\w., ]+ and \d+ more", answer.json()["detail"])


@pytest.mark.parametrize("name", ["video_source", "audio_source"])
def test_what_is_no_video_or_sound_is_400(idle: Daemon, name: str) -> None:
    answer = sent(idle, {name: picture()})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(f"{name}: the {'video' if name == 'video_source' else 'sound'} is not ")


def part(name: str, data: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
BROKEN = {
    "nothing": b"",
    "no parts": END,
    "cut off": part("prompt", b"a cat"),
    "cut in a head": f"--{BOUNDARY}\r\nContent-Disp".encode(),
    "no name": f"--{BOUNDARY}\r\nContent-Disposition: form-data\r\n\r\na\r\n".encode() + END,
    "no form at all": b'{"prompt": "a cat"}',
    "no text": part("prompt", b"\xff\xfe") + END,
    "a form in a form": (
        f"--{BOUNDARY}\r\nContent-Type: multipart/mixed; boundary=x\r\n\r\n--x\r\n\r\na\r\n--x--\r\n".encode() + END
    ),
}


@pytest.mark.parametrize("body", BROKEN)
def test_a_broken_form_is_400(idle: Daemon, body: str) -> None:
    answer = idle.request("POST", "/generate", data=BROKEN[body], headers=HEADERS)
    assert answer.status_code == 400
    assert "detail" in answer.json()


@pytest.mark.parametrize("boundary", [b'"\xff"', b'"\xc3\xbc"', b'"\x01"', b'"b', b'""'])
def test_a_boundary_that_is_no_text_is_400(idle: Daemon, boundary: bytes) -> None:
    headers = {"Content-Type": b"multipart/form-data; boundary=" + boundary}
    answer = idle.request("POST", "/generate", data=part("prompt", b"a") + END, headers=headers)
    assert answer.status_code == 400
    assert "detail" in answer.json()


def test_a_form_without_a_boundary_is_400(idle: Daemon) -> None:
    answer = idle.request("POST", "/generate", data=END, headers={"Content-Type": "multipart/form-data"})
    assert answer.status_code == 400


def test_a_form_that_is_too_large_is_413(idle: Daemon) -> None:
    assert sent(idle, {"image_start": b"\0" * 2**21}).status_code == 413


def test_a_form_that_does_not_tell_its_size_is_413_once_it_is_too_large(idle: Daemon) -> None:
    body = part("image_start", b"\0" * 2**21) + END
    host, port = idle.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        head = f"POST /api/v1/generate HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}Content-Type: {HEADERS['Content-Type']}\r\n\r\n".encode())
        connection.sendall(f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n")
        assert connection.recv(64).startswith(b"HTTP/1.1 413 ")
