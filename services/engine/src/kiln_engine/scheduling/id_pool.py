"""Reference-counted ids of a fixed range: what pages and state slots have in common."""

from __future__ import annotations

from kiln_common.errors import KilnError


class IdPool:
    """Counts who uses each id of 0..num_ids-1; the tensors behind the ids live elsewhere.

    An id is free, or has at least one reference. The prefix tree's reference is marked with
    `mark_cached`, so that the pool knows at any time how many ids only the tree holds: those are
    the ids that eviction can free.

    Invariant: num_free + num_referenced == num_ids.
    """

    def __init__(self, num_ids: int) -> None:
        if num_ids < 1:
            raise ValueError(f"a pool needs at least one id, got {num_ids}")
        self.num_ids = num_ids
        # Lowest ids are handed out first.
        self._free = list(range(num_ids - 1, -1, -1))
        self._refs: dict[int, int] = {}
        self._cached: set[int] = set()
        self._num_only_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_referenced(self) -> int:
        return len(self._refs)

    @property
    def num_cached(self) -> int:
        """Ids the prefix tree refers to."""
        return len(self._cached)

    @property
    def num_only_cached(self) -> int:
        """Ids that nobody but the prefix tree refers to."""
        return self._num_only_cached

    def take(self, count: int) -> list[int]:
        """Reserve `count` ids with one reference each, all or none.

        Raises:
            OutOfPages, OutOfStateSlots: fewer than `count` are free; nothing was reserved.
        """
        if count > len(self._free):
            raise self._exhausted(count)
        taken = [self._free.pop() for _ in range(count)]
        self._refs.update(dict.fromkeys(taken, 1))
        return taken

    def retain(self, item: int) -> None:
        """Add a reference to an id in use."""
        refs = self._refs[item]
        if refs == 1 and item in self._cached:
            self._num_only_cached -= 1
        self._refs[item] = refs + 1

    def release(self, item: int) -> None:
        """Drop a reference; the last one frees the id."""
        refs = self._refs[item]
        if refs == 1:
            assert item not in self._cached, "the tree's own reference goes through uncache"
            del self._refs[item]
            self._free.append(item)
            return
        self._refs[item] = refs - 1
        if refs == 2 and item in self._cached:
            self._num_only_cached += 1

    def mark_cached(self, item: int) -> None:
        """Declare one of the id's references to be the prefix tree's."""
        assert item not in self._cached
        self._cached.add(item)
        if self._refs[item] == 1:
            self._num_only_cached += 1

    def uncache(self, item: int) -> None:
        """Drop the prefix tree's reference."""
        self._cached.remove(item)
        if self._refs[item] == 1:
            self._num_only_cached -= 1
        self.release(item)

    def num_references(self, item: int) -> int:
        """References to an id; 0 when it is free."""
        return self._refs.get(item, 0)

    def is_only_cached(self, item: int) -> bool:
        return item in self._cached and self._refs[item] == 1

    def _exhausted(self, wanted: int) -> KilnError:
        raise NotImplementedError
