"""The marshmallow fields of requests and of the configuration, strict about JSON's types, and the rules for values."""

import binascii
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

from engine.files.inputs import Sent

DURATION = r"[0-9]{1,4}(\.[0-9]{1,3})?s"
STANDARD, WHITE = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\v\f"  # alphabet of base64, and what may stand in it
NO_FILE = "must be text: the file's bytes in base64"
CHUNK_BYTES = 2**18


class Open(Schema):
    """An object that may have further fields: an older or newer version of the other side must not refuse it."""

    class Meta:
        unknown = EXCLUDE


def one_of(*values: Any) -> validate.Validator:
    """The rule that a value is one of these."""
    return validate.OneOf(values, error="must be one of " + ", ".join(map(repr, values)) + ", not {input!r}")


def between(low: float, high: float) -> validate.Validator:
    """The rule that a number is from `low` to `high`, both included."""
    return validate.Range(low, high, error="{input} must be between {min} and {max}")


def matches(pattern: str, rule: str) -> validate.Validator:
    """The rule that a text matches `pattern`; `rule` says so in words."""
    return validate.Regexp(pattern, error="{input!r} must be " + rule)


def each(check: Callable[[Any], Any]) -> Callable[[Sequence[Any]], object]:
    """The rule that `check` accepts each value of a list."""
    return lambda values: [check(value) for value in values]


class Text(fields.String):
    """A JSON string that can be written as UTF-8, which a lone surrogate can't."""

    default_error_messages = {"invalid": "{input!r} must be text in quotes", "invalid_utf8": "must be valid Unicode"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str:
        if not isinstance(value, str):
            raise self.make_error("invalid", input=value)
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise self.make_error("invalid_utf8")
        return value


class Whole(fields.Integer):
    """A JSON number without a fraction: `30.0` is accepted, `"30"` and `true` are not."""

    default_error_messages = {"invalid": "{input!r} must be a whole number", "too_large": "the number is too large"}

    def _validated(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:
            raise self.make_error("invalid", input=value)
        return int(value)


class Real(fields.Float):
    """A JSON number; `"5"` and `true` are refused."""

    default_error_messages = {
        "invalid": "{input!r} must be a number",
        **dict.fromkeys(("too_large", "special"), "the number is too large"),
    }

    def _validated(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.make_error("invalid", input=value)
        return float(super()._validated(value))


class Flag(fields.Boolean):
    """JSON's `true` or `false` and nothing else."""

    default_error_messages = {"invalid": "{input!r} must be true or false"}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> bool:
        if not isinstance(value, bool):
            raise self.make_error("invalid", input=value)
        return value


class Size(Text):
    """Width and height as a text, such as `64x64`."""


class VideoLength(fields.Field[Any]):
    """Frames as a whole number, or a duration such as `"5s"`."""

    default_error_messages = {"invalid": '{input!r} must be frames from 1 to 1000, or a duration such as "5s"'}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> int | str:
        if isinstance(value, str) and re.fullmatch(DURATION, value):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 or not 1 <= value <= 1000:
            raise self.make_error("invalid", input=value)
        return int(value)


class File(fields.Field[Any]):
    """A file: a text in base64, which is not decoded here, or one that was received from a form."""

    default_error_messages = {"type": NO_FILE, "null": NO_FILE}

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> str | bytes | Sent:
        if not isinstance(value, str | bytes | Sent):
            raise self.make_error("type")
        return value


def decoded(text: bytes) -> Iterator[bytes]:
    """Decode base64, with or without a `data:` prefix, in the standard or URL-safe alphabet, and with JSON's escapes.

    It goes piece by piece, which holds neither the interpreter nor much memory. Raises ValueError.
    """
    at = text.find(b",") + 1 if text.startswith(b"data:") else 0
    data, padded = b"", False
    while at < len(text):
        start, at = at, at + CHUNK_BYTES
        if (escape := text.rfind(b"\\", at - 5, at)) >= 0:
            at = escape  # the next piece has it whole
        plain: str = json.loads(f'"{text[start:at].decode()}"', strict=False)
        piece, padding, after = plain.encode().translate(STANDARD, WHITE).partition(b"=")
        if (padded and piece) or after.strip(b"="):
            raise ValueError("padding before the end")
        padded = padded or bool(padding)
        data += piece
        whole = len(data) // 4 * 4
        yield binascii.a2b_base64(data[:whole], strict_mode=True)
        data = data[whole:]
    yield binascii.a2b_base64(data + b"=" * (-len(data) % 4), strict_mode=True)


class Several(fields.List[Any]):
    """A list that is refused for its length before its elements are looked at, and for its first wrong element."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> list[Any]:
        if not isinstance(value, list):
            raise self.make_error("invalid")
        for rule in self.validators:
            if isinstance(rule, validate.Length):
                rule(value)
        found = []
        for place, item in enumerate(value):
            try:
                found.append(self.inner.deserialize(item))
            except ValidationError as error:
                raise ValidationError({place: error.messages}) from None
        return found


class Texts(Several):
    """A list of texts, as a tuple, so that what holds it stays frozen."""

    default_error_messages = {"invalid": 'must be a list such as ["a", "b"]'}

    def __init__(self, **options: Any) -> None:
        super().__init__(Text(), **options)

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        return tuple(super()._deserialize(value, attr, data, **kwargs))


class TextOrTexts(Texts):
    """A text, or a list of texts."""

    def _deserialize(self, value: Any, attr: str | None, data: Any, **kwargs: Any) -> Any:
        if isinstance(value, list):
            return super()._deserialize(value, attr, data, **kwargs)
        return Text().deserialize(value, attr, data)


# The field of a value, by the type that a table of settings or of configuration keys names.
FIELD_OF: Mapping[Any, type[fields.Field[Any]]] = {
    str: Text,
    Path: Text,
    bool: Flag,
    int: Whole,
    float: Real,
    tuple[str, ...]: Texts,
    str | tuple[str, ...]: TextOrTexts,
    int | str: VideoLength,
}


def first_fault(error: ValidationError) -> tuple[str, str]:
    """The first complaint of a schema: the name of the field, with its place in a list, and the sentence."""
    messages: Any = error.messages
    name, found = next(iter(messages.items()))
    while isinstance(found, Mapping):
        place, found = next(iter(found.items()))
        name = f"{name}[{place}]"
    return str(name), found[0]
