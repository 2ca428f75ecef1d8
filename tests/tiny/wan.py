"""Tiny checkpoints for every model of wan.toml but the embedded one, made from nothing in a moment.

Each becomes a folder in diffusers layout with the classes, the configuration flags and the component list of the real
model, so that loading and rendering go through the same code. The denoisers are random (from a fixed seed) with enough
gain that every input shows in the pixels. The VAE is written by hand: its latents carry the mean colour of a block, so
a picture made of such blocks comes back nearly unchanged.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowFARTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKLWan,
    DiffusionPipeline,
    FlowMapEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from tests.proof import CATALOG, Proof

from .tokenizers import VOCABULARY, characters

INNER_SIZE = 24  # of the denoisers: 2 heads of 12
TEXT_SIZE = 32
IMAGE_SIZE = 32
IMAGE_TOKENS = 5  # of the image encoder: 2 x 2 patches and the class token
LORA_RANK = 4

DENOISER = {
    "num_attention_heads": 2,
    "attention_head_dim": INNER_SIZE // 2,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": TEXT_SIZE,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
IMAGE_CONDITION = {"in_channels": 36}  # 16 noisy + 16 of the picture + 4 of the mask
IMAGE_TOKEN_CONDITION = {"image_dim": IMAGE_SIZE, "added_kv_proj_dim": INNER_SIZE}
FACES = {  # a face is seen at 16x16 pixels, and its features join after the first block
    "image_dim": IMAGE_SIZE,
    "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
    "motion_encoder_size": 16,
    "motion_style_dim": 8,
    "motion_dim": 4,
    "motion_encoder_dim": 8,
    "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2,
    "inject_face_latents_blocks": 2,
}
CONTROL = {"vace_layers": [0, 1], "vace_in_channels": 96}  # 16 kept + 16 to generate + 64 of the mask


@dataclass(frozen=True)
class Architecture:
    """What sets one kind of Wan checkpoint apart; `denoiser` overrides `DENOISER`."""

    pipeline: type[DiffusionPipeline] = WanPipeline
    transformer: type[nn.Module] = WanTransformer3DModel
    denoiser: Mapping[str, Any] = field(default_factory=dict)
    boundary_ratio: float | None = None  # given: a second denoiser with other weights
    image_encoder: bool = False
    expand_timesteps: bool = False  # given: the first latent frame is kept, and the VAE is the 16x one


ARCHITECTURES = {
    "t2v": Architecture(),
    "i2v": Architecture(WanImageToVideoPipeline, denoiser=IMAGE_CONDITION | IMAGE_TOKEN_CONDITION, image_encoder=True),
    "flf2v": Architecture(
        WanImageToVideoPipeline,
        denoiser=IMAGE_CONDITION | IMAGE_TOKEN_CONDITION | {"pos_embed_seq_len": 2 * IMAGE_TOKENS},
        image_encoder=True,
    ),
    "vace": Architecture(WanVACEPipeline, WanVACETransformer3DModel, CONTROL),
    "t2v_pair": Architecture(boundary_ratio=0.875),
    "i2v_pair": Architecture(WanImageToVideoPipeline, denoiser=IMAGE_CONDITION, boundary_ratio=0.9),
    "vace_pair": Architecture(WanVACEPipeline, WanVACETransformer3DModel, CONTROL, boundary_ratio=0.875),
    "ti2v": Architecture(denoiser={"in_channels": 48, "out_channels": 48}, expand_timesteps=True),
    "animate": Architecture(
        WanAnimatePipeline,
        WanAnimateTransformer3DModel,
        IMAGE_CONDITION | IMAGE_TOKEN_CONDITION | FACES,
        image_encoder=True,
    ),
    "anyflow": Architecture(AnyFlowPipeline, AnyFlowTransformer3DModel),
    "anyflow_far": Architecture(AnyFlowFARPipeline, AnyFlowFARTransformer3DModel),
}

KINDS = {
    "wan_t2v_1.3B": "t2v",
    "wan_t2v_14B": "t2v",
    "wan_i2v_14B": "i2v",
    "wan_i2v_720p_14B": "i2v",
    "wan_flf2v_720p_14B": "flf2v",
    "wan_vace_1.3B": "vace",
    "wan_vace_14B": "vace",
    "wan22_t2v_14B": "t2v_pair",
    "wan22_i2v_14B": "i2v_pair",
    "wan22_ti2v_5B": "ti2v",
    "wan22_vace_fun_14B": "vace_pair",
    "wan22_animate_14B": "animate",
    "fastwan_t2v_1.3B": "t2v",
    "fastwan_t2v_14B": "t2v",
    "fastwan22_ti2v_5B": "ti2v",
    "wan_t2v_14B_lightx2v": "t2v",
    "wan_i2v_14B_lightx2v": "i2v",
    "wan_t2v_14B_causvid": "t2v",
    "wan_vace_14B_causvid": "vace",
    "wan22_t2v_14B_lightning": "t2v_pair",
    "wan22_i2v_14B_lightning": "i2v_pair",
    "anyflow_t2v_1.3B": "anyflow",
    "anyflow_t2v_14B": "anyflow",
    "anyflow_far_1.3B": "anyflow_far",
    "anyflow_far_14B": "anyflow_far",
}


def pipeline(shape: Architecture) -> DiffusionPipeline:
    """A whole pipeline of this architecture, with random weights."""
    return shape.pipeline(**_components(shape))


PROOFS = {
    "anyflow_far_1.3B": Proof(steps=2),  # each of its eight chunks takes them
    "anyflow_far_14B": Proof(steps=2),
}
MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    model_id: partial(pipeline, ARCHITECTURES[kind]) for model_id, kind in KINDS.items()
}


def write_loras(model_id: str, image_encoder: bool, folder: Path) -> None:
    """Write the LoRA files of the model's recipe into `folder`, in their publisher's form.

    With an `image_encoder`, they change the layers that read its tokens as well.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for lora in CATALOG.get(model_id).recipe_loras:
        tensors = _lora_tensors(LORA_FORMS[lora["adapter"]], image_encoder)
        save_file(tensors, folder / Path(lora["file"]).name)


LORAS: Mapping[str, Callable[[Path], None]] = {
    model_id: partial(write_loras, model_id, ARCHITECTURES[kind].image_encoder)
    for model_id, kind in KINDS.items()
    if CATALOG.get(model_id).recipe_loras
}


def _components(shape: Architecture) -> dict[str, Any]:
    """The constructor's arguments. A component that the class does not know is left out, not given as None."""
    parts: dict[str, Any] = {
        "tokenizer": characters(),
        "text_encoder": text_encoder(),
        "vae": vae_16x() if shape.expand_timesteps else vae_8x(),
        "transformer": denoiser(shape.transformer, **shape.denoiser),
        "scheduler": flow_map_scheduler() if shape.pipeline in FLOW_MAPS else unipc_scheduler(),
    }
    if shape.boundary_ratio is not None:
        parts |= {
            "transformer_2": denoiser(shape.transformer, **shape.denoiser),
            "boundary_ratio": shape.boundary_ratio,
        }
    if shape.expand_timesteps:
        parts["expand_timesteps"] = True
    if shape.image_encoder:
        parts |= {"image_encoder": image_encoder(), "image_processor": image_processor()}
    return parts


FLOW_MAPS = (AnyFlowPipeline, AnyFlowFARPipeline)


def flow_map_scheduler() -> FlowMapEulerDiscreteScheduler:
    """The scheduler of the AnyFlow models."""
    return FlowMapEulerDiscreteScheduler(shift=5.0)


def unipc_scheduler() -> UniPCMultistepScheduler:
    """The scheduler of the Wan models and of most that grew out of them."""
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)


def text_encoder() -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(VOCABULARY), d_model=TEXT_SIZE, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    return UMT5EncoderModel(config).eval()


def image_encoder() -> CLIPVisionModel:
    config = CLIPVisionConfig(
        hidden_size=IMAGE_SIZE,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        initializer_range=0.2,  # else all pictures look alike to it
    )
    return CLIPVisionModel(config).eval()


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


GAINS = {  # parameter's name ends in -> factor: makes every input show in the pixels after two steps
    "text_embedder.linear_1.bias": 0.0,  # texts are padded with zeros: without biases the padding has no values,
    "text_embedder.linear_2.bias": 0.0,  # and the gain makes up for its share of the attention
    "attn2.to_v.bias": 0.0,
    "attn2.to_v.weight": 160.0,
    "attn1.to_v.weight": 20.0,  # carries a picture from its own latent frame to the others
    "face_adapter.0.to_v.weight": 6.0,
    "vace_blocks.0.proj_out.weight": 6.0,
    "vace_blocks.1.proj_out.weight": 6.0,
}
PICTURE_GAIN = 20.0


def denoiser(cls: type[nn.Module], **config: Any) -> nn.Module:
    """A random denoiser of the Wan kind in which the text and the pictures count; `config` overrides `DENOISER`."""
    model = amplify(cls(**{**DENOISER, **config}).eval(), GAINS)
    with torch.no_grad():
        _picture_weights(model).mul_(PICTURE_GAIN)
    return model


def amplify(model: nn.Module, gains: Mapping[str, float]) -> nn.Module:
    """The same model, with every parameter whose name ends in a key of `gains` multiplied by its factor."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for ending, gain in gains.items():
                if name.endswith(ending):
                    parameter.mul_(gain)
    return model


def _picture_weights(model: Any) -> Tensor:
    """The weights that read the latents of given pictures, without the masks; empty where the model reads none."""
    if "vace_in_channels" in model.config:
        weights: Tensor = model.vace_patch_embedding.weight[:, : 2 * model.config.in_channels]
    else:
        weights = model.patch_embedding.weight[:, model.config.out_channels :]
    return weights


CONTRAST = 100.0  # the constant channel over the colours: what makes the normalisation in the VAE almost linear


def vae_8x() -> AutoencoderKLWan:
    """A Wan 2.1 VAE whose first three latent channels are the mean colour of 8x8 pixels and four frames."""
    return _mosaic(_blank_vae())


def vae_16x() -> AutoencoderKLWan:
    """A Wan 2.2 VAE whose first three latent channels are the mean colour of 16x16 pixels and four frames."""
    return _mosaic(
        _blank_vae(z_dim=48, patch_size=2, in_channels=12, out_channels=12, is_residual=True, scale_factor_spatial=16)
    )


def _blank_vae(z_dim: int = 16, **config: Any) -> AutoencoderKLWan:
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=z_dim,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * z_dim,
        latents_std=[0.5] * z_dim,
        **config,
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.fill_(CONTRAST / 8**0.5 if "norm_out" in name else 0.0)
    return vae.eval()


def _mosaic(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Sets the few weights that carry the colours through; the others stay zero, so that blocks add nothing.

    Inside, channels 0 to 2 are the colours, 3 is the constant, 4 to 6 are the negated colours: silu(a) - silu(-a) = a.
    The residual VAE has parameter-free shortcuts that do the averaging and repeating; its resamplers stay silent.
    """
    copies = vae.config.in_channels // 3  # a 2x2 patch of the picture lies in 4 channels a colour
    with torch.no_grad():
        _write_colours(vae.encoder.conv_in, copies, 1.0 / copies)
        _write_colours(vae.decoder.conv_in, 1, 1.0)
        for colour in range(3):
            _join_signs(vae.encoder.conv_out, colour, colour)
            for copy in range(copies):
                _join_signs(vae.decoder.conv_out, colour * copies + copy, colour)
        for conv in (vae.quant_conv, vae.post_quant_conv):
            _pass_through(conv)
        if not vae.config.is_residual:
            _resample_by_weights(vae)
    return vae


def _tap(conv: nn.Conv3d) -> Tensor:
    """The (out, in) weights of a convolution for the present frame and the pixel itself."""
    weight = conv.weight
    return weight[:, :, -1, weight.shape[3] // 2, weight.shape[4] // 2]


def _write_colours(conv: nn.Conv3d, copies: int, gain: float) -> None:
    for colour in range(3):
        inputs = slice(colour * copies, (colour + 1) * copies)
        _tap(conv)[colour, inputs] = gain
        _tap(conv)[colour + 4, inputs] = -gain
    assert conv.bias is not None
    conv.bias[3] = CONTRAST


def _join_signs(conv: nn.Conv3d, out: int, colour: int) -> None:
    _tap(conv)[out, colour] = 1.0
    _tap(conv)[out, colour + 4] = -1.0


def _pass_through(conv: nn.Conv3d) -> None:
    size = min(conv.weight.shape[:2])
    _tap(conv)[:size, :size] = torch.eye(size)


def _resample_by_weights(vae: AutoencoderKLWan) -> None:
    """Halving is a mean of 2x2 pixels and of two frames; doubling repeats; a change of width copies the colours."""
    for name, module in vae.named_modules():
        if name.endswith("conv_shortcut") and isinstance(module, nn.Conv3d):
            _pass_through(module)
            _tap(module)[4:7, :3] = -torch.eye(3)
        elif name.endswith("time_conv") and name.startswith("encoder"):
            module.weight[:, :, 1:, 0, 0] = 0.5 * torch.eye(8)[:, :, None]
        elif name.endswith("time_conv"):
            _tap(module)[:] = torch.eye(8).repeat(2, 1)
        elif name.endswith("resample.1") and name.startswith("encoder"):
            module.weight[:, :, :2, :2] = 0.25 * torch.eye(8)[:, :, None, None]
        elif name.endswith("resample.1"):
            module.weight[:, :, 1, 1] = torch.eye(4, 8)


@dataclass(frozen=True)
class LoraForm:
    """How one publisher's files look, in the names of the original Wan code."""

    first_block: int = 0
    alpha: bool = False  # a scale a layer
    changes: bool = False  # biases, and changes of the norms that loaders leave out


LORA_FORMS = {
    "lightx2v": LoraForm(changes=True),
    "causvid": LoraForm(first_block=1),
    "lightning": LoraForm(alpha=True),
    "lightning_2": LoraForm(alpha=True),
    "distill": LoraForm(),
}


def _lora_tensors(form: LoraForm, image_encoder: bool) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for block in range(form.first_block, DENOISER["num_layers"]):
        prefix = f"diffusion_model.blocks.{block}"
        for layer, rows, columns in _lora_layers(image_encoder):
            tensors |= _lora_layer(f"{prefix}.{layer}", rows, columns, form)
        if form.changes:
            tensors[f"{prefix}.diff_m"] = torch.zeros(1, 6, INNER_SIZE)
            tensors[f"{prefix}.self_attn.norm_q.diff"] = torch.zeros(INNER_SIZE)
    return tensors


def _lora_layers(image_encoder: bool) -> Iterator[tuple[str, int, int]]:
    """(name, rows, columns) of each layer of a block that the published files change."""
    projections = [f"self_attn.{name}" for name in "qkvo"] + [f"cross_attn.{name}" for name in "qkvo"]
    if image_encoder:
        projections += ["cross_attn.k_img", "cross_attn.v_img"]
    yield from ((name, INNER_SIZE, INNER_SIZE) for name in projections)
    yield "ffn.0", DENOISER["ffn_dim"], INNER_SIZE
    yield "ffn.2", INNER_SIZE, DENOISER["ffn_dim"]


def _lora_layer(name: str, rows: int, columns: int, form: LoraForm) -> dict[str, Tensor]:
    tensors = {
        f"{name}.lora_down.weight": 0.3 * torch.randn(LORA_RANK, columns),
        f"{name}.lora_up.weight": 0.3 * torch.randn(rows, LORA_RANK),
    }
    if form.alpha:
        tensors[f"{name}.alpha"] = torch.tensor(LORA_RANK / 2)
    if form.changes:
        tensors[f"{name}.diff_b"] = 0.1 * torch.randn(rows)
    return tensors
