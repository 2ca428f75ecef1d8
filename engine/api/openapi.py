"""The OpenAPI document: how a handler is described, and OpenAPI 3.1 from those descriptions."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from aiohttp import hdrs, web
from aiohttp_apispec import AiohttpApiSpec, docs, request_schema, response_schema
from apispec import APISpec
from marshmallow import Schema, fields

from engine.api.keys import API, Handler
from engine.api.schemas import Failure, envelope

JSON_TYPE = "application/json"
ERRORS = {
    400: "Bad request: the sentence names the field, the value and the rule.",
    401: "A token is required, and none or a wrong one came.",
    403: "Requested under a host name that is not allowed, or by a web page of another site.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    413: "The body is larger than `max_body_mb`.",
    416: "The file has no such range.",
    500: "A fault of the server.",
    503: "Shutting down, or the queue is full: try again after `Retry-After` seconds.",
}
ANY_BYTES: Mapping[str, Any] = {"*/*": {"schema": {}}}
FILE_ANSWERS = {
    "200": {"description": "The whole file.", "content": ANY_BYTES},
    "206": {"description": "The requested range.", "content": ANY_BYTES},
    "304": {"description": "The client's copy is still right.", "content": {}},
}
LOCATIONS = {"path": "match_info", "query": "querystring", "body": "json"}


def operation(
    tag: str,
    summary: str,
    answer: type[Schema] | None,
    *errors: int,
    headers: Sequence[Mapping[str, Any]] = (),
    bare: bool = False,
    **inputs: type[Schema],
) -> Callable[[Handler], Handler]:
    """Describe a handler: its answer (None: a file), the errors that it gives besides 500, and its input schemas.

    The answer is in the contract's envelope unless it is `bare`.
    The inputs are `path`, `query` and `body`; the validated values are in the request under PATH, QUERY and BODY.
    """

    def describe(handler: Handler) -> Handler:
        for status in sorted({*errors, 401, 403, 500}):
            response_schema(Failure, status, description=ERRORS[status])(handler)
        if answer:
            response_schema(answer if bare else envelope(answer), 200, description="Done.")(handler)
        else:
            docs(responses=FILE_ANSWERS)(handler)
        for place, schema in inputs.items():
            request_schema(schema, location=LOCATIONS[place])(handler)
        about = {"tags": [tag], "summary": summary, "operationId": handler.__name__, "parameters": list(headers)}
        described: Handler = docs(**about)(handler)
        return described

    return describe


def endpoints(app: web.Application) -> dict[str, str]:
    """Return the method and path of each described handler, by the handler's name."""
    return {
        route.handler.__name__: f"{route.method} {route.resource.canonical}"
        for route in app.router.routes()
        if hasattr(route.handler, "__apispec__") and route.resource and route.method != hdrs.METH_HEAD
    }


class OpenApi(AiohttpApiSpec):  # type: ignore[misc]  # the package has no types
    """aiohttp-apispec writes Swagger 2.0; this writes OpenAPI 3.1 from the same decorators."""

    def __init__(self) -> None:
        super().__init__(url=None, title="wangpd", version=version())
        self.spec = APISpec(
            title="wangpd",
            version=version(),
            openapi_version="3.1.0",
            plugins=[self.plugin],
            info={
                "summary": "Video from prompts: the WanGP HTTP API over diffusers",
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            servers=[{"url": "../"}],  # relative to this document, so right behind any proxy path
        )
        self.plugin.converter.add_attribute_function(_base64_keywords)

    def document(self, app: web.Application) -> dict[str, Any]:
        """Return the document of all handlers that `operation` describes."""
        for route in app.router.routes():
            if route.method != hdrs.METH_HEAD and route.resource and route.resource.canonical != API:  # is API/ as well
                self._register_route(route, route.method.lower(), route.handler)
        return dict(self.spec.to_dict())

    def _update_paths(self, data: dict[str, Any], method: str, url_path: str) -> None:
        described = {name: data[name] for name in ("tags", "summary", "operationId", "parameters") if data[name]}
        for schema in data["schemas"]:
            described |= self._inputs(described.get("parameters", []), schema)
        described["responses"] = {code: _answer(answer) for code, answer in data["responses"].items()}
        self.spec.path(path=url_path, operations={method: described})

    def _inputs(self, parameters: list[Any], schema: Mapping[str, Any]) -> dict[str, Any]:
        if schema["location"] == "json":
            return {"requestBody": {"required": True, "content": {JSON_TYPE: {"schema": schema["schema"]}}}}
        place = {"match_info": "path", "querystring": "query"}[schema["location"]]
        found = self.plugin.converter.schema2parameters(schema["schema"], location=place)
        return {"parameters": parameters + found}


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    content = answer["content"] if "content" in answer else {JSON_TYPE: {"schema": answer["schema"]}}
    return {"description": answer["description"], "content": content}


def _base64_keywords(_converter: Any, field: fields.Field[Any], **_: Any) -> dict[str, Any]:
    """The keywords of a file, which apispec does not pass on from a field's metadata."""
    return {word: about for word, about in field.metadata.items() if word.startswith("content")}


def version() -> str:
    """Return the installed version of wangpd, or "0" in a checkout that was never installed."""
    try:
        return metadata.version("wangpd")
    except metadata.PackageNotFoundError:
        return "0"
