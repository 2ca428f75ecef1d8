"""What answers say of models, tasks, files and downloads: plain values under the names of engine.api.schemas."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from aiohttp import web

from engine.api.answers import iso, link, shortened
from engine.api.app_keys import CONFIG, QUEUE
from engine.api.schemas import PUBLIC_KEYS
from engine.catalog import weights
from engine.catalog.abilities import INPUTS
from engine.catalog.download import Download
from engine.catalog.models import Catalog, Model
from engine.files.outputs import Entry
from engine.planning import windows
from engine.queue.tasks import Task
from engine.settings import echo


def selected(catalog: Catalog, family: str | None, task: str | None) -> list[Model]:
    """Return the models of a family, and for a task; None means any."""
    return [model for model in catalog if family in (None, model.family) and (task is None or task in model.tasks)]


def model_entry(app: web.Application, model: Model) -> dict[str, Any]:
    """Return a model as listings show it. Looks at the disk for its weights: blocks."""
    named = ("id", "name", "description", "family", "is_i2v", "is_t2v", "visible", "kind", "tasks")
    return {
        **{name: getattr(model, name) for name in named},
        "installed": weights.locate(model, app[CONFIG].models_dir) is not None,
        "loaded": app[QUEUE].lanes.loaded(model.id),
        "limits": {
            "resolution_multiple": model.spatial_multiple,
            "max_side": model.max_side,
            "video_length": {name: getattr(model.frames, name) for name in ("step", "offset", "min", "max")},
            "sliding_window": windows.usual(model),
            "fps": model.fps,
            "inputs": {name: model.takes(name) for name in INPUTS},
            "max_image_refs": model.inputs.get("max_reference_images", 0),
        },
    }


def download_state(model_id: str, download: Download | None) -> dict[str, Any]:
    """Return a download as it is now; None: the model's files are all here."""
    return {
        "model": model_id,
        "status": download.stage if download else "installed",
        "progress": download.percent if download else 100.0,
        "downloaded_bytes": download.done_bytes if download else 0,
        "total_bytes": download and download.total_bytes,
        "file": (download and download.file) or None,
        "error": download and download.error,
        "started_at": download and iso(download.started_at),
        "finished_at": download and iso(download.finished_at),
    }


def queue_entries(tasks: Sequence[Task], running: int) -> list[dict[str, Any]]:
    """Return the tasks that have not ended; the first `running` of them are at position 1."""
    return [
        {
            "id": task.id,
            "prompt": shortened(task.job.prompt),
            "status": task.status,
            "length": task.job.frames,
            "steps": task.job.steps,
            "position": place if place > running else 1,
        }
        for place, task in enumerate(tasks, start=1)
    ]


def task_state(app: web.Application, task: Task) -> dict[str, Any]:
    """Return a task as it is now."""
    queue = app[QUEUE]
    done, total = queue.steps_done(task)
    return {
        "task_id": task.id,
        "status": task.status,
        "progress": queue.progress_percent(task),
        "current_step": done,
        "total_steps": total,
        "position": queue.position(task),
        "eta_seconds": queue.eta_s(task),
        "phase": task.phase or None,
        "prompt": task.job.prompt,
        "model_type": task.job.model,
        "seed": task.job.seed,
        "settings": echo(task.job),
        "warnings": list(task.warnings),
        "created_at": iso(task.created_at),
        "started_at": iso(task.started_at),
        "finished_at": iso(task.finished_at),
        "timings": {phase: round(seconds, 3) for phase, seconds in task.timings.items()},
        "peak_memory_bytes": task.peak_memory_bytes,
        "memory_plan": task.plan,
        "attempts": task.attempts,
        "error": task.error,
        "files": [
            {
                **asdict(file),
                "url": link(app, f"/download/{file.filename}"),
                "preview_url": link(app, f"/preview/{file.filename}"),
            }
            for file in task.files
        ],
    }


def output_entry(entry: Entry) -> dict[str, Any]:
    """Return a file as the listing shows it."""
    return {**entry._asdict(), "created_at": iso(entry.created_at), "modified_at": iso(entry.modified_at)}


def public_config(app: web.Application) -> dict[str, Any]:
    """Return the non-sensitive configuration, with values as WanGP writes them."""
    config = app[CONFIG]
    plans = [lane.engine.plan for lane in app[QUEUE].lanes if lane.engine.plan]
    return {name: getattr(config, name) for name in PUBLIC_KEYS} | {
        "profile": int(config.profile) if config.profile.is_integer() else config.profile,
        "save_path": config.shown_save_path,
        "memory_plan": "\n".join(plans) or None,
    }


def remarks(app: web.Application) -> list[str]:
    """Return what a person should look at, though work goes on, a sentence each."""
    aside = app[QUEUE].journal.set_aside
    lost = [f"The queue's journal could not be read and was moved to {aside.name}; its tasks are lost"] if aside else []
    return [*lost, *app[QUEUE].lanes.remarks()]
