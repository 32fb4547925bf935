"""Guesses of further tokens from one hidden row: a small step from token to token, and few words to choose from.

    s0 = hidden row, normed, times `norm`                                what the model's own head would be given
    s1 = keep * s0 + out(silu(state(s0) + word(e(t1)) + bias))           t1: the token that was drawn
    g1 = best of  s1 . rows of the model's head                          g1: guess of the token behind t1
    s2 = ... s1, e(g1) ...                                               and so on

Medusa's heads see the hidden row alone; these also see the tokens between, as each guess is only of use if those before it are
right (Hydra, arXiv:2402.05109), and share their weights, which learns from a third of the text. e(t) is the model's embedding.
Only tokens that the model often says can be named: a product with its whole head would cost a fifth of a step.

All sequences at once. bf16, with sums in fp32: what comes out decides speed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from common.engine.heads.file import HeadWeights, read_heads
from common.engine.heads.rows import HiddenRow
from common.engine.loader import keep_only, load_architecture, load_weights
from common.errors import ConfigError

EPSILON = 1e-5
EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


class DraftHeads:
    def __init__(
        self, weights: HeadWeights, head: torch.Tensor, embedding: torch.Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`head` and `embedding` are the model's, as far as they are of the tokens of `weights`."""
        description = weights.description
        self.num_guesses = description.num_guesses
        self._hidden_size = description.hidden_size
        self._dtype = dtype
        self._device = device
        self._tokens = weights.tokens.to(device)
        word_of = torch.full((description.vocab_size,), len(weights.tokens))  # one more word: all other tokens
        word_of[weights.tokens] = torch.arange(len(weights.tokens))
        self._word_of = word_of.to(device)
        self._norm = weights.norm.to(device)
        self._keep = weights.keep.to(device, dtype)
        self._state = weights.state.to(device, dtype)
        self._out = weights.out.to(device, dtype)
        self._head = head.to(device, dtype)
        # What a token adds does not depend on anything: it is worked out once for each of them.
        added = scaled(embedding.float()) @ weights.word.T + weights.bias
        self._added = torch.cat([added, weights.bias.unsqueeze(0)]).to(device, dtype)

    @torch.inference_mode()
    def guess(self, rows: Sequence[HiddenRow], tokens: Sequence[int], count: int) -> tuple[list[list[int]], list[float]]:
        """`count` guesses for each sequence, of which a row and the token drawn from it are given; and how sure it is of the
        first."""
        values = torch.stack([row.values[: self._hidden_size] for row in rows]).to(self._device)
        state = normed(values.nan_to_num(), self._norm).to(self._dtype)  # it may have come over a network
        words = self._word_of[torch.tensor(tokens, device=self._device)]
        guesses: list[torch.Tensor] = []
        sure: torch.Tensor | None = None
        for _ in range(count):
            inner = F.silu(F.linear(state, self._state) + self._added[words])
            state = torch.addcmul(F.linear(inner, self._out), state, self._keep)
            logits = F.linear(state, self._head)
            best, words = logits.max(dim=-1)
            if sure is None:
                sure = (best.float() - logits.float().logsumexp(dim=-1)).exp()
            guesses.append(self._tokens[words])
        named: list[list[int]] = torch.stack(guesses, dim=1).tolist()
        certainties: list[float] = [] if sure is None else sure.tolist()
        return named, certainties

    def fits(self, row: HiddenRow) -> bool:
        """Rows come over the network as well."""
        return len(row.values) >= self._hidden_size


def normed(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rows = rows.float()
    return rows * torch.rsqrt(rows.pow(2).mean(dim=-1, keepdim=True) + EPSILON) * weight


def scaled(embedding: torch.Tensor) -> torch.Tensor:
    """Embeddings of models differ in size by a factor of hundreds: made as large as a normed row."""
    return embedding * torch.rsqrt(embedding.float().pow(2).mean() + 1e-12)


def load_heads(path: Path, model_path: Path, *, model_digest: str, device: torch.device, dtype: torch.dtype) -> DraftHeads:
    """The heads in a file, with what they need of the model. Blocking: reads the model's files. Raises a ConfigError or a
    ModelLoadError."""
    architecture = load_architecture(model_path)
    weights = read_heads(path, model=model_digest, hidden_size=architecture.hidden_size, vocab_size=architecture.vocab_size)
    head, embedding = word_rows(model_path, weights.tokens)
    return DraftHeads(weights, head, embedding, device, dtype)


def word_rows(model_path: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model's head and of its embedding, the rows of these tokens. fp32."""
    _, found = load_weights(model_path, torch.bfloat16, keep=keep_only(HEAD, EMBEDDING))
    if EMBEDDING not in found:
        raise ConfigError(f"the model {model_path.name} has no embedding for heads to read", param="source")
    rows = {name: tensor[tokens].float() for name, tensor in found.items()}
    return rows.get(HEAD, rows[EMBEDDING]), rows[EMBEDDING]
