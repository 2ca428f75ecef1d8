"""The memory plan: fast where there is room, frugal where there is little, and true to what others have measured."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.catalog.models import Catalog, Model
from engine.job import EngineError, Job
from engine.planning import machine as machines
from engine.planning import placement
from engine.planning.machine import GIB, Machine
from engine.planning.placement import Placement, Plan
from engine.planning.work import Parts, Shape, Work, forward_flops, tokens

MODELS = {model.id: model for model in Catalog.load()}
CARDS_GIB = (6, 8, 10, 12, 16, 24, 32, 48, 80, 141)
RAMS_GIB = (16, 128)
RANKS = {"resident": 0, "streamed": 1, "swapped": 1, "sequential": 2}

Table = Mapping[tuple[str, int, int], Plan | None]


def card(free_gib: float, ram_gib: float = 64, link: float = 25e9, flops: float = 160e12) -> Machine:
    """A machine with these free; its speeds are those of an RTX 4090 on PCIe 4."""
    return Machine(int(free_gib * GIB), int(ram_gib * GIB), link, flops)


def h100(free_gib: float = 78) -> Machine:
    return card(free_gib, ram_gib=200, link=50e9, flops=795e12)


def work(model_id: str, **changes: Any) -> Work:
    """A job of a video model as Work, 480p with 81 frames unless it is said otherwise."""
    model = MODELS[model_id]
    plain: dict[str, Any] = {
        "model": model_id, "task": model.tasks[0], "prompt": "x", "negative_prompt": "", "width": 832, "height": 480,
        "frames": 81, "fps": 16, "steps": 40, "guidance_scale": 5.0, "embedded_guidance_scale": 0.0,
        "flow_shift": None, "seed": 1,
    }  # fmt: skip
    return Work.of(model, Job(**plain | changes))


def planned(model_id: str, machine: Machine, **options: Any) -> Plan:
    size = {name: options.pop(name) for name in ("width", "height", "frames", "steps") if name in options}
    return placement.plan(MODELS[model_id], work(model_id, **size), machine, **options)


def plan_or_none(model: Model, machine: Machine) -> Plan | None:
    try:
        return placement.plan(model, Work.usual(model), machine)
    except EngineError:
        return None


# ---- every model on every card


# Of models that cost the same in everything, one will do.
COSTS = {(Parts.of(model), Shape.of(model), Work.usual(model)): model for model in MODELS.values()}
KINDS = [model.id for model in COSTS.values()]


@pytest.fixture(scope="module")
def table() -> Table:
    return {
        (model, ram, size): plan_or_none(MODELS[model], card(size * 0.95, ram * 0.9))
        for model in KINDS
        for ram in RAMS_GIB
        for size in CARDS_GIB
    }


def steps_up(table: Table) -> list[tuple[Plan | None, Plan | None]]:
    """The plans of each model for a card and for the next larger one."""
    return [
        (table[model, ram, small], table[model, ram, large])
        for model in KINDS
        for ram in RAMS_GIB
        for small, large in pairwise(CARDS_GIB)
    ]


def test_a_larger_card_is_never_slower(table: Table) -> None:
    assert all(large and large.job_s <= small.job_s for small, large in steps_up(table) if small)


def test_a_larger_card_moves_more_weights_only_where_that_is_faster(table: Table) -> None:
    for small, large in steps_up(table):
        if small and large and RANKS[large.placement.denoisers] > RANKS[small.placement.denoisers]:
            assert large.job_s < small.job_s


def test_no_plan_that_fits_takes_more_than_there_is(table: Table) -> None:
    for (_, ram, size), plan in table.items():
        if plan and plan.fits:
            assert plan.peak_vram_bytes <= size * 0.95 * GIB
            assert plan.ram_bytes <= ram * 0.9 * GIB


def test_a_plan_that_may_not_fit_is_tried_only_within_the_doubt_of_the_estimate(table: Table) -> None:
    doubtful = [(plan, size) for (_, _, size), plan in table.items() if plan and not plan.fits]
    assert doubtful
    assert all(plan.peak_vram_bytes <= placement.DOUBT * size * GIB for plan, size in doubtful)


def test_every_model_runs_on_24_gb_of_gpu_memory_and_128_of_ram(table: Table) -> None:
    assert [model for model in KINDS if table[model, 128, 24] is None] == []


def test_on_141_gb_nothing_is_streamed_but_what_is_larger(table: Table) -> None:
    streamed = [model for model in KINDS if (plan := table[model, 128, 141]) and plan.placement.denoisers != "resident"]
    assert all(Parts.of(MODELS[model]).denoisers > 50e9 for model in streamed)


# ---- anchors that others have published


@pytest.mark.parametrize(
    ("model_id", "token_count", "counted"),
    [("wan_t2v_14B", 32_760, 1678e12), ("wan_t2v_1.3B", 32_760, 283e12), ("wan22_ti2v_5B", 27_280, 517e12)],
)
def test_the_rule_for_a_forward_is_near_what_was_counted(model_id: str, token_count: int, counted: float) -> None:
    estimate = forward_flops(Parts.of(MODELS[model_id]).parameters, token_count)
    assert estimate == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("model_id", "size", "token_count"),
    [
        ("wan_t2v_14B", (832, 480, 81), 21 * 30 * 52),
        ("wan22_ti2v_5B", (1280, 704, 121), 31 * 22 * 40),
        ("ltxv_2B", (704, 512, 161), 21 * 16 * 22),
        ("cogvideox_5B", (720, 480, 49), 13 * 30 * 45),
        ("flux_dev", (1024, 1024, 1), 64 * 64),
        ("sana_1600M", (1024, 1024, 1), 32 * 32),
    ],
)
def test_tokens_follow_the_vae_and_the_patches(model_id: str, size: tuple[int, int, int], token_count: int) -> None:
    assert tokens(MODELS[model_id], *size) == token_count


@pytest.mark.parametrize(
    ("model_id", "machine", "published_s"),
    [
        ("wan_i2v_14B", h100(), 9.77),
        ("wan22_t2v_14B", h100(), 327 / 40),
        ("wan_t2v_1.3B", card(23), 261 / 50),
        ("wan_t2v_1.3B", card(135, flops=795e12), 58 / 50),
    ],
)
def test_a_step_takes_about_what_others_have_measured(model_id: str, machine: Machine, published_s: float) -> None:
    assert planned(model_id, machine).step_s == pytest.approx(published_s, rel=0.4)


def test_the_small_wan_runs_on_8_gb() -> None:
    plan = planned("wan_t2v_1.3B", card(7.6))
    assert (plan.placement.name, plan.placement.encoders) == ("resident", "streamed")
    assert plan.placement.tile_side
    assert plan.peak_vram_bytes < 8.2e9  # published


def test_the_14b_on_24_gb_streams_what_does_not_fit_from_pinned_memory() -> None:
    plan = planned("wan_t2v_14B", card(23))
    assert (plan.placement.name, plan.placement.pinned) == ("streamed", True)
    assert plan.resident_bytes > 8e9
    resident = planned("wan_t2v_14B", card(79))
    assert plan.step_s < 1.04 * resident.step_s


def test_two_experts_stay_on_80_gb() -> None:
    assert planned("wan22_t2v_14B", h100()).placement.name == "resident"


def test_one_expert_at_a_time_takes_no_more_than_published() -> None:
    assert 30e9 < planned("wan22_t2v_14B", h100(), profile=3).peak_vram_bytes < 41e9


@pytest.mark.parametrize(("machine", "token_count"), [(h100(), 9_000), (card(23), 4_300)])
def test_streaming_is_hidden_from_about_as_many_tokens_as_published(machine: Machine, token_count: int) -> None:
    model = MODELS["wan_t2v_14B"]

    def slowdown(seen: int) -> float:
        some = Work(832, 480, 81, steps=40, tokens=seen, passes=2)
        streamed = placement.plan(model, some, machine, profile=2)
        compute_s = 2 * forward_flops(Parts.of(model).parameters, seen)
        return streamed.step_s / (compute_s / (machine.flops_per_s * placement.EFFICIENCY))

    assert slowdown(token_count) < 1.04
    assert slowdown(token_count // 3) > 1.3


# ---- profiles and options


@pytest.mark.parametrize(
    ("profile", "denoisers", "encoders", "pinned"),
    [
        (1, "resident", "card", False),
        (2, "streamed", "streamed", True),
        (3, "swapped", "swapped", False),
        (3.5, "swapped", "swapped", False),
        (4, "streamed", "streamed", True),
        (4.5, "streamed", "streamed", False),
        (5, "sequential", "streamed", False),
    ],
)
def test_a_profile_decides_the_placement(profile: float, denoisers: str, encoders: str, pinned: bool) -> None:
    chosen = planned("wan_t2v_14B", h100(), profile=profile).placement
    assert (chosen.denoisers, chosen.encoders, chosen.pinned) == (denoisers, encoders, pinned)


def test_the_profiles_need_less_and_less_of_the_card() -> None:
    peaks = [planned("wan_t2v_14B", h100(), profile=profile).peak_vram_bytes for profile in (1, 3, 4, 4.5, 5)]
    assert peaks == sorted(peaks, reverse=True)


def test_a_demanded_profile_is_obeyed_though_it_may_not_fit() -> None:
    plan = planned("wan_t2v_14B", card(12), profile=1)
    assert (plan.placement.name, plan.fits) == ("resident", False)
    assert "more than is free" in plan.describe()


def test_the_automatic_plan_is_as_fast_as_any_profile() -> None:
    plans = [planned("wan_t2v_14B", card(23), profile=profile) for profile in placement.PROFILES]
    assert planned("wan_t2v_14B", card(23)).job_s == min(plan.job_s for plan in plans if plan.fits)


def test_with_little_ram_streamed_weights_are_not_pinned() -> None:
    plan = planned("wan_t2v_14B", card(12, ram_gib=24))
    assert (plan.placement.name, plan.placement.pinned) == ("streamed", False)
    assert "from mapped files" in plan.describe()


def test_weights_that_ram_does_not_hold_are_read_from_the_disk_again() -> None:
    plenty, little = (planned("wan22_t2v_14B", card(12, ram), profile=4.5) for ram in (128, 32))
    assert little.step_s > 1.2 * plenty.step_s


@pytest.mark.parametrize(("vae_config", "side"), placement.TILES.items())
def test_vae_config_forces_the_side_of_the_tiles(vae_config: int, side: int) -> None:
    assert planned("wan_t2v_14B", h100(), vae_config=vae_config).placement.tile_side == side


@pytest.mark.parametrize(("free_gib", "sides"), [(5.7, {128, 256}), (7.6, {128, 256}), (23, {0})])
def test_tiles_are_for_cards_on_which_whole_frames_do_not_fit(free_gib: float, sides: set[int]) -> None:
    assert planned("wan_t2v_1.3B", card(free_gib)).placement.tile_side in sides


def test_weights_are_quantised_only_where_the_caller_allows_it() -> None:
    kinds = {planned("flux2_dev", card(23), quantization=kind).placement.quantization for kind in ("none", "auto")}
    assert kinds == {"none", "int8"}


def test_8_bit_weights_keep_a_model_on_the_card_that_else_is_streamed() -> None:
    machine, size = card(23), {"width": 1024, "height": 1024, "frames": 1}
    assert planned("flux_dev", machine, **size).placement.name == "streamed"
    assert planned("flux_dev", machine, quantization="int8", **size).placement.name == "quantized"


def test_8_bit_weights_are_not_chosen_where_all_fits_without() -> None:
    assert planned("wan_t2v_14B", h100(), quantization="auto").placement.name == "resident"


def test_an_encoder_that_writes_many_words_is_not_streamed() -> None:
    model = MODELS["glm_image"]
    assert placement.plan(model, Work.usual(model), card(23)).placement.encoders != "streamed"


# ---- what is said


def test_what_fits_nowhere_is_refused_with_the_remedy() -> None:
    with pytest.raises(EngineError) as refused:
        planned("wan_t2v_14B", card(3), width=1280, height=720)
    assert refused.value.code == "out_of_memory"
    assert "model: 'wan_t2v_14B' needs about" in refused.value.message
    assert "1280x720 with 81 frames" in refused.value.message
    assert "3.0 GiB are free. Ask for a smaller resolution" in refused.value.message


def test_a_recipe_that_ram_can_not_hold_is_refused_for_that() -> None:
    with pytest.raises(EngineError, match=r"needs about 29\.6 GiB of RAM, and 16\.0 GiB are free"):
        planned("wan_t2v_14B_lightx2v", card(23, ram_gib=16))


def test_a_plan_is_told_in_one_line() -> None:
    told = planned("wan_t2v_14B", card(23)).describe()
    assert "\n" not in told
    for words in ("denoiser streamed (", "pinned RAM", "encoders streamed by layer", "GiB of GPU memory", "s a step"):
        assert words in told


def test_without_a_card_everything_runs_in_ram() -> None:
    plan = planned("wan_t2v_14B", Machine(0, 8 * GIB))
    assert (plan.placement.name, plan.peak_vram_bytes) == ("resident", 0)
    assert plan.describe().startswith("everything in RAM, about 4")


# ---- the parts of the decision


def test_a_plan_serves_smaller_jobs_and_not_much_larger_ones() -> None:
    model, plan = MODELS["wan_t2v_14B"], planned("wan_t2v_14B", card(23))
    assert placement.serves(plan, model, work("wan_t2v_14B", width=640, height=480, frames=49))
    assert not placement.serves(plan, model, work("wan_t2v_14B", width=1280, height=720, frames=161))


def test_the_weights_that_were_found_count_more_than_the_catalogue() -> None:
    tiny = Parts(denoisers=10**6, encoders=10**6, vae=10**6, parameters=500_000)
    plan = placement.plan(MODELS["wan_t2v_14B"], work("wan_t2v_14B"), card(7.6), parts=tiny)
    assert plan.placement.name == "resident"


def test_a_batch_counts_in_memory_or_in_runs() -> None:
    assert (work("wan_t2v_14B", batch_size=4).batch, work("wan_t2v_14B", batch_size=4).runs) == (4, 1)
    assert (work("wan_vace_14B", batch_size=4).batch, work("wan_vace_14B", batch_size=4).runs) == (1, 4)
    assert work("wan_t2v_14B", batch_size=2, repeat_generation=3).runs == 3


@pytest.mark.parametrize(("guidance", "passes"), [(5.0, 2), (1.0, 1), (None, 1)])
def test_guidance_doubles_the_forwards(guidance: float | None, passes: int) -> None:
    assert work("wan_t2v_14B", guidance_scale=guidance).passes == passes


@pytest.mark.parametrize(
    ("sizes", "room", "places"),
    [
        ([1] * 8, 8, []),
        ([1] * 8, 4, [0, 2, 4, 6]),
        ([1] * 8, 6, [0, 4]),
        ([1] * 8, 0, list(range(8))),
        ([1] * 4, -5, [0, 1, 2, 3]),
        ([], 0, []),
    ],
)
def test_streamed_blocks_are_few_and_evenly_spread(sizes: list[int], room: int, places: list[int]) -> None:
    assert placement.streamed_blocks(sizes, room) == places


def test_every_value_of_a_placement_has_its_words() -> None:
    choices = [choice for choices in placement.PROFILES.values() for choice in choices]
    plans = [Plan(choice, 1, 1, 1, 1, 1.0, 1.0, card_bytes=1) for choice in choices]
    assert all(plan.describe() for plan in plans)


def test_quantised_placements_have_names_of_their_own() -> None:
    names = [Placement(where, "card", quantization="int8").name for where in RANKS]
    assert names == ["quantized", "quantized_streamed", "quantized_swapped", "quantized_sequential"]


# ---- the machine's RAM


def test_free_ram_counts_what_this_process_already_holds() -> None:
    assert machines.free_ram_bytes() > machines._kilobytes("/proc/self/status", "RssAnon") > 0


@pytest.mark.parametrize(("limits", "least"), [(("max", "max"), 2**62), (("max", "4096"), 4096), (("8", "9"), 8)])
def test_a_limit_of_the_service_or_of_what_holds_it_counts(tmp_path: Path, limits: tuple[str, str], least: int) -> None:
    outer, inner = tmp_path / "system.slice", tmp_path / "system.slice" / "wangpd.service"
    inner.mkdir(parents=True)
    for folder, limit in zip((outer, inner), limits, strict=True):
        (folder / "memory.max").write_text(f"{limit}\n")
    told = tmp_path / "cgroup"
    told.write_text("0::/system.slice/wangpd.service\n")
    assert machines._cgroup_bytes(tmp_path, told) == least
