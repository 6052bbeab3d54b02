"""The pre-training and retrieval steps as they are written down, one pass after the other: what the training
benchmark compares with. Same layers, same weights, same losses, nothing shared, nothing left out.

Every pass projects the image's keys and values anew, for true pairs, negatives and masked words; every layer
computes every token; heads predict at every token; negatives are drawn row by row; the twins move one by one.
B batch, N image tokens, T text tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models import losses
from models.align import Draws, unit_features
from models.bert import BertModel
from models.pretrain import SIMLA
from models.retrieval import SIMLARetrieval


def read(bert: BertModel, ids: Tensor, mask: Tensor, states: Tensor | None = None) -> Tensor:
    """Returns the last states (B, T, D) of texts (B, T), which read image states (B, N, D) if given any."""
    return bert(ids, mask, None if states is None else bert.project(states))


@torch.no_grad()
def move_twins(model: SIMLA | SIMLARetrieval) -> None:
    for module, twin in model.twins():
        for param, param_m in zip(module.parameters(), twin.parameters(), strict=True):
            param_m.data = param_m.data * model.momentum + param.data * (1 - model.momentum)


def draw(weights: Tensor) -> Tensor:
    return torch.tensor([torch.multinomial(row, 1).item() for row in weights], device=weights.device)


class PlainAlignment:
    """ITA and ITM, for both models."""

    def align(self, bert, bert_m, image, text_ids, text_mask, positives, same, alpha, draws, idx=None):
        image_embeds = self.visual_encoder(image)
        text_embeds = read(bert, text_ids, text_mask)
        feats = (
            unit_features(self.vision_proj, image_embeds[:, 0]),
            unit_features(self.text_proj, text_embeds[:, 0]),
        )
        with torch.no_grad():
            move_twins(self)
            image_embeds_m = self.visual_encoder_m(image)
            text_embeds_m = read(bert_m, text_ids, text_mask)
            feats_m = (
                unit_features(self.vision_proj_m, image_embeds_m[:, 0]),
                unit_features(self.text_proj_m, text_embeds_m[:, 0]),
            )
        loss_ita, sim_i2t, sim_t2i = self._ita(feats, feats_m, positives, alpha)
        self._enqueue(feats_m, idx)
        with torch.no_grad():
            weights_t2i, has_image = losses.negative_weights(sim_t2i, same)
            weights_i2t, has_text = losses.negative_weights(sim_i2t, same)
        image_neg = draw(weights_t2i) if draws is None else draws.image_neg
        text_neg = draw(weights_i2t) if draws is None else draws.text_neg
        true = read(bert, text_ids, text_mask, image_embeds)
        negative = read(
            bert,
            torch.cat([text_ids, text_ids[text_neg]]),
            torch.cat([text_mask, text_mask[text_neg]]),
            torch.cat([image_embeds[image_neg], image_embeds]),
        )
        cls_states = torch.cat([true[:, 0], negative[:, 0]])
        loss_itm = self._itm_loss(cls_states, torch.cat([has_image, has_text]))
        return loss_ita, loss_itm, image_embeds, image_embeds_m, feats, feats_m


class PlainSIMLA(PlainAlignment, SIMLA):
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
        mlm_places: Tensor | None = None,
        mim_places: Tensor | None = None,
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        bert, bert_m = self.text_encoder.bert, self.text_encoder_m.bert
        itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
        positives = F.pad(itself.float(), (0, self.image_queue.shape[1]))
        loss_ita, loss_itm, image_embeds, image_embeds_m, feats, feats_m = self.align(
            bert, bert_m, image, text_ids, text_mask, positives, itself, alpha, draws
        )

        masked = mlm_labels != -100
        hidden = read(bert, mlm_ids, text_mask, image_embeds)
        logits = self.text_encoder.predict(hidden)  # (B, T, V)
        with torch.no_grad():
            hidden_m = read(bert_m, mlm_ids, text_mask, image_embeds_m)
            soft_words = self.text_encoder_m.predict(hidden_m).softmax(-1)
        hard = F.cross_entropy(logits.flatten(0, 1), mlm_labels.flatten(), ignore_index=-100)
        soft = losses.soft_cross_entropy(logits, soft_words)[masked].mean()
        loss_mlm = (1 - alpha) * hard + alpha * soft

        words = bert.embeddings(text_ids)
        masked_embeds = self.visual_encoder(image, patch_mask)
        patches = bert(inputs_embeds=masked_embeds, cross=bert.project(words, text_mask))
        logits = self.mim_head(patches[:, 1:])  # (B, N-1, codes)
        with torch.no_grad():
            masked_embeds_m = self.visual_encoder_m(image, patch_mask)
            patches_m = bert_m(inputs_embeds=masked_embeds_m, cross=bert_m.project(words, text_mask))
            soft_codes = self.mim_head_m(patches_m[:, 1:]).softmax(-1)
        hard = F.cross_entropy(logits[patch_mask], visual_codes[patch_mask])
        soft = losses.soft_cross_entropy(logits, soft_codes)[patch_mask].mean()
        loss_mim = (1 - alpha) * hard + alpha * soft

        with torch.no_grad():
            before_last = bert_m.before_last(text_ids, text_mask, bert_m.project(image_embeds))
            attention = bert_m.last_self_attention(*before_last)
            positions, counted = losses.choose_keywords(losses.keyword_votes(attention[:, :, 0], text_mask))
            vocab_size = bert.config.vocab_size
            target = losses.keyword_targets(text_ids, positions, counted, vocab_size, self.cls_id)
            logits_m = self.concept_head_m(feats_m[0])
        loss_psl = losses.psl_loss(self.concept_head(feats[0]), target, logits_m, alpha)
        return {
            "loss_ita": loss_ita,
            "loss_itm": loss_itm,
            "loss_mlm": loss_mlm,
            "loss_mim": loss_mim,
            "loss_psl": loss_psl,
        }


class PlainRetrieval(PlainAlignment, SIMLARetrieval):
    def forward(
        self,
        image: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        idx: Tensor,
        alpha: float,
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        positives = losses.identity_positives(idx, self.idx_queue)
        same = idx[:, None] == idx[None]
        encoders = self.text_encoder, self.text_encoder_m
        loss_ita, loss_itm, *_ = self.align(
            *encoders, image, text_ids, text_mask, positives, same, alpha, draws, idx
        )
        return {"loss_ita": loss_ita, "loss_itm": loss_itm}
