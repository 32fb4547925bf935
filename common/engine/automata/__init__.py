"""What reads a grammar token by token, behind one seam: llguidance (`guidance.py`), and xgrammar if it is asked for (`x.py`).

    Grammar --Compiler.compile--> Automaton, at the beginning of the answer --consume, take_back-->; fill: what may come

Tokens are those of one vocabulary, and one more behind them that stands for the end. An automaton that can go no further says so
from then on; nothing it says depends on how its tokens came, one by one or many at once, or again after they were taken back.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import StartupError
from common.tokenizer import Tokenizer
from common.types import Grammar

Words = npt.NDArray[np.uint32]  # bit i of word w is token 32 * w + i
Reader = Literal["llguidance", "xgrammar"]


class Automaton(Protocol):
    """One thread at a time."""

    @property
    def is_over(self) -> bool:
        """The text is whole and nothing can follow it."""
        ...

    @property
    def has_failed(self) -> bool:
        """It ran into a limit and says nothing more."""
        ...

    def copy(self) -> Automaton: ...

    def consume(self, token_ids: list[int]) -> int:
        """How many of them fitted, one after the other; those are taken."""
        ...

    def take_back(self, num_tokens: int) -> None:
        """The last ones that were taken."""
        ...

    def fill(self, words: Words) -> None:
        """Sets the bits of what may come, the end's included. Raises InvalidRequest if it has failed."""
        ...


class Compiler(Protocol):
    """One vocabulary's. Thread-safe; blocks while it compiles, up to a second."""

    def compile(self, grammar: Grammar) -> Automaton:
        """Raises InvalidRequest."""
        ...

    def spell(self, text: str) -> list[int]:
        """As a text is spelt that is forced."""
        ...


def require(reader: Reader) -> None:
    """Raises StartupError if the library is not there. Cheap: nothing is loaded."""
    if find_spec(reader) is None:
        raise StartupError(f"{reader} is not installed: pip install 'pdserve[{reader}]'", param="engine.grammars")


def create_compiler(reader: Reader, tokenizer: Tokenizer, vocab_size: int) -> Compiler:
    """Takes a second. `vocab_size` is the width of the model's logits, which may be padded."""
    from common.engine.automata.guidance import GuidanceCompiler
    from common.engine.automata.tokens import GrammarTokens

    tokens = GrammarTokens(tokenizer, vocab_size)
    guidance = GuidanceCompiler(tokens)
    if reader == "llguidance":
        return guidance
    from common.engine.automata.x import XCompiler

    return XCompiler(tokens, guidance)
