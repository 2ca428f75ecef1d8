"""The configuration: one row for each key of `wangpd.toml`, and how the file and the flags become a `Config`."""

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from marshmallow import RAISE, Schema, ValidationError, fields, validate

from engine import capabilities
from engine.api.fields import FIELD_OF, Text, between, each, first_fault, matches, one_of
from engine.files.place import Folder
from engine.job import EngineConfig
from engine.queue.endings import Limits

Part = TypeVar("Part")
UNIX = "unix:"  # before the path of a Unix socket
SYSTEM_CONFIG = Path("/etc/wangpd/wangpd.toml")
LEAST_STATE_MB = 16  # free on the disk of state_path, if min_free_mb is not less
FOLDERS = ("save_path", "state_path", "models_dir", "loras_dir")


def key(default: Any, rule: Callable[[Any], Any] | None = None, *, why: str) -> Any:
    """A configuration key: its default, the rule for its value, and one line of why."""
    return dataclasses.field(default=default, metadata={"why": why, "rule": rule})


def split_hosts(host: str | Sequence[str]) -> tuple[str, ...]:
    """The addresses of `host`: one, several with commas, or a list; without the brackets of IPv6."""
    texts = (host if isinstance(host, str) else ",".join(host)).split(",")
    return tuple(text.strip().removeprefix("[").removesuffix("]") for text in texts)


def check_hosts(host: str | Sequence[str]) -> None:
    """The rule for `host`; an empty one would mean every address."""
    for text in split_hosts(host):
        NOT_EMPTY(text)
        if text.startswith(UNIX) and not text.startswith(f"{UNIX}/"):
            raise ValidationError(f"{text!r} must have an absolute path, such as {UNIX}/run/wangpd/wangpd.sock")


@dataclass(frozen=True)
class Config:
    """Every key of `wangpd.toml`, in its order. Relative paths are relative to that file.

    What the generation process or the queue needs has its default in EngineConfig or Limits.
    """

    # fmt: off
    host: str | tuple[str, ...] = key("127.0.0.1", check_hosts,
        why="Address to listen on, or a list; unix:/PATH too. 0.0.0.0 and :: open it to the LAN: put a login in front.")
    port: int = key(7860, between(0, 65535),
        why="Port to listen on; 0 takes a free one and logs it.")
    base_path: str = key("", matches(r"(/[A-Za-z0-9_.~-]+)*$", "empty or begin with /, and not end with it"),
        why="Path under which a proxy serves the daemon, such as /video; the proxy strips it, links include it.")
    save_path: Path = key(Path("outputs"),
        why="Folder of the finished files; it alone decides what is listed and served.")
    state_path: Path = key(EngineConfig.state_path,
        why="Folder of the queue's journal, the input pictures, the thumbnails and the engine's caches.")
    models_dir: Path = key(Path("models"),
        why="Folder of the models' weights, one folder a model, named by its id.")
    loras_dir: Path = key(Path("loras"),
        why="Folder of LoRA files, one folder a family of models.")

    allowed_hosts: tuple[str, ...] = key((),
        why="Further names under which browsers may ask, such as a proxy's public name; if any, programs need one too.")
    cors_origins: tuple[str, ...] = key((),
        why="Origins of web pages that may use the API, such as https://example.org.")
    token_file: str = key("",
        why="File with a token that requests must send as Authorization: Bearer; none: no login.")
    trusted_proxies: tuple[str, ...] = key((),
        why="Addresses of proxies whose X-Forwarded-For and -Host are believed, and which may hold every connection.")

    allow_download: bool = key(EngineConfig.allow_download,
        why="Fetch missing weights from the Hugging Face hub when a task needs them.")
    allow_api_download: bool = key(False,
        why="Let POST /api/v1/models/ID/download fetch weights; wangpd models download works without it.")
    default_model: str = key("wan_demo",
        why="Model of a request that names none; GET /api/v1/models lists the ids.")
    device: str = key(EngineConfig.device, matches(r"auto$|cpu$|mps$|cuda(:\d+)?$", "auto, cuda, cuda:N, mps or cpu"),
        why="Where to generate: auto, cuda, cuda:1, mps or cpu; auto takes the best that is there.")
    devices: tuple[str, ...] = key((), each(matches(r"cpu$|cuda:\d+$", "cuda:N or cpu")),
        why="Several devices, a worker each, such as cuda:0 and cuda:1; they share the queue. None: device alone.")
    context_parallel: bool = key(False,
        why="All devices compute each task together, one task at a time, instead of a task each: for large tasks.")
    warm_start: bool = key(False,
        why="Start the worker with the daemon and load the model that was last in use, else default_model.")
    profile: float = key(EngineConfig.profile, one_of(0, 1, 2, 3, 3.5, 4, 4.5, 5),
        why="GPU memory: 0 chooses, 1 denoiser resident, 2 and 4 by block, 3 by part, 5 by layer, 4.5 unpinned.")
    attention_mode: str = key(EngineConfig.attention_mode, one_of(capabilities.AUTO, *capabilities.KERNELS),
        why="Attention kernel: auto measures, sdpa and cudnn are torch's, else flash, flash3, sage, sage2 or xformers.")
    transformer_quantization: str = key(EngineConfig.transformer_quantization, one_of(*capabilities.KINDS),
        why="Weights of the denoisers: none as they are, int8, fp8, nf4, your own gguf; auto is int8 where it helps.")
    vae_config: int = key(EngineConfig.vae_config, one_of(0, 1, 2, 3),
        why="VAE tiles on a GPU: 1, 2, 3 for 512, 256, 128 pixels; 0 chooses by the card.")
    vae_precision: str = key(EngineConfig.vae_precision, one_of("auto", "16", "32"),
        why="Bits in which the VAE decodes: auto (16 on CUDA where that is safe), 16 or 32.")
    compile: bool = key(EngineConfig.compile,
        why="Compile the denoisers' blocks: 1.3 to 1.4 times the speed on a GPU, after a slow first task.")
    convert_float32: bool = key(EngineConfig.convert_float32,
        why="Rewrite float32 weights once in the dtype they are computed in, into models_dir/.prepared.")
    prompt_cache_mb: int = key(EngineConfig.prompt_cache_mb, between(0, 10**9),
        why="MiB of RAM for encoded prompts, so that the same prompt is not encoded again; 0: off.")
    mmaudio_enabled: int = key(0, one_of(0),
        why="Sound made to fit a video: 0, since diffusers has no MMAudio.")
    idle_unload_s: float = key(Limits.idle_unload_s, between(0, 10**7),
        why="Seconds of idleness after which all GPU memory is given back; 0: never.")

    image_format: str = key(EngineConfig.image_format, one_of("png", "jpeg", "webp"),
        why="Format of pictures: png, jpeg or webp.")
    audio_format: str = key(EngineConfig.audio_format, one_of("wav", "flac", "mp3"),
        why="Format of sound: wav, flac or mp3.")
    video_crf: int = key(EngineConfig.video_crf, between(0, 51),
        why="Quality of videos: x264's CRF, lower is better and larger.")
    video_preset: str = key(EngineConfig.video_preset,
        one_of("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"),
        why="Speed of the video encoder: x264's presets; slower ones make smaller files.")
    video_encoder: str = key(EngineConfig.video_encoder, one_of("x264", "nvenc"),
        why="Encoder of videos: x264, or nvenc for a card's own; where that is missing, x264 all the same.")
    embed_settings: bool = key(EngineConfig.embed_settings,
        why="Write a file's settings and seed into the file, as JSON.")
    min_free_mb: int = key(1024, between(0, 10**9),
        why="MiB that must be free on the disk of save_path before a task starts.")
    keep_outputs_days: float = key(0.0, between(0, 36500),
        why="Days after which the files that wangpd made are deleted, and no others; 0: never.")
    keep_outputs_mb: int = key(0, between(0, 10**9),
        why="MiB of files that wangpd made; the oldest beyond it are deleted, and no others; 0: no limit.")

    max_queue: int = key(Limits.max_queue, between(1, 1_000_000),
        why="Tasks that may wait; one more is answered 503.")
    max_body_mb: int = key(64, between(1, 2048),
        why="Largest request body in MiB; base64 pictures need a third more than their files.")
    max_inputs_mb: int = key(10_240, between(1, 10**9),
        why="MiB of pictures, videos and sounds kept for tasks; those of ended tasks go first.")
    max_image_pixels: int = key(50_000_000, between(1, 10**9),
        why="Largest input picture in pixels, so that a small file can't fill the memory.")
    max_connections: int = key(500, between(1, 100_000),
        why="Connections at a time, half of them from one address; one more is answered 503, except for /health.")
    body_timeout_s: float = key(120.0, between(1, 86400),
        why="Seconds in which a request's body must have arrived.")

    max_attempts: int = key(Limits.max_attempts, between(1, 100),
        why="How often a task may start when the daemon dies under it, before it fails.")
    on_restart: str = key(Limits.on_restart, one_of("resume", "pause", "fail"),
        why="What becomes of a task that ran when the daemon died: resume, pause or fail; a stop puts it back.")
    history_days: int = key(30, between(1, 36500),
        why="Days that the record of an ended task is kept; its files stay.")
    history_count: int = key(Limits.history_count, between(1, 10_000_000),
        why="Records of ended tasks that are kept at most.")
    cancel_grace_s: float = key(10.0, between(0, 3600),
        why="Seconds that a cancelled task may take to stop before its process is ended.")
    stop_grace_s: float = key(15.0, between(0, 3600),
        why="Seconds that a shutdown waits for the running task; keep it under TimeoutStopSec.")
    step_timeout_s: float = key(Limits.step_timeout_s, between(1, 86400),
        why="Seconds without progress that end a task, six times that while it loads; twenty usual steps if longer.")

    log_level: str = key(EngineConfig.log_level, one_of("debug", "info", "warning", "error"),
        why="How much is logged: debug, info, warning or error.")
    api_only: bool = key(False,
        why="Accepted for compatibility with WanGP: wangpd has no other mode than its API.")
    # fmt: on

    shown_save_path: str = "outputs"  # `save_path` for clients: as it was written, of an absolute path the last part
    save_mounted: bool = EngineConfig.save_mounted  # looked at when the daemon starts
    instance: str = EngineConfig.instance  # read from `state_path` once that is locked

    def part(self, cls: type[Part]) -> Part:
        """The part of the configuration that a component needs: a `cls`, whose fields are named like keys."""
        return cls(**{field.name: getattr(self, field.name) for field in dataclasses.fields(cast(Any, cls))})

    def engines(self) -> list[EngineConfig]:
        """The part that a generation process needs, for each of them."""
        leads = self.devices[:1] if self.context_parallel else self.devices
        return [dataclasses.replace(self, device=device).part(EngineConfig) for device in leads or (self.device,)]

    @property
    def team(self) -> tuple[str, ...]:
        """The devices that compute each task together with the first one."""
        return self.devices[1:] if self.context_parallel else ()

    @property
    def history_s(self) -> float:
        """`history_days` in seconds."""
        return self.history_days * 86400.0

    def folders(self) -> tuple[Folder, ...]:
        """The folders that must take files for a task to start, and how much room each must have."""
        state_mb = min(self.min_free_mb, LEAST_STATE_MB)
        asked = f"min_free_mb asks for {self.min_free_mb}: delete old outputs"
        needed = f"{state_mb} are needed for the queue: free some"
        return (
            Folder(self.save_path, "save_path", self.min_free_mb * 2**20, asked, mounted=self.save_mounted),
            Folder(self.state_path, "state_path", state_mb * 2**20, needed),
        )


KEYS = {field.name: field for field in dataclasses.fields(Config) if "why" in field.metadata}
NOT_EMPTY = validate.Length(1, error="must not be empty")


class CantStart(Exception):
    """This machine does not let the daemon start: one sentence that names the key, the value and the remedy."""


class ConfigError(Exception):
    """The daemon can't start like this: one sentence that names the key, the value and what is allowed."""


def load_config(file: Path | None, flags: Mapping[str, Any]) -> Config:
    """The configuration of `file`, or of the first default place that has one; `flags` override it.

    Raises ConfigError. Without any file the defaults hold, and paths are relative to the working directory.
    """
    path = file or next((place for place in (Path("wangpd.toml"), SYSTEM_CONFIG) if place.is_file()), None)
    try:
        values = _checked(tomllib.loads(path.read_text("utf-8")), str(path)) if path else {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name another file with --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    values |= _checked(flags, "command line")
    base = path.parent if path else Path()
    shown = Path(values.get("save_path", Config.save_path))
    values["shown_save_path"] = shown.name if shown.is_absolute() else str(shown)
    if token_file := values.get("token_file"):  # systemd's ${CREDENTIALS_DIRECTORY} may be in it
        values["token_file"] = str(Path(base, os.path.expandvars(token_file)).absolute())
    for name in FOLDERS:
        root = Path() if name in flags else base
        values[name] = Path(root, values.get(name, KEYS[name].default)).absolute()
    config = Config(**values)
    if fault := _missing(config):
        raise ConfigError(fault)
    return config


def _missing(config: Config) -> str:
    """What a key asks for and this machine can't do, with what helps; "" if there is nothing."""
    devices = config.devices or (config.device,)
    faults = (
        capabilities.attention_fault(config.attention_mode),
        capabilities.team_fault(config.devices, config.attention_mode) if config.context_parallel else "",
        *(capabilities.compile_fault(device) for device in devices if config.compile),
        *(capabilities.quantization_fault(config.transformer_quantization, device) for device in devices),
    )
    return next(filter(None, faults), "")


def _checked(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return dict(Schema.from_dict({name: _field(row) for name, row in KEYS.items()})(unknown=RAISE).load(values))
    except ValidationError as error:
        name, sentence = first_fault(error)
        if name.partition("[")[0] not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"the keys are {', '.join(KEYS)}"
            sentence = f"there is no such key; {hint}"
        raise ConfigError(f"{where}: {name}: {sentence}") from None


def _field(row: dataclasses.Field[Any]) -> fields.Field[Any]:
    kind, rule = FIELD_OF[row.type], row.metadata["rule"]
    required = kind is Text and row.default != ""
    return kind(validate=[rule] if rule else [NOT_EMPTY] if required else [])
