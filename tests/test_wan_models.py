"""Every Wan model of the catalogue through HTTP, on a tiny checkpoint of its own class.

What is asked for reaches the pixels: each input is changed alone, and the frames must change with it.
"""

import base64
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from engine.catalog import Catalog, Model
from tests.daemon import Daemon
from tests.frames import read_video
from tests.tiny import wan

Frames = NDArray[np.uint8]

CATALOG = Catalog.load()
FRAMES, STEPS, SEED = 9, 4, 1234  # 4 steps: with fewer the second expert of a pair may have none
BLOCK = 16  # pixels; the tiny VAEs carry the mean colour of such a block
START, END, REFS = "image_start", "image_end", "image_refs"


@dataclass(frozen=True)
class Case:
    """A model, one of its tasks, the pictures that the request carries, and those of them that it could do without."""

    model_id: str
    task: str
    pictures: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    takes: Mapping[str, float | str] = field(default_factory=dict)  # further settings that must change the frames

    def __str__(self) -> str:
        return "-".join((self.model_id, self.task, *self.pictures))

    @property
    def model(self) -> Model:
        return CATALOG.get(self.model_id)

    @property
    def side(self) -> int:
        return 2 * self.model.spatial_multiple


PAIR = {"guidance2_scale": 9.0}
NEGATIVE = {"negative_prompt": "blue square"}
CASES = [
    Case("wan_t2v_1.3B", "t2v", takes=NEGATIVE),
    Case("wan_t2v_14B", "t2v", takes=NEGATIVE),
    Case("wan_i2v_14B", "i2v", (START,), takes=NEGATIVE),
    Case("wan_i2v_720p_14B", "i2v", (START,), takes=NEGATIVE),
    Case("wan_flf2v_720p_14B", "flf2v", (START, END), takes=NEGATIVE),
    Case("wan_vace_1.3B", "t2v", takes=NEGATIVE),
    Case("wan_vace_1.3B", "vace", (START, END, REFS), optional=(START, END, REFS), takes=NEGATIVE),
    Case("wan_vace_14B", "t2v", takes=NEGATIVE),
    Case("wan_vace_14B", "vace", (START, END, REFS), optional=(START, END, REFS), takes=NEGATIVE),
    Case("wan22_t2v_14B", "t2v", takes=PAIR | NEGATIVE),
    Case("wan22_i2v_14B", "i2v", (START, END), optional=(END,), takes=PAIR | NEGATIVE),
    Case("wan22_ti2v_5B", "t2v", takes=NEGATIVE),
    Case("wan22_ti2v_5B", "i2v", (START,), takes=NEGATIVE),
    Case("wan22_vace_fun_14B", "t2v", takes=PAIR | NEGATIVE),
    Case("wan22_vace_fun_14B", "vace", (START, END, REFS), optional=(START, END, REFS), takes=PAIR | NEGATIVE),
    Case("fastwan_t2v_1.3B", "t2v"),
    Case("fastwan_t2v_14B", "t2v"),
    Case("fastwan22_ti2v_5B", "t2v"),
    Case("fastwan22_ti2v_5B", "i2v", (START,)),
    Case("wan_t2v_14B_lightx2v", "t2v"),
    Case("wan_i2v_14B_lightx2v", "i2v", (START,)),
    Case("wan_t2v_14B_causvid", "t2v"),
    Case("wan_vace_14B_causvid", "t2v"),
    Case("wan_vace_14B_causvid", "vace", (START, END, REFS), optional=(START, END, REFS)),
    Case("wan22_t2v_14B_lightning", "t2v", takes=PAIR),
    Case("wan22_i2v_14B_lightning", "i2v", (START, END), optional=(END,), takes=PAIR),
    Case("anyflow_t2v_1.3B", "t2v"),
    Case("anyflow_t2v_14B", "t2v"),
]  # fmt: skip
RECIPES = [case for case in CASES if case.model.recipe_loras]
KEEPS_START = [case for case in CASES if case.model_id in ("wan22_ti2v_5B", "fastwan22_ti2v_5B") and case.pictures]

# Every case is asked for with these, and then once more with each of `changes`.
PLAIN: Mapping[str, Any] = {
    "prompt": "red circle moving right",
    "video_length": FRAMES,
    "num_inference_steps": STEPS,
    "guidance_scale": 4.0,
    "flow_shift": 5.0,
    "seed": SEED,
}


def blocks(side: int, seed: int) -> Frames:
    """A picture (side, side, 3) of plain blocks in colours of their own, which the tiny VAEs carry nearly unchanged."""
    colours = np.random.default_rng(seed).integers(40, 216, (side // BLOCK, side // BLOCK, 3), dtype=np.uint8)
    return colours.repeat(BLOCK, 0).repeat(BLOCK, 1)


def encoded(pixels: Frames) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def picture(name: str, side: int, seed: int) -> Any:
    data = encoded(blocks(side, seed))
    return [data] if name == REFS else data


def request_of(case: Case) -> dict[str, Any]:
    pictures = {name: picture(name, case.side, seed) for seed, name in enumerate(case.pictures)}
    size = f"{case.side}x{case.side}"
    return {**PLAIN, "model_type": case.model_id, "resolution": size, **pictures}


def changes(case: Case) -> dict[str, dict[str, Any]]:
    """What is changed in each further run → the changed fields. `None` leaves a field out."""
    common = {"prompt": "blue square going up", "guidance_scale": 9.0, "flow_shift": 1.5, "seed": SEED + 1}
    settings = {**common, **case.takes}
    others = {name: picture(name, case.side, 100) for name in case.pictures}
    return {
        **{name: {name: value} for name, value in settings.items()},
        **{f"another {name}": {name: value} for name, value in others.items()},
        **{f"no {name}": {name: None} for name in case.optional},
    }


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a tiny checkpoint of every model; a recipe has LoRAs only, its weights are those of its base."""
    daemon = Daemon(tmp_path_factory.mktemp("studio"))
    daemon.environment = os.environ | {"OMP_NUM_THREADS": "1"}  # in so small a model, threads only wait for each other
    for model in CATALOG:
        if model.builtin:
            continue
        folder = daemon.models / model.id
        wan.build(model.id, folder)
        if model.recipe_loras:
            for path in folder.iterdir():
                if path.name != "loras":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with daemon:
        yield daemon


def made(studio: Daemon, state: dict[str, Any]) -> list[Path]:
    """The files of a task that must have been completed."""
    assert state["status"] == "completed", state
    return [studio.outputs / file["filename"] for file in state["files"]]


@dataclass(frozen=True)
class Runs:
    """What the runs of a case came to, by what was changed in them."""

    case: Case
    states: Mapping[str, dict[str, Any]]
    videos: Mapping[str, list[Frames]]

    def __getitem__(self, name: str) -> Frames:
        return self.videos[name][0]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, studio: Daemon) -> Runs:
    """All runs of one case, made once for all tests of it."""
    case: Case = request.param
    plain = request_of(case)
    wanted = {"plain": {}, "again": {}, "batch": {"batch_size": 2}, **changes(case)}
    ids = {name: studio.submit(**plain | change)["task_id"] for name, change in wanted.items()}
    states = {name: studio.finish(task_id) for name, task_id in ids.items()}
    videos = {name: [read_video(path) for path in made(studio, state)] for name, state in states.items()}
    return Runs(case, states, videos)


every_case = pytest.mark.parametrize("runs", CASES, indirect=True, ids=str)


def test_the_table_has_every_model_and_every_task() -> None:
    described = {(model.id, task) for model in CATALOG if not model.builtin for task in model.tasks}
    assert {(case.model_id, case.task) for case in CASES} == described


def test_the_table_has_every_input_of_every_model() -> None:
    for model in CATALOG:
        cases = [case for case in CASES if case.model_id == model.id]
        sent = {name for case in cases for name in case.pictures}
        assert model.builtin or sent == {name for name in (START, END, REFS) if model.takes(name)}
        for case in cases:
            has = {name for name in PAIR | NEGATIVE if model.has_setting(name, case.task)}
            assert case.takes.keys() == has


@every_case
def test_a_model_makes_the_video_that_was_asked_for(runs: Runs) -> None:
    case, state = runs.case, runs.states["plain"]
    file, side = state["files"][0], case.side
    assert runs["plain"].shape == (FRAMES, side, side, 3)
    assert (file["type"], file["frames"], file["width"], file["height"]) == ("video", FRAMES, side, side)
    assert (file["fps"], file["seed"], len(state["files"])) == (case.model.fps, SEED, 1)
    assert (state["current_step"], state["total_steps"], state["progress"]) == (STEPS, STEPS, 100)
    assert (state["settings"]["task"], state["warnings"]) == (case.task, [])


@every_case
def test_the_same_seed_gives_the_same_frames(runs: Runs) -> None:
    assert np.array_equal(runs["plain"], runs["again"])


@every_case
def test_every_input_changes_the_frames(runs: Runs) -> None:
    same = [name for name in changes(runs.case) if difference(runs["plain"], runs[name]) < 1.0]
    assert same == []


BATCH_TOLERANCE = 0.5  # levels of 255, on average; 0.1 has been seen, where a changed seed makes 40 and more


@every_case
def test_a_batch_is_the_single_runs(runs: Runs) -> None:
    """Equal but for rounding: a batch adds up in another order, and the codec may then choose otherwise."""
    first, second = runs.videos["batch"]
    assert difference(first, runs["plain"]) < BATCH_TOLERANCE
    assert difference(second, runs["seed"]) < BATCH_TOLERANCE


def difference(one: Frames, other: Frames) -> float:
    """Mean distance in levels of 255."""
    return float(np.abs(one.astype(float) - other).mean())


@pytest.mark.parametrize("runs", KEEPS_START, indirect=True, ids=str)
def test_the_start_image_is_the_first_frame(runs: Runs) -> None:
    sent = blocks(runs.case.side, 0)
    assert difference(runs["plain"][0], sent) < 3.0


@pytest.mark.parametrize("runs", RECIPES, indirect=True, ids=str)
def test_a_recipes_loras_change_the_frames_of_its_base(runs: Runs, studio: Daemon) -> None:
    state = studio.run(**{**request_of(runs.case), "model_type": runs.case.model.base})
    assert difference(read_video(studio.made(state)), runs["plain"]) > 1.0


def test_a_switch_to_another_model_and_back_gives_the_same_frames_and_loads_each_once(studio: Daemon) -> None:
    tiny = request_of(CASES[0])
    demo = {**PLAIN, "model_type": "wan_demo", "resolution": "64x64"}
    before = studio.log.stat().st_size
    states = [studio.run(**fields) for fields in (demo, tiny, tiny, demo)]
    videos = [read_video(studio.made(state)) for state in states]
    assert np.array_equal(videos[0], videos[3])
    assert np.array_equal(videos[1], videos[2])
    loaded = re.findall(r"loaded model (\S+)", studio.log.read_text()[before:])
    assert loaded[-2:] == [CASES[0].model_id, "wan_demo"]
    assert len(loaded) <= 3  # wan_demo may have been there from before


# --------------------------------------------------------------------------------------------------------- refusals


def required(model: Model) -> tuple[str, ...]:
    """The pictures without which the model can do nothing."""
    cases = [case for case in CASES if case.model_id == model.id]
    return () if any(not case.pictures for case in cases) else tuple(set(cases[0].pictures) - set(cases[0].optional))


TINY = [model for model in CATALOG if not model.builtin]
NEEDS = [(model, name) for model in TINY for name in required(model)]
REFUSES = [(model, name) for model in TINY for name in (START, END, REFS) if not model.takes(name)]


def refused(studio: Daemon, model: Model, *names: str) -> str:
    """The sentence of a request with these pictures; nothing is queued."""
    pictures = {name: picture(name, 32, 0) for name in names}
    answer = studio.post("/generate", {"prompt": "a cat", "model_type": model.id, **pictures})
    assert answer.status_code == 400
    assert studio.get("/queue").json()["data"]["total_tasks"] == 0
    return str(answer.json()["detail"])


@pytest.mark.parametrize(("model", "name"), NEEDS, ids=lambda value: getattr(value, "id", value))
def test_a_picture_that_a_model_needs_is_asked_for(studio: Daemon, model: Model, name: str) -> None:
    others = [other for other in required(model) if other != name]
    assert refused(studio, model, *others) == f"{name}: model '{model.id}' needs this image, and none was sent"


@pytest.mark.parametrize(("model", "name"), REFUSES, ids=lambda value: getattr(value, "id", value))
def test_a_picture_that_a_model_does_not_take_is_refused(studio: Daemon, model: Model, name: str) -> None:
    takers = ", ".join(model.id for model in CATALOG if model.takes(name))
    sentence = f"{name}: model '{model.id}' takes no such image; models that do: {takers}"
    assert refused(studio, model, name) == sentence
