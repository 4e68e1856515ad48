"""The JSON Schema of what `Report.to_dict` gives, for tools that read reports and side-cars."""

from collections.abc import Mapping
from typing import Any, get_args

from .clock import KINDS
from .recorder import Why
from .report import VERSION

_NUMBER, _TEXT, _FREE = {"type": "number"}, {"type": "string"}, {"type": "object"}
_COUNT = {"type": "integer", "minimum": 0}
_MAYBE = {"type": ["number", "null"]}
_TEXTS = {"type": "array", "items": _TEXT}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _list_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": _object(properties)}


def report_schema() -> dict[str, Any]:
    """Return the schema, JSON Schema draft 2020-12; ``version`` in a report tells which one describes it.

    The version goes up when a key goes or changes its meaning; a new key leaves it as it is. What single methods report
    (``methods``, ``sections``) is theirs, and described no further.
    """
    forward = {"transformer": _TEXT, "step_index": _COUNT, "branch": _TEXT}
    share = {"type": "number", "minimum": 0}
    stayed = {"type": "object", "propertyNames": {"enum": list(get_args(Why))}, "additionalProperties": _COUNT}
    seconds = {"seconds": _NUMBER, "before": _NUMBER, "lists": _NUMBER}
    parts = {name: _MAYBE for name in ("attention", "text", "fetching")}
    totals = {name: _NUMBER for name in ("total_seconds", "elapsed_seconds")}
    each = _list_of({**forward, "kind": {"enum": list(KINDS)}, **seconds, **parts, "compiled": {"type": "boolean"}})
    figures = {name: _MAYBE for name in ("speedup", "loop_speedup", "dense_seconds", "call_seconds", "attention_share")}
    timing = {**figures, **totals, "forwards": each}
    step = {**forward, "dense_layers": _COUNT, "sparse_layers": _COUNT, "density": share, "pooled": share}
    call = {**forward, "layer": _COUNT, "density": share, "pooled": share}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dit-accel report",
        **_object(
            {
                "version": {"const": VERSION},
                "measured_speedup": _MAYBE,
                "predicted_speedup": _MAYBE,
                "not_in_prediction": _TEXTS,
                "why_not_faster": _TEXTS,
                "methods": {"type": "object", "additionalProperties": _FREE},
                "backend": _TEXT,
                "model": {"type": "object", "additionalProperties": _TEXT},
                "density": share,
                "sparse_density": _MAYBE,
                "steps": _list_of({**step, "stayed": stayed}),
                "calls": _list_of({**call, "by_head": {"type": "array", "items": share}}),
                "notes": _TEXTS,
                "state_bytes": {"type": "object", "additionalProperties": _COUNT},
                "sections": {"type": "object", "additionalProperties": _FREE},
                "timing": _object(timing),
            }
        ),
    }
