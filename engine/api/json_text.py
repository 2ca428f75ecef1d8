"""JSON as clients send it, in any common encoding; a fault is a sentence that names line, column and reason.

What costs more than its bytes is refused first: very many values, deep nesting, and long texts, which are files in
base64 and are cut out before anything is parsed.
"""

import json
import mmap
import re
import secrets
from collections import Counter
from typing import Any

from engine.admission import BadRequest
from engine.api.answers import shortened

PLAIN_BYTES = 2**20  # of a body besides its files
LONG_BYTES = 48_000  # of a text that is no file: 10,000 characters take four bytes each
MOST_VALUES = 200_000
_TEXT = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
TEXT = re.compile(_TEXT.encode(), re.DOTALL)
TOO_MANY = "The body has too many values; send the fields of one request"
TOO_LARGE = f"The body has more than {PLAIN_BYTES // 2**20} MiB besides its files; send less"
SHOWN = 'a JSON object such as {"prompt": "a cat"}'
# Few names, none of Python's other codecs: punycode takes quadratic time, and each unknown name would stay in memory.
CHARSET = re.compile(
    r"(us-)?ascii|utf-?(8|16|32)(-?[lb]e)?|latin-?[0-9]{1,2}|iso-?8859-[0-9]{1,2}|(windows|cp)-?[0-9]{3,4}"
    r"|koi8-[ru]|gbk|gb2312|gb18030|big5|euc-(jp|kr)|shift[_-]jis|macintosh",
    re.IGNORECASE,
)
OUTSIDE_TEXTS = re.compile(_TEXT + "|-?(?:NaN|Infinity)", re.DOTALL)
# By what json's message and the text from that place on begin with.
REASONS = {
    r"Invalid control[^|]*\|[\r\n]": r"a line break within a text must be written as \n",
    r"Invalid control": r"a tab within a text must be written as \t, another control character as \u and four digits",
    r"Invalid \\": r"a backslash within a text must be written twice, as \\",
    r"Unterminated": "the text that begins here has no closing quote, or the body is cut off",
    r"Extra data[^|]*\|\s*(//|/\*|#)|Expecting[^|]*\|(//|/\*|#)": "JSON has no comments; leave it out",
    r"Extra data": "the object has ended before this; send one object",
    r"Expecting[^|]*\|$": "the body ends here, within the object; it is cut off",
    r"Expecting[^|]*\|['`\u2018\u2019\u201c\u201d]": "names and texts must be in straight double quotes",
    r"Expecting[^|]*\|(True|False|None)": "JSON writes true, false and null",
    r"(Expecting (value|property)[^|]*\|[]}]|Illegal)": "a comma before a closing bracket must be left out",
    r"Expecting property": "a name in double quotes must be here",
    r"Expecting ':'": "a colon must be here",
    r"Expecting ','": "a comma is missing before this, or a double quote within a text has no backslash",
    r"Expecting value": "a value must be here: a text in double quotes, a number, true, false or null",
}


def parsed(raw: bytes, charset: str | None = None) -> dict[str, Any]:
    """Return the JSON object in `raw`, whose encoding is `charset` or else a Unicode one. Raises BadRequest."""
    text = _decoded(raw, charset)
    if not text.strip():
        raise BadRequest(f"The body is empty; send {SHOWN}")
    if sum(map(text.count, "[{,")) > MOST_VALUES:
        raise BadRequest(TOO_MANY)
    try:
        body = json.loads(text, parse_constant=lambda name: _refuse_constant(name, text), object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        told = f"{error.msg}|{text[error.pos : error.pos + 9]}"
        reason = next((reason for start, reason in REASONS.items() if re.match(start, told)), error.msg)
        place = f"line {error.lineno}, column {error.colno}"
        raise BadRequest(f"The body is not valid JSON: {place}: {reason}") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply; send a flat object") from None
    except ValueError:
        raise BadRequest("The body has a number of too many digits") from None
    if isinstance(body, dict):
        return body
    kind = "a list" if isinstance(body, list) else "a text" if isinstance(body, str) else "a single value"
    if isinstance(body, str) and body.lstrip().startswith("{"):
        kind = "a text with an object in it: it was encoded twice"
    raise BadRequest(f"The body must be {SHOWN}; it is {kind}")


def cut(raw: mmap.mmap) -> tuple[bytes, dict[str, bytes]]:
    """Return the JSON in `raw` with a mark in place of each long text, and these texts by mark. Raises BadRequest."""
    if b"\0" in raw[:4]:
        raise BadRequest("The body must be in UTF-8, as every body of more than 1 MiB")
    nonce, plain, texts, plain_bytes, at = secrets.token_hex(8), list[bytes](), dict[str, bytes](), 0, 0
    for _ in range(MOST_VALUES):
        start = raw.find(b'"', at)
        stop = raw.find(b'"', start + 1)
        size, has_escapes = stop - start, raw.find(b"\\", start, min(stop, start + LONG_BYTES)) >= 0
        # A file has no quote in it. What has escapes may take three times as many bytes for a character.
        is_long = size > LONG_BYTES * (3 if has_escapes else 1) and raw[stop - 1] != ord("\\")
        text = None if start < 0 or is_long else TEXT.match(raw, start, start + PLAIN_BYTES)
        end = start if is_long else text.end() if text else len(raw)
        plain_bytes += end - at
        if plain_bytes > PLAIN_BYTES:
            raise BadRequest(TOO_LARGE)
        plain.append(raw[at:end])
        if end == len(raw):
            return b"".join(plain), texts
        at = end
        if is_long:
            mark = f"{nonce} {len(texts)}"
            plain.append(f'"{mark}"'.encode())
            texts[mark], at = raw[start + 1 : stop], stop + 1
    raise BadRequest(TOO_MANY)


def _decoded(raw: bytes, charset: str | None) -> str:
    """The text of the body, without a byte order mark. Raises BadRequest."""
    encoding = charset or json.detect_encoding(raw)
    try:
        if not CHARSET.fullmatch(encoding.removesuffix("-sig")):
            raise LookupError(encoding)
        return raw.decode(encoding).removeprefix("\ufeff")
    except LookupError:
        raise BadRequest(f"Content-Type: '{shortened(encoding)}' is no known charset; send UTF-8") from None
    except UnicodeDecodeError as error:
        line, column = raw.count(b"\n", 0, error.start) + 1, error.start - raw.rfind(b"\n", 0, error.start)
        where = f"byte 0x{raw[error.start]:02X} at line {line}, column {column}"
        remedy = "send UTF-8, or declare the encoding: Content-Type: application/json; charset=iso-8859-1"
        raise BadRequest(f"The body is not {encoding.removesuffix('-sig').upper()}: {where}; {remedy}") from None


def _refuse_constant(name: str, text: str) -> None:
    """Refuse NaN and Infinity, which Python reads and JSON does not have. Raises JSONDecodeError."""
    place = next(match.start() for match in OUTSIDE_TEXTS.finditer(text) if match[0] == name)
    raise json.JSONDecodeError(f"JSON has no {name}; send a number", text, place)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs. Raises BadRequest if a name is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise BadRequest(f"{shortened(name)}: the body has it twice; send it once")
    return found
