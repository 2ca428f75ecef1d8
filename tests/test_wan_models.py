"""What the proof of every model (test_models.py) does not ask: recipes, switches, kept first frames, refusals."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.catalog.abilities import INPUTS
from engine.catalog.models import Model
from tests import proof, tiny
from tests.daemon import Daemon
from tests.proof import CATALOG, Case

FRAMES = 9
PLAIN = {"prompt": "red circle moving right", "video_length": FRAMES, "num_inference_steps": 4, "seed": 1234}
RECIPES = [model for model in CATALOG if model.recipe_loras and model.family == "wan"]
KEEPS_START = ["wan22_ti2v_5B", "fastwan22_ti2v_5B"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose models are put there test by test. Nearly lossless files."""
    daemon = Daemon(tmp_path_factory.mktemp("session"), video_crf=1, log_level="debug")
    daemon.environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with daemon:
        yield daemon


def run(session: Daemon, model: Model, folder: Path, **change: Any) -> proof.Run:
    """One run of the model's first task with all the inputs that it takes."""
    tiny.build(model, session.models)
    case = Case(model.id, model.tasks[0])
    return proof.finished(session, proof.submit(session, case, change, "", folder))


@pytest.mark.parametrize("model_id", KEEPS_START)
def test_the_start_image_is_the_first_frame(model_id: str, session: Daemon, tmp_path: Path) -> None:
    case = Case(model_id, "i2v")
    tiny.build(case.model, session.models)
    made = proof.finished(session, proof.submit(session, case, {}, "", tmp_path))
    sent = proof.blocks(case.side, case.inputs.index("image_start") + 1)
    assert np.abs(made.content[0] - sent).mean() < 3.0


@pytest.mark.parametrize("model", RECIPES, ids=lambda model: model.id)
def test_a_recipes_loras_change_the_frames_of_its_base(model: Model, session: Daemon, tmp_path: Path) -> None:
    plain = run(session, CATALOG.get(model.base), tmp_path, guidance_scale=1.0)
    assert proof.difference(run(session, model, tmp_path, guidance_scale=1.0), plain) > 1.0


def test_a_switch_to_another_model_and_back_gives_the_same_frames_and_loads_each_once(session: Daemon) -> None:
    tiny.build(CATALOG.get("wan_t2v_1.3B"), session.models)
    fields = [PLAIN | {"model_type": name, "resolution": "64x64"} for name in ("wan_demo", "wan_t2v_1.3B")]
    before = session.log.stat().st_size
    made = [session.made(session.run(**fields[number])) for number in (0, 1, 1, 0)]
    first, second, again, back = (proof.content(path) for path in made)
    assert np.array_equal(first, back)
    assert np.array_equal(second, again)
    loaded = re.findall(r"loaded model (\S+)", session.log.read_text()[before:])
    assert loaded[-2:] == ["wan_t2v_1.3B", "wan_demo"]
    assert len(loaded) <= 3  # wan_demo may have been there from before


# --------------------------------------------------------------------------------------------------------- refusals


VIDEO_MODELS = [model for model in CATALOG if model.family == "wan"]


def refused(session: Daemon, model: Model, name: str, folder: Path) -> str:
    """The sentence of a request with this input alone; nothing is queued."""
    case = Case("wan_t2v_1.3B", "t2v")
    words = {"prompt": "a cat", "model_type": model.id}
    file = proof.file_of(name, case, 0, folder)
    parts = [*((key, (None, value)) for key, value in words.items()), (name, ("file", file))]
    answer = session.request("POST", "/generate", files=parts)
    assert answer.status_code == 400
    assert session.get("/queue").json()["data"]["total_tasks"] == 0
    return str(answer.json()["detail"])


@pytest.mark.parametrize("model", VIDEO_MODELS, ids=lambda model: model.id)
def test_an_input_that_a_model_does_not_take_is_refused(model: Model, session: Daemon, tmp_path: Path) -> None:
    if not model.builtin:
        tiny.build(model, session.models)  # what is not installed is refused for that alone
    for name in INPUTS:
        if not model.takes(name):
            sentence = f"{name}: model '{model.id}' takes no such {INPUTS[name].kind}; models that do: "
            assert refused(session, model, name, tmp_path) == sentence + CATALOG.that_take(name)
