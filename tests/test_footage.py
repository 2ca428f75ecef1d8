"""engine/files/footage.py: videos and sounds that come in."""

import io
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.files import footage
from engine.files.footage import BadFootage
from engine.gpu.save import encode
from tests import bombs

SIDE, LIMIT = 32, 10_000


def levels(count: int) -> list[int]:
    """A grey level for each frame, far enough from its neighbours to be told apart after coding."""
    return [20 + 200 * i // max(1, count - 1) for i in range(count)]


def film(folder: Path, frames: int = 12, fps: int = 12, side: int = SIDE) -> bytes:
    path = folder / "film.mp4"
    shades = np.array(levels(frames), np.uint8)[:, None, None, None]
    encode.write_video(path, np.broadcast_to(shades, (frames, side, side, 3)), fps, None, crf=1)
    return path.read_bytes()


def tone(folder: Path, suffix: str = ".wav", seconds: float = 1.0, rate: int = 16000) -> bytes:
    path = folder / f"tone{suffix}"
    times = np.arange(int(seconds * rate)) / rate
    wave = (0.5 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    encode.write_sound(path, encode.Sound(np.stack([wave, wave]), rate), None)
    return path.read_bytes()


def remuxed(data: bytes, container: str) -> bytes:
    """The same packets in another container."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return buffer.getvalue()


def stored(folder: Path, data: bytes) -> Path:
    """As the daemon stores inputs: by a name that says nothing."""
    path = folder / "0123abcd"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_the_length_of_a_video_is_told(tmp_path: Path, container: str) -> None:
    data = remuxed(film(tmp_path, frames=30, fps=12), container)
    assert footage.check(io.BytesIO(data), "video", LIMIT) == pytest.approx(2.5, abs=0.1)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_the_length_of_a_sound_is_told(tmp_path: Path, suffix: str) -> None:
    assert footage.check(io.BytesIO(tone(tmp_path, suffix)), "audio", LIMIT) == pytest.approx(1.0, abs=0.1)


SEEDS = {
    "video": [bombs.video(bombs.packets(64), container) for container in ("mp4", "mov", "matroska", "webm")],
    "audio": [bombs.sound(format) for format in ("wav", "flac", "mp3", "ogg", "mp4")],
}


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "png")
    return buffer.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("data", [b"", b"\0" * 64, picture(), PLAYLIST, b"ffconcat version 1.0\nfile '/etc/passwd'\n"])
def test_what_is_no_video_is_refused_with_the_formats_that_are(data: bytes) -> None:
    with pytest.raises(BadFootage, match=r"^is not an MP4, MOV, WebM or MKV video$"):
        footage.check(io.BytesIO(data), "video", LIMIT)


def test_a_video_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFootage, match="is damaged or cut off"):
        footage.check(io.BytesIO(film(tmp_path)[:200]), "video", LIMIT)


def test_a_sound_file_without_sound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFootage, match="holds no audio"):
        footage.check(io.BytesIO(film(tmp_path)), "audio", LIMIT)


def test_a_video_with_too_many_pixels_is_refused_before_a_frame_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(BadFootage, match=r"^is 32x32, more than the limit of 1000 pixels a frame"):
        footage.check(io.BytesIO(film(tmp_path)), "video", 1000)


def test_a_sound_that_is_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "MAX_S", 1)
    with pytest.raises(BadFootage, match=r"^is 2 seconds long, but must be longer than 0 and at most 1$"):
        footage.check(io.BytesIO(tone(tmp_path, seconds=2)), "audio", LIMIT)


def shades(frames: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in frames]


@pytest.mark.parametrize(
    ("fps", "count", "expected"),
    [
        (12, 12, list(range(12))),  # as it is
        (12, 5, list(range(5))),  # only so many
        (12, 99, list(range(12))),  # no more than there are
        (6, 99, list(range(0, 12, 2))),  # every other
        (24, 99, [i // 2 for i in range(24)]),  # each twice
    ],
)
def test_frames_are_those_that_are_shown_at_their_times(
    tmp_path: Path, fps: int, count: int, expected: list[int]
) -> None:
    frames = list(footage.read_frames(stored(tmp_path, film(tmp_path)), fps, count))
    wanted = [levels(12)[i] for i in expected]
    assert len(frames) == len(wanted)
    assert np.abs(np.array(shades(frames)) - wanted).max() <= 3
    assert {frame.mode for frame in frames} == {"RGB"}


def test_the_frames_of_a_video_filmed_sideways_are_upright(tmp_path: Path) -> None:
    frames = np.zeros((3, SIDE, 2 * SIDE, 3), np.uint8)
    frames[:, :, :SIDE] = 255  # the left half is white
    encode.write_video(tmp_path / "level.mp4", frames, 12, None)
    turn = ["-display_rotation", "90", "-i", tmp_path / "level.mp4", "-c", "copy", tmp_path / "turned.mp4"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *turn], check=True)
    for found in (
        list(footage.read_frames(tmp_path / "turned.mp4", 12, 1)),
        footage.read_last_frames(tmp_path / "turned.mp4", 12, 1),
    ):
        assert found[0].size == (SIDE, 2 * SIDE)
        assert shades([found[0].crop((0, SIDE, SIDE, 2 * SIDE)), found[0].crop((0, 0, SIDE, SIDE))]) == [255, 0]


# ------------------------------------------------------------------------------------------ small files, much work

BIG = 1000  # pixels a side, of frames in a stream that is 64x64 by its container


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_a_stream_larger_than_its_container_says_is_refused_by_its_own_size(container: str) -> None:
    data = bombs.video(bombs.packets(BIG), container)
    with pytest.raises(BadFootage, match=f"^is {BIG}x{BIG}, more than the limit of 10000 pixels a frame"):
        footage.check(io.BytesIO(data), "video", LIMIT)


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
@pytest.mark.parametrize("read", [footage.read_frames, footage.read_last_frames])
def test_a_stream_that_grows_midway_is_read_no_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, container: str, read: Callable[..., Iterable[Image.Image]]
) -> None:
    path = stored(tmp_path, bombs.video(bombs.packets(64, 4) + bombs.packets(BIG), container))
    assert (BIG, BIG) in {frame.size for frame in read(path, 25, 9)}
    monkeypatch.setattr(footage.opened.__wrapped__, "__defaults__", (LIMIT,))
    with pytest.raises(BadFootage):
        list(read(path, 25, 9))


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_a_frame_that_is_too_large_takes_no_memory(tmp_path: Path, container: str) -> None:
    side = 6000  # 54 MB a frame, and FFmpeg decodes two to find out what a stream is
    path = stored(tmp_path, bombs.video(bombs.packets(side), container))
    check = (
        "import sys; from engine.files import footage\n"
        "try: footage.check(open(sys.argv[1], 'rb'), 'video', 10_000_000)\n"
        "except footage.BadFootage as error: print(error)\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    run = subprocess.run([sys.executable, "-c", check, path], capture_output=True, text=True, check=True)
    sentence, peak_kib = run.stdout.splitlines()
    assert f"{side}x{side}" in sentence
    assert int(peak_kib) < 90 * 1024


@pytest.mark.parametrize("frames", [2, 50, 1000])
def test_a_length_that_the_header_lacks_is_that_of_the_packets(frames: int) -> None:
    data = bombs.video(bombs.packets(64, frames), "matroska", live="1")
    assert footage.check(io.BytesIO(data), "video", LIMIT) == pytest.approx(frames / 25, abs=0.1)


def test_more_packets_than_a_film_has_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footage, "MAX_PACKETS", 40)
    data = bombs.video(bombs.packets(64, 60), "matroska", live="1")
    with pytest.raises(BadFootage, match=r"^does not say how long it is and has over 40 packets"):
        footage.check(io.BytesIO(data), "video", LIMIT)


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska"])
def test_no_more_streams_are_looked_at_than_a_film_has(container: str) -> None:
    packets = bombs.packets(64)
    assert 0 < footage.check(io.BytesIO(bombs.video(packets, container, sounds=60)), "video", LIMIT) < 1
    try:
        with footage.opened(io.BytesIO(bombs.video(packets, container, sounds=300)), "video") as opened:
            assert len(opened.container.streams) == footage.MAX_STREAMS
    except BadFootage:
        assert container != "matroska"  # FFmpeg leaves the others out; of a QuickTime file it then reads nothing


@settings(max_examples=200)
@given(st.data())
def test_no_bytes_raise_anything_but_bad_footage(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["video", "audio"]))
    whole = bytearray(data.draw(st.sampled_from(SEEDS[kind])))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6)):
        whole[at] = value
    cut = data.draw(st.integers(0, len(whole)))
    try:
        assert 0 < footage.check(io.BytesIO(bytes(whole[:cut] or whole)), kind, LIMIT) <= footage.MAX_S
    except BadFootage as error:
        assert len(str(error)) < 200
