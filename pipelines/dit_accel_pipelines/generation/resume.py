"""Which outputs of a request are there already: those whose side-car tells the same request."""

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from dit_accel.files import json_text

from .inputs import inputs_of
from .lora import Lora, lora_file
from .pipeline_call import PICTURES
from .request import Request, side_car_path
from .weights import weight_files

APART = ("output", "device", "max_memory")
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
    files = [(lora, lora_file(lora.name)) for lora in map(Lora.of, request.lora)]
    text["lora"] = [[lora.component, lora.weight, _content(file) if file else lora.name] for lora, file in files]
    text["transformer"] = {name: _content(file) for name, file in weight_files(request).items()}
    return hashlib.sha256(json_text(text).encode()).hexdigest()


def _content(file: Path) -> str:
    """Hash a file of weights, once as long as it is not written again."""
    state = file.stat()
    return _hashed(file, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=64)
def _hashed(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def kept_record(request: Request) -> dict[str, Any] | None:
    """Return the side-car of an output that stands for a resolved request; None: it must be made."""
    path = side_car_path(request.output)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("request_digest") == request_digest(request)
    return record if same and request.output.exists() else None
