"""engine/files/media.py: what an input picture may be, and the thumbnails of files."""

import io
import struct
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from engine.files import media
from tests import bombs

LIMIT = 1_000_000  # pixels
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.effect_noise((width, height), 90).convert("RGB")


def halves(width: int = 64, height: int = 32) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def with_orientation(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95, subsampling=0)


def checked(data: bytes, max_pixels: int = LIMIT) -> tuple[int, int]:
    return media.check_image(io.BytesIO(data), max_pixels)


def refusal(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(media.BadImage) as caught:
        checked(data, max_pixels)
    return str(caught.value)


def near(pixel: object, colour: tuple[int, int, int], levels: int = 12) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(a - b) <= levels for a, b in zip(pixel, colour, strict=True))


def stored(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def thumbnail(path: Path, width: int) -> bytes:
    with path.open("rb") as file:
        return media.thumbnail(file, width)


def ffmpeg(*arguments: str | Path) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Sixteen frames of 128x64: red first, then blue."""
    path = tmp_path / "clip.mp4"
    sources = (
        "-f",
        "lavfi",
        "-i",
        "color=red:s=128x64:r=16:d=0.5",
        "-f",
        "lavfi",
        "-i",
        "color=blue:s=128x64:r=16:d=0.5",
    )
    ffmpeg(*sources, "-filter_complex", "concat,format=yuv420p", path)
    return path


def as_jpeg(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=["JPEG"])


# ---------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_whole_picture_is_accepted_with_its_size(format: str) -> None:
    assert checked(encoded(noise(48, 32), format)) == (48, 32)


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_the_size_is_the_size_as_shown(orientation: int) -> None:
    shown = (32, 48) if orientation >= 5 else (48, 32)
    assert checked(with_orientation(noise(48, 32), orientation)) == shown


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "ICO", "PPM"])
def test_other_formats_are_refused(format: str) -> None:
    assert refusal(encoded(noise(32, 32), format)) == "is not a PNG, JPEG or WebP image"


@pytest.mark.parametrize("data", [b"", b"\0", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    assert refusal(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_picture_cut_off_anywhere_is_refused(format: str, share: float) -> None:
    data = encoded(noise(200, 200), format)
    assert refusal(data[: int(len(data) * share)])


def test_a_damaged_picture_is_refused() -> None:
    data = bytearray(encoded(noise(100, 100)))
    data[len(data) // 2] ^= 0xFF
    assert "damaged" in refusal(bytes(data))


def test_too_many_pixels_are_refused_with_both_numbers() -> None:
    sentence = refusal(encoded(Image.new("RGB", (1001, 1000))))
    assert "1001x1000" in sentence
    assert "1000000" in sentence


def test_as_many_pixels_as_the_limit_are_accepted() -> None:
    assert checked(encoded(Image.new("RGB", (1000, 1000)))) == (1000, 1000)


@pytest.mark.parametrize("side", [5_000, 9_500, 12_000, 30_000, 2**31 - 1])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    assert "smaller image" in refusal(bombs.png(side, side))


def test_a_bomb_is_refused_even_if_the_limit_would_allow_it() -> None:
    assert "decoded safely" in refusal(bombs.png(30_000, 30_000), max_pixels=2_000_000_000)


def test_a_text_bomb_inside_a_png_is_refused() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "x" * 20_000_000, zip=True)
    assert refusal(encoded(noise(8, 8), pnginfo=text))


def test_an_animation_counts_as_its_first_frame() -> None:
    frames = [Image.new("RGB", (40, 20), colour) for colour in (GREEN, BLUE)]
    assert checked(encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])) == (40, 20)


def test_a_broken_exif_does_not_cost_a_good_picture() -> None:
    assert checked(encoded(noise(32, 16), "WEBP", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")) == (32, 16)


@pytest.mark.parametrize("scans", [101, 200, 5000])
def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(scans: int) -> None:
    data = bombs.jpeg(900, scans)
    assert "scans" in refusal(data)
    assert "scans" in refusal(data[:-2] + b"\xff\xff" + data[-2:])  # a fill byte before a marker


@pytest.mark.parametrize("scans", [1, 12, 100])
def test_a_jpeg_of_as_many_scans_as_programs_write_is_accepted(scans: int) -> None:
    assert checked(bombs.jpeg(900, scans)) == (900, 900)


@pytest.mark.parametrize("where", ["beside the picture", "in a comment", "behind the end"])
def test_what_only_looks_like_scans_is_not_counted(where: str) -> None:
    data, marks = encoded(noise(64, 64), "JPEG"), b"\xff\xda\0\x02" * 300
    segment = {"beside the picture": b"\xff\xe1", "in a comment": b"\xff\xfe"}.get(where)
    if segment:
        data = data[:2] + segment + struct.pack(">H", len(marks) + 2) + marks + data[2:]
    else:
        data += marks  # as a phone appends a film
    assert checked(data) == (64, 64)


def test_a_jpeg_of_very_many_segments_is_refused() -> None:
    data = encoded(noise(8, 8), "JPEG")
    assert "segments" in refusal(data[:2] + b"\xff\xe5\0\x02" * 10_000 + data[2:])


def test_a_profile_bomb_inside_a_png_takes_no_memory() -> None:
    image = noise(8, 8)
    image.info["icc_profile"] = bytes(50_000_000)
    assert check_peak_mib(encoded(image)) < 60


@pytest.mark.parametrize(
    ("format", "options", "most_mib"),
    [
        ("PNG", {"compress_level": 1}, 110),
        ("JPEG", {}, 40),
        ("JPEG", {"progressive": True}, 90),
        ("WEBP", {"method": 0}, 110),
        ("WEBP", {"method": 0, "lossless": True, "quality": 0}, 150),
    ],
)
def test_a_picture_of_sixteen_million_pixels_is_checked_in_little_memory(
    format: str, options: dict[str, object], most_mib: int
) -> None:
    assert check_peak_mib(encoded(Image.new("RGB", (4096, 4096), RED), format, **options)) < most_mib


@pytest.mark.parametrize("side", [4000, 9000, 16_383])
def test_a_webp_that_claims_a_size_takes_no_memory_for_it(side: int) -> None:
    size = (side - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + size + size + encoded(noise(8, 8), "WEBP")[12:]
    data = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    assert refusal(data)
    assert check_peak_mib(data) < 60


def check_peak_mib(data: bytes) -> int:
    """The memory of a process that checks this picture, whatever it finds; Python and the decoders take 30 MiB."""
    check = (
        "import contextlib, io, sys; from engine.files import media\n"
        "with contextlib.suppress(media.BadImage): media.check_image(io.BytesIO(sys.stdin.buffer.read()), 50_000_000)\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    run = subprocess.run([sys.executable, "-c", check], input=data, capture_output=True, check=True)
    return int(run.stdout) // 1024


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x40\0\0\0WEBPVP8 "]),
)
def test_no_bytes_raise_anything_but_bad_image(data: bytes, start: bytes) -> None:
    with pytest.raises(media.BadImage):
        checked(start + data)


@given(at=st.integers(0, 10_000), value=st.integers(0, 255), format=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_no_single_wrong_byte_raises_anything_but_bad_image(at: int, value: int, format: str) -> None:
    data = bytearray(encoded(halves(), format, exif=Image.Exif()))
    data[at % len(data)] = value
    try:
        width, height = checked(bytes(data))
    except media.BadImage:
        return
    assert width * height <= LIMIT


# ------------------------------------------------------------------------------------------------- opened pictures


@pytest.mark.parametrize(
    ("orientation", "left_or_top"),
    [(1, RED), (2, BLUE), (3, BLUE), (4, RED), (5, RED), (6, RED), (7, BLUE), (8, BLUE)],
)
def test_a_picture_is_opened_upright(tmp_path: Path, orientation: int, left_or_top: tuple[int, int, int]) -> None:
    image = media.open_image(stored(tmp_path, "no-suffix", with_orientation(halves(), orientation)))
    assert image.size == ((32, 64) if orientation >= 5 else (64, 32))
    assert near(image.getpixel((4, 4)), left_or_top)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(tmp_path: Path, mode: str) -> None:
    image = media.open_image(stored(tmp_path, "clear", encoded(Image.new(mode, (8, 8), 0))))
    assert image.mode == "RGB"
    assert image.getpixel((3, 3)) == (255, 255, 255)


def test_a_transparent_palette_becomes_white(tmp_path: Path) -> None:
    data = encoded(Image.new("P", (8, 8), 0), transparency=0)
    assert media.open_image(stored(tmp_path, "palette", data)).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK"])
def test_every_colour_mode_opens_as_rgb(tmp_path: Path, mode: str) -> None:
    format = "JPEG" if mode == "CMYK" else "PNG"
    assert media.open_image(stored(tmp_path, "x", encoded(Image.new(mode, (8, 8)), format))).mode == "RGB"


def test_sixteen_bit_grey_keeps_its_middle(tmp_path: Path) -> None:
    grey = Image.new("I;16", (8, 8), 0x8000)
    assert near(media.open_image(stored(tmp_path, "deep", encoded(grey))).getpixel((3, 3)), (128, 128, 128), levels=1)


def test_the_first_frame_of_an_animation_is_opened(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 20), colour) for colour in (GREEN, BLUE)]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert media.open_image(stored(tmp_path, "moving", data)).getpixel((5, 5)) == GREEN


def test_an_opened_picture_outlives_its_file(tmp_path: Path) -> None:
    path = stored(tmp_path, "x.png", encoded(halves()))
    image = media.open_image(path)
    path.unlink()
    assert image.getpixel((1, 1)) == RED


def test_opening_a_damaged_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(media.BadImage):
        media.open_image(stored(tmp_path, "x.png", encoded(noise(100, 100))[:900]))


def test_opening_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        media.open_image(tmp_path / "gone.png")


# ------------------------------------------------------------------------------------------------------ thumbnails


@pytest.mark.parametrize(("name", "format"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_a_picture_is_scaled_down_with_its_aspect(tmp_path: Path, name: str, format: str) -> None:
    data = thumbnail(stored(tmp_path, name, encoded(halves(1280, 720), format)), 320)
    small = as_jpeg(data)
    assert small.size == (320, 180)
    assert near(small.getpixel((20, 90)), RED)
    assert near(small.getpixel((300, 90)), BLUE)


@pytest.mark.parametrize(("name", "format"), [("a.png", "PNG"), ("a.jpg", "JPEG")])
def test_a_small_picture_is_never_upscaled(tmp_path: Path, name: str, format: str) -> None:
    assert as_jpeg(thumbnail(stored(tmp_path, name, encoded(halves(100, 50), format)), 320)).size == (100, 50)


def test_a_thumbnail_of_a_turned_photo_is_upright(tmp_path: Path) -> None:
    small = as_jpeg(thumbnail(stored(tmp_path, "p.jpg", with_orientation(halves(1200, 600), 6)), 100))
    assert small.size == (100, 200)
    assert near(small.getpixel((50, 20)), RED)


def test_a_very_flat_picture_keeps_one_row(tmp_path: Path) -> None:
    assert as_jpeg(thumbnail(stored(tmp_path, "f.png", encoded(Image.new("RGB", (4000, 2)))), 32)).size == (32, 1)


def test_a_transparent_picture_has_a_white_thumbnail(tmp_path: Path) -> None:
    data = encoded(Image.new("RGBA", (64, 64), (0, 0, 0, 0)))
    assert as_jpeg(thumbnail(stored(tmp_path, "t.png", data), 32)).getpixel((9, 9)) == (255, 255, 255)


def test_a_video_shows_its_first_frame(video: Path) -> None:
    small = as_jpeg(thumbnail(video, 64))
    assert small.size == (64, 32)
    assert near(small.getpixel((32, 16)), (254, 0, 0))


def test_a_small_video_is_never_upscaled(video: Path) -> None:
    assert as_jpeg(thumbnail(video, 1920)).size == (128, 64)


def test_a_video_filmed_sideways_is_shown_upright(video: Path) -> None:
    turned = video.with_name("turned.mp4")
    ffmpeg("-display_rotation", "90", "-i", video, "-c", "copy", turned)
    assert as_jpeg(thumbnail(turned, 1920)).size == (64, 128)


@pytest.mark.parametrize("suffix", [".webm", ".mkv", ".mov"])
def test_other_containers_have_thumbnails_too(video: Path, suffix: str) -> None:
    other = video.with_suffix(suffix)
    ffmpeg("-i", video, *(() if suffix != ".webm" else ("-c:v", "libvpx")), other)
    assert as_jpeg(thumbnail(other, 64)).size == (64, 32)


def test_a_name_like_an_address_is_still_a_file(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(video.parent)
    video.rename("http:x.mp4")
    assert as_jpeg(thumbnail(Path("http:x.mp4"), 64)).size == (64, 32)


def test_a_playlist_called_mp4_is_not_followed(video: Path) -> None:
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{video}\n#EXT-X-ENDLIST\n"
    with pytest.raises(media.NoPreview):
        thumbnail(stored(video.parent, "list.mp4", playlist.encode()), 64)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3", "a.OGG"])
def test_audio_has_no_preview(tmp_path: Path, name: str) -> None:
    with pytest.raises(media.NoPreview, match=rf"^'{name}' is audio"):
        thumbnail(stored(tmp_path, name, b"RIFF"), 64)


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.png", "a.jpg", "a.webp", "a.txt", "a"])
@pytest.mark.parametrize("data", [b"", b"junk" * 100, b"\0\0\0\x20ftypisom" + bytes(200)])
def test_what_cannot_be_decoded_has_no_preview(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(media.NoPreview) as caught:
        thumbnail(stored(tmp_path, name, data), 64)
    assert str(tmp_path) not in str(caught.value)


def test_a_video_cut_off_in_its_index_has_no_preview(video: Path) -> None:
    with pytest.raises(media.NoPreview):
        thumbnail(stored(video.parent, "cut.mp4", video.read_bytes()[:300]), 64)


def test_a_sound_in_a_video_container_has_no_preview(tmp_path: Path) -> None:
    path = tmp_path / "sound.mp4"
    ffmpeg("-f", "lavfi", "-i", "sine=d=0.2", path)
    with pytest.raises(media.NoPreview):
        thumbnail(path, 64)


def test_a_bomb_in_the_folder_has_no_preview(tmp_path: Path) -> None:
    with pytest.raises(media.NoPreview):
        thumbnail(stored(tmp_path, "bomb.png", bombs.png(9_000, 9_000)), 64)


# ---------------------------------------------------------------------------------------------------- what it costs


def test_importing_the_module_brings_in_no_decoder() -> None:
    heavy = {"PIL", "av", "numpy", "torch", "imageio_ffmpeg"}
    check = f"import engine.files.outputs, sys; print({heavy} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_decoding_brings_in_no_numpy(video: Path) -> None:
    picture = stored(video.parent, "x.png", encoded(halves(640, 64)))
    check = (
        "import sys; from engine.files import media; "
        "[media.thumbnail(open(name, 'rb'), 64) for name in sys.argv[1:]]; print('numpy' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", check, video, picture], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("format", ["WEBP", "GIF"])
def test_a_picture_brings_in_no_decoder_that_it_does_not_need(tmp_path: Path, format: str) -> None:
    picture = stored(tmp_path, "x.webp", encoded(halves(), format))
    check = (
        "import contextlib, sys; from pathlib import Path; from engine.files import media\n"
        "with contextlib.suppress(media.BadImage): media.check_image(open(sys.argv[1], 'rb'), 10_000)\n"
        "print('PIL.WebPImagePlugin' in sys.modules, 'PIL.TgaImagePlugin' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", check, picture], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True False"


def test_every_suffix_is_lower_case_and_has_a_known_kind() -> None:
    for suffix, (kind, content_type) in media.MEDIA_TYPES.items():
        assert suffix.startswith(".")
        assert suffix == suffix.lower()
        assert kind in {"video", "image", "audio"}
        assert content_type.startswith(f"{kind}/")
