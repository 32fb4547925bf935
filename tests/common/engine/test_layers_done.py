"""When layers are told of: at once on a CPU, and on a GPU when it is through with them; its events say when they were asked."""

from __future__ import annotations

import pytest
import torch

from common.engine.layers_done import told_when_computed


def test_on_a_cpu_nothing_is_put_off() -> None:
    told: list[int] = []
    with told_when_computed(told.append, torch.device("cpu")) as layer_done:
        assert layer_done is not None
        layer_done(1)
        assert told == [1]
    with told_when_computed(None, torch.device("cuda")) as layer_done:
        assert layer_done is None


def test_on_a_gpu_a_layer_is_told_of_when_its_event_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.number = Event.count

        def record(self) -> None:
            happened.append(f"queued {self.number}")

        def synchronize(self) -> None:
            happened.append(f"computed {self.number}")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    with told_when_computed(lambda count: happened.append(f"told {count}"), torch.device("cuda")) as layer_done:
        assert layer_done is not None
        layer_done(1)
        layer_done(2)
    assert happened == ["queued 1", "queued 2", "computed 1", "told 1", "computed 2", "told 2"]


def test_a_step_that_ends_early_tells_of_nothing() -> None:
    told: list[int] = []
    with pytest.raises(KeyError), told_when_computed(told.append, torch.device("cuda")):
        raise KeyError
    assert told == []
