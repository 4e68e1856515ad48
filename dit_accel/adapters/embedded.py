"""The embedded models, which a distribution of their own holds: what serves large models need not carry them."""

from pathlib import Path

from ..errors import ConfigError, install


def embedded_names() -> tuple[str, ...]:
    """Return the names of the embedded models, none where dit-accel-assets is not installed."""
    try:
        return assets().model_names()
    except ConfigError:
        return ()


def embedded_at(source: str) -> str | None:
    """Return the name of the embedded model whose folder a source is; None: it is none of theirs."""
    path = Path(source).resolve()
    return next((name for name in embedded_names() if path == assets().model_path(name).resolve()), None)


def assets():
    """Return the package `dit_accel_assets`, which nothing else of dit-accel imports."""
    try:
        import dit_accel_assets
    except ModuleNotFoundError as error:
        if error.name != "dit_accel_assets":
            raise
        raise ConfigError(
            "an embedded model was requested, and dit-accel-assets, which holds them, is not installed; "
            f"{install('assets')}"
        ) from None
    return dit_accel_assets
