"""SIMLA pre-training: image-text alignment at three levels by five losses (paper section 3).

B batch, N image tokens incl. [CLS], T text tokens, D width, E shared embedding, Q queue, V vocabulary, H
heads, M masked words, K hidden patches. A twin's states and logits end in `_m`.
"""

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simla.models import losses
from simla.models.align import AlignmentModel, Draws, Encoded
from simla.models.bert import BertConfig, BertForMaskedLM, CrossStates
from simla.models.momentum import make_twin
from simla.models.vit import VisionTransformer, vit_sizes
from simla.utils import UserError

LOSSES = ("ita", "itm", "mlm", "mim", "psl")
MOVED_BY = {  # parameters, by the beginnings of their names, that not every loss moves
    "temp": ("ita",),
    "text_proj.": ("ita",),
    "vision_proj.": ("ita", "psl"),
    "itm_head.": ("itm",),
    "text_encoder.cls.": ("mlm",),
    "mim_head.": ("mim",),
    "visual_encoder.mask_token": ("mim",),
    "concept_head.": ("psl",),
    "text_encoder.": ("ita", "itm", "mlm", "mim"),
}


class PretrainBatch(NamedTuple):
    """The indices are counted where the batch is made, so that no step waits for the device to count."""

    image: Tensor  # (B, 3, R, R)
    text_ids: Tensor  # (B, T) the caption, [CLS] first
    text_mask: Tensor  # (B, T) 1 = token, 0 = padding
    mlm_ids: Tensor  # (B, T) the caption with masked words
    mlm_labels: Tensor  # (B, T) the ids of the masked words, -100 elsewhere
    mlm_indices: Tensor  # (M,) of the masked words among B * T
    patch_mask: Tensor  # (B, N-1) bool, True = hidden from MIM
    mim_indices: Tensor  # (K,) of the hidden patches among B * (N-1)
    visual_codes: Tensor | None  # (B, N-1) the visual token of every patch; None without MIM


class SIMLA(AlignmentModel):
    """State-dict names, their order and that of the parameters are the published code's, whichever of the
    losses are `computed`.
    """

    twin_names = ("visual_encoder", "vision_proj", "text_encoder", "text_proj", "mim_head", "concept_head")

    def __init__(
        self,
        vit: dict,
        bert: BertConfig,
        embed_dim: int = 256,
        queue_size: int = 65536,
        temp: float = 0.07,
        momentum: float = 0.995,
        visual_vocab_size: int = 8192,
        cls_id: int = 101,
        mlm_distill_over_sequence: bool = False,
        psl_padding: bool = False,
        computed: Collection[str] = LOSSES,
    ):
        super().__init__()
        if vit["embed_dim"] != bert.hidden_size or bert.encoder_width != bert.hidden_size:
            raise UserError(
                f"vision_width ({vit['embed_dim']}), hidden_size ({bert.hidden_size}) and encoder_width "
                f"({bert.encoder_width}) of bert_config must be equal, because MIM runs image tokens "
                "through the text encoder"
            )
        self.momentum = momentum
        self.cls_id = cls_id
        self.mlm_distill_over_sequence = mlm_distill_over_sequence
        self.psl_padding = psl_padding
        self.computed = frozenset(computed)
        if bert.text_layers_alone and "mim" in self.computed:
            raise UserError(
                f"bert_config text_layers_alone is {bert.text_layers_alone}: so many layers read text alone, "
                "but MIM runs image tokens through all layers; set one of it and loss_weights.mim to 0"
            )
        self.without_gradient = tuple(self._not_reached(bert))

        width = vit["embed_dim"]
        self.visual_encoder = VisionTransformer(**{**vit, "mask_token": True})
        self.text_encoder = BertForMaskedLM(bert)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(bert.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(temp)))
        self.itm_head = nn.Linear(bert.hidden_size, 2)
        self.mim_head = nn.Linear(bert.hidden_size, visual_vocab_size)

        self.mim_head_m = make_twin(self.mim_head)
        self.visual_encoder_m = make_twin(self.visual_encoder)
        self.vision_proj_m = make_twin(self.vision_proj)
        self.text_encoder_m = make_twin(self.text_encoder)
        self.text_proj_m = make_twin(self.text_proj)
        self.concept_head = nn.Linear(embed_dim, bert.vocab_size)
        self.concept_head_m = make_twin(self.concept_head)

        self._add_queues(embed_dim, queue_size)
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

        num_tokens = self.visual_encoder.pos_embed.shape[1]
        if "mim" in self.computed and num_tokens > bert.max_position_embeddings:
            raise UserError(
                f"{num_tokens} image tokens exceed the {bert.max_position_embeddings} positions of the text "
                "encoder, which MIM runs them through; lower image_res or raise max_position_embeddings in "
                "bert_config"
            )

    @classmethod
    def from_config(cls, config: dict, cls_id: int) -> "SIMLA":
        return cls(
            vit=vit_sizes(config),
            bert=BertConfig.read(config["bert_config"]),
            embed_dim=config["embed_dim"],
            queue_size=config["queue_size"],
            temp=config["temp"],
            momentum=config["momentum"],
            visual_vocab_size=config["image_tokenizer"]["vocab_size"],
            cls_id=cls_id,
            mlm_distill_over_sequence=config["released_code"]["mlm_distill_over_sequence"],
            psl_padding=config["released_code"]["psl_padding"],
            computed=[name for name, weight in config["loss_weights"].items() if weight],
        )

    def forward(self, batch: PretrainBatch, alpha: float, draws: Draws | None = None) -> dict[str, Tensor]:
        """Return the computed losses of one batch, scalars, and nothing of the others; alpha is the weight of
        the momentum targets.
        """
        self.begin_step()
        online = self.encode(batch)
        with torch.no_grad():
            momentum = self.encode(batch, "_m")
        size, named = len(batch.image), {}
        positives = torch.eye(size, size + self.image_queue.shape[1], device=batch.image.device)  # (B, B+Q)
        if "ita" in self.computed:
            named["loss_ita"], sim_i2t, sim_t2i = self.ita(online, momentum, positives, alpha)
            self.enqueue(momentum)
        elif "itm" in self.computed:
            sim_i2t, sim_t2i = self.similarities(online, momentum)
        if self.computes("itm", "mlm"):
            image_keys = self.text_encoder.project(online.image_embeds)
        if "itm" in self.computed:
            negatives = self.draw_negatives(sim_i2t, sim_t2i, positives, draws)
            named["loss_itm"] = self.itm(image_keys, batch, negatives)
        if "mlm" in self.computed:
            named["loss_mlm"] = self.mlm(image_keys, momentum.image_embeds, batch, alpha)
        if "mim" in self.computed:
            named["loss_mim"] = self.mim(batch, alpha)
        if "psl" in self.computed:
            named["loss_psl"] = self.psl(online, momentum, batch, alpha)
        return named

    def _not_reached(self, bert: BertConfig) -> Iterator[str]:
        """Yield the beginnings of the names of parameters that no computed loss moves."""
        moved_by = dict(MOVED_BY)
        for i in range(bert.num_hidden_layers):  # a text alone ends below the first cross-attention
            is_above = i >= bert.text_layers_alone > 0
            part = "" if is_above else "crossattention."
            moved_by[f"text_encoder.bert.encoder.layer.{i}.{part}"] = ("itm", "mlm", "mim")
        return (name for name, by in moved_by.items() if self.computed.isdisjoint(by))

    def computes(self, *names: str) -> bool:
        """Return whether any of these losses is computed."""
        return not self.computed.isdisjoint(names)

    def encode(self, batch: PretrainBatch, suffix: str = "") -> Encoded:
        """Return states and features of a batch; None for those that no computed loss reads. ITM without ITA
        only draws its negatives by the text features.
        """
        text_feat, image = None, (None, None)
        if self.computes("ita", "itm"):
            with torch.set_grad_enabled(torch.is_grad_enabled() and "ita" in self.computed):
                text_feat = self.encode_text(batch.text_ids, batch.text_mask, suffix)
        if self.computes("ita", "itm", "mlm", "psl"):
            image = self.encode_image(batch.image, suffix)
        return Encoded(*image, text_feat)

    @torch.no_grad()
    def similarities(self, online: Encoded, momentum: Encoded) -> tuple[Tensor, Tensor]:
        """Return those within the batch by which negatives are drawn, sim_i2t and sim_t2i (B, B), where no
        contrast computes them.
        """
        with torch.autocast(self.temp.device.type, enabled=False):
            sim_i2t = online.image_feat @ momentum.text_feat.T / self.temp
            return sim_i2t, online.text_feat @ momentum.image_feat.T / self.temp

    def mlm(
        self, image_keys: CrossStates, image_embeds_m: Tensor, batch: PretrainBatch, alpha: float
    ) -> Tensor:
        """Return the loss of the masked words, which their text and the image tell (paper eq. 3)."""
        indices = None if self.mlm_distill_over_sequence else batch.mlm_indices
        hidden = self.text_encoder(batch.mlm_ids, batch.text_mask, image_keys)  # (B, T, D)
        logits = self.predict(self.text_encoder.cls["predictions"], hidden, indices)  # (M, V)
        with torch.no_grad():
            image_keys_m = self.text_encoder_m.project(image_embeds_m)
            hidden_m = self.text_encoder_m(batch.mlm_ids, batch.text_mask, image_keys_m)
            logits_m = self.predict(self.text_encoder_m.cls["predictions"], hidden_m, indices)
        if self.mlm_distill_over_sequence:
            return losses.mlm_loss_over_sequence(logits, batch.mlm_labels, logits_m, alpha)
        labels = batch.mlm_labels.flatten()[batch.mlm_indices]
        return losses.mlm_loss(logits, labels, logits_m, alpha)

    def mim(self, batch: PretrainBatch, alpha: float) -> Tensor:
        """Return the loss of the hidden patches (paper eq. 4): the image's tokens run through the layers of
        the text encoder and read the text's embeddings; the momentum pass reads the online ones, too.
        """
        words = self.text_encoder.bert.embeddings(batch.text_ids)  # (B, T, D)
        masked_embeds = self.visual_encoder(batch.image, batch.patch_mask)  # (B, N, D)
        word_keys = self.text_encoder.project(words, batch.text_mask)
        hidden = self.text_encoder(inputs_embeds=masked_embeds, cross=word_keys)  # (B, N, D)
        logits = self.predict(self.mim_head, hidden[:, 1:], batch.mim_indices)  # (K, visual vocabulary)
        with torch.no_grad():
            masked_embeds_m = self.visual_encoder_m(batch.image, batch.patch_mask)
            word_keys_m = self.text_encoder_m.project(words, batch.text_mask)
            hidden_m = self.text_encoder_m(inputs_embeds=masked_embeds_m, cross=word_keys_m)
            logits_m = self.predict(self.mim_head_m, hidden_m[:, 1:], batch.mim_indices)
        codes = batch.visual_codes.flatten()[batch.mim_indices]
        return losses.mim_loss(logits, codes, logits_m, alpha)

    @staticmethod
    def predict(head: nn.Module, states: Tensor, indices: Tensor | None) -> Tensor:
        """Return the head's logits at `indices` (M,) of the B * T states (B, T, D): (M, C); None: everywhere,
        (B, T, C).
        """
        return head(states if indices is None else states.flatten(0, 1)[indices])

    def psl(self, online: Encoded, momentum: Encoded, batch: PretrainBatch, alpha: float) -> Tensor:
        """Return the loss of the keywords, which the image's feature is to tell (paper eq. 5)."""
        with torch.no_grad():
            _, _, positions, counted = self._keywords(online.image_embeds, batch.text_ids, batch.text_mask)
            vocab_size = self.text_encoder.bert.config.vocab_size
            target = losses.keyword_targets(batch.text_ids, positions, counted, vocab_size, self.cls_id)
            logits_m = self.concept_head_m(momentum.image_feat)
        return losses.psl_loss(self.concept_head(online.image_feat), target, logits_m, alpha)

    def _keywords(
        self, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return how much [CLS] attends to each word in the momentum encoder's last layer (B, H, T), the text
        having read the online image states (B, N, D); the votes of the heads (B, T); the five positions with
        most votes, and which of these count, both (B, 5).
        """
        bert_m = self.text_encoder_m.bert
        attention = bert_m.last_self_attention(text_ids, text_mask, bert_m.project(image_embeds))[:, :, 0]
        votes = losses.keyword_votes(attention, None if self.psl_padding else text_mask)
        return attention, votes, *losses.choose_keywords(votes)

    @torch.no_grad()
    def keywords(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what PSL takes its targets from, for images (B, 3, R, R) and texts (B, T): the momentum
        encoder's attention from [CLS] to every word (B, H, T), the votes of its heads (B, T; padding -1), and
        which words are keywords (B, T) bool, [CLS] never.
        """
        image_embeds = self.visual_encoder(image)
        attention, votes, positions, counted = self._keywords(image_embeds, text_ids, text_mask)
        chosen = torch.zeros_like(votes, dtype=torch.bool).scatter(1, positions, counted)
        return attention, votes, chosen & (text_ids != self.cls_id)
