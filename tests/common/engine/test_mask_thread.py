"""The thread that works masks out counts them and their time."""

from __future__ import annotations

import threading
from typing import cast

from common.engine.grammar import MaskThread, NextMask


class Slow:
    def __init__(self, begun: threading.Event) -> None:
        self.thread = ""
        self._begun = begun

    def work_out(self) -> None:
        self.thread = threading.current_thread().name
        self._begun.wait(60)


def test_masks_are_counted_with_the_time_they_took() -> None:
    thread, begun = MaskThread(), threading.Event()
    assert thread.begin([]) is None
    masks = [Slow(begun), Slow(begun)]
    working = thread.begin(cast(list[NextMask], masks))
    assert working is not None
    assert thread.readings.count == 0
    begun.set()
    working.result(60)
    assert thread.readings.count == 2
    assert thread.readings.seconds > 0
    assert {mask.thread for mask in masks} == {"grammar masks_0"}
