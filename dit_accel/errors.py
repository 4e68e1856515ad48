"""The errors dit-accel raises: what was requested, what was found, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class DitAccelError(Exception):
    """Base of every error of ours; the command line prints its text as one line and exits with 2."""


class ConfigError(DitAccelError, ValueError):
    """A method, option or size that is wrong in itself or does not fit the others."""


class MissingOption(ConfigError):  # noqa: N818 - reads as what it is
    """An option, or another method, that has no usual value on the model and was not given.

    Attributes:
        needs: what must be given, such as ``layers``.
    """

    def __init__(self, text: str, needs: str) -> None:
        super().__init__(text)
        self.needs = needs


class UnsupportedModel(DitAccelError, LookupError):  # noqa: N818 - reads as what it is
    """A pipeline, transformer or processor that no adapter covers."""


class AttachError(DitAccelError, RuntimeError):
    """Attach or detach requested in a state that does not allow it."""


class MissingBackend(DitAccelError, RuntimeError):  # noqa: N818 - reads as what it is
    """A backend named by the user that cannot run here."""


class ProcessLost(DitAccelError, RuntimeError):  # noqa: N818 - reads as what it is
    """Another process of those that run a transformer together ended, or no longer answers."""


class Busy(DitAccelError, RuntimeError):  # noqa: N818 - reads as what it is
    """Another run is writing what this one would write."""


def install(part: str) -> str:
    """Spell how to install an extra (``"eval"``) or the embedded models (``"assets"``); no index has them."""
    what = "./assets" if part == "assets" else f"./kernels ./assets '.[{part}]'"
    return f"in a checkout of dit-accel, pip install {what}"


LONG_LIST = 32
"""The most names that an error lists. Of more (the models) it gives the near ones, and the command that lists all."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? known: a, b, x"`` for a name that is not among ``known``.

    Of more than `LONG_LIST` names it gives at most three near ones, and where all are listed.
    """
    names = sorted(known)
    short = len(names) <= LONG_LIST
    near = get_close_matches(name, names, n=1 if short else 3, cutoff=0.5)
    if short:
        listed = f"known: {', '.join(names)}" if names else "none are known"
    else:
        listed = f"{len(names)} are known, `dit-accel models` lists them all"
    return f"did you mean {' or '.join(map(repr, near))}? {listed}" if near else listed
