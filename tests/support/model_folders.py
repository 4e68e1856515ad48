"""Model folders around the embedded model's weights, for tests that load pipelines by name."""

import json
from pathlib import Path
from typing import Any

from dit_accel_assets import model_path


def model_folder(folder: Path, transformer: dict[str, Any] | None = None, **index: Any) -> Path:
    """Make a folder of the embedded model with other entries in its ``model_index.json``; weights are links.

    Args:
        folder: made if missing.
        transformer: other values of the transformer's config; None takes one out.
        index: other entries of the index.
    """
    for source in model_path("wan-plain").rglob("*.*"):
        target = folder / source.relative_to(model_path("wan-plain"))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)
    for name, changes in (("model_index.json", index), ("transformer/config.json", transformer or {})):
        config = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).unlink()
        (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder
