"""Errors of this package that a caller may want to catch apart from ValueError and TypeError."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run here; the text says what is missing."""
