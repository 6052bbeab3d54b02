"""SIMLA for image-text retrieval: the encoders, the contrast features and the matching head.

B batch, N image tokens, T text tokens, D width, E shared embedding, Q queue.
"""

import torch
from torch import Tensor, nn

from models import losses
from models.align import AlignmentModel, Draws, itm_rows, pair_rows, unit_features
from models.bert import BertConfig, BertModel, CrossStates
from models.momentum import make_twin
from models.vit import VisionTransformer, vit_sizes


class SIMLARetrieval(AlignmentModel):
    """State-dict names and their order are the published code's (`text_encoder.*` without `bert.`).

    twins=False: no twins and no queues, which only training needs; frozen_idx_queue: see `forward`.
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
        self.visual_encoder_m = make_twin(self.visual_encoder, VisionTransformer(**vit))
        self.vision_proj_m = make_twin(self.vision_proj, nn.Linear(width, embed_dim))
        self.text_encoder_m = make_twin(self.text_encoder, BertModel(bert))
        self.text_proj_m = make_twin(self.text_proj, nn.Linear(bert.hidden_size, embed_dim))

        self._add_queues(embed_dim, queue_size)
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @classmethod
    def from_config(cls, config: dict, twins: bool = True) -> "SIMLARetrieval":
        return cls(
            vit_sizes(config),
            BertConfig.read(config["bert_config"]),
            config["embed_dim"],
            config["queue_size"],
            config["temp"],
            config["momentum"],
            twins,
            config["released_code"]["frozen_idx_queue"],
        )

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        idx: Tensor,
        alpha: float,
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        """ITA and ITM where several texts may belong to one image.

        image (B, 3, R, R); text_ids, text_mask (B, T); idx (B,): identity of each row's image, equal ones
        are positives of the contrast and never negatives of ITM; alpha: weight of the momentum targets. With
        `frozen_idx_queue` the queue's identities are never written, so its entries are always negatives.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            self.update_twins()
        image_embeds, image_feat = self.encode_image(image)  # (B, N, D), (B, E)
        feats = image_feat, self.encode_text(text_ids, text_mask)
        with torch.no_grad():
            image_feat_m = unit_features(self.vision_proj_m, self.visual_encoder_m(image)[:, 0])
            text_feat_m = unit_features(
                self.text_proj_m, self.text_encoder_m.first_state(text_ids, text_mask)
            )

        positives = losses.identity_positives(idx, self.idx_queue)
        loss_ita, sim_i2t, sim_t2i = self._ita(feats, (image_feat_m, text_feat_m), positives, alpha)
        self._enqueue((image_feat_m, text_feat_m), None if self.frozen_idx_queue else idx)
        same = idx[:, None] == idx[None]
        image_neg, text_neg, has_negative = self._negatives(sim_i2t, sim_t2i, same, draws or Draws())

        cls_states = self.text_encoder(
            pair_rows([text_ids, text_ids[text_neg]], text_ids),
            pair_rows([text_mask, text_mask[text_neg]], text_mask),
            self.text_encoder.project(image_embeds).rows(image_neg),
            places=itm_rows(2, len(text_ids), text_ids.device) * text_ids.shape[1],
        )  # (3B, D)
        return {"loss_ita": loss_ita, "loss_itm": self._itm_loss(cls_states, has_negative)}

    def encode_image(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, R, R) -> token states (B, N, D), unit-length features (B, E)"""
        image_embeds = self.visual_encoder(image)
        return image_embeds, unit_features(self.vision_proj, image_embeds[:, 0])

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """text_ids, text_mask (B, T) -> unit-length features (B, E)"""
        return unit_features(self.text_proj, self.text_encoder.first_state(text_ids, text_mask))

    def match(self, cross: CrossStates, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """The "match" logit of every text with its image.

        cross: I images as `text_encoder.project` has them; text_ids, text_mask (I * n, T): n texts for each
        in turn -> (I * n,) float32
        """
        return self.match_logits(self.text_encoder.first_state(text_ids, text_mask, cross))[:, 1]

    def match_logits(self, cls_states: Tensor) -> Tensor:
        """cls_states (B, D) -> "no match" and "match" (B, 2), computed in float32 in every precision: in the
        8 bits of bf16 many pairs would have the same score
        """
        with torch.autocast(cls_states.device.type, enabled=False):
            return self.itm_head(cls_states.float())
