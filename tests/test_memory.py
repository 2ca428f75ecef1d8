"""Where the weights live: a plan carried out gives the frames that it gives without one, and moves what it says."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderKLWan, WanTransformer3DModel

from engine.catalog import weights
from engine.catalog.models import Catalog
from engine.gpu.load import offloading, pipelines
from engine.job import Job
from engine.planning import placement
from engine.planning.machine import GIB
from engine.planning.placement import Placement, Plan
from engine.planning.work import Work

CPU = torch.device("cpu")
DEMO = Catalog.load().get("wan_demo")
BLOCKS = 12
PLACEMENTS = {
    "all resident": Placement("resident", "card"),
    "encoders streamed": Placement("resident", "streamed"),
    "streamed from pinned memory": Placement("streamed", "streamed", pinned=True, encoders_pinned=True),
    "streamed from files": Placement("streamed", "streamed"),
    "swapped": Placement("swapped", "swapped"),
    "sequential": Placement("sequential", "streamed"),
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def loaded() -> Any:
    found = weights.locate(DEMO, Path("models"))
    assert found
    return pipelines.load(DEMO, DEMO.pipelines["t2v"], found, CPU)


def frames(pipe: Any) -> torch.Tensor:
    return pipe(  # type: ignore[no-any-return]
        prompt="a red circle moving right", num_frames=5, height=64, width=64, num_inference_steps=2,
        guidance_scale=2.5, generator=torch.Generator().manual_seed(1), output_type="pt", max_sequence_length=64,
    ).frames  # fmt: skip


def planned(placement: Placement, resident_bytes: int, streamed_bytes: int) -> Plan:
    return Plan(placement, resident_bytes, streamed_bytes, 1, 1, 1.0, 1.0, card_bytes=GIB)


@pytest.fixture(scope="module")
def plain_frames() -> torch.Tensor:
    return frames(loaded())


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS)
def test_a_plan_that_is_carried_out_changes_no_frame(placement: Placement, plain_frames: torch.Tensor) -> None:
    pipe = loaded()
    total = offloading.parts_of(pipe, DEMO).denoisers
    offloading.carry_out(pipe, planned(placement, total // 2, total // 2), CPU)
    assert torch.equal(frames(pipe), plain_frames)
    assert torch.equal(frames(pipe), plain_frames)  # and once more: prefetching starts with the second forward


def test_without_a_card_a_pipeline_is_placed_in_ram() -> None:
    pipe = loaded()
    parts = offloading.parts_of(pipe, DEMO)
    plan = placement.plan(DEMO, Work.usual(DEMO), offloading.measure(CPU), parts=parts)
    offloading.carry_out(pipe, plan, CPU)
    assert plan.describe().startswith("everything in RAM")
    assert {weight.device for weight in pipe.transformer.parameters()} == {CPU}


# ---- streaming some of the blocks


@pytest.fixture
def denoiser() -> Iterator[WanTransformer3DModel]:
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=32, num_layers=BLOCKS, rope_max_seq_len=32,
    )  # fmt: skip
    with torch.no_grad():
        yield model.eval()


def forward(denoiser: WanTransformer3DModel) -> torch.Tensor:
    torch.manual_seed(1)
    hidden, prompt = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 5, 32)
    out = denoiser(hidden_states=hidden, timestep=torch.tensor([500]), encoder_hidden_states=prompt, return_dict=False)
    return out[0]  # type: ignore[no-any-return]


def hooked(denoiser: WanTransformer3DModel) -> list[int]:
    """The blocks in which diffusers moves something."""
    return [
        place
        for place, block in enumerate(denoiser.blocks)
        if any(hasattr(module, "_diffusers_hook") for module in block.modules())
    ]


def room_for(denoiser: WanTransformer3DModel, blocks: int) -> int:
    """Bytes of `blocks` blocks and of all that is in none."""
    block = offloading.size_bytes(denoiser.blocks[0])
    return offloading.size_bytes(denoiser) - (BLOCKS - blocks) * block


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize(
    ("resident", "streamed"), [(12, []), (9, [0, 4, 8]), (6, [0, 2, 4, 6, 8, 10]), (0, list(range(12)))]
)
def test_only_the_blocks_for_which_there_is_no_room_are_streamed(
    denoiser: WanTransformer3DModel, resident: int, streamed: list[int], pinned: bool
) -> None:
    before = forward(denoiser)
    offloading._stream_blocks(denoiser, room_for(denoiser, resident), CPU, pinned)
    assert hooked(denoiser) == streamed
    assert torch.equal(forward(denoiser), before)


def test_a_denoiser_is_whole_again_after_it_was_placed(denoiser: WanTransformer3DModel) -> None:
    names = list(denoiser.state_dict())
    offloading._stream_blocks(denoiser, room_for(denoiser, 6), CPU, pinned=True)
    assert list(denoiser.state_dict()) == names
    assert len(denoiser.blocks) == BLOCKS
    assert not list(denoiser.named_buffers(recurse=False))


def test_what_is_in_no_block_stays_on_the_card(denoiser: WanTransformer3DModel) -> None:
    offloading._stream_blocks(denoiser, room_for(denoiser, 0), CPU, pinned=True)
    outside = [denoiser.patch_embedding, denoiser.condition_embedder, denoiser.proj_out]
    assert not any(hasattr(module, "_diffusers_hook") for part in outside for module in part.modules())


# ---- what is measured


def test_the_parts_are_those_that_the_pipeline_holds() -> None:
    parts = offloading.parts_of(loaded(), DEMO)
    catalogued = (2 * DEMO.transformer_bf16_bytes, 2 * DEMO.vae_bf16_bytes)  # it runs in float32
    assert (parts.denoisers, parts.vae) == pytest.approx(catalogued, rel=0.02)
    assert parts.parameters == DEMO.transformer_bf16_bytes // 2
    assert parts.encoders > 0
    assert (parts.denoiser_count, parts.vae_width) == (1, 2.0)


def test_a_machine_without_a_card_has_no_memory_of_one() -> None:
    machine = offloading.measure(CPU)
    assert machine.free_vram_bytes == 0
    assert machine.free_ram_bytes > 0
    assert machine.flops_per_s > 1e8


def test_measuring_draws_no_random_number() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    offloading._speeds.__wrapped__(CPU)
    assert torch.equal(torch.rand(1), expected)


# ---- tiles


def test_a_vae_that_decodes_in_small_tiles_leaves_no_gap() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0] * 4, latents_std=[1] * 4
    )
    latents = torch.randn(1, 4, 1, 40, 40)  # 320x320 pixels, more than two tiles a side
    with torch.no_grad():
        whole = vae.decode(latents).sample
        offloading.tile_vae(SimpleNamespace(vae=vae), 128)
        tiled = vae.decode(latents).sample
    assert vae.use_tiling
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_tiles_have_the_asked_size_in_a_vae_that_takes_none_as_argument() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL(
            sample_size=1024,
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
    offloading.tile_vae(SimpleNamespace(vae=vae), 128)
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size, vae.use_tiling) == (128, 16, True)


def test_a_vae_that_knows_no_tiles_is_left_alone() -> None:
    with torch.device("meta"):
        vae = AutoencoderKLTemporalDecoder()
    offloading.tile_vae(SimpleNamespace(vae=vae), 256)
    assert not hasattr(vae, "use_tiling")


def test_a_pipeline_without_a_vae_needs_no_tiles() -> None:
    offloading.tile_vae(SimpleNamespace(), 256)


# ---- when it was too much


def test_every_profile_leads_to_a_more_frugal_one_and_ends_at_the_last() -> None:
    chain = [0.0]
    while chain[-1] != 5:
        chain.append(offloading.more_frugal(chain[-1]))
    assert chain == [0, 4, 5]
    assert [offloading.more_frugal(profile) for profile in (1, 2, 3, 3.5, 4.5, 5)] == [3, 4, 4, 4, 5, 5]


def test_a_job_that_fits_nowhere_is_told_a_size_that_the_model_can_make() -> None:
    model = Catalog.load().get("wan_t2v_14B")
    job = Job(
        model=model.id, task="t2v", prompt="x", negative_prompt="", width=1280, height=720, frames=81, fps=16, steps=30,
        guidance_scale=5, embedded_guidance_scale=0, flow_shift=5, seed=1, batch_size=2,
    )  # fmt: skip
    sentence = offloading.advice(job, model, "decoding", 4)
    assert "while decoding" in sentence
    assert "1280x720 with 81 frames" in sentence
    assert "try 896x496, or video_length 41, or batch_size 1." in sentence
