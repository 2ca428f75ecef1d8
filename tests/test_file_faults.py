"""Output files that are odd, can't be read, or change while they are sent, and an output folder that is away."""

import asyncio
import errno
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
from aiohttp import ClientPayloadError
from aiohttp.test_utils import TestClient
from PIL import Image

import wangpd
from engine.api.answers import iso
from tests.daemon import ROOT, Daemon
from tests.wire import answered, connected, head

API = "/api/v1"
LARGE_BYTES = 200_000_000  # more than any buffer of a socket takes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that runs nothing, and for which permissions hold."""
    folder = tmp_path_factory.mktemp("plain")
    daemon = Daemon(folder)
    daemon.program = [str(ROOT / "tests" / "no_override.py"), *daemon.program]
    with daemon:
        assert daemon.post("/queue/pause").status_code == 200
        yield daemon


@pytest.fixture
def folder(plain: Daemon) -> Iterator[Path]:
    """The output folder, with one picture; readable again and empty after the test."""
    put(plain.outputs, "there.png")
    yield plain.outputs
    plain.outputs.chmod(0o755)
    for path in plain.outputs.iterdir():
        path.unlink()


def put(folder: Path, name: str, mode: int = 0o644) -> Path:
    """A picture in the folder."""
    path = folder / name
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    path.write_bytes(buffer.getvalue())
    path.chmod(mode)
    return path


def names(daemon: Daemon) -> list[str]:
    """The names that the listing has."""
    answer = daemon.get("/outputs?limit=200")
    assert answer.status_code == 200, answer.text
    return sorted(entry["filename"] for entry in answer.json()["data"]["files"])


# ---- names and times

NAMES = [
    *("größe 猫 🐱.mp4", "a b.mp4", "a%20b.mp4", "a#b?c.mp4", "a+b&c;d=e.mp4", 'quo"te.mp4', "apo'strophe.mp4"),
    *("é.mp4", "e\u0301.mp4", "x" * 251 + ".mp4", "猫" * 83 + ".mp4", "UPPER.MP4", "a.b.c.mp4", "-rf.mp4", "con.mp4"),
    *("trail .mp4", " lead.mp4", "\u202egpj.mp4", "\u2028ls.mp4", "\u200b.mp4", "a*b|c<d>.mp4", "%.mp4", "100%.mp4"),
    *("~.mp4", "[a].mp4"),
]
HIDDEN = ["new\nline.mp4", "tab\t.mp4", "back\\slash.mp4", "..mp4", ".hidden.mp4", "a.mp4.part", "x.mp4~", "\x7f.mp4"]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:24])
def test_a_file_is_listed_and_saved_under_its_own_name(plain: Daemon, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"film")
    assert name in names(plain)
    answer = plain.get(f"/download/{quote(name, safe='')}")
    assert (answer.status_code, answer.content) == (200, b"film")
    sent = answer.headers["Content-Disposition"]
    assert sent.isascii()
    assert sent.isprintable()
    found = re.fullmatch(r'inline; filename="([ -~]*)"(?:; filename\*=UTF-8\'\'([!#$&+.^_`|~%A-Za-z0-9-]*))?', sent)
    assert found, sent
    fallback, encoded = found.groups()
    assert not re.search(r'["\\/]', fallback)
    assert (unquote(encoded, errors="strict") if encoded else fallback) == name


@pytest.mark.parametrize("name", HIDDEN, ids=ascii)
def test_a_file_that_is_not_listed_is_not_served_either(plain: Daemon, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"film")
    assert name not in names(plain)
    assert plain.get(f"/download/{quote(name, safe='')}").status_code == 404


def test_a_plain_name_has_only_one_form(plain: Daemon, folder: Path) -> None:
    (folder / "a-film_1.mp4").write_bytes(b"film")
    sent = plain.get("/download/a-film_1.mp4").headers["Content-Disposition"]
    assert sent == 'inline; filename="a-film_1.mp4"'


TIMES = {"1970": 0, "1890": -86400 * 365 * 80, "2099": 4_070_908_800, "far": 300_000_000_000, "farther": 2**40}


@pytest.mark.parametrize("seconds", TIMES.values(), ids=TIMES)
def test_a_file_of_any_time_is_listed_and_served(plain: Daemon, folder: Path, seconds: int) -> None:
    path = put(folder, "odd.png")
    os.utime(path, (seconds, seconds))
    entry = next(entry for entry in plain.get("/outputs").json()["data"]["files"] if entry["filename"] == "odd.png")
    shown = datetime.fromisoformat(entry["modified_at"]).timestamp()
    assert shown == min(path.stat().st_mtime, 253_402_300_799)
    answer = plain.get("/download/odd.png")
    assert (answer.status_code, answer.content) == (200, path.read_bytes())
    assert parsedate_to_datetime(answer.headers["Last-Modified"]).timestamp() <= time.time() + 1
    again = plain.get("/download/odd.png", headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304
    assert plain.get("/preview/odd.png").status_code == 200


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(300_000_000_000, "9999-12-31T23:59:59.000Z"), (2.0**62, "9999-12-31T23:59:59.000Z"),
     (-(2.0**62), "0001-01-01T00:00:00.000Z"), (0, "1970-01-01T00:00:00.000Z"), (-1.5, "1969-12-31T23:59:58.500Z")],
)  # fmt: skip
def test_a_time_that_a_file_system_knows_and_iso_does_not_is_the_nearest_one(seconds: float, shown: str) -> None:
    assert iso(seconds) == shown


# ---- what can't be read


@pytest.mark.parametrize("kind", ["download", "preview"])
@pytest.mark.parametrize("mode", [0o000, 0o200, 0o111])
def test_a_file_that_the_daemon_may_not_read_is_403(plain: Daemon, folder: Path, kind: str, mode: int) -> None:
    put(folder, "locked.png", mode)
    assert names(plain) == ["locked.png", "there.png"]
    answer = plain.get(f"/{kind}/locked.png")
    sentence = "File 'locked.png' can't be read by the daemon's user; change its permissions"
    assert (answer.status_code, answer.json()) == (403, {"detail": sentence})
    assert plain.request("HEAD", f"/{kind}/locked.png").status_code == 403
    assert plain.get(f"/{kind}/there.png").status_code == 200


def test_the_preview_of_a_file_that_was_readable_once_is_403_too(plain: Daemon, folder: Path) -> None:
    path = put(folder, "once.png")
    assert plain.get("/preview/once.png").status_code == 200
    path.chmod(0)
    assert plain.get("/preview/once.png").status_code == 403


def away(daemon: Daemon, reason: str, remedy: str) -> None:
    """The folder is away: everything that needs it says so, by the name that is configured."""
    sentence = f"save_path: outputs can't be read now: {reason}; {remedy}"
    for path in ("/outputs", "/outputs?file_type=image", "/download/there.png", "/preview/there.png"):
        answer = daemon.get(path)
        assert (answer.status_code, answer.json()) == (503, {"detail": sentence}), path
        assert answer.headers["Retry-After"]
        assert daemon.request("HEAD", path).status_code == 503


LET_READ, BRING_BACK = "let the daemon's user read it", "bring the folder back"


@pytest.mark.parametrize("mode", [0o000, 0o444, 0o200])
def test_a_folder_that_the_daemon_may_not_search_is_503(plain: Daemon, folder: Path, mode: int) -> None:
    folder.chmod(mode)
    away(plain, "Permission denied", LET_READ)
    folder.chmod(0o755)
    assert names(plain) == ["there.png"]


def test_a_folder_that_the_daemon_may_not_list_still_serves_its_files(plain: Daemon, folder: Path) -> None:
    folder.chmod(0o311)
    assert plain.get("/outputs").status_code == 503
    assert plain.get("/download/there.png").status_code == 200
    assert plain.get("/download/none.png").status_code == 404


def test_a_listing_from_memory_ends_with_the_permission(plain: Daemon, folder: Path) -> None:
    for path in (folder / "there.png", folder):
        os.utime(path, (1e9, 1e9))  # long unchanged, so that the listing is kept
    assert names(plain) == ["there.png"]
    for mode in (0o000, 0o311):
        folder.chmod(mode)
        assert plain.get("/outputs").status_code == 503
        folder.chmod(0o755)
        assert names(plain) == ["there.png"]


def moved_away(folder: Path) -> None:
    """Nothing is in its place."""


def a_file(folder: Path) -> None:
    folder.write_text("no folder")


def a_dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


def a_loop(folder: Path) -> None:
    folder.symlink_to(folder)


@pytest.mark.parametrize(
    ("replace", "reason"),
    [(moved_away, "No such file or directory"), (a_file, "Not a directory"),
     (a_dangling_link, "No such file or directory"), (a_loop, "Too many levels of symbolic links")],
)  # fmt: skip
def test_a_folder_that_is_away_is_503_until_it_is_back(plain: Daemon, folder: Path, replace: Any, reason: str) -> None:
    elsewhere = folder.rename(folder.parent / "elsewhere")
    try:
        replace(folder)
        away(plain, reason, BRING_BACK)
    finally:
        folder.unlink(missing_ok=True)
        elsewhere.rename(folder)
    assert names(plain) == ["there.png"]
    assert plain.get("/download/there.png").status_code == 200


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("fault", ["unreadable", "a file", "a file that can't be read", "emptied"])
def test_a_preview_needs_no_cache(plain: Daemon, fault: str) -> None:
    cache, aside = plain.state / "thumbnails", plain.state / "aside"
    wanted = plain.get("/preview/there.png").content
    try:
        if fault == "unreadable":
            cache.chmod(0)
        elif fault == "a file":
            cache.rename(aside)
            cache.write_text("no folder")
        for path in cache.glob("*.jpg") if cache.is_dir() and fault != "unreadable" else []:
            path.write_bytes(b"") if fault == "emptied" else path.chmod(0)
        answer = plain.get("/preview/there.png")
        assert (answer.status_code, answer.content) == (200, wanted)
        assert plain.request("HEAD", "/preview/there.png").status_code == 200
    finally:
        if aside.exists():
            cache.unlink()
            aside.rename(cache)
        cache.chmod(0o755)


FAULTS = [
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOMEM, errno.ESHUTDOWN),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR, errno.EMFILE),
]
CALLS = [(os, "stat", "outputs"), (os, "open", "there.png"), (os, "scandir", "outputs")]  # a file is only opened, once


@pytest.fixture
async def client(tmp_path: Path, aiohttp_client: Any) -> TestClient[Any, Any]:
    """A daemon in this process, whose system calls a test can let fail."""
    config = wangpd.Config(save_path=tmp_path / "outputs", state_path=tmp_path / "state", models_dir=tmp_path)
    made: TestClient[Any, Any] = await aiohttp_client(wangpd.make_app(config))
    put(tmp_path / "outputs", "there.png")
    return made


@pytest.mark.parametrize("number", FAULTS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("failing_call", CALLS, ids=lambda place: f"{place[0].__name__}.{place[1]}-{place[2]}")
async def test_a_disk_that_fails_is_a_sentence_and_never_a_500(
    client: TestClient[Any, Any], monkeypatch: pytest.MonkeyPatch, failing_call: tuple[Any, str, str], number: int
) -> None:
    module, call, of = failing_call
    true_call = getattr(module, call)

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if of in str(path):
            raise OSError(number, os.strerror(number))
        return true_call(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, failing)
        answers = [
            await client.request(method, API + path)
            for path in ("/download/there.png", "/preview/there.png", "/outputs")
            for method in ("GET", "HEAD")
        ]
        assert {answer.status for answer in answers} <= {200, 403, 404, 503}
        refused = [answer for answer in answers if answer.status != 200]
        assert refused or (call == "scandir" and number in (errno.ENOENT, errno.ENOTDIR))  # gone since `stat`: empty
        said = [await answer.json() for answer in refused if answer.method == "GET"]
        assert [set(body) for body in said] == [{"detail"}] * len(said)
    assert (await client.get(f"{API}/download/there.png")).status == 200


async def test_a_file_that_cant_be_looked_at_does_not_cost_the_others_their_place(
    client: TestClient[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a file on a mount point that is broken."""
    put(tmp_path / "outputs", "broken.png")
    true_scandir = os.scandir

    class Item:
        def __init__(self, item: Any) -> None:
            self.name, self._item = item.name, item

        def is_file(self, **options: Any) -> bool:
            return bool(self._item.is_file(**options))

        def stat(self, **options: Any) -> os.stat_result:
            if self.name == "broken.png":
                raise OSError(errno.EIO, "Input/output error")
            result: os.stat_result = self._item.stat(**options)
            return result

    class Items:
        def __init__(self, path: Any) -> None:
            self._items = true_scandir(path)

        def __enter__(self) -> Iterator[Item]:
            return map(Item, self._items)

        def __exit__(self, *_: object) -> None:
            self._items.close()

    monkeypatch.setattr(os, "scandir", Items)
    listed = (await (await client.get(f"{API}/outputs")).json())["data"]["files"]
    assert [entry["filename"] for entry in listed] == ["there.png"]


async def test_a_folder_that_hangs_blocks_no_other_request(
    client: TestClient[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a share whose server is gone, which even a look at its folder waits for."""
    for path in (tmp_path / "outputs" / "there.png", tmp_path / "outputs"):
        os.utime(path, (1e9, 1e9))  # long unchanged, so that the listing is kept
    assert (await client.get(f"{API}/outputs")).status == 200
    looked, back, true_stat = threading.Event(), threading.Event(), os.stat

    def hanging(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("outputs/."):
            looked.set()
            back.wait(20)
        return true_stat(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", hanging)
        listing = asyncio.create_task(client.get(f"{API}/outputs"))
        assert await asyncio.to_thread(looked.wait, 20)
        assert (await client.get(f"{API}/health")).status == 200
        assert not listing.done()
        back.set()
        assert (await listing).status == 200


# ---- what changes while it is sent


@pytest.fixture
def large(folder: Path) -> Path:
    """A file that takes longer to send than to change."""
    path = folder / "large.mkv"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    return path


def begun(channel: socket.socket, **headers: str) -> tuple[int, int]:
    """Ask for the large file and, on the same connection, for something else; the status and Content-Length."""
    channel.sendall(head(f"{API}/download/large.mkv", **headers) + head(f"{API}/health"))
    received = b""
    while b"\r\n\r\n" not in received:
        received += channel.recv(1)
    found = re.search(rb"HTTP/1.1 (\d+) .*Content-Length: (\d+)", received, re.DOTALL)
    assert found
    return int(found[1]), int(found[2])


def rest(channel: socket.socket) -> bytes:
    """The rest of what the daemon sends before it closes the connection."""
    blocks = []
    while block := channel.recv(1 << 20):
        blocks.append(block)
    return b"".join(blocks)


@pytest.mark.parametrize("sent", [{}, {"Range": "bytes=100-"}, {"Range": "bytes=-150000000"}], ids=str)
@pytest.mark.parametrize("left_bytes", [0, 1000, 99_000_000])
def test_a_file_that_shrinks_while_it_is_sent_ends_the_connection(
    plain: Daemon, large: Path, sent: dict[str, str], left_bytes: int
) -> None:
    with connected(plain.url) as channel:
        status, length = begun(channel, **sent)
        os.truncate(large, left_bytes)
        received = rest(channel)
    assert (status, length) in ((200, LARGE_BYTES), (206, LARGE_BYTES - 100), (206, 150_000_000))
    assert len(received) < length
    assert not received.strip(b"\0")  # nothing of the next answer is among the bytes of the file
    assert plain.get("/health").status_code == 200


def test_a_file_that_grows_while_it_is_sent_is_sent_as_it_was(plain: Daemon, large: Path) -> None:
    with connected(plain.url) as channel:
        _, length = begun(channel)
        with large.open("ab") as file:
            file.write(b"more" * 1000)
        missing = length
        while missing:
            block = channel.recv(min(missing, 1 << 20))
            assert block
            assert not block.strip(b"\0")
            missing -= len(block)
        answer = answered(channel)
    assert answer is not None
    assert json.loads(answer.body)["status"] == "healthy"


def test_a_file_that_is_replaced_or_removed_while_it_is_sent_is_sent_whole(plain: Daemon, large: Path) -> None:
    with connected(plain.url) as channel:
        _, length = begun(channel)
        put(large.parent, "new.mkv").rename(large)
        missing = length
        while missing:
            block = channel.recv(min(missing, 1 << 20))
            assert block
            missing -= len(block)
        answer = answered(channel)
    assert answer is not None
    assert answer.status == 200


@pytest.mark.usefixtures("large")
def test_head_of_a_file_leaves_the_connection_open(plain: Daemon) -> None:
    with connected(plain.url) as channel:
        channel.sendall(head(f"{API}/download/large.mkv", "HEAD"))
        told = answered(channel, "HEAD")
        channel.sendall(head(f"{API}/health"))
        next_answer = answered(channel)
    assert told is not None
    assert told.headers["Content-Length"] == str(LARGE_BYTES)
    assert next_answer is not None
    assert next_answer.status == 200


@pytest.mark.parametrize("fault", ["no sendfile", "ends early", "can't be read any more"])
async def test_a_disk_that_fails_while_a_file_is_sent_ends_the_connection(
    client: TestClient[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Where the kernel can't send the files of a file system, asyncio reads them itself."""
    path = tmp_path / "outputs" / "film.mp4"
    path.write_bytes(b"x" * 3_000_000)
    true_sendfile, offsets = os.sendfile, []

    def sendfile(out: int, file: int, offset: int, count: int) -> int:
        offsets.append(offset)
        if fault == "no sendfile" or offset:
            os.truncate(path, 10)
            if fault != "ends early":
                raise OSError(errno.EINVAL if fault == "no sendfile" else errno.EIO, "no")
        return true_sendfile(out, file, offset, min(count, 10_000))

    monkeypatch.setattr(os, "sendfile", sendfile)
    async with client.get(f"{API}/download/film.mp4") as answer:
        assert answer.status == 200
        with pytest.raises(ClientPayloadError):
            await answer.read()
    assert offsets
    async with client.get(f"{API}/health") as answer:
        assert answer.status == 200
