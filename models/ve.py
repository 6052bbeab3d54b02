"""SIMLA for visual entailment: the multimodal [CLS] state through a small head, with momentum distillation.

B batch, N image tokens, T text tokens, D width, C classes.
"""

import torch
from torch import Tensor, nn

from simla.models.bert import BertConfig, BertModel
from simla.models.losses import distilled_cross_entropy
from simla.models.momentum import MomentumModel, make_twin
from simla.models.vit import VisionTransformer, vit_sizes


class SIMLAVE(MomentumModel):
    """One image, three classes. State-dict names and their order are the published code's."""

    twin_names = ("visual_encoder", "text_encoder", "cls_head")
    num_classes = 3
    two_images = False

    def __init__(self, vit: dict, bert: BertConfig, momentum: float = 0.995, sentence_only: bool = False):
        super().__init__()
        self.momentum = momentum
        self.sentence_only = sentence_only

        width = bert.hidden_size
        self.visual_encoder = VisionTransformer(**vit)
        self.text_encoder = BertModel(bert, self.two_images)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, self.num_classes))
        self.visual_encoder_m = make_twin(self.visual_encoder)
        self.text_encoder_m = make_twin(self.text_encoder)
        self.cls_head_m = make_twin(self.cls_head)

    @classmethod
    def from_config(cls, config: dict) -> "SIMLAVE":
        bert = BertConfig.read(config["bert_config"])
        return cls(vit_sizes(config), bert, config["momentum"], config.get("sentence_only", False))

    def forward(
        self, image: Tensor, text_ids: Tensor, text_mask: Tensor, label: Tensor, alpha: float
    ) -> dict[str, Tensor]:
        """Return the cross-entropy with the labels and, with weight alpha, with what the momentum twins
        answer: image (B, 3, R, R), in NLVR (2B, 3, R, R); text_ids, text_mask (B, T); label (B,).
        """
        self.update_twins()
        logits = self.predict(image, text_ids, text_mask)  # (B, C)
        with torch.no_grad():  # without soft targets the twins need not be asked
            logits_m = self.predict(image, text_ids, text_mask, "_m") if alpha > 0 else logits.detach()
        return {"loss": distilled_cross_entropy(logits, label, logits_m, alpha)}

    def predict(self, image: Tensor, text_ids: Tensor, text_mask: Tensor, suffix: str = "") -> Tensor:
        """Return logits (B, C), with suffix "_m" the momentum twins'; arguments as of `forward`. With
        `sentence_only` every image is the mean colour: a baseline that knows what sentences alone say.
        """
        image = torch.zeros_like(image) if self.sentence_only else image
        visual_encoder, text_encoder, cls_head = (getattr(self, name + suffix) for name in self.twin_names)
        image_embeds = visual_encoder(image)  # (B, N, D), in NLVR (2B, N, D)
        hidden = text_encoder(text_ids, text_mask, text_encoder.project(image_embeds))  # (B, T, D)
        return cls_head(hidden[:, 0])
