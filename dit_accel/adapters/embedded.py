"""The embedded models, which a distribution of their own holds: what serves large models need not carry them."""

from ..errors import ConfigError, install


def embedded_names() -> tuple[str, ...]:
    """Return the names of the embedded models, none where dit-accel-assets is not installed."""
    try:
        return assets().model_names()
    except ConfigError:
        return ()


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
