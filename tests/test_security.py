"""Security: who may ask, what is told to whom, and which code a checkpoint can bring to run: none."""

import json
import os
import pickle
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from PIL import Image

from engine.catalog.models import Catalog
from engine.catalog.weights import Weights
from tests import tiny
from tests.daemon import Daemon
from tests.idle import idle_daemon
from tests.processes import eventually
from tests.wire import Answer, exchange, head

API = "/api/v1"
PAGE = "https://app.example.org"  # a page that may use the API of `guarded`
EVIL = "http://evil.example"
PROXY = "127.0.0.2"  # the address of the proxy that `guarded` trusts; all of 127/8 is this machine
SECRET = "correct-horse-battery-staple"
CLIENTS = "203.0.113.9"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon as it comes: any name, no token, no page of another site."""
    with idle_daemon(tmp_path_factory.mktemp("plain"), log_level="debug") as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with names of its own, one page that may use it, and a proxy that it trusts."""
    config = {
        "allowed_hosts": ["video.example.org", "127.0.0.1", "::1"],
        "cors_origins": [PAGE],
        "trusted_proxies": [PROXY],
        "log_level": "debug",
    }
    with idle_daemon(tmp_path_factory.mktemp("guarded"), **config) as running:
        Image.new("RGB", (8, 8)).save(running.outputs / "there.png")
        yield running


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a token, whose file ends with a line feed as files do."""
    daemon = Daemon(tmp_path_factory.mktemp("locked"), token_file="token", log_level="debug")
    (daemon.folder / "token").write_text(SECRET + "\n")
    with daemon:
        yield daemon


def asked(daemon: Daemon, method: str, path: str, source: str = "127.0.0.1", **headers: str) -> Answer:
    answer = exchange(daemon.url, head(path, method, **headers), source)
    assert answer is not None
    return answer


def detail(answer: Answer) -> str:
    return str(json.loads(answer.body)["detail"])


# ------------------------------------------------------------------------------------------------- pages of other sites

CHANGES = [  # a request that changes something → what it is answered when it comes from nowhere special
    ("POST", f"{API}/generate", 400),
    ("POST", f"{API}/queue/pause", 200),
    ("POST", f"{API}/unload", 200),
    ("POST", f"{API}/queue/99/retry", 404),
    ("PATCH", f"{API}/queue/99", 400),
    ("DELETE", f"{API}/queue", 200),
    ("DELETE", f"{API}/queue/99", 404),
]
ELSEWHERE = [  # what a browser says for a page of another site
    {"Origin": EVIL},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://127.0.0.1.evil.example"},
    {"Origin": "http://["},
    {"Origin": EVIL, "Sec_Fetch_Site": "same-origin"},
    {"Sec_Fetch_Site": "cross-site"},
]
change = pytest.mark.parametrize(("method", "path", "otherwise"), CHANGES, ids=str)


@pytest.mark.parametrize("said", ELSEWHERE, ids=str)
@change
def test_a_page_of_another_site_changes_nothing(
    plain: Daemon, method: str, path: str, otherwise: int, said: dict[str, str]
) -> None:
    answer = asked(plain, method, path, **said)
    assert (answer.status, otherwise != 403) == (403, True)
    assert detail(answer) == "Origin: a web page of another site asked; cors_origins names those that may"


@pytest.mark.parametrize("scheme", ["http", "https"])  # https: a proxy in front took the TLS off
@change
def test_a_page_of_the_daemon_itself_may_ask(
    plain: Daemon, method: str, path: str, otherwise: int, scheme: str
) -> None:
    host = plain.url.removeprefix("http://")
    answer = asked(plain, method, path, Host=host, Origin=f"{scheme}://{host}", Sec_Fetch_Site="same-origin")
    assert answer.status == otherwise


@pytest.mark.parametrize("said", [{}, {"Sec_Fetch_Site": "none"}, {"Sec_Fetch_Site": "same-origin"}], ids=str)
@change
def test_what_is_no_page_of_another_site_may_ask(
    plain: Daemon, method: str, path: str, otherwise: int, said: dict[str, str]
) -> None:
    assert asked(plain, method, path, **said).status == otherwise


FORMS = ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"]


@pytest.mark.parametrize("content_type", FORMS)
def test_a_form_that_a_page_of_another_site_sends_queues_nothing(plain: Daemon, content_type: str) -> None:
    before = plain.get("/queue").json()["data"]["total_tasks"]
    body = b'{"prompt": "a cat", "x": "="}'
    for headers in ({"Origin": EVIL}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        answer = plain.request("POST", "/generate", data=body, headers={"Content-Type": content_type, **headers})
        assert answer.status_code == 403
    assert plain.get("/queue").json()["data"]["total_tasks"] == before


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", ""])
def test_what_a_form_can_send_is_no_request_from_anywhere(plain: Daemon, content_type: str) -> None:
    answer = plain.request("POST", "/generate", data=b'{"prompt": "a cat"}', headers={"Content-Type": content_type})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("Content-Type: ")


# ----------------------------------------------------------------------------------------------------------------- CORS

SHARED = {"allow-origin", "allow-methods", "allow-headers", "expose-headers", "max-age"}


def shared(answer: Answer) -> set[str]:
    """The CORS headers of an answer, less their common beginning."""
    names = [name.lower() for name in answer.headers]
    return {name.removeprefix("access-control-") for name in names if name.startswith("access-control-")}


@pytest.mark.parametrize("origin", [PAGE, EVIL, "null"])
@pytest.mark.parametrize("method", ["GET", "OPTIONS"])
def test_no_page_of_another_site_may_read_by_default(plain: Daemon, method: str, origin: str) -> None:
    answer = asked(plain, method, f"{API}/queue", Origin=origin, Access_Control_Request_Method="POST")
    assert answer.status == {"GET": 200, "OPTIONS": 405}[method]
    assert (shared(answer), answer.headers["Vary"]) == (set(), None)


@pytest.mark.parametrize("path", ["/generate", "/queue/5", "/download/there.png"])
def test_a_page_that_may_is_told_so_before_its_request(guarded: Daemon, path: str) -> None:
    answer = asked(guarded, "OPTIONS", API + path, Origin=PAGE, Access_Control_Request_Method="DELETE")
    assert (answer.status, answer.body, shared(answer)) == (204, b"", SHARED)
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE
    assert {"POST", "PATCH", "DELETE"} <= set(answer.headers["Access-Control-Allow-Methods"].split(", "))
    asked_for = {"Authorization", "Content-Type", "Idempotency-Key", "Range"}
    assert asked_for <= set(answer.headers["Access-Control-Allow-Headers"].split(", "))


@pytest.mark.parametrize("path", ["/health", "/queue", "/download/there.png", "/preview/there.png", "/download/no.mp4"])
def test_a_page_that_may_reads_every_answer(guarded: Daemon, path: str) -> None:
    answer = asked(guarded, "GET", API + path, Origin=PAGE)
    assert (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]) == (PAGE, "Origin")
    told = {"Content-Range", "ETag", "Idempotency-Replayed", "Retry-After", "X-Request-ID"}
    assert told <= set(answer.headers["Access-Control-Expose-Headers"].split(", "))
    assert "Access-Control-Allow-Credentials" not in answer.headers


def test_a_page_that_may_queues_a_task(guarded: Daemon) -> None:
    answer = guarded.post("/generate", {"prompt": "a cat"}, headers={"Origin": PAGE, "Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200
    assert answer.headers["Access-Control-Allow-Origin"] == PAGE


@pytest.mark.parametrize("origin", [EVIL, "null", f"{PAGE}.evil.example", PAGE.replace("https", "http"), f"{PAGE}:444"])
def test_any_other_page_is_refused_and_told_nothing(guarded: Daemon, origin: str) -> None:
    preflight = asked(guarded, "OPTIONS", f"{API}/generate", Origin=origin, Access_Control_Request_Method="POST")
    read = asked(guarded, "GET", f"{API}/queue", Origin=origin)
    write = asked(guarded, "POST", f"{API}/queue/pause", Origin=origin)
    assert [preflight.status, read.status, write.status] == [405, 200, 403]
    assert [shared(answer) for answer in (preflight, read, write)] == [set()] * 3
    assert read.headers["Vary"] == "Origin"  # a cache in between must not give this answer to the page that may


def test_a_star_lets_every_page_ask(tmp_path: Path) -> None:
    with Daemon(tmp_path, cors_origins=["*"]) as daemon:
        answer = asked(daemon, "POST", f"{API}/queue/pause", Origin=EVIL)
    assert (answer.status, answer.headers["Access-Control-Allow-Origin"]) == (200, EVIL)


# ------------------------------------------------------------------------------------------- names, and DNS rebinding

OWN_NAMES = [
    *("video.example.org", "video.example.org:7860", "VIDEO.Example.ORG", "video.example.org."),
    *("127.0.0.1", "127.0.0.1:7860", "[::1]", "[::1]:7860"),
    *("[0:0:0:0:0:0:0:1]:7860", "[::0001]", "[::1%25lo]:7860", "[::1%lo]", "::1"),
    *("127.0.0.2", "192.0.2.7:80", "[2001:db8::1]:7860", "[::2]", "[::ffff:127.0.0.1]", "0:0:0:0:0:0:0:2", "[::2%lo]"),
    *("localhost", "LOCALHOST:7860", "localhost.", "video.localhost", "a.b.localhost:1"),
    *(socket.gethostname(), f"{socket.gethostname().upper()}:7860", f"{socket.gethostname().partition('.')[0]}.local"),
]
OTHER_NAMES = [
    *("evil.example", "evil.example:7860", "video.example.org.evil.example", "evil-video.example.org", "example.org"),
    *("video.example.org@evil.example", "evil.example#video.example.org", "127.0.0.1:80:80", ""),
    *(
        "[",
        "]",
        ":",
        ":7860",
        "video.example.org:evil",
        "video.example.org%lo",
        "127.0.0.1%lo",
        "127.0.0.1.evil.example",
    ),
    *("localhost.evil.example", "evillocalhost", "evil.local", f"{socket.gethostname()}.evil.example", "127.0.0.256"),
]


# What only a browser says; a page can leave out the Referer, and over plain HTTP there is no Sec-Fetch-Site.
BROWSERS = [
    {"Origin": "http://HOST", "Sec_Fetch_Site": "same-origin"},
    {"Origin": "null"},
    {"Referer": "http://HOST/page"},
    {"Sec_Fetch_Site": "none"},
    {"sec_fetch_mode": "navigate"},
    {"User_Agent": "Mozilla/5.0 (X11; Linux x86_64; rv:150.0) Gecko/20100101 Firefox/150.0"},
]
PROGRAMS = [
    {},
    {"User_Agent": "curl/8.5.0"},
    {"User_Agent": "python-requests/2.32 (Mozilla/5.0)"},
    {"Accept": "text/html"},
]


def of(said: dict[str, str], host: str) -> dict[str, str]:
    return {name: value.replace("HOST", host) for name, value in said.items()}


@pytest.mark.parametrize("said", [*BROWSERS, *PROGRAMS], ids=str)
@pytest.mark.parametrize("host", OWN_NAMES)
def test_the_daemon_answers_to_its_names(guarded: Daemon, host: str, said: dict[str, str]) -> None:
    assert asked(guarded, "GET", f"{API}/health", Host=host, **of(said, host)).status == 200


def refusal(host: str, name: str) -> str:
    return f"Host: '{host}' is no name of this daemon; if it is one, add '{name}' to allowed_hosts"


@pytest.mark.parametrize("host", OTHER_NAMES)
@pytest.mark.parametrize("path", [f"{API}/queue", f"{API}/download/there.png", "/api/docs", f"{API}/health", "/none"])
def test_the_daemon_answers_to_no_other_name(guarded: Daemon, host: str, path: str) -> None:
    """A page of evil.example whose name now resolves to this machine asks its own origin, so only the name tells."""
    answer = asked(guarded, "GET", path, Host=host, Origin=f"http://{host}", Sec_Fetch_Site="same-origin")
    assert answer.status == 403
    assert detail(answer).startswith(f"Host: '{host}' is no name of this daemon; ")


@pytest.mark.parametrize("said", BROWSERS, ids=str)
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE", "OPTIONS"])
def test_by_default_a_browser_is_answered_under_the_machines_own_names_only(
    plain: Daemon, method: str, said: dict[str, str]
) -> None:
    for host, name in (("evil.example:7860", "evil.example"), ("gpu.lan", "gpu.lan"), ("", "")):
        asks = {"Access_Control_Request_Method": "POST"} if method == "OPTIONS" else {}
        answer = asked(plain, method, f"{API}/queue", Host=host, **of(said, host), **asks)
        assert answer.status == 403
        assert method == "HEAD" or detail(answer) == refusal(host, name)


@pytest.mark.parametrize("said", PROGRAMS, ids=str)
@pytest.mark.parametrize("host", ["evil.example:7860", "gpu.lan", ""])
def test_by_default_a_program_is_answered_under_any_name(plain: Daemon, host: str, said: dict[str, str]) -> None:
    assert asked(plain, "GET", f"{API}/queue", Host=host, **said).status == 200


@pytest.mark.parametrize("said", PROGRAMS, ids=str)
def test_a_program_needs_a_name_where_some_are_configured(guarded: Daemon, said: dict[str, str]) -> None:
    answer = asked(guarded, "GET", f"{API}/queue", Host="evil.example", **said)
    assert (answer.status, detail(answer)) == (403, refusal("evil.example", "evil.example"))


@pytest.mark.parametrize("host", ["evil.example", "app.example.org"])
def test_a_page_that_may_ask_still_needs_a_name_of_the_daemon(guarded: Daemon, host: str) -> None:
    for method in ("OPTIONS", "GET", "POST"):
        answer = asked(
            guarded, method, f"{API}/queue/pause", Host=host, Origin=PAGE, Access_Control_Request_Method="POST"
        )
        assert (answer.status, detail(answer)) == (403, refusal(host, host))


def test_a_request_without_a_name_is_no_way_round(guarded: Daemon) -> None:
    answer = exchange(guarded.url, b"GET /api/v1/queue HTTP/1.0\r\n\r\n")
    assert answer is not None
    assert answer.status == 403


FORWARDED = [  # who says it, Host, X-Forwarded-Host → status
    ("127.0.0.1", "evil.example", "video.example.org", 403),
    ("127.0.0.1", "video.example.org", "evil.example", 200),
    (PROXY, "127.0.0.1", "video.example.org", 200),
    (PROXY, "localhost", "video.example.org", 200),
    (PROXY, "upstream", "video.example.org", 403),
    (PROXY, "evil.example", "video.example.org", 403),
    (PROXY, "video.example.org", "localhost", 200),
    (PROXY, "127.0.0.1", "evil.example", 403),
    (PROXY, "127.0.0.1", "video.example.org, evil.example", 403),
    (PROXY, "127.0.0.1", "evil.example, video.example.org", 200),
]


@pytest.mark.parametrize(("source", "host", "said", "status"), FORWARDED)
def test_only_a_trusted_proxy_is_believed_which_name_was_asked_for(
    guarded: Daemon, source: str, host: str, said: str, status: int
) -> None:
    assert asked(guarded, "GET", f"{API}/queue", source, Host=host, X_Forwarded_Host=said).status == status


@pytest.mark.parametrize(("source", "status"), [(PROXY, 200), ("127.0.0.1", 403)])
def test_a_page_behind_a_trusted_proxy_is_the_daemons_own(guarded: Daemon, source: str, status: int) -> None:
    names = {"Host": "127.0.0.1:7860", "X_Forwarded_Host": "video.example.org", "Origin": "https://video.example.org"}
    assert asked(guarded, "POST", f"{API}/queue/pause", source, **names).status == status


# ------------------------------------------------------------------------------------------------------------- the log

LINES = [  # who says it, X-Forwarded-For → the client in the log
    ("127.0.0.1", CLIENTS, "127.0.0.1"),
    (PROXY, CLIENTS, CLIENTS),
    (PROXY, f"198.51.100.1, {CLIENTS}", CLIENTS),
    ("127.0.0.3", CLIENTS, "127.0.0.3"),
]


@pytest.mark.parametrize(("source", "said", "client"), LINES)
def test_the_log_believes_only_a_trusted_proxy_who_asked(guarded: Daemon, source: str, said: str, client: str) -> None:
    mark = f"{API}/queue/{abs(hash((source, said)))}"
    asked(guarded, "GET", mark, source, X_Forwarded_For=said)
    assert eventually(lambda: mark in guarded.log.read_text())
    (line,) = [line for line in guarded.log.read_text().splitlines() if mark in line]
    assert line.startswith(f"wangpd.access: {client} GET {mark} 405 ")


def test_no_request_forges_a_line_of_the_log(plain: Daemon) -> None:
    asked(plain, "GET", f"{API}/download/forged%0awangpd:%20all%20is%20lost%0d%0a.mp4")
    assert eventually(lambda: "forged" in plain.log.read_text())
    assert "\nwangpd: all is lost" not in plain.log.read_text()


# ----------------------------------------------------------------------------------------------------------- the token


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("path", ["/api/v1/queue", "/api/v1", "/api/v1/config", "/api/v1/", "/api/v1/none"])
def test_without_the_token_nothing_is_told(locked: Daemon, path: str) -> None:
    answer = asked(locked, "GET", path)
    assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
    assert detail(answer) == "Authorization: 'Bearer TOKEN' is asked for here"


ROUNDABOUT = [
    *("/api/%76%31/queue", "/%61pi/v1/queue", "//api/v1/queue", "/api//v1/queue", "/api/v1//queue", "/api/./v1/queue"),
    *(
        "/api/docs/../v1/queue",
        "/api/v1/health/../queue",
        "/api/v1/health/%2e%2e/queue",
        "/api/v1%2fqueue",
        "/API/V1/queue",
    ),
    *("http://a/api/v1/queue", "/api/v1/queue#/api/v1/health", "/api/v1/queue?/api/v1/health", "/api/v1/queue;health"),
]


@pytest.mark.parametrize("path", ROUNDABOUT)
def test_no_other_spelling_of_a_path_needs_no_token(locked: Daemon, path: str) -> None:
    answer = asked(locked, "GET", path)
    assert answer.status in (400, 401, 404)
    assert set(json.loads(answer.body)) == {"detail"}


@pytest.mark.parametrize("path", ["/api/docs", "/api/redoc", "/api/openapi.json"])
def test_the_documents_which_hold_no_secret_are_told_without_the_token(locked: Daemon, path: str) -> None:
    assert asked(locked, "GET", path).status == 200


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
def test_health_is_told_without_the_token(locked: Daemon, path: str) -> None:
    assert asked(locked, "GET", API + path).status == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_with_the_token_all_is_told(locked: Daemon, scheme: str) -> None:
    assert asked(locked, "GET", f"{API}/queue", Authorization=f"{scheme} {SECRET}").status == 200


WRONG = [
    *("", "Bearer", "Bearer ", f"Basic {SECRET}", SECRET, f"Token {SECRET}", f"Bearer {SECRET[:-1]}"),
    *(f"Bearer {SECRET}x", f"Bearer {SECRET.upper()}", f"Bearer {SECRET} {SECRET}", "Bearer \xff\xfe", "Bearer ä"),
]


@pytest.mark.parametrize("said", WRONG, ids=ascii)
def test_a_wrong_token_is_none(locked: Daemon, said: str) -> None:
    assert asked(locked, "GET", f"{API}/queue", Authorization=said).status == 401


def test_systemds_credentials_are_found(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "house", token_file="${CREDENTIALS_DIRECTORY}/token")
    (tmp_path / "token").write_text(SECRET)
    daemon.environment["CREDENTIALS_DIRECTORY"] = str(tmp_path)
    with daemon:
        assert daemon.get("/queue").status_code == 401
        assert daemon.get("/queue", headers=bearing(SECRET)).status_code == 200


ASKED = [("GET", "/config"), ("GET", ""), ("POST", "/generate"), ("GET", "/none"), ("PUT", "/queue")]


def test_the_token_is_told_nowhere(locked: Daemon) -> None:
    said = [
        locked.request(method, path, headers=bearing(token)).text
        for token in (SECRET, SECRET + "x")
        for method, path in ASKED
    ]
    documents = [requests.get(f"{locked.url}/api/openapi.json", headers=bearing(SECRET), timeout=30).text]
    assert eventually(lambda: "PUT" in locked.log.read_text())
    assert not [text for text in [*said, *documents, locked.log.read_text()] if SECRET in text]


def test_neither_the_configuration_nor_an_error_tells_a_path(plain: Daemon) -> None:
    answers = [
        *(plain.get(path) for path in ("/config", "/none", "/download/none.mp4", "/queue/x", "/outputs?limit=x", "/")),
        *(plain.post("/generate", body) for body in ({}, {"prompt": "a", "model_type": "none"}, {"prompt": 5}, [])),
        plain.request("POST", "/generate", data=b"{", headers={"Content-Type": "application/json"}),
        plain.request("PUT", "/queue"),
    ]
    assert plain.get("/config").json()["data"]["save_path"] == "outputs"
    assert not [answer.text for answer in answers if str(plain.folder) in answer.text or "/" + "home" in answer.text]


# --------------------------------------------------------------------------------------------------------- checkpoints

MODEL = Catalog.load().get("wan_t2v_1.3B")
PARTS = {  # part of a checkpoint → the name under which its pickled weights would be found
    "transformer": "diffusion_pytorch_model.bin",
    "vae": "diffusion_pytorch_model.bin",
    "text_encoder": "pytorch_model.bin",
}
CODE = "from pathlib import Path\nPath({mark!r}).touch()\nclass Evil: pass\n"


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """What is there once code of a checkpoint has run."""
    return tmp_path / "executed"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / MODEL.id
    tiny.build(MODEL, tmp_path / "models")
    return folder


def load(checkpoint: Path) -> Any:
    import torch

    from engine.gpu.load import pipelines

    with warnings.catch_warnings(action="ignore"):
        return pipelines.load(MODEL, MODEL.pipelines["t2v"], Weights(checkpoint), torch.device("cpu"))


def pickled(folder: Path, name: str, mark: Path) -> None:
    """Put a trap in the place of a part's weights."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(mark)))


def test_a_trap_is_one(mark: Path) -> None:
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists()


@pytest.mark.parametrize("part", PARTS)
def test_pickled_weights_are_refused_and_never_unpickled(checkpoint: Path, mark: Path, part: str) -> None:
    pickled(checkpoint / part, PARTS[part], mark)
    with pytest.raises(OSError, match=r"safetensors"):
        load(checkpoint)
    assert not mark.exists()


def test_a_pickle_under_the_name_of_safetensors_is_never_unpickled(checkpoint: Path, mark: Path) -> None:
    for path in checkpoint.rglob("*.safetensors"):
        path.write_bytes(pickle.dumps(Trap(mark)))
    with pytest.raises(Exception, match=r"(?i)header|safetensors"):
        load(checkpoint)
    assert not mark.exists()


def test_a_model_with_pickled_weights_is_not_installed(checkpoint: Path, mark: Path) -> None:
    pickled(checkpoint / "transformer", PARTS["transformer"], mark)
    with Daemon(checkpoint.parent.parent) as daemon:
        answer = daemon.post("/generate", {"prompt": "a", "model_type": MODEL.id})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(
        f"model_type: '{MODEL.id}' is not installed; install it with: wangpd models download "
    )
    assert not mark.exists()


OWN_CODE = {  # what a checkpoint's index names → where the code for it lies
    "a pipeline": ({"_class_name": ["evil", "Evil"]}, "evil.py"),
    "a denoiser": ({"transformer": ["evil", "Evil"]}, "transformer/evil.py"),
    "a scheduler": ({"scheduler": ["evil", "Evil"]}, "scheduler/evil.py"),
    "nothing, but a file is there": ({}, "None.py"),
}


@pytest.mark.parametrize("case", OWN_CODE)
def test_code_that_a_checkpoint_brings_is_never_run(checkpoint: Path, mark: Path, case: str) -> None:
    named, file = OWN_CODE[case]
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | named))
    (checkpoint / file).write_text(CODE.format(mark=str(mark)))
    with pytest.raises(Exception, match=r"(?i)trust_remote_code|remote code"):
        load(checkpoint)
    assert not mark.exists()
