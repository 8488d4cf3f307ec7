"""The check of JSON data against a schema, with the fault in plain words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

from batchbench.errors import shown

_KINDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a text",
}

_MOST_FAULTS = 50
"""Number of faults among which the deepest is chosen."""


def fault_of(data: Any, schema: Mapping[str, Any]) -> str | None:
    """Return the fault of the data, as "name is value; it must be …"; None if it has none."""
    import jsonschema  # 0.1 s: errors of options should not wait for it

    faults = jsonschema.Draft202012Validator(schema).iter_errors(data)
    worst = jsonschema.exceptions.best_match(islice(faults, _MOST_FAULTS))
    return None if worst is None else _spell(worst)


def _spell(fault: Any) -> str:
    place, rule = ".".join(map(str, fault.absolute_path)), fault.validator_value
    at = place or "it"
    if fault.validator == "required":
        missing = next(name for name in rule if name not in fault.instance)
        return f"{place}{'.' if place else ''}{missing} is missing"
    if fault.validator == "additionalProperties" and isinstance(fault.instance, dict):
        known = fault.schema.get("properties", {})
        unknown = next((name for name in fault.instance if name not in known), "")
        return f"{at} has {unknown[:40]!r}, which is not known"
    right = {
        "type": _kinds(rule) if fault.validator == "type" else "",
        "minimum": f"at least {rule}",
        "exclusiveMinimum": f"above {rule}",
        "maximum": f"at most {rule}",
        "const": json.dumps(rule),
        "enum": f"one of {', '.join(map(str, rule))}" if fault.validator == "enum" else "",
        "pattern": f"of the form {rule}",
        "minItems": f"a list of at least {rule}",
        "maxItems": f"a list of at most {rule}",
        "minProperties": "an object that is not empty",
    }.get(fault.validator, "as the schema says")
    return f"{at} is {_shown(fault.instance)}; it must be {right}"


def _kinds(rule: str | list[str]) -> str:
    names = [rule] if isinstance(rule, str) else rule
    return " or ".join(_KINDS[name] for name in names)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{…}" if value else "{}"
    if isinstance(value, list):
        return "[…]" if value else "[]"
    return shown(json.dumps(value, ensure_ascii=False))
