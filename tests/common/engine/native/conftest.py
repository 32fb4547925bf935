"""The compiled library, once for all files of this folder."""

from __future__ import annotations

import pytest

from common.config import pdserve_home
from common.engine.native.build import build_library
from common.engine.native.check import check_library
from common.engine.native.library import Library


@pytest.fixture(scope="session")
def library() -> Library:
    return Library(build_library(pdserve_home() / "kernels", check_library))
