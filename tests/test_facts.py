"""engine/queue/facts.py: what a job will take, by what others of its model took."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from engine.admission import Media, resolve
from engine.catalog.models import Catalog
from engine.job import Job, Result
from engine.queue.facts import Facts

CATALOG = Catalog.load()
TIMINGS = {"loading": 2.0, "denoising": 8.0, "decoding": 1.0}
SOUND = Media((Path("0" * 64),), seconds=5.0)


def job(model_id: str, *inputs: str, **sent: Any) -> Job:
    return resolve(CATALOG, CATALOG.get(model_id), {"prompt": "rain", **sent}, dict.fromkeys(inputs, SOUND)).job


def result(asked: Job) -> Result:
    """It took these times."""
    return Result((), TIMINGS, 0, step_s=TIMINGS["denoising"] / asked.steps)


def test_a_sound_of_twice_the_length_takes_twice_the_time() -> None:
    facts, first = Facts(CATALOG), job("longcat_audio_1B", duration_seconds=10.0)
    facts.learn(first, result(first), loaded=True)
    longer = job("longcat_audio_1B", duration_seconds=20.0)
    assert facts.estimate_s(longer, warm=True) == pytest.approx(18.0)
    assert facts.estimate_s(longer, warm=False) == pytest.approx(20.0)


def test_a_cover_takes_what_the_last_one_took() -> None:
    facts, cover = Facts(CATALOG), job("ace_step_v1_5_turbo", "audio_source")
    facts.learn(cover, result(cover), loaded=True)
    assert facts.estimate_s(cover, warm=True) == pytest.approx(9.0)


# ---- a machine with known costs


class Machine:
    """Takes for a job what its costs are: of a step (fixed, by size, by its square), and of what follows the steps."""

    def __init__(self, *step_s: float, rest_s: tuple[float, float], first_s: float = 0.0) -> None:
        self._step_s, self._rest_s, self._first_s = step_s, rest_s, first_s

    def run(self, asked: Job, *, cold: bool) -> Result:
        """The times of a job; its first one takes longer in every part."""
        work = Facts(CATALOG).work(asked)
        assert work
        size = work.voxels / 1e6
        step_s = work.passes * sum(cost * size**power for power, cost in enumerate(self._step_s))
        rest_s = self._rest_s[0] + self._rest_s[1] * size
        first_s = self._first_s if cold else 0.0
        timings = {
            "loading": 30.0 if cold else 0.0,
            "encoding": 0.5 + first_s,
            "denoising": asked.steps * work.runs * step_s + first_s,
            "decoding": work.runs * rest_s + first_s,
        }
        return Result((), timings, 0, step_s=step_s if asked.steps > 2 else 0.0)

    def takes_s(self, asked: Job) -> float:
        """The whole of a job on a warm model."""
        return sum(self.run(asked, cold=False).timings.values())


MACHINES = {
    "in proportion": Machine(0.0, 2.0, rest_s=(0.0, 0.5)),
    "mostly overheads": Machine(0.05, 0.001, rest_s=(0.4, 0.002)),
    "overheads and proportion": Machine(0.1, 0.5, rest_s=(1.0, 0.3)),
    "mostly attention": Machine(0.0, 0.1, 1.0, rest_s=(0.2, 0.5)),
    "a slow decoder": Machine(0.02, 0.1, rest_s=(0.5, 20.0)),
    "slow the first time": Machine(0.05, 0.2, 0.05, rest_s=(0.1, 0.1), first_s=3.0),
}
JOBS = [
    job("wan_demo", resolution=size, video_length=frames, **more)
    for size, frames in (("64x64", 1), ("64x64", 5), ("64x64", 33), ("256x256", 5), ("256x256", 81), ("512x512", 81))
    for more in ({}, {"num_inference_steps": 1}, {"batch_size": 10}, {"repeat_generation": 5}, {"guidance_scale": 6})
]
ANY_MACHINE = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


def taught(machine: Machine, *done: Job) -> Facts:
    """Facts after these jobs, the first of which loaded the model."""
    facts = Facts(CATALOG)
    for number, each in enumerate(done):
        facts.learn(each, machine.run(each, cold=not number), loaded=not number)
    return facts


def assert_right(estimate_s: float | None, takes_s: float) -> None:
    """Within a factor of two, but for the rounding to a tenth of a second; or nothing is known."""
    assert estimate_s is None or takes_s / 2 - 0.1 <= estimate_s <= takes_s * 2 + 0.1


@ANY_MACHINE
def test_after_one_job_an_estimate_is_right_within_a_factor_of_two_or_there_is_none(machine: Machine) -> None:
    for done in JOBS:
        facts = taught(machine, done)
        for asked in JOBS:
            assert_right(facts.estimate_s(asked, warm=True), machine.takes_s(asked))


@ANY_MACHINE
def test_after_two_jobs_an_estimate_is_right_within_a_factor_of_two_or_there_is_none(machine: Machine) -> None:
    for done in permutations(JOBS, 2):
        facts = taught(machine, *done)
        for asked in JOBS:
            assert_right(facts.estimate_s(asked, warm=True), machine.takes_s(asked))


@ANY_MACHINE
def test_the_same_job_again_has_an_estimate(machine: Machine) -> None:
    for done in JOBS:
        estimate_s = taught(machine, done, done).estimate_s(done, warm=True)
        assert estimate_s == pytest.approx(machine.takes_s(done), abs=0.1)


def test_another_size_has_no_estimate_before_two_sizes_around_it_are_known() -> None:
    small, between, large = (job("wan_demo", video_length=frames) for frames in (5, 13, 33))
    machine = MACHINES["overheads and proportion"]
    assert taught(machine, small).estimate_s(between, warm=True) is None
    known_s = taught(machine, small, small, large).estimate_s(between, warm=True)
    assert known_s == pytest.approx(machine.takes_s(between), rel=0.5)


def test_times_while_the_process_was_stopped_do_not_become_the_pace() -> None:
    from engine.gpu.run import meter as meters
    from engine.job import Board

    times = iter([0.0, 1.0, 2.0, 3.0, 4000.0, 4001.0, 4002.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meters.time, "perf_counter", lambda: next(times))
        meter = meters.Meter(Board(), 1)
        meter.begin_run(0, 1, 6)
        for step in range(1, 7):
            meter.step_done(step)
    assert meter.step_s == pytest.approx(1.0)


def test_jobs_of_one_size_are_estimated_once_until_something_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, first = Facts(CATALOG), job("longcat_audio_1B", duration_seconds=10.0)
    facts.learn(first, result(first), loaded=True)
    asked: list[Job] = []
    pace = facts.pace
    monkeypatch.setattr(facts, "pace", lambda one: [asked.append(one), pace(one)][1])
    same = [job("longcat_audio_1B", duration_seconds=10.0, seed=seed, prompt=f"{seed}") for seed in range(50)]
    assert {facts.estimate_s(one, warm=True) for one in same} == {9.0}
    assert len(asked) == 1
    for change in ({"duration_seconds": 5.0}, {"num_inference_steps": first.steps + 1}, {"repeat_generation": 2}):
        assert facts.estimate_s(job("longcat_audio_1B", **{"duration_seconds": 10.0, **change}), warm=True) != 9.0
    facts.learn(first, Result((), {"denoising": 80.0}, 0, step_s=80.0 / first.steps), loaded=False)
    assert facts.estimate_s(first, warm=True) == pytest.approx(80.0)
