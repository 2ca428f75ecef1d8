"""What comes from outside, each as a function of bytes; it raises if a promise is broken, and only then.

HTTP targets send their bytes to the whole application in this process: no answer is a 5xx but 503. File targets call
what reads a file, which may raise the one exception that it names. tests/test_fuzz.py replays the corpus of each
target and mutates it by hypothesis; `make fuzz` mutates it by atheris, guided by coverage.
"""

import asyncio
import contextlib
import functools
import io
import itertools
import json
import math
import struct
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
from aiohttp import web

import wangpd
from engine.api.config import Config
from engine.api.files import byte_range
from engine.catalog import loras, weights
from engine.catalog.models import PACKAGE, Catalog
from engine.files import footage, media
from tests import hostile_media
from tests.honest import parts, small_png

MAX_PIXELS = 1_000_000
PATIENCE_S = 10  # for an answer
CORPUS = Path(__file__).parent / "corpus"
CATALOG = Catalog.load()
DEMO = CATALOG.get("wan_demo")
RANGE_HEADERS = ("Range", "If-Range", "If-None-Match", "If-Match", "If-Modified-Since", "If-Unmodified-Since")


class Broken(Exception):
    """A promise that does not hold for this input."""


# ----------------------------------------------------------------------------------------------------------------- HTTP


class Application:
    """The daemon's application on a Unix socket, with a loop in a thread."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="wangpd-fuzz-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="application", daemon=True)
        self._thread.start()
        self._await(self._start(Path(self._folder.name)))

    def ask(self, request: bytes) -> int:
        """Send one request and return the status of its answer; 0 if the connection was closed instead."""
        return self._await(self._ask(request))

    def close(self) -> None:
        """End the application."""
        self._await(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()

    def _await(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _start(self, folder: Path) -> None:
        config = Config(
            host=f"unix:{folder}/socket",
            save_path=folder / "outputs",
            state_path=folder / "state",
            models_dir=folder / "models",
            max_image_pixels=MAX_PIXELS,
            body_timeout_s=0.2,
        )
        for path in (config.save_path, config.state_path):
            path.mkdir()
        (config.save_path / "there.png").write_bytes(small_png(1) + bytes(1000))
        self._socket = f"{folder}/socket"
        self._runner = web.AppRunner(wangpd.make_app(config), handle_signals=False)
        self._listeners = await wangpd.bind(self._runner, config)
        await self._runner.setup()
        await self._listeners.start_serving()

    async def _stop(self) -> None:
        self._listeners.close()
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # connections that were closed just now
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _ask(self, request: bytes) -> int:
        reader, writer = await asyncio.open_unix_connection(self._socket)
        try:
            writer.write(request)
            line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
            while line.startswith(b"HTTP/1.1 1"):  # 100 Continue
                await asyncio.wait_for(reader.readline(), PATIENCE_S)
                line = await asyncio.wait_for(reader.readline(), PATIENCE_S)
        except ConnectionError:
            return 0
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
        return int(line.split()[1]) if line else 0


@functools.cache
def application() -> Application:
    """The one of this process."""
    return Application()


def require_answer(request: bytes, *, owed: bool = True) -> None:
    """Send it. Raises Broken for a 5xx but 503, and for no answer where one is owed."""
    status = application().ask(request)
    if (status >= 500 and status != 503) or (owed and not status):
        raise Broken(f"answered {status or 'nothing'}")


def posted(data: bytes, content_type: bytes, target: bytes = b"/api/v1/generate?dry_run=1") -> bytes:
    """A request with this body, after which the connection ends."""
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (target, content_type, len(data)) + data


def json_body(data: bytes) -> None:
    """The body of a submission, as JSON."""
    require_answer(posted(data, b"application/json"))


def form_body(data: bytes) -> None:
    """The body of a submission, as a form; the boundary is x."""
    require_answer(posted(data, b"multipart/form-data; boundary=x"))


def request_head(data: bytes) -> None:
    """The lines of a head, after the first one; the first byte chooses the method and the path."""
    starts = (
        b"GET /api/v1/download/there.png",
        b"GET /api/v1/preview/there.png",
        b"POST /api/v1/generate",
        b"GET /api/v1/outputs",
    )
    start = starts[data[0] % len(starts)] if data else starts[0]
    head = start + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + data[1:] + b"\r\n\r\n"
    require_answer(head, owed=False)


def conditions(data: bytes) -> None:
    """Ranges and conditions of a download, a line each."""
    lines = zip(RANGE_HEADERS, data.split(b"\n"), strict=False)
    fields = b"".join(b"%s: %s\r\n" % (name.encode(), line.strip(b"\r\0")) for name, line in lines if line)
    head = b"GET /api/v1/download/there.png HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    require_answer(head + fields + b"\r\n")


def target(data: bytes) -> None:
    """A path and a query."""
    line = b"GET /api/v1/" + bytes(byte for byte in data if byte > 0x20) + b" HTTP/1.1\r\n"
    require_answer(line + b"Host: localhost\r\nConnection: close\r\n\r\n")


def ranges(data: bytes) -> None:
    """A Range header; what is asked for is within the file."""
    size = len(data)
    with contextlib.suppress(web.HTTPRequestRangeNotSatisfiable):
        part = byte_range("bytes=" + data.decode("latin-1"), size)
        if part is not None and not 0 <= part.start < part.stop <= size:
            raise Broken(f"{part} of {size}")


# ---------------------------------------------------------------------------------------------------------------- files


@functools.cache
def workshop() -> Path:
    """A folder of this process for files that only live for one input."""
    folder = tempfile.TemporaryDirectory(prefix="wangpd-fuzz-")
    made.append(folder)
    return Path(folder.name)


made: list[tempfile.TemporaryDirectory[str]] = []  # removed with the process
numbers = itertools.count()


@contextlib.contextmanager
def fresh_folder() -> Iterator[Path]:
    """A new one, since what is known of a file is remembered by its path."""
    folder = workshop() / str(next(numbers))
    folder.mkdir()
    try:
        yield folder
    finally:
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        folder.rmdir()


def header(tensors: Any) -> bytes:
    """A safetensors file with this header."""
    text = tensors if isinstance(tensors, bytes) else json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def model_shapes() -> dict[str, Any]:
    """The header of a denoiser into which LORA fits."""
    return {"blocks.0.attn1.to_q.weight": {"dtype": "F32", "shape": [16, 16], "data_offsets": [0, 1024]}}


LORA = {
    "transformer.blocks.0.attn1.to_q.lora_A.weight": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]},
    "transformer.blocks.0.attn1.to_q.lora_B.weight": {"dtype": "F32", "shape": [16, 4], "data_offsets": [256, 512]},
}


def choose_lora(lora: bytes, model: bytes, multipliers: str = "") -> None:
    """Choose the LoRA in this file for the model whose denoiser is in that one."""
    with fresh_folder() as folder:
        for path, data in (
            (folder / DEMO.family / "a.safetensors", lora),
            (folder / "transformer" / "model.safetensors", model),
        ):
            path.parent.mkdir()
            path.write_bytes(data)
        with contextlib.suppress(loras.BadLora):
            for lora_chosen in loras.chosen(["a"], multipliers, DEMO, folder, folder):
                strengths = [strength for phase in lora_chosen.phases for strength in phase]
                if not all(map(math.isfinite, strengths)):
                    raise Broken(f"strengths {strengths}")


def lora_file(data: bytes) -> None:
    """A LoRA file as it lies in the folder."""
    choose_lora(data, header(model_shapes()))


def lora_header(data: bytes) -> None:
    """The JSON of a LoRA's header, whose length is right."""
    choose_lora(header(data), header(model_shapes()))


def multipliers(data: bytes) -> None:
    """The strengths of a LoRA."""
    with contextlib.suppress(UnicodeDecodeError):
        choose_lora(header(LORA), header(model_shapes()), data.decode())


def weights_header(data: bytes) -> None:
    """The JSON of a header of the model's own weights."""
    choose_lora(header(LORA), header(data))


def model_folder(data: bytes) -> None:
    """A folder from a hub: the first byte chooses which of its small files this is."""
    names = ("model_index.json", "transformer/model.safetensors.index.json", "transformer/config.json")
    chosen = names[data[0] % len(names)] if data else names[0]
    model = CATALOG.get("wan_t2v_1.3B")
    with fresh_folder() as folder:
        own = folder / model.id
        (own / "transformer").mkdir(parents=True)
        (own / "model_index.json").write_text('{"transformer": ["diffusers", "X"]}')
        (own / "transformer" / "config.json").write_text("{}")
        (own / "transformer" / "a.safetensors").write_bytes(header(model_shapes()))
        (own / chosen).write_bytes(data[1:])
        weights.locate(model, folder)


def gguf_file(data: bytes) -> None:
    """A checkpoint in GGUF, which a worker opens with the library that diffusers uses; it translates all exceptions."""
    path = workshop() / "a.gguf"
    path.write_bytes(data)
    with contextlib.suppress(Exception):
        gguf.GGUFReader(path)


def picture(data: bytes) -> None:
    """A picture that is sent."""
    with contextlib.suppress(media.BadImage):
        media.check_image(io.BytesIO(data), MAX_PIXELS)


def video(data: bytes) -> None:
    """A video that is sent."""
    with contextlib.suppress(footage.BadFootage):
        footage.check(io.BytesIO(data), "video", MAX_PIXELS)


def sound(data: bytes) -> None:
    """A sound that is sent."""
    with contextlib.suppress(footage.BadFootage):
        footage.check(io.BytesIO(data), "audio", MAX_PIXELS)


# ---------------------------------------------------------------------------------------------------------------- seeds


def gguf_seed() -> bytes:
    """A GGUF with a number, a text, a list and a tensor."""
    path = workshop() / "seed.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_uint32("wan.block_count", 1)
    writer.add_array("wan.names", ["a", "b"])
    import numpy as np

    writer.add_tensor("blocks.0.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def films() -> list[bytes]:
    """Small valid videos."""
    coded = hostile_media.packets(64, 64, 5)
    return [
        hostile_media.film(64, 64, coded, "mp4"),
        hostile_media.film(64, 64, coded),
        hostile_media.film(64, 64, coded, live=True),
        hostile_media.larger_jpegs(200),
    ]


def tones() -> list[bytes]:
    """Small valid sounds."""
    wave = hostile_media.wave(4000)
    return [
        wave,
        *(hostile_media.silence(*kind, 0.6) for kind in (("flac", "flac"), ("ogg", "flac"), ("mp3", "libmp3lame"))),
    ]


def pictures() -> list[bytes]:
    """Small valid pictures."""
    made = [hostile_media.plain(kind, 20, 10) for kind in ("PNG", "JPEG", "WEBP")]
    turned = [hostile_media.moving(kind, 16, 3) for kind in ("PNG", "WEBP")]
    return [*made, *turned, hostile_media.plain("JPEG", 20, 10, progressive=True), hostile_media.scans(64, 3)]


def bodies() -> list[bytes]:
    """JSON that is accepted, or nearly."""
    return [
        b'{"prompt": "a"}',
        b'{"prompt": "a", "resolution": "64x64", "video_length": "5s", "seed": -1, "guidance_scale": 5.0}',
        b'{"prompt": "\\u00e9\\ud83d\\ude00", "activated_loras": ["a"], "loras_multipliers": "1;0 0.5,1", "x": [{}]}',
        b'{"prompt": "a", "image_start": "data:image/png;base64,iVBORw0KGgo=", "image_refs": ["", "AAAA"]}',
        '{"prompt": "a"}'.encode("utf-16"),
    ]


def forms() -> list[bytes]:
    """Forms that are accepted, or nearly."""
    whole = b"".join(parts(1))
    nested = b"--x\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n--y\r\n\r\nz\r\n--y--\r\n--x--\r\n"
    named = b"--x\r\nContent-Disposition: form-data; name*=utf-8''prompt\r\n"
    named += b"Content-Transfer-Encoding: base64\r\n\r\nYQ==\r\n--x--\r\n"
    return [whole, nested, named, b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n']


SEEDS: Mapping[str, Callable[[], list[bytes]]] = {
    "json_body": bodies,
    "form_body": forms,
    "request_head": lambda: [
        b'\0Range: bytes=0-5\r\nIf-Range: "x"',
        b"\2Content-Type: application/json\r\nContent-Length: 2",
    ],
    "conditions": lambda: [b'bytes=0-5\n"x"\nW/"y", *\n"z"\nThu, 01 Jan 1970 00:00:00 GMT', b"bytes=-1,5-"],
    "target": lambda: [
        b"status/1?wait=1",
        b"preview/there.png?width=64",
        b"outputs?limit=5&offset=1",
        b"models/wan_demo",
    ],
    "ranges": lambda: [b"0-5", b"-1", b"1-2, 3-", b"5-"],
    "lora_file": lambda: [header(LORA)],
    "lora_header": lambda: [json.dumps(LORA).encode()],
    "multipliers": lambda: [b"1", b"0.5,1;0", b"# a\n1 2"],
    "weights_header": lambda: [json.dumps(model_shapes()).encode()],
    "model_folder": lambda: [
        b"\0" + (PACKAGE / DEMO.builtin / "model_index.json").read_bytes(),
        b'\1{"weight_map": {"a": "a.safetensors"}}',
        b"\2{}",
    ],
    "gguf_file": lambda: [gguf_seed()],
    "picture": pictures,
    "video": films,
    "sound": tones,
}
TARGETS: Mapping[str, Callable[[bytes], None]] = {name: globals()[name] for name in SEEDS}


def corpus(name: str) -> list[bytes]:
    """What was found once, in the order of the files' names."""
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*")) if path.is_file()]
