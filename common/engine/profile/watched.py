"""An engine whose steps are timed, stage by stage.

    scheduler | prepare | the model: stages of the native step, or "layers" and "head" | sampling | account | events | rest

Whoever drives it names the stages of the scheduler on the same stopwatch.

The stages of a native step come from clocks within it, everything else from Python around it. "kernel calls" is what calling the
native step costs beyond what it does. What no stage accounts for is `rest`: there is no other way for the parts to make up the
whole. Torch computes its layers in one stage, for there is no clock in them. Nothing is sampled where the native head finds the
best tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from common.engine.batch import ScheduledBatch
from common.engine.engine import Engine
from common.engine.native.model import NativeModel
from common.engine.profile.stopwatch import Stopwatch
from common.engine.profile.work import Work, num_weights, work_of
from common.errors import EngineFailure

LAYERS, HEAD, CALLS, REST = "layers", "head", "kernel calls", "rest"
_ORDER = (
    "scheduler", "block copies", "prepare", "embed", "norm", "qkv", "rope, write", "attention", "output", "gate, up", "down",
    LAYERS, HEAD, CALLS, "masks", "sampling", "log-probabilities", "account", "events", REST,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """What the machine can do at best: bytes read from memory, operations in what the model computes in."""

    read_bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class StageProfile:
    """Of one step, on average. Shares of the limits are of what the stage must at least read and compute."""

    stage: str
    seconds: float
    share: float
    calls: float
    read_bytes: float = 0.0
    operations: float = 0.0
    share_of_bandwidth: float = 0.0
    share_of_peak: float = 0.0


@dataclass(frozen=True, slots=True)
class StepProfile:
    steps: int
    rows: float
    sequences: float
    tokens_in_kv: float  # of all sequences, after the step
    seconds: float
    stages: tuple[StageProfile, ...]

    @property
    def accounted(self) -> float:
        """The share of the time that stages account for."""
        return sum(stage.share for stage in self.stages if stage.stage != REST)


class WatchedEngine:
    """Times what is computed on the calling thread. An engine that was watched once stays so."""

    def __init__(self, engine: Engine, stopwatch: Stopwatch | None = None) -> None:
        if engine.group is not None:
            raise EngineFailure("a worker of several processes is not profiled: its stages are in all of them")
        self.stopwatch = Stopwatch() if stopwatch is None else stopwatch
        self._model = engine.runner.watch(self.stopwatch)
        self.engine = replace(engine, runner=self.stopwatch.around(engine.runner, copy_block="block copies"))
        self._native: Mapping[str, float] = self._model.watch() if isinstance(self._model, NativeModel) else {}
        self._before: dict[str, float] = {}
        self._batches: list[ScheduledBatch] = []

    @property
    def is_native(self) -> bool:
        return isinstance(self._model, NativeModel)

    def limits(self) -> Limits:
        """Measured now; takes a moment."""
        if isinstance(self._model, NativeModel):
            found = self._model.limits()
            rounded = self._model.computes_rounded
            return Limits(found.read_bytes_per_s, found.rounded_operations_per_s if rounded else found.operations_per_s)
        return _limits_of_torch(self.engine, self.stopwatch)

    def begin(self) -> None:
        """From here on steps count."""
        self.stopwatch.reset()
        self._before = dict(self._native)
        self._batches.clear()

    def step_done(self, batch: ScheduledBatch) -> None:
        self._batches.append(batch)

    def take(self, seconds: float, limits: Limits) -> StepProfile:
        """Of the steps since `begin`, which took so long altogether."""
        steps = len(self._batches)
        if not steps:
            raise EngineFailure("nothing was computed while the engine was watched")
        parts = self._parts()
        parts[REST] = max(0.0, seconds - sum(parts.values()))
        work: dict[str, Work] = {}
        for batch in self._batches:
            for stage, one in self._work(batch).items():
                work[stage] = work.get(stage, Work(0.0, 0.0)) + one
        calls = self.stopwatch.calls
        stages = []
        for stage in sorted(parts, key=_ORDER.index):
            done, spent = work.get(stage, Work(0.0, 0.0)), parts[stage]
            stages.append(
                StageProfile(
                    stage,
                    spent / steps,
                    spent / seconds if seconds else 0.0,
                    calls.get(stage, 0) / steps,
                    done.read_bytes / steps,
                    done.operations / steps,
                    done.read_bytes / spent / limits.read_bytes_per_s if spent else 0.0,
                    done.operations / spent / limits.operations_per_s if spent else 0.0,
                )
            )
        return StepProfile(
            steps,
            sum(batch.num_tokens for batch in self._batches) / steps,
            sum(len(batch.slices) for batch in self._batches) / steps,
            sum(item.start + len(item.token_ids) for batch in self._batches for item in batch.slices) / steps,
            seconds / steps,
            tuple(stages),
        )

    def _parts(self) -> dict[str, float]:
        parts = dict(self.stopwatch.seconds)
        if self.is_native:
            within = {stage: seconds - self._before.get(stage, 0.0) for stage, seconds in self._native.items()}
            around = parts.pop(LAYERS, 0.0) + parts.pop(HEAD, 0.0)
            parts |= within
            parts[CALLS] = max(0.0, around - sum(within.values()))
        return parts

    def _work(self, batch: ScheduledBatch) -> dict[str, Work]:
        engine = self.engine
        found = work_of(batch, engine.architecture, engine.layout, self._matrix_bytes())
        if self.is_native:
            return found
        return {LAYERS: sum((one for stage, one in found.items() if stage != HEAD), Work(0.0, 0.0)), HEAD: found[HEAD]}

    def _matrix_bytes(self) -> Mapping[str, float]:
        if isinstance(self._model, NativeModel):
            return self._model.matrix_bytes()
        itemsize = self.engine.dtype.itemsize
        return {stage: float(weights * itemsize) for stage, weights in num_weights(self.engine.architecture).items()}


def _limits_of_torch(engine: Engine, stopwatch: Stopwatch) -> Limits:
    """What torch's own sum reads, and what its product of two large squares reaches."""
    device = engine.device
    memory = torch.ones(1 << 25, device=device)
    side = 2048 if device.type == "cuda" else 1024
    square = torch.ones(side, side, dtype=engine.dtype, device=device)
    read_s = _best_seconds(lambda: memory.sum().item(), stopwatch)
    multiplied_s = _best_seconds(lambda: (square @ square)[0, 0].item(), stopwatch)
    return Limits(memory.numel() * 4 / read_s, 2.0 * side**3 / multiplied_s)


def _best_seconds(work: Callable[[], object], stopwatch: Stopwatch) -> float:
    found = []
    for _ in range(5):
        started_s = stopwatch.now_s()
        work()
        found.append(stopwatch.now_s() - started_s)
    return min(found)
