"""The API documentation, and the way there: Swagger UI at /api/docs and ReDoc at /api/redoc, all from this machine.

Both viewers are static files of the package aiohttp-swagger3; nothing of it is imported.
"""

import importlib.util
from pathlib import Path

from aiohttp import hdrs, web

from engine.api.answers import answered, link
from engine.api.app_keys import CONFIG, Handler

SWAGGER = "SwaggerUIBundle({url: 'openapi.json', dom_id: '#viewer', deepLinking: true})"
REDOC = "Redoc.init('openapi.json', {disableSearch: false}, document.getElementById('viewer'))"
# Name → folder in the package, style sheet, script, and the line that starts the viewer.
VIEWERS = {
    "docs": ("swagger_ui", "swagger-ui.css", "swagger-ui-bundle.js", SWAGGER),
    "redoc": ("redoc_ui", "google-fonts.css", "redoc.standalone.js", REDOC),
}
PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>wangpd API</title>
<link rel="stylesheet" href="{name}/files/{css}"><link rel="icon" href="data:,">
<body style="margin: 0"><div id="viewer"></div>
<script src="{name}/files/{script}"></script><script src="{name}/start.js"></script>
"""


def add_viewers(app: web.Application) -> None:
    """Register the pages and their files."""
    for path in ("/", "/api", "/api/"):
        app.router.add_get(path, front_door)
    package = importlib.util.find_spec("aiohttp_swagger3")
    assert package and package.submodule_search_locations
    root = Path(package.submodule_search_locations[0])
    for name, (folder, css, script, start) in VIEWERS.items():
        app.router.add_get(f"/api/{name}", _fixed(PAGE.format(name=name, css=css, script=script), "text/html"))
        app.router.add_get(f"/api/{name}/start.js", _fixed(start, "text/javascript"))
        app.router.add_static(f"/api/{name}/files", root / folder)


async def front_door(request: web.Request) -> web.Response:
    """Send a browser to the documentation, and tell a program where the API is."""
    base = request.app[CONFIG].base_path
    vary = {hdrs.VARY: hdrs.ACCEPT}
    if "text/html" in request.headers.get(hdrs.ACCEPT, ""):
        raise web.HTTPFound(f"{base}/api/docs", headers=vary)
    places = {"api": link(request.app, "/"), "docs": f"{base}/api/docs", "openapi": f"{base}/api/openapi.json"}
    return answered(f"wangpd; the API is at {places['api']}", places, headers=vary)


def _fixed(text: str, content_type: str) -> Handler:
    """Return a handler that always answers `text`."""

    async def handler(request: web.Request) -> web.Response:
        if request.raw_path.partition("?")[0].endswith("/"):  # from there the page's relative links would lead nowhere
            raise web.HTTPMovedPermanently(request.app[CONFIG].base_path + request.path)
        return web.Response(text=text, content_type=content_type)

    return handler
