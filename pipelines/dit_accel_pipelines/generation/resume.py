"""Which outputs of a request are there already: those whose side-car tells the same request."""

import dataclasses
import hashlib
import json
from typing import Any

from dit_accel.files import json_text

from .inputs import inputs_of
from .lora import lora_file
from .pipeline_call import PICTURES
from .request import Request, side_car_path

APART = ("output", "device")
"""What makes no other picture, or is compared by itself."""


def request_digest(request: Request) -> str:
    """Hash a resolved request, wherever its output lies; hexadecimal."""
    text: dict[str, Any] = {
        field.name: getattr(request, field.name) for field in dataclasses.fields(request) if field.name not in APART
    }
    text["suffix"] = request.output.suffix
    text["methods"] = {method.name: method.to_dict() for method in request.methods}
    for option in PICTURES:
        files = [file for file in inputs_of(request) if file.option == option]
        text[option] = [[file.name, hashlib.sha256(file.path.read_bytes()).hexdigest()] for file in files]
    file = lora_file(request.lora) if request.lora else None
    text["lora"] = hashlib.sha256(file.read_bytes()).hexdigest() if file else request.lora
    return hashlib.sha256(json_text(text).encode()).hexdigest()


def kept_record(request: Request) -> dict[str, Any] | None:
    """Return the side-car of an output that stands for a resolved request; None: it must be made."""
    path = side_car_path(request.output)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("request_digest") == request_digest(request)
    return record if same and request.output.exists() else None
