"""The routes of the API, each with its description, and the OpenAPI document that is made of those descriptions."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from aiohttp import hdrs, web
from aiohttp_apispec import docs, request_schema, response_schema
from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from marshmallow import Schema, fields

from engine.api.app_keys import API, Handler
from engine.api.requests import EXAMPLES, FORMS, PATH_FIELDS
from engine.api.schemas import ERRORS, Failure, envelope
from engine.files.media import MEDIA_TYPES

JSON_TYPE = "application/json"
FORM_TYPE = "multipart/form-data"
JPEG_TYPE = "image/jpeg"
BYTES_TYPE = "application/octet-stream"  # the only binary type that most generators of clients know
MEDIA_ANSWER = tuple(sorted({content_type for _, content_type in MEDIA_TYPES.values()}))
TOKEN = "The token of `token_file`, where one is configured."


class Routes(web.RouteTableDef):
    """A table of routes that are described where they are registered."""

    def operation(
        self,
        tag: str,
        route: str,
        answer: type[Schema] | Sequence[str],
        *errors: int,
        body: type[Schema] | None = None,
        query: type[Schema] | None = None,
        headers: Sequence[Mapping[str, Any]] = (),
        bare: bool = False,
    ) -> Callable[[Handler], Handler]:
        """Register a handler under a `route` such as "GET /queue"; its docstring is the summary in the document.

        `answer` is in the contract's envelope unless it is `bare`; media types stand for a file. `errors` come besides
        401, 403 and 500. The valid values of path, `body` and `query` are in the request under PATH, BODY and QUERY.
        """
        method, path = route.split(maxsplit=1)
        names = re.findall(r"{(\w+)", path)
        in_path = Schema.from_dict({name: PATH_FIELDS[name] for name in names}) if names else None

        def describe(handler: Handler) -> Handler:
            for status in sorted({*errors, 401, 403, 500}):
                response_schema(Failure, status, description=ERRORS[status])(handler)
            if isinstance(answer, type):
                response_schema(answer if bare else envelope(answer), 200, description="Done.")(handler)
            for location, schema in (("match_info", in_path), ("json", body), ("querystring", query)):
                if schema:
                    request_schema(schema, location=location)(handler)
            docs(
                tags=[tag],
                summary=(handler.__doc__ or "").rstrip("."),
                operationId=handler.__name__,
                parameters=list(headers),
                responses={} if isinstance(answer, type) else _file_answers(answer),
            )(handler)
            return self.route(method, API + path)(handler)

        return describe


def _file_answers(kinds: Sequence[str]) -> dict[str, Any]:
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (*kinds, BYTES_TYPE)}
    return {
        "200": {"description": "The whole file.", "content": content},
        "206": {"description": "The requested range.", "content": content},
        "304": {"description": "The client's copy is still right.", "content": {}},
    }


def _operations(app: web.Application) -> Iterator[tuple[str, str, Any]]:
    """Yield path, method and handler of every described route."""
    for route in app.router.routes():
        if hasattr(route.handler, "__apispec__") and route.resource and route.method != hdrs.METH_HEAD:
            yield route.resource.canonical, route.method, route.handler


def endpoints(app: web.Application) -> dict[str, str]:
    """Return the method and path of each described handler, by the handler's name."""
    return {handler.__name__: f"{method} {path}" for path, method, handler in _operations(app)}


def api_document(app: web.Application) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of all described routes; aiohttp-apispec itself writes Swagger 2.0."""
    plugin = MarshmallowPlugin()
    spec = APISpec(
        title="wangpd",
        version=version(),
        openapi_version="3.1.0",
        plugins=[plugin],
        info={
            "summary": "Video from prompts: the WanGP HTTP API over diffusers",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        servers=[{"url": "../"}],  # relative to this document, so right behind any proxy path
        security=[{}, {"token": []}],
    )
    spec.components.security_scheme("token", {"type": "http", "scheme": "bearer", "description": TOKEN})
    converter: Any = plugin.converter
    converter.add_attribute_function(_base64_keywords)
    converter.add_attribute_function(_choice_or_null)
    for path, method, handler in _operations(app):
        if path != API:  # is API/ as well
            spec.path(path=path, operations={method.lower(): _operation(handler.__apispec__, converter)})
    return dict(spec.to_dict())


def _operation(about: Mapping[str, Any], converter: Any) -> dict[str, Any]:
    operation: dict[str, Any] = {name: about[name] for name in ("tags", "summary", "operationId")}
    parameters = list(about["parameters"])
    for sent in about["schemas"]:
        if sent["location"] == "json":
            kind = type(sent["schema"])
            content = {JSON_TYPE: {"schema": kind, "example": EXAMPLES[kind]}}
            form = {FORM_TYPE: {"schema": FORMS[kind]}} if kind in FORMS else {}
            operation["requestBody"] = {"required": True, "content": content | form}
        else:
            place = {"match_info": "path", "querystring": "query"}[sent["location"]]
            parameters += converter.schema2parameters(sent["schema"], location=place)
    operation["responses"] = {
        code: {
            "description": answer["description"],
            "content": answer["content"] if "content" in answer else {JSON_TYPE: {"schema": answer["schema"]}},
        }
        for code, answer in about["responses"].items()
    }
    return operation | ({"parameters": parameters} if parameters else {})


def _base64_keywords(_converter: Any, field: fields.Field[Any], **_: Any) -> dict[str, Any]:
    """The keywords of a file, which apispec does not pass on from a field's metadata."""
    return {word: about for word, about in field.metadata.items() if word.startswith("content")}


def _choice_or_null(_converter: Any, _field: fields.Field[Any], ret: dict[str, Any]) -> dict[str, Any]:
    """Null apart from the choices, of which generators would otherwise make several types."""
    if None not in ret.get("enum", ()):
        return {}
    kind = {"type": ret.pop("type")[0], "enum": [choice for choice in ret.pop("enum") if choice is not None]}
    return {"anyOf": [kind, {"type": "null"}]}


def version() -> str:
    """Return the installed version of wangpd, or "0" in a checkout that was never installed."""
    try:
        return metadata.version("wangpd")
    except metadata.PackageNotFoundError:
        return "0"
