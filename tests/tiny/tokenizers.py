"""A tokenizer without files: one token a character, in the class that the published Wan checkpoints name."""

from transformers import T5Tokenizer

PRINTABLE = [chr(code) for code in range(33, 127)]
SPACE = "\u2581"  # how a sentencepiece vocabulary writes the start of a word
VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE, -2.0)] + [(char, -3.0) for char in PRINTABLE]


def characters(max_length: int = 512) -> T5Tokenizer:
    """A tokenizer with one id per printable ASCII character; every other character is `<unk>`."""
    return T5Tokenizer(vocab=VOCABULARY, extra_ids=0, model_max_length=max_length)
