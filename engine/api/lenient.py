"""Request values as clients write them: what can mean one thing becomes the value that the field takes.

The fields stay strict, since the configuration file shares them: they refuse what can't be read here.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from marshmallow import fields

from engine.api.fields import Flag, Real, Size, VideoLength, Whole

Field = fields.Field[Any]
BLANK_IS_A_VALUE = frozenset({"prompt", "negative_prompt", "skip_steps_cache_type"})
NOTHING = ("null", "none")  # as forms write it
FLAGS = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
WHOLE = re.compile(r"([+-]?[0-9]{1,400})(\.0*)?")  # not int(), which also takes 1_000 and other scripts' digits
NUMBER = re.compile(r"[+-]?([0-9]{1,400}(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]{1,3})?")
SECONDS = re.compile(r"([0-9]+(\.[0-9]+)?)\s*s(ecs?|econds?)?")
SIZE = re.compile(r"([0-9]+)\s*[x\u00d7*]\s*([0-9]+)")


def meant(field: Field, value: Any) -> Any:
    """Return what `value` means for `field`: None if it counts as left out, `value` itself if it can't be read."""
    if not isinstance(field, fields.List):
        return None if _blank(value) and field.name not in BLANK_IS_A_VALUE else _one(field, value)
    items = [value] if isinstance(value, str) else value  # a text alone is a list of one
    if not isinstance(items, list):
        return value
    return [_one(field.inner, item) for item in items if not _blank(item)] or None


def _blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _one(field: Field, value: Any) -> Any:
    read = next((read for kind, read in _READERS.items() if isinstance(field, kind)), None)
    if not read or not (isinstance(value, str) or (isinstance(field, Flag) and value in (0, 1))):
        return value
    text = str(value).strip().lower()
    if text in NOTHING:
        return None
    understood = read(text)
    return value if understood is None else understood


def _whole(text: str) -> int | None:
    return int(digits[1]) if (digits := WHOLE.fullmatch(text)) else None


def _number(text: str) -> float | None:
    number = float(text) if NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def _length(text: str) -> int | str | None:
    return f"{seconds[1]}s" if (seconds := SECONDS.fullmatch(text)) else _whole(text)


def _size(text: str) -> str | None:
    return f"{sides[1]}x{sides[2]}" if (sides := SIZE.fullmatch(text)) else None


# None: it can't be read.
_READERS: Mapping[type[Field], Callable[[str], Any]] = {
    Flag: FLAGS.get,
    Whole: _whole,
    Real: _number,
    VideoLength: _length,
    Size: _size,
}
