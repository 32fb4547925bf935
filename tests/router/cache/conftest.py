from __future__ import annotations

import pytest

from common.tokenizer import Tokenizer
from support.cache_calls import Calls


@pytest.fixture
def calls(tokenizer: Tokenizer) -> Calls:
    return Calls(tokenizer)
