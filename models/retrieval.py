"""SIMLA for image-text retrieval: the encoders, the contrast features and the matching head.

B batch, N image tokens, T text tokens, D width, E shared embedding, Q queue.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from simla.models import losses
from simla.models.align import AlignmentModel, Draws
from simla.models.bert import BertConfig, BertModel, CrossStates
from simla.models.momentum import make_twin
from simla.models.vit import VisionTransformer, vit_sizes


class RetrievalBatch(NamedTuple):
    image: Tensor  # (B, 3, R, R)
    text_ids: Tensor  # (B, T)
    text_mask: Tensor  # (B, T) 1 = token, 0 = padding
    idx: Tensor  # (B,) identity of the image: equal ones are positives of ITA and never negatives of ITM


class SIMLARetrieval(AlignmentModel):
    """State-dict names and their order are the published code's (`text_encoder.*` without `bert.`).

    twins=False: no twins and no queues, which only training needs; frozen_idx_queue: the queue's identities
    are never written, so that its entries are always negatives.
    """

    twin_names = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")

    def __init__(
        self,
        vit: dict,
        bert: BertConfig,
        embed_dim: int = 256,
        queue_size: int = 65536,
        temp: float = 0.07,
        momentum: float = 0.995,
        twins: bool = True,
        frozen_idx_queue: bool = False,
    ):
        super().__init__()
        self.momentum = momentum
        self.frozen_idx_queue = frozen_idx_queue
        self.embed_dim = embed_dim
        width = vit["embed_dim"]
        self.visual_encoder = VisionTransformer(**vit)
        self.text_encoder = BertModel(bert)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(bert.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(temp)))
        self.itm_head = nn.Linear(bert.hidden_size, 2)

        if not twins:
            self.twin_names = ()
            return
        self.visual_encoder_m = make_twin(self.visual_encoder)
        self.vision_proj_m = make_twin(self.vision_proj)
        self.text_encoder_m = make_twin(self.text_encoder)
        self.text_proj_m = make_twin(self.text_proj)

        self._add_queues(embed_dim, queue_size)
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @classmethod
    def from_config(cls, config: dict, twins: bool = True) -> "SIMLARetrieval":
        return cls(
            vit=vit_sizes(config),
            bert=BertConfig.read(config["bert_config"]),
            embed_dim=config["embed_dim"],
            queue_size=config["queue_size"],
            temp=config["temp"],
            momentum=config["momentum"],
            twins=twins,
            frozen_idx_queue=config["released_code"]["frozen_idx_queue"],
        )

    def forward(self, batch: RetrievalBatch, alpha: float, draws: Draws | None = None) -> dict[str, Tensor]:
        """Return ITA and ITM of one batch, scalars; alpha is the weight of the momentum targets."""
        self.begin_step()
        online = self.encode(batch)
        with torch.no_grad():
            momentum = self.encode(batch, "_m")
        positives = losses.identity_positives(batch.idx, self.idx_queue)  # (B, B+Q)
        loss_ita, sim_i2t, sim_t2i = self.ita(online, momentum, positives, alpha)
        self.enqueue(momentum, None if self.frozen_idx_queue else batch.idx)
        negatives = self.draw_negatives(sim_i2t, sim_t2i, positives, draws)
        image_keys = self.text_encoder.project(online.image_embeds)
        return {"loss_ita": loss_ita, "loss_itm": self.itm(image_keys, batch, negatives)}

    def match(self, image_keys: CrossStates, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Return the logits "no match" and "match" of every text with its image, (I * n, 2) float32.

        image_keys: I images as `text_encoder.project` gives them; text_ids, text_mask (I * n, T): n texts for
        each in turn
        """
        hidden = self.text_encoder(text_ids, text_mask, image_keys, first_only=True)  # (I * n, 1, D)
        return self.match_logits(hidden[:, 0])

    def match_logits(self, cls_states: Tensor) -> Tensor:
        """Return "no match" and "match" (B, 2) of states (B, D), computed in float32 in every precision: in
        the 8 bits of bf16 many pairs would have the same score.
        """
        with torch.autocast(cls_states.device.type, enabled=False):
            return self.itm_head(cls_states.float())
