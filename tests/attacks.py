"""What is done to the daemon: one function an attack, at full size or a sample of it; see tests/attack.py.

An attack returns when it is over; what it holds open ends with it. Whether it did harm is not for it to judge.
"""

import io
import json
import random
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from itertools import repeat

from PIL import Image

from tests import hostile, hostile_media
from tests.attack import MAX_BODY_MB, MIB, Attack, Field, hang_up, request
from tests.honest import parts, small_png

FORM = "multipart/form-data; boundary=x"
JSON = "application/json"
PART = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n\r\n'
END = b"--x--\r\n"
PROMPT = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'
ATTACKS: dict[str, Attack] = {}


def attack(act: Attack) -> Attack:
    """Enter an attack into the table, under the name of its function."""
    ATTACKS[act.__name__] = act
    return act


def submitted(body: bytes, kind: str = JSON, query: str = "?dry_run=1", **headers: str) -> bytes:
    """A request to generate."""
    return request("POST", f"/generate{query}", body, Content_Type=kind, **headers)


def announced(size: int, kind: str = JSON) -> bytes:
    """The head of a request to generate, whose body has so many bytes."""
    return request("POST", "/generate?dry_run=1", Content_Type=kind, Content_Length=size)


def with_file(name: str, data: bytes) -> bytes:
    """A form with a prompt and a file."""
    head = b'--x\r\nContent-Disposition: form-data; name="%s"; filename="a"\r\n\r\n' % name.encode()
    return b"".join([PROMPT, head, data, b"\r\n", END])


def gzipped(pieces: Iterator[bytes]) -> bytes:
    """All of them, as gzip."""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*map(squeeze.compress, pieces), squeeze.flush()])


def twice(field: Field, *requests: bytes) -> None:
    """Each directly and through the proxy, several at a time."""
    field.all_at_once((partial(field.ask, data, door) for data in requests for door in field.urls), most=4)


# ---------------------------------------------------------------------------------------------------------------- forms


@attack
def forms_of_many_parts(field: Field) -> None:
    """Unknown names, a list without end, one name again and again, files without a byte."""
    count = field.count(100_000, 200)
    empty_file = b'--x\r\nContent-Disposition: form-data; name="image_refs"; filename="a"\r\n\r\n\r\n'
    different = b"".join(PART % b"q%d" % number for number in range(count))
    bodies = [PART % b"q" * count, PART % b"image_refs" * count, PART % b"seed" * count, empty_file * count, different]
    twice(field, *(submitted(PROMPT + body + END, FORM) for body in bodies))


@attack
def forms_in_gzip(field: Field) -> None:
    """183 KB that unpack to a form of 60 MiB, and to bodies that nobody asked for."""
    part = PART % b"image_refs"
    form = gzipped(repeat(part, field.count(60 * MIB // len(part), 1000)))
    spaces = gzipped(repeat(b" " * MIB, field.count(1024, 4)))
    twice(
        field,
        submitted(form, FORM, Content_Encoding="gzip"),
        submitted(spaces, JSON, Content_Encoding="gzip"),
        submitted(form, FORM, Content_Encoding="identity, gzip"),
        request("POST", "/health", spaces, Content_Encoding="gzip"),
        request("GET", "/health", spaces, Content_Encoding="deflate"),
        request("POST", "/queue/pause", spaces, Content_Type=JSON, Content_Encoding="gzip"),
    )


@attack
def forms_without_end(field: Field) -> None:
    """A preamble, the headers of a part, a boundary, a name, and a nested form that never end."""
    size = field.count(60, 1) * MIB
    begun = b'--x\r\nContent-Disposition: form-data; name="'
    nested = b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n"
    bodies = [
        b"a" * size,
        b"a\r\n" * (size // 3),
        b"--x\r\n" + b"X-Header: a\r\n" * (size // 13),
        b"--x\r\n" + b"X" * size,
        begun + b"a" * size,
        begun + b'a"\r\n\r\n' + b"\r\n--" * (size // 4),
        nested * (size // len(nested)),
        b"--x" + b"-" * size,
    ]
    for body in bodies:
        twice(field, submitted(body, FORM))


@attack
def forms_that_lie(field: Field) -> None:
    """Encodings, lengths and charsets of parts that do not exist, and mutations of a whole form."""
    whole = bytearray(b"".join(parts(0)))
    tokens = [b"\r\n", b"--x", b"--x--", b'name="', b"\0", b"\xff", b"Content-Encoding: gzip\r\n", b"name=_charset_"]
    tokens += [b"Content-Transfer-Encoding: %s\r\n" % kind for kind in (b"base64", b"zzz", b"quoted-printable")]
    tokens += [b"Content-Length: -1\r\n", b"; name*=utf-8''%ff", b"[" * 1000, b"a" * 9000, b"charset=utf-7"]
    kinds = [
        FORM,
        'multipart/form-data; boundary="',
        "multipart/form-data; boundary=" + "x" * 80,
        "multipart/form-data",
    ]

    def one(seed: int) -> None:
        chance = random.Random(seed)
        body = whole.copy()
        for _ in range(chance.randint(1, 4)):
            place = chance.randint(0, len(body))
            body[place : place + chance.choice((0, 0, 1, 40))] = chance.choice([*tokens, b""])
        field.ask(submitted(bytes(body), chance.choice(kinds) if chance.random() < 0.2 else FORM), "direct")

    field.all_at_once((partial(one, number) for number in range(field.count(3000, 60))), most=4)


# ----------------------------------------------------------------------------------------------------------------- JSON


@attack
def lists_of_wrong_values(field: Field) -> None:
    """Lists with more elements than can be right, all of them wrong."""
    count = field.count(4_000_000, 1000)
    for name, item in (("image_refs", b"1,"), ("image_refs", b'"",'), ("activated_loras", b"1,"), ("prompt", b"{},")):
        twice(field, submitted(b'{"prompt":"a","%s":[' % name.encode() + item * count + b"1]}"))


@attack
def unknown_fields(field: Field) -> None:
    """A million and a half of them, in requests that are accepted, in ones that are refused, and in forms."""
    names = ",".join(f'"{number:x}":1' for number in range(field.count(1_500_000, 1000)))
    long = json.dumps({"prompt": "a", **{"k" * 10_000 + str(number): 1 for number in range(field.count(6000, 20))}})
    bodies = [f'{{{names},"prompt":"a"}}', f'{{{names},"prompt":""}}', f'{{"prompt":"a","x":{{{names}}}}}', long]
    for body in bodies:
        twice(field, submitted(body.encode()))
    wide = b"".join(PART % b"unknown-%d" % number for number in range(95))
    twice(field, submitted(PROMPT + wide + END, FORM))


@attack
def nested_values(field: Field) -> None:
    """Lists and objects in each other, and beside each other."""
    count, deep = field.count(12_000_000, 1000), field.count(5_000_000, 1000)
    bodies = [
        b'{"prompt":"a","x":[' + b"[[]]," * count + b"1]}",
        b'{"prompt":"a","x":[' + b'{"":0},' * (count // 3) + b"1]}",
        b'{"prompt":' + b"[" * deep + b"]" * deep + b"}",
        b'{"prompt":"a","x":' + b'{"a":' * deep + b"1" + b"}" * deep + b"}",
        b"[" * deep,
    ]
    for body in bodies:
        twice(field, submitted(body))
    in_form = b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n' + b"[" * deep + b"\r\n"
    twice(field, submitted(PROMPT + in_form + END, FORM))


@attack
def long_texts(field: Field) -> None:
    """A prompt of 60 MiB, plain, of escapes and of another encoding; and a key of as many."""
    size = field.count(60, 1) * MIB
    texts = [b"a" * size, rb"\u00e9" * (size // 6), b"\xc3\xa9" * (size // 2), b"\\n" * (size // 2)]
    for text in texts:
        twice(field, submitted(b'{"prompt":"%s"}' % text))
    twice(field, submitted(b'{"prompt":"a","%s":1}' % texts[0]))
    long_field = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + texts[0] + b"\r\n"
    twice(field, submitted(long_field + END, FORM), submitted(texts[0]), submitted(b" " * size))


@attack
def base64_with_spaces(field: Field) -> None:
    """60 MiB in which every other byte is a space, line feeds, or only padding."""
    size = field.count(60, 1) * MIB
    for text in (b"A " * (size // 2), b"A\\n" * (size // 3), b"=" * size, b"-_" * (size // 2), b"data:," + b"A" * size):
        twice(field, submitted(b'{"prompt":"a","image_start":"%s"}' % text))
    twice(field, submitted(b'{"prompt":"a","image_refs":["%s"]}' % b'","'.join([b"A " * (size // 22)] * 10)))


@attack
def long_numbers(field: Field) -> None:
    """Numbers of a million digits: as such, as texts, in forms, in paths and in queries."""
    digits = b"9" * field.count(1_000_000, 5000)
    for value in (digits, b"0." + digits, b"1e" + digits, b'"' + digits + b'"', b"-" + digits, b'"%ss"' % digits):
        twice(field, submitted(b'{"prompt":"a","seed":%s}' % value), submitted(b'{"prompt":"a","x":%s}' % value))
    part = b'--x\r\nContent-Disposition: form-data; name="seed"\r\n\r\n' + digits + b"\r\n"
    size = b'{"prompt":"a","resolution":"%sx%s"}' % (digits, digits)
    twice(field, submitted(PROMPT + part + END, FORM), submitted(size))
    number = digits[:7000].decode()
    paths = [
        f"/outputs?limit={number}",
        f"/status/{number}",
        f"/preview/a.png?width={number}",
        f"/tasks?offset={number}",
    ]
    twice(field, *(request("GET", path) for path in paths))


# ------------------------------------------------------------------------------------------------------ bodies, in time


@attack
def withheld_bodies(field: Field) -> None:
    """Bodies of max_body_mb on 40 connections, of which the last byte never comes."""
    size = (MAX_BODY_MB if field.is_full else 2) * MIB - 1000
    block = b"a" * MIB

    def pour(channel: socket.socket, kind: str) -> None:
        begin = b'{"prompt":"a","image_start":"' if kind == JSON else with_file("video_guide", b"")[: -len(END) - 2]
        with suppress(OSError):
            channel.sendall(announced(size, kind) + begin)
            left = size - len(begin) - 1
            while left > 0:
                channel.sendall(block[:left])
                left -= len(block)

    with ExitStack() as stack:
        channels = field.crowd(stack, 40 if field.is_full else 12)
        field.all_at_once((partial(pour, channel, (JSON, FORM)[number % 2]) for number, channel in enumerate(channels)))
        field.pause(20)


@attack
def bodies_in_drops(field: Field) -> None:
    """A byte now and then, on many connections."""
    with ExitStack() as stack:
        channels = field.crowd(stack, field.count(100, 8))
        for number, channel in enumerate(channels):
            with suppress(OSError):
                channel.sendall(announced(1000 if number % 2 else 60 * MIB, FORM if number % 3 else JSON))
        field.drip(channels, b"-", 0.05)


@attack
def broken_uploads(field: Field) -> None:
    """A thousand that break off: in the head, in JSON, in the first and in a later part of a form."""
    large = with_file("image_start", b"a" * MIB)
    begun = [
        announced(5000)[:50],
        announced(5000) + b'{"prompt": "half',
        announced(5000, FORM) + b"--x\r\nContent-Disp",
        announced(len(large), FORM) + large[:-10_000],
        request("PATCH", "/queue/1", Content_Type=JSON, Content_Length=30) + b'{"pos',
    ]

    def one(number: int) -> None:
        with suppress(OSError):
            channel = field.channel()
            channel.sendall(begun[number % len(begun)])
            hang_up(channel) if number % 2 else channel.close()

    field.all_at_once(partial(one, number) for number in range(field.count(1000, 30)))


# ---------------------------------------------------------------------------------------------------------------- media


def bomb(field: Field, name: str, make: Callable[[], bytes], setting: str) -> bytes:
    """A request with this file, which is made once."""
    data = hostile_media.kept(field.workshop, f"{name}-{field.scale}", make)
    return submitted(with_file(setting, data), FORM)


def explode(field: Field, files: Mapping[str, Callable[[], bytes]], setting: str) -> None:
    """Send each of them twice through each door at a time."""
    for name, make in files.items():
        data = bomb(field, name, make, setting)
        twice(field, data, data)


@attack
def videos_without_a_duration(field: Field) -> None:
    """Matroska of a million packets that change nothing, and of 2,000 such frames in 4k."""
    side = (4096, 2160) if field.is_full else (640, 360)
    files = {
        "packets": partial(hostile_media.endless, 64, 64, field.count(1_000_000, 20_000)),
        "frames": partial(hostile_media.endless, *side, field.count(2000, 50)),
    }
    explode(field, files, "video_guide")


@attack
def frames_larger_than_told(field: Field) -> None:
    """64x64 by the container, far more inside: from the first frame, or later, in H.264 and Motion JPEG."""
    side = 12_000 if field.is_full else 7200
    files = {
        "swap-mp4": partial(hostile_media.larger_inside, side, "mp4"),
        "swap-mkv": partial(hostile_media.larger_inside, side, "matroska"),
        "later-mp4": partial(hostile_media.larger_later, side, "mp4"),
        "later-mkv": partial(hostile_media.larger_later, side, "matroska"),
        "jpegs": partial(hostile_media.larger_jpegs, side),
    }
    explode(field, files, "video_source")


@attack
def containers_that_lie(field: Field) -> None:
    """Thousands of streams, boxes in boxes, and tables that say more than there is."""
    files = {
        "sounds": partial(hostile_media.many_sounds, field.count(900, 60)),
        "tracks": partial(hostile_media.many_tracks, field.count(10_000, 60)),
        "boxes": partial(hostile_media.boxes, field.count(50_000, 500), field.count(100_000, 1000)),
        "flat": partial(hostile_media.boxes, 1, field.count(5_000_000, 10_000)),
        "samples": partial(hostile_media.claims_samples, 2**31),
    }
    explode(field, files, "video_mask")


@attack
def sounds(field: Field) -> None:
    """Hours of silence in a few bytes, lengths that are not true, and tags without end."""
    hours = 3600.0 * field.count(50)
    files = {
        "flac": partial(hostile_media.silence, "flac", "flac", hours if field.is_full else 100.0),
        "ogg": partial(hostile_media.silence, "ogg", "flac", 3590.0 if field.is_full else 100.0),
        "mp3": partial(hostile_media.silence, "mp3", "libmp3lame", 3590.0 if field.is_full else 20.0),
        "wave": partial(hostile_media.wave, 2**32 - 1),
        "channels": partial(hostile_media.wave, 2**32 - 1, 30_000),
        "claims": partial(hostile_media.flac_claims, 2**36 - 1),
        "tags": partial(hostile_media.tags, field.count(50_000, 100), 1000),
    }
    explode(field, files, "audio_reference")


@attack
def jpegs_of_many_scans(field: Field) -> None:
    """Progressive JPEGs of 99 bytes a scan over 49 million pixels."""
    for count in (field.count(1000, 20), field.count(5000, 40)):
        data = bomb(
            field, f"scans-{count}", partial(hostile_media.scans, 7000 if field.is_full else 2000, count), "image_start"
        )
        twice(field, data, data)


@attack
def bombs_in_png(field: Field) -> None:
    """All pixels that are allowed, far more than are, texts that unpack, and frames without end."""
    side = 7000 if field.is_full else 2000
    files: dict[str, Callable[[], bytes]] = {
        "png": partial(hostile_media.png, side),
        "header": lambda: hostile.png(2**31 - 1, 2**31 - 1),
        "texts": lambda: hostile_media.png(500, extra=hostile_media.text_chunks(field.count(500, 10), 1_000_000)),
        "moving": partial(hostile_media.moving, "PNG", 500, field.count(1000, 20)),
    }
    explode(field, files, "image_start")


@attack
def bombs_in_webp(field: Field) -> None:
    """As large as WebP can be, lossless, and moving."""
    side = 7000 if field.is_full else 2000
    files: dict[str, Callable[[], bytes]] = {
        "webp": partial(hostile_media.plain, "WEBP", side, side, lossless=True),
        "largest": partial(
            hostile_media.plain, "WEBP", *((16_383, 16_383) if field.is_full else (8000, 8000)), lossless=True
        ),
        "moving-webp": partial(hostile_media.moving, "WEBP", 500, field.count(1000, 20)),
    }
    explode(field, files, "image_end")


@attack
def uploaders_who_hang_up(field: Field) -> None:
    """Heavy files, whose senders are gone before they have been looked at."""
    film = partial(hostile_media.endless, 4096, 2160, field.count(2000, 50))
    picture = partial(hostile_media.scans, 7000 if field.is_full else 2000, field.count(5000, 40))
    heavy = [bomb(field, "hung-film", film, "video_guide"), bomb(field, "hung-picture", picture, "image_start")]

    def one(number: int) -> None:
        with suppress(OSError):
            channel = field.channel()
            channel.sendall(heavy[number % 2])
            time.sleep(0.2)
            hang_up(channel) if number % 3 else channel.close()

    field.all_at_once(partial(one, number) for number in range(field.count(100, 12)))


# ---------------------------------------------------------------------------------------------------------- connections


def hold(field: Field, data: Callable[[int], bytes], full_s: float) -> None:
    """More connections than the daemon takes, on each of which something is sent and nothing is read."""
    with ExitStack() as stack:
        channels = field.crowd(stack, field.connections * 6 // 5, SO_RCVBUF=2048)
        for number, channel in enumerate(channels):
            with suppress(OSError):
                channel.sendall(data(number))
        field.pause(full_s)


@attack
def unread_downloads(field: Field) -> None:
    """A large file on every connection."""
    path = field.daemon.outputs / "large.mp4"
    with path.open("wb") as file:
        file.truncate(200 * MIB)
    hold(field, lambda _: request("GET", "/download/large.mp4"), 75)
    path.unlink()


@attack
def idle_connections(field: Field) -> None:
    """Connections on which nothing is ever asked, or only once."""
    hold(field, lambda number: request("GET", "/health") if number % 2 else b"", 20)


@attack
def unread_waiters(field: Field) -> None:
    """Clients that wait for a task, or for events, and never read."""
    task_id = field.daemon.submit()["task_id"]
    paths = [f"/status/{task_id}?wait=60", "/events", f"/status/{task_id}/events"]
    hold(field, lambda number: request("GET", paths[number % len(paths)]), 30)
    field.daemon.delete(f"/queue/{task_id}")


@attack
def slow_heads(field: Field) -> None:
    """Heads that come byte by byte and never end."""
    with ExitStack() as stack:
        channels = field.crowd(stack, field.connections * 6 // 5)
        for channel in channels:
            with suppress(OSError):
                channel.sendall(b"GET /api/v1/health HTTP/1.1\r\nX: ")
        field.drip(channels, b"a", 0.2)


@attack
def unread_pipelines(field: Field) -> None:
    """One request behind the other, and no answer read."""
    for path in ("/health", "/models", "/queue", "/none"):
        block = request("GET", path) * 100
        with ExitStack() as stack:
            for channel in field.crowd(stack, field.count(8), SO_RCVBUF=2048):
                channel.settimeout(0.5)
                with suppress(OSError):
                    for _ in range(field.count(300_000 // 100, 10)):
                        channel.sendall(block)
            field.pause(3)


@attack
def bodies_behind_refusals(field: Field) -> None:
    """Bodies without end, behind heads that are refused at once."""
    blocks = [b"a" * MIB] * field.count(1000, 4)
    patience_s = 5.0 if field.is_full else 0.3
    for path in ("/none", "/generate", "/health"):
        begun = request("POST", path, Content_Type=JSON, Content_Length=99_999_999_999)
        chunked = request("POST", path, Content_Type=JSON, Transfer_Encoding="chunked")
        framed = [b"100000\r\n" + block + b"\r\n" for block in blocks]
        for door in field.urls:
            field.ask([begun, *blocks], door, patience_s)
            field.ask([chunked, *framed], door, patience_s)


@attack
def huge_heads(field: Field) -> None:
    """Long lines, many lines, long paths and long cookies."""
    long = "a" * field.count(1_000_000, 100_000)
    many = {f"X-{number}": "a" * 20 for number in range(field.count(20_000, 1000))}
    heads = [
        request("GET", "/health", X_Long=long),
        request("GET", "/health", Cookie=long),
        request("GET", "/health", **many),
        request("GET", "/" + long),
        request("GET", "/health?" + long),
        request("GET", "/health" + "/a" * 3000),
    ]
    for data in heads * field.count(50, 1):
        twice(field, data)


@attack
def malformed_http(field: Field) -> None:
    """All hostile requests that there are, and what is no HTTP at all."""
    corpus = [one.request for name, make in hostile.CLASSES.items() if name != "connections" for one in make()]
    garbage = [one.request for one in hostile.connections()]
    chosen = corpus if field.is_full else random.Random(4).sample(corpus, 60)
    field.all_at_once((partial(field.ask, data, "direct") for data in chosen), most=8)

    def throw(data: bytes, door: str) -> None:
        with suppress(OSError), field.channel(door) as channel:
            channel.settimeout(1)
            with suppress(OSError):
                channel.sendall(data)
            field.hear(channel)

    field.all_at_once(partial(throw, data, door) for data in garbage for door in field.urls)


# --------------------------------------------------------------------------------------------------------------- floods


@attack
def previews_at_many_widths(field: Field) -> None:
    """A large picture at a thousand widths, and a large film."""
    side = 5000 if field.is_full else 800
    noise = Image.effect_noise((side, side), 90).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", quality=95)
    picture, film = field.daemon.outputs / "noise.jpg", field.daemon.outputs / "film.mkv"
    picture.write_bytes(buffer.getvalue())
    film.write_bytes(hostile_media.endless(4096, 2160, 20) if field.is_full else hostile_media.endless(640, 360, 20))
    counts = {picture.name: field.count(1000, 20), film.name: field.count(200, 5)}
    asked = [request("GET", f"/preview/{name}?width={900 + n}") for name, count in counts.items() for n in range(count)]
    field.all_at_once((partial(field.ask, data) for data in asked), most=16)
    for path in (picture, film):
        path.unlink()


@attack
def growing_state(field: Field) -> None:
    """Submissions that are cancelled again: with long texts, new pictures and new keys; and dry runs and refusals."""
    long = {name: name[0] * 9999 for name in ("prompt", "negative_prompt")}
    numbers = iter(range(1_000_000, 2_000_000))
    lock = threading.Lock()

    def picture(number: int, size: int) -> bytes:
        padding = hostile.chunk(b"prVt", number.to_bytes(8, "big") + b"\0" * size)
        whole = small_png(number)
        return whole[:-12] + padding + whole[-12:]

    def cancelled(data: bytes) -> None:
        if answer := field.fetch(data):
            field.ask(request("DELETE", f"/queue/{json.loads(answer)['data']['task_id']}"), "direct")

    def one(_: int) -> None:
        with lock:
            number = next(numbers)
        data = with_file("image_start", picture(number, 200_000))
        key = f"{number:0200d}"
        cancelled(submitted(json.dumps(long).encode(), query="", Idempotency_Key=key))
        cancelled(submitted(data, FORM, query="", Idempotency_Key=key + "p"))
        field.ask(submitted(with_file("image_start", picture(number + 10**7, 200_000)), FORM), "direct")
        refused = with_file("image_start", picture(number + 2 * 10**7, 200_000)).replace(PROMPT, PART % b"prompt", 1)
        field.ask(submitted(refused, FORM, query=""), "direct")
        field.ask(submitted(data, FORM, query="", Idempotency_Key=key), "direct")  # of another body

    field.all_at_once((partial(one, number) for number in range(field.count(1000, 10))), most=4)


@attack
def large_pictures_cancelled(field: Field) -> None:
    """Files of 60 MiB each in tasks that are cancelled."""
    whole = small_png(9)
    for number in range(field.count(20, 3)):
        size = (60 if field.is_full else 1) * MIB
        padding = hostile.chunk(b"prVt", number.to_bytes(8, "big") + b"\0" * size)
        data = submitted(with_file("image_start", whole[:-12] + padding + whole[-12:]), FORM, query="")
        if answer := field.fetch(data):
            field.ask(request("DELETE", f"/queue/{json.loads(answer)['data']['task_id']}"), "direct")


@attack
def crowded_lists(field: Field) -> None:
    """Hundreds of tasks with long texts, while everybody wants to see the lists."""
    body = json.dumps({"prompt": "p" * 10_000, "negative_prompt": "n" * 9000}).encode()
    tasks: list[int] = []

    def submit(_: int) -> None:
        if answer := field.fetch(submitted(body, query="")):
            tasks.append(json.loads(answer)["data"]["task_id"])

    field.all_at_once((partial(submit, number) for number in range(field.count(800, 10))), most=4)
    paths = ["/queue", "/tasks?limit=200", "/tasks?limit=200&status=queued", "/models", "/outputs?limit=200"]
    asked = [request("GET", paths[number % len(paths)]) for number in range(field.count(2000, 20))]
    field.all_at_once((partial(field.ask, data) for data in asked), most=16)
    field.all_at_once(partial(field.ask, request("DELETE", f"/queue/{task_id}"), "direct") for task_id in tasks)


@attack
def browsers(field: Field) -> None:
    """Pages of other sites, and pages that have rebound a name of theirs to the daemon's address."""
    evil = "http://rebind.evil.example:7860"
    names = [
        {"Host": "rebind.evil.example:7860", "Origin": evil, "Sec_Fetch_Site": "same-origin"},
        {"Host": "rebind.evil.example:7860", "Referer": evil + "/"},
        {"Host": "rebind.evil.example:7860", "X_Forwarded_Host": "wangpd.example.lan", "Origin": evil},
        {"Origin": "http://evil.example", "Sec_Fetch_Site": "cross-site"},
        {"Host": "x" * 200 + ".example", "Origin": "null", "Sec_Fetch_Mode": "cors"},
    ]
    for number in range(field.count(2000, 10)):
        headers = names[number % len(names)]
        field.ask(request("POST", "/queue/resume", b"", **headers), "direct")
        field.ask(request("GET", "/tasks", **headers), "direct")


@attack
def refusals_in_numbers(field: Field) -> None:
    """What is not there, not allowed or not right, thousands of times."""
    wanted = [
        *(request("GET", path) for path in ("/none", "/status/999999999", "/download/none.mp4", "/preview/none.png")),
        request("DELETE", "/queue/999999999"),
        request("PUT", "/queue"),
        submitted(b'{"prompt": 1}'),
        submitted(b"{"),
        request("POST", "/models/wan_t2v_14B/download", b"", Content_Type=JSON),
    ]
    field.all_at_once((partial(field.ask, data) for data in wanted * field.count(1000, 5)), most=8)


@attack
def ranges(field: Field) -> None:
    """Ranges by the hundred, with conditions that contradict each other."""
    path = field.daemon.outputs / "ranges.png"
    path.write_bytes(small_png(1) + bytes(100_000))
    values = ["bytes=0-", "bytes=-1", "bytes=0-0,1-1", "bytes=" + "9" * 400 + "-", "bytes=1-" + "9" * 5000, '"x"', "*"]
    values += ["bytes=" + ",".join(f"{n}-{n + 1}" for n in range(0, 1500, 3)), "bytes=" + "0-0," * 1500, '"', ",,,"]
    values += ["Thu, 01 Jan 1970 00:00:00 GMT", "Mon, 01 Jan 99999 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -9999"]
    names = ["Range", "If-Range", "If-None-Match", "If-Match", "If-Modified-Since", "If-Unmodified-Since", "Accept"]

    def one(seed: int) -> None:
        fate = random.Random(seed)
        headers = {name: fate.choice(values) for name in fate.sample(names, 3)}
        place = fate.choice(["/download/ranges.png", "/preview/ranges.png"])
        field.ask(request(fate.choice(["GET", "GET", "HEAD"]), place, **headers), "direct")

    field.all_at_once((partial(one, number) for number in range(field.count(3000, 60))), most=8)
    path.unlink()


@attack
def lora_listings(field: Field) -> None:
    """A folder of thousands of files listed again and again, and requests that name hundreds which are not there."""
    folder = field.daemon.folder / "loras" / "wan"
    folder.mkdir(parents=True, exist_ok=True)
    header = json.dumps({f"{n}.lora_A.weight": {"shape": [1, 1]} for n in range(field.count(20_000, 100))}).encode()
    wide = len(header).to_bytes(8, "little") + header
    for number in range(field.count(3000, 30)):
        (folder / f"{number}.safetensors").write_bytes(b"\xff" * 8 if number else wide)
    wanted = [
        request("GET", "/loras"),
        submitted(json.dumps({"prompt": "a", "activated_loras": ["none"] * 500}).encode()),
        submitted(json.dumps({"prompt": "a", "activated_loras": ["0"], "loras_multipliers": "1 " * 5000}).encode()),
        submitted(json.dumps({"prompt": "a", "activated_loras": ["1", "../../x", "x" * 5000]}).encode()),
        submitted(json.dumps({"prompt": "a", "activated_loras": ["0"], "loras_multipliers": "1,"}).encode()),
    ]
    field.all_at_once((partial(field.ask, data) for data in wanted * field.count(200, 4)), most=8)
    for path in folder.iterdir():
        path.unlink()
