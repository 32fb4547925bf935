"""How rows of logits are to be drawn from, as numbers that a device reads: eight columns of 64 bits for each draw.

    | row | seed | choice | position | top-k | temperature | top-p | min-p |       the last three are fp64, bit for bit

A row of zeros draws the best token, which is what padding gets. `KeptSettings` are those of a step's rows, from step to step:
while a sequence keeps its row, only the position is written. It knows no device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from common.engine.batch import SampleSpec

NUM_SETTINGS = 8
ROW, SEED, CHOICE, POSITION, TOP_K, TEMPERATURE, TOP_P, MIN_P = range(NUM_SETTINGS)
_WORD = (1 << 64) - 1
_Key = tuple[int, int, int, float, float, float]
_GREEDY: _Key = (0, 0, 0, 0.0, 0.0, 0.0)

Settings = npt.NDArray[np.int64]


def settings_of(specs: Sequence[SampleSpec], rows: Sequence[int]) -> Settings:
    """[specs, 8]; spec i draws from row `rows[i]`."""
    settings = np.empty((len(specs), NUM_SETTINGS), dtype=np.int64)
    reals = settings.view(np.float64)
    for place, (spec, row) in enumerate(zip(specs, rows, strict=True)):
        settings[place, ROW], settings[place, POSITION] = row, spec.position
        _write(settings[place], reals[place], _key(spec))
    return settings


class KeptSettings:
    def __init__(self, settings: Settings) -> None:
        """Over memory of [rows, 8]; row i of the logits has row i."""
        settings[:] = 0
        settings[:, ROW] = np.arange(len(settings))
        self._settings = settings
        self._reals = settings.view(np.float64)
        self._known = [_GREEDY] * len(settings)

    def fill(self, specs: Sequence[SampleSpec | None]) -> None:
        """None, and rows beyond: the best token, which nobody asks for."""
        for row, spec in enumerate(specs):
            self._keep(row, _GREEDY if spec is None else _key(spec))
        for row in range(len(specs), len(self._known)):
            self._keep(row, _GREEDY)
        positions = (0 if spec is None else spec.position for spec in specs)
        self._settings[: len(specs), POSITION] = np.fromiter(positions, np.int64, len(specs))

    def _keep(self, row: int, key: _Key) -> None:
        if self._known[row] != key:
            self._known[row] = key
            _write(self._settings[row], self._reals[row], key)


def _key(spec: SampleSpec) -> _Key:
    return spec.seed, spec.choice, spec.top_k, spec.temperature, spec.top_p, spec.min_p


def _write(numbers: Settings, reals: npt.NDArray[np.float64], key: _Key) -> None:
    seed = key[0] & _WORD
    numbers[SEED] = seed - (1 << 64) if seed >> 63 else seed
    numbers[CHOICE], numbers[TOP_K] = key[1], key[2]
    reals[TEMPERATURE:] = key[3:]
