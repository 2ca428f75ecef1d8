"""JSON as clients send it, in any common encoding; a fault is a sentence that names line, column and reason."""

import json
import re
from collections import Counter
from typing import Any

from engine.admission import BadRequest
from engine.api.answers import shortened

SHOWN = 'a JSON object such as {"prompt": "a cat"}'
# Few names, none of Python's other codecs: punycode takes quadratic time, and each unknown name would stay in memory.
CHARSET = re.compile(
    r"(us-)?ascii|utf-?(8|16|32)(-?[lb]e)?|latin-?[0-9]{1,2}|iso-?8859-[0-9]{1,2}|(windows|cp)-?[0-9]{3,4}"
    r"|koi8-[ru]|gbk|gb2312|gb18030|big5|euc-(jp|kr)|shift[_-]jis|macintosh",
    re.IGNORECASE,
)
OUTSIDE_TEXTS = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|-?(?:NaN|Infinity)', re.DOTALL)
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
