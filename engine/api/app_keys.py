"""What handlers find in the application and in a request, and the keys that they find it under."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from engine.admission import Admission
from engine.api.config import Config
from engine.catalog.download import Downloads
from engine.catalog.models import Catalog
from engine.files.inputs import Inputs
from engine.files.outputs import Outputs
from engine.files.spool import Spool
from engine.queue.queue import TaskQueue
from engine.turns import Turns
from engine.workers.local import Engine

API = "/api/v1"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

CONFIG = web.AppKey("config", Config)
TOKEN = web.AppKey("token", bytes)  # empty: no login is required
CATALOG = web.AppKey("catalog", Catalog)
ADMISSION = web.AppKey("admission", Admission)
ENGINES = web.AppKey("engines", list[Engine])
QUEUE = web.AppKey("queue", TaskQueue)
OUTPUTS = web.AppKey("outputs", Outputs)
DOWNLOADS = web.AppKey("downloads", Downloads)
INPUT_FILES = web.AppKey("input_files", Inputs)
SPOOL = web.AppKey("spool", Spool)
TURNS = web.AppKey("turns", Turns)  # at taking large bodies apart, and at decoding what they hold
DOCUMENT = web.AppKey("document", dict)  # the OpenAPI document, once a client has asked for it

REQUEST_ID = web.RequestKey("request_id", str)
REFUSAL = web.RequestKey("refusal", web.HTTPException)  # why it is not answered, if that is so from the start
ENDS_WITH_CLIENT = web.RequestKey("ends_with_client", bool)  # the handler changes nothing, and may be cancelled
CLIENT = web.RequestKey("client", str)  # address of the client, as far as it is known
DIGEST = web.RequestKey("digest", str)  # SHA-256 of the body
BODY, QUERY, PATH = (web.RequestKey(name, dict) for name in ("body", "query", "path"))
