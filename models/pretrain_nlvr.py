"""Pre-training of the two-image encoder by text assignment: which of two images does the caption describe?

B batch, N image tokens, T text tokens, D width, E shared embedding.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla.models import losses
from simla.models.align import unit_features
from simla.models.bert import BertConfig, BertModel
from simla.models.momentum import MomentumModel
from simla.models.vit import VisionTransformer, vit_sizes

NEGATIVES_TEMP = 0.07  # fixed, whatever the pre-trained `temp` is
NEITHER = 2  # the label; 0 and 1 are the slot of the matching image


class PairDraws(NamedTuple):
    """The random choices of one step; tests replay recorded ones."""

    chance: Tensor  # (B, 2) even in [0, 1): does the pair have the matching image, and in which slot
    negatives: Tensor  # (B, 2) two different images other than the caption's own; a match needs the first


def draw_pairs(weights: Tensor) -> PairDraws:
    """Draw pairs by weights (B, B), unnormalised, of each image as a hard negative of each caption, 0 for its
    own. A batch of two has no two different negatives: every pair then has its match.
    """
    batch = len(weights)
    chance = torch.rand(batch, 2, device=weights.device)
    if batch < 3:
        chance[:, 0] = 1.0
    negatives = torch.multinomial(weights, max(1, min(2, batch - 1)))
    return PairDraws(chance, negatives[:, [0, -1]])


def make_pairs(draws: PairDraws) -> tuple[Tensor, Tensor]:
    """Return the images in both slots (2, B), as rows of the batch, and the labels (B,): 0, 1 or NEITHER.

    With probability 2/3 the matching image is in slot 0 or 1, each as likely, beside one negative.
    """
    has_match, is_first = draws.chance[:, 0] > 1 / 3, draws.chance[:, 1] > 0.5
    label = torch.where(has_match, (~is_first).long(), NEITHER)
    first_negative, second_negative = draws.negatives.unbind(1)
    row = torch.arange(len(label), device=label.device)
    slot_0 = torch.where(label == 0, row, first_negative)
    slot_1 = torch.where(label == 0, first_negative, torch.where(label == 1, row, second_negative))
    return torch.stack([slot_0, slot_1]), label


class SIMLAPretrainNLVR(MomentumModel):
    """State-dict names and their order are the published code's. The projections only weigh the negatives."""

    without_gradient = (*MomentumModel.without_gradient, "temp", "vision_proj.", "text_proj.")

    def __init__(self, vit: dict, bert: BertConfig, embed_dim: int = 256, temp: float = 0.07):
        super().__init__()
        self.temp = nn.Parameter(torch.tensor(float(temp)))
        self.visual_encoder = VisionTransformer(**vit)
        self.text_encoder = BertModel(bert, two_images=True)
        self.vision_proj = nn.Linear(vit["embed_dim"], embed_dim)
        self.text_proj = nn.Linear(bert.hidden_size, embed_dim)
        self.ta_head = nn.Linear(bert.hidden_size, 3)

    @classmethod
    def from_config(cls, config: dict) -> "SIMLAPretrainNLVR":
        bert = BertConfig.read(config["bert_config"])
        return cls(vit=vit_sizes(config), bert=bert, embed_dim=config["embed_dim"], temp=config["temp"])

    def forward(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor, draws: PairDraws | None = None
    ) -> dict[str, Tensor]:
        """Return the three-way cross-entropy of each caption (B, T) with two images of the batch (B, 3, R,
        R). A batch of one has no negative: its loss is 0.
        """
        image_embeds = self.visual_encoder(image)  # (B, N, D)
        with torch.no_grad():
            image_feat = unit_features(self.vision_proj, image_embeds[:, 0])  # (B, E)
            itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
            similarity = image_feat @ image_feat.T / NEGATIVES_TEMP  # (B, B)
            weights, has_negative = losses.negative_weights(similarity, itself)
        pairs, label = make_pairs(draws or draw_pairs(weights))  # (2, B), (B,)
        image_keys = self.text_encoder.project(image_embeds[pairs.flatten()])
        hidden = self.text_encoder(text_ids, text_mask, image_keys)  # (B, T, D)
        rows = F.cross_entropy(self.ta_head(hidden[:, 0]), label, reduction="none")
        return {"loss": losses.mean_over(rows * has_negative, has_negative.sum())}
