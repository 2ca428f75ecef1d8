"""Weights stored in float32 are rewritten once: the same tensors are loaded, and the user's files stay."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.catalog.models import PACKAGE, Catalog
from engine.catalog.weights import INDEX, Weights
from engine.gpu.load import conversion, pipelines, prepared
from engine.gpu.load.conversion import cast
from engine.gpu.load.prepared import STORE
from engine.gpu.session import ModelSession
from engine.job import EngineConfig

DEMO = dataclasses.replace(Catalog.load().get("wan_demo"), dtypes={"transformer": "bfloat16", "vae": "float32"})
CARD = torch.device("cuda")  # nothing is placed on it: it only decides the dtypes
DTYPE_OF = partial(pipelines.dtype_of, DEMO, CARD)
BF16 = torch.bfloat16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The embedded model as a user's, with weights in float32 that no narrower dtype holds as they are."""
    folder = Path(shutil.copytree(PACKAGE / "demo", tmp_path / "models" / "mine"))
    for file in folder.rglob("*.safetensors"):
        tensors = {name: tensor.float() * (1 + 1e-4) for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def models_dir(source: Path) -> Path:
    return source.parent


@pytest.fixture(autouse=True)
def room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ROOM_BYTES", 0)  # the disk of the tests may be nearly full


def dtypes(folder: Path) -> set[str]:
    """The dtypes of all weights in the folder of a component."""
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # no mapping
    return found


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in the folder of a component."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def copies(models_dir: Path) -> list[str]:
    """The names of the copies, without what they were made from."""
    folders = (path for path in (models_dir / STORE).glob("*.*.*.*"))
    return sorted(path.name.rpartition(".")[0] for path in folders)


def state(part: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(part.state_dict())


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def seen(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# ---- what is loaded


def test_what_is_loaded_is_what_a_cast_would_give(source: Path, models_dir: Path) -> None:
    before = pipelines.load(DEMO, DEMO.pipelines["t2v"], Weights(source), CARD)
    after = pipelines.load(DEMO, DEMO.pipelines["t2v"], cast(Weights(source), None, DTYPE_OF, models_dir), CARD)
    for name in ("transformer", "text_encoder", "vae"):
        assert same(state(before.components[name]), state(after.components[name]))


def test_the_copies_are_in_the_dtypes_of_the_catalogue(source: Path, models_dir: Path) -> None:
    parts = cast(Weights(source), None, DTYPE_OF, models_dir).parts
    assert dtypes(parts["text_encoder"]) == {"BF16"}
    assert dtypes(parts["transformer"]) == {"BF16", "F32"}  # its class keeps some in float32
    assert "vae" not in parts  # computed in float32, so it needs no copy


def test_the_users_files_are_not_touched(source: Path, models_dir: Path) -> None:
    before = seen(source)
    cast(Weights(source), None, DTYPE_OF, models_dir)
    assert seen(source) == before


def test_on_a_cpu_nothing_is_rewritten(source: Path, models_dir: Path) -> None:
    weights = Weights(source)
    assert cast(weights, None, partial(pipelines.dtype_of, DEMO, torch.device("cpu")), models_dir) == weights
    assert not (models_dir / STORE).exists()


def session(models_dir: Path, **settings: Any) -> ModelSession:
    config = EngineConfig(models_dir, models_dir, device="cpu", **settings)
    made = ModelSession(config, lambda _: None, lambda *_: None)
    made._device = CARD  # as if there were one
    return made


def test_a_worker_on_a_card_loads_the_copies(source: Path, models_dir: Path) -> None:
    found = session(models_dir)._cast(Weights(source), DEMO, "none")
    assert {path.parent for path in found.parts.values()} == {models_dir / STORE}
    assert found.parts.keys() == {"text_encoder", "transformer"}


def test_a_denoiser_that_is_quantised_needs_no_copy(source: Path, models_dir: Path) -> None:
    session(models_dir)._cast(Weights(source), DEMO, "int8")
    assert copies(models_dir) == ["mine.text_encoder.bfloat16"]


def test_switched_off_it_loads_the_files_as_they_are(source: Path, models_dir: Path) -> None:
    weights = Weights(source)
    assert session(models_dir, convert_float32=False)._cast(weights, DEMO, "none") == weights
    assert not (models_dir / STORE).exists()


def test_a_component_from_a_repository_of_its_own_is_rewritten_too(source: Path, models_dir: Path) -> None:
    part = shutil.move(source / "text_encoder", models_dir / "encoder")
    found = cast(Weights(source, parts={"text_encoder": Path(part)}), None, DTYPE_OF, models_dir)
    assert dtypes(found.parts["text_encoder"]) == {"BF16"}


# ---- once


def test_the_second_load_finds_the_copies(source: Path, models_dir: Path) -> None:
    first = cast(Weights(source), None, DTYPE_OF, models_dir)
    before = seen(models_dir / STORE)
    assert cast(Weights(source), None, DTYPE_OF, models_dir) == first
    assert seen(models_dir / STORE) == before


def test_weights_that_changed_are_rewritten_and_the_old_copy_goes(source: Path, models_dir: Path) -> None:
    cast(Weights(source), None, DTYPE_OF, models_dir)
    file = source / "text_encoder" / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    parts = cast(Weights(source), None, DTYPE_OF, models_dir).parts
    assert same(weights_in(parts["text_encoder"]), {name: t.to(BF16) for name, t in tensors.items()})
    assert copies(models_dir) == ["mine.text_encoder.bfloat16", "mine.transformer.bfloat16"]


def test_what_a_killed_process_left_is_removed_and_never_read(source: Path, models_dir: Path) -> None:
    copy = cast(Weights(source), None, DTYPE_OF, models_dir).parts["text_encoder"]
    shutil.rmtree(copy)
    left = copy.with_name(f"{copy.name}.part")
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert cast(Weights(source), None, DTYPE_OF, models_dir).parts["text_encoder"] == copy
    assert not left.exists()
    assert dtypes(copy) == {"BF16"}


# ---- what is left alone


def test_a_disk_without_room_is_no_fault(source: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "ROOM_BYTES", 1 << 60)
    weights = Weights(source)
    assert cast(weights, None, DTYPE_OF, models_dir) == weights
    assert copies(models_dir) == []


def test_a_copy_that_can_not_be_finished_leaves_nothing(
    source: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, "save_file", full)
    weights = Weights(source)
    assert cast(weights, None, DTYPE_OF, models_dir) == weights
    assert [path.name for path in (models_dir / STORE).iterdir()] == [".lock"]


def test_a_folder_that_can_not_be_written_is_no_fault(source: Path, models_dir: Path) -> None:
    (models_dir / STORE).write_text("a file where the folder should be")
    weights = Weights(source)
    assert cast(weights, None, DTYPE_OF, models_dir) == weights


def component(folder: Path, tensors: dict[str, torch.Tensor], cls: str = "WanTransformer3DModel") -> Path:
    """A model's folder with this component alone."""
    (folder / "transformer").mkdir(parents=True)
    (folder / INDEX).write_text(json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", cls]}))
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": cls}))
    save_file(tensors, folder / "transformer" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return folder


def rewritten(folder: Path, variant: str | None = None, dtype: torch.dtype = BF16) -> Path:
    """Where the component is loaded from."""
    parts = cast(Weights(folder), variant, lambda _: dtype, folder.parent).parts
    return parts.get("transformer", folder / "transformer")


def test_weights_in_bfloat16_are_left_alone(tmp_path: Path) -> None:
    few = {"a": torch.ones(100, dtype=BF16), "norm": torch.ones(2)}  # the little that is float32 is not worth it
    folder = component(tmp_path / "model", few)
    assert rewritten(folder) == folder / "transformer"


def test_a_class_that_nobody_knows_is_left_alone(tmp_path: Path) -> None:
    folder = component(tmp_path / "model", {"a": torch.ones(8)}, cls="SomebodysOwnModel")
    assert rewritten(folder) == folder / "transformer"


def test_numbers_that_are_no_floats_stay_as_they_are(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "whole": torch.tensor([1, 2**40]),
        "wide": torch.randn(5, 3),
        "scalar": torch.tensor(1 / 3),
        "nothing": torch.ones(0, 4),
        "double": torch.randn(3, dtype=torch.float64),
        "time_embedder.kept": torch.randn(3),
    }
    found = weights_in(rewritten(component(tmp_path / "model", tensors)))
    shrink = {"wide", "scalar", "nothing", "double"}
    assert same(found, {name: t.to(BF16) if name in shrink else t for name, t in tensors.items()})


def test_float16_is_written_where_it_is_computed_in(tmp_path: Path) -> None:
    assert dtypes(rewritten(component(tmp_path / "model", {"a": torch.ones(8)}), dtype=torch.float16)) == {"F16"}


def test_only_the_shards_of_the_variant_are_copied(tmp_path: Path) -> None:
    folder = component(tmp_path / "model", {"old": torch.ones(2)})
    names = [f"diffusion_pytorch_model.ema-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"t{number}": torch.ones(4)}, folder / "transformer" / name, {"format": "pt"})
    index = {"metadata": {"total_size": 32}, "weight_map": {"t0": names[0], "t1": names[1]}}
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.ema.json").write_text(json.dumps(index))
    assert weights_in(rewritten(folder, "ema")).keys() == {"t0", "t1"}


def test_large_copies_are_shards_that_load_as_one(
    source: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "SHARD_BYTES", 20_000)
    plain = pipelines.load(DEMO, DEMO.pipelines["t2v"], Weights(source), CARD)
    weights = cast(Weights(source), None, DTYPE_OF, models_dir)
    assert all(len(list(part.glob("*.safetensors"))) > 1 for part in weights.parts.values())
    pipe = pipelines.load(DEMO, DEMO.pipelines["t2v"], weights, CARD)
    assert all(same(state(pipe.components[name]), state(plain.components[name])) for name in weights.parts)


def test_a_component_that_a_single_file_replaces_is_not_rewritten(source: Path, models_dir: Path) -> None:
    file = source / "transformer" / "diffusion_pytorch_model.safetensors"
    assert cast(Weights(source, files={"": file}), None, DTYPE_OF, models_dir).parts.keys() == {"text_encoder"}


def test_a_link_of_the_hubs_cache_is_followed(tmp_path: Path) -> None:
    folder = component(tmp_path / "snapshots" / "abc", {"a": torch.ones(8)})
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    blob = tmp_path / "blob"
    shutil.move(file, blob)
    file.symlink_to(blob)
    assert dtypes(rewritten(folder)) == {"BF16"}
