"""What every answer carries: whose it is, without versions; who may frame or embed it; and how much is logged of it."""

import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

import wangpd
from tests.daemon import Daemon
from tests.idle import idle_daemon
from tests.processes import eventually
from tests.wire import Answer, answered, connected, exchange, head

API = "/api/v1"
PAGE = "https://app.example.org"
JSON = {"Content_Type": "application/json"}
VERSION = re.compile(r"\d+\.\d+|aiohttp|Python", re.IGNORECASE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with idle_daemon(tmp_path_factory.mktemp("plain"), max_body_mb=1, body_timeout_s=1, max_connections=4) as running:
        Image.new("RGB", (8, 8)).save(running.outputs / "there.png")
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with idle_daemon(tmp_path_factory.mktemp("shared"), cors_origins=[PAGE]) as running:
        Image.new("RGB", (8, 8)).save(running.outputs / "there.png")
        yield running


def asked(daemon: Daemon, request: bytes) -> Answer:
    answer = exchange(daemon.url, request)
    assert answer is not None
    return answer


def faults(answer: Answer) -> list[str]:
    """What is wrong with the headers of an answer."""
    wanted = {
        "Server": "wangpd",
        "X-Content-Type-Options": "nosniff",
        "Cross-Origin-Resource-Policy": "same-origin",
    }
    html = (answer.headers["Content-Type"] or "").startswith("text/html") or answer.body.lstrip()[:9] == b"<!DOCTYPE"
    if html:
        wanted["X-Frame-Options"] = "DENY"
    wrong = [f"{name}: {answer.headers[name]}" for name, value in wanted.items() if answer.headers[name] != value]
    policy = answer.headers["Content-Security-Policy"] or ""
    if html and not ("frame-ancestors 'none'" in policy and "default-src 'self'" in policy):
        wrong.append(f"Content-Security-Policy: {policy}")
    return wrong


def routes(folder: Path) -> list[tuple[str, str]]:
    """Method and path of every route, with something in the place of its parameters."""
    config = wangpd.Config(save_path=folder, state_path=folder / "state", models_dir=folder)
    found = []
    for route in wangpd.make_app(config).router.routes():
        assert route.resource is not None
        path = re.sub(r"\{[^}]*\}", "there.png", route.resource.canonical)
        found.append(
            (route.method, path if route.resource.canonical != "/api/docs/files" else f"{path}/swagger-ui.css")
        )
    return found


def test_every_route_has_the_headers(plain: Daemon, tmp_path: Path) -> None:
    asks = routes(tmp_path)
    assert len(asks) > 40
    wrong = {}
    for method, path in asks:
        for accept in ("*/*", "text/html"):
            for tail in ("", "/", "/none"):
                answer = asked(plain, head(path + tail, method, Accept=accept, Content_Length=0))
                wrong[method, path + tail, accept] = faults(answer)
    assert {ask: what for ask, what in wrong.items() if what} == {}


BOUNDARY = "multipart/form-data; boundary=x"
REFUSALS = {
    "no HTTP": b"\x16\x03\x01\x02\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "a long line": head(f"{API}/{'a' * 9000}"),
    "a long header": head(f"{API}/queue", X_Long="a" * 9000),
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "no route": head("/none"),
    "no method": head(f"{API}/queue", "PUT"),
    "a wrong Expect": head(f"{API}/queue", Expect="wonders"),
    "another host": head(f"{API}/queue", Host="evil.example", Origin="http://evil.example"),
    "another site": head(f"{API}/queue/pause", "POST", Origin="http://evil.example"),
    "a pre-flight": head(f"{API}/queue", "OPTIONS", Origin=PAGE, Access_Control_Request_Method="POST"),
    "no JSON": head(f"{API}/generate", "POST", **JSON, Content_Length=1) + b"{",
    "a wrong type": head(f"{API}/generate", "POST", Content_Type="text/html", Content_Length=1) + b"{",
    "an encoded body": head(f"{API}/generate", "POST", **JSON, Content_Length=1, Content_Encoding="gzip") + b"{",
    "too large": head(f"{API}/generate", "POST", **JSON, Content_Length=2**30),
    "too slow": head(f"{API}/generate", "POST", **JSON, Content_Length=9) + b"{",
    "a form that is none": head(f"{API}/generate", "POST", Content_Type=BOUNDARY, Content_Length=3) + b"--y",
    "no file": head(f"{API}/download/none.mp4"),
    "no range": head(f"{API}/download/there.png", Range="bytes=99999-"),
    "another version": head(f"{API}/download/there.png", If_Match='"none"'),
    "no preview": head(f"{API}/preview/there.png?width=1"),
    "a file of the documentation": head("/api/docs/files/none"),
    "a folder of the documentation": head("/api/docs/files/"),
    "a way out of the documentation": head("/api/docs/files/..%2f..%2faiohttp/web.py"),
}


@pytest.mark.parametrize("request_", REFUSALS.values(), ids=REFUSALS)
def test_every_refusal_has_the_headers_and_no_version(plain: Daemon, request_: bytes) -> None:
    answer = asked(plain, request_)
    assert 400 <= answer.status < 500
    assert faults(answer) == []
    assert not VERSION.search(f"{answer.headers['Server']} {answer.headers['Via']}")


@pytest.mark.parametrize("sent", [b"", head(f"{API}/queue")], ids=["turned away", "on the reserve"])
def test_a_refused_connection_has_the_headers(plain: Daemon, sent: bytes) -> None:
    held = [connected(plain.url) for _ in range(4)]
    try:
        with connected(plain.url) as channel:
            channel.sendall(sent)
            answer = answered(channel)
        assert answer
        assert answer.status == 503
        assert faults(answer) == []
    finally:
        for channel in held:
            channel.close()


@pytest.mark.parametrize("path", ["/download/there.png", "/preview/there.png", "/download/none.png"])
def test_the_pages_of_cors_origins_may_show_files(shared: Daemon, plain: Daemon, path: str) -> None:
    assert asked(shared, head(API + path)).headers["Cross-Origin-Resource-Policy"] == "cross-origin"
    assert asked(plain, head(API + path)).headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("path", [f"{API}/queue", f"{API}/outputs", "/api/docs", "/api/openapi.json"])
def test_the_pages_of_cors_origins_embed_nothing_else(shared: Daemon, path: str) -> None:
    assert asked(shared, head(path, Origin=PAGE)).headers["Cross-Origin-Resource-Policy"] == "same-origin"


# ------------------------------------------------------------------------------------------------------------- the log

FLOODS = {
    "broken uploads": head(f"{API}/generate", "POST", **JSON, Content_Length=99) + b"{",
    "broken forms": head(f"{API}/generate", "POST", Content_Type=BOUNDARY, Content_Length=99) + b"--x\r\nContent-Disp",
    "other hosts": head(f"{API}/queue", Host="evil.example", Origin="http://evil.example"),
    "no token": head(f"{API}/queue"),
    "no HTTP": b"\x16\x03\x01\x02\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "half a head": b"GET /api",
    "nothing": b"",
    "pipelined": head(f"{API}/health") * 20,
    "chunks that are none": head(f"{API}/generate", "POST", **JSON, Transfer_Encoding="chunked") + b"zz\r\n",
}


@pytest.mark.parametrize("ending", ["closes", "resets"])
def test_a_flood_of_every_kind_leaves_some_lines_in_the_log(tmp_path: Path, ending: str) -> None:
    (tmp_path / "token").write_text("secret")
    with Daemon(tmp_path, max_connections=20, token_file="token") as daemon:
        for request in FLOODS.values():
            for _ in range(200):
                with connected(daemon.url) as channel:
                    if ending == "resets":
                        channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    channel.sendall(request)
        held = [connected(daemon.url) for _ in range(200)]
        for channel in held:
            channel.close()
        assert eventually(lambda: daemon.get("/queue", headers={"Authorization": "Bearer secret"}).status_code == 200)
        text = daemon.log.read_text()
    assert len(text.splitlines()) <= 8, text[:3000]
    assert "Traceback" not in text


# ------------------------------------------------------------------------------------- what is sent and never answered


def resident_mib(daemon: Daemon) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{daemon.process.pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def sent(channel: socket.socket, data: bytes, most: int, pause_s: float = 0) -> int:
    """How many bytes the daemon takes of `data` again and again, up to `most`, while none of its answers is read."""
    channel.settimeout(1)
    size = 0
    try:
        while size < most:
            size += channel.send(data)
            time.sleep(pause_s)
    except OSError:
        pass
    return size


@pytest.mark.parametrize("path", ["/api/v1/health", "/api/v1/models", "/api/docs", "/none"])
def test_requests_whose_answers_nobody_reads_are_soon_not_read_either(tmp_path: Path, path: str) -> None:
    with idle_daemon(tmp_path) as daemon, connected(daemon.url) as channel:
        before = resident_mib(daemon)
        size = sent(channel, head(path) * 500, 200 * 2**20)
        assert size < 100 * 2**20
        assert daemon.get("/health").status_code == 200
        assert resident_mib(daemon) < before + 24


BEHIND = {
    "a 404": head("/none", "POST", Content_Length=2**40),
    "a 405": head("/api/v1/health", "POST", Content_Length=2**40),
    "a 403": head("/api/v1/queue/pause", "POST", Origin="http://evil.example", Content_Length=2**40),
    "a 413": head("/api/v1/generate", "POST", Content_Type="application/json", Content_Length=2**40),
    "a GET": head("/api/v1/health", Content_Length=2**40),
}


def test_a_body_behind_an_answer_is_not_read_for_ever(tmp_path: Path) -> None:
    def poured(request: bytes) -> int:
        with connected(daemon.url) as channel:
            channel.sendall(request)
            return sent(channel, b"x" * 2**16, 2**40, pause_s=0.002)

    with idle_daemon(tmp_path) as daemon, ThreadPoolExecutor() as pool:
        before = resident_mib(daemon)
        pouring = [pool.submit(poured, request) for request in BEHIND.values()]
        while not all(future.done() for future in pouring):
            assert daemon.get("/health").status_code == 200
            time.sleep(0.1)
        assert [future.result() for future in pouring if future.result() >= 2**40] == []
        assert resident_mib(daemon) < before + 24
