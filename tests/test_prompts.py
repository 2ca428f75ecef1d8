"""Remembered prompts: the encoders do not run for words that they have read, and the frames are the same bytes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from engine.admission import resolve
from engine.catalog.models import PACKAGE, Catalog
from engine.catalog.weights import Weights
from engine.gpu.load import pipelines
from engine.gpu.run import render
from engine.gpu.run.meter import Meter
from engine.gpu.run.prompts import SUFFIX, Prompts, Reading, encoder_of
from engine.job import Board, Job
from tests.daemon import Daemon

CATALOG = Catalog.load()
DEMO = CATALOG.get("wan_demo")
WEIGHTS = Weights(PACKAGE / "demo")
MIB = 2**20


@pytest.fixture
def pipe() -> Any:
    torch.set_num_threads(1)
    return pipelines.load(DEMO, DEMO.pipelines["t2v"], WEIGHTS, torch.device("cpu"))


def job(prompt: str = "a red circle moving right", **fields: Any) -> Job:
    sent = {"prompt": prompt, "seed": 3, "num_inference_steps": 2, "video_length": 5, **fields}
    return resolve(CATALOG, DEMO, sent, {}).job


def frames(pipe: Any, wanted: Job) -> Any:
    (clip,) = render.render(pipe, DEMO, wanted, Meter(Board(), 1))
    assert clip.frames is not None
    return torch.cat(list(clip.frames)).numpy()


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """One entry for each forward of the text encoder."""
    calls: list[int] = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


# ---- on the embedded model


def test_words_that_were_read_are_not_read_again_and_the_frames_are_the_same_bytes(pipe: Any, tmp_path: Path) -> None:
    without = frames(pipe, job())
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    with counted(pipe) as calls:
        first = frames(pipe, job())
        read = len(calls)
        second = frames(pipe, job())
    assert (read, len(calls)) == (2, 2)  # the prompt and the negative one
    assert np.array_equal(first, without)
    assert np.array_equal(second, without)


def test_another_seed_or_size_reads_nothing_either(pipe: Any, tmp_path: Path) -> None:
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    frames(pipe, job())
    with counted(pipe) as calls:
        frames(pipe, job(seed=4, video_length=9))
    assert calls == []


@pytest.mark.parametrize("change", [{"prompt": "a blue square"}, {"negative_prompt": "blurred"}])
def test_other_words_are_read(pipe: Any, tmp_path: Path, change: dict[str, str]) -> None:
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    frames(pipe, job())
    with counted(pipe) as calls:
        frames(pipe, job(**change))
    assert calls


def test_they_outlive_the_process(pipe: Any, tmp_path: Path) -> None:
    store = Prompts(tmp_path, MIB)
    store.remember(pipe, "umt5")
    before = frames(pipe, job())
    del pipe.encode_prompt
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    with counted(pipe) as calls:
        assert np.array_equal(frames(pipe, job()), before)
    assert calls == []


def test_other_weights_read_for_themselves(pipe: Any, tmp_path: Path) -> None:
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    frames(pipe, job())
    del pipe.encode_prompt
    Prompts(tmp_path, MIB).remember(pipe, "another")
    with counted(pipe) as calls:
        frames(pipe, job())
    assert calls


def test_switched_off_nothing_is_kept(pipe: Any, tmp_path: Path) -> None:
    Prompts(tmp_path / "prompts", 0).remember(pipe, "umt5")
    with counted(pipe) as calls:
        frames(pipe, job())
        frames(pipe, job())
    assert len(calls) == 4
    assert not (tmp_path / "prompts").exists()


@pytest.mark.parametrize("damage", [b"", b"not a safetensors file", "half"])
def test_a_damaged_file_is_removed_and_the_words_read_again(pipe: Any, tmp_path: Path, damage: Any) -> None:
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    before = frames(pipe, job())
    files = sorted(tmp_path.iterdir())
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    del pipe.encode_prompt
    Prompts(tmp_path, MIB).remember(pipe, "umt5")
    with counted(pipe) as calls:
        assert np.array_equal(frames(pipe, job()), before)
    assert len(calls) == 2
    assert sorted(tmp_path.iterdir()) == files  # written anew, and nothing beside them


def test_the_encoder_is_known_by_its_files(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    file = tmp_path / "text_encoder" / "model.safetensors"
    file.write_bytes(b"one")
    before = encoder_of(pipe, Weights(tmp_path))
    assert encoder_of(pipe, Weights(tmp_path)) == before
    file.write_bytes(b"other")
    assert encoder_of(pipe, Weights(tmp_path)) != before


def test_the_denoiser_is_no_part_of_the_encoder(pipe: Any, tmp_path: Path) -> None:
    before = encoder_of(pipe, Weights(tmp_path))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    assert encoder_of(pipe, Weights(tmp_path)) == before


def test_a_task_leaves_its_prompts_in_the_state_folder(daemon: Daemon) -> None:
    state = daemon.run(num_inference_steps=1, video_length=5, prompt="a green triangle that nobody asked for yet")
    assert state["status"] == "completed"
    assert list((daemon.state / "prompts").glob(f"*{SUFFIX}"))


# ---- what is let through as it is


class Fake:
    """What `remember` sees of a pipeline; `read` does what a class's `encode_prompt` might."""

    _execution_device = torch.device("cpu")

    def __init__(self, read: Any = lambda _pipe, prompt: torch.full((1, 2), float(len(prompt)))) -> None:
        self.config = {"padded": True, "text_encoder": ("transformers", "Any")}
        self.components = {"text_encoder": torch.nn.Sequential(torch.nn.Linear(2, 2))}
        self.asked: list[Any] = []
        self._read = read

    def encode_prompt(self, prompt: Any, image: Any = None, device: Any = None) -> Any:
        self.asked.append((prompt, image, device))
        return self._read(self, prompt)


def remembering(folder: Path, read: Any = None) -> Fake:
    pipe = Fake(read) if read else Fake()
    Prompts(folder, MIB).remember(pipe, "fake")
    return pipe


def sets_an_attribute(pipe: Any, prompt: str) -> torch.Tensor:
    pipe.drop = len(prompt)
    return torch.ones(1)


READERS = {
    "draws a random number": lambda _pipe, _prompt: torch.rand(2),
    "sets an attribute": sets_an_attribute,
    "returns something of its own": lambda _pipe, _prompt: SimpleNamespace(embeds=torch.ones(1)),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_class_that_does_more_than_return_tensors_is_asked_each_time(tmp_path: Path, read: Any) -> None:
    pipe = remembering(tmp_path, read)
    pipe.encode_prompt("words")
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("seen", [torch.ones(2), Image.new("RGB", (2, 2)), [Image.new("RGB", (2, 2))]])
def test_words_that_come_with_a_picture_are_read_each_time(tmp_path: Path, seen: Any) -> None:
    pipe = remembering(tmp_path)
    pipe.encode_prompt("words", image=seen)
    pipe.encode_prompt("words", image=seen)
    assert len(pipe.asked) == 2


def test_while_a_lora_works_on_the_encoder_it_reads_for_itself(tmp_path: Path) -> None:
    pipe = remembering(tmp_path)
    pipe.encode_prompt("words")
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), pipe.components["text_encoder"])
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2
    for module in pipe.components["text_encoder"].modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2


def test_a_setting_of_the_pipeline_makes_it_another_reading(tmp_path: Path) -> None:
    pipe = remembering(tmp_path)
    pipe.encode_prompt("words")
    pipe.config["padded"] = False
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2


def test_the_same_call_written_otherwise_is_the_same(tmp_path: Path) -> None:
    pipe = remembering(tmp_path)
    pipe.encode_prompt("words", None, torch.device("cpu"))
    pipe.encode_prompt(device=torch.device("cpu"), prompt="words")
    assert len(pipe.asked) == 1


NESTED = (torch.ones(2, dtype=torch.bfloat16), None, [torch.tensor([True]), torch.arange(3)], 7, "words")


def test_what_was_nested_comes_back_nested(tmp_path: Path) -> None:
    remembering(tmp_path, lambda *_: NESTED).encode_prompt("words")
    pipe = remembering(tmp_path, lambda *_: NESTED)
    found = pipe.encode_prompt("words")
    assert pipe.asked == []
    assert torch.equal(found[0], NESTED[0])
    assert found[0].dtype == torch.bfloat16
    assert found[1] is None
    assert type(found[2]) is list
    assert [tensor.tolist() for tensor in found[2]] == [[True], [0, 1, 2]]
    assert found[3:] == (7, "words")


def test_a_pipeline_that_writes_into_what_it_got_changes_nothing_that_is_kept(tmp_path: Path) -> None:
    pipe = remembering(tmp_path)
    pipe.encode_prompt("words").zero_()
    assert pipe.encode_prompt("words").tolist() == [[5.0, 5.0]]


def test_a_class_without_a_door_to_its_encoder_is_left_alone(tmp_path: Path) -> None:
    pipe = SimpleNamespace()
    Prompts(tmp_path, MIB).remember(pipe, "none")
    assert vars(pipe) == {}


# ---- the bounds


def reading(kib: int) -> Reading:
    return Reading.of(torch.zeros(kib * 1024, dtype=torch.uint8))


def test_on_disk_the_readings_that_were_not_used_for_longest_go_first(tmp_path: Path) -> None:
    store = Prompts(tmp_path, 100 * 1024, memory_bytes=0)
    for number, name in enumerate("abc"):
        store.put(name, reading(30))
        file = tmp_path / f"{name}{SUFFIX}"
        if file.exists():
            os.utime(file, (number, number))
    assert store.get("a")  # so b is the oldest now
    store.put("d", reading(30))
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_in_memory_too(tmp_path: Path) -> None:
    store = Prompts(tmp_path, MIB, memory_bytes=100 * 1024)
    for name in "abc":
        store.put(name, reading(30))
    store.get("a")
    store.put("d", reading(30))
    for path in tmp_path.iterdir():
        path.unlink()
    assert [name for name in "abcd" if store.get(name)] == ["a", "c", "d"]


def test_a_disk_that_can_not_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("a file where the folder should be")
    pipe = Fake()
    Prompts(tmp_path / "prompts", MIB).remember(pipe, "fake")
    pipe.encode_prompt("words")
    assert pipe.encode_prompt("words").tolist() == [[5.0, 5.0]]
    assert len(pipe.asked) == 1
