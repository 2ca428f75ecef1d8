"""The HTTP API that users of WanGP know, as data: every path, key, JSON type, message, default and limit of their page.

A shape is a JSON type (`integer`), several of them (`integer|null`), a dict of keys, or a list of one shape. A message
is filled in with the path's parameters, the members of `data`, and `count`, the number of models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BASE = "/api/v1"
DOCUMENTS = {
    "/api/docs": "text/html",
    "/api/redoc": "text/html",
    "/api/openapi.json": "application/json",
}
TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@dataclass(frozen=True)
class Endpoint:
    """A documented request and its answer: the envelope around `data` if it has a message, else `data` alone."""

    method: str
    path: str
    message: str
    data: Mapping[str, Any]


MODEL = {
    "id": "string",
    "name": "string",
    "description": "string",
    "family": "string",
    "is_i2v": "boolean",
    "is_t2v": "boolean",
    "visible": "boolean",
}
SETTINGS = {
    "prompt": "string",
    "resolution": "string",
    "video_length": "integer",
    "num_inference_steps": "integer",
    "guidance_scale": "number",
    "flow_shift": "number",
}
QUEUED = {
    "id": "integer",
    "prompt": "string",
    "status": "string",
    "length": "integer",
    "steps": "integer",
    "position": "integer",
}
FILE = {
    "filename": "string",
    "type": "string",
    "size_bytes": "integer",
    "created_at": "string",
    "modified_at": "string",
}

ENDPOINTS = (
    Endpoint(
        "GET",
        "/",
        "WanGP API is running",
        {"version": "string", "api_version": "string", "endpoints": "object"},
    ),
    Endpoint("GET", "/health", "", {"status": "string", "timestamp": "string"}),
    Endpoint("GET", "/models", "Found {count} models", {"models": [MODEL]}),
    Endpoint(
        "GET",
        "/models/{model_type}",
        "Model info for '{model_type}'",
        {
            "id": "string",
            "name": "string",
            "description": "string",
            "default_settings": "object",
            "supported_features": {"sliding_window": "boolean", "tea_cache": "boolean", "mag_cache": "boolean"},
        },
    ),
    Endpoint("GET", "/models/{model_type}/settings", "Default settings for '{model_type}'", SETTINGS),
    Endpoint(
        "POST",
        "/generate",
        "Generation task added to queue",
        {"task_id": "integer", "position": "integer", "estimated_wait": "number|null"},
    ),
    Endpoint(
        "GET",
        "/queue",
        "Queue has {total_tasks} tasks",
        {"total_tasks": "integer", "current_task_id": "integer|null", "is_processing": "boolean", "tasks": [QUEUED]},
    ),
    Endpoint(
        "GET",
        "/status/{task_id}",
        "Task {task_id} status",
        {
            "task_id": "integer",
            "status": "string",
            "progress": "number",
            "current_step": "integer",
            "total_steps": "integer",
            "position": "integer|null",
            "eta_seconds": "number|null",
        },
    ),
    Endpoint("DELETE", "/queue/{task_id}", "Task {task_id} removed from queue", {"removed_task_id": "integer"}),
    Endpoint("DELETE", "/queue", "Cleared {removed_count} tasks from queue", {"removed_count": "integer"}),
    Endpoint(
        "GET",
        "/outputs",
        "Found {total} files",
        {"files": [FILE], "total": "integer", "limit": "integer", "offset": "integer"},
    ),
    Endpoint(
        "GET",
        "/config",
        "Server configuration",
        {
            "save_path": "string",
            "attention_mode": "string",
            "profile": "integer",
            "transformer_quantization": "string",
            "vae_config": "integer",
            "mmaudio_enabled": "integer",
        },
    ),
)
FILES = ("/download/{filename}", "/preview/{filename}")  # GET; answered with bytes

API_VERSION = "1.0.0"
HEALTHY = "healthy"
STATUSES = {"queued", "processing", "cancelling", "completed", "failed", "cancelled"}
FILE_TYPES = ("video", "image", "audio")
OUTPUTS_DEFAULTS = {"limit": 50, "offset": 0}
OUTPUTS_LIMIT = (1, 200)
PREVIEW_WIDTH_DEFAULT = 320
PREVIEW_WIDTH = (32, 1920)

# What a request that names only a prompt means, with `use_model_defaults` false.
DEFAULTS = {
    "negative_prompt": "",
    "resolution": "832x480",
    "video_length": 81,
    "num_inference_steps": 30,
    "guidance_scale": 5.0,
    "seed": -1,
    "batch_size": 1,
    "repeat_generation": 1,
    "flow_shift": 5.0,
    "use_model_defaults": True,
    "embedded_guidance_scale": 0,
}
IMAGES = ("image_start", "image_end", "image_refs")
# The first and the last value that a field takes.
LIMITS = {
    "video_length": (1, 1000),
    "num_inference_steps": (1, 100),
    "guidance_scale": (0, 20),
    "embedded_guidance_scale": (0, 20),
    "batch_size": (1, 10),
    "repeat_generation": (1, 10),
    "seed": (-1, 2**63 - 1),
    "flow_shift": (0.001, 100),
}
# The nearest value on either side that it refuses.
BEYOND = {
    "video_length": (0, 1001),
    "num_inference_steps": (0, 101),
    "guidance_scale": (-0.001, 20.001),
    "embedded_guidance_scale": (-0.001, 20.001),
    "batch_size": (0, 11),
    "repeat_generation": (0, 11),
    "seed": (-2, 2**63),
    "flow_shift": (0, 100.001),
}
PROMPT_CHARACTERS = (1, 10_000)
IMAGE_REFS_MOST = 10

# The models that the page's examples name, as it shows them.
SHOWN_MODEL = {
    "id": "wan_t2v_14B",
    "name": "Wan 2.1 Text to Video 14B",
    "family": "wan",
    "is_i2v": False,
    "is_t2v": True,
    "visible": True,
}
SHOWN_SETTINGS = {
    "resolution": "832x480",
    "video_length": 81,
    "num_inference_steps": 30,
    "guidance_scale": 5.0,
    "flow_shift": 5.0,
}
SHOWN_IMAGE_MODEL = "wan_i2v_14B"


def json_type(value: Any) -> str:
    """The JSON type of a decoded value; a number without a fraction that JSON wrote as one is an `integer`."""
    names = {bool: "boolean", int: "integer", float: "number", str: "string", dict: "object", list: "array"}
    return names.get(type(value), "null")


def misfits(value: Any, shape: Any, where: str = "answer") -> list[str]:
    """Where `value` has not the documented shape, a sentence each. Keys that the shape does not name are additions."""
    if isinstance(shape, str):
        found, allowed = json_type(value), shape.split("|")
        fits = found in allowed or (found == "integer" and "number" in allowed)
        return [] if fits else [f"{where} is {found}, documented {shape}"]
    if isinstance(shape, list):
        if not isinstance(value, list):
            return [f"{where} is no array"]
        return [fault for place, item in enumerate(value) for fault in misfits(item, shape[0], f"{where}[{place}]")]
    if not isinstance(value, dict):
        return [f"{where} is no object"]
    missing = [f"{where}.{key} is missing" for key in shape if key not in value]
    inside = (misfits(value[key], inner, f"{where}.{key}") for key, inner in shape.items() if key in value)
    return missing + [fault for faults in inside for fault in faults]
