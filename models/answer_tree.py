"""A list of answers as a tree of their beginnings, so that what several begin with is read once.

With causal attention the state of a token depends on the tokens before it alone: answers that begin alike
share it. The answers chosen for a question become one sequence, a token for each different beginning, which
sees the beginnings of that beginning. K answers of up to L tokens; P beginnings in all; B questions with k
answers each; n beginnings of the answers of one question.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Branches(NamedTuple):
    """The beginnings of the answers chosen for each question, from short to long, padded with any others."""

    ids: Tensor  # (B, n) the last token of each beginning
    positions: Tensor  # (B, n) the position of that token
    seen: Tensor  # (B, n, n) 1 = a beginning of that beginning, which its token sees
    num: Tensor  # (B,) beginnings without the padding
    predictors: (
        Tensor  # (B, k, L-1) which of the n predicts the answer's tokens after the first; 0 after its end
    )


class AnswerTree(NamedTuple):
    """Answers that all start with the same token, and their beginnings, numbered from short to long: 0 is the
    first token alone.
    """

    ids: Tensor  # (K, L)
    mask: Tensor  # (K, L)
    nodes: Tensor  # (K, L-1) the beginnings that predict the tokens after the first; 0 after the end
    tokens: Tensor  # (P,) the last token of each beginning
    positions: Tensor  # (P,) the position of that token
    paths: Tensor  # (P, L-1) the beginnings of each beginning, the last, itself, as often as there is room

    @classmethod
    def build(cls, ids: Tensor, mask: Tensor) -> "AnswerTree":
        lengths, width = mask.sum(1).tolist(), ids.shape[1] - 1
        answers = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        beginnings = {answer[:end] for answer in answers for end in range(1, len(answer))}
        beginnings = sorted(beginnings, key=lambda tokens: (len(tokens), tokens))
        numbers = {tokens: i for i, tokens in enumerate(beginnings)}

        def path(tokens: tuple[int, ...], padding: int) -> list[int]:
            numbered = [numbers[tokens[:end]] for end in range(1, len(tokens) + 1)]
            return numbered + [padding] * (width - len(numbered))

        nodes = torch.tensor([path(answer[:-1], padding=0) for answer in answers])
        tokens = torch.tensor([tokens[-1] for tokens in beginnings])
        positions = torch.tensor([len(tokens) - 1 for tokens in beginnings])
        paths = torch.tensor([path(tokens, padding=numbers[tokens]) for tokens in beginnings])
        return cls(ids, mask, nodes, tokens, positions, paths)

    def to(self, device: torch.device) -> "AnswerTree":
        return AnswerTree(*(tensor.to(device) for tensor in self))

    def branches(self, chosen: Tensor) -> Branches:
        """Return the beginnings of the chosen answers: their numbers (B, k)."""
        nodes = self.nodes[chosen]  # (B, k, L-1)
        used = torch.zeros(len(chosen), len(self.tokens), dtype=torch.bool, device=chosen.device)
        used.scatter_(1, nodes.flatten(1), True)
        num, column = used.sum(1), (used.cumsum(1) - 1).clamp(min=0)  # (B,), (B, P)
        order = used.byte().argsort(dim=1, descending=True, stable=True)[:, : int(num.max())]  # (B, n)
        paths = self.paths[order]  # (B, n, L-1)
        seen = torch.zeros(*order.shape, order.shape[1], dtype=torch.float32, device=chosen.device)
        seen.scatter_(2, column.gather(1, paths.flatten(1)).view_as(paths), 1.0)
        predictors = column.gather(1, nodes.flatten(1)).view_as(nodes)
        return Branches(self.tokens[order], self.positions[order], seen, num, predictors)
