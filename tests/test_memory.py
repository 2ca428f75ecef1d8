"""Where the weights live: the choice of a profile, and VAE tiles."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan

from engine.catalog import Catalog
from engine.gpu import memory
from engine.job import Job

GIB = 2**30


@pytest.mark.parametrize(
    ("model_id", "free_gib", "profile"),
    [
        ("wan_demo", 1, 1),
        ("wan_t2v_1.3B", 24, 1),
        ("wan_t2v_1.3B", 16, 3),
        ("wan_t2v_14B", 80, 1),
        ("wan_t2v_14B", 48, 3),
        ("wan_t2v_14B", 24, 4),
        ("wan22_t2v_14B", 141, 1),
        ("wan22_t2v_14B", 80, 3),  # two experts: only one of them has to fit
        ("wan22_t2v_14B", 24, 4),
    ],
)
def test_the_fastest_profile_whose_weights_fit_is_chosen(model_id: str, free_gib: int, profile: int) -> None:
    assert memory.choose_profile(Catalog.load().get(model_id), free_gib * GIB) == profile


@pytest.mark.parametrize(("card_gib", "side"), [(6, 128), (12, 256), (16, 512), (24, 0), (80, 0)])
def test_tiles_follow_the_size_of_the_card(card_gib: int, side: int) -> None:
    assert memory.auto_tile(card_gib * GIB) == side


def test_every_profile_leads_to_a_more_frugal_one_and_ends_at_the_last() -> None:
    chain = [0.0]
    while chain[-1] != 5:
        chain.append(memory.more_frugal(chain[-1]))
    assert chain == [0, 4, 5]
    assert [memory.more_frugal(profile) for profile in (1, 2, 3, 5)] == [3, 4, 4, 5]


def test_a_vae_that_decodes_in_small_tiles_leaves_no_gap() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0] * 4, latents_std=[1] * 4
    )
    latents = torch.randn(1, 4, 1, 40, 40)  # 320x320 pixels, more than two tiles a side
    with torch.no_grad():
        whole = vae.decode(latents).sample
        memory.tile_vae(SimpleNamespace(vae=vae), 128)
        tiled = vae.decode(latents).sample
    assert vae.use_tiling
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.1 * whole.std()


def test_a_job_that_fits_nowhere_is_told_a_size_that_the_model_can_make() -> None:
    model = Catalog.load().get("wan_t2v_14B")
    job = Job(
        model=model.id, task="t2v", prompt="x", negative_prompt="", width=1280, height=720, frames=81, fps=16, steps=30,
        guidance_scale=5, embedded_guidance_scale=0, flow_shift=5, seed=1, batch_size=2,
    )  # fmt: skip
    sentence = memory.advice(job, model, "decoding", 4)
    assert "while decoding" in sentence
    assert "1280x720 with 81 frames" in sentence
    assert "try 896x496, or video_length 41, or batch_size 1." in sentence
