"""What a client probably meant by a request field that does not exist: other servers' names, and misspelt ones."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import rtoml

from engine.catalog.abilities import INPUTS
from engine.settings import SETTINGS

MOST_NAMED = 20  # the others are counted: the sentences are stored with the task
_OTHERS = rtoml.load(Path(__file__).parent / "catalog" / "other_names.toml")
_MEANINGS = {name: meaning for meaning, names in _OTHERS.items() for name in names.split()}
_MEANINGS |= {name: name for name in (*SETTINGS, *INPUTS)}


def meaning_of(name: str) -> str:
    """Return the field that `name`, of bounded length, resembles, with what to send in it; "" for none."""
    plain = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|-", "_", name).lower()
    near = [plain] if plain in _MEANINGS else difflib.get_close_matches(plain, _MEANINGS, 1, 0.8)
    return _MEANINGS[near[0]] if near else ""


def ignored(names: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each field that does not exist; of very many, the last one counts those it does not name."""
    for name in names[:MOST_NAMED]:
        meaning = meaning_of(name)
        yield f"{name}: there is no such field, it was ignored" + (f"; did you mean {meaning}?" if meaning else "")
    if len(names) > MOST_NAMED:
        yield f"{len(names) - MOST_NAMED} more fields do not exist and were ignored"
