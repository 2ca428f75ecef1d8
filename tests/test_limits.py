"""Limits: what is too much is refused with a sentence, costs little, and takes nothing from anybody else."""

import asyncio
import base64
import functools
import gzip
import io
import os
import re
import select
import socket
import struct
import time
import zlib
from collections import namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from aiohttp import web
from PIL import Image

import wangpd
from engine.api import connection
from engine.api.body import parsed
from engine.files.outputs import Outputs, OwnFile, Retention
from tests.daemon import Daemon
from tests.idle import idle_daemon
from tests.processes import alive, eventually, workers
from tests.stub_worker import make_clips
from tests.stubbed import StubDaemon
from tests.wire import PATIENCE_S, answered, connected, exchange, head

API = "/api/v1"
MIB = 2**20
MOST_CONNECTIONS = 12
DAY_S = 86400
QUICK = {"num_inference_steps": 1, "video_length": 5}
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon in which accepted tasks wait for ever, with small limits."""
    folder = tmp_path_factory.mktemp("narrow")
    with idle_daemon(folder, max_body_mb=2, body_timeout_s=1) as running:
        yield running


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The same with the limits that it comes with."""
    with idle_daemon(tmp_path_factory.mktemp("roomy")) as running:
        yield running


def memory_mib(daemon: Daemon, peak: bool = False) -> float:
    """Resident memory of the daemon, now or the most since `forget_peak`."""
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    found = re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def growth_mib(daemon: Daemon, act: Callable[[], None]) -> float:
    """How far the daemon's memory rises above where it is, while `act` is done."""
    Path(f"/proc/{daemon.process.pid}/clear_refs").write_text("5")  # the kernel forgets the peak
    before = memory_mib(daemon)
    act()
    return memory_mib(daemon, peak=True) - before


# ------------------------------------------------------------------------------------------------------------- queue


def stored(daemon: Daemon) -> set[str]:
    return {path.name for path in (daemon.state / "inputs").glob("*")}


def picture(colour: str) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_full_queue_is_503_and_stores_nothing(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_queue=2) as daemon:
        ids = [daemon.submit(image_start=picture("red"))["task_id"] for _ in range(2)]
        before = stored(daemon)
        answer = daemon.post("/generate", {"prompt": "a", "image_start": picture("blue")})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        assert answer.json() == {"detail": "The queue is full: 2 tasks wait (max_queue)"}
        assert stored(daemon) == before
        assert [task["task_id"] for task in daemon.get("/tasks").json()["data"]["tasks"]] == ids[::-1]


def test_a_full_queue_takes_a_task_again_once_one_has_left(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_queue=1) as daemon:
        task_id = daemon.submit()["task_id"]
        assert daemon.post("/generate", {"prompt": "a"}).status_code == 503
        daemon.delete(f"/queue/{task_id}")
        assert daemon.submit()["position"] == 1


def test_a_full_queue_still_tells_what_a_task_would_come_to(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_queue=1) as daemon:
        daemon.submit()
        assert daemon.post("/generate?dry_run=1", {"prompt": "a"}).status_code == 200


# ------------------------------------------------------------------------------------------------------------ bodies


TOO_LARGE = {"detail": "The body is larger than 2 MiB (max_body_mb)"}


def test_a_body_that_says_it_is_too_large_is_413_before_any_of_it_is_sent(narrow: Daemon) -> None:
    request = head(f"{API}/generate", "POST", Content_Type="application/json", Content_Length=2**40)
    answer = exchange(narrow.url, request)
    assert answer is not None
    assert (answer.status, parsed(answer.body)) == (413, TOO_LARGE)


def test_a_body_in_chunks_is_413_as_soon_as_it_is_too_large(narrow: Daemon) -> None:
    chunk = b"%x\r\n%b\r\n" % (MIB, b" " * MIB)
    with connected(narrow.url) as channel:
        channel.sendall(
            head(f"{API}/generate", "POST", Content_Type="application/json", Transfer_Encoding="chunked") + chunk * 3
        )
        answer = answered(channel)  # while the body has not ended
    assert answer is not None
    assert (answer.status, parsed(answer.body)) == (413, TOO_LARGE)


def test_a_large_body_is_not_kept_in_memory(narrow: Daemon) -> None:
    def send() -> None:
        with suppress(OSError):  # it may hang up before all is sent
            narrow.request("POST", "/generate", data=(b" " * MIB for _ in range(200)), headers=JSON)

    assert growth_mib(narrow, send) < 24


def test_a_body_that_unpacks_to_too_much_is_415_and_is_not_unpacked(narrow: Daemon) -> None:
    bomb = gzip.compress(b" " * 200 * MIB)

    def send() -> None:
        answer = narrow.request("POST", "/generate", data=bomb, headers={**JSON, "Content-Encoding": "gzip"})
        assert answer.status_code == 415, answer.text

    assert growth_mib(narrow, send) < 64


def test_a_body_that_comes_in_drops_is_408_after_its_time(narrow: Daemon) -> None:
    with connected(narrow.url) as channel:
        channel.sendall(head(f"{API}/generate", "POST", Content_Type="application/json", Content_Length=1000))
        while not select.select([channel], [], [], 0.1)[0]:
            channel.sendall(b" ")
        answer = answered(channel)
    assert answer is not None
    assert answer.status == 408
    assert parsed(answer.body) == {"detail": "The body did not arrive within body_timeout_s seconds"}


# ------------------------------------------------------------------------------------------------------- connections


@pytest.fixture
async def hasty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[str, int]]:
    """The address of a daemon in this process that waits half a second for the head of a request."""
    monkeypatch.setattr(connection, "KEEPALIVE_S", 0.5)
    config = wangpd.Config(port=0, save_path=tmp_path / "outputs", state_path=tmp_path / "state")
    runner = web.AppRunner(wangpd.make_app(config))
    await runner.setup()
    listener = await wangpd.bind(runner, config)
    await listener.start_serving()
    yield listener.sockets[0].getsockname()
    listener.close()
    await runner.cleanup()


async def dripped(writer: asyncio.StreamWriter) -> None:
    """Send one line of a head after the other, for ever."""
    while True:
        writer.write(b"X-Drop: 1\r\n")
        await asyncio.sleep(0.05)


async def test_a_head_that_never_ends_is_hung_up_on(hasty: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*hasty)
    writer.write(b"GET /api/v1/health HTTP/1.1\r\nHost: a\r\n")
    dripping = asyncio.create_task(dripped(writer))
    with suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
    dripping.cancel()
    writer.close()


async def test_a_connection_that_says_nothing_is_hung_up_on(hasty: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*hasty)
    assert await asyncio.wait_for(reader.read(), PATIENCE_S) == b""
    writer.close()


async def test_a_connection_that_says_nothing_more_is_hung_up_on(hasty: tuple[str, int]) -> None:
    reader, writer = await asyncio.open_connection(*hasty)
    writer.write(head(f"{API}/health"))
    said = await asyncio.wait_for(reader.read(), PATIENCE_S)
    assert said.startswith(b"HTTP/1.1 200 OK")
    writer.close()


@pytest.fixture
def small_house(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with few places, all of them free."""
    with Daemon(tmp_path, max_connections=MOST_CONNECTIONS) as running:
        yield running


def opened(daemon: Daemon, stack: ExitStack, count: int) -> list[socket.socket]:
    """Connections that have each been answered once and stay open."""
    channels = [stack.enter_context(connected(daemon.url)) for _ in range(count)]
    for channel in channels:
        channel.sendall(head(f"{API}/health"))
        answer = answered(channel)
        assert answer is not None
        assert answer.status == 200
    return channels


def test_one_connection_too_many_is_503_and_the_others_go_on(small_house: Daemon) -> None:
    with ExitStack() as stack:
        channels = opened(small_house, stack, MOST_CONNECTIONS)
        answer = exchange(small_house.url, head(f"{API}/queue"))
        assert answer is not None
        assert (answer.status, answer.headers["Retry-After"], answer.headers["Connection"]) == (503, "10", "close")
        assert parsed(answer.body) == {"detail": f"Too many connections: {MOST_CONNECTIONS} are open (max_connections)"}
        channels[0].sendall(head(f"{API}/health"))
        again = answered(channels[0])
        assert again is not None
        assert again.status == 200


def test_a_place_that_becomes_free_is_given_to_the_next(small_house: Daemon) -> None:
    with ExitStack() as stack:
        opened(small_house, stack, MOST_CONNECTIONS)
        assert small_house.get("/queue").status_code == 503
    assert eventually(lambda: small_house.get("/queue").status_code == 200)


def test_a_burst_of_connections_does_not_pass_the_limit(small_house: Daemon) -> None:
    with ExitStack() as stack:
        channels = [stack.enter_context(connected(small_house.url)) for _ in range(60)]
        for channel in channels:
            channel.sendall(head(f"{API}/queue"))
        found = [answered(channel) for channel in channels]
    statuses = [answer.status for answer in found if answer]
    assert (statuses.count(200), statuses.count(503)) == (MOST_CONNECTIONS, 60 - MOST_CONNECTIONS)


def test_who_was_turned_away_is_not_kept(small_house: Daemon) -> None:
    handles = Path(f"/proc/{small_house.process.pid}/fd")
    with ExitStack() as stack:
        opened(small_house, stack, MOST_CONNECTIONS)
        before = len(list(handles.iterdir()))
        for _ in range(30):
            channel = stack.enter_context(connected(small_house.url))
            channel.sendall(head(f"{API}/queue"))
            assert answered(channel) is not None
        assert eventually(lambda: len(list(handles.iterdir())) <= before)


def test_readers_that_do_not_read_cost_no_memory_and_slow_nobody(roomy: Daemon) -> None:
    with (roomy.outputs / "large.mp4").open("wb") as file:
        file.truncate(500 * MIB)
    (roomy.outputs / "small.mp4").write_bytes(b"small")

    def stall() -> None:
        with ExitStack() as stack:
            for _ in range(30):
                stack.enter_context(connected(roomy.url)).sendall(head(f"{API}/download/large.mp4"))
            for _ in range(20):
                assert roomy.get("/download/small.mp4", timeout=10).content == b"small"
                assert roomy.get("/health", timeout=10).status_code == 200

    assert growth_mib(roomy, stall) < 16


# ----------------------------------------------------------------------------------------------------------- pictures


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG with any header over anything: Pillow would not write it."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def sized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG that says it is large."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "jpeg")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def sized_webp(width: int, height: int) -> bytes:
    """A small lossless WebP that says it is large."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "webp", lossless=True)
    data = bytearray(buffer.getvalue())
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


@functools.cache
def packed(size_bytes: int) -> bytes:
    """So many zeros, deflated."""
    packer = zlib.compressobj(9)
    zeros = b"\0" * MIB
    return b"".join(packer.compress(zeros) for _ in range(size_bytes // MIB)) + packer.flush()


BOMBS = {
    "a PNG of 900 megapixels": lambda: png(30_000, 30_000, chunk(b"IDAT", packed(200 * MIB))),
    "a PNG of 4 exapixels": lambda: png(2**31 - 1, 2**31 - 1, chunk(b"IDAT", packed(MIB))),
    "a JPEG of 4 gigapixels": lambda: sized_jpeg(65_500, 65_500),
    "a WebP of 268 megapixels": lambda: sized_webp(16_384, 16_384),
    "a text of 200 MiB in a PNG": lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + packed(200 * MIB))),
    "a profile of 200 MiB in a PNG": lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + packed(200 * MIB))),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_picture_that_unpacks_to_too_much_is_400_with_bounded_memory(roomy: Daemon, name: str) -> None:
    bomb = base64.b64encode(BOMBS[name]()).decode()
    roomy.submit(image_start=picture("red"))  # so that Pillow itself does not count

    def send() -> None:
        answer = roomy.post("/generate", {"prompt": "a", "image_start": bomb})
        assert answer.status_code == 400, answer.text
        assert answer.json()["detail"].startswith("image_start: the picture ")

    assert growth_mib(roomy, send) < 32


def test_a_small_picture_with_much_behind_it_takes_no_memory_for_that(roomy: Daemon) -> None:
    swollen = base64.b64encode(png(8, 8, chunk(b"IDAT", packed(200 * MIB)))).decode()
    roomy.submit(image_start=picture("red"))
    assert growth_mib(roomy, lambda: roomy.submit(image_start=swollen)) < 32


# ---------------------------------------------------------------------------------------------------------- the engine


@pytest.fixture(scope="module")
def tidy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that gives everything back after a second, and keeps files for a day."""
    with StubDaemon(tmp_path_factory.mktemp("tidy"), make_clips, idle_unload_s=1, keep_outputs_days=1) as running:
        yield running


def test_idleness_ends_the_generation_process_and_the_next_task_starts_one(tidy: Daemon) -> None:
    assert tidy.run(**QUICK)["status"] == "completed"
    assert eventually(lambda: "idle for 1 s: the generation process was ended" in tidy.log.read_text())
    assert eventually(lambda: not workers(tidy))
    assert tidy.run(**QUICK)["status"] == "completed"


def test_a_task_removes_what_is_older_than_it_is_to_be_kept(tidy: Daemon) -> None:
    old, young = (tidy.made(tidy.run(**QUICK)) for _ in range(2))
    for path, age_s in {old: 2 * DAY_S, young: DAY_S / 2}.items():
        os.utime(path, (time.time() - age_s,) * 2)
    made = tidy.made(tidy.run(**QUICK))
    assert {young, made} <= set(tidy.outputs.iterdir())
    assert not old.exists()


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose worker takes half a second for a hundred steps."""
    with StubDaemon(tmp_path_factory.mktemp("work"), make_clips) as running:
        yield running


def test_unload_ends_the_generation_process_and_the_next_task_starts_one(at_work: Daemon) -> None:
    at_work.run(**QUICK)
    (pid,) = workers(at_work)
    assert at_work.post("/unload").json() == {
        "success": True,
        "message": "Memory given back",
        "data": {"unloaded": True},
    }
    assert eventually(lambda: not alive(pid))
    assert at_work.post("/unload").json()["data"] == {"unloaded": False}
    assert at_work.run(**QUICK)["status"] == "completed"
    assert workers(at_work).isdisjoint({pid})


def test_unload_leaves_a_task_alone_that_runs(at_work: Daemon) -> None:
    task_id = at_work.submit(num_inference_steps=100, repeat_generation=10)["task_id"]
    at_work.until(task_id, lambda state: state["phase"] == "denoising")
    answer = at_work.post("/unload")
    assert (answer.status_code, answer.json()) == (
        400,
        {"detail": "The engine works; wait for the task, or cancel it first"},
    )
    assert at_work.status(task_id)["status"] == "processing"
    at_work.delete(f"/queue/{task_id}")
    at_work.finish(task_id)


# ----------------------------------------------------------------------------------------------------------- the disk


def aged(path: Path, age_s: float, size_bytes: int = 10) -> OwnFile:
    """A file that was made so long ago."""
    path.write_bytes(b"x" * size_bytes)
    then = time.time() - age_s
    os.utime(path, (then, then))
    return OwnFile(path.name, 1, size_bytes, path.stat().st_mtime_ns, then)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_only_the_oldest_files_beyond_the_bytes_to_be_kept_are_removed(tmp_path: Path) -> None:
    own = [aged(tmp_path / f"{number}.mp4", age_s=number * 100, size_bytes=100) for number in range(6)]
    aged(tmp_path / "notes.txt", age_s=10_000, size_bytes=1000)
    Outputs(tmp_path, tmp_path / "cache", Retention(keep_bytes=350)).prepare(own)
    assert names(tmp_path) == {"0.mp4", "1.mp4", "2.mp4", "notes.txt"}


def test_only_files_older_than_they_are_to_be_kept_are_removed(tmp_path: Path) -> None:
    own = [aged(tmp_path / f"{days}.mp4", age_s=days * DAY_S + 60) for days in range(5)]
    Outputs(tmp_path, tmp_path / "cache", Retention(keep_s=2 * DAY_S)).prepare(own)
    assert names(tmp_path) == {"0.mp4", "1.mp4"}


def test_without_a_limit_every_file_is_kept(tmp_path: Path) -> None:
    own = [aged(tmp_path / "ancient.mp4", age_s=10_000 * DAY_S, size_bytes=MIB)]
    Outputs(tmp_path, tmp_path / "cache", Retention()).prepare(own)
    assert names(tmp_path) == {"ancient.mp4"}


FULL = re.compile(r"The disk of save_path has \d+ MiB free and min_free_mb asks for 900000000: delete old outputs")


def test_a_full_disk_is_503_at_submission_and_stores_nothing(tmp_path: Path) -> None:
    with Daemon(tmp_path, min_free_mb=900_000_000) as daemon:
        answer = daemon.post("/generate", {"prompt": "a", "image_start": picture("red")})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        assert FULL.fullmatch(answer.json()["detail"])
        assert stored(daemon) == set()
        assert daemon.get("/tasks").json()["data"]["total"] == 0
        assert FULL.fullmatch(daemon.get("/health/ready").json()["detail"])


def test_a_task_waits_while_the_disk_is_full_at_the_start(tmp_path: Path) -> None:
    with idle_daemon(tmp_path) as before:
        task_id = before.submit()["task_id"]
    with Daemon(tmp_path, min_free_mb=900_000_000) as daemon:
        daemon.post("/queue/resume")
        for path in (f"/queue/{task_id}/retry", "/generate"):
            answer = daemon.post(path, {"prompt": "a cat"})
            assert answer.status_code in (400, 503)  # 400: it has not ended
        assert FULL.fullmatch(daemon.get("/health/ready").json()["detail"])
        assert (daemon.status(task_id)["status"], daemon.status(task_id)["attempts"]) == ("queued", 0)
        assert workers(daemon) == set()
    with Daemon(tmp_path) as after:
        assert after.finish(task_id)["status"] == "completed"


Usage = namedtuple("Usage", "free")


def test_room_that_old_files_made_is_enough_for_a_task(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, keep_outputs_days=1) as before:
        before.post("/queue/resume")
        old = before.made(before.run(num_inference_steps=1, video_length=5))
    os.utime(old, (time.time() - 2 * DAY_S,) * 2)
    with Daemon(tmp_path, keep_outputs_days=1) as daemon:
        assert daemon.run(num_inference_steps=1, video_length=5)["status"] == "completed"
        assert not old.exists()
