"""The models without what makes their steps cheaper: what the training benchmark compares with.

Same layers, weights, losses and passes; every pass projects the keys and values that it reads, of every row
anew, and heads predict at every token, of which the masked ones count.
"""

from functools import partial

import torch
from torch import Tensor, nn

from simla.models.bert import BertModel, KeysValues, padding_mask
from simla.models.pretrain import SIMLA
from simla.models.retrieval import SIMLARetrieval


class ProjectedAnew:
    """As CrossStates, but projected by each layer of each pass: states (B, S, D), mask (B, S) or None."""

    def __init__(self, bert: BertModel, states: Tensor, attention_mask: Tensor | None = None):
        self.bert, self.states, self.mask = bert, states, attention_mask

    def rows(self, index: Tensor) -> "ProjectedAnew":
        return ProjectedAnew(self.bert, self.states[index], None if self.mask is None else self.mask[index])

    def __getitem__(self, i: int) -> KeysValues:
        mask = None if self.mask is None else padding_mask(self.mask, torch.finfo(self.states.dtype).min)
        return self.bert.encoder.layer[i].crossattention.project(self.states, mask)


def unshare(encoder: nn.Module) -> None:
    bert = getattr(encoder, "bert", encoder)
    encoder.project = bert.project = partial(ProjectedAnew, bert)


class PlainRetrieval(SIMLARetrieval):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        for encoder in (self.text_encoder, self.text_encoder_m):
            unshare(encoder)


class PlainSIMLA(SIMLA):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        for encoder in (self.text_encoder, self.text_encoder_m):
            unshare(encoder)

    @staticmethod
    def predict(head: nn.Module, states: Tensor, indices: Tensor | None) -> Tensor:
        logits = head(states)  # (B, T, C)
        return logits if indices is None else logits.flatten(0, 1)[indices]
