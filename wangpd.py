"""wangpd: a daemon that turns prompts into video with diffusers, behind the WanGP HTTP API.

One file, read from top to bottom: routes and handlers in the contract's order · make_app and the lifetime of what it
makes · systemd · serve · main. The vocabulary of HTTP is in `engine/api/`, the queue in `engine/queue/`, everything
that needs a GPU in a process of its own (`engine/workers/local.py`). Nothing happens at import.
"""

import asyncio
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from aiohttp import hdrs, web

from engine.admission import Admission, BadRequest, Policy, Resolved, files_of
from engine.api import requests, schemas, views
from engine.api.answers import answered, iso, link, listed
from engine.api.app_keys import (
    ADMISSION,
    API,
    BODY,
    CATALOG,
    CLIENT,
    CONFIG,
    DIGEST,
    DOCUMENT,
    DOWNLOADS,
    ENDS_WITH_CLIENT,
    ENGINES,
    INPUT_FILES,
    OUTPUTS,
    PATH,
    QUERY,
    QUEUE,
    SPOOL,
    TOKEN,
    TURNS,
)
from engine.api.body import validation_middleware
from engine.api.config import KEYS, CantStart, Config, ConfigError, load_config, split_hosts
from engine.api.connection import Connection, Slots
from engine.api.errors import errors_middleware
from engine.api.files import PREVIEWS, PreviewPool, folder_away, inline, open_output, send_file
from engine.api.guard import add_headers, guard_middleware, request_id_middleware
from engine.api.listeners import Listeners, url_of
from engine.api.openapi import JPEG_TYPE, MEDIA_ANSWER, Routes, api_document, endpoints, version
from engine.api.viewers import add_viewers
from engine.catalog import loras, weights
from engine.catalog.download import Downloads
from engine.catalog.models import Catalog, Model, default_settings
from engine.cli import parse_arguments, run_command
from engine.clock import Clock
from engine.files.checks import Checks
from engine.files.inputs import Inputs
from engine.files.media import MEDIA_TYPES
from engine.files.outputs import Outputs, Retention
from engine.files.owner import FolderLock, instance_id
from engine.files.place import NoStorage, Place
from engine.files.spool import Spool
from engine.job import GROUP_SIGNALS
from engine.log import set_up as set_up_log
from engine.queue.endings import Limits
from engine.queue.journal import Journal, JournalFault, NewerJournal
from engine.queue.queue import Receipt, TaskQueue
from engine.queue.tasks import NoSuchTask, Status
from engine.quiet import without_paths
from engine.settings import echo
from engine.turns import Turns
from engine.workers.local import Engine

log = logging.getLogger("wangpd")

API_VERSION = "1.0.0"  # of the contract
SWEEP_S = 3600
RELEASE_S = 5  # between two looks at which input files are needed, however many tasks are cancelled
HEAVY_AT_ONCE = 2
BODIES_AT_ONCE = 4  # of max_body_mb
M_ARENA_MAX = -8  # of malloc.h
DRAIN_S = 5  # for answers under way at a shutdown, half of it for requests whose body has not arrived
# Not the queue's own words: a wrong method on those is 405, and not an id that is no number.
QUEUED_TASK = "/queue/{task_id:(?!pause$|resume$)[^/]+}"

routes = Routes()


# ---- general
@routes.get(API)
@routes.operation("General", "GET /", schemas.About)
async def about(request: web.Request) -> web.Response:
    """The version, and every endpoint."""
    data = {"version": version(), "api_version": API_VERSION, "endpoints": endpoints(request.app)}
    return answered("WanGP API is running", data)


@routes.operation("General", "GET /health", schemas.Health, bare=True)
async def health(_request: web.Request) -> web.Response:
    """Whether the daemon runs; answers while the GPU is busy and while a model loads."""
    return web.json_response({"status": "healthy", "timestamp": iso(time.time())})


@routes.operation("General", "GET /health/ready", schemas.Ready, 503, bare=True)
async def ready(request: web.Request) -> web.Response:
    """Whether it can take work; 503 with the reason while it can't."""
    app = request.app
    await app[QUEUE].place.look()
    closed = "wangpd is shutting down" if app[QUEUE].runner.closed else ""
    if reason := next(filter(None, [*app[QUEUE].faults.values(), closed]), None):
        raise web.HTTPServiceUnavailable(text=reason)
    return web.json_response({"status": "ready", "timestamp": iso(time.time()), "warnings": views.remarks(app)})


# ---- models
@routes.operation("Models", "GET /models", schemas.ModelList, 400, query=requests.ModelsQuery)
async def models(request: web.Request) -> web.Response:
    """All models, or those of a family, for a task, that are installed."""
    app, query = request.app, request[QUERY]
    chosen = views.selected(app[CATALOG], query["family"], query["task"])
    entries = await asyncio.to_thread(lambda: [views.model_entry(app, model) for model in chosen])
    if query["installed"] is not None:
        entries = [entry for entry in entries if entry["installed"] == query["installed"]]
    return answered(f"Found {len(entries)} models", {"models": entries})


def requested_model(request: web.Request) -> Model:
    """Return the model that the path names. Raises UnknownModel."""
    return request.app[CATALOG].get(request[PATH]["model_type"])


@routes.operation("Models", "GET /models/{model_type}", schemas.ModelInfo, 404)
async def model_info(request: web.Request) -> web.Response:
    """One model."""
    model = requested_model(request)
    further = {"default_settings": default_settings(model), "supported_features": model.features}
    entry = await asyncio.to_thread(views.model_entry, request.app, model)
    return answered(f"Model info for '{model.id}'", entry | further | {"licence": model.licence})


@routes.operation("Models", "GET /models/{model_type}/settings", requests.Settings, 404)
async def model_settings(request: web.Request) -> web.Response:
    """The settings of a request that names only a prompt."""
    model = requested_model(request)
    return answered(f"Default settings for '{model.id}'", default_settings(model))


@routes.operation("Models", "POST /models/{model_type}/load", schemas.LoadState, 400, 404)
async def load_model(request: web.Request) -> web.Response:
    """Make a model warm as soon as the engine is free."""
    app, model = request.app, requested_model(request)
    await asyncio.to_thread(app[ADMISSION].require_weights, model)
    loaded = app[QUEUE].load(model)
    state = "loaded" if loaded else "being loaded"
    return answered(f"Model '{model.id}' is {state}", {"model": model.id, "loaded": loaded})


@routes.operation("Models", "POST /models/{model_type}/download", schemas.DownloadState, 403, 404)
async def start_download(request: web.Request) -> web.Response:
    """Fetch a model's weights, beside the queue; an interrupted download is continued."""
    app, model = request.app, requested_model(request)
    if not app[CONFIG].allow_api_download:
        remedy = f"set it to true in wangpd.toml, or run: wangpd models download {model.id}"
        raise web.HTTPForbidden(text=f"allow_api_download is false, so nothing is downloaded for a request; {remedy}")
    if await asyncio.to_thread(weights.locate, model, app[CONFIG].models_dir):
        return answered(f"Model '{model.id}' is installed", views.download_state(model.id, None))
    state = views.download_state(model.id, app[DOWNLOADS].start(model.id))
    return answered(f"Model '{model.id}' is being downloaded", state)


@routes.operation("Models", "GET /models/{model_type}/download", schemas.DownloadState, 404)
async def download_progress(request: web.Request) -> web.Response:
    """The progress of a model's download."""
    app, model = request.app, requested_model(request)
    if running := app[DOWNLOADS].latest.get(model.id):
        return answered(f"Download of '{model.id}'", views.download_state(model.id, running))
    if await asyncio.to_thread(weights.locate, model, app[CONFIG].models_dir):
        return answered(f"Model '{model.id}' is installed", views.download_state(model.id, None))
    raise web.HTTPNotFound(text=f"Model '{model.id}' is neither installed nor being downloaded; POST starts a download")


@routes.operation("Models", "DELETE /models/{model_type}/download", schemas.DownloadState, 400, 404)
async def cancel_download(request: web.Request) -> web.Response:
    """Cancel a download; the next one continues it."""
    model = requested_model(request)
    cancelled = await request.app[DOWNLOADS].cancel(model.id)
    return answered(f"Download of '{model.id}' cancelled", views.download_state(model.id, cancelled))


@routes.operation("Models", "GET /loras", schemas.LoraList, 400, 404, query=requests.LorasQuery)
async def lora_files(request: web.Request) -> web.Response:
    """The LoRA files for a model."""
    app = request.app
    model = app[CATALOG].get(request[QUERY]["model"] or app[CONFIG].default_model)
    names = await asyncio.to_thread(loras.available, model, app[CONFIG].loras_dir)
    return answered(f"Found {len(names)} LoRAs", {"model": model.id, "family": model.family, "loras": names})


@routes.operation("Models", "POST /unload", schemas.Unloaded, 400)
async def unload(request: web.Request) -> web.Response:
    """Give all GPU memory back."""
    unloaded = request.app[QUEUE].unload()
    return answered("Memory given back" if unloaded else "Nothing was loaded", {"unloaded": unloaded})


# ---- generation
@routes.operation(
    *("Generation", "POST /generate", schemas.Submitted, 400, 404, 408, 413, 415, 503),
    body=requests.GenerateRequest,
    query=requests.GenerateQuery,
    headers=[requests.IDEMPOTENCY_KEY],
)
async def generate(request: web.Request) -> web.Response:
    """Queue a video."""
    app, body = request.app, request[BODY]
    dry = request[QUERY]["dry_run"]
    idempotency_key, digest = requested_key(request), request[DIGEST]
    if idempotency_key and (replay := await app[QUEUE].replay(idempotency_key, digest)):
        return accepted(app, replay)
    if not dry:  # first, so that a refused request leaves no picture behind
        await app[QUEUE].place.look()
        app[QUEUE].require_open()
    if request.transport is None and files_of(body):  # without files there is nothing to save
        raise ConnectionResetError("the client has gone")
    request[ENDS_WITH_CLIENT] = True  # as long as nothing changes
    examined = await app[ADMISSION].examine(body, request[CLIENT])
    del request[ENDS_WITH_CLIENT]
    if not dry:
        await make_room(app, examined)
    resolved = await asyncio.to_thread(app[ADMISSION].admit, examined, store=not dry)
    if dry:
        return dry_run(app, resolved)
    return accepted(app, await app[QUEUE].submit(resolved.job, resolved.warnings, key=idempotency_key, request=digest))


async def make_room(app: web.Application, body: Mapping[str, Any]) -> None:
    """Let go of the files of ended tasks if those of this one have no room else. Raises NoStorage."""
    files = [sent for sents in files_of(body).values() for sent in sents]
    inputs = app[INPUT_FILES]
    if files and not await asyncio.to_thread(inputs.has_room, files):
        await remove_inputs(app, unfinished_only=True)
        if not await asyncio.to_thread(inputs.has_room, files):
            raise NoStorage("The files of waiting tasks fill max_inputs_mb; cancel some of these tasks, or raise it")


def requested_key(request: web.Request) -> str | None:
    """Return the key that makes a retry safe, or None. Raises BadRequest."""
    sent, most = request.headers.get(requests.IDEMPOTENCY_KEY["name"]), requests.MAX_KEY_CHARS
    if sent is None or (1 <= len(sent) <= most and sent.isprintable()):  # bytes that are not UTF-8 can't be printed
        return sent
    raise BadRequest(f"Idempotency-Key: it must have 1 to {most} printable characters")


def accepted(app: web.Application, receipt: Receipt) -> web.Response:
    """Return the answer to a submission."""
    data = {**receipt.answer, "status_url": link(app, f"/status/{receipt.answer['task_id']}")}
    headers = {"Idempotency-Replayed": "true"} if receipt.replayed else {}
    return answered("Generation task added to queue", data, headers=headers)


def dry_run(app: web.Application, resolved: Resolved) -> web.Response:
    """Return what a submission would have resulted in."""
    job, queue, needs = resolved.job, app[QUEUE], resolved.estimate
    known_s = queue.estimate_s(job)
    data = {
        "task_id": None,
        "position": None,
        "estimated_wait": queue.estimated_wait_s(),
        "estimated_seconds": known_s,
        "estimate": needs and {**vars(needs), "seconds": needs.seconds if known_s is None else known_s},
        "seed": job.seed,
        "warnings": list(resolved.warnings),
        "status_url": None,
        "settings": echo(job),
    }
    return answered("Dry run: nothing was queued", data)


# ---- queue
@routes.operation("Queue", "GET /queue", schemas.QueueState)
async def queue_state(request: web.Request) -> web.Response:
    """The running and the waiting tasks."""
    queue = request.app[QUEUE]
    tasks, running = queue.listing(), queue.at_work
    data = {
        "total_tasks": len(tasks),
        "current_task_id": running[0].id if running else None,
        "is_processing": bool(running),
        "paused": queue.paused,
        "held": next(iter(queue.faults.values()), None),
        "tasks": views.queue_entries(tasks, running=len(running)),
    }
    return answered(f"Queue has {len(tasks)} tasks", data)


@routes.operation("Queue", "GET /status/{task_id}", schemas.TaskState, 400, 404, 503, query=requests.StatusQuery)
async def task_status(request: web.Request) -> web.Response:
    """The state of a task."""
    queue, task_id, wait_s = request.app[QUEUE], request[PATH]["task_id"], request[QUERY]["wait"]
    request[ENDS_WITH_CLIENT] = True
    task = await (queue.wait(task_id, wait_s) if wait_s else queue.get(task_id))
    return answered(f"Task {task.id} status", views.task_state(request.app, task))


@routes.operation("Queue", f"DELETE {QUEUED_TASK}", schemas.Removed, 400, 404)
async def remove_task(request: web.Request) -> web.Response:
    """Remove a waiting task, or cancel a running one."""
    task_id = request[PATH]["task_id"]
    status = await request.app[QUEUE].remove(task_id)
    message = f"Task {task_id} removed from queue" if status.ended else f"Task {task_id} is being cancelled"
    return answered(message, {"removed_task_id": task_id, "status": status})


@routes.operation("Queue", "DELETE /queue", schemas.Cleared)
async def clear_queue(request: web.Request) -> web.Response:
    """Remove all waiting tasks; the running one goes on."""
    count = await request.app[QUEUE].clear()
    return answered(f"Cleared {count} tasks from queue", {"removed_count": count})


@routes.operation("Queue", "POST /queue/pause", schemas.Paused, 503)
async def pause_queue(request: web.Request) -> web.Response:
    """Start no waiting task; the running one goes on."""
    await request.app[QUEUE].pause(True)
    return answered("Queue paused", {"paused": True})


@routes.operation("Queue", "POST /queue/resume", schemas.Paused, 503)
async def resume_queue(request: web.Request) -> web.Response:
    """Start waiting tasks again."""
    await request.app[QUEUE].pause(False)
    return answered("Queue resumed", {"paused": False})


@routes.operation(
    "Queue", f"PATCH {QUEUED_TASK}", schemas.Moved, 400, 404, 408, 413, 415, 503, body=requests.MoveRequest
)
async def move_task(request: web.Request) -> web.Response:
    """Move a waiting task."""
    task_id = request[PATH]["task_id"]
    position = await request.app[QUEUE].move(task_id, request[BODY]["position"])
    return answered(f"Task {task_id} is at position {position}", {"task_id": task_id, "position": position})


@routes.operation("Queue", "POST /queue/{task_id}/retry", schemas.Submitted, 400, 404, 503)
async def retry_task(request: web.Request) -> web.Response:
    """Queue an ended task again, with its settings, seed and pictures."""
    app, task_id = request.app, request[PATH]["task_id"]
    return accepted(app, await app[QUEUE].retry(task_id, app[ADMISSION].require))


@routes.operation("Queue", "GET /tasks", schemas.TaskPage, 400, 503, query=requests.HistoryQuery)
async def history(request: web.Request) -> web.StreamResponse:
    """All tasks, ended ones too, newest first."""
    app, query = request.app, request[QUERY]
    status = Status(query["status"]) if query["status"] else None
    ids, total = await app[QUEUE].journal.history(status, query["limit"], query["offset"])

    async def states() -> AsyncIterator[Any]:
        for task_id in ids:
            with suppress(NoSuchTask):  # it has been forgotten meanwhile
                yield views.task_state(app, await app[QUEUE].get(task_id))

    data = {"tasks": [], "total": total, "limit": query["limit"], "offset": query["offset"]}
    return await listed(request, f"Found {total} tasks", data, states())


# ---- output files
@routes.operation("Output files", "GET /outputs", schemas.OutputPage, 400, 503, query=requests.OutputsQuery)
async def outputs(request: web.Request) -> web.Response:
    """The finished files, newest first."""
    folder, query = request.app[OUTPUTS], request[QUERY]
    kind, limit, offset = query.get("file_type"), query["limit"], query["offset"]
    try:  # in a thread even if nothing has changed: to look at a share whose server is gone blocks
        entries = await asyncio.to_thread(folder.listing, kind)
    except OSError as error:
        raise folder_away(request.app, error) from None
    page = [views.output_entry(entry) for entry in entries[offset : offset + limit]]
    data = {"files": page, "total": len(entries), "limit": limit, "offset": offset}
    return answered(f"Found {len(entries)} files", data)


@routes.operation("Output files", "GET /download/{filename}", MEDIA_ANSWER, 404, 412, 416, 503)
async def download(request: web.Request) -> web.StreamResponse:
    """A file, with ranges, conditions and HEAD."""
    opened = await asyncio.to_thread(open_output, request.app, request[PATH]["filename"])
    content_type = MEDIA_TYPES[Path(opened.name).suffix.lower()][1]
    return await send_file(request, opened, content_type, **{hdrs.CONTENT_DISPOSITION: inline(opened.name)})


@routes.operation(
    *("Output files", "GET /preview/{filename}", [JPEG_TYPE], 400, 404, 412, 416, 503), query=requests.PreviewQuery
)
async def preview(request: web.Request) -> web.StreamResponse:
    """A JPEG of a picture or of a video's first frame."""
    name, width = request[PATH]["filename"], request[QUERY]["width"]
    opened = await request.app[PREVIEWS].make(request, name, width)
    return await send_file(request, opened, JPEG_TYPE)


# ---- configuration
@routes.operation("Configuration", "GET /config", schemas.ServerConfig)
async def server_config(request: web.Request) -> web.Response:
    """The non-sensitive configuration."""
    return answered("Server configuration", views.public_config(request.app))


@routes.get("/api/openapi.json")
async def openapi_document(request: web.Request) -> web.Response:
    app = request.app
    if not app[DOCUMENT]:  # made when first requested: it costs more than a start may
        app[DOCUMENT].update(await asyncio.to_thread(api_document, app))
    return web.json_response(app[DOCUMENT])


# ---- the application
def make_app(config: Config, catalog: Catalog | None = None) -> web.Application:
    """Return the whole daemon but its socket, for production and tests alike."""
    app = web.Application(
        middlewares=[request_id_middleware, errors_middleware, guard_middleware, validation_middleware],
        client_max_size=config.max_body_mb * 2**20,
    )
    app[CONFIG], app[DOCUMENT], app[TOKEN] = config, {}, read_token(config)
    app[CATALOG] = read_catalog(config) if catalog is None else catalog
    clock = Clock()
    keep = Retention(config.keep_outputs_days * 86400, config.keep_outputs_mb * 2**20)
    save, state = config.folders()
    paths, holds = (config.save_path, config.state_path), holder(config)
    app[OUTPUTS] = Outputs(*paths, keep, instance=config.instance, clock=clock, holder=holds, disk=save)
    app[PREVIEWS] = PreviewPool()
    app[DOWNLOADS] = Downloads(config.models_dir, config.min_free_mb * 2**20)
    app[INPUT_FILES] = Inputs(config.state_path / "inputs", state, config.max_inputs_mb * 2**20)
    app[SPOOL] = Spool(config.state_path, state, BODIES_AT_ONCE * config.max_body_mb * 2**20)
    app[TURNS] = Turns(HEAVY_AT_ONCE)
    app[ENGINES] = engines = [Engine(part, config.cancel_grace_s) for part in config.engines()]
    journal = Journal(config.state_path / "journal.sqlite", clock)
    place, limits = Place((save, state), lambda: without_paths(app[OUTPUTS].lock.take(), {})), config.part(Limits)
    app[QUEUE] = TaskQueue(journal, engines, app[CATALOG], app[OUTPUTS], place=place, limits=limits)
    checks, policy = Checks(config.max_image_pixels), config.part(Policy)
    app[ADMISSION] = Admission(app[CATALOG], app[INPUT_FILES], checks, policy, lambda: app[QUEUE].machines)
    app.add_routes(routes)
    add_viewers(app)
    app.on_response_prepare.append(add_headers)
    app.cleanup_ctx.append(lifetime)
    return app


def read_token(config: Config) -> bytes:
    """Return the token of `token_file`. Raises CantStart."""
    if not config.token_file:
        return b""
    path = Path(config.token_file)
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise CantStart(f"token_file: {path} can't be read: {error.strerror}") from None
    if not token:
        raise CantStart(f"token_file: {path} is empty; write a token into it: openssl rand -hex 32")
    return token


def read_catalog(config: Config) -> Catalog:
    """Return the models of the package and of `models_dir`. Raises ConfigError, also if it has no default model."""
    try:
        catalog = Catalog.load(config.models_dir)
    except (OSError, ValueError) as error:
        raise ConfigError(f"models_dir: {error}") from None
    if config.default_model not in catalog:
        raise ConfigError(f"default_model: {config.default_model!r} is not in the catalogue; see: wangpd models")
    return catalog


# ---- lifetimes
async def lifetime(app: web.Application) -> AsyncIterator[None]:
    """The journal is open, and its tasks run. Downloads and the generation processes end with it, whatever they do."""
    app[CONFIG].save_path.mkdir(parents=True, exist_ok=True)
    journal = app[QUEUE].journal
    try:
        await journal.open(await asyncio.to_thread(app[OUTPUTS].highest_task_id))
        await asyncio.to_thread(app[OUTPUTS].remove_parts)
        await asyncio.to_thread(app[INPUT_FILES].open)
        if journal.set_aside:
            log.error("the journal could not be read and was moved to %s; the queue starts empty", journal.set_aside)
        async with app[QUEUE].running(app[CONFIG].stop_grace_s):
            beside = [asyncio.create_task(work(app)) for work in (sweep, warm_up)]
            yield
            for work in beside:
                work.cancel()
        await journal.close()
    finally:
        close_engines(app)
        app[PREVIEWS].close()
        await app[DOWNLOADS].close()


def close_engines(app: web.Application) -> None:
    """End all generation processes. Blocks briefly."""
    for engine in app[ENGINES]:
        engine.close()


async def warm_up(app: web.Application) -> None:
    """With `warm_start`, load the model that was last in use, or the default one, if it is installed."""
    if not app[CONFIG].warm_start:
        return
    wanted = (app[QUEUE].facts.last_model, app[CONFIG].default_model)
    for model in (app[CATALOG].get(model_id) for model_id in wanted if model_id in app[CATALOG]):
        if await asyncio.to_thread(weights.locate, model, app[CONFIG].models_dir):
            app[QUEUE].warm_up(model)
            return


async def sweep(app: web.Application) -> None:
    """Remove the inputs that no task needs, each hour and soon after a cancel."""
    queue = app[QUEUE]
    while True:
        queue.released.clear()
        with suppress(JournalFault, OSError):
            await queue.journal.save()  # the clock: a daemon that only idles knows of the time too
            await remove_inputs(app)
        await asyncio.sleep(RELEASE_S)
        with suppress(TimeoutError):
            await asyncio.wait_for(queue.released.wait(), SWEEP_S)


async def remove_inputs(app: web.Application, *, unfinished_only: bool = False) -> None:
    """Remove the inputs that no task needs, or no unfinished one; a journal set aside may need them all."""
    aside = app[CONFIG].state_path.glob("journal.sqlite.unreadable-*")
    if not await asyncio.to_thread(any, aside):
        await app[QUEUE].sweep(app[INPUT_FILES].sweep, unfinished_only=unfinished_only)


# ---- systemd
class Supervisor:
    """Notifies systemd: READY, the queue in STATUS, and the watchdog. Does nothing where there is no systemd."""

    def __init__(self, queue: TaskQueue, warnings: Callable[[], Sequence[str]] = tuple) -> None:
        self._queue, self._warnings = queue, warnings
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._interval_s = float(os.environ.get("WATCHDOG_USEC", "10000000")) / 1e6 / 2

    def notify(self, *lines: str) -> None:
        """Send `lines`. A fault of systemd is ignored."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.setblocking(False)  # a supervisor that hangs must not hang the event loop
            channel.sendto("\n".join(lines).encode(), address)

    def status(self) -> str:
        """Return the line that `systemctl status` shows."""
        running = self._queue.at_work
        ids = ", ".join(str(task.id) for task in running)
        idle = "paused" if self._queue.paused else "idle"
        work = {0: idle, 1: f"task {ids} runs"}.get(len(running), f"tasks {ids} run")
        remarks = (*self._queue.faults.values(), *self._warnings())
        return "; ".join([f"STATUS={work}, {len(self._queue.listing()) - len(running)} waiting", *remarks])

    async def watch(self) -> None:
        """Report at intervals that the event loop is alive."""
        while True:
            self.notify("WATCHDOG=1", self.status())
            await asyncio.sleep(self._interval_s)


# ---- serve
async def serve(config: Config, catalog: Catalog) -> None:
    """Run until SIGTERM, SIGINT or SIGHUP; a second one ends at once. Raises CantStart if a folder or port is taken."""
    app = make_app(config, catalog)
    if taken := app[OUTPUTS].lock.take():
        raise CantStart(taken)
    stop = asyncio.Event()
    for number in GROUP_SIGNALS:
        # nohup ignores SIGHUP, and that holds; a script that starts it in the background ignores SIGINT in all cases.
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, on_signal, stop, app, number)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # by default they would end it like a crash
    # aiohttp waits for an answer under way twice, the second time without its request's body.
    runner = web.AppRunner(app, shutdown_timeout=DRAIN_S / 2)
    listeners = await bind(runner, config)  # first: where the port is taken, no task may start
    supervisor = Supervisor(app[QUEUE], lambda: views.remarks(app))
    watching = asyncio.create_task(supervisor.watch())
    try:
        await runner.setup()
        await listeners.start_serving()
        for url in map(url_of, listeners.sockets):
            log.info("wangpd %s listens on %s", version(), f"{url}{API}/" if url.startswith("http") else url)
        supervisor.notify("READY=1", supervisor.status())
        await stop.wait()
        supervisor.notify("STOPPING=1", "STATUS=stopping the running task")
        await app[QUEUE].stop(config.stop_grace_s)  # while it still listens: new work is answered 503
    finally:
        listeners.close()  # before the rest ends: a connection that is opened now would be cut off
        watching.cancel()
        await runner.cleanup()


async def bind(runner: web.AppRunner, config: Config) -> Listeners:
    """Take the addresses; who connects is served once the listeners are started. Raises CantStart."""
    slots = Slots(config.max_connections, config.trusted_proxies)
    listeners = Listeners(lambda: Connection(cast(web.Server, runner.server), slots))
    try:
        await asyncio.to_thread(listeners.take, split_hosts(config.host), config.port)
    except CantStart:
        listeners.close()
        raise
    return listeners


def on_signal(stop: asyncio.Event, app: web.Application, number: signal.Signals) -> None:
    """The first signal ends the daemon in order, without new work; the second at once, unless a terminal sent it."""
    if stop.is_set() and number != signal.SIGHUP:  # which comes twice: from the shell and from the kernel
        close_engines(app)
        os._exit(1)
    app[QUEUE].runner.interrupt()
    stop.set()


# ---- main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon or a command. The exit code: 0, 1 for a fault of the machine, 2 for a wrong configuration."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    flags = {name: value for name, value in vars(options).items() if name in KEYS and value is not None}
    try:
        config = load_config(options.config, flags)
        catalog = read_catalog(config)
    except ConfigError as error:
        print(f"wangpd: {error}", file=sys.stderr)
        return 2
    if options.check_config:
        print("wangpd: the configuration is right")
        return 0
    if options.command:
        return run_command(options, config, catalog)
    if (umask := os.umask(0o077)) & 0o007 == 0o007:
        os.umask(umask)  # it keeps others out already: whether a group may read is the decision of who set it
    set_up_log(config.log_level)
    # The tracker, which removes semaphores after a kill, inherits this; that it had to is nobody's worry.
    sys.warnoptions.append("ignore::UserWarning:multiprocessing.resource_tracker")
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # the 1024 of a shell are fewer than `max_connections` downloads need
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    with suppress(OSError, AttributeError):  # glibc only: else it keeps what is freed, for each thread apart
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
    try:
        require_folders(config)
        lock = FolderLock("state_path", config.state_path / "lock", holder(config))
        if taken := lock.take():
            raise CantStart(taken)
        config = replace(config, instance=instance_id(config.state_path), save_mounted=config.save_path.is_mount())
        asyncio.run(serve(config, catalog))
    except (CantStart, NewerJournal, OSError, JournalFault) as error:
        ours = isinstance(error, CantStart | NewerJournal)
        print("wangpd:", error if ours else f"can't go on: {error}", file=sys.stderr)
        return 1
    return 0


def require_folders(config: Config) -> None:
    """Make the folders that are written to. Raises CantStart for the first that can't be."""
    for name in ("save_path", "state_path"):
        folder: Path = getattr(config, name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CantStart(f"{name}: {folder} can't be made: {error.strerror}; choose another folder") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise CantStart(f"{name}: {folder} can't be written to; let the user of wangpd write there, or move it")


def holder(config: Config) -> str:
    """What the lock files of this daemon's folders say."""
    return f"process {os.getpid()} on {socket.gethostname()}, state_path {config.state_path}"


if __name__ == "__main__":
    sys.exit(main())
