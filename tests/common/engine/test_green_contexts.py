"""The division of a GPU's multiprocessors, and what is asked of the driver for it; that a driver does it needs a GPU.

The driver here is a library of C, compiled for the test, so that sizes and orders of arguments are those of a real call."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from common.engine.green_contexts import Resource, divided_streams, load_driver, multiprocessors_for
from common.errors import StartupError

DRIVER = r"""
#include <string.h>
#include <stdint.h>
typedef union { struct { unsigned int count; } sm; unsigned char bytes[48]; } Kind;
typedef struct { int type; unsigned char internal[92]; Kind of; } Resource;
_Static_assert(sizeof(Resource) == 144, "as the driver's interface has it");
static Resource known[4];
static int failing;
static unsigned int given[2]; static int made; static int priorities[2]; static unsigned int least;
void set(int count, int fails) { known[0].of.sm.count = count; failing = fails; made = 0; }
int told(int what) { return what < 2 ? (int)given[what] : what < 4 ? priorities[what - 2] : (int)least; }
int cuInit(unsigned int flags) { return flags; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return 0; }
int cuDeviceGetDevResource(int device, Resource *resource, int type) {
    if (device != 43 || type != 1) return 1;
    memset(resource, 7, sizeof *resource); resource->type = type; resource->of.sm.count = known[0].of.sm.count; return 0;
}
int cuDevSmResourceSplitByCount(Resource *result, unsigned int *groups, const Resource *all, Resource *rest,
                                unsigned int flags, unsigned int count) {
    if (*groups != 1 || flags || all->of.sm.count != known[0].of.sm.count) return 1;
    least = count;
    memset(result, 1, sizeof *result); memset(rest, 2, sizeof *rest);
    result->of.sm.count = count; rest->of.sm.count = all->of.sm.count - count; return 0;
}
int cuDevResourceGenerateDesc(void **description, Resource *resources, unsigned int number) {
    if (number != 1) return 1;
    *description = (void *)(uintptr_t)(1000 + resources->of.sm.count); return 0;
}
int cuGreenCtxCreate(void **context, void *description, int device, unsigned int flags) {
    if (failing) return failing;
    if (device != 43 || flags != 1) return 1;
    given[made] = (unsigned int)((uintptr_t)description - 1000); *context = (void *)(uintptr_t)(0x500000000000 + made); return 0;
}
int cuGreenCtxStreamCreate(void **stream, void *context, unsigned int flags, int priority) {
    if (flags != 1 || (uintptr_t)context != 0x500000000000 + made) return 1;
    priorities[made] = priority; *stream = (void *)(uintptr_t)(0x7f0000000000 + made); made++; return 0;
}
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no compiler here")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    subprocess.run([compiler, "-shared", "-fPIC", "-O0", "-o", "driver.so", "driver.c"], cwd=folder, check=True, timeout=60)
    return ctypes.CDLL(str(folder / "driver.so"))


@pytest.mark.parametrize(
    ("share", "total", "expected"), [(0.3, 132, 40), (0.5, 132, 64), (0.0, 132, 8), (1.0, 132, 120), (0.9, 16, 8)]
)
def test_multiprocessors_are_given_out_by_eights_and_some_are_left(share: float, total: int, expected: int) -> None:
    assert multiprocessors_for(share, total) == expected


def test_too_few_multiprocessors_are_not_divided() -> None:
    with pytest.raises(StartupError, match="15 multiprocessors"):
        multiprocessors_for(0.5, 15)


def test_a_resource_is_as_large_as_the_driver_says() -> None:
    assert ctypes.sizeof(Resource) == 144
    assert Resource.multiprocessors.offset == 96


def test_two_engines_get_streams_on_parts_that_do_not_overlap(driver: ctypes.CDLL) -> None:
    driver.set(132, 0)
    assert divided_streams(driver, 0.3, 3, (-1, 0)) == [(0x7F0000000000, 40), (0x7F0000000001, 92)]
    assert [driver.told(place) for place in range(5)] == [40, 92, -1, 0, 40]


def test_what_the_driver_refuses_is_named(driver: ctypes.CDLL) -> None:
    driver.set(132, 801)
    with pytest.raises(StartupError, match="cuGreenCtxCreate failed with error 801"):
        divided_streams(driver, 0.3, 3, (-1, 0))


def test_a_machine_without_a_driver_or_with_an_old_one_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", none)
    with pytest.raises(StartupError, match="libcuda"):
        load_driver()

    class Old:
        cuInit = cuDeviceGet = None

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Old())
    with pytest.raises(StartupError, match="too old for green contexts: it has no cuDeviceGetDevResource"):
        load_driver()
