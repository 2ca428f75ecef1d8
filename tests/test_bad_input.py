"""Bad requests: each is answered with a sentence that helps, and leaves nothing behind."""

import base64
import io
import json
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from PIL import Image

from tests.daemon import Daemon
from tests.idle import idle_daemon

MAX_PIXELS = 1_000_000
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon in which accepted tasks wait for ever, with small limits."""
    with idle_daemon(tmp_path_factory.mktemp("bad"), max_body_mb=2, max_image_pixels=MAX_PIXELS) as running:
        yield running


def traces(daemon: Daemon) -> dict[str, Any]:
    """All that an accepted request would change: the queue, the journal's rows, and the files."""
    with sqlite3.connect(f"file:{daemon.state / 'journal.sqlite'}?mode=ro", uri=True) as journal:
        tables = [name for (name,) in journal.execute("select name from sqlite_master where type = 'table'")]
        rows = {name: journal.execute(f'select count(*) from "{name}"').fetchone() for name in tables}
        rows["ids"] = journal.execute("select * from sqlite_sequence").fetchall() if "sqlite_sequence" in tables else []
    journal.close()
    files = {str(path) for folder in (daemon.outputs, daemon.state / "inputs") for path in folder.rglob("*")}
    return {"queue": daemon.get("/queue").json()["data"], "rows": rows, "files": files}


@pytest.fixture
def refused(idle: Daemon) -> Iterator[Daemon]:
    """The daemon, and afterwards the proof that the test's requests left nothing behind."""
    before = traces(idle)
    yield idle
    assert traces(idle) == before
    assert idle.get("/health").status_code == 200


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def picture(kind: str, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG with any header over any pixels: Pillow would not write it."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(pixels, 9)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + body


# field, value, the whole sentence
SENTENCES = [
    ("prompt", None, "prompt: must be text in quotes, not null"),
    ("prompt", "", "prompt: must have 1 to 10000 characters"),
    ("prompt", 5, "prompt: 5 must be text in quotes"),
    ("prompt", ["a"], "prompt: ['a'] must be text in quotes"),
    ("prompt", True, "prompt: True must be text in quotes"),
    ("prompt", "x" * 10_001, "prompt: must have 1 to 10000 characters"),
    ("prompt", "\ud83d", "prompt: must be valid Unicode"),
    ("negative_prompt", 5, "negative_prompt: 5 must be text in quotes"),
    ("negative_prompt", "x" * 10_001, "negative_prompt: must have at most 10000 characters"),
    ("negative_prompt", "a\udfff", "negative_prompt: must be valid Unicode"),
    ("model_type", 1, "model_type: 1 must be text in quotes"),
    ("resolution", 832, "resolution: 832 must be text in quotes"),
    ("resolution", "wide", "resolution: 'wide' must be WIDTHxHEIGHT in pixels, such as 832x480"),
    ("resolution", "-64x64", "resolution: '-64x64' must be WIDTHxHEIGHT in pixels, such as 832x480"),
    ("resolution", "64x", "resolution: '64x' must be WIDTHxHEIGHT in pixels, such as 832x480"),
    ("resolution", "\u0666\u0664x64", "resolution: '\u0666\u0664x64' must be WIDTHxHEIGHT in pixels, such as 832x480"),
    ("resolution", "65x64", "resolution: '65x64' must be a multiple of 16; nearest is 64x64"),
    ("video_length", "long", "video_length: 'long' must be frames from 1 to 1000, or a duration such as \"5s\""),
    ("video_length", 0, 'video_length: 0 must be frames from 1 to 1000, or a duration such as "5s"'),
    ("video_length", 5.5, 'video_length: 5.5 must be frames from 1 to 1000, or a duration such as "5s"'),
    ("video_length", True, 'video_length: True must be frames from 1 to 1000, or a duration such as "5s"'),
    ("video_length", [5], 'video_length: [5] must be frames from 1 to 1000, or a duration such as "5s"'),
    ("video_length", "-5s", "video_length: '-5s' must be frames from 1 to 1000, or a duration such as \"5s\""),
    ("num_inference_steps", 2.5, "num_inference_steps: 2.5 must be a whole number"),
    ("num_inference_steps", False, "num_inference_steps: False must be a whole number"),
    ("num_inference_steps", 101, "num_inference_steps: 101 must be between 1 and 100"),
    ("guidance_scale", True, "guidance_scale: True must be a number"),
    ("guidance_scale", {}, "guidance_scale: {} must be a number"),
    ("guidance_scale", 21, "guidance_scale: 21.0 must be between 0 and 20"),
    ("guidance_scale", 10**400, "guidance_scale: the number is too large"),
    ("embedded_guidance_scale", "x", "embedded_guidance_scale: 'x' must be a number"),
    ("flow_shift", 0, "flow_shift: 0.0 must be above 0 and at most 100"),
    ("flow_shift", [], "flow_shift: [] must be a number"),
    ("seed", 1.5, "seed: 1.5 must be a whole number"),
    ("seed", 2**63, "seed: 9223372036854775808 must be between -1 and 9223372036854775807"),
    ("num_inference_steps", "1_0", "num_inference_steps: '1_0' must be a whole number"),
    ("num_inference_steps", "0x10", "num_inference_steps: '0x10' must be a whole number"),
    ("num_inference_steps", "\u0663", "num_inference_steps: '\u0663' must be a whole number"),
    ("num_inference_steps", "101", "num_inference_steps: 101 must be between 1 and 100"),
    ("guidance_scale", "1e400", "guidance_scale: '1e400' must be a number"),
    ("guidance_scale", "NaN", "guidance_scale: 'NaN' must be a number"),
    ("guidance_scale", "5,0", "guidance_scale: '5,0' must be a number"),
    ("guidance_scale", "inf", "guidance_scale: 'inf' must be a number"),
    ("video_length", "5 m", "video_length: '5 m' must be frames from 1 to 1000, or a duration such as \"5s\""),
    ("resolution", [64, 64], "resolution: [64, 64] must be text in quotes"),
    ("batch_size", 0, "batch_size: 0 must be between 1 and 10"),
    ("repeat_generation", 11, "repeat_generation: 11 must be between 1 and 10"),
    ("repeat_generation", {}, "repeat_generation: {} must be a whole number"),
    ("use_model_defaults", 2, "use_model_defaults: 2 must be true or false"),
    ("use_model_defaults", "maybe", "use_model_defaults: 'maybe' must be true or false"),
    ("image_start", 5, "image_start: must be text: the file's bytes in base64"),
    ("image_start", [], "image_start: must be text: the file's bytes in base64"),
    ("image_start", "not base64!", "image_start: is not valid base64; send the file's bytes in base64"),
    ("image_start", "ä", "image_start: is not valid base64; send the file's bytes in base64"),
    ("image_start", "A", "image_start: is not valid base64; send the file's bytes in base64"),
    ("image_end", {}, "image_end: must be text: the file's bytes in base64"),
    ("image_refs", 5, "image_refs: must be a list of pictures in base64"),
    ("image_refs", ["AAAA", 5], "image_refs[1]: must be text: the file's bytes in base64"),
    ("image_refs", [None], "image_refs[0]: must be text: the file's bytes in base64"),
]


@pytest.mark.parametrize(("field", "value", "sentence"), SENTENCES, ids=lambda value: str(value)[:30])
def test_a_wrong_value_is_400_with_the_field_and_the_rule(
    refused: Daemon, field: str, value: Any, sentence: str
) -> None:
    answer = refused.post("/generate", {"prompt": "a cat"} | {field: value})
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})


PNG, JPEG, WEBP, GIF = (picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF"))
PICTURES = {
    "text": (b"a cat", "is not a PNG, JPEG or WebP image"),
    "a GIF": (GIF, "is not a PNG, JPEG or WebP image"),
    "an SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a PNG, JPEG or WebP image"),
    "a truncated PNG": (PNG[: len(PNG) // 2], "is damaged or cut off; send the whole image again"),
    "a truncated JPEG": (JPEG[: len(JPEG) // 2], "is damaged or cut off; send the whole image again"),
    "a truncated WebP": (WEBP[: len(WEBP) // 2], "is damaged or cut off; send the whole image again"),
    "a PNG signature alone": (PNG[:8], "is not a PNG, JPEG or WebP image"),
    "a 100-megapixel header": (
        png_of(10_000, 10_000, b""),
        "is 10000x10000, more than the limit of 1000000 pixels; send a smaller image",
    ),
    "a 100-megapixel bomb": (
        png_of(10_000, 10_000, b"\0" * 30_010_000),
        "is 10000x10000, more than the limit of 1000000 pixels; send a smaller image",
    ),
    "a header beyond all bounds": (
        png_of(2**31 - 1, 2**31 - 1, b""),
        "has more pixels than can be decoded safely; send a smaller image",
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_wrong_picture_is_400_with_the_field_and_what_is_wrong(refused: Daemon, name: str) -> None:
    data, sentence = PICTURES[name]
    answer = refused.post("/generate", {"prompt": "a cat", "image_start": encoded(data)})
    assert (answer.status_code, answer.json()) == (400, {"detail": f"image_start: the picture {sentence}"})


def test_a_picture_of_exactly_the_limit_is_taken(idle: Daemon) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1000, MAX_PIXELS // 1000)).save(buffer, "PNG")
    idle.submit(image_start=encoded(buffer.getvalue()))


def test_of_several_references_the_wrong_one_is_named(refused: Daemon) -> None:
    answer = refused.post("/generate", {"prompt": "a", "image_refs": [encoded(PNG), encoded(GIF)]})
    assert answer.status_code == 400
    assert answer.json()["detail"] == "image_refs[1]: the picture is not a PNG, JPEG or WebP image"


def test_a_good_picture_is_not_stored_when_something_else_is_wrong(refused: Daemon) -> None:
    answer = refused.post("/generate", {"prompt": "a", "resolution": "65x64", "image_start": encoded(PNG)})
    assert answer.json()["detail"].startswith("resolution: ")


SHOWN = 'a JSON object such as {"prompt": "a cat"}'
ONE_OBJECT = "The body is nested too deeply; send a flat object"
CONTROL = r"a tab within a text must be written as \t, another control character as \u and four digits"
QUOTES = "names and texts must be in straight double quotes"


def at(line: int, column: int, reason: str) -> str:
    return f"The body is not valid JSON: line {line}, column {column}: {reason}"


BODIES = {
    "empty": (b"", f"The body is empty; send {SHOWN}"),
    "blank": (b" \n ", f"The body is empty; send {SHOWN}"),
    "cut off in a text": (
        b'{"prompt": "a',
        at(1, 12, "the text that begins here has no closing quote, or the body is cut off"),
    ),
    "cut off after a name": (b'{"prompt"', at(1, 10, "the body ends here, within the object; it is cut off")),
    "cut off after a value": (b'{"prompt": "a"', at(1, 15, "the body ends here, within the object; it is cut off")),
    "two documents": (b'{"prompt": "a"} {}', at(1, 17, "the object has ended before this; send one object")),
    "single quotes": (b"{'prompt': 'a'}", at(1, 2, QUOTES)),
    "typographic quotes": ("{\u201cprompt\u201d: 1}".encode(), at(1, 2, QUOTES)),
    "a value in single quotes": (b"{\"prompt\":\n  'a'}", at(2, 3, QUOTES)),
    "a line feed in a text": (b'{\n "prompt": "a\nb"}', at(2, 14, r"a line break within a text must be written as \n")),
    "a tab in a text": (b'{"prompt": "a\tb"}', at(1, 14, CONTROL)),
    "a control character": (b'{"prompt": "a\x01b"}', at(1, 14, CONTROL)),
    "a path of Windows": (
        b'{"prompt": "C:\\x"}',
        at(1, 15, r"a backslash within a text must be written twice, as \\"),
    ),
    "a trailing comma": (b'{"prompt": "a",\n}', at(2, 1, "a comma before a closing bracket must be left out")),
    "a trailing comma in a list": (
        b'{"prompt": "a", "activated_loras": ["b",]}',
        at(1, 41, "a comma before a closing bracket must be left out"),
    ),
    "a comment": (b'{"prompt": "a" // a cat\n}', at(1, 16, "JSON has no comments; leave it out")),
    "a comment behind": (b'{"prompt": "a"}\n# a cat', at(2, 1, "JSON has no comments; leave it out")),
    "a value of Python": (b'{"use_model_defaults": True}', at(1, 24, "JSON writes true, false and null")),
    "no colon": (b'{"prompt" "a"}', at(1, 11, "a colon must be here")),
    "no value": (
        b'{"prompt": ?}',
        at(1, 12, "a value must be here: a text in double quotes, a number, true, false or null"),
    ),
    "a quote in a text": (
        b'{"prompt": "say "hi""}',
        at(1, 18, "a comma is missing before this, or a double quote within a text has no backslash"),
    ),
    "not UTF-8": (
        b'{"prompt":\n "gr\xf6\xdfe"}',
        "The body is not UTF-8: byte 0xF6 at line 2, column 5; send UTF-8, or declare the encoding: "
        "Content-Type: application/json; charset=iso-8859-1",
    ),
    "nested 100,000 deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ONE_OBJECT),
    "objects nested 100,000 deep": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ONE_OBJECT),
    "an integer of 5,000 digits": (
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        "The body has a number of too many digits",
    ),
    "NaN": (b'{"prompt": "NaN",\n"guidance_scale": NaN}', at(2, 19, "JSON has no NaN; send a number")),
    "Infinity": (b'{"prompt": "a", "flow_shift": -Infinity}', at(1, 31, "JSON has no -Infinity; send a number")),
    "a field twice": (b'{"prompt": "a", "prompt": "b"}', "prompt: the body has it twice; send it once"),
    "a list": (b"[]", f"The body must be {SHOWN}; it is a list"),
    "a string": (b'"a cat"', f"The body must be {SHOWN}; it is a text"),
    "an object encoded twice": (
        json.dumps('{"prompt": "a"}').encode(),
        f"The body must be {SHOWN}; it is a text with an object in it: it was encoded twice",
    ),
    "a number": (b"5", f"The body must be {SHOWN}; it is a single value"),
    "null": (b"null", f"The body must be {SHOWN}; it is a single value"),
    "no prompt": (b"{}", "prompt: is missing; say what to show"),
    "a misspelt prompt": (b'{"promt": "a"}', "prompt: is missing; there is no field 'promt', send it as prompt"),
    "another server's prompt": (b'{"text": "a"}', "prompt: is missing; there is no field 'text', send it as prompt"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_400(refused: Daemon, name: str) -> None:
    data, sentence = BODIES[name]
    answer = refused.request("POST", "/generate", data=data, headers=JSON)
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "text/html", "application/jsonx", "json", ""]
)
def test_a_wrong_content_type_is_400(refused: Daemon, content_type: str) -> None:
    answer = refused.request("POST", "/generate", data=b'{"prompt": "a"}', headers={"Content-Type": content_type})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("Content-Type: ")
    assert answer.json()["detail"].endswith("must be application/json or multipart/form-data")


@pytest.mark.parametrize("size_mb", [2, 3, 40])
def test_a_body_beyond_the_limit_is_413(refused: Daemon, size_mb: int) -> None:
    body = b'{"prompt": "a", "image_start": "' + b"A" * size_mb * 2**20 + b'"}'
    answer = refused.request("POST", "/generate", data=body, headers=JSON)
    assert (answer.status_code, answer.json()) == (413, {"detail": "The body is larger than 2 MiB (max_body_mb)"})


def test_a_body_beyond_the_limit_is_413_in_chunks_too(refused: Daemon) -> None:
    answer = refused.request("POST", "/generate", data=(b" " * 2**20 for _ in range(4)), headers=JSON)
    assert answer.status_code == 413


def test_a_resolution_beyond_the_models_limit_is_400_with_the_limit(refused: Daemon) -> None:
    most = refused.get("/models/wan_demo").json()["data"]["limits"]["max_side"]
    answer = refused.post("/generate", {"prompt": "a", "resolution": f"{most + 16}x64"})
    sentence = f"resolution: '{most + 16}x64' is over the limit of {most} pixels a side"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})


@pytest.mark.parametrize(
    "field", ["resolution", "video_length", "seed", "use_model_defaults", "num_inference_steps", "model_type"]
)
def test_a_sentence_stays_short_however_long_the_value(refused: Daemon, field: str) -> None:
    answer = refused.post("/generate", {"prompt": "a", field: "x" * 500_000})
    assert answer.status_code in (400, 404)
    assert len(answer.json()["detail"]) < 2100


def test_a_null_counts_as_not_sent(idle: Daemon) -> None:
    names = [
        *("negative_prompt", "model_type", "resolution", "video_length", "num_inference_steps", "guidance_scale"),
        *("embedded_guidance_scale", "flow_shift", "seed", "batch_size", "repeat_generation", "use_model_defaults"),
        *("image_start", "image_end", "image_refs"),
    ]
    bare, nulls = idle.submit(), idle.submit(**dict.fromkeys(names))
    plain, same = (idle.status(data["task_id"])["settings"] | {"seed": 0} for data in (bare, nulls))
    assert nulls["warnings"] == []
    assert plain == same


@pytest.mark.parametrize("prompt", ["a\0cat", "\x1b[31m", "\u202e", "🐈" * 100, "\r\n\r\n", " ", "../../x", "%s{0}"])
def test_a_strange_prompt_is_taken_and_told_as_it_is(idle: Daemon, prompt: str) -> None:
    task_id = idle.submit(prompt=prompt)["task_id"]
    assert idle.status(task_id)["prompt"] == prompt


def test_a_number_with_an_empty_fraction_is_whole(idle: Daemon) -> None:
    body = json.dumps({"prompt": "a", "num_inference_steps": 30.0, "seed": 5.0})
    answer = idle.request("POST", "/generate", data=body, headers=JSON)
    assert answer.json()["data"]["seed"] == 5


def test_a_fault_is_told_without_a_trace(refused: Daemon) -> None:
    bodies = (b"\0" * 100, b"{" * 1000, json.dumps({"prompt": {"a": [1]}}).encode(), b'{"prompt": "a", "": 1, "": 2}')
    answers = [refused.request("POST", "/generate", data=body, headers=JSON) for body in bodies[:3]]
    assert {answer.status_code for answer in answers} == {400}
    assert not [answer for answer in answers if "Traceback" in answer.text or ".py" in answer.text]


def test_a_header_that_is_no_http_leaves_the_daemon_running(refused: Daemon) -> None:
    with pytest.raises(requests.RequestException):
        refused.get("/health", headers={"X": "a" * 100_000}).raise_for_status()
