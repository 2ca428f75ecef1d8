"""Write what the code already says into the documentation: `python -m tools.make_docs`, or `make docs`.

`wangpd.toml` as a whole; in README.md and docs/ the table between `<!-- config -->` and `<!-- /config -->`, and the one
between `<!-- settings -->` and `<!-- /settings -->`.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.api.config import KEYS
from engine.api.requests import REQUIRED
from engine.settings import EVERY, LENGTH, SETTINGS, Setting

ROOT = Path(__file__).parent.parent
INTRODUCTION = """\
# The configuration of wangpd: every key, its default, and what it is for. wangpd looks for this file in the working
# directory, then in /etc/wangpd. Relative paths are relative to this file; the flags --host, --port, --save-path and
# --state-path override it. `wangpd --check-config` checks it.
"""
# The headings of `wangpd.toml`, by the first key of each group.
HEADINGS: Mapping[str, str] = {
    "host": "where it listens, and its folders",
    "allowed_hosts": "who may ask",
    "allow_download": "the models and the GPU",
    "image_format": "the files it makes",
    "max_queue": "limits",
    "max_attempts": "the queue, in time and over restarts",
    "log_level": "the rest",
}
TYPES: Mapping[Any, str] = {
    str: "text",
    int: "whole number",
    float: "number",
    bool: "boolean",
    tuple[str, ...]: "list of texts",
    LENGTH: "frames or duration",
}
KINDS = ("video", "image", "audio")  # in the order of the tables


def toml_value(value: Any) -> str:
    """A default as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 10_000:
        return f"{value:_}"
    if isinstance(value, int | float):
        return str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else str(value))


def toml() -> str:
    """The whole of `wangpd.toml`."""
    parts = [INTRODUCTION]
    for name, row in KEYS.items():
        if name in HEADINGS:
            parts.append(f"# ---- {HEADINGS[name]}\n")
        parts.append(f"# {row.metadata['why']}\n{name} = {toml_value(row.default)}\n")
    return "\n".join(parts)


def config_table() -> str:
    """The configuration keys in Markdown."""
    rows = (f"| `{name}` | `{toml_value(row.default)}` | {row.metadata['why']} |" for name, row in KEYS.items())
    return "\n".join(["| key | default | what it is |", "|---|---|---|", *rows])


def limits(row: Setting) -> str:
    """What a setting accepts, in a few words."""
    if row.choices:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in row.choices)
    if not row.high:
        return TYPES[row.type]
    above, high = "above " if row.above_low else "", "2^63 - 1" if row.high == 2**63 - 1 else f"{row.high:,}"
    unit = " characters" if row.type is str else " names" if row.type == tuple[str, ...] else ""
    span = f"{above}{row.low:,} to {high}" if row.low or not unit else f"at most {high}"
    return f"{TYPES[row.type]}, {span}{unit}"


def settings_table() -> str:
    """The request settings in Markdown."""
    lines = ["| field | accepts | default | models | what it is |", "|---|---|---|---|---|"]
    for row in SETTINGS.values():
        default = "required" if row.name in REQUIRED else "" if row.default is None else f"`{json.dumps(row.default)}`"
        kinds = ", ".join(kind for kind in KINDS if kind in row.kinds)
        models = "some" if row.role else kinds if row.kinds < EVERY else "all"
        lines.append(f"| `{row.name}` | {limits(row)} | {default} | {models} | {row.help} |")
    return "\n".join(lines)


TABLES: Mapping[str, Callable[[], str]] = {"config": config_table, "settings": settings_table}


def with_tables(text: str) -> str:
    """A page with its marked tables up to date."""
    for name, table in TABLES.items():
        block = f"<!-- {name} -->\n\n{table()}\n\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, text, flags=re.DOTALL)
    return text


def generated(root: Path = ROOT) -> dict[Path, str]:
    """The text that each generated file should have."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return {root / "wangpd.toml": toml()} | {page: with_tables(page.read_text("utf-8")) for page in pages}


if __name__ == "__main__":
    for path, text in generated().items():
        if path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
            print(f"{path.relative_to(ROOT)} is up to date now")
