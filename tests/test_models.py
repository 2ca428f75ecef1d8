"""Every model of the catalogue, every task of it, through HTTP on a tiny checkpoint of its own classes."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import proof, tiny
from tests.daemon import ROOT, Daemon
from tests.proof import CATALOG, Case

CASES = [
    Case(model.id, task, tiny.proof(model.id, task))
    for model in sorted(CATALOG, key=lambda model: model.base or model.id)
    if not model.builtin
    for task in model.tasks
]
# One or two of each kind of pipeline: these run in `make test`, the others in `make test-all`.
QUICK = {
    "wan22_ti2v_5B-i2v",
    "wan_vace_1.3B-vace",
    "ltxv_0_9_5_2B-flf2v",
    "hunyuan15_t2v_480p-t2v",
    "svd-i2v",
    "flux_dev-inpaint",
    "sdxl_base-i2i",
    "qwen_image_edit_20B-i2i",
    "stable_audio_3_medium-t2a",
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon whose models are put there test by test. Nearly lossless files, so that small changes show."""
    daemon = Daemon(tmp_path_factory.mktemp("session"), video_crf=1)
    stand_in = str(ROOT / "tests" / "torchvision_stand_in")
    daemon.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": stand_in}
    with daemon:
        yield daemon


@pytest.mark.timeout(900)  # a dozen runs; on a busy machine those of the largest tiny models take minutes
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if str(case) in QUICK else [pytest.mark.proof], id=str(case)) for case in CASES],
)
def test_a_model_does_its_task(case: Case, session: Daemon, tmp_path: Path) -> None:
    tiny.build(case.model, session.models)
    runs = {name: proof.submit(session, case, change, other, tmp_path) for name, change, other in wanted(case)}
    results = {name: proof.finished(session, task_id) for name, task_id in runs.items()}
    assert list(proof.faults(case, results, session)) == []
    shutil.rmtree(session.models)  # tiny as they are, all of them would fill a small disk


def wanted(case: Case) -> Iterator[tuple[str, dict[str, object], str]]:
    yield "plain", {}, ""
    yield "again", {}, ""
    if case.model.pipelines[case.task].batch:
        yield "batch", {"batch_size": 2}, ""
    yield from proof.changes(case)


def test_every_quick_case_is_one() -> None:
    assert {str(case) for case in CASES} >= QUICK


def test_every_model_has_a_tiny_checkpoint() -> None:
    assert {model.id for model in CATALOG if not model.builtin} == set(tiny.MODELS)
