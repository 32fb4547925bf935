"""A model's tokens as grammars see them: their bytes, which are special, and one more that stands for every end token.

Where a grammar leaves but one text, it is spelt as the tokenizer would, for that is what the model has learnt.
"""

from __future__ import annotations

from common.tokenizer import Tokenizer


class GrammarTokens:
    """What llguidance asks of a tokenizer; calling it spells a text."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        known = range(min(tokenizer.vocab_size, vocab_size))
        special = {token_id for token_id in known if tokenizer.is_special(token_id)}
        special.update(token_id for token_id in tokenizer.eos_token_ids if token_id < vocab_size)
        bytes_of = [tokenizer.token_bytes(token_id) for token_id in known]
        self.eos_token_id = vocab_size
        self.tokens = [*bytes_of, *[b""] * (vocab_size - len(bytes_of)), b"<end>"]
        self.special_token_ids = sorted({*special, self.eos_token_id})
        self._tokenizer = tokenizer
        self._special = special
        self._ids = {text: token_id for token_id, text in enumerate(bytes_of) if text and token_id not in special}
        self._longest = max(map(len, self._ids), default=0)

    def __call__(self, text: str) -> list[int]:
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        if not self._special.isdisjoint(token_ids):
            token_ids = self._tokenizer.encode(text, add_special_tokens=False, allow_special=False)
        data = text.encode()
        if b"".join(self.tokens[token_id] for token_id in token_ids) == data:
            return token_ids
        return self._greedy(data)  # some tokenizers put a space before every text

    def _greedy(self, data: bytes) -> list[int]:
        token_ids: list[int] = []
        start = 0
        while start < len(data):
            ends = range(min(len(data), start + self._longest), start, -1)
            end = next((end for end in ends if data[start:end] in self._ids), None)
            if end is None:
                break  # a vocabulary without this byte: the grammar finds that it cannot go on
            token_ids.append(self._ids[data[start:end]])
            start = end
        return token_ids
