"""The prompt cache: the encoders do not run for a prompt that they have encoded, and the frames are the same bytes."""

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
from engine.gpu.run.prompts import Embeddings, PromptCache, encoder_of
from engine.job import Board, Job

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


def test_a_prompt_that_was_encoded_is_not_encoded_again_and_the_frames_are_the_same_bytes(pipe: Any) -> None:
    without = frames(pipe, job())
    PromptCache(MIB).attach(pipe, "umt5")
    with counted(pipe) as calls:
        first = frames(pipe, job())
        read = len(calls)
        second = frames(pipe, job())
    assert (read, len(calls)) == (2, 2)  # the prompt and the negative one
    assert np.array_equal(first, without)
    assert np.array_equal(second, without)


def test_another_seed_or_size_encodes_nothing_either(pipe: Any) -> None:
    PromptCache(MIB).attach(pipe, "umt5")
    frames(pipe, job())
    with counted(pipe) as calls:
        frames(pipe, job(seed=4, video_length=9))
    assert calls == []


@pytest.mark.parametrize("change", [{"prompt": "a blue square"}, {"negative_prompt": "blurred"}])
def test_another_prompt_is_encoded(pipe: Any, change: dict[str, str]) -> None:
    PromptCache(MIB).attach(pipe, "umt5")
    frames(pipe, job())
    with counted(pipe) as calls:
        frames(pipe, job(**change))
    assert calls


@pytest.mark.parametrize(("encoder", "encoded"), [("umt5", 0), ("another", 2)])
def test_a_model_that_is_loaded_again_finds_its_prompts_and_another_encoder_does_not(
    pipe: Any, encoder: str, encoded: int
) -> None:
    cache = PromptCache(MIB)
    cache.attach(pipe, "umt5")
    frames(pipe, job())
    del pipe.encode_prompt
    cache.attach(pipe, encoder)
    with counted(pipe) as calls:
        frames(pipe, job())
    assert len(calls) == encoded


def test_switched_off_nothing_is_kept(pipe: Any) -> None:
    PromptCache(0).attach(pipe, "umt5")
    with counted(pipe) as calls:
        frames(pipe, job())
        frames(pipe, job())
    assert len(calls) == 4


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


# ---- what is let through as it is


class Fake:
    """What the cache sees of a pipeline; `read` does what a class's `encode_prompt` might."""

    _execution_device = torch.device("cpu")

    def __init__(self, read: Any = lambda _pipe, prompt: torch.full((1, 2), float(len(prompt)))) -> None:
        self.config = {"padded": True, "text_encoder": ("transformers", "Any")}
        self.components = {"text_encoder": torch.nn.Sequential(torch.nn.Linear(2, 2))}
        self.asked: list[Any] = []
        self._read = read

    def encode_prompt(self, prompt: Any, image: Any = None, device: Any = None) -> Any:
        self.asked.append((prompt, image, device))
        return self._read(self, prompt)


def cached(read: Any = None) -> Fake:
    pipe = Fake(read) if read else Fake()
    PromptCache(MIB).attach(pipe, "fake")
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
def test_a_class_that_does_more_than_return_tensors_is_asked_each_time(read: Any) -> None:
    pipe = cached(read)
    pipe.encode_prompt("words")
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2


@pytest.mark.parametrize("seen", [torch.ones(2), Image.new("RGB", (2, 2)), [Image.new("RGB", (2, 2))]])
def test_a_prompt_with_a_picture_is_encoded_each_time(seen: Any) -> None:
    pipe = cached()
    pipe.encode_prompt("words", image=seen)
    pipe.encode_prompt("words", image=seen)
    assert len(pipe.asked) == 2


def test_while_a_lora_is_active_on_the_encoder_nothing_is_cached() -> None:
    pipe = cached()
    pipe.encode_prompt("words")
    inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), pipe.components["text_encoder"])
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2
    for module in pipe.components["text_encoder"].modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2


def test_another_setting_of_the_pipeline_is_another_entry() -> None:
    pipe = cached()
    pipe.encode_prompt("words")
    pipe.config["padded"] = False
    pipe.encode_prompt("words")
    assert len(pipe.asked) == 2


def test_the_same_call_written_otherwise_is_the_same() -> None:
    pipe = cached()
    pipe.encode_prompt("words", None, torch.device("cpu"))
    pipe.encode_prompt(device=torch.device("cpu"), prompt="words")
    assert len(pipe.asked) == 1


NESTED = (torch.ones(2, dtype=torch.bfloat16), None, [torch.tensor([True]), torch.arange(3)], 7, "words")


def test_what_was_nested_comes_back_nested() -> None:
    pipe = cached(lambda *_: NESTED)
    pipe.encode_prompt("words")
    found = pipe.encode_prompt("words")
    assert len(pipe.asked) == 1
    assert torch.equal(found[0], NESTED[0])
    assert found[0].dtype == torch.bfloat16
    assert found[1] is None
    assert type(found[2]) is list
    assert [tensor.tolist() for tensor in found[2]] == [[True], [0, 1, 2]]
    assert found[3:] == (7, "words")


def test_a_pipeline_that_writes_into_what_it_got_changes_nothing_that_is_kept() -> None:
    pipe = cached()
    pipe.encode_prompt("words").zero_()
    assert pipe.encode_prompt("words").tolist() == [[5.0, 5.0]]


def test_a_class_without_encode_prompt_is_left_alone() -> None:
    pipe = SimpleNamespace()
    PromptCache(MIB).attach(pipe, "none")
    assert vars(pipe) == {}


# ---- the bounds


def embeddings(kib: int) -> Embeddings:
    return Embeddings(torch.zeros(kib * 1024, dtype=torch.uint8))


def test_the_prompts_that_were_not_used_for_longest_go_first() -> None:
    cache = PromptCache(100 * 1024)
    for name in "abc":
        cache.put(name, embeddings(30))
    cache.get("a")
    cache.put("d", embeddings(30))
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]


def test_a_prompt_that_is_too_large_for_the_cache_is_not_kept() -> None:
    cache = PromptCache(100 * 1024)
    cache.put("a", embeddings(101))
    assert cache.get("a") is None
