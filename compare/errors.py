"""What can go wrong in a comparison. An engine's failure is data (a cell with a reason); only these stop the program."""

from __future__ import annotations


class CompareError(Exception):
    """A mistake in what was asked, or a machine that can't do it; the message says what to do."""


class SetupError(CompareError):
    """An engine's environment could not be made; carries the installer's last words."""


class EngineFailure(CompareError):
    """An engine crashed, hung, refused or lied. Costs its own cells only.

    kind: crash | timeout | error | unsupported | invalid. `invalid` means that the engine answered, but what it said can't be true.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
