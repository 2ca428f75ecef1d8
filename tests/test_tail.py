"""The end of a job: in which precision the VAE decodes, and how files are written while the next frames are made."""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FluxPipeline

from engine.gpu.run import decoding
from engine.gpu.save import encode, saving
from engine.job import EngineError
from tests.daemon import Daemon
from tests.frames import read_video

CPU = torch.device("cpu")


class Pipe:
    """As much of a pipeline as its VAE's precision is about."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae: Any = AutoencoderKLWan(base_dim=16, z_dim=4, dim_mult=[1, 1, 1, 1], latents_mean=[0.0] * 4)


@torch.no_grad()
def decoded(pipe: Pipe) -> torch.Tensor:
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return pipe.vae.decode(latents, return_dict=False)[0]


def test_in_16_bits_the_vae_decodes_nearly_the_same() -> None:
    pipe = Pipe()
    whole = decoded(pipe)
    decoding.set_precision(pipe, "16", CPU)
    half = decoded(pipe)
    error = (half - whole).square().mean().sqrt() / whole.std()
    assert 0 < error < 0.03
    assert half.dtype == torch.float32


def test_what_is_encoded_keeps_its_precision() -> None:
    pipe = Pipe()
    decoding.set_precision(pipe, "16", CPU)
    assert {weight.dtype for weight in pipe.vae.encoder.parameters()} == {torch.float32}
    assert {weight.dtype for weight in pipe.vae.decoder.parameters()} == {torch.bfloat16}
    assert decoding.width_of(pipe) == 1.0


@pytest.mark.parametrize(
    ("wanted", "device", "width"), [("auto", "cuda", 1.0), ("auto", "cpu", 2.0), ("32", "cuda", 2.0)]
)
def test_auto_decodes_in_16_bits_on_a_card_only(wanted: str, device: str, width: float) -> None:
    pipe = Pipe()
    decoding.set_precision(pipe, wanted, torch.device(device))
    assert decoding.width_of(pipe) == width


def test_a_vae_that_is_not_known_to_be_safe_stays_as_it_is() -> None:
    from diffusers import AutoencoderKL

    pipe = FluxPipeline.__new__(FluxPipeline)
    pipe.vae = AutoencoderKL()
    decoding.set_precision(pipe, "16", CPU)
    assert {weight.dtype for weight in pipe.vae.parameters()} == {torch.float32}


# ---------------------------------------------------------------------------------------------------- in the background


def fed(pieces: Iterator[int], write: Callable[[Iterator[int]], Any]) -> Any:
    return saving.feed(ThreadPoolExecutor(1), pieces, write, lambda _: saving.MOST_WAITING_BYTES // 5)


def test_the_next_piece_is_made_while_the_last_one_is_written() -> None:
    writing, made = threading.Event(), threading.Event()

    def pieces() -> Iterator[int]:
        yield 1
        assert writing.wait(10)  # the first one is being written ...
        made.set()
        yield 2

    def write(handed: Iterator[int]) -> list[int]:
        first = next(handed)
        writing.set()
        assert made.wait(10)  # ... until the second one is made
        return [first, *handed]

    assert fed(pieces(), write).result(10) == [1, 2]


def test_what_is_made_waits_for_what_is_written() -> None:
    """Else a slow disk would fill the memory with frames."""
    taken = threading.Event()
    made: list[int] = []

    def pieces() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            if number == 10:
                taken.set()
            yield number

    def write(handed: Iterator[int]) -> int:
        assert not taken.wait(0.5)
        return len(list(handed))

    assert fed(pieces(), write).result(10) == 20


def test_a_fault_of_the_making_gives_the_file_up() -> None:
    ends: list[str] = []

    def pieces() -> Iterator[int]:
        yield 1
        raise ValueError("out of ideas")

    def write(handed: Iterator[int]) -> None:
        try:
            list(handed)
        except Exception as error:
            ends.append(type(error).__name__)
            raise

    with pytest.raises(ValueError, match="out of ideas"):
        fed(pieces(), write)
    assert ends == ["Broken"]


def test_a_fault_of_the_writing_ends_the_making() -> None:
    def write(handed: Iterator[int]) -> None:
        next(handed)
        raise EngineError("the disk is full")

    with pytest.raises(EngineError, match="the disk is full"):
        fed(iter(int, 1), write)  # endless


def test_half_a_video_is_not_left_in_the_folder(tmp_path: Path) -> None:
    def frames() -> Iterator[encode.Pixels]:
        yield np.zeros((32, 32, 3), np.uint8)
        raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        encode.write_video(tmp_path / "x.mp4", frames(), 8, None)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------- the encoder


def test_an_encoder_that_is_not_there_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    saving._encoder.cache_clear()
    monkeypatch.setattr(encode, "works", lambda encoder: encoder == "x264")
    assert saving._encoder("nvenc") == "x264"
    assert "does not work on this machine" in caplog.text
    saving._encoder.cache_clear()


def test_what_works_is_found_out_by_encoding() -> None:
    assert encode.works("x264")


@pytest.fixture(scope="module")
def nvenc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that shall use a card's encoder, on a machine that may have none, with a VAE in 16 bits."""
    with Daemon(tmp_path_factory.mktemp("nvenc"), video_encoder="nvenc", vae_precision="16") as daemon:
        yield daemon


def test_no_video_is_lost_for_want_of_a_card_s_encoder(nvenc: Daemon, daemon: Daemon) -> None:
    fields = {"prompt": "a red circle moving right", "seed": 4}
    half, whole = (read_video(one.made(one.run(**fields))).astype(float) for one in (nvenc, daemon))
    error = np.square(half - whole).mean()
    assert 0 < error < 255**2 / 10**3.5  # the VAE in 16 bits: above 35 dB


def test_the_thumbnail_is_there_before_anybody_asks(nvenc: Daemon) -> None:
    kept = nvenc.folder / "state" / "thumbnails"
    before = set(kept.glob("*.jpg")) if kept.is_dir() else set()
    name = nvenc.run(prompt="a blue square moving left", seed=5)["files"][0]["filename"]
    (poster,) = set(kept.glob("*.jpg")) - before
    assert nvenc.get(f"/preview/{name}").content == poster.read_bytes()
    assert set(kept.glob("*.jpg")) - before == {poster}  # so it was not made anew


# ------------------------------------------------------------------------------------------ beside the next task

HELD_FFMPEG = """#!/bin/sh
while [ -e {flag} ]; do sleep 0.05; done
exec {ffmpeg} "$@"
"""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose ffmpeg waits as long as there is a file `hold` in its folder."""
    daemon = Daemon(tmp_path_factory.mktemp("held"))
    script = daemon.folder / "ffmpeg"
    script.write_text(HELD_FFMPEG.format(flag=daemon.folder / "hold", ffmpeg=imageio_ffmpeg.get_ffmpeg_exe()))
    script.chmod(0o755)
    daemon.environment = os.environ | {"IMAGEIO_FFMPEG_EXE": str(script), "OMP_NUM_THREADS": "1"}
    with daemon:
        daemon.run(prompt="a red circle", num_inference_steps=1)  # loads the model, and finds out whether x264 works
        yield daemon


def overlapping(daemon: Daemon) -> tuple[int, int]:
    """A task whose file is being written, and the next one, which denoises meanwhile."""
    (daemon.folder / "hold").touch()
    first = daemon.submit(prompt="a red circle moving right", num_inference_steps=2, seed=1)["task_id"]
    daemon.until(first, lambda state: state["phase"] == "saving")
    second = daemon.submit(prompt="a blue square moving left", num_inference_steps=40, seed=2)["task_id"]
    daemon.until(second, lambda state: state["phase"] == "denoising")
    return first, second


def test_the_next_task_denoises_while_a_file_is_written(held: Daemon) -> None:
    first, second = overlapping(held)
    state = held.status(first)
    assert (state["status"], state["phase"]) == ("processing", "saving")
    assert [task["id"] for task in held.get("/queue").json()["data"]["tasks"]] == [first, second]
    (held.folder / "hold").unlink()
    ends = [held.finish(task_id) for task_id in (first, second)]
    assert [end["status"] for end in ends] == ["completed", "completed"]
    assert all(end["files"][0]["size_bytes"] == held.made(end).stat().st_size > 0 for end in ends)


def test_a_task_whose_file_is_being_written_can_be_cancelled(held: Daemon) -> None:
    first, second = overlapping(held)
    assert held.delete(f"/queue/{first}").json()["data"]["status"] == "cancelling"
    (held.folder / "hold").unlink()
    assert (held.finish(first)["status"], held.finish(second)["status"]) == ("cancelled", "completed")
    assert not list(held.outputs.glob(f"*_t{first:06d}_*"))
