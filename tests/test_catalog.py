"""The catalogue and its *.toml files: true to the pinned diffusers, and readable by one who adds a model."""

import copy
import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import models
from engine.catalog.abilities import FORMS, INPUTS, TASKS
from engine.catalog.models import PACKAGE, Catalog, FrameRule, Model, Pipeline, UnknownModel, default_settings
from engine.settings import SETTINGS

FILES = sorted((PACKAGE / "catalog" / "models").glob("*.toml"))
CATALOG = Catalog.load()
MODELS = list(CATALOG)
UNNAMED = {"kind": "video", "inputs": {}, "scheduler": {"cls": models.USUAL_SCHEDULER}}  # what an entry can leave out
PROGRESS = ("callback_on_step_end", "callback", "none")


def document(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text("utf-8"))


def whole_catalogue() -> dict[str, Any]:
    """All files as one document: entries completed from base, family and usual roles, as the catalogue reads them."""
    pipelines: dict[str, Any] = {}
    known: dict[str, models.Table] = {}
    for path in FILES:
        classes, _ = models.read(path, known)
        pipelines |= classes
    return {"pipelines": pipelines, "models": {name: {**UNNAMED, **entry} for name, entry in known.items()}}


# -------------------------------------------------------------------------------------- the catalogue and diffusers


def faults(tables: Mapping[str, Any]) -> list[str]:
    """What the catalogue says that the installed diffusers or itself does not bear out, a sentence each."""
    found = [fault for name, table in tables["pipelines"].items() for fault in pipeline_faults(name, table)]
    checks = (source_faults, class_faults, scheduler_faults, setting_faults, size_faults)
    for model_id, entry in tables["models"].items():
        found += [f"{model_id}: {fault}" for check in checks for fault in check(entry, tables)]
    return found


def parameters(cls: type, method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(cls, method)).parameters


def pipeline_faults(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline):
        yield f"{name}: no pipeline class"
        return
    takes, progress = parameters(cls, "__call__"), table.get("progress", PROGRESS[0])
    yield from (f"{name}: {role} = {word}: no parameter" for role, word in table["call"].items() if word not in takes)
    if progress not in PROGRESS or (progress != "none" and progress not in takes):
        yield f"{name}: no parameter {progress}"
    if progress == "none" and not {"callback", "callback_on_step_end"}.isdisjoint(takes):
        yield f"{name}: has a callback"
    if table.get("start_image_as", "image") not in FORMS:
        yield f"{name}: no form {table['start_image_as']}"
    yield from (f"{name}: carries.{word}: no input" for word in table.get("carries", ()) if word not in INPUTS)
    yield from (
        f"{name}: carries {word} as {role}: no role in call"
        for word, role in table.get("carries", {}).items()
        if role not in table["call"]
    )


def source_faults(model: Mapping[str, Any], _: Any) -> Iterator[str]:
    if "builtin" in model and not (PACKAGE / model["builtin"] / "model_index.json").is_file():
        yield f"builtin {model['builtin']}: no checkpoint there"
    repos = [lora["repo"] for lora in model.get("recipe_loras", ())] + ([] if "builtin" in model else [model["repo"]])
    repos += [place.partition("#")[0] for place in model.get("extra_repos", {}).values()]
    yield from (f"repo {repo!r} must be owner/name" for repo in repos if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo))


def class_faults(model: Mapping[str, Any], tables: Mapping[str, Any]) -> Iterator[str]:
    import diffusers
    import torch

    for task, name in model["pipelines"].items():
        cls = getattr(diffusers, name, None)
        if name not in tables["pipelines"] or cls is None:
            yield f"no pipeline {name}"
            continue
        parts, takes = parameters(cls, "__init__"), parameters(cls, "__call__")
        known = {**model.get("dtypes", {}), **model.get("extra_repos", {})}
        yield from (f"{part}: {name} has no such part" for part in known if part not in parts)
        yield from (
            f"extra_call.{word}: no parameter of {name}" for word in model.get("extra_call", ()) if word not in takes
        )
        for lora in model.get("recipe_loras", ()):
            if lora["target"] not in parts or not lora["file"].endswith(".safetensors"):
                yield f"recipe_loras: {lora['adapter']} fits no part of {name}"
        if not any(needed <= CATALOG.get(model["id"]).inputs_of(task) for needed in TASKS[task].needs):
            yield f"{task}: {name} has no parameter for what the task needs"
    yield from (f"no dtype {dtype}" for dtype in model["dtypes"].values() if not hasattr(torch, dtype))


def scheduler_faults(model: Mapping[str, Any], _: Any) -> Iterator[str]:
    import diffusers

    table = model["scheduler"]
    cls = getattr(diffusers, table["cls"], None)
    if cls is None:
        yield f"no scheduler {table['cls']}"
    else:
        words = [*model.get("schedule", ()), *(table[key] for key in ("shift_param",) if key in table)]
        yield from (f"{table['cls']} has no {word}" for word in words if word not in parameters(cls, "__init__"))


def setting_faults(model: Mapping[str, Any], tables: Mapping[str, Any]) -> Iterator[str]:
    known = {row.name for row in SETTINGS.values() if not row.guides and not row.always}
    yield from (f"defaults.{name}: no setting with a default" for name in model["defaults"] if name not in known)
    roles = {
        role for name in model["pipelines"].values() for role in tables["pipelines"].get(name, {"call": {}})["call"]
    }
    if "flow_shift" in model["defaults"] and "shift_param" not in model["scheduler"] and "shift" not in roles:
        yield "flow_shift has no parameter"
    if ("guidance2_scale" in model["defaults"]) != ("boundary_ratio" in model):
        yield "guidance2_scale and boundary_ratio go together"
    if model["inputs"].get("negative_prompt") and "negative_prompt" not in roles:
        yield "negative_prompt has no parameter"


def size_faults(model: Mapping[str, Any], _: Any) -> Iterator[str]:
    defaults = model["defaults"]
    if model["kind"] == "video":
        rule = FrameRule(**model["frames"])
        if rule.nearest(defaults["video_length"]) != defaults["video_length"]:
            yield f"video_length {defaults['video_length']} breaks its own rule"
    if model["kind"] != "audio":
        sides = [int(side) for side in defaults["resolution"].split("x")]
        if any(side % model["spatial_multiple"] or side > model.get("max_side", models.MAX_SIDE) for side in sides):
            yield f"resolution {defaults['resolution']} breaks its own rule"


def test_the_catalogue_says_only_what_the_pinned_diffusers_has() -> None:
    assert faults(whole_catalogue()) == []


FIRST = ("models", "wan_t2v_1.3B")
WRONG = {  # place in the catalogue, a wrong value there → what the check must say of it
    "class": ((*FIRST, "pipelines", "t2v"), "WanPipelin", "no pipeline WanPipelin"),
    "parameter": (("pipelines", "WanPipeline", "call", "steps"), "steps", "steps = steps: no parameter"),
    "progress": (("pipelines", "WanPipeline", "progress"), "callback", "no parameter callback"),
    "no progress": (("pipelines", "WanPipeline", "progress"), "none", "WanPipeline: has a callback"),
    "form": (("pipelines", "WanPipeline", "start_image_as"), "sculpture", "no form sculpture"),
    "input": (("pipelines", "WanPipeline", "carries"), {"image_begin": "mask"}, "carries.image_begin: no input"),
    "role": (("pipelines", "WanPipeline", "carries"), {"image_start": "mask"}, "no role in call"),
    "scheduler": ((*FIRST, "scheduler", "cls"), "UniPC", "no scheduler UniPC"),
    "shift": ((*FIRST, "scheduler", "shift_param"), "shift", "UniPCMultistepScheduler has no shift"),
    "schedule": (
        ("models", "qwen_image_lightning_20B", "schedule"),
        {"base": 1.0},
        "FlowMatchEulerDiscreteScheduler has no base",
    ),
    "repo": ((*FIRST, "repo"), "https://example.org/Wan", "must be owner/name"),
    "extra repo": ((*FIRST, "extra_repos"), {"vae": "madebyollin"}, "must be owner/name"),
    "dtype": ((*FIRST, "dtypes", "vae"), "float33", "no dtype float33"),
    "dtype of nothing": ((*FIRST, "dtypes", "image_encoder"), "float32", "has no such part"),
    "extra call": ((*FIRST, "extra_call"), {"max_length": 64}, "extra_call.max_length: no parameter"),
    "default": ((*FIRST, "defaults", "steps"), 4, "defaults.steps: no setting"),
    "length": ((*FIRST, "defaults", "video_length"), 80, "breaks its own rule"),
    "resolution": ((*FIRST, "defaults", "resolution"), "830x480", "breaks its own rule"),
    "negative prompt": (("models", "svd", "inputs"), {"negative_prompt": True}, "negative_prompt has no parameter"),
    "expert": ((*FIRST, "boundary_ratio"), 0.9, "go together"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_found(case: str) -> None:
    place, value, sentence = WRONG[case]
    tables = copy.deepcopy(whole_catalogue())
    at: Any = tables
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    assert any(sentence in fault for fault in faults(tables))


# ------------------------------------------------------------------------------------------------- a user's own models

OWN = """
[[models]]
id = "my_wan"
base = "wan_t2v_14B"
name = "My Wan"
"""
BROKEN = {  # a user's file → what the error must say beside the file's name
    '[[models]]\nid = "own"\npipelines = {}\n': "model 'own': .*missing",
    '[[models]]\nid = "own"\nbase = "wan_t2v_2B"\n': "model 'own': base 'wan_t2v_2B' is no model that stands before it",
    OWN + "stpes = 4\n": "model 'my_wan': there is no key 'stpes'",
    OWN + 'pipelines = { t2x = "WanPipeline" }\n': "model 'my_wan': there is no task 't2x'",
    "[[models]\n": "",
    "[pipelines.WanPipeline]\ncall = {}\nspeed = 1\n": "pipeline 'WanPipeline': there is no key 'speed'",
    "[pipelines]\nspeed = 1\n[pipelines.WanPipeline]\ncall = {}\n": "pipeline 'WanPipeline': there is no key 'speed'",
    '[pipelines.WanPipeline]\ncall = { usual = "film" }\n': "pipeline 'WanPipeline': call.usual must be video",
    "[pipelines.WanPipeline]\ncall = { step = true }\n": "pipeline 'WanPipeline': call.step needs the name of a param",
    "[pipelines.WanPipeline]\nbatch = true\n": "no key 'call'",
    '[famly]\nkind = "video"\n': "there is no table 'famly'",
}


def own(folder: Path, text: str) -> Catalog:
    (folder / "own.toml").write_text(text)
    return Catalog.load(folder)


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_named_with_the_entry_and_the_fault(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^own\.toml: .*" + BROKEN[text]):
        own(tmp_path, text)


def test_a_model_takes_what_it_leaves_open_from_its_base(tmp_path: Path) -> None:
    mine, base = own(tmp_path, OWN).get("my_wan"), CATALOG.get("wan_t2v_14B")
    assert (mine.name, mine.base, mine.wangp) == ("My Wan", base.id, "")
    assert (mine.defaults, mine.pipelines, mine.repo, mine.frames) == (
        base.defaults, base.pipelines, base.repo, base.frames,
    )  # fmt: skip


def test_of_the_defaults_only_those_that_differ_are_named(tmp_path: Path) -> None:
    mine, base = own(tmp_path, OWN + "defaults = { guidance_scale = 1.0 }\n"), CATALOG.get("wan_t2v_14B")
    assert mine.get("my_wan").defaults == {**base.defaults, "guidance_scale": 1.0}


def test_a_model_with_a_repository_of_its_own_has_its_own_weights(tmp_path: Path) -> None:
    assert own(tmp_path, OWN + 'repo = "me/my-wan"\n').get("my_wan").base == ""


def test_a_model_without_a_base_takes_what_it_leaves_open_from_its_files_family(tmp_path: Path) -> None:
    family = '[family]\nkind = "image"\nlicence = "MIT"\ndefaults = { resolution = "64x64", num_inference_steps = 4 }\n'
    entry = '[[models]]\nid = "tiny"\nname = "Tiny"\ndescription = "Small."\npipelines = { t2i = "FluxPipeline" }\n'
    tiny = own(tmp_path, family + entry + "defaults = { num_inference_steps = 8 }\n" + OWN).get("tiny")
    assert (tiny.family, tiny.kind, tiny.licence) == ("own", "image", "MIT")
    assert tiny.defaults == {"resolution": "64x64", "num_inference_steps": 8}
    assert own(tmp_path, family + OWN).get("my_wan").licence == CATALOG.get("wan_t2v_14B").licence


def own_class(folder: Path, text: str) -> Pipeline:
    """The class of the model `my_wan`, as a user's file describes it."""
    return own(folder, text + OWN + 'pipelines = { t2v = "WanPipeline" }\n').get("my_wan").pipelines["t2v"]


def test_a_class_names_only_where_its_call_differs_from_the_usual_one(tmp_path: Path) -> None:
    usual = own_class(tmp_path, '[pipelines.WanPipeline]\ncall = { usual = "video" }\n').call
    text = 'call = { usual = "video", negative_prompt = false, start_image = true, guidance = "cfg" }\n'
    call = own_class(tmp_path, "[pipelines.WanPipeline]\n" + text).call
    assert call.items() ^ usual.items() == {
        ("guidance", "guidance_scale"),
        ("guidance", "cfg"),
        ("negative_prompt", "negative_prompt"),
        ("start_image", "image"),
    }


def test_a_call_without_the_usual_roles_is_what_it_names(tmp_path: Path) -> None:
    text = '[pipelines.WanPipeline]\ncall = { prompt = "text", frames = true }\n'
    assert own_class(tmp_path, text).call == {"prompt": "text", "frames": "num_frames"}


def test_a_class_takes_what_it_leaves_open_from_the_files_pipelines(tmp_path: Path) -> None:
    shared = "[pipelines]\nloras = true\nbatch = true\n"
    mine = own_class(tmp_path, shared + "[pipelines.WanPipeline]\ncall = {}\nbatch = false\n")
    assert (mine.loras, mine.batch) == (True, False)


def test_a_users_entry_replaces_that_of_the_package(tmp_path: Path) -> None:
    models = own(tmp_path, OWN.replace("my_wan", "wan_t2v_1.3B"))
    assert models.get("wan_t2v_1.3B").name == "My Wan"
    assert len(list(models)) == len(list(CATALOG))


@pytest.mark.parametrize("model", [model for model in MODELS if model.wangp], ids=lambda model: model.wangp)
def test_wangps_name_finds_the_model(model: Model) -> None:
    assert CATALOG.get(model.wangp) is model


def test_every_model_says_in_one_line_what_it_is_for() -> None:
    lines = [model.description for model in MODELS]
    assert all(
        (10 < len(line) <= 120 and line.endswith(".")) or model.id == "wan_t2v_14B"
        for line, model in zip(lines, MODELS, strict=True)
    )


def test_there_are_as_many_models_and_families_as_promised() -> None:
    assert len(MODELS) >= 120
    assert len({model.family for model in MODELS}) >= 30


def test_ids_are_unique_over_all_files() -> None:
    ids = [model["id"] for path in FILES for model in document(path)["models"]]
    assert sorted(ids) == sorted(set(ids)) == sorted(model.id for model in MODELS)


def test_an_unknown_model_is_named() -> None:
    with pytest.raises(UnknownModel, match="Model 'wan' not found"):
        CATALOG.get("wan")


def test_the_contracts_model_has_the_contracts_words_and_settings() -> None:
    model = CATALOG.get("wan_t2v_14B")
    assert (model.name, model.description, model.family) == (
        "Wan 2.1 Text to Video 14B",
        "High quality text to video generation",
        "wan",
    )
    assert (model.is_i2v, model.is_t2v, model.visible) == (False, True, True)
    assert (
        default_settings(model).items()
        >= {
            "resolution": "832x480",
            "video_length": 81,
            "num_inference_steps": 30,
            "guidance_scale": 5.0,
            "flow_shift": 5.0,
        }.items()
    )


def test_the_contracts_image_to_video_model_animates_a_picture() -> None:
    assert CATALOG.get("wan_i2v_14B").is_i2v


def test_the_embedded_model_stays_within_the_positions_that_its_denoiser_knows() -> None:
    demo = CATALOG.get("wan_demo")
    config = json.loads((PACKAGE / demo.builtin / "transformer" / "config.json").read_text())
    positions = config["rope_max_seq_len"]
    assert demo.frames.max == (positions - 1) * demo.frames.step + 1
    assert demo.max_side == positions * demo.spatial_multiple
