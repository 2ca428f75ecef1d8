"""engine/gpu/save/encode.py: frames become files that are whole, true in colour, with their settings inside."""

import io
import json
import os
import pickle
import re
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from threading import Barrier
from typing import Any

import av
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from engine.files import media
from engine.files.outputs import Outputs
from engine.files.publish import published
from engine.gpu.save import encode
from engine.job import STORAGE_FAULT, EngineError, Job
from tests.embedded import read_settings
from tests.processes import children, command

STARTED = datetime(2026, 11, 22, 21, 5, 33, tzinfo=UTC)
IMAGES = [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")]
SETTINGS: dict[str, Any] = {
    "plain": {"prompt": "a cat", "seed": 42, "guidance_scale": 5.0, "loras": [], "image_start": None},
    "unicode": {"prompt": "Möwe 猫 😀 \u202e rtl \u00a0"},
    "quotes": {"prompt": """it's "quoted" `so` $HOME %s {x} <b> & | ;"""},
    "ffmetadata": {"prompt": "a=b;c#d\\e\\\\f\\\n;comment\n[CHAPTER]\ntitle=x\n#\\"},
    "newlines": {"prompt": "one\ntwo\r\nthree\rfour\tfive\n\n"},
    "control": {"prompt": "".join(map(chr, range(32))) + "\x7f\u2028"},
    "surrogate": {"prompt": "half \ud83d of a pair"},
    "long": {"prompt": "word " * 2_000},
    "longest": {"prompt": "😀" * 10_000, "negative_prompt": '\\"' * 5_000},
    "empty": {},
}


def job(**changes: Any) -> Job:
    fields: dict[str, Any] = {
        "model": "wan_demo",
        "task": "t2v",
        "prompt": "A cat, playing piano!",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "frames": 5,
        "fps": 16,
        "steps": 2,
        "guidance_scale": 5.0,
        "embedded_guidance_scale": 0.0,
        "flow_shift": 5.0,
        "seed": 42,
    }
    return Job(**fields | changes)


def plain_frames(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64), count: int = 5) -> encode.Pixels:
    width, height = size
    return np.full((count, height, width, 3), colour, np.uint8)


def noise_frames(count: int = 5, width: int = 64, height: int = 64) -> encode.Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), np.uint8)


def decoded(path: Path) -> encode.Pixels:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a shell script in ffmpeg's place, outside the output folder."""
    path = folder.parent / f"{folder.name}-ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))


def failure(folder: Path, frames: encode.Pixels | None = None) -> EngineError:
    """The error of a video that can't be saved in `folder`, which must be left empty."""
    with pytest.raises(EngineError) as caught:
        encode.write_video(folder / "x.mp4", plain_frames((9, 9, 9)) if frames is None else frames, 16, {"a": 1})
    assert left_in(folder) == []
    return caught.value


# ----------------------------------------------------------------------------------------------------------- names


def test_a_name_tells_when_which_task_what_and_which_seed() -> None:
    name = encode.output_name(job(), 42, 123, STARTED, ".mp4", instance="1f3a9c")
    assert name == "20261122-210533_t000123-1f3a9c_a-cat-playing-piano_s42.mp4"


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("", "untitled"),
        ("猫 😀", "untitled"),
        ("../../etc/passwd", "etc-passwd"),
        ("Ünïcödé Straße", "unicode-strae"),
        ("-- a\0b\n_c --", "a-b-c"),
        ("x" * 100, "x" * 40),
        ("y" * 39 + " tail", "y" * 39),
    ],
)
def test_a_slug_is_short_and_plain(prompt: str, slug: str) -> None:
    name = encode.output_name(job(prompt=prompt), 1, 1, STARTED, ".png", instance="1f3a9c")
    assert name == f"20261122-210533_t000001-1f3a9c_{slug}_s1.png"


@given(st.text(st.characters(categories=None), max_size=200))
def test_any_prompt_gives_a_safe_name(prompt: str) -> None:
    name = encode.output_name(job(prompt=prompt), 2**63 - 1, 1, STARTED, ".mp4", instance="1f3a9c")
    assert re.fullmatch(r"\d{8}-\d{6}_t\d{6}-1f3a9c_[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?_s\d+\.mp4", name)


@pytest.mark.parametrize("task_id", [1, 123, 1_234_567])
def test_the_names_given_are_the_names_that_a_broken_attempt_is_known_by(tmp_path: Path, task_id: int) -> None:
    name = encode.output_name(job(prompt="x_t000001_y"), 7, task_id, STARTED, ".mp4", instance="1f3a9c")
    for left in (name, f".{name}.part"):
        (tmp_path / left).touch()
    assert Outputs(tmp_path, tmp_path / "cache", instance="1f3a9c").remove_attempt(task_id) == 2


# ---------------------------------------------------------------------------------------------------------- videos


def test_a_video_has_its_frames_its_rate_and_its_size(tmp_path: Path) -> None:
    encode.write_video(tmp_path / "x.mp4", noise_frames(9, 96, 64), 24, None)
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (9, 24, 96, 64)
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert len(decoded(tmp_path / "x.mp4")) == 9


def test_ffmpeg_makes_way_for_the_generation(tmp_path: Path) -> None:
    seen = []

    def frames() -> Iterator[encode.Pixels]:
        for frame in noise_frames(count=2):
            encoders = [pid for pid in children(os.getpid()) if "ffmpeg" in command(pid)]
            seen.append([os.getpriority(os.PRIO_PROCESS, pid) for pid in encoders])
            yield frame

    encode.write_video(tmp_path / "a.mp4", frames(), 8, None)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert (len(seen[0]), len(seen[1])) == (0, 1)
    assert seen[1][0] > own


def test_a_single_frame_is_a_video(tmp_path: Path) -> None:
    encode.write_video(tmp_path / "x.mp4", noise_frames(1), 16, None)
    assert decoded(tmp_path / "x.mp4").shape == (1, 64, 64, 3)


def test_the_index_comes_before_the_pixels(tmp_path: Path) -> None:
    encode.write_video(tmp_path / "x.mp4", noise_frames(), 16, SETTINGS["longest"])
    data = (tmp_path / "x.mp4").read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("size", [(64, 64), (256, 144), (1280, 720)])
@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)])
def test_a_colour_comes_back_as_it_went_in(tmp_path: Path, size: tuple[int, int], colour: tuple[int, int, int]) -> None:
    encode.write_video(tmp_path / "x.mp4", plain_frames(colour, size, count=2), 16, None)
    assert np.abs(decoded(tmp_path / "x.mp4").astype(int) - colour).max() <= 4


def test_the_file_says_that_its_colours_are_bt709(tmp_path: Path) -> None:
    encode.write_video(tmp_path / "x.mp4", plain_frames((255, 0, 0)), 16, None)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(tmp_path / "x.mp4")]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    assert "yuv420p(tv, bt709, progressive)" in found


@pytest.mark.parametrize(("size", "stored"), [((65, 64), (66, 64)), ((64, 63), (64, 64)), ((33, 17), (34, 18))])
def test_an_odd_side_gains_a_copy_of_its_edge(tmp_path: Path, size: tuple[int, int], stored: tuple[int, int]) -> None:
    encode.write_video(tmp_path / "x.mp4", plain_frames((200, 120, 40), size), 16, None)
    frames = decoded(tmp_path / "x.mp4")
    assert (frames.shape[2], frames.shape[1]) == stored
    assert np.abs(frames.astype(int) - (200, 120, 40)).max() <= 4


def test_frames_that_are_a_view_are_written_as_they_look(tmp_path: Path) -> None:
    frames = np.zeros((3, 3, 64, 64), np.uint8)  # (3, F, H, W), as a decoder leaves them
    frames[0] = 255
    encode.write_video(tmp_path / "x.mp4", frames.transpose(1, 2, 3, 0), 16, None)
    assert np.abs(decoded(tmp_path / "x.mp4").astype(int) - (255, 0, 0)).max() <= 4


def test_the_time_stamp_is_the_time_of_completion(tmp_path: Path) -> None:
    before = time.time()
    encode.write_video(tmp_path / "x.mp4", noise_frames(), 16, None)
    assert before - 1 <= (tmp_path / "x.mp4").stat().st_mtime <= time.time() + 1


def test_a_better_quality_takes_more_bytes(tmp_path: Path) -> None:
    for crf in (10, 40):
        encode.write_video(tmp_path / f"{crf}.mp4", noise_frames(), 16, None, crf=crf, preset="ultrafast")
    assert (tmp_path / "10.mp4").stat().st_size > (tmp_path / "40.mp4").stat().st_size


def test_a_name_like_a_pattern_or_an_address_is_only_a_name(tmp_path: Path) -> None:
    for name in ("pipe:1.mp4", "100%d.mp4", "-y.mp4"):
        encode.write_video(tmp_path / name, plain_frames((1, 2, 3)), 16, None)
    assert left_in(tmp_path) == ["-y.mp4", "100%d.mp4", "pipe:1.mp4"]


# ---------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(("format", "suffix"), IMAGES)
def test_a_picture_is_written_in_its_format(tmp_path: Path, format: encode.ImageFormat, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    encode.write_image(path, plain_frames((200, 120, 40), (65, 33))[0], None, format)
    with Image.open(path) as image:
        assert (image.format, image.size) == (format.upper(), (65, 33))
        assert np.abs(np.asarray(image).astype(int) - (200, 120, 40)).max() <= 4
    assert left_in(tmp_path) == [path.name]


def test_a_png_keeps_every_pixel(tmp_path: Path) -> None:
    frame = noise_frames(1)[0]
    encode.write_image(tmp_path / "x.png", frame, {"a": 1}, "png")
    assert np.array_equal(np.asarray(media.open_image(tmp_path / "x.png")), frame)


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_survive_in_a_video(tmp_path: Path, case: str) -> None:
    encode.write_video(tmp_path / "x.mp4", plain_frames((1, 2, 3)), 16, SETTINGS[case])
    assert read_settings(tmp_path / "x.mp4") == SETTINGS[case]
    assert len(decoded(tmp_path / "x.mp4")) == 5


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize(("format", "suffix"), IMAGES)
def test_settings_survive_in_a_picture(tmp_path: Path, case: str, format: encode.ImageFormat, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    encode.write_image(path, noise_frames(1)[0], SETTINGS[case], format)
    assert read_settings(path) == SETTINGS[case]
    assert media.check_image(io.BytesIO(path.read_bytes()), 10_000) == (64, 64)


@pytest.mark.parametrize("case", ["plain", "quotes", "ffmetadata", "unicode", "longest"])
def test_the_comment_is_read_by_ffmpeg_too(tmp_path: Path, case: str) -> None:
    encode.write_video(tmp_path / "x.mp4", plain_frames((1, 2, 3)), 16, SETTINGS[case])
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "x.mp4"), "-f", "ffmetadata", "-"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (comment,) = re.findall(r"^comment=(.*)$", text, re.MULTILINE)
    assert json.loads(re.sub(r"\\([\\=;#])", r"\1", comment)) == SETTINGS[case]


def test_a_picture_carries_its_settings_where_other_tools_look(tmp_path: Path) -> None:
    encode.write_image(tmp_path / "x.png", noise_frames(1)[0], {"seed": 1}, "png")
    encode.write_image(tmp_path / "x.jpg", noise_frames(1)[0], {"seed": 1}, "jpeg")
    with Image.open(tmp_path / "x.png") as png, Image.open(tmp_path / "x.jpg") as jpeg:
        assert png.info["Comment"] == '{"seed": 1}'
        assert jpeg.getexif().get_ifd(0x8769)[0x9286] == b'ASCII\0\0\0{"seed": 1}'


def test_without_settings_nothing_is_told(tmp_path: Path) -> None:
    encode.write_video(tmp_path / "x.mp4", plain_frames((1, 2, 3)), 16, None)
    for format, suffix in IMAGES:
        encode.write_image(tmp_path / f"x{suffix}", noise_frames(1)[0], None, format)
    assert [read_settings(path) for path in tmp_path.iterdir()] == [None] * 4


# -------------------------------------------------------------------------------------------------------- failures


def test_a_full_disk_ends_a_video_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".x.mp4.part").symlink_to("/dev/full")
    error = failure(tmp_path)
    assert error.code == STORAGE_FAULT
    expected = "'x.mp4' could not be saved: No space left on device; free space on the disk of state_path"
    assert str(error) == expected


@pytest.mark.parametrize(("format", "suffix"), IMAGES)
def test_a_full_disk_ends_a_picture_with_one_sentence(tmp_path: Path, format: encode.ImageFormat, suffix: str) -> None:
    (tmp_path / f".x{suffix}.part").symlink_to("/dev/full")
    with pytest.raises(EngineError, match=r"No space left on device; free space") as caught:
        encode.write_image(tmp_path / f"x{suffix}", noise_frames(1)[0], {"a": 1}, format)
    assert caught.value.code == STORAGE_FAULT
    assert left_in(tmp_path) == []


def test_a_missing_ffmpeg_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "none"))
    error = failure(tmp_path)
    assert error.code == "save_failed"
    assert "ffmpeg can't be started" in str(error)
    assert str(tmp_path) not in str(error)


def test_an_ffmpeg_that_is_nowhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", nowhere)
    assert "ffmpeg can't be started" in str(failure(tmp_path))


def test_an_ffmpeg_that_fails_at_once_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, f"echo 'cannot open {tmp_path}' >&2; exit 3")
    error = failure(tmp_path, noise_frames(50, 256, 256))
    assert str(error) == "'x.mp4' could not be saved: ffmpeg ended with status 3; the log of the daemon says more"


def test_what_ffmpeg_said_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "echo 'strange things' >&2; exit 3")
    failure(tmp_path)
    assert "strange things" in caplog.text


def test_an_ffmpeg_that_is_killed_ends_in_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "kill -9 $$")
    assert failure(tmp_path).code == "save_failed"


def test_a_talkative_ffmpeg_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "head -c 1000000 /dev/zero >&2; cat > /dev/null; exit 1")
    assert failure(tmp_path, noise_frames(20, 256, 256)).code == "save_failed"


def test_an_ffmpeg_that_writes_nothing_and_is_content_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "cat > /dev/null")
    assert failure(tmp_path).code == "save_failed"


def test_a_missing_output_folder_is_a_clean_error(tmp_path: Path) -> None:
    for write in (
        lambda: encode.write_video(tmp_path / "no" / "x.mp4", noise_frames(), 16, None),
        lambda: encode.write_image(tmp_path / "no" / "x.png", noise_frames(1)[0], None, "png"),
    ):
        with pytest.raises(EngineError) as caught:
            write()
        assert caught.value.code == "save_failed"
        assert str(tmp_path) not in str(caught.value)


def test_a_picture_too_large_for_its_format_is_a_clean_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        encode.write_image(tmp_path / "x.webp", np.zeros((2, 16_400, 3), np.uint8), None, "webp")
    assert caught.value.code == "save_failed"
    assert left_in(tmp_path) == []


def test_an_older_file_of_that_name_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.mp4").write_bytes(b"older")
    fake_ffmpeg(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(EngineError):
        encode.write_video(tmp_path / "x.mp4", noise_frames(), 16, None)
    assert (tmp_path / "x.mp4").read_bytes() == b"older"


def test_a_leftover_part_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".x.mp4.part").write_bytes(b"left by a killed worker" * 100_000)
    encode.write_video(tmp_path / "x.mp4", plain_frames((1, 2, 3)), 16, None)
    assert left_in(tmp_path) == ["x.mp4"]
    assert len(decoded(tmp_path / "x.mp4")) == 5


def test_the_error_crosses_the_process_border(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "exit 1")
    copy = pickle.loads(pickle.dumps(failure(tmp_path)))
    assert (copy.code, "could not be saved" in copy.message) == ("save_failed", True)


# ------------------------------------------------------------------------------------------------------ publishing


def test_a_file_is_hidden_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    @contextmanager
    def watched(final: Path) -> Iterator[Path]:
        with published(final) as part:
            yield part
            seen.append(left_in(tmp_path))

    monkeypatch.setattr(encode, "published", watched)
    encode.write_video(tmp_path / "x.mp4", noise_frames(), 16, None)
    encode.write_image(tmp_path / "y.png", noise_frames(1)[0], None, "png")
    assert seen == [[".x.mp4.part"], [".y.png.part", "x.mp4"]]


def test_publishing_saves_the_bytes_then_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append((str(Path(f"/proc/self/fd/{handle}").readlink()), left_in(tmp_path)))
    )
    with published(tmp_path / "x") as part:
        part.write_bytes(b"x")
    assert synced == [(str(tmp_path / ".x.part"), [".x.part"]), (str(tmp_path), ["x"])]


def test_two_that_publish_the_same_file_do_not_write_into_one(tmp_path: Path) -> None:
    both_write = Barrier(2)

    def publish(data: bytes) -> None:
        with published(tmp_path / "x", rivals=True) as part:
            part.write_bytes(data)
            both_write.wait(10)
            assert part.read_bytes() == data

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(publish, [b"one", b"two"]))
    assert left_in(tmp_path) == ["x"]


def test_no_file_handle_is_left_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode.write_video(tmp_path / "x.mp4", noise_frames(), 16, None)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the count, no paths
    for number in range(3):
        encode.write_video(tmp_path / f"{number}.mp4", noise_frames(), 16, None)
    fake_ffmpeg(tmp_path, monkeypatch, "exit 1")
    with pytest.raises(EngineError):
        encode.write_video(tmp_path / "x.mp4", noise_frames(50, 128, 128), 16, None)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
