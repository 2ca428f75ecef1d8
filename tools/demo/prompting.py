"""What the transformer gets to see of a caption while it trains.

The pipeline pads every prompt with zeros to `max_sequence_length` and masks nothing. All padding tokens are alike, so
one of them with the logarithm of their number added to its attention score stands for them all: the result is
exact for any length, at the price of a dozen tokens.
"""

from __future__ import annotations

import math
import random

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

SEQUENCE_LENGTHS = (64, 64, 64, 32, 128, 512)


class PaddingAsOne(WanAttnProcessor):
    """Cross-attention in which the last token counts for many."""

    def __init__(self) -> None:
        super().__init__()
        self.scores: Tensor | None = None  # (1, 1, 1, tokens), added to the attention scores

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,  # noqa: ARG002 Wan never has one here
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.scores, rotary_emb)


class Prompter:
    """Encodes captions for one transformer, and tells its cross-attention how much padding to imagine."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, transformer: WanTransformer3DModel
    ) -> None:
        self.tokenizer, self.encoder, self.processor = tokenizer, encoder, PaddingAsOne()
        for block in transformer.blocks:
            block.attn2.set_processor(self.processor)

    def __call__(self, captions: list[str], rng: random.Random) -> Tensor:
        """(N, longest caption + 1, text_dim), as if padded to one of SEQUENCE_LENGTHS."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt").to(self.encoder.device)
        hidden = self.encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        words = hidden * tokens.attention_mask[..., None]
        padding = max(1, rng.choice(SEQUENCE_LENGTHS) - words.shape[1])
        self.processor.scores = torch.zeros(1, 1, 1, words.shape[1] + 1, device=words.device)
        self.processor.scores[..., -1] = math.log(padding)
        return functional.pad(words, (0, 0, 0, 1))
