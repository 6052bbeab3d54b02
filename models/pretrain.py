"""SIMLA pre-training: image-text alignment at three levels by five losses (paper section 3).

B batch, N image tokens, T text tokens, D width, E shared embedding, Q queue, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import losses
from models.bert import BertConfig, BertForMaskedLM
from models.momentum import MomentumModel, advance, enqueue, make_twin, new_queue, update_twins
from models.vit import VisionTransformer, vit_sizes
from utils import UserError, all_gather_rows


@dataclass
class Draws:
    """The random choices of one step; None = drawn here. Tests replay recorded ones."""

    image_neg: Tensor | None = None  # (B,) the image drawn for each text
    text_neg: Tensor | None = None  # (B,) the text drawn for each image


class SIMLA(MomentumModel):
    """State-dict names, their order and that of the parameters are the published code's."""

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

        def image_encoder() -> VisionTransformer:
            return VisionTransformer(**vit, mask_token=True)

        width = vit["embed_dim"]
        self.visual_encoder = image_encoder()
        self.text_encoder = BertForMaskedLM(bert)
        self.vision_proj = nn.Linear(width, embed_dim)
        self.text_proj = nn.Linear(bert.hidden_size, embed_dim)
        self.temp = nn.Parameter(torch.tensor(float(temp)))
        self.itm_head = nn.Linear(bert.hidden_size, 2)
        self.mim_head = nn.Linear(bert.hidden_size, visual_vocab_size)

        self.mim_head_m = make_twin(self.mim_head, nn.Linear(bert.hidden_size, visual_vocab_size))
        self.visual_encoder_m = make_twin(self.visual_encoder, image_encoder())
        self.vision_proj_m = make_twin(self.vision_proj, nn.Linear(width, embed_dim))
        self.text_encoder_m = make_twin(self.text_encoder, BertForMaskedLM(bert))
        self.text_proj_m = make_twin(self.text_proj, nn.Linear(bert.hidden_size, embed_dim))
        self.concept_head = nn.Linear(embed_dim, bert.vocab_size)
        self.concept_head_m = make_twin(self.concept_head, nn.Linear(embed_dim, bert.vocab_size))

        self.register_buffer("image_queue", new_queue(embed_dim, queue_size))
        self.register_buffer("text_queue", new_queue(embed_dim, queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

        num_tokens = self.visual_encoder.pos_embed.shape[1]
        if num_tokens > bert.max_position_embeddings:
            raise UserError(
                f"{num_tokens} image tokens exceed the {bert.max_position_embeddings} positions of the text "
                "encoder, which MIM runs them through; lower image_res or raise max_position_embeddings in "
                "bert_config"
            )

    @classmethod
    def from_config(cls, config: dict, cls_id: int) -> "SIMLA":
        return cls(
            vit_sizes(config),
            BertConfig.read(config["bert_config"]),
            config["embed_dim"],
            config["queue_size"],
            config["temp"],
            config["momentum"],
            config["image_tokenizer"]["vocab_size"],
            cls_id,
            config["released_code"]["mlm_distill_over_sequence"],
            config["released_code"]["psl_padding"],
        )

    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        mlm_ids: Tensor,
        mlm_labels: Tensor,
        patch_mask: Tensor,
        visual_codes: Tensor,
        alpha: float,
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        """The five losses of one batch.

        image (B, 3, R, R); text_ids, text_mask, mlm_ids, mlm_labels (B, T): the caption, its padding mask,
        the caption with masked words, their ids (-100 elsewhere); patch_mask (B, N-1) bool: patches hidden
        from MIM; visual_codes (B, N-1): their targets; alpha: weight of the momentum targets.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            update_twins(self.twins(), self.momentum)
        # Every image is encoded twice, whole and with hidden patches: the same weights, so one batch.
        images, hidden = torch.cat([image, image]), torch.cat([torch.zeros_like(patch_mask), patch_mask])
        image_embeds, masked_embeds = self.visual_encoder(images, hidden).chunk(2)  # (B, N, D) each
        text_embeds = self.text_encoder.bert(text_ids, text_mask)  # (B, T, D)
        image_feat = F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)  # (B, E)
        text_feat = F.normalize(self.text_proj(text_embeds[:, 0]), dim=-1)  # (B, E)
        with torch.no_grad():
            image_embeds_m, masked_embeds_m = self.visual_encoder_m(images, hidden).chunk(2)
            text_embeds_m = self.text_encoder_m.bert(text_ids, text_mask)
            image_feat_m = F.normalize(self.vision_proj_m(image_embeds_m[:, 0]), dim=-1)
            text_feat_m = F.normalize(self.text_proj_m(text_embeds_m[:, 0]), dim=-1)

        loss_ita, sim_i2t, sim_t2i = self._ita(image_feat, text_feat, image_feat_m, text_feat_m, alpha)
        negatives = self._negatives(sim_i2t, sim_t2i, draws or Draws())
        loss_itm, loss_mlm = self._itm_mlm(
            image_embeds, image_embeds_m, text_ids, text_mask, mlm_ids, mlm_labels, negatives, alpha
        )
        loss_mim = self._mim(
            masked_embeds, masked_embeds_m, text_ids, text_mask, patch_mask, visual_codes, alpha
        )
        loss_psl = self._psl(image_embeds, image_feat, image_feat_m, text_ids, text_mask, alpha)
        return {
            "loss_ita": loss_ita,
            "loss_itm": loss_itm,
            "loss_mlm": loss_mlm,
            "loss_mim": loss_mim,
            "loss_psl": loss_psl,
        }

    def _ita(
        self, image_feat: Tensor, text_feat: Tensor, image_feat_m: Tensor, text_feat_m: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Contrast with this batch's momentum features and the queues, which then take those features in.

        Features (B, E) -> loss, sim_i2t (B, B), sim_t2i (B, B): the similarities within the batch
        """
        texts = torch.cat([text_feat_m.T, self.text_queue], dim=1)  # (E, B+Q)
        images = torch.cat([image_feat_m.T, self.image_queue], dim=1)
        sim_i2t = image_feat @ texts / self.temp
        sim_t2i = text_feat @ images / self.temp
        with torch.no_grad():
            positives = torch.zeros_like(sim_i2t).fill_diagonal_(1)
            target_i2t = losses.contrast_targets(image_feat_m @ texts / self.temp, positives, alpha)
            target_t2i = losses.contrast_targets(text_feat_m @ images / self.temp, positives, alpha)
        loss = losses.ita_loss(sim_i2t, sim_t2i, target_i2t, target_t2i)

        image_feats_m, text_feats_m = all_gather_rows(image_feat_m), all_gather_rows(text_feat_m)
        enqueue(self.image_queue, self.queue_ptr, image_feats_m)
        enqueue(self.text_queue, self.queue_ptr, text_feats_m)
        advance(self.queue_ptr, len(image_feats_m), self.image_queue.shape[1])
        batch = len(image_feat)
        return loss, sim_i2t[:, :batch], sim_t2i[:, :batch]

    @torch.no_grad()
    def _negatives(self, sim_i2t: Tensor, sim_t2i: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """A hard negative image for each text and text for each image.

        sim (B, B) -> image_neg (B,), text_neg (B,), counted (2B,) bool: which of these rows have a negative
        """
        itself = torch.eye(len(sim_i2t), dtype=torch.bool, device=sim_i2t.device)
        weights_t2i, has_image = losses.negative_weights(sim_t2i, itself)
        weights_i2t, has_text = losses.negative_weights(sim_i2t, itself)
        image_neg = losses.draw_negatives(weights_t2i) if draws.image_neg is None else draws.image_neg
        text_neg = losses.draw_negatives(weights_i2t) if draws.text_neg is None else draws.text_neg
        return image_neg, text_neg, torch.cat([has_image, has_text])

    def _itm_mlm(
        self,
        image_embeds: Tensor,
        image_embeds_m: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        mlm_ids: Tensor,
        mlm_labels: Tensor,
        negatives: tuple[Tensor, Tensor, Tensor],
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        """Matching and masked words in one multimodal pass of 4B rows over the same projected image keys.

        Rows: true pairs; (text i, negative image); (negative text, image i); (text i with masked words, image
        i).
        """
        image_neg, text_neg, has_negative = negatives
        batch, own = len(text_ids), torch.arange(len(text_ids), device=text_ids.device)
        hidden = self.text_encoder.bert(
            torch.cat([text_ids, text_ids, text_ids[text_neg], mlm_ids]),
            torch.cat([text_mask, text_mask, text_mask[text_neg], text_mask]),
            self.text_encoder.bert.project(image_embeds).rows(torch.cat([own, image_neg, own, own])),
        )  # (4B, T, D)

        labels = torch.cat([torch.ones_like(own), torch.zeros_like(own), torch.zeros_like(own)])
        counted = torch.cat([torch.ones_like(has_negative[:batch]), has_negative])
        loss_itm = losses.itm_loss(self.itm_head(hidden[: 3 * batch, 0]), labels, counted)

        hidden_mlm = hidden[3 * batch :]  # (B, T, D)
        with torch.no_grad():
            bert_m = self.text_encoder_m.bert
            hidden_m = bert_m(mlm_ids, text_mask, bert_m.project(image_embeds_m))
        if self.mlm_distill_over_sequence:
            logits_m = self.text_encoder_m.predict(hidden_m)
            logits = self.text_encoder.predict(hidden_mlm)
            return loss_itm, losses.mlm_loss_over_sequence(logits, mlm_labels, logits_m, alpha)
        masked = mlm_labels != -100  # (B, T)
        logits_m = self.text_encoder_m.predict(hidden_m[masked])
        logits = self.text_encoder.predict(hidden_mlm[masked])
        return loss_itm, losses.mlm_loss(logits, mlm_labels[masked], logits_m, alpha)

    def _mim(
        self,
        masked_embeds: Tensor,
        masked_embeds_m: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        patch_mask: Tensor,
        visual_codes: Tensor,
        alpha: float,
    ) -> Tensor:
        """Cross-modality masked image modelling: the image's tokens run through the text encoder's layers and
        read the text's embeddings; both momentum and online pass read the online ones."""
        bert, bert_m = self.text_encoder.bert, self.text_encoder_m.bert
        words = bert.embeddings(text_ids)  # (B, T, D)
        hidden = bert(inputs_embeds=masked_embeds, cross=bert.project(words, text_mask))  # (B, N, D)
        logits = self.mim_head(hidden[:, 1:][patch_mask])  # (M, visual vocabulary)
        with torch.no_grad():
            hidden_m = bert_m(inputs_embeds=masked_embeds_m, cross=bert_m.project(words, text_mask))
            logits_m = self.mim_head_m(hidden_m[:, 1:][patch_mask])
        return losses.mim_loss(logits, visual_codes[patch_mask], logits_m, alpha)

    def _psl(
        self,
        image_embeds: Tensor,
        image_feat: Tensor,
        image_feat_m: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        alpha: float,
    ) -> Tensor:
        """The words that the momentum encoder's [CLS] attends to most, predicted from the image feature."""
        with torch.no_grad():
            bert_m = self.text_encoder_m.bert
            attention = bert_m.last_self_attention(text_ids, text_mask, bert_m.project(image_embeds))
            votes = losses.keyword_votes(attention[:, :, 0], None if self.psl_padding else text_mask)
            positions, counted = losses.choose_keywords(votes)
            vocab_size = self.concept_head.out_features
            target = losses.keyword_targets(text_ids, positions, counted, vocab_size, self.cls_id)
            logits_m = self.concept_head_m(image_feat_m)
        return losses.psl_loss(self.concept_head(image_feat), target, logits_m, alpha)
