"""Bodies cost no more than they weigh: refused before the work, within one budget, and their files decoded apart."""

import asyncio
import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from marshmallow import ValidationError, fields, validate
from PIL import Image

from engine.api.fields import Several, Whole, decoded
from engine.api.json_text import LONG_BYTES, cut
from engine.files import checks
from engine.files.checks import Checks, Unusable
from engine.files.place import Folder, NoStorage
from engine.files.spool import SMALL_BYTES, Spool
from engine.turns import Turns
from tests import processes
from tests.daemon import ROOT, Daemon
from tests.idle import idle_daemon
from tests.processes import eventually
from tests.wire import Answer, answered, connected, head

MIB = 2**20
GENERATE = "/api/v1/generate?dry_run=1"
FORM = "multipart/form-data; boundary=x"
END = b"--x--\r\n"
drawn = settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with idle_daemon(tmp_path_factory.mktemp("bodies"), max_body_mb=8) as daemon:
        yield daemon


def part(name: str, data: bytes = b"", more: str = "") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + data + b"\r\n"


def picture(side: int = 64, padding: int = 0) -> bytes:
    """A PNG with so many bytes behind it."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(buffer, "png")
    return buffer.getvalue() + os.urandom(padding)


def large_picture() -> bytes:
    """A picture of 49 megapixels."""
    buffer = io.BytesIO()
    Image.new("L", (7000, 7000)).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def sent(daemon: Daemon, body: bytes, content_type: str = "application/json") -> tuple[int, dict[str, Any]]:
    answer = daemon.request("POST", "/generate?dry_run=1", data=body, headers={"Content-Type": content_type})
    found: dict[str, Any] = answer.json()
    return answer.status_code, found


def spooled(daemon: Daemon) -> list[int]:
    """The sizes of the bodies under way that are on the disk, and of the files of requests."""
    found = [path.stat().st_size for path in daemon.state.glob(".sent-*")]
    for handle in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with suppress(OSError):  # it was closed just now
            target = str(handle.readlink())
            if target.startswith(str(daemon.state)) and target.endswith("(deleted)"):
                found.append(handle.stat().st_size)
    return found


# ------------------------------------------------------------------------------------------------- before the work

TOO_MANY = "The body has too many values; send the fields of one request"
TOO_LARGE = "The body has more than 1 MiB besides its files; send less"
DEEP = "The body is nested too deeply; send a flat object"
JSON_BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a list of four million": (lambda: b'{"prompt":"a","image_refs":[' + b"1," * (3 * MIB) + b"1]}", TOO_LARGE),
    "a list within a mebibyte": (
        lambda: b'{"prompt":"a","image_refs":[' + b"1," * 150_000 + b"1]}",
        "image_refs: must have at most 10 pictures",
    ),
    "LoRAs within a mebibyte": (
        lambda: b'{"prompt":"a","activated_loras":[' + b"1," * 150_000 + b"1]}",
        "activated_loras: must have at most 20 names",
    ),
    "more values than any request": (lambda: b'{"prompt":"a","x":[' + b"1," * 220_000 + b"1]}", TOO_MANY),
    "empty texts": (lambda: b'{"prompt":"a","image_refs":[' + b'"",' * (2 * MIB) + b'""]}', TOO_MANY),
    "unknown fields": (lambda: b"{" + b",".join(b'"%x":1' % i for i in range(600_000)) + b"}", TOO_LARGE),
    "nested lists": (lambda: b'{"prompt":"a","x":[' + b"[[]]," * MIB + b"1]}", TOO_LARGE),
    "nested objects": (lambda: b'{"a":' * 30_000 + b"1" + b"}" * 30_000, DEEP),
    "a long prompt": (lambda: b'{"prompt":"' + b"a" * (6 * MIB) + b'"}', "prompt: must have 1 to 10000 characters"),
    "a long prompt of escapes": (lambda: b'{"prompt":"' + b'\\"' * (3 * MIB) + b'"}', TOO_LARGE),
    "a long name": (lambda: b'{"prompt":"a","' + b"a" * (6 * MIB) + b'":1,"seed":"x"}', "seed: 'x' must be a whole"),
    "spaces": (lambda: b'{"prompt":"a"' + b" " * (6 * MIB) + b"}", TOO_LARGE),
    "a number of a million digits": (
        lambda: b'{"prompt":"a","seed":' + b"9" * 10**6 + b"}",
        "The body has a number of",
    ),
    "a long text without an end": (lambda: b'{"prompt":"' + b"a" * (6 * MIB), TOO_LARGE),
    "UTF-16": (lambda: json.dumps({"prompt": "a" * MIB}).encode("utf-16-le"), "The body must be in UTF-8"),
}


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_that_costs_more_than_it_weighs_is_refused_with_a_sentence(idle: Daemon, name: str) -> None:
    make, sentence = JSON_BOMBS[name]
    status, answer = sent(idle, make())
    assert (status, answer["detail"][: len(sentence)]) == (400, sentence)
    assert spooled(idle) == []


FORM_BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "101 parts": (lambda: part("q") * 101 + END, "The form has more than 100 parts"),
    "100,000 parts of a list": (lambda: part("image_refs") * 100_000 + END, "The form has more than 100 parts"),
    "a header without end": (lambda: b"--x\r\nA: " + b"a" * (6 * MIB), "The form has more than 100 parts, or"),
    "very many headers": (
        lambda: b"--x\r\n" + b"A: b\r\n" * MIB + b"\r\n" + END,
        "The form has more than 100 parts, or",
    ),
    "line feeds for headers": (lambda: b"--x\r\n" + b"\n" * (6 * MIB) + END, "The form is malformed"),
    "text beyond a mebibyte": (
        lambda: b"".join(part(f"seed{i}"[:4], b"a" * 200_000) for i in range(10)) + END,
        "The body has more than 1 MiB",
    ),
    "boundaries that are none": (lambda: part("prompt", b"\r\n--" * MIB) + b"", "The form is malformed"),
}


@pytest.mark.parametrize("name", FORM_BOMBS)
def test_a_form_that_costs_more_than_it_weighs_is_refused_with_a_sentence(idle: Daemon, name: str) -> None:
    make, sentence = FORM_BOMBS[name]
    status, answer = sent(idle, make(), FORM)
    assert (status, answer["detail"][: len(sentence)]) == (400, sentence)
    assert spooled(idle) == []


def test_a_form_of_a_hundred_parts_is_taken(idle: Daemon) -> None:
    status, answer = sent(idle, part("prompt", b"a cat") + part("q") * 99 + END, FORM)
    assert (status, answer["data"]["settings"]["prompt"]) == (200, "a cat")


def test_a_list_is_refused_for_its_first_wrong_element_alone() -> None:
    field = Several(Whole(), validate=validate.Length(max=3, error="at most {max}"))
    with pytest.raises(ValidationError) as found:
        field.deserialize(["a", "b", 3])
    assert list(found.value.messages_dict if isinstance(found.value.messages, dict) else found.value.messages) == [0]
    with pytest.raises(ValidationError, match="at most 3"):
        field.deserialize(["a"] * 4)
    assert field.deserialize([1, 2.0]) == [1, 2]
    assert isinstance(field, fields.List)


# ------------------------------------------------------------------------------------------------------ large files

LARGE = picture(padding=2 * MIB)
TEXT = base64.b64encode(LARGE)
SPELLINGS = {
    "as it is": TEXT,
    "with a prefix": b"data:image/png;base64," + TEXT,
    "URL-safe and without padding": TEXT.translate(bytes.maketrans(b"+/", b"-_")).rstrip(b"="),
    "slashes escaped, as PHP does": TEXT.replace(b"/", rb"\/"),
    "plus signs escaped, as .NET does": TEXT.replace(b"+", rb"\u002B"),
    "equals signs escaped, as Gson does": TEXT.replace(b"=", rb"\u003d"),
    "in lines": b"\\n".join(TEXT[at : at + 76] for at in range(0, len(TEXT), 76)),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_large_picture_in_json_is_the_file_that_was_sent(idle: Daemon, spelling: str) -> None:
    body = '{"prompt": "größer 🐈 \\"", "image_start": "'.encode() + SPELLINGS[spelling] + b'", "video_length": 5}'
    status, answer = sent(idle, body)
    assert status == 200, answer
    found = answer["data"]["settings"]
    assert (found["prompt"], found["video_length"]) == ('größer 🐈 "', 5)
    assert found["image_start"] == [hashlib.sha256(LARGE).hexdigest()]
    assert spooled(idle) == []


def test_many_pictures_in_json_are_files_however_small_each_is(idle: Daemon) -> None:
    pictures = [picture(padding=size) for size in (30_000, 40_000, 100_000, 150_000, *[190_000] * 5)]
    body = json.dumps({"prompt": "a", "image_refs": [base64.b64encode(data).decode() for data in pictures]}).encode()
    assert len(body) > MIB
    for spelling in (body, body.replace(b"+", rb"\u002b"), body.replace(b"=", rb"\u003d")):
        status, answer = sent(idle, spelling)
        assert (status, answer["detail"][:48]) == (400, "image_refs: model 'wan_demo' takes no such image")


@pytest.mark.parametrize("last", ["", '"', "\\", '\\"'])
def test_a_long_unknown_text_beside_a_large_picture_is_ignored(idle: Daemon, last: str) -> None:
    for text in (json.dumps({"a": ["größer"] * 30_000}), "a" * 300_000):
        body = json.dumps({"workflow": text + last, "prompt": "a", "image_start": TEXT.decode()}).encode()
        status, answer = sent(idle, body)
        assert status == 200, answer
        assert answer["data"]["settings"]["image_start"] == [hashlib.sha256(LARGE).hexdigest()]


@pytest.mark.parametrize("letter", ["a", "ß", "猫", "🐈"])
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_longest_prompt_is_taken_beside_a_large_picture(idle: Daemon, letter: str, ascii_only: bool) -> None:
    for length, wanted in ((10_000, 200), (10_001, 400)):
        fields = {"prompt": letter * length, "image_start": TEXT.decode()}
        status, answer = sent(idle, json.dumps(fields, ensure_ascii=ascii_only).encode())
        assert status == wanted, answer
        assert wanted == 200 or answer["detail"] == "prompt: must have 1 to 10000 characters"


def test_a_large_picture_in_a_form_is_the_file_that_was_sent(idle: Daemon) -> None:
    body = part("prompt", b"a") + part("image_start", LARGE, '; filename="a.png"') + END
    status, answer = sent(idle, body, FORM)
    assert (status, answer["data"]["settings"]["image_start"]) == (200, [hashlib.sha256(LARGE).hexdigest()])
    assert spooled(idle) == []


@pytest.mark.parametrize("damage", [b"!", b"=", b"\\u0041\\u0000", b"\\\\"])
def test_a_large_text_that_is_no_base64_is_400_with_its_field(idle: Daemon, damage: bytes) -> None:
    half = len(TEXT) // 2
    for form in (b'{"prompt":"a","image_start":"%b"}', b'{"prompt":"a","image_refs":["%b"]}'):
        status, answer = sent(idle, form % (TEXT[:half] + damage + TEXT[half:]))
        assert status == 400
        name = "image_start" if b"start" in form else "image_refs[0]"
        assert answer["detail"] == f"{name}: is not valid base64; send the file's bytes in base64"


@seed(13)
@drawn
@given(
    data=st.binary(max_size=200),
    cut_at=st.lists(st.integers(0, 300), max_size=5),
    white=st.sampled_from([b"\n", b" ", b"\r\n\t"]),
)
def test_base64_is_decoded_whatever_white_space_is_in_it(data: bytes, cut_at: list[int], white: bytes) -> None:
    text = base64.b64encode(data)
    for place in sorted(cut_at, reverse=True):
        text = text[:place] + white + text[place:]
    assert b"".join(decoded(text)) == data


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=30) | st.sampled_from(['"', "\\", "a" * 300_000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@seed(13)
@drawn
@given(value=st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=5), ascii_only=st.booleans())
def test_what_is_cut_out_of_json_and_put_back_is_the_same(value: dict[str, Any], ascii_only: bool) -> None:
    raw = json.dumps(value, ensure_ascii=ascii_only).encode()
    plain, texts = cut(raw)  # type: ignore[arg-type]  # bytes have the methods of an mmap that it uses
    for mark, text in texts.items():
        assert len(text) >= LONG_BYTES
        plain = plain.replace(mark.encode(), text)
    assert json.loads(plain) == value


# ----------------------------------------------------------------------------------------------------------- budget


def begun(daemon: Daemon, size: int, source: str, stack: ExitStack) -> Any:
    """A connection that has sent `size` bytes of a body that never ends."""
    channel = stack.enter_context(connected(daemon.url, source))
    channel.sendall(head(GENERATE, "POST", Content_Type="application/json", Content_Length=size + 10) + b" " * size)
    return channel


def refused(channel: Any) -> bool:
    answer = answered(channel)
    assert isinstance(answer, Answer)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "10")
    return b"max_body_mb" in answer.body


@pytest.mark.parametrize("clients", [1, 2, 4])
def test_bodies_under_way_have_one_budget_and_each_client_half_of_it(tmp_path: Path, clients: int) -> None:
    with idle_daemon(tmp_path, max_body_mb=2) as daemon, ExitStack() as stack:
        sources = [f"127.0.0.{number}" for number in range(2, 2 + clients)]
        open_ones = []
        for source in sources:
            for _ in range(4 // clients if clients > 1 else 2):  # two clients fill it, and one has no more than half
                open_ones.append(begun(daemon, 2 * MIB - 100, source, stack))
        assert eventually(lambda: spooled(daemon) == [2 * MIB - 100] * len(open_ones))
        assert refused(begun(daemon, MIB, sources[0], stack))
        other = begun(daemon, MIB, "127.0.0.99", stack)
        if clients == 1:
            assert eventually(lambda: len(spooled(daemon)) == len(open_ones) + 1)
        else:
            assert refused(other)
        assert daemon.post("/generate?dry_run=1", {"prompt": "a"}).status_code == 200  # small ones need no room
        assert daemon.post("/generate?dry_run=1", {"prompt": "a", "x": "b" * 30_000}).status_code == 200
        stack.close()
        assert eventually(lambda: spooled(daemon) == [])
        answer = sent(daemon, b'{"prompt": "a"' + b" " * (MIB - 100) + b"}")
        assert answer[0] == 200, answer


def test_a_body_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_body_mb=2) as daemon:
        before = {path.name for path in daemon.state.iterdir()}
        for size in (0, 1, SMALL_BYTES, SMALL_BYTES + 1, MIB, 2 * MIB - 100):
            with ExitStack() as stack:
                begun(daemon, size, "127.0.0.1", stack)
        for _ in range(20):  # far more than the budget
            with ExitStack() as stack:
                begun(daemon, 2 * MIB - 100, "127.0.0.1", stack)
                assert daemon.get("/health").status_code == 200
        assert eventually(lambda: spooled(daemon) == [])
        assert {path.name for path in daemon.state.iterdir()} == before
        assert sent(daemon, b'{"prompt": "a"' + b" " * (MIB - 100) + b"}")[0] == 200


async def test_a_disk_without_room_is_no_fault_of_the_body(tmp_path: Path) -> None:
    full = Folder(tmp_path, "state_path", 2**60, "some are needed: free it")
    spool = Spool(tmp_path, full, MIB)

    async def chunks(*sizes: int) -> AsyncIterator[bytes]:
        for size in sizes:
            yield b"a" * size

    async with spool.body("a", chunks(SMALL_BYTES)) as file:  # in memory
        assert file.tell() == SMALL_BYTES
    for _ in range(20):  # far more than the budget
        with pytest.raises(NoStorage, match="state_path"):
            async with spool.body("a", chunks(SMALL_BYTES, MIB // 4)):
                pass


@pytest.mark.parametrize("size", [100_000, 400_000, 2 * MIB])
def test_a_disk_that_fails_in_the_middle_of_a_body_is_503(tmp_path: Path, size: int) -> None:
    running = Daemon(tmp_path)
    running.launcher = ["prlimit", "--fsize=300000"]
    with running:
        answer = sent(running, b'{"prompt": "a"' + b" " * size + b"}")
        if size < 300_000:
            assert answer[0] == 200
        else:
            assert answer == (503, {"detail": "state_path can't take the body (File too large); free its disk"})
        files = {"prompt": (None, "a"), "image_start": ("a", picture(padding=size))}
        assert running.request("POST", "/generate?dry_run=1", files=files).status_code == answer[0]
        assert eventually(lambda: spooled(running) == [])
        assert sent(running, b'{"prompt": "a"}')[0] == 200


async def test_clients_take_turns() -> None:
    turns, order = Turns(1), list[str]()

    async def work(client: str) -> None:
        async with turns.turn(client):
            order.append(client)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(client) for client in "aaaabbc"))
    assert order == list("abcabaa")


async def test_a_client_has_one_turn_at_a_time_and_the_others_the_rest() -> None:
    turns, most = Turns(2), dict[str, int]()
    at_work = list[str]()

    async def work(client: str) -> None:
        async with turns.turn(client):
            at_work.append(client)
            for name in ("a", "b", ""):
                count = at_work.count(name) if name else len(at_work)
                most[name] = max(most.get(name, 0), count)
            await asyncio.sleep(0.001)
            at_work.remove(client)

    await asyncio.gather(*(work(client) for client in "aaaabbbb"))
    assert most == {"a": 1, "b": 1, "": 2}


# ------------------------------------------------------------------------------------------------------------ files


def checkers(pid: int) -> list[str]:
    """The commands of the processes of `pid` that check media."""
    return [text for text in map(processes.command, processes.children(pid)) if "check_media" in text]


@pytest.fixture
def slow(tmp_path: Path) -> tuple[str, Path]:
    """A picture that takes a while to decode."""
    path = tmp_path / "slow.png"
    path.write_bytes(large_picture())
    return "image", path


async def test_a_file_that_takes_too_long_is_refused_and_its_process_ended(
    slow: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "CHECK_S", 0.01)
    with pytest.raises(Unusable) as found:
        await Checks(10**8).seconds([slow], "a")
    assert found.value.args == (0, checks.TOO_LONG)
    assert checkers(os.getpid()) == []


async def test_what_takes_more_than_a_moment_keeps_nothing_small_waiting(
    slow: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "QUICK_CPU_S", 0.2)
    small, check, ended = tmp_path / "small", Checks(10**8), list[str]()
    small.write_bytes(picture())

    async def examine(client: str, *files: tuple[str, Path]) -> list[float]:
        found = await check.seconds(files, client)
        ended.append(client)
        return found

    large = [examine(client, *[slow] * 40) for client in ("a", "b")]
    found = await asyncio.gather(*large, examine("c", ("image", small)))
    assert found == [[0.0] * 40] * 2 + [[0.0]]
    assert ended[0] == "c"


async def test_a_check_that_is_cancelled_leaves_no_process(slow: tuple[str, Path]) -> None:
    checker = Checks(10**8)
    check = asyncio.create_task(checker.seconds([slow] * 5, "a"))
    assert await asyncio.to_thread(eventually, lambda: checkers(os.getpid()) != [])
    check.cancel()
    with pytest.raises(asyncio.CancelledError):
        await check
    assert checkers(os.getpid()) == []
    assert await checker.seconds([slow], "a") == [0.0]  # it is its turn again


async def test_the_first_file_that_can_not_be_used_is_named(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(picture())
    bad.write_bytes(b"no picture")
    check = Checks(10**6)
    assert await check.seconds([("image", good), ("image", good)], "a") == [0.0, 0.0]
    with pytest.raises(Unusable) as found:
        await check.seconds([("image", good), ("image", bad), ("image", bad)], "a")
    assert found.value.args == (1, "is not a PNG, JPEG or WebP image")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [("BASE_BYTES", 40 * MIB, "needs too much memory to decode; send a smaller one"), ("WALL_S", 60, None)],
)
def test_a_check_is_limited_in_memory_and_time(tmp_path: Path, name: str, value: int, sentence: str | None) -> None:
    path = tmp_path / "large.png"
    path.write_bytes(large_picture())
    pixels = 1 if name == "BASE_BYTES" else 10**8
    code = f"""if True:
        from PIL import Image, WebPImagePlugin
        from engine.files import check_media, media
        check_media.{name} = {value}
        check_media.media.check_image = lambda file, most: [media._upright(Image.open(file)) for _ in range(99)]
        check_media.main(0.5, {pixels}, "image", {str(path)!r})
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if sentence:
        assert json.loads(run.stdout) == sentence
    else:
        assert (run.stdout, run.returncode) == ("", -signal.SIGPROF), run.stderr


def test_who_hangs_up_while_a_file_is_decoded_keeps_nobody_waiting(tmp_path: Path) -> None:
    body = part("prompt", b"a") + part("image_start", large_picture(), '; filename="a"') + END
    with idle_daemon(tmp_path) as daemon:
        request = head(GENERATE, "POST", Content_Type=FORM, Content_Length=len(body)) + body
        for number in range(10):
            with connected(daemon.url) as channel:
                channel.sendall(request)
                if number == 5:  # the others leave before
                    assert eventually(lambda: checkers(daemon.process.pid) != [])
        assert eventually(lambda: checkers(daemon.process.pid) == [])
        status, _ = sent(daemon, part("prompt", b"a") + part("image_start", picture(), '; filename="a"') + END, FORM)
        assert status == 200
        assert eventually(lambda: spooled(daemon) == [])
        assert sent(daemon, body, FORM)[0] == 200  # there is nothing wrong with it


def test_a_stop_waits_for_no_check(tmp_path: Path) -> None:
    body = part("prompt", b"a") + part("image_start", large_picture(), '; filename="a"') + END
    with idle_daemon(tmp_path) as daemon, ExitStack() as stack:
        request = head(GENERATE, "POST", Content_Type=FORM, Content_Length=len(body)) + body
        for number in range(2, 6):
            stack.enter_context(connected(daemon.url, f"127.0.0.{number}")).sendall(request)
        assert daemon.get("/health").status_code == 200
        daemon.stop()
        assert list(daemon.state.glob(".sent-*")) == []


# ----------------------------------------------------------------------------------------------------------- inputs


def submit(daemon: Daemon, data: bytes) -> Any:
    files = {"prompt": (None, "a"), "image_start": ("a.png", data)}
    return daemon.request("POST", "/generate", files=files)


def test_inputs_have_a_limit_and_those_of_ended_tasks_give_way(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_inputs_mb=3) as daemon:
        first = submit(daemon, picture(padding=2 * MIB))
        assert first.status_code == 200
        second = submit(daemon, picture(padding=2 * MIB))
        assert second.status_code == 503
        assert second.json()["detail"] == (
            "The files of waiting tasks fill max_inputs_mb; cancel some of these tasks, or raise it"
        )
        assert daemon.get("/queue").json()["data"]["total_tasks"] == 1
        assert submit(daemon, picture()).status_code == 200  # there is room for this one
        daemon.delete(f"/queue/{first.json()['data']['task_id']}")
        assert submit(daemon, picture(padding=2 * MIB)).status_code == 200
        stored = sum(path.stat().st_size for path in (daemon.state / "inputs").iterdir())
        assert stored <= 3 * MIB


def test_inputs_that_a_journal_set_aside_may_need_do_not_give_way(tmp_path: Path) -> None:
    with idle_daemon(tmp_path, max_inputs_mb=3) as daemon:
        first = submit(daemon, picture(padding=2 * MIB)).json()["data"]["task_id"]
        (daemon.state / "journal.sqlite.unreadable-1").touch()
        daemon.delete(f"/queue/{first}")
        assert submit(daemon, picture(padding=2 * MIB)).status_code == 503
        assert len(list((daemon.state / "inputs").iterdir())) == 1
        (daemon.state / "journal.sqlite.unreadable-1").unlink()
        assert submit(daemon, picture(padding=2 * MIB)).status_code == 200


def test_a_refused_request_leaves_no_file(tmp_path: Path) -> None:
    with idle_daemon(tmp_path) as daemon:
        for resolution in ("1x1", "830x480", "x"):
            files = {"prompt": (None, "a"), "resolution": (None, resolution), "image_start": ("a.png", LARGE)}
            assert daemon.request("POST", "/generate", files=files).status_code == 400
        assert not (daemon.state / "inputs").exists()
        assert spooled(daemon) == []


def test_what_a_killed_daemon_left_of_requests_is_removed_at_the_start(tmp_path: Path) -> None:
    with idle_daemon(tmp_path) as daemon:
        daemon.process.kill()
        daemon.process.wait()
        (daemon.state / ".sent-0123456789abcdef").write_bytes(b"half")
        (daemon.state / "not mine").write_bytes(b"a user's")
        daemon.start()
        assert eventually(lambda: not (daemon.state / ".sent-0123456789abcdef").exists())
        assert (daemon.state / "not mine").exists()
