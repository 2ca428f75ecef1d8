"""The text encoder that reads pictures too, Qwen2.5-VL: tiny and random, with its processor.

The tokenizers count the words of a pipeline's own template as one token each, as published ones do: pipelines cut a
fixed number of tokens off the front, and cut the end off what is too long.
"""

import re

from tokenizers import AddedToken
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from . import tokenizers
from .lively import lively

TEXT_SIZE = 32
PATCH = 14  # pixels; 2x2 of them are one token
PICTURE_PIXELS = {"shortest_edge": (4 * PATCH) ** 2, "longest_edge": (8 * PATCH) ** 2}  # of 4 to 16 tokens


def tokenizer(template: str = "") -> Qwen2Tokenizer:
    """One token a byte, but for the words of `template`: they are one token each, with the space before them."""
    made = tokenizers.qwen()
    words = {word for word in re.findall(r"[A-Za-z]+", template) if len(word) > 2}
    made.add_tokens([AddedToken(word, lstrip=True, single_word=True) for word in sorted(words)])
    return made


def processor(template: str = "") -> Qwen2VLProcessor:
    """For pictures of any size, in a few tokens, and for texts: see `tokenizer`."""
    text = tokenizer(template)
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=PICTURE_PIXELS),
        text,
        Qwen2VLVideoProcessor(size=PICTURE_PIXELS),
        chat_template=text.chat_template,
    )


def encoder(text: Qwen2Tokenizer, **gains: float) -> Qwen2_5_VLForConditionalGeneration:
    """For the tokenizer `text`; its states have `TEXT_SIZE` channels, and each word and each picture tells.

    `gains` are those of `lively`.
    """
    mark = text.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(text),
            "hidden_size": TEXT_SIZE,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": TEXT_SIZE,
            "fullatt_block_indexes": [1],
        },
        image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"),
        vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
    )
    return lively(Qwen2_5_VLForConditionalGeneration(config), **gains)
