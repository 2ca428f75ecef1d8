"""The inputs of a request, and the tasks of a model with the inputs that each needs, as `abilities.toml` lists them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import rtoml


@dataclass(frozen=True)
class Input:
    """A request field that holds media. `role` is what the pipeline uses it for, by the catalogue's name."""

    kind: str  # image, video, audio
    role: str
    about: str
    several: bool = False


@dataclass(frozen=True)
class Ability:
    """What a task accepts: one of the sets of inputs in `needs`, and with it any of the inputs in `may`."""

    needs: tuple[frozenset[str], ...]
    may: frozenset[str] = frozenset()

    def fits(self, given: frozenset[str]) -> bool:
        """True if `given` is enough and not too much."""
        return any(needed <= given <= needed | self.may for needed in self.needs)

    @property
    def inputs(self) -> frozenset[str]:
        """All inputs that it accepts."""
        return self.may.union(*self.needs)


_TABLES = rtoml.load(Path(__file__).with_suffix(".toml"))
INPUTS: Mapping[str, Input] = {name: Input(**row) for name, row in _TABLES["inputs"].items()}
TASKS: Mapping[str, Ability] = {
    name: Ability(tuple(frozenset(needs.split()) for needs in row["needs"]), frozenset(row.get("may", "").split()))
    for name, row in _TABLES["tasks"].items()
}
FORMS: Mapping[str, frozenset[str]] = {form: frozenset(names.split()) for form, names in _TABLES["forms"].items()}
# Step caches under the names of a request: what the catalogue's `caches` calls them.
STEP_CACHES: Mapping[str, str] = {"mag": "mag", "tea": "tea", "fbc": "first_block", "taylorseer": "taylorseer"}
