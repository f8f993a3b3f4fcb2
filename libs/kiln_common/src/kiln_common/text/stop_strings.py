"""Stop strings in a stream of text, wherever its pieces happen to be cut."""

from __future__ import annotations

from collections.abc import Sequence


def longest_held_suffix(text: str, markers: Sequence[str]) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of one of `markers`."""
    longest = max(map(len, markers), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        suffix = text[-length:]
        if any(len(marker) > length and marker.startswith(suffix) for marker in markers):
            return length
    return 0


class StopStringMatcher:
    """Lets text through until a stop string appears; the stop string itself never comes out.

    Text that may yet become a stop string is held back until it is decided.
    """

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stops = tuple(stop_strings)
        self._held = ""
        self.matched: str | None = None
        """The stop string that was found; nothing comes out after it."""

    def push(self, text: str) -> str:
        """The text that is certain to stand before any stop string."""
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        pending = self._held + text
        position, stop = min(
            ((pending.find(stop), stop) for stop in self._stops if stop in pending), default=(-1, "")
        )
        if position >= 0:
            self.matched, self._held = stop, ""
            return pending[:position]
        num_held = longest_held_suffix(pending, self._stops)
        self._held = pending[len(pending) - num_held :]
        return pending[: len(pending) - num_held]

    def finish(self) -> str:
        """The text still held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held
