"""The hostile corpus against a real daemon: every request is refused with a sentence, and nothing is changed by it."""

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from tests import hostile
from tests.daemon import Daemon
from tests.hostile import Attack
from tests.idle import idle_daemon
from tests.processes import eventually
from tests.wire import Answer, answered, connected, exchange, head

MOST_TOLD = 2100  # characters of an error
# What the daemon may write at any time.
CHANGING = ("log", "journal.sqlite", "journal.sqlite-wal", "journal.sqlite-shm")


@pytest.fixture(scope="module")
def fort(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with things in its folder, around it and linked into it that are nobody's business."""
    outside = tmp_path_factory.mktemp("outside")
    folder = outside / "fort"
    with idle_daemon(folder, max_body_mb=4) as running:
        for place in (outside, folder):
            (place / hostile.VICTIM).write_text("secret")
        Image.new("RGB", (64, 64)).save(running.outputs / "there.png")
        (running.outputs / ".hidden.mp4").write_text("secret")
        (running.outputs / ".a.mp4.part").write_text("secret")
        (running.outputs / "folder.mp4").mkdir()
        (running.outputs / "link.mp4").symlink_to(folder / hostile.VICTIM)
        yield running


def everything(daemon: Daemon) -> dict[Path, tuple[int, int]]:
    """Size and time of each file and folder, up to the folder around the daemon's own."""
    found = [path for path in daemon.folder.parent.rglob("*") if path.name not in CHANGING]
    return {path: (path.lstat().st_size, path.lstat().st_mtime_ns) for path in found if path != daemon.state}


def fault(attack: Attack, answer: Answer | None) -> str:
    """What is wrong with the answer to an attack; empty if nothing is."""
    if answer is None:
        return f"{attack.label}: closed without an answer"
    told = f"{attack.label}: {answer.status} {answer.body[:300]!r}"
    if not 400 <= answer.status < 500:
        return told
    if attack.request.startswith(b"HEAD "):
        return told if answer.body else ""
    try:
        body = json.loads(answer.body)
    except ValueError:
        return told
    right = set(body) == {"detail"} and isinstance(body["detail"], str) and 0 < len(body["detail"]) < MOST_TOLD
    return "" if right and b"secret" not in answer.body.replace(hostile.VICTIM.encode(), b"") else told


@pytest.mark.parametrize("name", [name for name in hostile.CLASSES if name != "connections"])
def test_every_hostile_request_is_refused_with_a_sentence_and_changes_nothing(fort: Daemon, name: str) -> None:
    before = everything(fort)
    attacks = list(hostile.CLASSES[name]())
    faults = [fault(attack, exchange(fort.url, attack.request)) for attack in attacks]
    assert list(filter(None, faults)) == []
    assert everything(fort) == before
    assert fort.get("/queue").json()["data"]["total_tasks"] == 0


def test_what_is_no_http_is_refused_with_a_sentence_and_hung_up_on(fort: Daemon) -> None:
    before = everything(fort)
    faults = []
    for attack in hostile.connections():
        with connected(fort.url) as channel:
            with suppress(ConnectionError):  # it may have read enough already
                channel.sendall(attack.request)
            answer = answered(channel)
            faults.append(fault(attack, answer))
            assert answer is None or ends(channel), attack.label
    assert list(filter(None, faults)) == []
    assert everything(fort) == before


def test_what_is_no_http_and_has_an_end_is_refused_or_hung_up_on_and_changes_nothing(fort: Daemon) -> None:
    """A client that says that it sends no more may find the connection closed before it is answered."""
    before = everything(fort)
    for attack in hostile.connections():
        answer = ended(fort, attack)
        assert answer is None or not fault(attack, answer), fault(attack, answer)
    assert everything(fort) == before
    assert fort.get("/health").status_code == 200


VERSIONS = ["", " HTTP/0.9", " HTTP/2.0"]  # none is HTTP/0.9


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", ["/", "/api/v1/health", "/api/v1/queue/pause", "/api/docs/files/none", "/none"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_a_version_of_http_that_is_not_supported_is_400_and_ends_the_connection(
    fort: Daemon, method: str, path: str, version: str
) -> None:
    with connected(fort.url) as channel:
        channel.sendall(f"{method} {path}{version}\r\nHost: a\r\nConnection: keep-alive\r\n\r\n".encode())
        answer = answered(channel, method)
        assert answer is not None
        assert answer.status == 400
        said = f"{version.strip() or 'HTTP/0.9'} is not supported; send HTTP/1.1"
        assert method == "HEAD" or json.loads(answer.body) == {"detail": said}
        assert ends(channel)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_version_of_http_that_is_supported_is_answered(fort: Daemon, version: str) -> None:
    answer = exchange(fort.url, f"GET /api/v1/health HTTP/{version}\r\nHost: a\r\n\r\n".encode())
    assert answer is not None
    assert answer.status == 200


@pytest.mark.parametrize(
    ("method", "path", "content_type"),
    [
        ("POST", "/generate", "application/json"),
        ("POST", "/generate", "multipart/form-data; boundary=x"),
        ("PATCH", "/queue/1", "application/json"),
    ],
)
def test_who_hangs_up_within_a_body_is_no_fault_of_the_daemon(
    tmp_path: Path, method: str, path: str, content_type: str
) -> None:
    body = b'{"prompt": "half' if "json" in content_type else b"--x\r\nContent-Disp"
    with idle_daemon(tmp_path / "own", log_level="debug") as daemon:
        with connected(daemon.url) as channel:
            fields = {"Content_Type": content_type, "Content_Length": 5000}
            channel.sendall(head(f"/api/v1{path}", method, **fields) + body)
            assert daemon.get("/health").status_code == 200  # by now the head has been read
            channel.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
        assert eventually(lambda: f" {path} 400 " in daemon.log.read_text().replace("/api/v1", " "))
        assert "Traceback" not in daemon.log.read_text()


def ends(channel: socket.socket) -> bool:
    """True once the daemon has hung up; raises TimeoutError if it does not."""
    with suppress(ConnectionError):  # a reset, where more had been sent than it wanted to read
        return channel.recv(1) == b""
    return True


def ended(daemon: Daemon, attack: Attack) -> Answer | None:
    """The answer to what may be only the beginning of something: the client says that there is no more."""
    with connected(daemon.url) as channel:
        with suppress(OSError):  # it may have hung up already
            channel.sendall(attack.request)
            channel.shutdown(socket.SHUT_WR)
        return answered(channel)


def test_the_corpus_is_large_and_no_attack_is_in_it_twice() -> None:
    requests = [attack.request for attacks in hostile.CLASSES.values() for attack in attacks()]
    assert len(requests) == len(set(requests)) >= 200
    labels = [(name, attack.label) for name, attacks in hostile.CLASSES.items() for attack in attacks()]
    assert len(labels) == len(set(labels))


def test_the_corpus_is_the_same_at_every_call() -> None:
    corpus = [[list(attacks()) for attacks in hostile.CLASSES.values()] for _ in range(2)]
    assert corpus[0] == corpus[1]


drawn = settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
NO_FILE = st.binary(min_size=1, max_size=60).filter(lambda name: name not in (b"there.png",))


@seed(4)
@drawn
@given(name=NO_FILE)
def test_no_name_at_all_is_a_file(fort: Daemon, name: bytes) -> None:
    request = hostile.request(b"GET", b"/api/v1/download/" + b"".join(b"%%%02X" % byte for byte in name))
    assert fault(Attack(repr(name), request), exchange(fort.url, request)) == ""


NO_PROMPT = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text().filter(lambda key: key != "prompt"), inner),
    max_leaves=20,
)


@seed(4)
@drawn
@given(value=NO_PROMPT)
def test_no_json_without_a_prompt_is_a_request(fort: Daemon, value: object) -> None:
    request = hostile.posted(json.dumps(value).encode())
    assert fault(Attack(repr(value), request), exchange(fort.url, request)) == ""


@seed(4)
@drawn
@given(body=st.binary(max_size=200))
def test_no_bytes_are_a_request_by_chance(fort: Daemon, body: bytes) -> None:
    request = hostile.posted(body)
    assert fault(Attack(repr(body), request), exchange(fort.url, request)) == ""
