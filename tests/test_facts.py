"""engine/queue/facts.py: what a job will take, by what others of its model took."""

from pathlib import Path
from typing import Any

import pytest

from engine.admission import Media, resolve
from engine.catalog.models import Catalog
from engine.job import Job, Result
from engine.queue.facts import Facts

CATALOG = Catalog.load()
RESULT = Result(files=(), timings={"loading": 2.0, "denoising": 8.0, "decoding": 1.0}, peak_memory_bytes=0)
SOUND = Media((Path("0" * 64),), seconds=5.0)


def job(model_id: str, *inputs: str, **sent: Any) -> Job:
    return resolve(CATALOG, CATALOG.get(model_id), {"prompt": "rain", **sent}, dict.fromkeys(inputs, SOUND)).job


def test_a_sound_of_twice_the_length_takes_twice_the_time() -> None:
    facts = Facts()
    facts.learn(job("longcat_audio_1B", duration_seconds=10.0), RESULT, loaded=True)
    longer = job("longcat_audio_1B", duration_seconds=20.0)
    assert facts.estimate_s(longer, warm=True) == pytest.approx(18.0)
    assert facts.estimate_s(longer, warm=False) == pytest.approx(20.0)


def test_a_cover_takes_what_the_last_one_took() -> None:
    facts, cover = Facts(), job("ace_step_v1_5_turbo", "audio_source")
    facts.learn(cover, RESULT, loaded=True)
    assert facts.estimate_s(cover, warm=True) == pytest.approx(9.0)
