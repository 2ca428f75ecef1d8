"""engine/weights.py: where weights are found, what counts as installed, and the command that installs them."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from engine import weights
from engine.catalog import HERE, Catalog, Model
from tests.daemon import Daemon

CATALOG = Catalog.load()
PLAIN = CATALOG.get("wan_t2v_14B")
RECIPE = CATALOG.get("wan22_t2v_14B_lightning")  # two LoRA files on the weights of another model


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache of the test's own, with nothing in it."""
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


@pytest.fixture
def models_dir(tmp_path: Path) -> Path:
    return tmp_path / "models"


PARTS = {"transformer": ["diffusers", "WanTransformer3DModel"], "scheduler": ["diffusers", "UniPCMultistepScheduler"]}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def put_pipeline(folder: Path) -> Path:
    """A diffusers folder as far as `locate` can tell: a denoiser in two shards, a scheduler, and no second denoiser."""
    put(folder / "model_index.json", json.dumps({"_class_name": "X", **PARTS, "transformer_2": [None, None]}))
    put(folder / "scheduler" / "scheduler_config.json", "{}")
    put(folder / "transformer" / "config.json", "{}")
    index = {"weight_map": {f"layer.{number}": shard for number, shard in enumerate(SHARDS)}}
    put(folder / "transformer" / "model.safetensors.index.json", json.dumps(index))
    for shard in SHARDS:
        put(folder / "transformer" / shard)
    return folder


def put(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def put_snapshot(cache: Path, repo: str, commit: str = "c0ffee", ref: str | None = "main") -> Path:
    """The folder that the hub's own tools make for a repository."""
    cached = cache / f"models--{repo.replace('/', '--')}"
    if ref:
        put(cached / "refs" / ref, commit)
    return cached / "snapshots" / commit


def folder_of(model: Model, models_dir: Path) -> Path | None:
    found = weights.locate(model, models_dir)
    return found and found.folder


# ---------------------------------------------------------------------------------------------------------- located


def test_the_embedded_model_lies_in_the_package(models_dir: Path) -> None:
    assert folder_of(CATALOG.get("wan_demo"), models_dir) == HERE / "demo"


def test_nothing_is_found_where_nothing_is(models_dir: Path) -> None:
    assert weights.locate(PLAIN, models_dir) is None


def test_weights_are_found_in_models_dir(models_dir: Path) -> None:
    folder = put_pipeline(models_dir / PLAIN.id)
    assert weights.locate(PLAIN, models_dir) == weights.Weights(folder)


CACHES = {  # what is set in the environment, below the test's folder → where the cache is then
    "HF_HOME": ({"HF_HOME": "home"}, "home/hub"),
    "HF_HUB_CACHE": ({"HF_HUB_CACHE": "cache"}, "cache"),
    "both": ({"HF_HOME": "home", "HF_HUB_CACHE": "cache"}, "cache"),
    "XDG_CACHE_HOME": ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
    "none": ({"HOME": "person"}, "person/.cache/huggingface/hub"),
}


@pytest.mark.parametrize("case", CACHES)
def test_weights_are_found_in_the_hubs_cache(
    case: str, tmp_path: Path, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables, place = CACHES[case]
    monkeypatch.delenv("HF_HOME")
    for name, folder in variables.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    folder = put_pipeline(put_snapshot(tmp_path / place, PLAIN.repo))
    assert folder_of(PLAIN, models_dir) == folder


def test_models_dir_comes_before_the_cache(models_dir: Path, empty_cache: Path) -> None:
    put_pipeline(put_snapshot(empty_cache, PLAIN.repo))
    folder = put_pipeline(models_dir / PLAIN.id)
    assert folder_of(PLAIN, models_dir) == folder


def test_the_snapshot_is_the_one_that_main_names(models_dir: Path, empty_cache: Path) -> None:
    put_pipeline(put_snapshot(empty_cache, PLAIN.repo, "old", ref=None))
    folder = put_pipeline(put_snapshot(empty_cache, PLAIN.repo, "new"))
    assert folder_of(PLAIN, models_dir) == folder


def test_a_revision_of_the_catalogue_is_the_one_that_counts(models_dir: Path, empty_cache: Path) -> None:
    put_pipeline(put_snapshot(empty_cache, PLAIN.repo, "new"))
    tagged = put_pipeline(put_snapshot(empty_cache, PLAIN.repo, "tagged", ref="v1"))
    assert folder_of(dataclasses.replace(PLAIN, revision="v1"), models_dir) == tagged


def test_a_revision_may_be_a_commit(models_dir: Path, empty_cache: Path) -> None:
    put_pipeline(put_snapshot(empty_cache, PLAIN.repo, "new"))
    commit = put_pipeline(put_snapshot(empty_cache, PLAIN.repo, "c0ffee", ref=None))
    assert folder_of(dataclasses.replace(PLAIN, revision="c0ffee"), models_dir) == commit


# -------------------------------------------------------------------------------------------- not whole, not there

MISSING = ["model_index.json", "transformer", "scheduler", f"transformer/{SHARDS[1]}", f"transformer/{SHARDS[0]}"]


@pytest.mark.parametrize("cached", [False, True], ids=["models_dir", "cache"])
@pytest.mark.parametrize("missing", MISSING)
def test_a_broken_download_is_not_installed(missing: str, cached: bool, models_dir: Path, empty_cache: Path) -> None:
    folder = put_pipeline(put_snapshot(empty_cache, PLAIN.repo) if cached else models_dir / PLAIN.id)
    (folder / missing).rename(folder / "away")
    assert weights.locate(PLAIN, models_dir) is None


def test_a_denoiser_without_any_weights_is_not_installed(models_dir: Path) -> None:
    folder = put_pipeline(models_dir / PLAIN.id)
    for path in (folder / "transformer").glob("*safetensors*"):
        path.unlink()
    assert weights.locate(PLAIN, models_dir) is None


def test_an_index_that_is_cut_off_is_not_installed(models_dir: Path) -> None:
    folder = put_pipeline(models_dir / PLAIN.id)
    put(folder / "model_index.json", '{"_class_name": "X", "trans')
    assert weights.locate(PLAIN, models_dir) is None


def test_a_link_of_the_cache_into_nothing_is_not_installed(models_dir: Path, empty_cache: Path) -> None:
    folder = put_pipeline(put_snapshot(empty_cache, PLAIN.repo))
    shard = folder / "transformer" / SHARDS[0]
    shard.unlink()
    shard.symlink_to("../../../blobs/gone")
    assert weights.locate(PLAIN, models_dir) is None


def test_a_download_that_breaks_off_is_not_installed_and_goes_on(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def half(_repo: str, *, local_dir: Path, **_: Any) -> None:
        seen.append((local_dir / "model_index.json").exists())
        put_pipeline(local_dir)
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", half)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            weights.download(PLAIN, models_dir)
        assert weights.locate(PLAIN, models_dir) is None
    assert seen == [False, True]


def test_a_whole_download_is_installed(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def whole(repo: str, *, revision: str | None, local_dir: Path, ignore_patterns: list[str]) -> None:
        asked.append((repo, revision, "*.bin" in ignore_patterns))
        put_pipeline(local_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", whole)
    assert weights.download(PLAIN, models_dir) == weights.locate(PLAIN, models_dir)
    assert asked == [(PLAIN.repo, None, True)]


# ----------------------------------------------------------------------------------------------------------- recipes


def put_loras(folder: Path, *, nested: bool) -> tuple[Path, ...]:
    names = [Path(lora["file"]) for lora in RECIPE.recipe_loras]
    return tuple(put(folder / (name if nested else name.name)) for name in names)


@pytest.mark.parametrize("nested", [True, False], ids=["as in the repository", "by name"])
def test_a_recipe_is_its_bases_weights_and_its_loras(nested: bool, models_dir: Path) -> None:
    base = put_pipeline(models_dir / str(RECIPE.base))
    loras = put_loras(models_dir / RECIPE.id / "loras", nested=nested)
    assert weights.locate(RECIPE, models_dir) == weights.Weights(base, loras)


def test_the_loras_of_a_recipe_are_found_in_the_cache(models_dir: Path, empty_cache: Path) -> None:
    base = put_pipeline(models_dir / str(RECIPE.base))
    loras = put_loras(put_snapshot(empty_cache, RECIPE.recipe_loras[0]["repo"]), nested=True)
    assert weights.locate(RECIPE, models_dir) == weights.Weights(base, loras)


def test_a_recipe_that_lacks_a_lora_is_not_installed(models_dir: Path) -> None:
    put_pipeline(models_dir / str(RECIPE.base))
    put_loras(models_dir / RECIPE.id / "loras", nested=True)[1].unlink()
    assert weights.locate(RECIPE, models_dir) is None


def test_a_recipe_alone_is_not_installed(models_dir: Path) -> None:
    put_loras(models_dir / RECIPE.id / "loras", nested=True)
    assert weights.locate(RECIPE, models_dir) is None


# --------------------------------------------------------------------------------------------------------- installing


def fake_hf(command: str) -> None:
    """Do what each `hf download` of the command does, with empty files."""
    for part in " ".join(shlex.split(command)).split(" && "):
        words = shlex.split(part)
        assert words[:2] == ["hf", "download"]
        folder = Path(words[words.index("--local-dir") + 1])
        named = words[3 : words.index("--local-dir")]
        for name in named:
            put(folder / name)
        if not named:
            put_pipeline(folder)


@pytest.mark.parametrize("model", [model for model in CATALOG if model.repo], ids=lambda model: model.id)
def test_the_command_puts_the_weights_where_they_are_found(model: Model, models_dir: Path) -> None:
    fake_hf(weights.install_command(model, models_dir))
    assert weights.locate(model, models_dir) is not None


def test_the_command_for_a_plain_model() -> None:
    command = weights.install_command(PLAIN, Path("/srv/models"))
    assert command == "hf download Wan-AI/Wan2.1-T2V-14B-Diffusers --local-dir /srv/models/wan_t2v_14B"


def test_the_command_survives_a_space_in_the_path() -> None:
    words = shlex.split(weights.install_command(PLAIN, Path("/srv/my models")))
    assert words[-1] == "/srv/my models/wan_t2v_14B"


def test_the_command_names_the_revision_of_the_catalogue() -> None:
    command = weights.install_command(dataclasses.replace(PLAIN, revision="v1"), Path("/srv/models"))
    assert "--revision v1" in command


@pytest.mark.parametrize("model_id", ["wan22_vace_fun_14B", "wan_i2v_14B_lightx2v"])
def test_a_task_for_a_model_that_is_not_installed_is_refused_with_the_command(daemon: Daemon, model_id: str) -> None:
    before = daemon.get("/queue").json()
    answer = daemon.post("/generate", {"prompt": "a cat", "model_type": model_id})
    command = weights.install_command(CATALOG.get(model_id), daemon.models)
    assert (answer.status_code, answer.json()) == (
        400,
        {"detail": f"model_type: '{model_id}' is not installed; install it with: {command}"},
    )
    assert daemon.get("/queue").json() == before


def test_a_model_is_installed_as_soon_as_its_weights_are_there(daemon: Daemon) -> None:
    def installed() -> bool:
        return bool(daemon.get("/models/wan22_vace_fun_14B").json()["data"]["installed"])

    assert not installed()
    put_pipeline(daemon.models / "wan22_vace_fun_14B").rename(daemon.folder / "away")
    assert not installed()
    (daemon.folder / "away").rename(daemon.models / "wan22_vace_fun_14B")
    assert installed()
    (daemon.models / "wan22_vace_fun_14B").rename(daemon.folder / "away")
