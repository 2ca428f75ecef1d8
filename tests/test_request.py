"""engine/admission.py: what a request becomes by the catalogue, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.admission import BadRequest, Media, Resolved, resolve
from engine.catalog.abilities import TASKS
from engine.catalog.models import Catalog, FrameRule, Model
from engine.planning import windows
from engine.settings import SETTINGS
from tests import contract

CATALOG = Catalog.load()
MODELS = list(CATALOG)
RUNNABLE = [model for model in MODELS if not any(pipeline.requires for pipeline in model.pipelines.values())]
FILE = Media((Path("0" * 64),), seconds=1000.0)


def given_inputs(*names: str) -> dict[str, Media]:
    return dict.fromkeys(names, FILE)


def resolved(model_id: str, *inputs: str, **sent: Any) -> Resolved:
    return resolve(CATALOG, CATALOG.get(model_id), {"prompt": "a cat", **sent}, given_inputs(*inputs))


def possible(model: Model, task: str) -> list[frozenset[str]]:
    """The sets of inputs that are just enough for the task."""
    return [needed for needed in TASKS[task].needs if needed <= model.inputs_of(task)]


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
    result = resolved("wan_demo", video_length="100s", sliding_window_size=0)
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
JOB_FIELDS = {"num_inference_steps": "steps", "video_length": "frames", "duration_seconds": "duration_s"}


def value(result: Resolved, name: str) -> Any:
    if name == "resolution":
        return f"{result.job.width}x{result.job.height}"
    return getattr(result.job, JOB_FIELDS.get(name, name))


@pytest.mark.parametrize("use_model_defaults", [True, False])
@pytest.mark.parametrize("name", SENT)
def test_what_was_sent_wins(name: str, use_model_defaults: bool) -> None:
    result = resolved("wan_t2v_1.3B", use_model_defaults=use_model_defaults, **{name: SENT[name]})
    assert value(result, name) == SENT[name]


@pytest.mark.parametrize("model", RUNNABLE, ids=lambda model: model.id)
def test_what_was_not_sent_takes_the_models_default(model: Model) -> None:
    task = model.tasks[0]
    result = resolve(CATALOG, model, {"prompt": "a cat", "task": task}, given_inputs(*possible(model, task)[0]))
    there = {name for name in model.defaults if model.has_setting(name, task)}
    there -= {*windows.SETTINGS}  # they only show in a long video (test_sliding.py)
    assert {name: value(result, name) for name in there} == {name: model.defaults[name] for name in there}


def test_without_the_models_defaults_the_contracts_hold() -> None:
    result = resolved("wan22_ti2v_5B", use_model_defaults=False)
    names = contract.DEFAULTS.keys() - {"seed", "use_model_defaults"}
    assert {name: value(result, name) for name in names} == {name: contract.DEFAULTS[name] for name in names}


@pytest.mark.parametrize("model", RUNNABLE, ids=lambda model: model.id)
def test_every_task_of_a_model_can_be_asked_for_with_its_defaults_alone(model: Model) -> None:
    for task in model.tasks:
        assert possible(model, task)
        for names in possible(model, task):
            result = resolve(CATALOG, model, {"prompt": "a cat", "task": task}, given_inputs(*names))
            ignored = () if model.has_setting("prompt", task) else (no_setting("prompt", model.id),)
            assert (result.job.task, result.warnings) == (task, ignored)


def no_setting(name: str, model_id: str) -> str:
    return f"{name}: model '{model_id}' has no such setting, the value was ignored"


def test_a_task_that_the_model_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(BadRequest, match=r"^task: model 'wan_demo' has no task 'v2v'; it has t2v, i2v$"):
        resolved("wan_demo", task="v2v")


def test_inputs_that_exclude_each_other_are_named() -> None:
    with pytest.raises(BadRequest, match=r"^image_refs, image_mask: model 'flux2_klein_4B' can't use these together"):
        resolved("flux2_klein_4B", "image_refs", "image_mask")


# ------------------------------------------------------------------------------------------------------- source videos


def from_video(seconds: float, **sent: Any) -> Resolved:
    source = {"video_source": Media((Path("0" * 64),), seconds)}
    return resolve(CATALOG, CATALOG.get("wan_t2v_1.3B"), {"prompt": "a cat", **sent}, source)


@pytest.mark.parametrize(("seconds", "frames"), [(60.0, 81), (5.0, 77), (1.0, 13), (0.01, 5)])
def test_a_changed_video_is_as_long_as_its_source_and_at_most_as_the_default(seconds: float, frames: int) -> None:
    result = from_video(seconds)
    assert (result.job.task, result.job.frames, result.warnings) == ("v2v", frames, ())


def test_more_frames_than_the_source_has_are_told() -> None:
    assert from_video(1.0, video_length=33).warnings == (
        "video_length: 33 was changed to 13, the video that was sent has 16 frames",
    )


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
    assert result.warnings == (no_setting(name, model_id),)
    assert getattr(result.job, name) == SETTINGS[name].unused


def takes_none(name: str, model_id: str) -> str:
    return f"{name}: model '{model_id}' takes no such image; models that do: {CATALOG.that_take(name)}"


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
        resolve(CATALOG, CATALOG.get("wan_vace_14B"), {"prompt": "a cat"}, {"image_refs": Media(FILE.paths * 4)})


def test_a_longer_sound_than_a_model_can_make_is_refused() -> None:
    sentence = "^duration_seconds: 30.5 is over the 30 s that model 'longcat_audio_1B' can make; ask for less$"
    with pytest.raises(BadRequest, match=sentence):
        resolved("longcat_audio_1B", duration_seconds=30.5)


def test_a_cover_is_as_long_as_its_source() -> None:
    result = resolved("ace_step_v1_5_turbo", "audio_source", duration_seconds=5.0)
    assert (result.job.task, result.job.duration_s) == ("a2a", None)
    assert result.warnings == (no_setting("duration_seconds", "ace_step_v1_5_turbo"),)


def test_a_sound_to_take_the_style_from_makes_no_cover() -> None:
    assert resolved("ace_step_v1_5_turbo", "audio_reference").job.task == "t2a"


def test_where_no_model_takes_a_picture_none_is_named() -> None:
    demo = CATALOG.get("wan_demo")
    with pytest.raises(BadRequest, match=r"models that do: none$"):
        resolve(Catalog({demo.id: demo}), demo, {"prompt": "a cat"}, given_inputs("image_end"))


@given(
    st.integers(0, 99999),
    st.integers(0, 99999),
    st.sampled_from([model for model in RUNNABLE if model.kind != "audio"]),
)
def test_the_size_that_a_refusal_proposes_is_accepted(width: int, height: int, model: Model) -> None:
    pictures = possible(model, model.tasks[0])[0]
    try:
        resolve(CATALOG, model, {"prompt": "a cat", "resolution": f"{width}x{height}"}, given_inputs(*pictures))
    except BadRequest as refused:
        if proposed := re.search(r"nearest is (\d+x\d+)$", str(refused)):
            resolve(CATALOG, model, {"prompt": "a cat", "resolution": proposed[1]}, given_inputs(*pictures))
