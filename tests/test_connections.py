"""Connections: nobody holds them all, none is held for ever, and /health is answered whatever else is open."""

import asyncio
import json
import os
import resource
import select
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import wangpd
from engine.api import connection
from tests.daemon import Daemon
from tests.harness import until
from tests.idle import idle_daemon
from tests.processes import eventually
from tests.wire import PATIENCE_S, Answer, answered, connected, exchange, head

API = "/api/v1"
MIB = 2**20
MOST = 40
SHARE = MOST // 2
SMALL_BUFFER = 4096
HERE, ATTACKER, OTHER, PROXY = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.9"


def open_connections(daemon: Daemon) -> int:
    """How many TCP connections the daemon has not closed yet."""
    port = int(daemon.url.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] in ("01", "08") for row in rows)  # established, close wait


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with 40 slots, a proxy that it trusts, a Unix socket, and a file that no socket's buffer can hold."""
    at = tmp_path / "a.sock"
    with idle_daemon(
        tmp_path / "house", max_connections=MOST, trusted_proxies=[PROXY], host=["127.0.0.1", f"unix:{at}"]
    ) as running:
        with (running.outputs / "large.mp4").open("wb") as file:
            file.truncate(200 * MIB)
        running.submit()
        assert eventually(lambda: open_connections(running) == 0)
        yield running


def asked(daemon: Daemon, path: str = "/queue", source: str = HERE, method: str = "GET") -> Answer:
    answer = exchange(daemon.url, head(API + path, method), source)
    assert answer is not None
    return answer


def slow(daemon: Daemon, source: str) -> socket.socket:
    """A connection whose receive buffer is small."""
    channel = connected(daemon.url, source)
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    return channel


# What holds a connection and asks nothing more: what is sent, of which nothing is read.
HOLDERS: dict[str, bytes] = {
    "downloads that nobody reads": head(f"{API}/download/large.mp4"),
    "silence": b"",
    "half a head": head(f"{API}/queue")[:-2],
    "half a body": head(f"{API}/generate", "POST", Content_Type="application/json", Content_Length=99) + b"{",
    "a wait": head(f"{API}/status/1?wait=60"),
    "answers that nobody reads": head(f"{API}/models") * 200,
}


def hold(daemon: Daemon, stack: ExitStack, what: str, count: int, *sources: str) -> list[socket.socket]:
    """Open `count` connections, from each of the sources in turn, that ask for something and read nothing."""
    channels = []
    for number in range(count):
        channel = stack.enter_context(slow(daemon, sources[number % len(sources)]))
        with suppress(OSError):  # it may have been turned away already
            channel.setblocking(False)
            channel.send(HOLDERS[what])
        channels.append(channel)
    return channels


# ------------------------------------------------------------------------------------------------------------ the share


@pytest.mark.parametrize("what", HOLDERS)
def test_one_address_leaves_half_of_the_connections_to_others(house: Daemon, what: str) -> None:
    with ExitStack() as stack:
        hold(house, stack, what, MOST + 20, ATTACKER)
        for _ in range(SHARE):
            channel = stack.enter_context(connected(house.url, OTHER))
            channel.sendall(head(f"{API}/queue"))
            answer = answered(channel)
            assert answer
            assert answer.status == 200
        assert asked(house, "/health", ATTACKER).status == 200
        refused = asked(house, "/queue", ATTACKER)
    assert (refused.status, refused.headers["Retry-After"], refused.headers["Connection"]) == (503, "10", "close")
    whole = f"{MOST} are open (max_connections)"
    assert json.loads(refused.body) == {"detail": f"Too many connections: {whole}"}
    assert eventually(lambda: asked(house, "/queue", ATTACKER).status == 200)


def test_who_has_the_share_of_an_address_is_told_so(house: Daemon) -> None:
    with ExitStack() as stack:
        hold(house, stack, "silence", SHARE, ATTACKER)
        refused = asked(house, "/queue", ATTACKER)
        share = f"{SHARE} are open from {ATTACKER} (half of max_connections)"
        assert json.loads(refused.body) == {"detail": f"Too many connections: {share}"}
        assert asked(house, "/queue", OTHER).status == 200
    assert f"connection refused: {share}\n" in house.log.read_text()


def over_unix(house: Daemon, stack: ExitStack) -> socket.socket:
    channel = stack.enter_context(socket.socket(socket.AF_UNIX))
    channel.settimeout(PATIENCE_S)
    channel.connect(str(house.folder.parent / "a.sock"))
    return channel


@pytest.mark.parametrize("door", ["proxy", "unix"])
def test_a_trusted_proxy_may_hold_them_all(house: Daemon, door: str) -> None:
    with ExitStack() as stack:
        for _ in range(MOST):
            proxied = connected(house.url, PROXY) if door == "proxy" else over_unix(house, stack)
            stack.enter_context(proxied).sendall(head(f"{API}/queue"))
            answer = answered(proxied)
            assert answer
            assert answer.status == 200
        assert asked(house).status == 503
        assert asked(house, "/health").status == 200


@pytest.mark.parametrize(("most", "share"), [(1, 1), (9, 9), (15, 15), (16, 8), (31, 15)])
def test_a_limit_too_small_to_be_shared_is_not(tmp_path: Path, most: int, share: int) -> None:
    def kept() -> bool:
        channel = stack.enter_context(connected(daemon.url))
        channel.sendall(head(f"{API}/queue"))
        answer = answered(channel)
        return answer is not None and answer.status == 200

    with idle_daemon(tmp_path, max_connections=most) as daemon, ExitStack() as stack:
        for _ in range(share):
            assert eventually(kept)  # the one before may just be closing
        assert not any(kept() for _ in range(3))


@pytest.mark.parametrize("what", HOLDERS)
@pytest.mark.parametrize("sources", [(ATTACKER, "127.0.0.4"), (ATTACKER, "127.0.0.4", "127.0.0.5", "127.0.0.6")])
def test_addresses_with_many_connections_make_room_for_one_with_few(
    house: Daemon, what: str, sources: tuple[str, ...]
) -> None:
    with ExitStack() as stack:
        hold(house, stack, what, MOST, *sources)
        for source in (HERE, OTHER, HERE):
            for _ in range(3):
                assert asked(house, "/queue", source).status == 200
        hold(house, stack, what, MOST, *sources)
        assert asked(house, "/queue", OTHER).status == 200
    assert "Traceback" not in house.log.read_text()


# ---------------------------------------------------------------------------------------------------------- the reserve

CROWD = [f"127.0.1.{number}" for number in range(1, 11)]


@pytest.mark.parametrize("what", HOLDERS)
def test_health_is_answered_while_many_addresses_hold_every_connection(house: Daemon, what: str) -> None:
    with ExitStack() as stack:
        hold(house, stack, what, 3 * MOST, *CROWD)
        for source in (HERE, OTHER, *CROWD):
            assert asked(house, "/health", source).status == 200
            assert asked(house, "/health/ready", source).status == 200
            assert asked(house, "/queue", source).status == 503
        hold(house, stack, what, MOST, *CROWD)
        assert asked(house, "/health").status == 200
    assert eventually(lambda: asked(house, "/queue").status == 200)
    assert "Traceback" not in house.log.read_text()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200),
        ("HEAD", "/health/", 200),
        ("GET", "/health/ready?a=1", 200),
        ("POST", "/health", 405),
        ("GET", "", 503),
        ("GET", "/health/x", 503),
        ("DELETE", "/queue", 503),
        ("GET", "/download/large.mp4", 503),
        ("OPTIONS", "/generate", 503),
        ("GET", "/../../", 503),
    ],
)
def test_the_reserve_is_for_health_and_ends_with_the_answer(house: Daemon, method: str, path: str, status: int) -> None:
    with ExitStack() as stack:
        hold(house, stack, "silence", MOST, *CROWD)
        with connected(house.url) as channel:
            channel.sendall(head(API + path, method, Connection="keep-alive"))
            answer = answered(channel, method)
            assert answer
            assert (answer.status, answer.headers["Connection"]) == (status, "close")
            assert answer.headers["Retry-After"] == ("10" if status == 503 else None)
            assert channel.recv(1) == b""
            assert method == "HEAD" or "detail" in json.loads(answer.body) or status == 200


def is_turned_away(channel: socket.socket, method: str = "GET") -> bool:
    """Whether the next answer is 503, and then the connection ends."""
    answer = answered(channel, method)
    return answer is not None and answer.status == 503 and channel.recv(1) == b""


def test_a_body_on_a_connection_of_the_reserve_is_not_waited_for(house: Daemon) -> None:
    with ExitStack() as stack:
        hold(house, stack, "silence", MOST, *CROWD)
        with connected(house.url) as channel:
            channel.sendall(HOLDERS["half a body"])
            assert is_turned_away(channel, "POST")


def test_who_says_nothing_on_a_connection_of_the_reserve_is_turned_away(house: Daemon) -> None:
    with ExitStack() as stack:
        hold(house, stack, "silence", MOST, *CROWD)
        silent = stack.enter_context(connected(house.url))
        halting = stack.enter_context(connected(house.url, OTHER))
        halting.sendall(HOLDERS["half a head"])
        for channel in (silent, halting):
            assert is_turned_away(channel)


def test_a_new_connection_takes_the_place_of_one_that_says_nothing(house: Daemon) -> None:
    with ExitStack() as stack:
        hold(house, stack, "silence", MOST, *CROWD)
        first, *others = (stack.enter_context(connected(house.url)) for _ in range(connection.RESERVE_SHARE + 1))
        refused = answered(first)
        assert refused
        assert refused.status == 503
        for channel in others:  # in time: none has been turned away yet
            channel.sendall(head(f"{API}/health"))
            answer = answered(channel)
            assert answer
            assert answer.status == 200


def test_a_flood_of_connections_opens_a_bounded_number_of_files(house: Daemon) -> None:
    handles = Path(f"/proc/{house.process.pid}/fd")
    before = len(list(handles.iterdir()))
    bound = before + MOST + connection.RESERVE + 110  # 100 are accepted at a time
    with ExitStack() as stack:
        for number in range(1000):
            stack.enter_context(connected(house.url, CROWD[number % len(CROWD)]))
            if number % 100 == 0:
                assert len(list(handles.iterdir())) <= bound
                assert asked(house, "/health").status == 200
        assert eventually(lambda: len(list(handles.iterdir())) <= before + MOST + connection.RESERVE)
    assert eventually(lambda: len(list(handles.iterdir())) <= before)
    assert house.log.read_text().count("\n") <= 4


@pytest.mark.parametrize("soft", [200, 1024])
def test_a_shells_limit_of_open_files_is_raised(own_daemon: Daemon, soft: int) -> None:
    own_daemon.launcher = ["prlimit", f"--nofile={soft}:3000"]
    own_daemon.start()
    assert resource.prlimit(own_daemon.process.pid, resource.RLIMIT_NOFILE) == (3000, 3000)


# ---------------------------------------------------------------------------------------------- what does not progress


@asynccontextmanager
async def served(folder: Path, **config: Any) -> AsyncIterator[tuple[str, int]]:
    """The address of a daemon in this process."""
    made = wangpd.Config(port=0, save_path=folder / "outputs", state_path=folder / "state", **config)
    runner = web.AppRunner(wangpd.make_app(made))
    await runner.setup()
    listener = await wangpd.bind(runner, made)
    await listener.start_serving()
    try:
        yield listener.sockets[0].getsockname()
    finally:
        listener.close()
        await runner.cleanup()


def handles_of(name: str) -> int:
    """How many files of this name this process has open."""
    found = 0
    for handle in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            found += handle.readlink().name == name
    return found


async def reading(address: tuple[str, int], request: bytes) -> asyncio.StreamWriter:
    """A client that asks and stops reading once a few kilobytes have come."""
    channel = socket.socket()
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL_BUFFER)
    channel.setblocking(False)
    await asyncio.get_running_loop().sock_connect(channel, address)
    _, writer = await asyncio.open_connection(sock=channel, limit=1024)
    writer.write(request)
    return writer


async def status_of(address: tuple[str, int], path: str) -> int:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(head(API + path, Connection="close"))
    answer = await reader.read()
    writer.close()
    return int(answer.split(b" ")[1])


STALLS = {
    "a file": head(f"{API}/download/large.mp4"),
    "a part of a file": head(f"{API}/download/large.mp4", Range="bytes=1000-"),
    "many answers": head(f"{API}/models") * 100,
    "a large answer": head("/api/openapi.json") * 20,
    "scripts of the documentation": head("/api/redoc/files/redoc.standalone.js") * 5,
}


@pytest.mark.parametrize("what", STALLS)
async def test_an_answer_that_nobody_reads_ends_and_gives_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(connection, "STALLED_MS", 1000)
    (tmp_path / "outputs").mkdir()
    with (tmp_path / "outputs" / "large.mp4").open("wb") as file:
        file.truncate(200 * MIB)
    async with served(tmp_path, max_connections=2) as address:
        clients = [await reading(address, STALLS[what]) for _ in range(2)]
        if "file" in what:
            await until(lambda: handles_of("large.mp4") == 2)
        assert await status_of(address, "/queue") == 503
        await until(lambda: handling() == 0)
        assert handles_of("large.mp4") == 0
        assert await status_of(address, "/queue") == 200
        for client in clients:
            client.close()


def handling() -> int:
    """How many connections have a task of aiohttp's."""
    return sum("RequestHandler.start" in repr(task.get_coro()) for task in asyncio.all_tasks())


async def test_an_answer_that_is_read_slowly_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_MS", 1000)
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "a.mp4").write_bytes(os.urandom(4 * MIB))
    async with served(tmp_path) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(head(f"{API}/download/a.mp4", Connection="close"))
        size = 0
        while part := await reader.read(MIB):
            size += len(part)
            await asyncio.sleep(0.1)
        writer.close()
    assert size > 4 * MIB


def reset(channel: socket.socket) -> None:
    channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    channel.close()


LEFT: dict[str, Callable[[socket.socket], None]] = {
    "closes": socket.socket.close,
    "resets": reset,
    "ends its side": lambda channel: channel.shutdown(socket.SHUT_WR),
}
# Whose answers wait for the client is not read from, and half an end says nothing.
LEAVING = [(what, leave) for what in HOLDERS for leave in LEFT if (what, leave) != (*[*HOLDERS][-1:], [*LEFT][-1])]


@pytest.mark.parametrize(("what", "leave"), LEAVING)
def test_who_leaves_gives_his_connections_back_at_once(house: Daemon, what: str, leave: str) -> None:
    with ExitStack() as stack:
        for channel in hold(house, stack, what, SHARE, ATTACKER):
            LEFT[leave](channel)
        assert eventually(lambda: asked(house, "/queue", ATTACKER).status == 200)
        for channel in hold(house, stack, what, SHARE - 1, ATTACKER):
            LEFT[leave](channel)
        assert eventually(lambda: asked(house, "/queue", ATTACKER).status == 200)


def test_a_burst_of_connections_waits_for_none_of_them_to_be_taken(tmp_path: Path) -> None:
    """The kernel drops what finds no place in the backlog, and its client tries again a second later."""
    with Daemon(tmp_path) as daemon, ExitStack() as stack:
        daemon.process.send_signal(signal.SIGSTOP)  # so that none is taken
        try:
            port = int(daemon.url.rpartition(":")[2])
            for _ in range(300):
                channel = stack.enter_context(socket.socket())
                channel.setblocking(False)
                channel.connect_ex(("127.0.0.1", port))
                assert select.select([], [channel], [], 0.9)[1], "its first packet was dropped"
        finally:
            daemon.process.send_signal(signal.SIGCONT)
