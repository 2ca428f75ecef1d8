"""What a request gets that names only a prompt."""

from typing import Any

from engine.catalog.models import Model
from engine.settings import SETTINGS, defaults


def default_settings(model: Model) -> dict[str, Any]:
    """The defaults of a model's first task, under the contract's names.

    Without those of windows, which mean nothing to a video of the usual length.
    """
    values = {**defaults(model.defaults), "prompt": ""}
    shown = {
        row.name: values[row.name]
        for row in SETTINGS.values()
        if not row.guides
        and model.has_setting(row.name, model.tasks[0])
        and row.needs != "sliding_window_size"
        and (row.role or not row.needs or values[row.needs])
    }
    return {"prompt": "", **{name: value for name, value in shown.items() if value is not None}}
