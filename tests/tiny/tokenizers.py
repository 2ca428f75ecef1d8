"""Tokenizers without files, one token a character, in the classes that the published checkpoints name.

Each survives `save_pretrained` and `from_pretrained`. A text encoder that goes with one needs `len(tokenizer)` entries.
"""

from tokenizers.pre_tokenizers import ByteLevel
from transformers import ByT5Tokenizer, CLIPTokenizer, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer

PRINTABLE = [chr(code) for code in range(33, 127)]
SPACE = "\u2581"  # how a sentencepiece vocabulary writes the start of a word
VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0)] + [(char, -3.0) for char in PRINTABLE]
QWEN_MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}
{%- elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def characters(max_length: int = 512) -> T5Tokenizer:
    """The T5 one, with one id per printable ASCII character; every other character is `<unk>`."""
    return T5Tokenizer(vocab=VOCABULARY, extra_ids=0, model_max_length=max_length)


def clip(max_length: int = 77) -> CLIPTokenizer:
    """The CLIP one; a letter at the end of a word has an id of its own, and text is made lower case."""
    pieces = [*PRINTABLE, *(f"{char}</w>" for char in PRINTABLE), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=max_length)


def qwen(max_length: int = 8192) -> Qwen2Tokenizer:
    """The Qwen 2 one, a token a byte, with the marks of chats and pictures (`QWEN_MARKS`) and a chat template."""
    pieces = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", *QWEN_MARKS]
    tokenizer = Qwen2Tokenizer(vocab=_numbered(pieces), merges=[], model_max_length=max_length)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_MARKS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def gemma(max_length: int = 1024) -> GemmaTokenizer:
    """The Gemma one; it pads on the left."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", SPACE, *PRINTABLE]
    return GemmaTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=max_length)


def llama(max_length: int = 1024) -> LlamaTokenizer:
    """The Llama one. It has no padding of its own, so the end of a text stands in."""
    pieces = ["<unk>", "<s>", "</s>", SPACE, *PRINTABLE]
    return LlamaTokenizer(vocab=_numbered(pieces), merges=[], model_max_length=max_length, pad_token="</s>")


def byte() -> ByT5Tokenizer:
    """The ByT5 one: an id is a byte + 3, and there are 384 of them."""
    return ByT5Tokenizer()


def _numbered(pieces: list[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}
