"""Generation on the embedded model: true to diffusers, repeatable, and told as it happens."""

import base64
import dataclasses
import io
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from engine.catalog.models import PACKAGE, Catalog, default_settings
from engine.catalog.weights import Weights
from engine.gpu.load import pipelines
from engine.gpu.run import render
from engine.gpu.run.meter import Meter
from engine.gpu.session import ModelSession
from engine.job import Board, Cancelled, Job, Phase
from engine.queue.progress import percent
from engine.workers.lanes import Progress
from tests import stand_ins
from tests.daemon import Daemon
from tests.embedded import read_settings
from tests.frames import read_video
from tests.processes import workers

Frames = NDArray[np.uint8]

DEMO = Catalog.load().get("wan_demo")
QUICK = {"num_inference_steps": 2, "video_length": 9}
SLOW = {"num_inference_steps": 25, "video_length": 17}  # long enough to be watched


def drawn(colour: str, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A square on black, which is what the embedded model was trained on."""
    image = Image.new("RGB", size)
    width, height = size
    ImageDraw.Draw(image).rectangle((width // 4, height // 4, width // 2, height // 2), fill=colour)
    return image


def encoded(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def difference(one: Frames, other: Frames) -> float:
    """Mean distance in levels of 255."""
    return float(np.abs(one.astype(float) - other).mean())


def frames_of(daemon: Daemon, **fields: Any) -> Frames:
    return read_video(daemon.made(daemon.run(**{**QUICK, "seed": 7, **fields})))


# ------------------------------------------------------------------------------------------------------ repeatable


def test_the_same_request_and_seed_give_the_same_frames(daemon: Daemon) -> None:
    assert np.array_equal(frames_of(daemon), frames_of(daemon))


def test_a_drawn_seed_that_was_told_gives_the_same_frames_again(daemon: Daemon) -> None:
    first = daemon.run(**QUICK)
    assert first["seed"] == first["settings"]["seed"] == first["files"][0]["seed"]
    again = daemon.run(**QUICK, seed=first["seed"])
    assert np.array_equal(read_video(daemon.made(first)), read_video(daemon.made(again)))


def test_the_settings_of_a_status_make_the_same_frames(daemon: Daemon) -> None:
    first = daemon.run(**QUICK, guidance_scale=3.5)
    again = daemon.finish(daemon.post("/generate", first["settings"]).json()["data"]["task_id"])
    assert np.array_equal(read_video(daemon.made(first)), read_video(daemon.made(again)))


CHANGES = {
    "prompt": "a blue square moving up",
    "negative_prompt": "a red circle",
    "guidance_scale": 8.0,
    "flow_shift": 1.0,
    "seed": 8,
    "num_inference_steps": 3,
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_changes_the_frames(daemon: Daemon, name: str) -> None:
    assert difference(frames_of(daemon), frames_of(daemon, **{name: CHANGES[name]})) > 0.5


# ------------------------------------------------------------------------------------------------ true to diffusers


def job(**changes: Any) -> Job:
    """A quick job of the embedded model; `changes` are fields of Job."""
    plain = Job(
        model=DEMO.id,
        task="t2v",
        prompt="a green circle moving left",
        negative_prompt="",
        width=64,
        height=64,
        frames=9,
        fps=8,
        steps=3,
        guidance_scale=2.5,
        embedded_guidance_scale=0.0,
        flow_shift=5.0,
        seed=42,
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def loaded() -> Any:
    """The pipeline as the engine loads it."""
    return pipelines.load(DEMO, DEMO.pipelines["t2v"], Weights(PACKAGE / DEMO.builtin), torch.device("cpu"))


CLASSES = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline}


@pytest.fixture(scope="module")
def by_hand() -> dict[str, Any]:
    """The pipelines as anybody would load them who has only diffusers."""
    return {task: cls.from_pretrained(PACKAGE / DEMO.builtin, dtype=torch.float32) for task, cls in CLASSES.items()}


class CancelledAtStep(Meter):
    """Asks for the end of its own task when some steps are done."""

    def __init__(self, board: Board, steps: int) -> None:
        super().__init__(board, 1)
        self._shared, self._steps = board, steps

    def step_done(self, step: int) -> None:
        if step == self._steps:
            self._shared.cancel = 1
        super().step_done(step)


def rendered(loaded: Any, wanted: Job) -> Frames:
    """What the engine makes of a job: (clips, F, H, W, 3)."""
    pipe = pipelines.sibling(loaded, DEMO.pipelines[wanted.task])
    clips = list(render.render(pipe, DEMO, wanted, Meter(Board(), 1)))
    assert [clip.seed for clip in clips] == [wanted.seed + i for i in range(len(clips))]
    return np.stack([np.concatenate([piece.numpy() for piece in clip.frames or ()]) for clip in clips])


def called(pipe: Any, wanted: Job) -> Frames:
    """What the diffusers pipeline makes of the same arguments, spelt out: (videos, F, H, W, 3)."""
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=wanted.flow_shift)
    pipe.vae.enable_slicing()  # one video after the other, as the engine does: a batch differs in the last bit
    pictures = {"image": Image.open(wanted.inputs["image_start"][0])} if wanted.inputs else {}
    count = wanted.batch_size
    videos = pipe(
        prompt=[wanted.prompt] * count,
        negative_prompt=wanted.negative_prompt,
        width=wanted.width,
        height=wanted.height,
        num_frames=wanted.frames,
        num_inference_steps=wanted.steps,
        guidance_scale=wanted.guidance_scale,
        generator=[torch.Generator().manual_seed(wanted.seed + i) for i in range(count)],
        max_sequence_length=64,
        output_type="np",
        **pictures,
    ).frames
    return np.round(videos * 255).astype(np.uint8)


JOBS = {
    "text": {},
    "another seed": {"seed": 2**53 + 1},
    "negative prompt": {"negative_prompt": "a red square"},
    "more guidance": {"guidance_scale": 7.5},
    "no guidance": {"guidance_scale": 1.0},
    "less shift": {"flow_shift": 1.0},
    "more shift": {"flow_shift": 12.0},
    "another size": {"width": 96, "height": 64, "frames": 5},
    "longer": {"frames": 21, "steps": 2},
    "batch": {"batch_size": 2},
    "picture": {"task": "i2v"},
    "picture, batch": {"task": "i2v", "batch_size": 2},
    "picture, negative prompt, less shift": {"task": "i2v", "negative_prompt": "a red square", "flow_shift": 2.0},
}


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    drawn("red").save(path)
    return path


@pytest.mark.parametrize("case", JOBS)
def test_the_frames_are_those_of_the_diffusers_pipeline(
    case: str, loaded: Any, by_hand: dict[str, Any], picture: Path
) -> None:
    wanted = job(**JOBS[case])
    if wanted.task == "i2v":
        wanted = dataclasses.replace(wanted, inputs={"image_start": (picture,)})
    assert np.array_equal(rendered(loaded, wanted), called(by_hand[wanted.task], wanted))


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_a_batch_is_the_single_runs_within_one_level(task: str, loaded: Any, picture: Path) -> None:
    """A larger batch sums up in another order: float32 rounding, at most one level of 255 in the pixels."""
    images = {"image_start": (picture,)} if task == "i2v" else {}
    batch = rendered(loaded, job(task=task, inputs=images, batch_size=3))
    singles = np.concatenate([rendered(loaded, job(task=task, inputs=images, seed=42 + i)) for i in range(3)])
    assert np.abs(batch.astype(int) - singles).max() <= 1


def test_repeated_runs_are_the_single_runs(loaded: Any) -> None:
    repeated = rendered(loaded, job(repeat_generation=3))
    assert np.array_equal(repeated, np.concatenate([rendered(loaded, job(seed=42 + i)) for i in range(3)]))


def test_one_shift_leaves_nothing_behind_for_the_next_job(loaded: Any) -> None:
    before = rendered(loaded, job())
    rendered(loaded, job(flow_shift=1.0))
    assert np.array_equal(rendered(loaded, job()), before)


def test_a_scheduler_that_has_the_shift_stays_and_a_cancel_leaves_nothing_behind_in_it(loaded: Any) -> None:
    before, scheduler = rendered(loaded, job()), loaded.scheduler
    board = Board()
    begun = render.render(loaded, DEMO, job(seed=7), CancelledAtStep(board, 2))
    with pytest.raises(Cancelled):
        list(begun)
    assert np.array_equal(rendered(loaded, job()), before)
    assert loaded.scheduler is scheduler
    rendered(loaded, job(flow_shift=1.0))
    assert loaded.scheduler is not scheduler


# ---------------------------------------------------------------------------------------------------- files of a task


def test_batches_and_repeats_make_their_files_with_growing_seeds(daemon: Daemon) -> None:
    state = daemon.run(**QUICK, seed=100, batch_size=2, repeat_generation=3)
    assert [file["seed"] for file in state["files"]] == [100, 101, 102, 103, 104, 105]
    assert len({file["filename"] for file in state["files"]}) == 6
    videos = [read_video(daemon.made(state, i)) for i in range(6)]
    assert all(difference(videos[0], other) > 0.5 for other in videos[1:])


def test_the_largest_seed_has_a_successor(daemon: Daemon) -> None:
    state = daemon.run(**QUICK, seed=2**63 - 1, repeat_generation=2)
    assert [file["seed"] for file in state["files"]] == [2**63 - 1, 0]


@pytest.mark.parametrize(("batch_size", "repeats"), [(1, 1), (1, 3), (3, 1), (2, 2)])
def test_the_steps_of_all_runs_are_counted_from_the_beginning_to_the_end(
    daemon: Daemon, batch_size: int, repeats: int
) -> None:
    """A batch is one run: its files take their steps together."""
    task_id = daemon.submit(**SLOW, batch_size=batch_size, repeat_generation=repeats)["task_id"]
    states = watched(daemon, task_id)
    assert {state["total_steps"] for state in states} == {25 * repeats}
    assert states[-1]["current_step"] == 25 * repeats


def watched(daemon: Daemon, task_id: int) -> list[dict[str, Any]]:
    """The task's states, asked for as often as possible until its end."""
    states = [daemon.status(task_id)]
    while states[-1]["status"] not in ("completed", "failed", "cancelled"):
        states.append(daemon.status(task_id))
    assert states[-1]["status"] == "completed", states[-1]
    return states


def test_progress_and_steps_only_grow_and_reach_their_end(daemon: Daemon) -> None:
    states = watched(daemon, daemon.submit(**SLOW, repeat_generation=10)["task_id"])
    for name in ("progress", "current_step"):
        values = [state[name] for state in states]
        assert values == sorted(values)
    assert (states[-1]["progress"], states[-1]["eta_seconds"], states[-1]["position"]) == (100, None, None)
    assert all(state["progress"] < 100 for state in states[:-1])
    # The boards are read five times a second: a machine so quick that this is over at once has less to show.
    assert len({state["current_step"] for state in states}) > min(10, 3 * states[-1]["timings"]["denoising"])


PHASES = ["loading", "encoding", "denoising", "decoding", "saving"]


def test_a_task_takes_time_in_every_phase(daemon: Daemon) -> None:
    state = daemon.run(**QUICK)
    assert list(state["timings"]) == PHASES


def test_the_phase_is_told_while_it_lasts(daemon: Daemon) -> None:
    states = watched(daemon, daemon.submit(**SLOW, repeat_generation=5)["task_id"])
    phases = [state["phase"] for state in states if state["phase"]]
    assert "denoising" in phases
    assert set(phases) <= set(PHASES)
    assert states[-1]["phase"] is None


class Witness(Board):
    """A board that remembers how it looked after each of its fields was written."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["seen"] = []

    def __setattr__(self, name: str, value: int) -> None:
        super().__setattr__(name, value)
        self.__dict__["seen"].append({field: getattr(self, field) for field, _ in Board._fields_})


@pytest.fixture(scope="module")
def witnessed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, int]]]:
    """Every look of the board while the engine's own session makes two runs."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "state").mkdir()
    board = Witness()
    written = threading.Event()
    session = ModelSession(stand_ins.config(folder, "cpu"), lambda _: written.set(), lambda *_: None)
    session.make(5, job(repeat_generation=2, steps=2), DEMO, Meter(board, 5))
    assert written.wait(60)
    yield board.__dict__["seen"]


def test_a_job_passes_through_its_phases_in_order_once_a_run(witnessed: list[dict[str, int]]) -> None:
    phases = [look["phase"] for look in witnessed]
    passed = [phase for i, phase in enumerate(phases) if i == 0 or phases[i - 1] != phase]
    run = [Phase.ENCODING, Phase.DENOISING, Phase.DECODING]  # the files are written beside it
    assert passed == [Phase.IDLE, Phase.LOADING, *run, *run, Phase.IDLE]


def test_the_board_names_its_task_only_once_its_numbers_are_fresh(witnessed: list[dict[str, int]]) -> None:
    first = next(look for look in witnessed if look["task"] == 5)
    assert (first["phase"], first["run"], first["step"], first["total"]) == (Phase.IDLE, 0, 0, 0)


def test_progress_never_tells_of_a_run_that_has_not_begun(witnessed: list[dict[str, int]]) -> None:
    """The fields of the board change one by one, and the daemon may look at any moment."""
    saved, before = 0, Phase.IDLE
    for look in witnessed:
        saved += before == Phase.DECODING != look["phase"]
        before = Phase(look["phase"])
        progress = Progress(before, look["run"], look["runs"], look["step"], look["total"])
        assert percent(progress) <= 100 * (saved + 1) / 2


# ------------------------------------------------------------------------------------------------------------- warm


def loads(daemon: Daemon) -> int:
    """How often a model was loaded, by the log."""
    return daemon.log.read_text().count("loaded model ")


def test_the_second_task_of_a_model_loads_nothing(daemon: Daemon) -> None:
    daemon.run(**QUICK)
    before = loads(daemon), workers(daemon)
    assert len(before[1]) == 1
    daemon.run(**QUICK)
    daemon.run(**QUICK, image_start=encoded(drawn("red")))
    assert (loads(daemon), workers(daemon)) == before


# ------------------------------------------------------------------------------------------------------- start image


def noise_ratio(frame: Frames, wanted: Frames) -> float:
    """PSNR in dB."""
    return 10 * math.log10(255**2 / max(1e-9, float(((frame.astype(float) - wanted) ** 2).mean())))


@pytest.mark.parametrize("colour", ["red", "green", "blue", "yellow"])
def test_the_start_image_is_the_first_frame(daemon: Daemon, colour: str) -> None:
    """Within what the small VAE and the codec lose: 20 dB, where another picture would be below 12."""
    sent = drawn(colour)
    frames = frames_of(daemon, image_start=encoded(sent))
    assert noise_ratio(frames[0], np.asarray(sent)) > 20


def test_a_start_image_of_another_size_is_cropped_and_never_stretched(daemon: Daemon) -> None:
    sent = Image.new("RGB", (256, 128))
    sent.paste(drawn("red", (128, 128)), (64, 0))
    frames = frames_of(daemon, image_start=encoded(sent))
    assert noise_ratio(frames[0], np.asarray(drawn("red"))) > 15


# ------------------------------------------------------------------------------------------------ sizes, names, words


@pytest.mark.parametrize(("resolution", "frames"), [("64x64", 81), ("96x64", 5), ("48x80", 13), ("16x16", 5)])
def test_other_sizes_and_lengths_work(daemon: Daemon, resolution: str, frames: int) -> None:
    state = daemon.run(num_inference_steps=1, resolution=resolution, video_length=frames)
    width, height = map(int, resolution.split("x"))
    assert read_video(daemon.made(state)).shape == (frames, height, width, 3)
    file = state["files"][0]
    assert (file["width"], file["height"], file["frames"], file["fps"]) == (width, height, frames, 8)


def test_the_file_tells_when_which_task_what_and_which_seed(daemon: Daemon) -> None:
    state = daemon.run(**QUICK, prompt="A red circle, moving right!", seed=42)
    name = state["files"][0]["filename"]
    assert re.fullmatch(
        rf"\d{{8}}-\d{{6}}_t{state['task_id']:06d}-[0-9a-f]{{6}}_a-red-circle-moving-right_s42\.mp4", name
    )


def test_each_file_carries_its_settings_and_its_own_seed(daemon: Daemon) -> None:
    state = daemon.run(**QUICK, seed=5, repeat_generation=2, negative_prompt="blurred")
    for number in range(2):
        found = read_settings(daemon.made(state, number))
        assert found == {**state["settings"], "seed": 5 + number}


PROMPTS = {
    "emoji": "a red circle 🔴 moving 👉🏽 right 🏳️‍🌈",
    "newlines": "a red circle\r\n\nmoving\tright\n",
    "a path": "../../etc/passwd",
    "shell": "a'; rm -rf / # $(reboot) `id` && \"",
    "ffmpeg": "a=b;c#d\\e:f,g[h]%d",
    "control": "a\x00red\x1b[31mcircle\x7f",
    "right to left": "دائرة حمراء \u202e moving",
    "no word at all": "!?…",
    "space": " ",
    "html": "<script>alert(1)</script> &amp;&lt;",
    "ten thousand": "a red circle " * 769 + "abc",
}


@pytest.mark.parametrize("case", PROMPTS)
def test_any_prompt_makes_a_file_with_a_plain_name_that_tells_it_word_for_word(daemon: Daemon, case: str) -> None:
    state = daemon.run(**QUICK, prompt=PROMPTS[case])
    path = daemon.made(state)
    assert re.fullmatch(r"[0-9]{8}-[0-9]{6}_t[0-9]{6}-[0-9a-f]{6}_[a-z0-9-]{1,40}_s[0-9]+\.mp4", path.name)
    assert state["prompt"] == PROMPTS[case]
    assert (read_settings(path) or {})["prompt"] == PROMPTS[case]
    assert daemon.get(f"/download/{path.name}").content == path.read_bytes()


def test_the_status_says_what_a_request_was_resolved_to(daemon: Daemon) -> None:
    state = daemon.run(prompt="a cat", num_inference_steps=1, video_length=7)
    plain = default_settings(DEMO)
    expected = {**plain, "prompt": "a cat", "num_inference_steps": 1, "video_length": 9, "seed": state["seed"]}
    assert state["settings"].items() >= expected.items()
    assert state["warnings"] == [
        "video_length: 7 was changed to 9, the nearest that model 'wan_demo' can make (4k+1)",
    ]
