"""The embedded tiny text-to-video model: where its files are and which words it knows (numpy is all it imports)."""

from pathlib import Path

from dit_accel_assets.clips import check_prompt, vocabulary

__all__ = ["check_prompt", "model_path", "vocabulary"]


def model_path() -> Path:
    """Return the folder of the embedded model, which `WanPipeline.from_pretrained` loads."""
    return Path(__file__).parent / "models" / "wan-tiny"
