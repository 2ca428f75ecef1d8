"""engine/catalog/weights.py: where weights are found, what counts as installed, and which files are needed."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import weights
from engine.catalog.models import PACKAGE, Catalog, Model
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


PARTS = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "tokenizer_2": ["transformers", "T5Tokenizer"],
}
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def put_pipeline(folder: Path) -> Path:
    """A diffusers folder as far as `locate` can tell: a denoiser in two shards, a scheduler, and no second denoiser."""
    put(folder / "model_index.json", json.dumps({"_class_name": "X", **PARTS, "transformer_2": [None, None]}))
    put(folder / "scheduler" / "scheduler_config.json", "{}")
    put(folder / "tokenizer_2" / "tokenizer.json", "{}")
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


def test_the_embedded_model_is_in_the_package(models_dir: Path) -> None:
    assert folder_of(CATALOG.get("wan_demo"), models_dir) == PACKAGE / "demo"


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


# ------------------------------------------------------------------------------------------- incomplete, not installed

MISSING = ["model_index.json", "transformer", "tokenizer_2", f"transformer/{SHARDS[1]}", f"transformer/{SHARDS[0]}"]


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


# ------------------------------------------------------------------------------------- components of other repositories


@pytest.fixture
def borrowing() -> Model:
    """A model whose denoiser and tokenizer come from elsewhere, the latter from the root of a model's repository."""
    return dataclasses.replace(PLAIN, extra_repos={"transformer": "me/denoisers#large", "tokenizer": "me/words"})


def put_borrowed(place: Path, cache: Path, *, cached: bool) -> dict[str, Path]:
    denoiser = put_snapshot(cache, "me/denoisers") / "large" if cached else place / "transformer"
    put(denoiser / "config.json", "{}")
    put(denoiser / "diffusion_pytorch_model.safetensors")
    words = put_snapshot(cache, "me/words") if cached else place / "tokenizer"
    put(words / "config.json", "{}")
    put(words / "tokenizer.json", "{}")
    return {"transformer": denoiser, "tokenizer": words}


@pytest.mark.parametrize("cached", [False, True], ids=["models_dir", "cache"])
def test_components_of_other_repositories_are_found(
    cached: bool, borrowing: Model, models_dir: Path, empty_cache: Path
) -> None:
    folder = put_pipeline(models_dir / PLAIN.id)
    shutil.rmtree(folder / "transformer")  # it need not be here
    parts = put_borrowed(folder, empty_cache, cached=cached)
    assert weights.locate(borrowing, models_dir) == weights.Weights(folder, parts=parts)


def test_a_model_that_lacks_a_borrowed_component_is_not_installed(
    borrowing: Model, models_dir: Path, empty_cache: Path
) -> None:
    folder = put_pipeline(models_dir / PLAIN.id)
    shutil.rmtree(put_borrowed(folder, empty_cache, cached=True)["tokenizer"])
    assert weights.locate(borrowing, models_dir) is None


# ------------------------------------------------------------------------------------------------------- what is needed

INDEX = json.dumps({"transformer": ["d", "X"], "tokenizer": ["t", "Y"], "gone": [None, None], "_class_name": "P"})
NOWHERE = Path("no such folder")


def needed(*names: str, **entry: Any) -> dict[str, Path]:
    """Of a repository with these files, what a model needs whose entry says this, and where each belongs."""
    model = dataclasses.replace(PLAIN, **entry)
    return weights.missing(model, NOWHERE)[0].pick(names, lambda name: INDEX if name == "model_index.json" else "")


WEIGHTS = {  # the variant that is wanted, and what a component has → what of it is needed
    "plain": (None, ["model.safetensors", "model.fp16.safetensors", "model.bin"], ["model.safetensors"]),
    "variant": ("fp16", ["model.safetensors", "model.fp16.safetensors"], ["model.fp16.safetensors"]),
    "no such variant": ("fp16", ["model.safetensors", "model.bf16.safetensors"], ["model.safetensors"]),
    "shards": (
        None,
        [SHARDS[0], "model.fp16-00001-of-00001.safetensors", "model.safetensors.index.json", "model.bin.index.json"],
        [SHARDS[0], "model.safetensors.index.json"],
    ),
    "shards of a variant": (
        "bf16",
        [*SHARDS, "model.bf16-00001-of-00001.safetensors", "model.safetensors.index.bf16.json"],
        ["model.bf16-00001-of-00001.safetensors", "model.safetensors.index.bf16.json"],
    ),
    "shards as they once were written": (
        "bf16",
        [*SHARDS, "model-00001-of-00001.bf16.safetensors", "model.safetensors.bf16.index.json"],
        ["model-00001-of-00001.bf16.safetensors", "model.safetensors.bf16.index.json"],
    ),
    "of another use": (None, ["model.safetensors", "ema.safetensors", "model.onnx"], ["model.safetensors"]),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_one_set_of_a_components_weights_is_needed(case: str) -> None:
    variant, there, wanted = WEIGHTS[case]
    picked = needed("model_index.json", *(f"transformer/{name}" for name in there), variant=variant)
    assert picked.keys() == {"model_index.json", *(f"transformer/{name}" for name in wanted)}


def test_of_a_tokenizer_everything_but_weights_is_needed() -> None:
    there = ["tokenizer.json", "spiece.model", "merges.txt", "chat_template.jinja", "model.safetensors", "load.py"]
    picked = needed("model_index.json", *(f"tokenizer/{name}" for name in there))
    assert picked.keys() == {"model_index.json", *(f"tokenizer/{name}" for name in there[:4])}


def test_the_index_comes_last() -> None:
    files = ["model_index.json", "transformer/config.json", "tokenizer/vocab.json"]
    assert list(needed(*files))[-1] == "model_index.json"


def test_a_component_from_elsewhere_is_not_needed() -> None:
    files = ["model_index.json", "transformer/config.json", "tokenizer/vocab.json"]
    assert needed(*files, extra_repos={"tokenizer": "me/words"}).keys() == set(files[:2])


def test_of_a_component_whose_weights_are_a_single_file_the_configuration_is_needed() -> None:
    files = ["model_index.json", "transformer/config.json", "transformer/model.safetensors"]
    assert needed(*files, single_file={"transformer": "own.gguf"}).keys() == set(files[:2])


@pytest.mark.parametrize(
    ("inside", "folder"), [("large", "large/"), ("", "transformer/"), ("", "")], ids=["named", "its own", "root"]
)
def test_a_component_is_taken_from_where_its_repository_has_it(inside: str, folder: str) -> None:
    model = dataclasses.replace(PLAIN, extra_repos={"transformer": f"me/repo#{inside}"})
    source = weights.missing(model, Path("models"))[-1]
    files = [f"{folder}config.json", f"{folder}model.safetensors", "other/model.safetensors"]
    into = Path("models") / PLAIN.id / "transformer"
    assert source.pick(files, str) == {name: into / Path(name).name for name in files[:2]}


def test_nothing_is_missing_of_what_is_installed(models_dir: Path) -> None:
    put_pipeline(models_dir / PLAIN.id)
    assert weights.missing(PLAIN, models_dir) == []


@pytest.mark.parametrize("model", [model for model in CATALOG if model.repo], ids=lambda model: model.id)
def test_what_is_missing_goes_to_where_it_is_found(model: Model, models_dir: Path) -> None:
    index = {"transformer": ["d", "X"], "scheduler": ["d", "Y"], **{name: ["d", "Z"] for name in model.extra_repos}}
    folders = [*index, *(place.partition("#")[2] for place in model.extra_repos.values())]
    there = ["model_index.json", *(lora["file"] for lora in model.recipe_loras)]
    there += [f"{folder}/{name}" for folder in folders for name in ("config.json", "model.safetensors")]
    for source in weights.missing(model, models_dir):
        for target in source.pick(there, lambda _: json.dumps(index)).values():
            put(target, json.dumps(index) if target.name == "model_index.json" else "{}")
    assert weights.locate(model, models_dir) is not None


# ------------------------------------------------------------------------------------------------------ a single file


def put_bare(folder: Path) -> Path:
    """A pipeline whose denoiser has its configuration only."""
    put_pipeline(folder)
    for path in (folder / "transformer").glob("model*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("named", ["own.gguf", {"transformer": "own.gguf"}], ids=["alone", "by component"])
def test_a_single_file_stands_for_the_denoisers_weights(named: Any, models_dir: Path) -> None:
    model = dataclasses.replace(PLAIN, id="own", base=PLAIN.id, single_file=named)
    folder = put_bare(models_dir / PLAIN.id)
    file = put(models_dir / "own.gguf")
    found = weights.locate(model, models_dir)
    assert found == weights.Weights(folder, files={"" if isinstance(named, str) else "transformer": file})
    assert weights.locate(PLAIN, models_dir) is None


def test_a_single_file_that_is_not_there_is_named(models_dir: Path) -> None:
    model = dataclasses.replace(PLAIN, id="own", base=PLAIN.id, single_file="own.gguf")
    put_bare(models_dir / PLAIN.id)
    assert weights.locate(model, models_dir) is None
    sentence = "its entry names the file own.gguf, which is not in models_dir; put it there"
    assert weights.remedy(model, models_dir) == sentence


# --------------------------------------------------------------------------------------------------- what a client sees


@pytest.mark.parametrize("model_id", ["wan22_vace_fun_14B", "wan_i2v_14B_lightx2v"])
def test_a_task_for_a_model_that_is_not_installed_is_refused_with_the_command(daemon: Daemon, model_id: str) -> None:
    before = daemon.get("/queue").json()
    answer = daemon.post("/generate", {"prompt": "a cat", "model_type": model_id})
    sentence = f"model_type: '{model_id}' is not installed; install it with: wangpd models download {model_id}"
    assert (answer.status_code, answer.json()) == (400, {"detail": sentence})
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


LISTS: dict[str, Callable[[Model], bool]] = {
    "": lambda _: True,
    "family=flux": lambda model: model.family == "flux",
    "family=none_such": lambda _: False,
    "task=t2a": lambda model: "t2a" in model.tasks,
    "task=i2v&family=wan": lambda model: "i2v" in model.tasks and model.family == "wan",
    "installed=true": lambda model: model.id == "wan_demo",
    "installed=false": lambda model: model.id != "wan_demo",
}


@pytest.mark.parametrize("query", LISTS)
def test_the_list_has_the_models_that_are_asked_for(query: str, daemon: Daemon) -> None:
    answer = daemon.get(f"/models?{query}").json()
    wanted = [model.id for model in CATALOG if LISTS[query](model)]
    assert [entry["id"] for entry in answer["data"]["models"]] == wanted
    assert answer["message"] == f"Found {len(wanted)} models"


@pytest.mark.parametrize("query", ["task=none", "installed=maybe"])
def test_a_filter_that_can_not_be_is_refused(query: str, daemon: Daemon) -> None:
    answer = daemon.get(f"/models?{query}")
    assert answer.status_code == 400
    name, _, value = query.partition("=")
    assert re.match(rf"{name}: ('{value}' must be true or false|must be one of )", answer.json()["detail"])


def test_each_model_of_the_list_has_its_limits(daemon: Daemon) -> None:
    for entry in daemon.get("/models").json()["data"]["models"]:
        model = CATALOG.get(entry["id"])
        assert entry["limits"]["resolution_multiple"] == model.spatial_multiple
        frames = model.frames
        rule = {"step": frames.step, "offset": frames.offset, "min": frames.min, "max": frames.max}
        assert entry["limits"]["video_length"] == rule
