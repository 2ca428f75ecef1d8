"""The check of schemathesis that a wrong value is refused, for a server that takes `"30"` for 30 and `""` for nothing.

The document names the types that a client should send. A value that breaks them and is accepted all the same is a
fault, unless it has that type once what is written as text is read: then accepting it is the promise.
"""

import json
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import jsonschema
import schemathesis
from schemathesis.core.failures import AcceptedNegativeData
from schemathesis.specs.openapi.checks import negative_data_rejection

LEFT_OUT = ("", "null", "none")


@schemathesis.check
def only_what_can_be_meant_is_accepted(ctx: Any, response: Any, case: Any) -> None:
    """What schemathesis finds accepted against its schema must fit it once it is read."""
    try:
        negative_data_rejection(ctx, response, case)
    except AcceptedNegativeData:
        if not (response.status_code == 200 and query_is_meant(response, case) and body_is_meant(response, case)):
            raise


def query_is_meant(response: Any, case: Any) -> bool:
    """True if the first value of each parameter in the address fits its schema."""
    given: dict[str, str] = {}
    for name, value in parse_qsl(urlsplit(response.request.url).query, keep_blank_values=True):
        given.setdefault(name, value)
    parameters = case.operation.definition.raw.get("parameters", [])
    return all(
        fits(given[item["name"]], item["schema"], case)
        for item in parameters
        if item["in"] == "query" and item["name"] in given
    )


def body_is_meant(response: Any, case: Any) -> bool:
    """True if there is no body, or a JSON object of which each known field fits its schema."""
    if not response.request.body or case.media_type != "application/json":
        return not response.request.body
    body = json.loads(response.request.body)
    reference = case.operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = case.operation.schema.raw_schema["components"]["schemas"][reference.rpartition("/")[2]]
    known = {name: about for name, about in schema["properties"].items() if name in body}
    return set(schema["required"]) <= body.keys() and all(
        fits(body[name], about, case) for name, about in known.items()
    )


def fits(value: Any, schema: dict[str, Any], case: Any) -> bool:
    """True if the value, or what it means as text, fits the schema."""
    whole = {**schema, "components": case.operation.schema.raw_schema["components"]}
    return any(jsonschema.Draft202012Validator(whole).is_valid(meaning) for meaning in meanings(value)) or (
        value in ([], [""]) or (isinstance(value, str) and value.strip().lower() in LEFT_OUT)
    )


def meanings(value: Any) -> list[Any]:
    """The value, and what it can mean: a number or a boolean that is written as text, a list of one."""
    found = [value, [value]]
    words = {"true": True, "1": True, "on": True, "yes": True, "false": False, "0": False, "off": False, "no": False}
    if isinstance(value, str | int) and str(value).strip().lower() in words:
        found.append(words[str(value).strip().lower()])
    if isinstance(value, str):
        try:
            found.append(json.loads(value))
        except ValueError:
            found.append("".join(value.split()).lower())  # a size or a duration
    return found
