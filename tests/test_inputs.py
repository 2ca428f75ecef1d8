"""engine/gpu/run/conditioning.py: input files as arguments of a pipeline."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.admission import resolve
from engine.catalog.models import Catalog
from engine.files import footage
from engine.gpu.run import conditioning
from engine.gpu.save import encode
from engine.job import Job

CATALOG = Catalog.load()
SIDE, FRAMES = 32, 5


def job(model_id: str, task: str, **files: Path) -> Job:
    """A small job with these input files."""
    sent = {"prompt": "a", "resolution": f"{SIDE}x{SIDE}", "video_length": FRAMES}
    plain = resolve(CATALOG, CATALOG.get("wan_t2v_1.3B"), sent, {}).job
    given = {name: (path,) for name, path in files.items()}
    return dataclasses.replace(plain, model=model_id, task=task, inputs=given)


def picture(folder: Path, name: str, colour: str, size: tuple[int, int] = (SIDE, SIDE)) -> Path:
    path = folder / name
    Image.new("RGB", size, colour).save(path, "png")
    return path


def film(folder: Path, level: int) -> Path:
    path = folder / f"film-{level}.mp4"
    encode.write_video(path, np.full((FRAMES, SIDE, SIDE, 3), level, np.uint8), 16, None)
    return path


def levels(frames: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in frames]


def roles(wanted: Job, sample_rate: int = 0) -> dict[str, object]:
    return conditioning.roles(
        CATALOG.get(wanted.model).pipelines[wanted.task], conditioning.Call(wanted, [1]), sample_rate
    )


def test_a_picture_is_cropped_to_the_frame_and_never_stretched(tmp_path: Path) -> None:
    wide = Image.new("RGB", (4 * SIDE, SIDE), "red")
    wide.paste("blue", (SIDE, 0, 3 * SIDE, SIDE))
    wide.save(tmp_path / "wide", "png")
    found = roles(job("wan_i2v_14B", "i2v", image_start=tmp_path / "wide"))["start_image"]
    assert isinstance(found, Image.Image)
    assert (found.size, found.getcolors()) == ((SIDE, SIDE), [(SIDE * SIDE, (0, 0, 255))])


def test_known_pictures_are_kept_in_a_video_that_is_otherwise_grey(tmp_path: Path) -> None:
    start, end = picture(tmp_path, "start", "black"), picture(tmp_path, "end", "white")
    found = roles(job("wan_vace_1.3B", "vace", image_start=start, image_end=end))
    assert levels(found["source_video"]) == [0, 128, 128, 128, 255]
    assert levels(found["mask"]) == [0, 255, 255, 255, 0]


def test_a_guide_leads_the_whole_video(tmp_path: Path) -> None:
    found = roles(job("wan_vace_1.3B", "vace", video_guide=film(tmp_path, 60)))
    assert levels(found["source_video"]) == [60] * FRAMES
    assert levels(found["mask"]) == [255] * FRAMES


def test_a_mask_says_what_of_a_source_is_painted_over(tmp_path: Path) -> None:
    found = roles(job("wan_vace_1.3B", "v2v", video_source=film(tmp_path, 60), video_mask=film(tmp_path, 0)))
    assert levels(found["source_video"]) == [60] * FRAMES
    assert levels(found["mask"]) == [0] * FRAMES


def test_an_end_picture_belongs_to_the_last_frame(tmp_path: Path) -> None:
    start, end = picture(tmp_path, "start", "black"), picture(tmp_path, "end", "white")
    conditions = roles(job("ltxv_0_9_5_2B", "flf2v", image_start=start, image_end=end))["conditions"]
    assert [(condition.frame_index, levels([condition.image])) for condition in conditions] == [(0, [0]), (4, [255])]


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_a_sound_that_is_longer_than_it_said_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = tmp_path / f"noise.{suffix}"
    encode.write_sound(path, encode.Sound(np.zeros((2, 48000), np.float32), 16000), None)
    monkeypatch.setattr(footage, "MAX_S", 1)
    sound = roles(job("ace_step_v1_5_turbo", "a2a", audio_source=path), 44100)["source_audio"]
    assert sound.shape[-1] == 44100


@pytest.mark.parametrize("rate", [16000, 44100])
def test_a_sound_is_read_as_stereo_at_the_rate_of_the_model(tmp_path: Path, rate: int) -> None:
    path = tmp_path / "tone.wav"
    wave = (0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.float32)
    encode.write_sound(path, encode.Sound(np.stack([wave, wave]), 16000), None)
    sound = roles(job("ace_step_v1_5_turbo", "a2a", audio_source=path), rate)["source_audio"]
    assert isinstance(sound, torch.Tensor)
    assert (sound.dtype, sound.shape[-2]) == (torch.float32, 2)
    assert sound.shape[-1] == pytest.approx(rate, rel=0.01)
    assert 0.45 < sound.abs().max() < 0.55
