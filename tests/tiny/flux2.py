"""Tiny checkpoints of the Flux 2 models: denoisers like those of Flux 1, and texts from deep language models.

Their encoders have as many layers as the pipelines look for, since the texts are read off in the middle.
"""

from collections.abc import Callable, Mapping
from functools import partial

from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessorPil,
    PixtralProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.proof import Proof

from . import flux
from .flux import BLOCKS, LATENT_CHANNELS, PACKED_CHANNELS
from .image_parts import LANGUAGE, SHIFT_BY_SIZE, TEXT_SIZE, VAE_GAINS, VAE_STAGES, amplified, certain
from .tokenizers import llama, qwen

GAINS = {
    **flux.GAINS,
    "attn.norm_added_q.weight": 4.0,
    "attn.to_out.0.weight": 4.0,
    "attn.to_add_out.weight": 4.0,
    "attn.to_out.weight": 4.0,
    "modulation_img.linear.weight": 4.0,
    "modulation_txt.linear.weight": 4.0,
    "stream_modulation.linear.weight": 4.0,
}
UNLIKE = {"initializer_range": 0.3}  # else all texts look alike to the encoders


def klein(*, distilled: bool) -> Flux2KleinPipeline:
    """A Flux 2 klein checkpoint; a distilled one reads no guidance."""
    tokenizer = qwen()
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT_BY_SIZE),
        vae=_vae(),
        text_encoder=_qwen_3(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=_denoiser(guided=False),
        is_distilled=distilled,
    )


def flux2_dev() -> Flux2Pipeline:
    """The Flux 2 checkpoint with a guidance in its denoiser and a Mistral that could see, too, as encoder."""
    processor = _pixtral()
    return Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**SHIFT_BY_SIZE),
        vae=_vae(),
        text_encoder=_mistral_3(len(processor.tokenizer)),
        tokenizer=processor,
        transformer=_denoiser(guided=True),
    )


def _vae() -> AutoencoderKLFlux2:
    part = AutoencoderKLFlux2(latent_channels=LATENT_CHANNELS, **VAE_STAGES)
    return certain(amplified(part, VAE_GAINS))


def _denoiser(*, guided: bool) -> Flux2Transformer2DModel:
    part = Flux2Transformer2DModel(
        **BLOCKS | {"joint_attention_dim": 3 * TEXT_SIZE},  # the states of three layers of the encoder
        in_channels=PACKED_CHANNELS,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    )
    return amplified(part, GAINS)


def _qwen_3(tokens: int) -> Qwen3ForCausalLM:
    """Deep enough for the pipeline, which reads the states of layers 9, 18 and 27."""
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=tokens, num_hidden_layers=28, **LANGUAGE, **UNLIKE)).eval()


def _mistral_3(tokens: int) -> Mistral3ForConditionalGeneration:
    """Deep enough for the pipeline, which reads the states of layers 10, 20 and 30."""
    sight = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
        "image_size": 32,
        "patch_size": 16,
    }
    language = {"model_type": "mistral", "vocab_size": tokens, "num_hidden_layers": 31, **LANGUAGE, **UNLIKE}
    config = Mistral3Config(vision_config=sight, text_config=language, image_token_index=tokens - len(PICTURE_MARKS))
    return Mistral3ForConditionalGeneration(config).eval()


PICTURE_MARKS = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
DIALOGUE = "{% for message in messages %}{% for part in message.content %}{{ part.text }} {% endfor %}{% endfor %}"


def _pixtral() -> PixtralProcessor:
    tokenizer = llama()
    tokenizer.add_special_tokens({"additional_special_tokens": PICTURE_MARKS})
    return PixtralProcessor(PixtralImageProcessorPil(), tokenizer, chat_template=DIALOGUE)


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "flux2_dev": flux2_dev,
    "flux2_klein_4B": partial(klein, distilled=True),
    "flux2_klein_9B": partial(klein, distilled=True),
    "flux2_klein_base_4B": partial(klein, distilled=False),
    "flux2_klein_base_9B": partial(klein, distilled=False),
}
PROOFS: Mapping[str, Proof] = dict.fromkeys(MODELS, Proof(side=64))  # the classes take no smaller reference
