"""A corpus of hostile requests, the same at every call: each is to be refused, and to change nothing.

An attack is the bytes of one request as they go over the wire; no client library stands between it and the daemon.
"""

import base64
import io
import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from urllib.parse import quote_from_bytes

from PIL import Image

API = b"/api/v1"
SEED = 4
VICTIM = "secret.mp4"  # a file that lies beside the output folder
JSON = {"Content-Type": "application/json"}
MUTANTS = 8  # of each whole picture


@dataclass(frozen=True)
class Attack:
    """`request` is what is sent; `label` is short and tells it from all others of its class."""

    label: str
    request: bytes


def request(
    method: bytes, target: bytes, headers: Mapping[str, str | bytes] | None = None, body: bytes | None = None
) -> bytes:
    """An HTTP/1.1 request, as it is asked for and not as it should be; `body` brings its length."""
    fields: dict[str, str | bytes] = {"Host": "127.0.0.1", **(headers or {})}
    if body is not None:
        fields.setdefault("Content-Length", str(len(body)))
    values = {name: value if isinstance(value, bytes) else value.encode() for name, value in fields.items()}
    lines = [name.encode() + b": " + value for name, value in values.items()]
    return b"\r\n".join([method + b" " + target + b" HTTP/1.1", *lines, b"", body or b""])


def posted(body: bytes, path: bytes = b"/generate", **headers: str) -> bytes:
    """A POST of a body that says it is JSON."""
    return request(b"POST", API + path, {**JSON, **headers}, body)


# --------------------------------------------------------------------------------------------------------------- names

NAMES = [
    *(b"../" + VICTIM.encode(), b"../../" + VICTIM.encode(), b"..\\" + VICTIM.encode(), b"x/../../" + VICTIM.encode()),
    *(b"/etc/passwd", b"//etc/passwd", b"\\\\host\\share.mp4", b"C:\\x.mp4", b"file:///etc/passwd", b"~/x.mp4"),
    *(b"..", b".", b"...", b"....//" + VICTIM.encode(), b".hidden.mp4", b".a.mp4.part", b"clip.mp4\0", b"clip\0.mp4"),
    *(b"clip.mp4\n", b"\rclip.mp4", b"\x1b[2J.mp4", b"\x7f.mp4", b"\xff\xfe.mp4", b"\xc0\xae\xc0\xae\xc0\xaf.mp4"),
    *(b"\xed\xa0\x80.mp4", b"\xe2\x80\xae4pm.exe", b"CON.mp4", b"NUL", b"aux.mp4:stream", b"link.mp4", b"folder.mp4"),
    *(b"a" * 300 + b".mp4", b"\xf0\x9f\x90\x88" * 70 + b".mp4", b"%s%n.mp4", b"$(id).mp4", b"`id`.mp4", b"'; --.mp4"),
    *(b"<script>.mp4", b"clip.mp4/../../" + VICTIM.encode(), b"journal.sqlite", b"../state/journal.sqlite", b" "),
]
ENCODINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "quoted": lambda name: quote_from_bytes(name, safe="").encode(),
    "all": lambda name: b"".join(b"%%%02x" % byte for byte in name),
    "twice": lambda name: quote_from_bytes(quote_from_bytes(name, safe="").encode(), safe="").encode(),
    "dots too": lambda name: quote_from_bytes(name, safe="\\").replace(".", "%2E").encode(),
}
PLACES = [(b"GET", b"/download/"), (b"GET", b"/preview/"), (b"HEAD", b"/download/")]


def names() -> Iterator[Attack]:
    """Names of files that lead elsewhere, or that are none, in every encoding and in each path that takes one."""
    for number, name in enumerate(NAMES):
        method, path = PLACES[number % len(PLACES)]
        spellings = {encode(name): encoding for encoding, encode in ENCODINGS.items()}  # each but once
        for spelling, encoding in spellings.items():
            yield Attack(f"{method.decode()} {encoding} {name!r}", request(method, API + path + spelling))


# ----------------------------------------------------------------------------------------------------- paths, methods

IDS = [
    *(b"0", b"-1", b"99999", b"1e3", b"1.0", b"0x1", b"%31%30%30%30%30", b"1%00", b"%201", b"1;drop", b"../1"),
    *(b"9" * 20, b"9" * 400, b"9" * 5000, b"-" + b"9" * 30, b"NaN", b"null", b"%D9%A1", b"%EF%BC%91", b"1/", b"'1'"),
]
METHODS = [b"PUT", b"POST", b"PATCH", b"TRACE", b"OPTIONS", b"CONNECT", b"PROPFIND", b"get", b"G" * 100]


def paths() -> Iterator[Attack]:
    """Tasks and models that do not exist, ids that are none, and methods that nothing has."""
    for number in IDS:
        for method, path in ((b"GET", b"/status/"), (b"DELETE", b"/queue/"), (b"POST", b"/queue/%s/retry")):
            target = path % number if b"%s" in path else path + number
            yield Attack(f"{method.decode()} {target[:40]!r} {len(target)}", request(method, API + target))
    for name in NAMES:
        target = API + b"/models/" + ENCODINGS["quoted"](name)
        yield Attack(f"model {name!r}", request(b"GET", target))
    for method in METHODS:
        yield Attack(f"method {method!r}", request(method, API + b"/outputs"))
    yield Attack("a target without a slash", request(b"GET", b"api/v1/queue"))
    yield Attack("a long path", request(b"GET", API + b"/" + b"a" * 7000))
    yield Attack("a deep path", request(b"GET", API + b"/a" * 3000))
    yield Attack("a star", request(b"GET", b"*"))


# ------------------------------------------------------------------------------------------------------------- queries

QUERIES = [
    *(b"limit=0", b"limit=-1", b"limit=201", b"limit=abc", b"limit=1.5", b"limit=%20x", b"limit=%00", b"limit=1%201"),
    *(b"limit=--1", b"limit=1_0", b"limit=0x10", b"limit[]=1&limit=x", b"limit=%D9%A1", b"limit=" + b"9" * 5000),
    *(b"offset=-1", b"offset=x", b"offset=1e9", b"offset=NaN", b"offset=" + b"9" * 4100, b"limit=5&offset=%FF"),
    *(b"file_type=%20video", b"file_type=exe", b"file_type=video%00", b"file_type=VIDEO", b"file_type=../video"),
]


def queries() -> Iterator[Attack]:
    """Values outside their limits, and values that are no values."""
    for query in QUERIES:
        yield Attack(repr(query[:40]), request(b"GET", API + b"/outputs?" + query))
    for width in (b"0", b"31", b"1921", b"-320", b"1e3", b"wide", b"0x40", b"9" * 300, b"%00"):
        yield Attack(f"width {width[:20]!r}", request(b"GET", API + b"/preview/there.png?width=" + width))
    for wait in (b"0", b"61", b"-1", b"x", b"9" * 50):
        yield Attack(f"wait {wait!r}", request(b"GET", API + b"/status/1?wait=" + wait))
    for dry_run in (b"2", b"maybe", b"%00", b"2&dry_run=0"):
        yield Attack(f"dry run {dry_run!r}", posted(b'{"prompt": "a"}', b"/generate?dry_run=" + dry_run))
    for status in (b"none", b"queued%27--", b"%ff"):
        yield Attack(f"status {status!r}", request(b"GET", API + b"/tasks?status=" + status))


# -------------------------------------------------------------------------------------------------------------- bodies

BODIES: Mapping[str, bytes] = {
    "nothing": b"",
    "zeros": b"\0" * 1000,
    "noise": random.Random(SEED).randbytes(1000),
    "UTF-16": '{"prompt": "a"}'.encode("utf-16") + b"\0",
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "bytes that are no UTF-8": b'{"prompt": "\xff"}',
    "an overlong slash": b'{"prompt": "\xc0\xaf"}',
    "a line feed in a string": b'{"prompt": "a\nb"}',
    "a trailing comma": b'{"prompt": "a",}',
    "a comment": b'{"prompt": "a"} // a',
    "two objects": b'{"prompt": "a"}{"prompt": "b"}',
    "lists, deep": b"[" * 200_000,
    "objects, deep": b'{"a":' * 100_000,
    "a deep prompt": b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a long number": b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "a large exponent": b'{"prompt": "a", "guidance_scale": 1e400}',
    "a small exponent": b'{"prompt": "a", "flow_shift": 1e-400}',
    "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
    "a long key": b'{"' + b"k" * 1_000_000 + b'": 1}',
    "many keys": json.dumps({f"key {number}": number for number in range(20_000)}).encode(),
    "a long prompt": json.dumps({"prompt": "a" * 1_000_000}).encode(),
    "no object": b'"prompt"',
    "a prototype": b'{"__proto__": {"prompt": "a"}}',
    "a class": b'{"__class__": "str", "py/object": "os.system"}',
    "base64 with line noise": json.dumps({"prompt": "a", "image_start": "====" * 1000}).encode(),
    "base64 of an odd length": json.dumps({"prompt": "a", "image_start": "A" * 100_001}).encode(),
    "a data URL of nothing": b'{"prompt": "a", "image_start": "data:image/png;base64,"}',
    "a file URL": b'{"prompt": "a", "image_start": "file:///etc/passwd"}',
    "a path": b'{"prompt": "a", "image_start": "/etc/passwd"}',
    "an address": b'{"prompt": "a", "image_start": "http://127.0.0.1/"}',
    "a hundred pictures": json.dumps({"prompt": "a", "image_refs": ["AAAA"] * 100}).encode(),
    "a size of nothing": b'{"prompt": "a", "resolution": "0x0"}',
    "a size beyond all": b'{"prompt": "a", "resolution": "99999x99999"}',
    "a size of Arabic digits": '{"prompt": "a", "resolution": "٦٤x٦٤"}'.encode(),
    "a model that is a path": b'{"prompt": "a", "model_type": "../../etc"}',
    "a model that is a template": b'{"prompt": "a", "model_type": "{0.__class__}"}',
    "a model of a long name": json.dumps({"prompt": "a", "model_type": "m" * 100_000}).encode(),
    "a length of a long text": json.dumps({"prompt": "a", "video_length": "1" * 100_000 + "s"}).encode(),
}
WRONG = [True, -1, 1e308, 2**70, "", "x", [], {}, [[]], {"a": 1}, "\0", "1" * 5000]
FIELDS = ["prompt", "resolution", "video_length", "num_inference_steps", "guidance_scale", "seed", "batch_size"]
# Not hostile at all; an empty text counts as left out, for all but the prompt.
RIGHT = [
    ("prompt", "x"),
    ("prompt", "\0"),
    ("prompt", "1" * 5000),
    ("seed", -1),
    *((field, "") for field in FIELDS[1:]),
]


def bodies() -> Iterator[Attack]:
    """What is no JSON, no request, or a request with a wrong value in each of its fields."""
    for label, body in BODIES.items():
        yield Attack(label, posted(body))
    for field in FIELDS:
        for value in WRONG:
            if (field, value) not in RIGHT:
                wrong = json.dumps({"prompt": "a", field: value}).encode()
                yield Attack(f"{field} {str(value)[:20]!r}", posted(wrong))
    for body in (b"{}", b'{"position": 0}', b'{"position": "1"}', b"[]", b'{"position": 1e400}'):
        yield Attack(f"move {body!r}", request(b"PATCH", API + b"/queue/1", JSON, body))


# ------------------------------------------------------------------------------------------------------------ pictures


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, data: bytes = b"", depth: int = 8, kind: int = 2) -> bytes:
    """A PNG with any header over any data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def drawn(kind: str) -> bytes:
    """A small picture with something in it."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", (64, 64), random.Random(SEED).randbytes(64 * 64 * 3)).save(buffer, kind)
    return buffer.getvalue()


PICTURES: Mapping[str, bytes] = {
    "100 megapixels": png(10_000, 10_000),
    "all the pixels there are": png(2**31 - 1, 2**31 - 1),
    "no pixel": png(0, 0),
    "rows that are not there": png(64, 64, b""),
    "an unknown depth": png(8, 8, b"\0" * 200, depth=7),
    "an unknown kind": png(8, 8, b"\0" * 200, kind=9),
    "a signature": b"\x89PNG\r\n\x1a\n",
    "a JPEG's first bytes": b"\xff\xd8\xff\xe0",
    "a WebP's head": b"RIFF\xff\xff\xff\xffWEBPVP8X",
    "a GIF": drawn("GIF"),
    "a BMP": drawn("BMP"),
    "a TIFF": drawn("TIFF"),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "a playlist": b"#EXTM3U\nfile:///etc/passwd\n",
    "an archive": b"PK\x03\x04" + b"\0" * 100,
    "a pickle": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
    "noise": random.Random(SEED).randbytes(5000),
}


def pictures() -> Iterator[Attack]:
    """Pictures that are none, that are too large, and whole ones of every kind with an end torn off."""
    for label, data in PICTURES.items():
        yield Attack(label, _with_picture(data))
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = drawn(kind)
        for number in range(1, MUTANTS):
            yield Attack(f"{kind} {number}/{MUTANTS}", _with_picture(whole[: len(whole) * number // MUTANTS]))


def _with_picture(data: bytes) -> bytes:
    return posted(json.dumps({"prompt": "a", "image_start": base64.b64encode(data).decode()}).encode())


# ------------------------------------------------------------------------------------------------------------- headers

GOOD = b'{"prompt": "a"}'
HEADERS: Mapping[str, Mapping[str, str | bytes]] = {
    "a form": {"Content-Type": "application/x-www-form-urlencoded"},
    "no type": {"Content-Type": ""},
    "a type of noise": {"Content-Type": b"\xff\xfe/\x80"},
    "a type with a long parameter": {"Content-Type": "application/jsonx; " + "a" * 5000},
    "an XML type": {"Content-Type": "application/xml"},
    "many parts without a boundary": {"Content-Type": "multipart/form-data"},
    "an expectation": {"Expect": "the unexpected"},
    "gzip that is none": {"Content-Encoding": "gzip"},
    "deflate that is none": {"Content-Encoding": "deflate"},
    "br that is none": {"Content-Encoding": "br"},
    "an unknown coding of the body": {"Transfer-Encoding": "gzip"},
    "a page of another site": {"Origin": "http://evil.example"},
    "no page": {"Origin": "null"},
    "a page of noise": {"Origin": b"\xff\xfe"},
    "half an address": {"Origin": "http://["},
    "a page by its fetch": {"Sec-Fetch-Site": "cross-site"},
    "an empty key": {"Idempotency-Key": ""},
    "a long key": {"Idempotency-Key": "k" * 4000},
    "a key of noise": {"Idempotency-Key": b"\xff\xfe"},
    "a long line": {"X-Long": "a" * 100_000},
    "many lines": {f"X-{number}": "a" for number in range(1000)},
    "a length that is none": {"Content-Length": "abc"},
    "a length below zero": {"Content-Length": "-1"},
    "a length with a sign": {"Content-Length": "+15"},
    "a length beyond all": {"Content-Length": "9" * 40},
    "two lengths": {"Content-Length": "15, 16"},
    "a length and chunks": {"Content-Length": "15", "Transfer-Encoding": "chunked"},
    "a name with a space": {"X Y": "a"},
    "an empty name": {"": "a"},
    "a zero": {"X-Zero": b"a\0b"},
    "a line feed": {"X-Feed": b"a\nX-Other: b\n\n"},
}
# Outside the file; what is malformed is ignored: tests/test_files_http.py.
RANGES = ["bytes=999-", "bytes=-0", "bytes=999-,-0,1000-1001", "bytes=" + "9" * 4000 + "-", "bytes=999-" + "9" * 4000]


def headers() -> Iterator[Attack]:
    """Headers that lie about the body, break the syntax, or say that a page of another site asks."""
    for label, fields in HEADERS.items():
        yield Attack(label, request(b"POST", API + b"/generate", {**JSON, **fields}, GOOD))
    for sent in RANGES:
        yield Attack(f"range {sent[:20]!r}", request(b"GET", API + b"/download/there.png", {"Range": sent}))
    for size in (b"z", b"-1", b"fffffffffffffffff", b"", b"5;" + b"a" * 9000):
        head = request(b"POST", API + b"/generate", {**JSON, "Transfer-Encoding": "chunked"})
        yield Attack(f"chunk {size[:9]!r}", head + size + b"\r\nabcde\r\n0\r\n\r\n")


# --------------------------------------------------------------------------------------------------------- connections

GARBAGE: Mapping[str, bytes] = {
    "noise": random.Random(SEED).randbytes(4096) + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/0.9 by name": b"GET /api/v1/queue HTTP/0.9\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
    "HTTP/0.9 that changes something": b"DELETE /api/v1/queue\r\nHost: a\r\n\r\n",
    "HTTP/2.0 by name": b"GET /api/docs HTTP/2.0\r\nHost: a\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\nHost: a\r\n\r\n",
    "no version": b"GET /api/v1/queue HTTP\r\n\r\n",
    "another protocol": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "mail": b"EHLO evil.example\r\nMAIL FROM:<a@b>\r\n\r\n",
    "a long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a zero in the path": b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    "folded headers": b"GET / HTTP/1.1\r\nHost: a\r\n folded: b\r\n\r\n",
    "a header before the line": b" GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "only feeds": b"\n" * 10_000 + b"x\r\n\r\n",
}


def connections() -> Iterator[Attack]:
    """What is no HTTP at all: an answer is not owed."""
    return (Attack(label, data) for label, data in GARBAGE.items())


CLASSES: Mapping[str, Callable[[], Iterator[Attack]]] = {
    "names": names,
    "paths": paths,
    "queries": queries,
    "bodies": bodies,
    "pictures": pictures,
    "headers": headers,
    "connections": connections,
}
