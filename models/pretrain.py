"""SIMLA pre-training: image-text alignment at three levels by five losses (paper section 3).

B batch, N image tokens, T text tokens, D width, E shared embedding, Q queue, V vocabulary.
"""

import torch
from torch import Tensor, nn

from models import losses
from models.align import AlignmentModel, Draws, unit_features
from models.bert import BertConfig, BertForMaskedLM
from models.momentum import make_twin
from models.vit import VisionTransformer, vit_sizes
from utils import UserError


class SIMLA(AlignmentModel):
    """State-dict names, their order and that of the parameters are the published code's."""

    twin_names = ("visual_encoder", "vision_proj", "text_encoder", "text_proj", "mim_head", "concept_head")
    without_gradient = ()

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
            return VisionTransformer(**{**vit, "mask_token": True})

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

        self._add_queues(embed_dim, queue_size)
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
            self.update_twins()
        # Every image is encoded twice, whole and with hidden patches: the same weights, so one batch.
        images, hidden = torch.cat([image, image]), torch.cat([torch.zeros_like(patch_mask), patch_mask])
        image_embeds, masked_embeds = self.visual_encoder(images, hidden).chunk(2)  # (B, N, D) each
        text_embeds = self.text_encoder.bert(text_ids, text_mask)  # (B, T, D)
        feats = unit_features(self.vision_proj, image_embeds), unit_features(self.text_proj, text_embeds)
        with torch.no_grad():
            image_embeds_m, masked_embeds_m = self.visual_encoder_m(images, hidden).chunk(2)
            text_embeds_m = self.text_encoder_m.bert(text_ids, text_mask)
            image_feat_m = unit_features(self.vision_proj_m, image_embeds_m)  # (B, E)
            feats_m = image_feat_m, unit_features(self.text_proj_m, text_embeds_m)

        itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
        positives = nn.functional.pad(itself.float(), (0, self.image_queue.shape[1]))  # (B, B+Q)
        loss_ita, sim_i2t, sim_t2i = self._ita(feats, feats_m, positives, alpha)
        self._enqueue(feats_m)
        negatives = self._negatives(sim_i2t, sim_t2i, itself, draws or Draws())
        loss_itm, loss_mlm = self._itm_mlm(
            image_embeds, image_embeds_m, text_ids, text_mask, mlm_ids, mlm_labels, negatives, alpha
        )
        loss_mim = self._mim(
            masked_embeds, masked_embeds_m, text_ids, text_mask, patch_mask, visual_codes, alpha
        )
        loss_psl = self._psl(image_embeds, feats[0], image_feat_m, text_ids, text_mask, alpha)
        return {
            "loss_ita": loss_ita,
            "loss_itm": loss_itm,
            "loss_mlm": loss_mlm,
            "loss_mim": loss_mim,
            "loss_psl": loss_psl,
        }

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

        loss_itm = self._itm_loss(hidden[: 3 * batch, 0], has_negative)

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
