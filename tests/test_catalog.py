"""engine/catalog.py and engine/models/*.toml: true to the pinned diffusers, and what a request becomes by them."""

import copy
import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import catalog
from engine.catalog import HERE, BadRequest, Catalog, FrameRule, Model, UnknownModel, resolve

FILES = sorted((HERE / "models").glob("*.toml"))
CATALOG = Catalog.load()
MODELS = list(CATALOG)
PICTURE = (Path("0" * 64),)
TASK_PICTURES = {  # the pictures that make each task possible
    "t2v": ((),),
    "i2v": (("image_start",), ("image_start", "image_end")),
    "flf2v": (("image_start", "image_end"),),
    "vace": (("image_refs",), ("image_start",), ("image_end",), ("image_start", "image_end", "image_refs")),
}


def document(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text("utf-8"))


def given_pictures(*names: str) -> dict[str, tuple[Path, ...]]:
    return dict.fromkeys(names, PICTURE)


def resolved(model_id: str, *pictures: str, **sent: Any) -> catalog.Resolved:
    sent = {"prompt": "a cat", **sent}
    return resolve(CATALOG, CATALOG.get(model_id), sent, given_pictures(*pictures))


# -------------------------------------------------------------------------------------- the catalogue and diffusers


def faults(tables: Mapping[str, Any]) -> list[str]:
    """What a catalogue file says that the installed diffusers or the file itself does not bear out, a sentence each."""
    found = [fault for name, table in tables["pipelines"].items() for fault in pipeline_faults(name, table)]
    ids = [model["id"] for model in tables["models"]]
    found += [f"{model['id']}: {fault}" for model in tables["models"] for fault in model_faults(model, tables, ids)]
    return found


def parameters(cls: type, method: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(cls, method)).parameters


def pipeline_faults(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    import diffusers

    cls = getattr(diffusers, name, None)
    if cls is None or not issubclass(cls, diffusers.DiffusionPipeline):
        yield f"{name}: no pipeline class"
        return
    takes, parts = parameters(cls, "__call__"), parameters(cls, "__init__")
    yield from (f"{name}: {role} = {word}: no parameter" for role, word in table["call"].items() if word not in takes)
    yield from (f"{name}: {part}: no component" for part in table["components"] if part not in parts)
    if cls.__module__ != table["module"]:
        yield f"{name}: module is {cls.__module__}"
    if list(cls._optional_components) != table["optional"]:
        yield f"{name}: optional components are {cls._optional_components}"
    if table["progress"] not in takes:
        yield f"{name}: no parameter {table['progress']}"
    if not hasattr(diffusers, table["transformer"]):
        yield f"{name}: no class {table['transformer']}"
    if table.get("start_image_as") == "video_and_mask" and not {"source_video", "mask"} <= table["call"].keys():
        yield f"{name}: no parameters for a video and its mask"


def model_faults(model: Mapping[str, Any], tables: Mapping[str, Any], ids: list[str]) -> Iterator[str]:
    for check in (source_faults, class_faults, scheduler_faults, setting_faults, input_faults, size_faults):
        yield from check(model, tables["pipelines"], ids)


def source_faults(model: Mapping[str, Any], _: Any, ids: list[str]) -> Iterator[str]:
    if ids.count(model["id"]) > 1:
        yield "the id is used twice"
    if "builtin" in model and not (HERE / model["builtin"] / "model_index.json").is_file():
        yield f"builtin {model['builtin']}: no checkpoint there"
    repos = [lora["repo"] for lora in model.get("recipe_loras", ())] + ([] if "builtin" in model else [model["repo"]])
    yield from (f"repo {repo!r} must be owner/name" for repo in repos if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo))
    if model.get("base", model["id"]) not in ids:
        yield f"base {model['base']} is no model"
    if bool(model.get("base")) != bool(model.get("recipe_loras")):
        yield "a base needs a recipe, and a recipe needs a base"


def class_faults(model: Mapping[str, Any], pipelines: Mapping[str, Any], _: Any) -> Iterator[str]:
    import diffusers
    import torch

    if sorted(model["tasks"]) != sorted(model["pipelines"]):
        yield "tasks and pipelines differ"
    for name in set(model["pipelines"].values()):
        if name not in pipelines or not hasattr(diffusers, name):
            yield f"no pipeline {name}"
            continue
        parts, takes = pipelines[name]["components"], parameters(getattr(diffusers, name), "__call__")
        yield from (f"dtypes.{part}: {name} has no such part" for part in model["dtypes"] if part not in parts)
        yield from (
            f"extra_call.{word}: no parameter of {name}" for word in model.get("extra_call", ()) if word not in takes
        )
        for lora in model.get("recipe_loras", ()):
            if lora["target"] not in parts or not lora["file"].endswith(".safetensors"):
                yield f"recipe_loras: {lora['adapter']} fits no part of {name}"
    yield from (f"no dtype {dtype}" for dtype in model["dtypes"].values() if not hasattr(torch, dtype))


def scheduler_faults(model: Mapping[str, Any], _pipelines: Any, _ids: Any) -> Iterator[str]:
    import diffusers

    table = model["scheduler"]
    cls = getattr(diffusers, table["cls"], None)
    if cls is None:
        yield f"no scheduler {table['cls']}"
    elif "shift_param" in table and table["shift_param"] not in parameters(cls, "__init__"):
        yield f"{table['cls']} has no {table['shift_param']}"


def setting_faults(model: Mapping[str, Any], pipelines: Mapping[str, Any], _: Any) -> Iterator[str]:
    known = {*catalog.CONTRACT_DEFAULTS, "guidance2_scale"} - {"seed", "batch_size", "repeat_generation"}
    yield from (f"defaults.{name}: no setting with a default" for name in model["defaults"] if name not in known)
    if "flow_shift" in model["defaults"] and "shift_param" not in model["scheduler"]:
        yield "flow_shift has no parameter"
    if ("guidance2_scale" in model["defaults"]) != ("boundary_ratio" in model):
        yield "guidance2_scale and boundary_ratio go together"
    roles = {"num_inference_steps": "steps", "guidance_scale": "guidance", "guidance2_scale": "guidance_2"}
    for setting in roles.keys() & model["defaults"].keys():
        for name in set(model["pipelines"].values()) & pipelines.keys():
            if roles[setting] not in pipelines[name]["call"]:
                yield f"{setting}: {name} has no parameter for it"


CARRIERS = {  # an input of a model → the roles of which a class must have one
    "start_image": {"start_image", "source_video"},
    "end_image": {"end_image", "source_video"},
    "max_reference_images": {"reference_images"},
    "source_video": {"source_video"},
    "negative_prompt": {"negative_prompt"},
}


def input_faults(model: Mapping[str, Any], pipelines: Mapping[str, Any], _: Any) -> Iterator[str]:
    roles = {role for name in model["pipelines"].values() for role in pipelines.get(name, {"call": {}})["call"]}
    for name, takes in model["inputs"].items():
        if name not in CARRIERS:
            yield f"inputs.{name}: no such input"
        elif takes and not CARRIERS[name] & roles:
            yield f"inputs.{name}: no class has a parameter for it"


def size_faults(model: Mapping[str, Any], _pipelines: Any, _ids: Any) -> Iterator[str]:
    rule, defaults = FrameRule(**model["frames"]), model["defaults"]
    if rule.nearest(defaults["video_length"]) != defaults["video_length"]:
        yield f"video_length {defaults['video_length']} breaks its own rule"
    sides = [int(side) for side in defaults["resolution"].split("x")]
    if any(side % model["spatial_multiple"] or side > model.get("max_side", catalog.MAX_SIDE) for side in sides):
        yield f"resolution {defaults['resolution']} breaks its own rule"
    if model["transformer_bf16_bytes"] != 2 * model["transformer_params"] * model["transformer_count"]:
        yield "transformer_bf16_bytes is not 2 bytes a parameter"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_catalogue_says_only_what_the_pinned_diffusers_has(path: Path) -> None:
    assert faults(document(path)) == []


WRONG = {  # place in the file, a wrong value there → what the check must say of it
    "class": (("models", 0, "pipelines", "t2v"), "WanPipelin", "no pipeline WanPipelin"),
    "module": (("pipelines", "WanPipeline", "module"), "diffusers.wan", "module is diffusers"),
    "parameter": (("pipelines", "WanPipeline", "call", "steps"), "steps", "steps = steps: no parameter"),
    "missing role": (("pipelines", "WanPipeline", "call"), {}, "num_inference_steps: WanPipeline has no parameter"),
    "component": (("pipelines", "WanPipeline", "components", 0), "tokeniser", "tokeniser: no component"),
    "optional": (("pipelines", "WanPipeline", "optional"), [], "optional components are"),
    "transformer": (("pipelines", "WanPipeline", "transformer"), "Wan3DModel", "no class Wan3DModel"),
    "progress": (("pipelines", "WanPipeline", "progress"), "callback", "no parameter callback"),
    "scheduler": (("models", 0, "scheduler", "cls"), "UniPC", "no scheduler UniPC"),
    "shift": (("models", 0, "scheduler", "shift_param"), "shift", "UniPCMultistepScheduler has no shift"),
    "repo": (("models", 0, "repo"), "https://example.org/Wan", "must be owner/name"),
    "dtype": (("models", 0, "dtypes", "vae"), "float33", "no dtype float33"),
    "dtype of nothing": (("models", 0, "dtypes", "image_encoder"), "float32", "has no such part"),
    "extra call": (("models", 0, "extra_call"), {"max_length": 64}, "extra_call.max_length: no parameter"),
    "default": (("models", 0, "defaults", "steps"), 4, "defaults.steps: no setting"),
    "length": (("models", 0, "defaults", "video_length"), 80, "breaks its own rule"),
    "resolution": (("models", 0, "defaults", "resolution"), "830x480", "breaks its own rule"),
    "input": (("models", 0, "inputs", "start_image"), True, "no class has a parameter for it"),
    "id": (("models", 1, "id"), "wan_t2v_1.3B", "the id is used twice"),
    "base": (("models", 0, "base"), "wan_t2v_2B", "base wan_t2v_2B is no model"),
    "expert": (("models", 0, "boundary_ratio"), 0.9, "go together"),
    "bytes": (("models", 0, "transformer_params"), 1, "2 bytes a parameter"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_found(case: str) -> None:
    place, value, sentence = WRONG[case]
    tables = copy.deepcopy(document(HERE / "models" / "wan.toml"))
    at: Any = tables
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    assert any(sentence in fault for fault in faults(tables))


def test_an_entry_that_lacks_something_stops_the_start_naming_file_and_model(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[pipelines]\n[[models]]\nid = "own"\npipelines = {}\n')
    with pytest.raises(ValueError, match=r"own\.toml: model 'own': .*missing"):
        Catalog.load(tmp_path)


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
        catalog.default_settings(model).items()
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
    config = json.loads((HERE / demo.builtin / "transformer" / "config.json").read_text())
    positions = config["rope_max_seq_len"]
    assert demo.frames.max == (positions - 1) * demo.frames.step + 1
    assert demo.max_side == positions * demo.spatial_multiple


# ----------------------------------------------------------------------------------------------------------- frames


@st.composite
def frame_rules(draw: st.DrawFn) -> FrameRule:
    """Rules that at least one length obeys."""
    step, offset = draw(st.integers(1, 16)), draw(st.integers(0, 16))
    least = draw(st.integers(1, 200))
    first = offset + step * max(0, -(-(least - offset) // step))
    return FrameRule(step, offset, least, draw(st.integers(first, first + 1000)))


def lengths(rule: FrameRule) -> list[int]:
    return [n for n in range(rule.min, rule.max + 1) if (n - rule.offset) % rule.step == 0]


@given(frame_rules(), st.integers(-10, 2000))
def test_the_nearest_length_is_valid_and_none_is_nearer(rule: FrameRule, frames: int) -> None:
    distance = min(abs(length - frames) for length in lengths(rule))
    assert rule.nearest(frames) == max(n for n in lengths(rule) if abs(n - frames) == distance)


@given(frame_rules(), st.data())
def test_a_valid_length_stays_as_it_is(rule: FrameRule, data: st.DataObject) -> None:
    length = data.draw(st.sampled_from(lengths(rule)))
    assert rule.nearest(length) == length


@given(frame_rules(), st.integers(1, 1000), st.integers(1, 1000))
def test_a_longer_wish_never_gives_a_shorter_video(rule: FrameRule, one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert rule.nearest(low) <= rule.nearest(high)


@pytest.mark.parametrize(
    ("wish", "frames"), [(1, 5), (5, 5), (6, 5), (7, 9), (80, 81), (81, 81), (83, 85), (1000, 1001 - 4)]
)
def test_a_wan_model_makes_four_k_plus_one_frames(wish: int, frames: int) -> None:
    assert resolved("wan_t2v_14B", video_length=wish).job.frames == frames


def test_a_changed_length_is_told() -> None:
    assert resolved("wan_t2v_14B", video_length=80).warnings == (
        "video_length: 80 was changed to 81, the nearest that model 'wan_t2v_14B' can make (4k+1)",
    )


@pytest.mark.parametrize(("duration", "frames"), [("5s", 81), ("1s", 17), ("0.5s", 9), ("62.5s", 997)])
def test_a_duration_counts_at_the_models_rate_to_the_nearest_length(duration: str, frames: int) -> None:
    result = resolved("wan_t2v_14B", video_length=duration)
    assert (result.job.frames, result.warnings) == (frames, ())


def test_a_duration_that_is_cut_is_told() -> None:
    result = resolved("wan_demo", video_length="100s")
    assert result.job.frames == 509
    assert result.warnings == (
        "video_length: 800 was changed to 509, the nearest that model 'wan_demo' can make (4k+1)",
    )


# ---------------------------------------------------------------------------------------------------------- resolve

SENT = {
    "negative_prompt": "blurred",
    "resolution": "64x96",
    "video_length": 9,
    "num_inference_steps": 7,
    "guidance_scale": 1.5,
    "flow_shift": 2.5,
    "seed": 42,
    "batch_size": 3,
    "repeat_generation": 2,
}
JOB_FIELDS = {"num_inference_steps": "steps", "video_length": "frames"}


def value(result: catalog.Resolved, name: str) -> Any:
    if name == "resolution":
        return f"{result.job.width}x{result.job.height}"
    return getattr(result.job, JOB_FIELDS.get(name, name))


@pytest.mark.parametrize("use_model_defaults", [True, False])
@pytest.mark.parametrize("name", SENT)
def test_what_was_sent_wins(name: str, use_model_defaults: bool) -> None:
    result = resolved("wan_t2v_1.3B", use_model_defaults=use_model_defaults, **{name: SENT[name]})
    assert value(result, name) == SENT[name]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_what_was_not_sent_takes_the_models_default(model: Model) -> None:
    result = resolve(CATALOG, model, {"prompt": "a cat"}, given_pictures(*TASK_PICTURES[model.tasks[0]][0]))
    assert {name: value(result, name) for name in model.defaults} == dict(model.defaults)


def test_without_the_models_defaults_the_contracts_hold() -> None:
    result = resolved("wan22_ti2v_5B", use_model_defaults=False)
    names = catalog.CONTRACT_DEFAULTS.keys() - {"seed"}
    assert {name: value(result, name) for name in names} == {name: catalog.CONTRACT_DEFAULTS[name] for name in names}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_every_task_of_a_model_can_be_asked_for_with_its_defaults_alone(model: Model) -> None:
    for task in model.tasks:
        possible = [names for names in TASK_PICTURES[task] if all(map(model.takes, names))]
        assert possible
        for names in possible:
            result = resolve(CATALOG, model, {"prompt": "a cat"}, given_pictures(*names))
            assert (result.job.task, result.warnings) == (task, ())


def test_a_drawn_seed_is_another_each_time_and_fits_a_json_number() -> None:
    seeds = {resolved("wan_demo").job.seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_seed_zero_is_a_seed() -> None:
    assert resolved("wan_demo", seed=0).job.seed == 0


def test_the_second_expert_follows_the_first_where_nothing_is_said_of_it() -> None:
    assert resolved("wan22_t2v_14B", use_model_defaults=False, guidance_scale=7.0).job.guidance2_scale == 7.0


def test_the_second_expert_keeps_its_own_default() -> None:
    assert resolved("wan22_t2v_14B", guidance_scale=7.0).job.guidance2_scale == 3.0


@pytest.mark.parametrize(
    ("model_id", "name", "sent"),
    [
        ("wan_t2v_14B", "guidance2_scale", 3.0),
        ("wan_t2v_14B", "embedded_guidance_scale", 6.0),
        ("fastwan_t2v_14B", "negative_prompt", "blurred"),
    ],
)
def test_a_setting_that_the_model_does_not_have_is_told_and_left_out(model_id: str, name: str, sent: Any) -> None:
    result = resolved(model_id, **{name: sent})
    assert result.warnings == (f"{name}: model '{model_id}' has no such setting, the value was ignored",)
    assert getattr(result.job, name) == catalog.OPTIONAL_SETTINGS[name][1]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_no_feature_is_claimed_that_does_not_work(model: Model) -> None:
    assert model.features.keys() == {"sliding_window", "tea_cache", "mag_cache"}
    assert {name for name, works in model.features.items() if works} <= catalog.WORKING_FEATURES


def takes_none(name: str, model_id: str) -> str:
    others = ", ".join(model.id for model in MODELS if model.takes(name))
    return f"{name}: model '{model_id}' takes no such image; models that do: {others}"


def needs(name: str, model_id: str) -> str:
    return f"{name}: model '{model_id}' needs this image, and none was sent"


def no_size(sent: str) -> str:
    return f"resolution: '{sent}' must be WIDTHxHEIGHT in pixels, such as 832x480"


def off_grid(sent: str, step: int, nearest: str) -> str:
    return f"resolution: '{sent}' must be a multiple of {step}; nearest is {nearest}"


def over(sent: str, limit: int) -> str:
    return f"resolution: '{sent}' is over the limit of {limit} pixels a side"


REFUSED_PICTURES = {  # model, pictures sent → the sentence
    ("wan_t2v_14B", "image_start"): takes_none("image_start", "wan_t2v_14B"),
    ("wan_i2v_14B", "image_start", "image_end"): takes_none("image_end", "wan_i2v_14B"),
    ("wan_demo", "image_refs"): takes_none("image_refs", "wan_demo"),
    ("wan_i2v_14B",): needs("image_start", "wan_i2v_14B"),
    ("wan_flf2v_720p_14B",): needs("image_start", "wan_flf2v_720p_14B"),
    ("wan_flf2v_720p_14B", "image_start"): needs("image_end", "wan_flf2v_720p_14B"),
    ("wan_flf2v_720p_14B", "image_end"): needs("image_start", "wan_flf2v_720p_14B"),
    ("wan22_i2v_14B", "image_end"): needs("image_start", "wan22_i2v_14B"),
}
REFUSED_SIZES = {  # model, resolution → the sentence
    ("wan_t2v_14B", "480p"): no_size("480p"),
    ("wan_t2v_14B", "64"): no_size("64"),
    ("wan_t2v_14B", "64x64\n"): no_size("64x64\n"),
    ("wan_t2v_14B", "-64x64"): no_size("-64x64"),
    ("wan_t2v_14B", "830x480"): off_grid("830x480", 16, "832x480"),
    ("wan22_ti2v_5B", "1280x720"): off_grid("1280x720", 32, "1280x704"),
    ("wan_t2v_14B", "0x16"): off_grid("0x16", 16, "16x16"),
    ("wan_t2v_14B", "16x99999"): over("16x99999", 4096),
    ("wan_demo", "2064x64"): over("2064x64", 2048),
}


@pytest.mark.parametrize("case", REFUSED_PICTURES, ids=" ".join)
def test_pictures_that_a_model_can_not_use_are_refused_with_one_sentence(case: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest) as refused:
        resolved(*case)
    assert str(refused.value) == REFUSED_PICTURES[case]


@pytest.mark.parametrize("case", REFUSED_SIZES, ids=repr)
def test_a_size_that_a_model_can_not_make_is_refused_with_one_sentence(case: tuple[str, str]) -> None:
    with pytest.raises(BadRequest) as refused:
        resolved(case[0], resolution=case[1])
    assert str(refused.value) == REFUSED_SIZES[case]


@pytest.mark.parametrize(("duration", "frames"), [("0s", 0), ("0.03s", 0), ("62.6s", 1002), ("9999s", 159984)])
def test_a_duration_outside_the_limits_is_refused_with_one_sentence(duration: str, frames: int) -> None:
    with pytest.raises(BadRequest) as refused:
        resolved("wan_t2v_14B", video_length=duration)
    assert str(refused.value) == (
        f"video_length: '{duration}' makes {frames} frames at 16 a second, but must make 1 to 1000"
    )


def test_too_many_references_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"^image_refs: 4 images, but model 'wan_vace_14B' takes at most 3$"):
        resolve(CATALOG, CATALOG.get("wan_vace_14B"), {"prompt": "a cat"}, {"image_refs": PICTURE * 4})


def test_where_no_model_takes_a_picture_none_is_named() -> None:
    demo = CATALOG.get("wan_demo")
    with pytest.raises(BadRequest, match=r"models that do: none$"):
        resolve(Catalog({demo.id: demo}), demo, {"prompt": "a cat"}, given_pictures("image_end"))


@given(st.integers(0, 99999), st.integers(0, 99999), st.sampled_from(MODELS))
def test_the_size_that_a_refusal_proposes_is_accepted(width: int, height: int, model: Model) -> None:
    pictures = TASK_PICTURES[model.tasks[0]][0]
    try:
        resolve(CATALOG, model, {"prompt": "a cat", "resolution": f"{width}x{height}"}, given_pictures(*pictures))
    except BadRequest as refused:
        if proposed := re.search(r"nearest is (\d+x\d+)$", str(refused)):
            resolve(CATALOG, model, {"prompt": "a cat", "resolution": proposed[1]}, given_pictures(*pictures))
