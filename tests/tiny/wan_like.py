"""Tiny checkpoints of the models that grew out of Wan: SkyReels V2, ChronoEdit, Lucy Edit and Helios.

They share Wan's text encoder and VAE, and the names of its denoiser's weights, so the gains of `wan.py` work here too.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import (
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    DiffusionPipeline,
    HeliosDMDScheduler,
    HeliosPipeline,
    HeliosPyramidPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    LucyEditPipeline,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanTransformer3DModel,
)
from torch import nn

from tests.proof import Proof

from . import wan
from .tokenizers import characters


def _common() -> dict[str, Any]:
    """The components that all of these have, but for the denoiser."""
    return {
        "tokenizer": characters(),
        "text_encoder": wan.text_encoder(),
        "vae": wan.vae_8x(),
        "scheduler": wan.unipc_scheduler(),
    }


def _pictures() -> dict[str, Any]:
    """The parts with which a model looks at its start picture as a whole."""
    return {"image_encoder": wan.image_encoder(), "image_processor": wan.image_processor()}


def skyreels_forcing() -> DiffusionPipeline:
    """Diffusion forcing: every frame has its own noise level, and the denoiser is told the frame rate."""
    transformer = wan.denoiser(SkyReelsV2Transformer3DModel, inject_sample_info=True)
    return SkyReelsV2DiffusionForcingPipeline(transformer=transformer, **_common())


def skyreels_text() -> DiffusionPipeline:
    """Text to video, all frames at one noise level."""
    return SkyReelsV2Pipeline(transformer=wan.denoiser(SkyReelsV2Transformer3DModel), **_common())


def skyreels_image() -> DiffusionPipeline:
    """Image to video; its position embedding has room for a start and an end picture."""
    condition = wan.IMAGE_CONDITION | wan.IMAGE_TOKEN_CONDITION
    transformer = wan.denoiser(SkyReelsV2Transformer3DModel, **condition)
    return SkyReelsV2ImageToVideoPipeline(transformer=transformer, **_common(), **_pictures())


def chrono_edit() -> DiffusionPipeline:
    """An editor that takes the edited picture for the end of a video that starts with the given one."""
    transformer = wan.denoiser(ChronoEditTransformer3DModel, **wan.IMAGE_CONDITION, **wan.IMAGE_TOKEN_CONDITION)
    return ChronoEditPipeline(transformer=transformer, **_common(), **_pictures())


def lucy_edit() -> DiffusionPipeline:
    """A video editor on the 16x VAE: the source's latents are further channels of the denoiser's input."""
    transformer = wan.denoiser(WanTransformer3DModel, in_channels=96, out_channels=48)
    parts = _common() | {"vae": wan.vae_16x()}
    return LucyEditPipeline(transformer=transformer, expand_timesteps=True, **parts)


HISTORY_GAINS = {"patch_short.weight": 12.0, "patch_mid.weight": 12.0, "patch_long.weight": 12.0}
GAMMA = 0.33  # the published third makes a singular matrix, and a CPU's Cholesky refuses that


def _helios_denoiser(**config: Any) -> nn.Module:
    inherited = {key: value for key, value in wan.DENOISER.items() if key != "rope_max_seq_len"}
    transformer = HeliosTransformer3DModel(**inherited, rope_dim=(4, 4, 4), **config).eval()
    return wan.amplify(transformer, wan.GAINS | HISTORY_GAINS)


def helios() -> DiffusionPipeline:
    """Chunks of 33 frames, each denoised at full size, each after the history of those before."""
    parts = _common() | {"scheduler": HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)}
    return HeliosPipeline(transformer=_helios_denoiser(), **parts)


def helios_pyramid() -> DiffusionPipeline:
    """Each chunk is denoised at a quarter, half and full size."""
    parts = _common() | {"scheduler": HeliosScheduler(use_dynamic_shifting=True, gamma=GAMMA)}
    return HeliosPyramidPipeline(transformer=_helios_denoiser(), is_cfg_zero_star=True, **parts)


def helios_distilled() -> DiffusionPipeline:
    """As the pyramid, with few steps that go back to the noise of their stage."""
    parts = _common() | {"scheduler": HeliosDMDScheduler(use_dynamic_shifting=True, gamma=GAMMA)}
    return HeliosPyramidPipeline(transformer=_helios_denoiser(is_amplify_history=True), is_distilled=True, **parts)


LORAS: Mapping[str, Callable[[Path], None]] = {
    "chrono_edit_distill_14B": partial(wan.write_loras, "chrono_edit_distill_14B", True)
}
LONGER = Proof(frames=33)  # 17 of them are the source's
PROOFS = {
    "sky_df_1.3B-v2v": LONGER,
    "sky_df_14B-v2v": LONGER,
    "sky_df_720p_14B-v2v": LONGER,
    "helios_base_14B": Proof(frames=33),
    "helios_mid_14B": Proof(frames=33, steps=3),
    "helios_distilled_14B": Proof(side=64, frames=33, steps=3),
}
MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "sky_df_1.3B": skyreels_forcing,
    "sky_df_14B": skyreels_forcing,
    "sky_df_720p_14B": skyreels_forcing,
    "sky_t2v_14B": skyreels_text,
    "sky_t2v_720p_14B": skyreels_text,
    "sky_i2v_1.3B": skyreels_image,
    "sky_i2v_14B": skyreels_image,
    "sky_i2v_720p_14B": skyreels_image,
    "chrono_edit_14B": chrono_edit,
    "chrono_edit_distill_14B": chrono_edit,
    "lucy_edit_5B": lucy_edit,
    "lucy_edit_1_1_5B": lucy_edit,
    "helios_base_14B": helios,
    "helios_mid_14B": helios_pyramid,
    "helios_distilled_14B": helios_distilled,
}
