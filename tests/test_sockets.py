"""Where the daemon listens: several addresses, both families, Unix sockets, those of systemd, and what the log says."""

import asyncio
import errno
import json
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import requests

from engine.api.config import CantStart, split_hosts
from engine.api.listeners import Listeners, url_of
from tests.daemon import ROOT, START_S, Daemon
from tests.wire import PATIENCE_S, Answer, answered, connected, head

API = "/api/v1"


def has_ipv6() -> bool:
    """Whether this machine has the loopback address of IPv6."""
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="IPv6 is off on this machine")


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder with a short path: a Unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="wangpd") as folder:
        yield Path(folder)


def listening(daemon: Daemon, count: int = 1) -> list[str]:
    """Start the daemon and return the places that it logs, once there are `count`."""
    offset = daemon.launch()
    deadline = time.monotonic() + START_S
    while len(found := re.findall(rb"listens on (\S+)\n", daemon.log.read_bytes()[offset:])) < count:
        assert daemon.process.poll() is None and time.monotonic() < deadline, daemon.log.read_text()
        time.sleep(0.02)
    return [place.decode() for place in found]


def refused(daemon: Daemon) -> str:
    """What a daemon says that can't start: exit code 1, one sentence."""
    offset = daemon.launch()
    assert daemon.process.wait(START_S) == 1, daemon.log.read_text()
    said = daemon.log.read_bytes()[offset:].decode()
    assert said.count("\n") == 1
    return said


def over_unix(path: Path | str, target: str = f"{API}/health", **headers: Any) -> Answer:
    """The answer to a GET over a Unix socket."""
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(PATIENCE_S)
        channel.connect(str(path))
        channel.sendall(head(target, **headers))
        answer = answered(channel)
    assert answer is not None
    return answer


def opens(url: str) -> bool:
    """Whether the logged address answers."""
    return bool(requests.get(f"{url}health", timeout=PATIENCE_S).json()["status"] == "healthy")


# ---- addresses

SEVERAL = {
    "a list": ("127.0.0.1", "127.0.0.2"),
    "with brackets": ("[::1]", "127.0.0.1"),
    "twice": ("127.0.0.1", "127.0.0.1", "127.0.0.3"),
}


@needs_ipv6
@pytest.mark.parametrize("hosts", SEVERAL.values(), ids=SEVERAL)
def test_each_address_of_a_list_answers_on_the_same_port(hosts: Sequence[str], tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, host=list(hosts))
    try:
        urls = listening(daemon, len(dict.fromkeys(hosts)))
        assert all(map(opens, urls))
    finally:
        daemon.stop()
    ports = {int(url.split(":")[-1].split("/")[0]) for url in urls}
    assert len(ports) == 1
    assert urls == [f"http://{host}:{min(ports)}{API}/" for host in dict.fromkeys(hosts)]


@pytest.mark.parametrize("taken", [1, 5])
def test_a_free_port_that_another_address_lacks_is_given_up(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    tried: list[int] = []
    bind = Listeners._bind

    def bind_unless_taken(self: Listeners, family: int, address: Any, port: int, *, both: bool) -> int:
        if port:
            tried.append(port)
            if len(tried) <= taken:
                raise OSError(errno.EADDRINUSE, "taken")
        return bind(self, family, address, port, both=both)

    monkeypatch.setattr(Listeners, "_bind", bind_unless_taken)
    listeners = Listeners(asyncio.Protocol)
    listeners.take(["127.0.0.1", "127.0.0.2"], 0)
    assert len(tried) == taken + 1
    assert {channel.getsockname()[1] for channel in listeners.sockets} == {tried[-1]}
    listeners.close()


@pytest.mark.parametrize("flags", [["--host", "127.0.0.1", "--host", "127.0.0.2"], ["--host", "127.0.0.1,127.0.0.2"]])
def test_the_command_line_takes_several_addresses(flags: list[str], own_daemon: Daemon) -> None:
    own_daemon.program += flags
    assert [url.split(":")[1] for url in listening(own_daemon, 2)] == ["//127.0.0.1", "//127.0.0.2"]


@pytest.mark.parametrize(
    ("host", "hosts"),
    [
        ("127.0.0.1", ("127.0.0.1",)),
        ("[::1]", ("::1",)),
        (" ::1 , [::], localhost", ("::1", "::", "localhost")),
        (("a", "b,c", "a"), ("a", "b", "c", "a")),
        (("unix:/run/a.sock", "0.0.0.0"), ("unix:/run/a.sock", "0.0.0.0")),
    ],
)
def test_hosts_are_split_at_commas_and_lose_their_brackets(host: str | Sequence[str], hosts: tuple[str, ...]) -> None:
    assert split_hosts(host) == hosts


@needs_ipv6
def test_the_ipv6_wildcard_serves_both_families_and_knows_an_ipv4_client_by_its_address(tmp_path: Path) -> None:
    with Daemon(tmp_path, host="::", trusted_proxies=["127.0.0.1"], log_level="debug") as daemon:
        port = daemon.url.split(":")[-1]
        for host in ("127.0.0.1", "[::1]"):
            answer = requests.get(
                f"http://{host}:{port}{API}/queue", headers={"X-Forwarded-For": f"client-by-{host}"}, timeout=30
            )
            assert answer.status_code == 200
    log = daemon.log.read_text()  # now, for a line is written after its answer
    assert "client-by-127.0.0.1 GET /api/v1/queue" in log
    assert "::1 GET /api/v1/queue" in log  # which is no trusted proxy
    assert "client-by-[::1]" not in log


OVERLAPS = [
    *(["::", "0.0.0.0"], ["0.0.0.0", "::"], ["0.0.0.0", "127.0.0.1", "::1"], ["::1", "::", "127.0.0.1"]),
    *(["::", "127.0.0.1"], ["127.0.0.1", "::"], ["localhost", "127.0.0.1"]),
]


@needs_ipv6
@pytest.mark.parametrize("hosts", OVERLAPS, ids=",".join)
def test_an_address_that_another_one_covers_is_not_called_taken(hosts: list[str], tmp_path: Path) -> None:
    with Daemon(tmp_path, host=hosts) as daemon:
        port = daemon.url.split(":")[-1]
        assert opens(f"http://127.0.0.1:{port}{API}/")
        if any(":" in host for host in hosts):
            assert opens(f"http://[::1]:{port}{API}/")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost", *(["::", "::1", "[::1]"] if has_ipv6() else [])])
def test_the_logged_address_can_be_opened(host: str, tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, host=host)
    try:
        for url in listening(daemon):
            assert opens(url)
            assert "0.0.0.0" not in url
            assert "[::]" not in url
    finally:
        daemon.stop()


def test_a_link_local_address_is_logged_with_its_zone() -> None:
    class LinkLocal:
        family = socket.AF_INET6

        def getsockname(self) -> tuple[str, int, int, int]:
            return "fe80::1", 7860, 0, socket.if_nametoindex("lo")

    assert url_of(LinkLocal()) == "http://[fe80::1%25lo]:7860"  # type: ignore[arg-type]


@pytest.mark.parametrize("hosts", [["127.0.0.2", "127.0.0.1"], ["127.0.0.1"], ["0.0.0.0"]], ids=",".join)
def test_a_port_that_is_taken_on_one_address_is_one_sentence(
    hosts: list[str], own_daemon: Daemon, sockets: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        at = sockets / "a.sock"
        own_daemon.program += ["--port", str(port), "--host", ",".join([f"unix:{at}", *hosts])]
        assert refused(own_daemon).startswith(f"wangpd: port: {port} on {hosts[-1]} is taken; ")
    assert not at.exists()


def test_of_a_name_one_address_of_this_machine_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with localhost where IPv6 is off; 192.0.2.77 stands for the address that this machine does not have."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("192.0.2.77", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    listeners = Listeners(asyncio_protocol)
    listeners.take(["name"], 0)
    assert [channel.getsockname()[0] for channel in listeners.sockets] == ["127.0.0.1"]
    listeners.close()
    listeners = Listeners(asyncio_protocol)
    del found[1]
    with pytest.raises(CantStart, match="host: 'name' is no address of this machine"):
        listeners.take(["name"], 0)


def asyncio_protocol() -> Any:
    """No connection is made here."""
    raise AssertionError


def test_a_restart_finds_its_port_free_though_clients_have_just_been_served(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with Daemon(tmp_path, port=port) as daemon, connected(daemon.url) as channel:
        channel.sendall(head(f"{API}/health"))
        assert answered(channel)
        daemon.stop(signal.SIGKILL)  # which closes first, so that the kernel remembers the connection for a minute
        daemon.start()
        assert opens(f"{daemon.url}{API}/")


def test_connections_are_counted_over_all_addresses(tmp_path: Path, sockets: Path) -> None:
    at = sockets / "a.sock"
    hosts = ["127.0.0.1", "127.0.0.2", f"unix:{at}"]
    with Daemon(tmp_path, host=hosts, max_connections=2) as daemon, ExitStack() as stack:
        for host in hosts[:2]:
            channel = stack.enter_context(connected(daemon.url.replace("127.0.0.1", host)))
            channel.sendall(head(f"{API}/health"))
            answer = answered(channel)
            assert answer and answer.status == 200
        assert over_unix(at, f"{API}/queue").status == 503
        assert over_unix(at).status == 200  # /health, which has a reserve


# ---- Unix sockets


def test_a_unix_socket_serves_the_user_and_the_group_and_goes_with_the_daemon(tmp_path: Path, sockets: Path) -> None:
    at = sockets / "a.sock"
    daemon = Daemon(tmp_path, host=f"unix:{at}")
    try:
        assert listening(daemon) == [f"unix:{at}"]
        assert stat.S_IMODE(at.stat().st_mode) == 0o660
        assert over_unix(at).status == 200
        assert over_unix(at, f"{API}/outputs").status == 200
        assert daemon.stop() == 0
        assert not at.exists()
    finally:
        daemon.stop()


@pytest.mark.parametrize("others", [["127.0.0.1"], ["127.0.0.1", "unix:{folder}/b.sock"], ["unix:{folder}/c.sock"]])
def test_unix_sockets_and_addresses_may_be_mixed(others: list[str], tmp_path: Path, sockets: Path) -> None:
    hosts = [f"unix:{sockets}/a.sock", *(other.format(folder=sockets) for other in others)]
    daemon = Daemon(tmp_path, host=hosts)
    try:
        for place in listening(daemon, len(hosts)):
            path = place.removeprefix("unix:")
            assert opens(place) if path == place else over_unix(path).status == 200
    finally:
        daemon.stop()


def test_a_file_is_sent_over_a_unix_socket_too(tmp_path: Path, sockets: Path) -> None:
    content = bytes(range(256)) * 5000
    daemon = Daemon(tmp_path, host=f"unix:{sockets}/a.sock")
    try:
        listening(daemon)
        (daemon.outputs / "a.mp4").write_bytes(content)
        assert over_unix(sockets / "a.sock", f"{API}/download/a.mp4").body == content
        assert over_unix(sockets / "a.sock", f"{API}/download/a.mp4", Range="bytes=5-9").body == content[5:10]
    finally:
        daemon.stop()


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path, sockets: Path) -> None:
    daemon = Daemon(tmp_path, host=f"unix:{sockets}/a.sock")
    try:
        for _ in range(3):
            listening(daemon)
            assert over_unix(sockets / "a.sock").status == 200
            daemon.stop(signal.SIGKILL)
            assert (sockets / "a.sock").is_socket()
    finally:
        daemon.stop()


def test_a_socket_that_a_daemon_serves_is_in_use(tmp_path: Path, sockets: Path) -> None:
    at = sockets / "a.sock"
    first, second = (Daemon(tmp_path / name, host=f"unix:{at}") for name in ("first", "second"))
    try:
        listening(first)
        assert refused(second).startswith(f"wangpd: host: unix:{at} is in use; end the program that has it")
        assert over_unix(at).status == 200
    finally:
        first.stop()
        second.stop()


def test_what_is_no_socket_is_never_removed(tmp_path: Path, sockets: Path) -> None:
    (sockets / "file").write_text("a film")
    (sockets / "folder").mkdir()
    (sockets / "link").symlink_to(sockets / "file")
    for name in ("file", "folder", "link"):
        daemon = Daemon(tmp_path / name, host=f"unix:{sockets / name}")
        assert refused(daemon).startswith(f"wangpd: host: unix:{sockets / name} is there and is no socket; ")
        daemon.stop()
    assert sorted(path.name for path in sockets.iterdir()) == ["file", "folder", "link"]
    assert (sockets / "link").read_text() == "a film"


def test_another_daemons_socket_in_its_place_stays(tmp_path: Path, sockets: Path) -> None:
    at = sockets / "a.sock"
    first, second = (Daemon(tmp_path / name, host=f"unix:{at}") for name in ("first", "second"))
    try:
        listening(first)
        at.unlink()
        listening(second)
        assert first.stop() == 0
        assert over_unix(at).status == 200
    finally:
        first.stop()
        second.stop()


@pytest.mark.parametrize(
    ("path", "reason"),
    [("{folder}/none/a.sock", "No such file or directory"), (f"{{folder}}/{'x' * 200}", "AF_UNIX path too long"),
     ("{folder}/file/a.sock", "Not a directory")],
    ids=["no folder", "too long", "a file above"],
)  # fmt: skip
def test_a_unix_socket_that_cant_be_made_is_one_sentence(path: str, reason: str, tmp_path: Path, sockets: Path) -> None:
    (sockets / "file").touch()
    at = path.format(folder=sockets)
    daemon = Daemon(tmp_path, host=["127.0.0.1", f"unix:{at}"])
    assert refused(daemon).startswith(f"wangpd: host: unix:{at} can't be made: {reason}; ")
    daemon.stop()


@pytest.mark.parametrize(("trusted", "status"), [(["unix"], 403), (["127.0.0.1", ""], 200), ([], 200)])
def test_the_proxy_at_a_unix_socket_is_trusted_by_its_name(
    trusted: list[str], status: int, tmp_path: Path, sockets: Path
) -> None:
    at = sockets / "a.sock"
    daemon = Daemon(
        tmp_path, host=f"unix:{at}", trusted_proxies=trusted, allowed_hosts=["a.example"], log_level="debug"
    )
    try:
        listening(daemon)
        said = {"X_Forwarded_Host": "evil", "X_Forwarded_For": "10.1.2.3"}  # the name is checked if it is believed
        assert over_unix(at, f"{API}/queue", Host="a.example", **said).status == status
        assert over_unix(at, f"{API}/queue", Host="a.example").status == 200
    finally:
        daemon.stop()
    log = daemon.log.read_text()
    assert "unix GET /api/v1/queue 200" in log
    assert ("10.1.2.3 GET" in log) == (trusted == ["unix"])


def test_a_client_cant_call_itself_a_trusted_proxy(tmp_path: Path, sockets: Path) -> None:
    """A client of a Unix socket chooses its own name, which is a path, also a relative one."""
    at = sockets / "a.sock"
    daemon = Daemon(tmp_path, host=f"unix:{at}", trusted_proxies=["10.0.0.1"], allowed_hosts=["a.example"])
    code = (
        "import socket, sys; channel = socket.socket(socket.AF_UNIX); channel.bind('10.0.0.1')\n"
        "channel.connect(sys.argv[1]); channel.sendall(sys.argv[2].encode()); print(channel.recv(100).decode())"
    )
    try:
        listening(daemon)
        request = head(f"{API}/queue", Host="a.example", X_Forwarded_Host="evil").decode()
        command = [sys.executable, "-c", code, str(at), request]
        said = subprocess.run(command, cwd=sockets, capture_output=True, text=True, timeout=60, check=True).stdout
    finally:
        daemon.stop()
    assert said.startswith("HTTP/1.1 200 ")  # 403 if it were believed


# ---- sockets that systemd passes


@contextmanager
def activated(folder: Path, *places: str, **config: Any) -> Iterator[Daemon]:
    """A daemon, not started, that gets listening sockets at these places."""
    daemon = Daemon(folder, **config)
    daemon.program = [str(ROOT / "tests" / "activated.py"), *daemon.program]
    daemon.environment["LISTEN_PLACES"] = json.dumps(places)
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.mark.parametrize("places", [["127.0.0.1:0"], ["127.0.0.1:0", "127.0.0.2:0", "unix:{folder}/a.sock"]])
def test_sockets_of_systemd_are_served_instead_of_host_and_port(
    places: list[str], tmp_path: Path, sockets: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = [place.format(folder=sockets) for place in places]
        with activated(tmp_path, *wanted, port=port) as daemon:
            for place in listening(daemon, len(wanted)):
                path = place.removeprefix("unix:")
                assert opens(place) if path == place else over_unix(path).status == 200
            assert daemon.stop() == 0
    assert len(wanted) == 1 or (sockets / "a.sock").is_socket()  # systemd's: it listens on, and starts the next daemon


def test_no_worker_inherits_a_socket_of_systemd(tmp_path: Path, sockets: Path) -> None:
    with activated(tmp_path, "127.0.0.1:0", f"unix:{sockets}/a.sock") as daemon:
        daemon.start()
        assert daemon.run(video_length=5, num_inference_steps=1)["status"] == "completed"
        pid = daemon.process.pid
        (worker,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1:]
        theirs = {str(path.readlink()) for path in Path(f"/proc/{worker}/fd").iterdir()}
        passed = {str(Path(f"/proc/{pid}/fd/{number}").readlink()) for number in (3, 4)}
        assert all(name.startswith("socket:") for name in passed)
        assert not passed & theirs
        assert b"LISTEN_" not in Path(f"/proc/{worker}/environ").read_bytes()


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
@pytest.mark.parametrize("value", ["1", "", "none", "-1"])
def test_sockets_for_another_process_are_not_taken(name: str, value: str, own_daemon: Daemon) -> None:
    own_daemon.environment |= {"LISTEN_PID": "1", "LISTEN_FDS": "1", name: value}
    own_daemon.start()
    assert opens(f"{own_daemon.url}{API}/")


@pytest.mark.parametrize("places", [["udp"], ["file"], ["127.0.0.1:0", "udp"]], ids=",".join)
def test_what_is_no_listening_socket_is_one_sentence(places: list[str], tmp_path: Path) -> None:
    with activated(tmp_path, *places) as daemon:
        number = 3 + len(places) - 1
        assert refused(daemon).startswith(f"wangpd: systemd: file descriptor {number} is no listening stream socket; ")


# ---- the front door

FRONT = ["/", "/api", "/api/"]
BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon(tmp_path_factory.mktemp("plain")) as daemon:
        yield daemon


@pytest.mark.parametrize("path", FRONT)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_browser_is_sent_to_the_documentation(plain: Daemon, path: str, method: str) -> None:
    answer = requests.request(method, plain.url + path, headers={"Accept": BROWSER}, timeout=30)
    assert [step.status_code for step in answer.history] == [302]
    assert (answer.status_code, answer.url) == (200, f"{plain.url}/api/docs")
    assert method == "HEAD" or "<title>wangpd API</title>" in answer.text


@pytest.mark.parametrize("path", FRONT)
@pytest.mark.parametrize("accept", ["*/*", "application/json", None])
def test_a_program_is_told_where_the_api_is(plain: Daemon, path: str, accept: str | None) -> None:
    answer = requests.get(plain.url + path, headers={"Accept": accept}, timeout=30)  # type: ignore[dict-item]
    assert (answer.status_code, answer.history) == (200, [])
    places = answer.json()["data"]
    assert {requests.get(plain.url + place, timeout=30).status_code for place in places.values()} == {200}
    head_answer = requests.head(plain.url + path, headers={"Accept": accept}, timeout=30)  # type: ignore[dict-item]
    assert (head_answer.status_code, head_answer.content) == (200, b"")


def test_behind_a_proxy_the_way_to_the_documentation_is_the_proxys(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with Daemon(tmp_path, base_path="/video", token_file="token") as daemon:
        answer = requests.get(f"{daemon.url}/", headers={"Accept": BROWSER}, allow_redirects=False, timeout=30)
        assert (answer.status_code, answer.headers["Location"]) == (302, "/video/api/docs")
        assert requests.get(f"{daemon.url}/", timeout=30).json()["data"]["api"] == "/video/api/v1/"


def test_an_icon_that_a_browser_looks_for_is_an_ordinary_404(plain: Daemon) -> None:
    answer = requests.get(f"{plain.url}/favicon.ico", timeout=30)
    assert (answer.status_code, set(answer.json())) == (404, {"detail"})
