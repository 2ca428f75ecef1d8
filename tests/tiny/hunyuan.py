"""Tiny checkpoints of HunyuanVideo, HunyuanVideo 1.5 and FramePack."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video, pipeline_hunyuan_video_image2video
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from tests.proof import Proof

from . import tokenizers
from .image_parts import TEXT_SIZE, amplified, clip_encoder

IMAGE_SIZE = 32  # of the states of the image encoders
IMAGE_SIDE = 32  # pixels, of what they look at
LAYERS = 3  # of the language models: two from the end are skipped

# ----------------------------------------------------------------------------------------------- HunyuanVideo 1.0

MARKS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "system", "user", "assistant", "\n\n"]
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\n"


def _llama(template: Mapping[str, Any], marks: int) -> LlamaTokenizer:
    """A Llama tokenizer that pads on the right and counts the template's head as the published one does.

    The pipelines cut a fixed number of tokens off the front. `marks` of them are not of the description.
    """
    vocabulary = tokenizers.llama().get_vocab()
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], pad_token="</s>", padding_side="right")
    description = template["template"].partition(SYSTEM)[2].removeprefix("<image>").partition("<|eot_id|>")[0]
    tokenizer.add_tokens(MARKS, special_tokens=True)
    tokenizer.add_tokens(_pieces(description, template["crop_start"] - marks), special_tokens=True)
    return tokenizer


def _pieces(text: str, count: int) -> list[str]:
    """`text` cut into `count` pieces, as even as can be."""
    ends = [len(text) * number // count for number in range(count + 1)]
    return [text[start:end] for start, end in pairwise(ends)]


TEMPLATE = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
PICTURE_TEMPLATE = pipeline_hunyuan_video_image2video.DEFAULT_PROMPT_TEMPLATE
DENOISER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 2.0,
    "text_embed_dim": TEXT_SIZE,
    "pooled_projection_dim": TEXT_SIZE,
    "rope_axes_dim": (4, 6, 6),
}
GAINS = {
    "context_embedder.proj_in.weight": 2.0,
    "guidance_embedder.linear_2.weight": 3.0,
    "proj_out.weight": 2.0,
}
PICTURE_ENCODER = {"has_image_proj": True, "image_proj_dim": IMAGE_SIZE, "has_clean_x_embedder": True}


def _text_to_video(shift: float) -> DiffusionPipeline:
    return HunyuanVideoPipeline(**_common(shift), **_texts(), transformer=_denoiser())


def _skyreels() -> DiffusionPipeline:
    return HunyuanSkyreelsImageToVideoPipeline(**_common(7.0), **_texts(), transformer=_denoiser(in_channels=32))


def _image_to_video(**config: Any) -> DiffusionPipeline:
    """Both kinds of the published checkpoint: the picture in place of the first frame, or beside all frames."""
    tokenizer = _llama(PICTURE_TEMPLATE, 12)
    return HunyuanVideoImageToVideoPipeline(
        **_common(7.0),
        text_encoder=_llava(tokenizer),
        tokenizer=tokenizer,
        transformer=_denoiser(**config),
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
    )


def _framepack() -> DiffusionPipeline:
    transformer = HunyuanVideoFramepackTransformer3DModel(**DENOISER, **PICTURE_ENCODER)
    return HunyuanVideoFramepackPipeline(
        **_common(7.0),
        **_texts(),
        transformer=amplified(transformer, GAINS),
        image_encoder=_siglip(),
        feature_extractor=SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
    )


def _common(shift: float) -> dict[str, Any]:
    words = tokenizers.clip()
    return {
        "vae": _vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=shift),
        "text_encoder_2": clip_encoder(words),
        "tokenizer_2": words,
    }


def _denoiser(**config: Any) -> nn.Module:
    return amplified(HunyuanVideoTransformer3DModel(**(DENOISER | config)), GAINS)


def _vae() -> nn.Module:
    return AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4).eval()


def _texts() -> dict[str, Any]:
    tokenizer = _llama(TEMPLATE, 10)
    return {"text_encoder": LlamaModel(_llama_config(len(tokenizer))).eval(), "tokenizer": tokenizer}


def _llama_config(vocabulary: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_SIZE,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=2,
        initializer_range=0.5,
    )


def _llava(tokenizer: LlamaTokenizer) -> nn.Module:
    """A language model that sees 24x24 patches, as many as the template has room for."""
    sight = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=2,
        initializer_range=0.2,
    )
    config = LlavaConfig(
        vision_config=sight,
        text_config=_llama_config(len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=576,
        pad_token_id=2,
    )
    return LlavaForConditionalGeneration(config).eval()


def _siglip() -> nn.Module:
    config = SiglipVisionConfig(
        hidden_size=IMAGE_SIZE,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIDE,
        patch_size=16,
    )
    return SiglipVisionModel(config).eval()


# ----------------------------------------------------------------------------------------------- HunyuanVideo 1.5


def _hunyuan_15(guidance: float) -> DiffusionPipeline:
    return HunyuanVideo15Pipeline(**_parts_15(guidance, "t2v"))


def _hunyuan_15_image(guidance: float, meanflow: bool = False) -> DiffusionPipeline:
    return HunyuanVideo15ImageToVideoPipeline(
        **_parts_15(guidance, "i2v", use_meanflow=meanflow),
        image_encoder=_siglip(),
        feature_extractor=SiglipImageProcessorPil(size={"height": IMAGE_SIDE, "width": IMAGE_SIDE}),
    )


def _parts_15(guidance: float, task: str, **config: Any) -> dict[str, Any]:
    tokenizer = _qwen()
    return {
        "text_encoder": _qwen_model(len(tokenizer)),
        "tokenizer": tokenizer,
        "text_encoder_2": _byte_encoder(),
        "tokenizer_2": tokenizers.byte(),
        "transformer": _denoiser_15(task_type=task, **config),
        "vae": _vae_15(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=guidance),
    }


def _qwen() -> Qwen2Tokenizer:
    """A Qwen tokenizer to which the system message has 100 tokens, as it has to the published one."""
    message = signature(HunyuanVideo15Pipeline._get_mllm_prompt_embeds).parameters["system_message"].default
    tokenizer = tokenizers.qwen()
    tokenizer.add_tokens(["system", "user", *_pieces(message, 100)], special_tokens=True)
    return tokenizer


def _qwen_model(vocabulary: int) -> nn.Module:
    config = Qwen2_5_VLTextConfig(
        vocab_size=vocabulary,
        hidden_size=TEXT_SIZE,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.5,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    )
    return Qwen2_5_VLTextModel(config).eval()


def _byte_encoder() -> nn.Module:
    config = T5Config(vocab_size=384, d_model=TEXT_SIZE, d_kv=8, d_ff=32, num_layers=1, num_heads=4, dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def _denoiser_15(**config: Any) -> nn.Module:
    model = HunyuanVideo15Transformer3DModel(
        in_channels=17,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=TEXT_SIZE,
        text_embed_2_dim=TEXT_SIZE,
        image_embed_dim=IMAGE_SIZE,
        rope_axes_dim=(4, 6, 6),
        target_size=32,
        **config,
    )
    return amplified(model, {"context_embedder.proj_in.weight": 4.0, "add_v_proj.weight": 3.0, "proj_out.weight": 2.0})


def _vae_15() -> nn.Module:
    vae = AutoencoderKLHunyuanVideo15(latent_channels=8, block_out_channels=(8, 8, 8, 16, 16), layers_per_block=1)
    return vae.eval()


MODELS: Mapping[str, Callable[[], DiffusionPipeline]] = {
    "hunyuan_t2v_13B": partial(_text_to_video, 7.0),
    "hunyuan_i2v_13B": partial(_image_to_video, image_condition_type="token_replace"),
    "hunyuan_i2v_33ch_13B": partial(
        _image_to_video, in_channels=33, guidance_embeds=False, image_condition_type="latent_concat"
    ),
    "fasthunyuan_t2v_13B": partial(_text_to_video, 17.0),
    "skyreels_v1_i2v_13B": _skyreels,
    "framepack_i2v_13B": _framepack,
    "framepack_f1_13B": _framepack,
    "hunyuan15_t2v_480p": partial(_hunyuan_15, 6.0),
    "hunyuan15_t2v_720p": partial(_hunyuan_15, 6.0),
    "hunyuan15_t2v_480p_distilled": partial(_hunyuan_15, 1.0),
    "hunyuan15_i2v_480p": partial(_hunyuan_15_image, 6.0),
    "hunyuan15_i2v_720p": partial(_hunyuan_15_image, 6.0),
    "hunyuan15_i2v_720p_distilled": partial(_hunyuan_15_image, 1.0),
    "hunyuan15_i2v_480p_step_distilled": partial(_hunyuan_15_image, 1.0, meanflow=True),
}

# Texts are a thousand tokens long to version 1.5, however short they are: each step takes its time.
PROOFS: Mapping[str, Proof] = {model_id: Proof(steps=2) for model_id in MODELS if model_id.startswith("hunyuan15")}
