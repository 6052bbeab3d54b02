"""SIMLA for image-text retrieval: the encoders, the contrast features and the matching head.

B batch, N image tokens, T text tokens, D width, E shared embedding, Q queue.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bert import BertConfig, BertModel
from models.momentum import MomentumModel, make_twin, new_queue
from models.vit import VisionTransformer, vit_sizes


class SIMLARetrieval(MomentumModel):
    """State-dict names and their order are the published code's (`text_encoder.*` without `bert.`).

    mask_token: the image encoder keeps the mask token of pre-training; momentum=False: no twins and no
    queues, which only training needs.
    """

    twin_names = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")

    def __init__(
        self,
        vit: dict,
        bert: BertConfig,
        embed_dim: int = 256,
        queue_size: int = 65536,
        temp: float = 0.07,
        mask_token: bool = False,
        momentum: bool = True,
    ):
        super().__init__()
        width = vit["embed_dim"]
        self.visual_encoder = VisionTransformer(**vit, mask_token=mask_token)
        self.text_encoder = BertModel(bert)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(bert.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(temp)))
        self.itm_head = nn.Linear(bert.hidden_size, 2)

        if not momentum:
            self.twin_names = ()
            return
        twin = VisionTransformer(**vit, mask_token=mask_token)
        self.visual_encoder_m = make_twin(self.visual_encoder, twin)
        self.vision_proj_m = make_twin(self.vision_proj, nn.Linear(width, embed_dim))
        self.text_encoder_m = make_twin(self.text_encoder, BertModel(bert))
        self.text_proj_m = make_twin(self.text_proj, nn.Linear(bert.hidden_size, embed_dim))

        self.register_buffer("image_queue", new_queue(embed_dim, queue_size))
        self.register_buffer("text_queue", new_queue(embed_dim, queue_size))
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @classmethod
    def from_config(cls, config: dict, momentum: bool = True) -> "SIMLARetrieval":
        return cls(
            vit_sizes(config),
            BertConfig.read(config["bert_config"]),
            config["embed_dim"],
            config["queue_size"],
            config["temp"],
            config["vit_mask_token"],
            momentum,
        )

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, R, R) -> token states (B, N, D), unit-length features (B, E)"""
        image_embeds = self.visual_encoder(image)
        return image_embeds, F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """text_ids, text_mask (B, T) -> unit-length features (B, E)"""
        text_embeds = self.text_encoder(text_ids, text_mask)
        return F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)

    def match(self, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """The "match" logit of every text with its image.

        image_embeds (I, N, D) of I images; text_ids, text_mask (I * n, T): n texts for each in turn -> (I *
        n,)
        """
        hidden = self.text_encoder(text_ids, text_mask, self.text_encoder.project(image_embeds))
        return self.itm_head(hidden[:, 0])[:, 1]
