"""What a client probably meant by a request field that does not exist: other servers' names, and misspelt ones."""

import difflib
import re
from collections.abc import Iterator, Sequence

from engine.catalog.abilities import INPUTS
from engine.settings import SETTINGS

MOST_NAMED = 20  # the others are counted: the sentences are stored with the task
# What to send, and the names under which other servers take it.
_OTHERS = {
    "prompt": "text text_prompt positive_prompt description",
    "negative_prompt": "negative neg neg_prompt",
    "model_type": "model model_id model_name checkpoint ckpt",
    'resolution, such as "832x480"': "width height w h size image_size dimensions",
    "video_length": "frames num_frames frame_count n_frames length max_frames",
    'video_length, such as "5s"': "duration seconds num_seconds video_duration",
    "num_inference_steps": "steps num_steps step sampling_steps inference_steps sample_steps",
    "guidance_scale": "cfg cfg_scale guidance scale",
    "embedded_guidance_scale": "embedded_guidance embedded_cfg distilled_guidance distilled_cfg_scale",
    "flow_shift": "shift sampling_shift",
    "seed": "random_seed noise_seed",
    "batch_size": "n num_videos num_images num_outputs batch num_images_per_prompt num_videos_per_prompt",
    "repeat_generation": "repeat repeats n_iter runs",
    "denoising_strength": "strength denoise denoising",
    "activated_loras": "lora loras lora_name lora_names",
    "loras_multipliers": "lora_scale lora_scales lora_strength lora_weight lora_weights lora_multipliers",
    "image_start": "image img image_url init_image input_image start_image first_frame source_image",
    "image_end": "end_image last_frame last_image",
    "image_refs": "images ref_images reference_images references",
    "image_mask": "mask mask_image",
    "video_source": "video input_video source_video init_video",
    "audio_source": "audio input_audio source_audio",
}
_MEANINGS = {name: name for name in (*SETTINGS, *INPUTS)}
_MEANINGS = {name: meaning for meaning, names in _OTHERS.items() for name in names.split()} | _MEANINGS


def meaning_of(name: str) -> str:
    """Return the field that `name`, of bounded length, resembles, with what to send in it; "" for none."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", name).lower()
    near = [plain] if plain in _MEANINGS else difflib.get_close_matches(plain, _MEANINGS, 1, 0.75)
    return _MEANINGS[near[0]] if near else ""


def ignored(names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each field that does not exist; of very many, the last one counts those it does not name."""
    for name in names[:MOST_NAMED]:
        meaning = meaning_of(name)
        yield f"{name}: there is no such field, it was ignored" + (f"; did you mean {meaning}?" if meaning else "")
    if len(names) > MOST_NAMED:
        yield f"{len(names) - MOST_NAMED} more fields do not exist and were ignored"
