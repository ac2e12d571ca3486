"""Stop strings in a stream of text.

A stop string may arrive in pieces, so text that could still become one is withheld; text that can't is passed on at once.
The law (a property test holds it): what is emitted, joined, is the whole text cut at its leftmost stop string, however the
text was cut into pieces. Of two that begin at the same place the shorter wins, since it is complete first.

Leftmost means that with stops "cd" and "abcdef" the text "abcd" is not decided yet: "abcdef", which began earlier, may still
come. It is withheld until one more piece or `finish()` decides, so that the result never depends on how tokens were cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from minfer.errors import RequestError


class StopMatcher:
    """Feed it text, send on what it returns. `matched` is the stop string that was found, or None.

    `include` keeps the stop string itself at the end of the text. An empty stop string is a RequestError: it would match
    everywhere.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if any(not stop for stop in stops):
            raise RequestError("A stop string must not be empty.", param="stop")
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece of text; return what may be shown now. After a match it returns "" for ever."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        start, stop = self._leftmost(text)
        open_at = self._open_prefix(text)
        if start <= open_at and stop is not None:
            return self._cut(text, start, stop)
        self._held = text[open_at:]
        return text[:open_at]

    def finish(self) -> str:
        """The text has ended, so nothing withheld can grow any more: return it, cut at a stop string that it contains."""
        text, self._held = self._held, ""
        start, stop = self._leftmost(text)
        return self._cut(text, start, stop) if stop is not None else text

    def _leftmost(self, text: str) -> tuple[int, str | None]:
        """Where the first complete stop string begins, and which; (len(text), None) if there is none."""
        found = [(position, len(stop), stop) for stop in self._stops if (position := text.find(stop)) >= 0]
        if not found:
            return len(text), None
        position, _, stop = min(found)
        return position, stop

    def _open_prefix(self, text: str) -> int:
        """The first place from which the text runs to its end as the beginning of a stop string; len(text) if there is none."""
        for position in range(max(0, len(text) - self._longest + 1), len(text)):
            tail = text[position:]
            if any(len(stop) > len(tail) and stop.startswith(tail) for stop in self._stops):
                return position
        return len(text)

    def _cut(self, text: str, start: int, stop: str) -> str:
        self.matched, self._held = stop, ""
        return text[: start + len(stop)] if self._include else text[:start]
