"""Every exception that minfer raises on purpose.

The message is one sentence a user can act on: what was wrong, where, what to do. The type says whose fault it was, which
is all that a caller needs in order to react: the server maps it to an HTTP status, the command line to an exit code.
"""

from __future__ import annotations


class MinferError(Exception):
    """Base of all of them: `except MinferError` catches what minfer can explain, and nothing else."""


class ConfigError(MinferError, ValueError):
    """A setting is out of range or two settings contradict each other; raised when the config is built."""


class ModelLoadError(MinferError):
    """A checkpoint is missing, damaged, or of a kind that minfer can't run."""


class RequestError(MinferError, ValueError):
    """The caller's request can't be served as it is (HTTP 400). `param` names the offending field, `code` is OpenAI's."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class CapacityError(MinferError):
    """Nothing is wrong with the request or the setting, there is just no room (HTTP 429 or 503)."""


class EngineDeadError(MinferError):
    """The engine stopped after an internal failure; every request in flight was failed with this."""
