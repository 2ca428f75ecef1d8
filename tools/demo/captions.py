"""Scenes to words: the vocabulary, the many ways to say one thing, and the tokenizer.

A caption never lies, but it leaves things out. What it leaves out is random, but for two: a caption that names no
background means black, and one that does not say slowly means fast. Words of no meaning, unknown ones included, are
strewn in so that they do no harm.
"""

from __future__ import annotations

import random
import re

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .scene import Traits, sample_traits

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
DEFAULT_BACKGROUND = "black"
MAX_TOKENS = 512

SHAPE_WORDS = {
    "circle": ("circle", "circle", "ball", "disc", "disk"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle", "triangle", "pyramid"),
}
COLOR_WORDS = {"purple": ("purple", "purple", "violet")}
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
GRAY_WORDS = {"gray": ("gray", "grey")}
VERBS = ("moving", "moving", "moves", "going", "goes", "sliding", "slides", "flying", "drifting", "travelling")
HEADINGS = {
    "right": ("right", "right", "to the right", "rightwards", "from left to right"),
    "left": ("left", "left", "to the left", "leftwards", "from right to left"),
    "up": ("up", "up", "upwards", "to the top", "from bottom to top"),
    "down": ("down", "down", "downwards", "to the bottom", "from top to bottom"),
}
WHOLE_MOTIONS = {
    "up": ("rising", "rises"),
    "down": ("falling", "falls"),
    "still": ("still", "standing still", "stands still", "not moving", "static", "stationary", "that stays still"),
}
SLOWLY = "slowly"
NOUNS = ("object", "shape", "thing")
ARTICLES = ("a", "a", "a", "the", "one", "")
GROUNDS = ("on a {} background", "on a {} background", "on {}", "over a {} background", "in front of a {} backdrop")
OPENINGS = ("", "", "", "", "a video of", "an animation of", "a clip of", "show me", "video of", "please draw")
CLOSINGS = ("", "", "", "", "smoothly", "simple", "clean", "please", ".")
ASIDES = ("nice", "bright", "simple", "plain", "solid", "smooth", "flat", UNKNOWN, UNKNOWN, UNKNOWN)

EMPTY_SHARE, FRAGMENT_SHARE, TAGS_SHARE, ASIDE_SHARE, DROP_SHARE, NAME_BLACK_SHARE = 0.10, 0.08, 0.15, 0.15, 0.07, 0.55


def _motion_words(traits: Traits, rng: random.Random) -> str:
    whole = WHOLE_MOTIONS.get(traits.motion, ())
    if whole and (traits.motion not in HEADINGS or rng.random() < 0.25):
        return _paced([rng.choice(whole)], traits, rng)
    return _paced([rng.choice(VERBS), rng.choice(HEADINGS[traits.motion])], traits, rng)


def _paced(words: list[str], traits: Traits, rng: random.Random) -> str:
    """`slowly` before, between or behind the words of a slow motion."""
    if traits.slow:
        words.insert(rng.randrange(len(words) + 1), SLOWLY)
    return _join(*words)


def _color_words(color: str, rng: random.Random) -> str:
    return rng.choice(COLOR_WORDS.get(color, (color,)))


def _size_words(size: str | None, rng: random.Random) -> str:
    return rng.choice(SIZE_WORDS[size]) if size else ""


def _ground_words(background: str, rng: random.Random) -> str:
    return rng.choice(GRAY_WORDS.get(background, (background,)))


def _kept(words: str, rng: random.Random, drop: float) -> str:
    return "" if rng.random() < drop else words


def _join(*parts: str, by: str = " ") -> str:
    return by.join(part for part in parts if part)


def _sentence(traits: Traits, ground: str, rng: random.Random, drop: float) -> str:
    """`a small red circle moving right on a white background`, its three parts in any order."""
    adjectives = [_size_words(traits.size, rng), _kept(_color_words(traits.color, rng), rng, drop)]
    rng.shuffle(adjectives)
    noun = _kept(rng.choice(SHAPE_WORDS[traits.shape]), rng, drop) or rng.choice(NOUNS)
    subject = _join(rng.choice(ARTICLES), *adjectives, noun)
    motion = _kept(_motion_words(traits, rng), rng, 0 if traits.slow else drop)
    place = rng.choice(GROUNDS).format(ground) if ground else ""
    parts = [_join(rng.choice(OPENINGS), subject), motion, place]
    if rng.random() < 0.35:
        rng.shuffle(parts)
    return _join(_join(*parts, by=rng.choice((" ", " ", ", "))), rng.choice(CLOSINGS))


def _tags(traits: Traits, ground: str, rng: random.Random, drop: float) -> str:
    """`red, circle, right, white background` in any order."""
    heading = rng.choice(HEADINGS.get(traits.motion, WHOLE_MOTIONS.get(traits.motion, ())))
    words = [_color_words(traits.color, rng), rng.choice(SHAPE_WORDS[traits.shape]), _size_words(traits.size, rng)]
    words = [_kept(word, rng, drop) for word in words]
    motion = _kept(_paced([heading], traits, rng), rng, 0 if traits.slow else drop)
    parts = [*words, motion, f"{ground} background" if ground else ""]
    rng.shuffle(parts)
    return _join(*parts, by=rng.choice((", ", " ")))


def _fragment(traits: Traits, rng: random.Random) -> str:
    """One trait alone, as a negative prompt says it; of a slow clip its motion."""
    motion = _motion_words(traits, rng)
    if traits.slow:
        return motion
    ground = f"{_ground_words(traits.background, rng)} background"
    return rng.choice([_color_words(traits.color, rng), rng.choice(SHAPE_WORDS[traits.shape]), motion, ground])


def _with_aside(caption: str, rng: random.Random) -> str:
    words = caption.split(" ")
    words.insert(rng.randrange(len(words) + 1), rng.choice(ASIDES))
    return " ".join(words)


def caption(traits: Traits, rng: random.Random, *, name_ground: bool = True, drop: float = DROP_SHARE) -> str:
    """A caption of some form, each trait left out with probability `drop`; the background only by `name_ground`."""
    ground = _ground_words(traits.background, rng) if name_ground else ""
    form = _tags if rng.random() < TAGS_SHARE else _sentence
    words = form(traits, ground, rng, drop)
    return _with_aside(words, rng) if rng.random() < ASIDE_SHARE else words


def plain_caption(traits: Traits) -> str:
    """The one form that people write first, for measuring and for contact sheets."""
    motion = "standing still" if traits.motion == "still" else f"moving {traits.motion}"
    words = ("a", traits.size or "", traits.color, traits.shape, SLOWLY if traits.slow else "", motion)
    return f"{_join(*words)} on a {traits.background} background"


def sample_captioned(rng: random.Random, plain: float, slow: float) -> tuple[Traits, str]:
    """A training pair, `plain` of them in the plain form, `slow` of what moves slow. Guidance is possible because a
    share of the captions is empty."""
    traits, draw = sample_traits(rng, slow), rng.random()
    if draw < EMPTY_SHARE:
        return traits, ""
    if draw < EMPTY_SHARE + FRAGMENT_SHARE:
        return traits, _fragment(traits, rng)
    if rng.random() < plain:
        return traits, plain_caption(traits)
    named = traits.background != DEFAULT_BACKGROUND or rng.random() < NAME_BLACK_SHARE
    return traits, caption(traits, rng, name_ground=named)


def vocabulary() -> list[str]:
    """Every word a caption can hold, in a fixed order."""
    tables = (SHAPE_WORDS, COLOR_WORDS, SIZE_WORDS, GRAY_WORDS, HEADINGS, WHOLE_MOTIONS)
    phrases = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    phrases += [*VERBS, *NOUNS, *ARTICLES, *GROUNDS, *OPENINGS, *CLOSINGS, *ASIDES]
    phrases += [SLOWLY, "red", "green", "blue", "yellow", "white", "orange", "black", "background", ",", "."]
    words = {word for phrase in phrases for word in re.findall(r"[a-z]+|[.,]", phrase.replace(UNKNOWN, ""))}
    return [PAD, END, UNKNOWN, *sorted(words)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, lower case; an unknown word is one token of its own kind."""
    words = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([PAD, END, UNKNOWN])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, words[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, model_max_length=MAX_TOKENS
    )
