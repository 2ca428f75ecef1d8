"""The session and the garbage collector: a loaded model is not searched after each task, and goes when it should."""

import gc
import weakref
from pathlib import Path

import torch

from engine.catalog.models import Catalog
from engine.gpu.session import ModelSession
from engine.job import EngineConfig

DEMO = Catalog.load().get("wan_demo")


def test_a_loaded_model_is_not_searched_for_garbage_and_is_gone_once_it_is_unloaded(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    session = ModelSession(EngineConfig(tmp_path, tmp_path, device="cpu"), lambda _: None, lambda *_: None)
    seen = weakref.ref(session.load(DEMO, "t2v").transformer)
    assert gc.get_freeze_count() > len(gc.get_objects())
    session._unload()
    assert gc.get_freeze_count() == 0
    assert seen() is None
