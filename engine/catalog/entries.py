"""Reads the catalogue's TOML files: completes their tables from bases, families and usual roles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import rtoml

Table: TypeAlias = Mapping[str, Any]

_ROLES: Mapping[str, Mapping[str, str]] = rtoml.load(Path(__file__).with_name("roles.toml"))
# Tables of which an entry names only what differs from its base or family; any other value replaces theirs.
JOINED = frozenset({"defaults", "inputs", "extra_call", "dtypes"})
NOT_INHERITED = frozenset({"wangp", "visible"})  # keys that an entry never takes from its base


def read(path: Path, known: dict[str, Table]) -> tuple[dict[str, Table], list[Table]]:
    """The complete tables of a file's pipelines, by class, and of its models, which join `known`. Raises ValueError."""
    document = rtoml.load(path)
    if unknown := document.keys() - {"pipelines", "family", "models"}:
        raise ValueError(f"there is no table '{min(unknown)}'; tables are pipelines, family, models")
    pipelines = document.get("pipelines", {})
    shared = {key: value for key, value in pipelines.items() if not isinstance(value, dict)}
    classes: dict[str, Table] = {
        name: {**shared, **table, "call": _call(name, table["call"])}
        for name, table in pipelines.items()
        if name not in shared
    }
    family = {"family": path.stem, **document.get("family", {})}
    models = []
    for entry in document.get("models", ()):
        models.append(_model(entry, known, family))
        known[entry["id"]] = models[-1]
    return classes, models


def _model(entry: Table, known: Mapping[str, Table], family: Table) -> Table:
    """The entry completed from its base or, without one, from its file's family."""
    inherited, base = family, {}
    if name := entry.get("base"):
        if name not in known:
            raise ValueError(f"model '{entry['id']}': base '{name}' is no model that stands before it")
        inherited = {key: value for key, value in known[name].items() if key not in NOT_INHERITED}
        # A repository of its own has weights of its own.
        base = {"base": "" if "repo" in entry else inherited.get("base") or name}
    joined = {key: {**inherited.get(key, {}), **entry[key]} for key in JOINED & entry.keys()}
    return {**inherited, **entry, **joined, **base}


def _call(name: str, table: Table) -> dict[str, str]:
    """Role → parameter: the usual ones of the kind that `usual` names, changed by the other values of `table`."""
    kind = table.get("usual")
    if kind not in (None, "video", "image", "audio"):
        raise ValueError(f"pipeline '{name}': call.usual must be video, image or audio, not '{kind}'")
    call = {**_ROLES["every"], **_ROLES[kind]} if kind else {}
    parameters = {role: parameter for group in _ROLES.values() for role, parameter in group.items()}
    for role in table.keys() - {"usual"}:
        if isinstance(table[role], bool) and role not in parameters:
            raise ValueError(f"pipeline '{name}': call.{role} needs the name of a parameter: the role has no usual one")
        call[role] = parameters[role] if table[role] is True else table[role]
    return {role: parameter for role, parameter in call.items() if parameter}
