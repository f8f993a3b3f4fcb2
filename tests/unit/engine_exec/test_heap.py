"""What start-up made is not walked again."""

from __future__ import annotations

import gc

from kiln_engine.heap import freeze_heap


def test_objects_alive_at_the_freeze_are_left_out_of_collections():
    kept, before = [[] for _ in range(1000)], gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    try:
        freeze_heap()
        assert gc.get_freeze_count() >= len(kept)
        assert len(gc.get_objects()) < gc.get_freeze_count()
        assert gc.get_threshold() > (700, 10, 10)  # full ones come more rarely, too
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
