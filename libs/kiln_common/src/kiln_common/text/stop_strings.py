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
        # Of the text held back, the leading characters that came too early to complete a stop string.
        self._num_early = 0
        self.matched: str | None = None
        """The stop string that was found; nothing comes out after it."""

    def push(self, text: str, *, is_early: bool = False) -> str:
        """The text that is certain to stand before any stop string.

        No stop string ends in text that `is_early`; one may begin there.
        """
        if self.matched is not None:
            return ""
        if not self._stops:
            return text
        pending = self._held + text
        num_early = len(pending) if is_early else self._num_early
        if found := self._first_in(pending, num_early):
            position, self.matched = found
            self._held = ""
            return pending[:position]
        num_out = len(pending) - longest_held_suffix(pending, self._stops)
        self._held, self._num_early = pending[num_out:], max(num_early - num_out, 0)
        return pending[:num_out]

    def _first_in(self, text: str, num_early: int) -> tuple[int, str] | None:
        """Where the first stop string begins that ends behind `num_early` characters, and which it is."""
        places = ((text.find(stop, max(num_early - len(stop) + 1, 0)), stop) for stop in self._stops)
        return min(((place, stop) for place, stop in places if place >= 0), default=None)

    def finish(self) -> str:
        """The text still held back, now that nothing follows."""
        held, self._held = self._held, ""
        return held
