"""A list of answers as a tree of their beginnings, so that what several begin with is read once.

With causal attention the state of a token depends on the tokens before it alone: answers that begin alike
share it. The answers chosen for a question become one sequence, a token for each different beginning, which
sees the beginnings of that beginning. K answers of up to L tokens; P beginnings in all; B questions with k
answers each; n beginnings of the answers of one question.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Branches:
    """The beginnings of the answers chosen for each question, from short to long, padded with any others.

    ids, positions (B, n): their last tokens; seen (B, n, n): which of them each one sees; num (B,): without
    the padding; places (B, k, L-1): which of them predicts the tokens of an answer after the first; 0 after
    its end
    """

    ids: Tensor
    positions: Tensor
    seen: Tensor
    num: Tensor
    places: Tensor


@dataclass(frozen=True)
class AnswerTree:
    """ids, mask (K, L): the answers, all with the same first token; nodes (K, L-1): numbers of the beginnings
    that predict the tokens after it, 0 after the end. Beginnings are numbered from short to long, 0 is the
    first token alone: tokens, positions (P,): the last token of each and its place; path (P, L-1): its own
    beginnings, the last of which is itself, as often as there is room.
    """

    ids: Tensor
    mask: Tensor
    nodes: Tensor
    tokens: Tensor
    positions: Tensor
    path: Tensor

    @classmethod
    def build(cls, ids: Tensor, mask: Tensor) -> "AnswerTree":
        lengths = mask.sum(1).tolist()
        answers = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths, strict=True)]
        found = {answer[:end] for answer in answers for end in range(1, len(answer))}
        numbers = {
            tokens: i for i, tokens in enumerate(sorted(found, key=lambda tokens: (len(tokens), tokens)))
        }

        def path(tokens: tuple[int, ...], padding: int | None = None) -> list[int]:
            own = [numbers[tokens[:end]] for end in range(1, len(tokens) + 1)]
            return own + [own[-1] if padding is None else padding] * (ids.shape[1] - 1 - len(own))

        return cls(
            ids,
            mask,
            *map(
                torch.tensor,
                (
                    [path(answer[:-1], padding=0) for answer in answers],
                    [tokens[-1] for tokens in numbers],
                    [len(tokens) - 1 for tokens in numbers],
                    [path(tokens) for tokens in numbers],
                ),
            ),
        )

    def to(self, device: torch.device) -> "AnswerTree":
        return AnswerTree(*(part.to(device) for part in vars(self).values()))

    def branches(self, chosen: Tensor) -> Branches:
        """chosen (B, k): numbers of answers."""
        nodes = self.nodes[chosen]  # (B, k, L-1)
        used = torch.zeros(len(chosen), len(self.tokens), dtype=torch.bool, device=chosen.device)
        used.scatter_(1, nodes.flatten(1), True)
        num, place = used.sum(1), (used.cumsum(1) - 1).clamp(min=0)  # (B,), (B, P)
        order = used.byte().argsort(dim=1, descending=True, stable=True)[:, : int(num.max())]  # (B, n)
        path = self.path[order]  # (B, n, L-1)
        seen = torch.zeros(*order.shape, order.shape[1], dtype=torch.float32, device=chosen.device)
        seen.scatter_(2, place.gather(1, path.flatten(1)).view_as(path), 1.0)
        places = place.gather(1, nodes.flatten(1)).view_as(nodes)
        return Branches(self.tokens[order], self.positions[order], seen, num, places)
