"""Downloads and previews as HTTP: ranges, conditions, HEAD, hostile names, and an id on every answer."""

import io
import json
import os
import re
import shutil
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from urllib.parse import urlsplit

import av
import pytest
import requests
from PIL import Image

from tests import bombs
from tests.daemon import Daemon
from tests.idle import idle_daemon
from tests.wire import exchange, head

CONTENT = bytes(range(256)) * 40  # 10,240 bytes, each range of it unlike its neighbours
SIZE = len(CONTENT)
LARGE_BYTES = 200_000_000


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a few files in its output folder, and things beside them that nobody may fetch."""
    with idle_daemon(tmp_path_factory.mktemp("files")) as running:
        (running.outputs / "clip.mp4").write_bytes(CONTENT)
        (running.outputs / "clip.mp4.gz").write_bytes(b"not this one")
        (running.outputs / "empty.mp4").write_bytes(b"")
        Image.new("RGB", (640, 480), "purple").save(running.outputs / "picture.png")
        (running.outputs / "plain.txt").write_text("a note")
        (running.outputs / "bare").write_text("no suffix")
        (running.outputs / ".hidden.mp4").write_bytes(CONTENT)
        (running.outputs / "folder.mp4").mkdir()
        (running.outputs / "link.mp4").symlink_to(running.outputs / "clip.mp4")
        (running.outputs / "out.mp4").symlink_to(running.folder / "secret.mp4")
        (running.outputs / "linked").symlink_to(running.folder)
        os.mkfifo(running.outputs / "pipe.mp4")
        (running.folder / "secret.mp4").write_text("secret")
        yield running


def download(daemon: Daemon, name: str = "clip.mp4", method: str = "GET", **headers: str | bytes) -> requests.Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return daemon.request(method, f"/download/{name}", headers=fields)


# -- whole files


@pytest.mark.parametrize(
    ("name", "content_type"),
    [("a.mp4", "video/mp4"), ("a.webm", "video/webm"), ("a.png", "image/png"), ("a.JPG", "image/jpeg"),
     ("a.webp", "image/webp"), ("a.wav", "audio/wav"), ("a.mp3", "audio/mpeg"), ("ä b'\"%.mp4", "video/mp4")],
)  # fmt: skip
def test_a_file_comes_whole_with_its_type_and_validators(idle: Daemon, name: str, content_type: str) -> None:
    path = idle.outputs / name
    path.write_bytes(CONTENT)
    answer = download(idle, requests.utils.quote(name))
    path.unlink()
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["Content-Type"] == content_type
    assert answer.headers["Content-Length"] == str(SIZE)
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert re.fullmatch(r'"[^"]+"', answer.headers["ETag"])
    assert answer.headers["Last-Modified"].endswith(" GMT")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_an_empty_file_is_an_empty_answer(idle: Daemon) -> None:
    answer = download(idle, "empty.mp4")
    assert (answer.status_code, answer.content) == (200, b"")


def test_head_tells_the_same_as_get_without_the_bytes(idle: Daemon) -> None:
    whole, head = download(idle), download(idle, method="HEAD")
    assert (head.status_code, head.content) == (200, b"")
    names = ("Content-Length", "Content-Type", "ETag", "Last-Modified", "Accept-Ranges", "Content-Disposition")
    assert {name: head.headers[name] for name in names} == {name: whole.headers[name] for name in names}


def test_a_compressed_file_beside_it_is_not_served_in_its_place(idle: Daemon) -> None:
    answer = download(idle, Accept_Encoding="gzip, br")
    assert (answer.content, answer.headers.get("Content-Encoding")) == (CONTENT, None)


def test_the_etag_changes_with_the_file(idle: Daemon) -> None:
    path = idle.outputs / "changing.mp4"
    path.write_bytes(b"old")
    first = download(idle, path.name).headers["ETag"]
    path.write_bytes(b"newer")
    second = download(idle, path.name)
    path.unlink()
    assert (second.content, second.headers["ETag"] == first) == (b"newer", False)


# -- ranges


@pytest.mark.parametrize(
    ("sent", "first", "last"),
    [
        ("bytes=0-0", 0, 0),
        ("bytes=0-99", 0, 99),
        ("bytes=100-", 100, SIZE - 1),
        ("bytes=-100", SIZE - 100, SIZE - 1),
        ("bytes=-999999", 0, SIZE - 1),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE - 1),
        ("bytes=5-999999", 5, SIZE - 1),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_range_is_206_with_those_bytes(idle: Daemon, method: str, sent: str, first: int, last: int) -> None:
    answer = download(idle, method=method, Range=sent)
    assert answer.status_code == 206
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"
    assert answer.headers["Content-Length"] == str(last - first + 1)
    assert answer.content == (CONTENT[first : last + 1] if method == "GET" else b"")


OUTSIDE = [f"bytes={SIZE}-", "bytes=999999-", "bytes=-0", "bytes=-000", f"bytes={'9' * 5000}-", "bytes=999999-,-0"]
IGNORED = [
    *("bytes=5-2", "bytes=a-b", "bytes=abc", "bytes=", "bytes", "bytes=-", "bytes=0--1", "bytes=0-1-2", "bytes=+0-1"),
    *("bytes = 0-1", "bytes= 0-1", "bytes=0- 1", "bytes=0-1;", "bytes=\u0661-", "bytes=999999-,5-2", "bytes=,"),
    *("items=0-5", "items=999999-", "frames=a", "0-1", "=0-1", "bytes 0-1", "none"),
]
SEVERAL = ["bytes=0-1,4-5", "bytes=0-0,-1", "bytes=0-0, -1", "bytes=999999-,0-1", "bytes=0-1,999999-", "bytes=0-,0-,0-",
           "bytes=0-0 ,, 2-3", "bytes=" + ",".join(f"{n}-{n}" for n in range(500))]  # fmt: skip


@pytest.mark.parametrize("sent", OUTSIDE, ids=lambda sent: sent[:20])
def test_a_range_outside_the_file_is_416_with_its_size(idle: Daemon, sent: str) -> None:
    answer = download(idle, Range=sent)
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    assert answer.json() == {"detail": f"Range: the file has {SIZE} bytes, no such range in it"}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("sent", IGNORED)
def test_a_range_that_is_malformed_or_in_another_unit_is_ignored(idle: Daemon, sent: str, method: str) -> None:
    answer = download(idle, method=method, Range=sent.encode())
    assert (answer.status_code, answer.headers.get("Content-Range")) == (200, None)
    assert answer.headers["Content-Length"] == str(SIZE)
    assert answer.content == (CONTENT if method == "GET" else b"")


@pytest.mark.parametrize("sent", SEVERAL, ids=lambda sent: sent[:20])
def test_several_ranges_of_which_one_is_in_the_file_are_the_whole_file(idle: Daemon, sent: str) -> None:
    answer = download(idle, Range=sent)
    assert (answer.status_code, answer.content) == (200, CONTENT)


@pytest.mark.parametrize(
    ("sent", "first", "last"),
    [("Bytes=0-1", 0, 1), ("bytes=00-01", 0, 1), (f"bytes=1-{'9' * 5000}", 1, SIZE - 1), ("bytes=,0-1,", 0, 1)],
    ids=["case", "zeros", "a huge number", "empty elements"],
)
def test_a_range_may_be_written_in_other_ways(idle: Daemon, sent: str, first: int, last: int) -> None:
    answer = download(idle, Range=sent)
    assert (answer.status_code, answer.content) == (206, CONTENT[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{SIZE}"


@pytest.mark.parametrize("sent", ["bytes=0-", "bytes=0-1", "bytes=-5", "bytes=-0", "bytes=0-0,-1", "items=0-"])
def test_an_empty_file_is_always_whole(idle: Daemon, sent: str) -> None:
    answer = download(idle, "empty.mp4", Range=sent)
    assert (answer.status_code, answer.content, answer.headers.get("Content-Range")) == (200, b"", None)


def test_two_range_headers_are_no_range(idle: Daemon) -> None:
    answer = exchange(idle.url, head("/api/v1/download/clip.mp4", Range="bytes=0-1\r\nRange: bytes=4-5"))
    assert answer is not None
    assert (answer.status, answer.body) == (200, CONTENT)


def test_if_range_with_the_right_etag_gives_the_range(idle: Daemon) -> None:
    answer = download(idle, Range="bytes=0-9", If_Range=download(idle).headers["ETag"])
    assert (answer.status_code, answer.content) == (206, CONTENT[:10])


def test_if_range_with_the_right_date_gives_the_range(idle: Daemon) -> None:
    answer = download(idle, Range="bytes=0-9", If_Range=download(idle).headers["Last-Modified"])
    assert (answer.status_code, answer.content) == (206, CONTENT[:10])


STALE = [
    *('"another"', 'W/"weak"', formatdate(0, usegmt=True), formatdate(4_000_000_000, usegmt=True), "neither", ""),
    *("{etag}, {etag}", "W/{etag}", "*", '"a", "b"'),
]


@pytest.mark.parametrize("stale", STALE)
@pytest.mark.parametrize("sent", ["bytes=0-9", "bytes=999999-"])
def test_a_stale_if_range_gives_the_whole_file(idle: Daemon, stale: str, sent: str) -> None:
    answer = download(idle, Range=sent, If_Range=stale.replace("{etag}", download(idle).headers["ETag"]))
    assert (answer.status_code, answer.content) == (200, CONTENT)


def test_a_right_if_range_leaves_a_wrong_range_wrong(idle: Daemon) -> None:
    answer = download(idle, Range="bytes=999999-", If_Range=download(idle).headers["ETag"])
    assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{SIZE}")
    assert answer.json() == {"detail": f"Range: the file has {SIZE} bytes, no such range in it"}


# -- conditions


def test_a_copy_that_is_still_right_is_304(idle: Daemon) -> None:
    known = download(idle).headers
    answers = [
        download(idle, If_None_Match=known["ETag"]),
        download(idle, If_None_Match=f'"other", {known["ETag"]}'),
        download(idle, If_None_Match="*"),
        download(idle, If_Modified_Since=known["Last-Modified"]),
        download(idle, method="HEAD", If_None_Match=known["ETag"]),
    ]
    assert [(answer.status_code, answer.content) for answer in answers] == [(304, b"")] * 5
    assert {answer.headers["ETag"] for answer in answers} == {known["ETag"]}


def test_a_copy_that_is_stale_is_replaced(idle: Daemon) -> None:
    answers = [download(idle, If_None_Match='"other"'), download(idle, If_Modified_Since=formatdate(0, usegmt=True))]
    assert [(answer.status_code, answer.content) for answer in answers] == [(200, CONTENT)] * 2


def test_a_condition_comes_before_the_range(idle: Daemon) -> None:
    etag = download(idle).headers["ETag"]
    assert download(idle, If_None_Match=etag, Range="bytes=999999-").status_code == 304
    assert download(idle, If_None_Match=f"W/{etag}", Range="bytes=0-1").status_code == 304


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_file_that_is_another_than_the_condition_says_is_412_with_a_sentence(idle: Daemon, method: str) -> None:
    etag = download(idle).headers["ETag"]
    refused = [{"If_Match": '"x"'}, {"If_Match": f"W/{etag}"}, {"If_Unmodified_Since": formatdate(0, usegmt=True)}]
    for sent in refused:
        answer = download(idle, method=method, Range="bytes=0-1", **sent)
        assert answer.status_code == 412
        assert method == "HEAD" or set(answer.json()) == {"detail"}
    met = [{"If_Match": "*"}, {"If_Match": f'"x", {etag}'}, {"If_Unmodified_Since": "garbage"}]
    assert [download(idle, **sent).status_code for sent in met] == [200] * 3


# -- memory


def resident_bytes(pid: int) -> int:
    """The memory of a process that is its own, cached files not counted."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"^(?:RssAnon|RssShmem):\s+(\d+) kB", text, re.M)) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_does_not_grow_with_the_file(idle: Daemon) -> None:
    with (idle.outputs / "large.mkv").open("wb") as file:
        file.truncate(LARGE_BYTES)
    before = resident_bytes(idle.process.pid)
    with idle.get("/download/large.mkv", stream=True) as answer:
        first = len(next(answer.iter_content(1 << 16)))
        during = resident_bytes(idle.process.pid)
        rest = sum(len(block) for block in answer.iter_content(1 << 20))
    (idle.outputs / "large.mkv").unlink()
    assert first + rest == LARGE_BYTES
    assert max(during, resident_bytes(idle.process.pid)) - before < LARGE_BYTES / 10


# -- names


def raw(daemon: Daemon, target: bytes, method: bytes = b"GET") -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a request whose path no client library has made tidy."""
    place = urlsplit(daemon.url)
    assert place.hostname
    assert place.port
    with socket.create_connection((place.hostname, place.port), 60) as connection:
        connection.sendall(method + b" " + target + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


HOSTILE = [
    b"../secret.mp4", b"..%2fsecret.mp4", b"..%2Fsecret.mp4", b"%2e%2e/secret.mp4", b"%2e%2e%2fsecret.mp4",
    b"..%252fsecret.mp4", b"..%5csecret.mp4", b"..\\secret.mp4", b"%2e%2e%5csecret.mp4", b"x/../../secret.mp4",
    b"%2fetc%2fpasswd", b"/etc/passwd", b"//etc/passwd", b"%2fetc%2fpasswd%00.mp4", b"clip.mp4%00", b"clip.mp4%00.png",
    b"%00", b"clip%0a.mp4", b"C:%5cx.mp4", b"file:clip.mp4", b"linked/secret.mp4", b"linked%2fsecret.mp4",
    b"link.mp4", b"out.mp4", b"linked", b".hidden.mp4", b".", b"..", b"%2e", b"%2e%2e", b"...", b"folder.mp4",
    b"folder.mp4/", b"pipe.mp4", b"bare", b"plain.txt", b"clip.mp4.gz", b"clip", b"clip.mp4/", b"clip.mp4%20", b"%20",
    b"%ff%fe.mp4", b"%ed%a0%80.mp4", b"a" * 300 + b".mp4", b"a" * 5000 + b".mp4", b"~root.mp4", b"CON.mp4",
    b"%c0%ae%c0%ae%c0%afsecret.mp4", b"?", b"", b"clip.mp4;a=b", b"*",
]  # fmt: skip


@pytest.mark.parametrize("kind", [b"download", b"preview"])
@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: name.decode("latin-1")[:30])
def test_a_hostile_name_is_404_however_it_is_written(idle: Daemon, name: bytes, kind: bytes) -> None:
    status, headers, body = raw(idle, b"/api/v1/" + kind + b"/" + name)
    assert status == 404, body
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert set(json.loads(body)) == {"detail"}
    assert b"secret" not in body.replace(b"secret.mp4", b"")
    assert str(idle.folder).encode() not in body


def test_a_request_that_is_no_http_is_400_and_served_nothing(idle: Daemon) -> None:
    names = (b"\xff.mp4", b"\xe2\x88\x95etc.mp4", b"a b.mp4", b"\0.mp4")
    assert {raw(idle, b"/api/v1/download/" + name)[0] for name in names} == {400}
    assert download(idle).status_code == 200


def test_head_of_a_hostile_name_is_404_too(idle: Daemon) -> None:
    status, _, body = raw(idle, b"/api/v1/download/..%2fsecret.mp4", b"HEAD")
    assert (status, body) == (404, b"")


# -- previews


def test_a_preview_is_a_jpeg_with_a_validator(idle: Daemon) -> None:
    answer = idle.get("/preview/picture.png")
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/jpeg")
    assert answer.headers["Accept-Ranges"] == "bytes"
    assert re.fullmatch(r'"[^"]+"', answer.headers["ETag"])
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.format, image.size) == ("JPEG", (320, 240))


def test_a_preview_knows_ranges_and_conditions(idle: Daemon) -> None:
    whole = idle.get("/preview/picture.png")
    etag, size = whole.headers["ETag"], len(whole.content)

    def answer(**headers: str) -> tuple[int, bytes, str | None]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        got = idle.get("/preview/picture.png", headers=sent)
        return got.status_code, got.content, got.headers.get("Content-Range")

    assert answer(Range="bytes=2-9") == (206, whole.content[2:10], f"bytes 2-9/{size}")
    assert answer(Range="bytes=-9") == (206, whole.content[-9:], f"bytes {size - 9}-{size - 1}/{size}")
    assert answer(Range="bytes=2-9", If_Range=etag) == (206, whole.content[2:10], f"bytes 2-9/{size}")
    assert answer(Range="bytes=2-9", If_Range='"old"') == (200, whole.content, None)
    assert answer(If_None_Match=etag) == (304, b"", None)
    assert answer(If_None_Match='"old"') == (200, whole.content, None)
    assert answer(Range=f"bytes={size}-")[::2] == (416, f"bytes */{size}")
    assert answer(Range=f"bytes={size}-", If_Range=etag)[::2] == (416, f"bytes */{size}")
    assert answer(Range=f"bytes={size}-", If_Range='"old"') == (200, whole.content, None)


def test_head_of_a_preview_tells_its_size(idle: Daemon) -> None:
    whole, head = idle.get("/preview/picture.png"), idle.request("HEAD", "/preview/picture.png")
    assert (head.status_code, head.content) == (200, b"")
    assert {name: head.headers[name] for name in ("Content-Length", "Content-Type", "ETag")} == {
        name: whole.headers[name] for name in ("Content-Length", "Content-Type", "ETag")
    }


def test_a_preview_is_made_once_for_a_file_and_width(idle: Daemon) -> None:
    path = idle.outputs / "kept.png"
    Image.new("RGB", (64, 64), "white").save(path)
    about = path.stat()
    first = idle.get("/preview/kept.png")
    path.write_bytes(b"x" * about.st_size)  # what can't be decoded, with the same name, size and time
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    again, other_width = idle.get("/preview/kept.png"), idle.get("/preview/kept.png?width=32")
    path.unlink()
    assert (again.status_code, again.content) == (200, first.content)
    assert other_width.status_code == 400


def test_a_changed_file_gets_a_new_preview(idle: Daemon) -> None:
    path = idle.outputs / "changed.png"
    Image.new("RGB", (64, 64), "white").save(path)
    first = idle.get("/preview/changed.png").headers["ETag"]
    Image.new("RGB", (64, 64), "black").save(path)
    second = idle.get("/preview/changed.png").headers["ETag"]
    path.unlink()
    assert first != second


@pytest.mark.parametrize("name", ["clip.mp4", "empty.mp4"])
def test_what_cannot_be_decoded_has_no_preview(idle: Daemon, name: str) -> None:
    answer = idle.get(f"/preview/{name}")
    sentence = f"'{name}' can't be decoded, so it has no preview"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})


def peak_mib(daemon: Daemon) -> int:
    """The most memory that the daemon has had, files in memory included."""
    return int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{daemon.process.pid}/status").read_text())[0]) // 1024


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("inside.mp4", lambda: bombs.video(bombs.packets(9000), "mp4")),
        ("inside.mkv", lambda: bombs.video(bombs.packets(9000), "matroska")),
        ("scans.jpg", lambda: bombs.jpeg(7000, 2000)),
        ("header.png", lambda: bombs.png(30_000, 30_000)),
    ],
)
def test_a_preview_takes_no_memory_for_a_bomb(idle: Daemon, name: str, make: Callable[[], bytes]) -> None:
    """9000x9000 is 120 MB a frame, and 360 MB as a picture."""
    (idle.outputs / name).write_bytes(make())
    before = peak_mib(idle)
    answer = idle.get(f"/preview/{name}")
    (idle.outputs / name).unlink()
    assert answer.status_code == 400
    assert peak_mib(idle) - before < 110


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a folder", "a device"])
@pytest.mark.parametrize("call", ["download", "preview"])
def test_what_is_no_file_is_404_and_nothing_waits_for_it(idle: Daemon, kind: str, call: str) -> None:
    path = idle.outputs / "odd.mp4"
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as listener:
            os.chdir(idle.outputs)  # a socket's path holds 108 bytes
            listener.bind("odd.mp4")
    elif kind == "a folder":
        path.mkdir()
    elif os.geteuid() == 0:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
    try:
        assert idle.get(f"/{call}/odd.mp4", timeout=20).status_code == 404
    finally:
        path.rmdir() if kind == "a folder" else path.unlink(missing_ok=True)


@pytest.mark.parametrize("call", ["download", "preview"])
def test_no_race_for_a_name_gives_away_another_file(idle: Daemon, call: str) -> None:
    """While a request is under way its file becomes a link to a secret, a FIFO, a file again."""
    path, secret = idle.outputs / "race.png", idle.folder / "secret.png"
    Image.new("RGB", (64, 64), "red").save(secret)
    Image.new("RGB", (64, 64), "blue").save(idle.folder / "open.png")
    over = threading.Event()

    def change() -> None:
        new = idle.folder / "new.png"
        while not over.is_set():
            for make in (lambda: shutil.copy(idle.folder / "open.png", new), lambda: new.symlink_to(secret)):
                make()
                new.replace(path)
            os.mkfifo(new)
            new.replace(path)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        answers = [idle.get(f"/{call}/race.png", timeout=20) for _ in range(150)]
    finally:
        over.set()
        changing.join()
        path.unlink()
    assert {answer.status_code for answer in answers} <= {200, 404}
    shown = [Image.open(io.BytesIO(answer.content)).convert("RGB").getpixel((9, 9)) for answer in answers if answer.ok]
    assert all(isinstance(pixel, tuple) and pixel[2] > 200 and pixel[0] < 50 for pixel in shown)


# -- request ids


PATHS = ["/", "/health", "/nothing", "/status/none", "/generate", "/download/clip.mp4", "/download/none.mp4",
         "/preview/picture.png", "/outputs?limit=0"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_the_clients_request_id(idle: Daemon, path: str) -> None:
    answer = idle.get(path, headers={"X-Request-ID": "from-the-client:1"})
    assert answer.headers["X-Request-ID"] == "from-the-client:1"


@pytest.mark.parametrize("path", PATHS)
def test_every_answer_has_an_id_of_its_own_without_one(idle: Daemon, path: str) -> None:
    first, second = (idle.get(path).headers["X-Request-ID"] for _ in range(2))
    assert re.fullmatch("[0-9a-f]{32}", first)
    assert first != second


def test_an_answer_without_a_body_has_an_id_too(idle: Daemon) -> None:
    etag = download(idle).headers["ETag"]
    answers = [download(idle, X_Request_ID="a", **more) for more in ({"If_None_Match": etag}, {"Range": "bytes=0-1"})]
    assert [answer.headers["X-Request-ID"] for answer in answers] == ["a", "a"]


@pytest.mark.parametrize("sent", ["a b", "x" * 129, "", "tab\there", "\xe4"])
def test_an_id_that_could_spoil_a_log_is_replaced(idle: Daemon, sent: str) -> None:
    answer = idle.get("/health", headers={"X-Request-ID": sent.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])


# -- what lies inside a generated file


def test_the_settings_and_the_seed_are_inside_a_generated_file(daemon: Daemon) -> None:
    state = daemon.run(video_length=5, num_inference_steps=2, batch_size=2, prompt="a «green» square")
    assert state["status"] == "completed", state
    for number, file in enumerate(state["files"]):
        content = daemon.get(file["url"].removeprefix("/api/v1")).content
        assert content == daemon.made(state, number).read_bytes()
        assert len(content) == file["size_bytes"]
        with av.open(io.BytesIO(content)) as container:
            inside = json.loads(container.metadata["comment"])
        assert inside["seed"] == file["seed"] == state["seed"] + number
        assert {name: inside[name] for name in state["settings"]} | {"seed": state["seed"]} == state["settings"]
