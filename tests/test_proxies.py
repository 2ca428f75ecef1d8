"""Behind a proxy: the files of deploy/ as they are published, but for addresses, certificates and users."""

import asyncio
import json
import os
import re
import select
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pytest
import requests
from PIL import Image

from engine.job import OutputFile
from engine.queue.journal import Journal
from engine.queue.tasks import Status, Task
from tests.daemon import ROOT, Daemon
from tests.idle import idle_daemon
from tests.processes import children, eventually
from tests.stand_ins import job
from tests.wire import PATIENCE_S, Answer, answered, head

MIB = 2**20
NAME = "wangpd.example.lan"
EVIL = "http://evil.example"
USER, PASSWORD = "alice", "correct-horse"
LOGIN = "Basic YWxpY2U6Y29ycmVjdC1ob3JzZQ=="
MADE = OutputFile("made.png", "image", 10, 8, 8, 1, 1, 1)
# Around the file, as Debian's nginx.conf includes it; the rest keeps nginx inside the test's folder.
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/spool; proxy_temp_path {folder}/spool; fastcgi_temp_path {folder}/spool;
  uwsgi_temp_path {folder}/spool; scgi_temp_path {folder}/spool;
  include {folder}/published.conf;
}}
"""


@dataclass(frozen=True)
class Proxied:
    """A daemon behind a proxy: its address below the proxy's, and the proxy's process."""

    daemon: Daemon
    origin: str
    path: str
    trusted: Path | None  # the certificate
    pid: int

    def request(self, method: str, path: str, **options: Any) -> requests.Response:
        """One request of a user that has logged in."""
        options = {"timeout": 60, "auth": (USER, PASSWORD), "verify": str(self.trusted)} | options
        return requests.request(method, f"{self.origin}{self.path}{path}", **options)

    def get(self, path: str, **options: Any) -> requests.Response:
        return self.request("GET", path, **options)

    def connected(self, source: str = "127.0.0.1") -> socket.socket:
        address = urlsplit(self.origin)
        channel = socket.create_connection((address.hostname, address.port), PATIENCE_S, (source, 0))
        if self.trusted is None:
            return channel
        context = ssl.create_default_context(cafile=str(self.trusted))
        return context.wrap_socket(channel, server_hostname=address.hostname)

    def asked(self, method: str, path: str, source: str = "127.0.0.1", **headers: Any) -> Answer | None:
        """What comes back over a bare connection."""
        with self.connected(source) as channel:
            channel.sendall(head(self.path + path, method, Authorization=LOGIN, **headers))
            return answered(channel, method)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def with_an_ended_task(state: Path) -> int:
    """Write a journal in which one task has made a file; returns its id."""
    journal = Journal(state / "journal.sqlite")
    await journal.open()
    task = Task(0, job())
    await journal.add(task, None, "", {})
    task.status, task.files = Status.COMPLETED, (MADE,)
    await journal.save(task)
    await journal.close()
    return task.id


def program(name: str, package: str) -> str:
    """The program; skips the test on a machine that has none, which a build machine must."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None and "CI" not in os.environ:
        pytest.skip(f"{name} is not installed: sudo apt-get install {package}")
    assert found
    return found


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The published file for this test; what is changed must be in it once."""
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@contextmanager
def behind(folder: Path, start: Callable[[Daemon, int], list[str]], path: str = "", **config: Any) -> Iterator[Any]:
    """A daemon, and the process of a proxy on a free port that `start` names the command of."""
    port = free_port()
    with ExitStack() as stack:
        daemon = stack.enter_context(
            idle_daemon(folder, base_path=path, trusted_proxies=["127.0.0.1"], log_level="debug", **config)
        )
        Image.new("RGB", (8, 8)).save(daemon.outputs / MADE.filename)
        with (daemon.outputs / "large.mp4").open("wb") as file:
            file.truncate(200 * MIB)
        command = start(daemon, port)
        server = subprocess.Popen(command, env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)})
        stack.callback(server.wait)
        stack.callback(server.terminate)
        assert eventually(lambda: listens(port) or server.poll() is not None)
        assert server.poll() is None
        yield daemon, port, server.pid


@contextmanager
def nginx(folder: Path, path: str = "") -> Iterator[Proxied]:
    """The published nginx.conf, below a path if there is one, as its comment says."""
    found, openssl = program("nginx", "nginx-light"), program("openssl", "openssl")
    folder.mkdir(exist_ok=True)
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subject = ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=IP:127.0.0.1,DNS:{NAME}"]
    request = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*request, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    (folder / "users").write_text(f"{USER}:{{PLAIN}}{PASSWORD}\n")

    def start(daemon: Daemon, port: int) -> list[str]:
        published = (ROOT / "deploy" / "nginx.conf").read_text()
        below = [("location / {", f"location {path}/ {{")] if path else []
        text = changed(
            published,
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("/etc/ssl/certs/wangpd.pem", str(certificate)),
            ("/etc/ssl/private/wangpd.key", str(key)),
            ("/etc/nginx/wangpd.users;    #", f"{folder}/users; #"),
            ("proxy_pass           http://127.0.0.1:7860", f"proxy_pass {daemon.url}{'/' if path else ''}"),
            *below,
        )
        (folder / "published.conf").write_text(text)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder))
        return [found, "-c", str(folder / "nginx.conf"), "-e", "stderr"]

    with behind(folder, start, path, allowed_hosts=[NAME]) as (daemon, port, pid):
        yield Proxied(daemon, f"https://127.0.0.1:{port}", path, certificate, pid)


@contextmanager
def caddy(folder: Path) -> Iterator[Proxied]:
    """The published Caddyfile, without TLS, which is Caddy's own affair."""
    found = program("caddy", "caddy")
    secret = [found, "hash-password", "--plaintext", PASSWORD]
    hashed = subprocess.run(secret, check=True, capture_output=True, text=True).stdout.strip()
    folder.mkdir(exist_ok=True)

    def start(daemon: Daemon, port: int) -> list[str]:
        text = changed(
            (ROOT / "deploy" / "Caddyfile").read_text(),
            (
                "\nwangpd.example.com {",
                f"\nhttp://127.0.0.1:{port}, http://{NAME}:{port}, http://evil.example:{port} {{",
            ),
            ("$2a$14$REPLACE_WITH_THE_HASH", hashed),
            ("127.0.0.1:7860", daemon.url.removeprefix("http://")),
            ("\tservers {", "\tadmin off\n\tservers {"),
        )
        (folder / "Caddyfile").write_text(text)
        return [found, "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]

    with behind(folder, start, allowed_hosts=[NAME]) as (daemon, port, pid):
        yield Proxied(daemon, f"http://127.0.0.1:{port}", "", None, pid)


@pytest.fixture(scope="module")
def below(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Proxied, int]]:
    """A daemon that nginx shows under /video, and the id of a task that has ended."""
    folder = tmp_path_factory.mktemp("proxied")
    task_id = asyncio.run(with_an_ended_task(folder / "state"))
    with nginx(folder, "/video") as proxied:
        yield proxied, task_id


@pytest.fixture(scope="module", params=[nginx, caddy])
def proxied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    """A daemon behind each of the published files."""
    with request.param(tmp_path_factory.mktemp("proxied")) as running:
        yield running


# ---- below a path


def test_every_link_leads_through_the_proxy(below: tuple[Proxied, int]) -> None:
    proxied, task_id = below
    queued = proxied.request("POST", "/api/v1/generate", json={"prompt": "a"}).json()["data"]
    (file,) = proxied.get(f"/api/v1/status/{task_id}").json()["data"]["files"]
    for link in (queued["status_url"], file["url"], file["preview_url"]):
        assert link.startswith("/video/api/v1/")
        assert proxied.get(link.removeprefix("/video")).status_code == 200


@pytest.mark.parametrize("name", ["docs", "redoc"])
def test_the_documents_work_behind_the_proxy(below: tuple[Proxied, int], name: str) -> None:
    proxied, _ = below
    page_url = f"/video/api/{name}"
    page = proxied.get(f"/api/{name}").text
    loaded = [part.split('"')[0] for part in page.replace('href="', 'src="').split('src="')[1:]]
    links = [urljoin(page_url, link) for link in loaded if not link.startswith("data:")]
    assert len(links) == 3
    assert {proxied.get(link.removeprefix("/video")).status_code for link in links} == {200}
    document_url = urljoin(page_url, "openapi.json").removeprefix("/video")
    (server,) = proxied.get(document_url).json()["servers"]
    health = urljoin(f"/video{document_url}", server["url"]) + "api/v1/health"
    assert proxied.get(health.removeprefix("/video")).status_code == 200


# ---- who may ask


def test_nobody_asks_without_the_login(proxied: Proxied) -> None:
    for path in ("/api/v1/queue", "/api/docs", "/api/v1/health"):
        assert proxied.get(path, auth=None).status_code == 401
        assert proxied.get(path, auth=(USER, "wrong")).status_code == 401
    assert proxied.get("/api/v1/queue").status_code == 200


def test_the_daemon_does_not_see_the_password(proxied: Proxied) -> None:
    proxied.get("/api/v1/queue?seen=1")
    assert proxied.get("/api/v1/queue").headers["Server"].partition("/")[2] == ""  # no version
    assert PASSWORD not in proxied.daemon.log.read_text()


def test_a_page_behind_the_proxy_is_the_daemons_own(proxied: Proxied) -> None:
    host = proxied.origin.partition("://")[2]
    for origin, said, status in (
        (proxied.origin, host, 200),
        (f"https://{NAME}", NAME, 200),
        (EVIL, host, 403),
        (EVIL, NAME, 403),
    ):
        answer = proxied.request("POST", "/api/v1/queue/pause", headers={"Origin": origin, "Host": said})
        assert answer.status_code == status


@pytest.mark.parametrize(
    "said",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example", "X-Forwarded-Host": NAME},
        {"Host": "evil.example", "X-Forwarded-Host": "127.0.0.1", "Forwarded": f"host={NAME}"},
        {"Host": "evil.example", "Origin": EVIL, "Sec-Fetch-Site": "same-origin"},
        {"Host": "evil.example", "User-Agent": "Mozilla/5.0"},
    ],
    ids=str,
)
def test_a_name_that_is_rebound_to_the_proxy_is_refused(proxied: Proxied, said: dict[str, str]) -> None:
    for path in ("/api/v1/queue", f"/api/v1/download/{MADE.filename}", "/api/docs"):
        answer = proxied.get(path, headers=said)
        assert answer.status_code == 403
        assert answer.json()["detail"].startswith("Host: 'evil.example' is no name of this daemon; ")


def test_a_client_that_names_another_host_as_forwarded_changes_nothing(proxied: Proxied) -> None:
    for said in ({"X-Forwarded-Host": "evil.example"}, {"X-Forwarded-Host": f"{NAME}, evil.example"}):
        assert proxied.get("/api/v1/queue", headers={"Host": NAME, **said}).status_code == 200


@pytest.mark.parametrize("claim", ["203.0.113.9", "203.0.113.9, 127.0.0.1", "unix", ""])
def test_a_client_that_names_another_address_is_not_believed(proxied: Proxied, claim: str) -> None:
    path = f"/api/v1/queue/claim{abs(hash(claim))}"
    answer = proxied.asked("GET", path, "127.0.0.5", Host=NAME, X_Forwarded_For=claim)
    assert answer
    assert eventually(lambda: path in proxied.daemon.log.read_text())
    (line,) = [line for line in proxied.daemon.log.read_text().splitlines() if path in line]
    assert line.startswith("wangpd.access: 127.0.0.5 GET ")


# ---- bodies and answers


def spooled(proxied: Proxied) -> list[str]:
    """The files that the proxy has open below the test's folder, but for its log."""
    found = []
    for pid in (proxied.pid, *children(proxied.pid)):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.append(str(handle.readlink()))
    return [path for path in found if path.startswith(f"{proxied.daemon.folder}/") and not path.endswith(".log")]


def poured(proxied: Proxied, announced: int, size: int) -> Answer | None:
    """The answer to a submission of so many bytes; what the proxy then has open on its disk is nothing."""
    fields = {"Content_Type": "application/json", "Content_Length": announced, "Authorization": LOGIN, "Host": NAME}
    with proxied.connected() as channel:
        channel.sendall(head(f"{proxied.path}/api/v1/generate", "POST", **fields))
        with suppress(OSError):  # it may be refused before all is sent
            for _ in range(size // MIB):
                if answers(channel):
                    break
                channel.sendall(b" " * MIB)
        assert spooled(proxied) == []
        return answered(channel, "POST") if answers(channel, PATIENCE_S if size == announced else 0.5) else None


def answers(channel: socket.socket, within_s: float = 0.05) -> bool:
    """True once an answer has begun to come."""
    return bool(select.select([channel], [], [], within_s)[0])


def test_a_body_that_is_too_large_is_413(proxied: Proxied) -> None:
    answer = poured(proxied, 65 * MIB, 65 * MIB)
    assert answer
    assert answer.status == 413


@pytest.mark.parametrize("size", [8 * MIB, 64 * MIB])
def test_a_body_reaches_the_daemon_and_no_disk_of_the_proxy(proxied: Proxied, size: int) -> None:
    half = poured(proxied, size, size // 2)
    assert half is None or half.status in (400, 413)  # the daemon may refuse what it has seen
    whole = poured(proxied, size, size)
    assert whole
    assert whole.status in (400, 413)
    assert "detail" in json.loads(whole.body)


def test_a_download_that_is_not_read_is_on_no_disk_of_the_proxy(proxied: Proxied) -> None:
    with proxied.connected() as channel:
        channel.sendall(head(f"{proxied.path}/api/v1/download/large.mp4", Authorization=LOGIN, Host=NAME))
        assert channel.recv(12) == b"HTTP/1.1 200"
        assert spooled(proxied) == []
        sizes = [path.stat().st_size for path in proxied.daemon.folder.rglob("spool/**/*") if path.is_file()]
        assert sizes == []


def test_a_wait_longer_than_a_minute_is_possible(proxied: Proxied) -> None:
    published = (ROOT / "deploy" / "nginx.conf").read_text()
    (timeout_s,) = re.findall(r"proxy_read_timeout +(\d+)s;", published)
    assert int(timeout_s) > 60
    task_id = proxied.request("POST", "/api/v1/generate", json={"prompt": "a"}).json()["data"]["task_id"]
    assert proxied.get(f"/api/v1/status/{task_id}?wait=1").json()["data"]["status"] == "queued"


def test_nginx_limits_each_client_for_itself(tmp_path: Path) -> None:
    with nginx(tmp_path) as proxied, ExitStack() as stack:
        statuses = []
        for _ in range(70):
            channel = stack.enter_context(proxied.connected("127.0.0.7"))
            channel.sendall(head("/api/v1/download/large.mp4", Authorization=LOGIN, Host=NAME))
            statuses.append(channel.recv(12)[-3:])
        assert set(statuses) == {b"200", b"429"}
        for _ in range(10):
            answer = proxied.asked("GET", "/api/v1/queue", "127.0.0.8", Host=NAME)
            assert answer
            assert answer.status == 200


def test_the_published_limit_of_a_body_is_the_daemons() -> None:
    from engine.api.config import Config

    nginx_mb = re.findall(r"client_max_body_size (\d+)m;", (ROOT / "deploy" / "nginx.conf").read_text())
    caddy_mb = re.findall(r"max_size (\d+)MiB", (ROOT / "deploy" / "Caddyfile").read_text())
    assert nginx_mb == caddy_mb == [str(Config.max_body_mb)]
