"""Sliding windows: how a long video is cut, what each window is told, and how they are joined."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from engine.admission import Media, resolve
from engine.catalog.models import Catalog, FrameRule
from engine.gpu.run import conditioning, sliding
from engine.gpu.run.conditioning import Call
from engine.job import Job
from engine.planning.windows import windows
from engine.planning.work import Work
from tests.daemon import Daemon
from tests.frames import read_video
from tools.demo.judge import read_clip

CATALOG = Catalog.load()
RULE = FrameRule(step=4, offset=1, min=5, max=509)
LONG = {"prompt": "a red circle moving right", "video_length": 97, "seed": 3}


def resolved(model_id: str, files: dict[str, Media] | None = None, **fields: Any) -> Any:
    return resolve(CATALOG, CATALOG.get(model_id), LONG | fields, files or {})


def long_job(model_id: str = "wan_demo", files: dict[str, Media] | None = None, **fields: Any) -> Job:
    job: Job = resolved(model_id, files, **fields).job
    return job


@given(st.integers(1, 900), st.integers(0, 7), st.integers(1, 40))
def test_windows_cover_the_video_without_a_gap(more: int, size_steps: int, overlap: int) -> None:
    size = RULE.shortest_of(2 * overlap) + 4 * size_steps
    job = dataclasses.replace(long_job(), frames=size + more, window_frames=size, window_overlap=overlap)
    pieces = windows(job, RULE)
    assert pieces[0].start == pieces[0].overlap == 0
    for before, piece in itertools.pairwise(pieces):
        assert (piece.start, piece.overlap) == (before.start + before.frames - overlap, overlap)
    assert all(piece.frames <= size and RULE.nearest(piece.frames) == piece.frames for piece in pieces)
    assert 0 <= pieces[-1].start + pieces[-1].frames - job.frames < RULE.step


def test_windows_are_about_equally_long() -> None:
    job = dataclasses.replace(long_job(), frames=101, window_frames=33, window_overlap=1)
    assert [piece.frames for piece in windows(job, RULE)] == [29, 25, 25, 25]  # and not 33, 33, 33, 5


def test_a_video_as_long_as_a_window_is_made_at_once() -> None:
    assert long_job(video_length=33).window_frames == 0
    assert long_job(video_length=37).window_frames == 33


SIZES = {
    "wan_demo": ({}, (33, 9)),
    "wan_vace_1.3B": ({"video_length": 161}, (81, 5)),
    "wan_vace_14B": ({"video_length": 161, "sliding_window_overlap": 9}, (81, 9)),
    "ltxv_0_9_7_13B": ({"video_length": 321}, (161, 17)),
    "wan22_ti2v_5B": ({"video_length": 241, "sliding_window_size": 61}, (61, 1)),
    "wan_t2v_14B": ({"video_length": 161}, (0, 0)),  # it can't go on from its own frames
}


@pytest.mark.parametrize("model_id", SIZES)
def test_size_and_overlap_are_what_suits_the_model(model_id: str) -> None:
    fields, wanted = SIZES[model_id]
    job = long_job(model_id, **fields)
    assert (job.window_frames, job.window_overlap) == wanted


@pytest.mark.parametrize("model_id", SIZES)
def test_the_limits_of_a_model_tell_its_windows(model_id: str, daemon: Daemon) -> None:
    told = daemon.get(f"/models/{model_id}").json()["data"]["limits"]["sliding_window"]
    job = long_job(model_id, video_length=333)
    assert told == ({"size": job.window_frames, "overlap": job.window_overlap} if job.window_frames else None)


CHANGES = {
    "no way": ("wan_t2v_14B", {"sliding_window_size": 49}, "sliding_window_size: model 'wan_t2v_14B' has no such"),
    "off the rule": ("wan_demo", {"sliding_window_size": 31}, "sliding_window_size: 31 was changed to 33"),
    "too many": ("wan_demo", {"sliding_window_overlap": 21}, "sliding_window_overlap: 21 was changed to 17"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_a_model_can_not_do_is_changed_and_told(case: str) -> None:
    model_id, fields, sentence = CHANGES[case]
    assert any(warning.startswith(sentence) for warning in resolved(model_id, **fields).warnings)


def test_without_windows_the_model_s_own_limit_holds() -> None:
    files = {"image_start": Media((Path("x"),))}
    assert long_job("svd", files).frames == 97
    assert long_job("svd", files, sliding_window_size=0).frames == CATALOG.get("svd").frames.max


def test_a_plan_for_a_long_video_needs_no_more_memory_than_a_window() -> None:
    model = CATALOG.get("wan22_ti2v_5B")
    short, long = (Work.of(model, long_job(model.id, video_length=length)) for length in (121, 961))
    assert (long.frames, long.tokens, long.voxels) == (short.frames, short.tokens, short.voxels)
    assert (short.runs, long.runs) == (1, 8)


def plain(level: int, count: int, side: int = 32) -> torch.Tensor:
    """Frames with a bright block on a ground of one level, (F, H, W, 3) uint8."""
    frames = torch.full((count, side, side, 3), level, dtype=torch.uint8)
    frames[:, 8:16, 8:16] = 200
    return frames


def made(job: Job, levels: Iterator[int]) -> tuple[list[torch.Tensor], list[Call]]:
    """The pieces of a job whose calls each give plain frames, and the calls."""
    calls: list[Call] = []

    def make(call: Call) -> torch.Tensor:
        calls.append(call)
        return plain(next(levels), call.job.frames)

    return list(sliding.video(CATALOG.get(job.model), job, job.seed, make)), calls


def test_the_pieces_have_as_many_frames_as_were_asked_for() -> None:
    for length in (37, 65, 97, 101, 333):
        pieces, _ = made(long_job(video_length=length), iter([100] * 20))
        assert sum(map(len, pieces)) == length


def test_a_piece_is_handed_over_before_the_next_window_is_made() -> None:
    calls: list[Call] = []

    def make(call: Call) -> torch.Tensor:
        calls.append(call)
        return plain(100, call.job.frames)

    pieces = sliding.video(CATALOG.get("wan_demo"), long_job(), 3, make)
    assert [(len(piece), len(calls)) for piece in pieces] == [(24, 1), (24, 2), (20, 3), (29, 4)]


def test_each_window_has_a_seed_of_its_own() -> None:
    _, calls = made(long_job(video_length=57), iter([100] * 3))
    assert [call.seeds for call in calls] == [[3], [3 + 2**32]]


def test_what_began_as_text_goes_on_from_a_frame_near_the_end() -> None:
    _, calls = made(long_job(), iter([10, 20, 30, 40]))
    assert [call.job.task for call in calls] == ["t2v", "i2v", "i2v", "i2v"]
    assert [len(call.lead) for call in calls] == [0, 9, 9, 9]
    model = CATALOG.get("wan_demo")
    start = conditioning.roles(model.pipelines["i2v"], calls[1], 0)["start_image"]
    assert np.asarray(start)[0, 0].tolist() == [10, 10, 10]


def picture(folder: Path, name: str, level: int) -> Media:
    path = folder / name
    Image.new("RGB", (32, 32), (level,) * 3).save(path, "png")
    return Media((path,))


def test_start_and_end_picture_belong_to_the_first_and_the_last_window(tmp_path: Path) -> None:
    files = {"image_start": picture(tmp_path, "a", 0), "image_end": picture(tmp_path, "b", 255)}
    job = long_job("ltxv_0_9_7_13B", files, video_length=481, resolution="32x32")
    _, calls = made(job, iter([100] * 9))
    assert [call.job.task for call in calls] == ["i2v", *["v2v"] * (len(calls) - 2), "v2v"]
    assert [sorted(call.job.inputs) for call in calls] == [["image_start"], *[[]] * (len(calls) - 2), ["image_end"]]
    pipeline = CATALOG.get(job.model).pipelines["v2v"]
    last = conditioning.roles(pipeline, calls[-1], 0)["conditions"]
    assert [(condition.frame_index, condition.video is not None) for condition in last] == [
        (0, True),
        (calls[-1].job.frames - 1, False),
    ]


def test_frames_that_are_known_are_kept_in_a_masked_video() -> None:
    job = long_job("wan_vace_1.3B", video_length=33, sliding_window_size=17, resolution="32x32")
    _, calls = made(job, iter([40, 50, 60]))
    roles = conditioning.roles(CATALOG.get(job.model).pipelines["t2v"], calls[1], 0)
    masks = [round(float(np.asarray(frame).mean())) for frame in roles["mask"]]
    assert masks == [0] * 5 + [255] * (calls[1].job.frames - 5)
    assert np.asarray(roles["source_video"][4])[0, 0].tolist() == [40, 40, 40]


def test_a_guide_is_followed_from_where_the_window_begins(tmp_path: Path) -> None:
    from engine.gpu.save import encode

    path = tmp_path / "film.mp4"
    shades = np.arange(33, dtype=np.uint8)[:, None, None, None] * 7
    encode.write_video(path, np.broadcast_to(shades, (33, 32, 32, 3)), 16, None, crf=1)
    files = {"video_guide": Media((path,), 33 / 16)}
    job = long_job("wan_vace_1.3B", files, video_length=33, sliding_window_size=17, resolution="32x32")
    _, calls = made(job, iter([40, 50, 60]))
    roles = conditioning.roles(CATALOG.get(job.model).pipelines["vace"], calls[1], 0)
    first_new = round(float(np.asarray(roles["source_video"][5]).mean()))
    assert first_new == pytest.approx((calls[1].start + 5) * 7, abs=4)


def test_the_colours_of_a_window_are_those_of_the_one_before() -> None:
    known = plain(100, 5)
    drifted = (plain(100, 17).float() * 0.9 + 12).round().to(torch.uint8)
    whole = sliding.recoloured(drifted, known, 1.0)
    half = sliding.recoloured(drifted, known, 0.5)
    assert (whole.float() - plain(100, 17).float()).abs().max() <= 1
    assert (half.float() - plain(100, 17).float()).abs().mean() == pytest.approx(1.0, abs=0.6)
    assert sliding.recoloured(drifted, known, 0.0) is drifted


def test_a_window_fades_in_over_the_end_of_the_one_before() -> None:
    faded = sliding.faded(plain(100, 3), plain(140, 9))
    assert [int(frame[0, 0, 0]) for frame in faded] == [110, 120, 130, *[140] * 6]


def flat(*levels: float) -> torch.Tensor:
    """A frame of each level, (F, 4, 4, 3) uint8."""
    return torch.tensor(levels).round().to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 4, 4, 3).contiguous()


def levels(frames: torch.Tensor) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


def test_a_jump_is_spread_until_the_pace_is_even() -> None:
    assert levels(sliding.evened(flat(0, 4, 8, 40, 44, 48), usual=4)) == [0, 10, 19, 29, 38, 48]


def test_frames_without_a_jump_stay_as_they_are() -> None:
    frames = flat(0, 20, 40, 61, 80)
    assert sliding.evened(frames, usual=20) is frames


@given(st.lists(st.integers(0, 255), min_size=3, max_size=12), st.floats(0, 100))
def test_evened_frames_keep_their_ends_and_change_by_no_more_than_the_mean(shades: list[int], usual: float) -> None:
    before = flat(*shades)
    after = sliding.evened(before, usual)
    assert levels(after)[:: len(after) - 1] == [shades[0], shades[-1]]
    limit = max(float(sliding.changes(before).mean()), sliding.JUMP * usual)
    assert sliding.changes(after).max() <= limit + 1  # each of two frames is rounded to a whole level


def test_no_jump_is_left_where_two_windows_are_joined() -> None:
    """The end of the one moves by 6 a frame, the other by 2: the fade alone would hurry and then halt."""
    end, window = flat(*range(40, 100, 6)), flat(*range(94, 160, 2))
    steps = sliding.changes(torch.cat([end[:1], sliding.joined(end, window)]))
    cross_fade = sliding.changes(torch.cat([end[:1], sliding.faded(end[1:], window)]))
    assert steps.sum() == cross_fade.sum()
    assert steps.max() < 0.75 * cross_fade.max()


# ------------------------------------------------------------------------------------------------- through HTTP


FILMS = {  # seed by prompt
    "a red circle slowly moving right": 1,
    "a white triangle slowly moving right": 7,
    "a blue circle slowly moving right on a gray background": 10,
}


@dataclasses.dataclass(frozen=True)
class Film:
    """A video of 97 frames: what was asked for, its status when it was done, and its frames."""

    prompt: str
    state: dict[str, Any]
    frames: NDArray[np.float64]  # (F, H, W, 3) in 0..255


@pytest.fixture(scope="module", params=FILMS)
def film(request: pytest.FixtureRequest, daemon: Daemon) -> Film:
    state = daemon.run(prompt=request.param, video_length=97, seed=FILMS[request.param])
    return Film(request.param, state, read_video(daemon.made(state)).astype(float))


def test_a_long_video_has_all_its_frames(film: Film) -> None:
    assert len(film.frames) == film.state["files"][0]["frames"] == 97
    assert film.state["settings"]["sliding_window_size"] == 33
    assert film.state["current_step"] == film.state["total_steps"] == 4 * 20  # four windows


def test_an_object_moves_as_asked_in_every_window(film: Film) -> None:
    _, color, _, _, _, direction, *_ = film.prompt.split()
    seen = [read_clip(film.frames[start : start + 33].astype(np.uint8)) for start in (0, 32, 64)]
    assert [(one.color, one.direction) for one in seen] == [(color, direction)] * 3


def test_no_seam_is_much_larger_than_what_changes_anyway(film: Film) -> None:
    changes = np.abs(np.diff(film.frames, axis=0)).mean((1, 2, 3))
    pieces = windows(long_job(prompt=film.prompt), RULE)[1:]
    seams = {
        piece.start - 1 + i for piece in pieces for i in range(piece.overlap + 1)
    }  # into each faded frame, and out
    normal = np.mean([change for i, change in enumerate(changes) if i not in seams])
    assert max(changes[i] for i in seams) < 1.5 * normal


def test_a_long_video_can_be_stopped_between_its_windows(daemon: Daemon) -> None:
    task_id = daemon.submit(video_length=97, num_inference_steps=80)["task_id"]
    daemon.until(task_id, lambda state: state["current_step"] > 85)  # the first window is being encoded by now
    daemon.delete(f"/queue/{task_id}")
    assert daemon.finish(task_id)["status"] == "cancelled"
    assert [path.name for path in daemon.outputs.iterdir() if f"t{task_id:06d}" in path.name] == []


def test_windows_make_other_frames_than_one_pass(daemon: Daemon) -> None:
    fields = {"prompt": "a red circle slowly moving right", "video_length": 97, "seed": 1, "num_inference_steps": 2}
    whole = read_video(daemon.made(daemon.run(**fields, sliding_window_size=0)))
    cut = read_video(daemon.made(daemon.run(**fields)))
    assert whole.shape == cut.shape == (97, 64, 64, 3)
    assert (whole[40:] != cut[40:]).any()
