"""SIMLA pre-training: image-text alignment at three levels by five losses (paper section 3).

B batch, N image tokens, T text tokens, D width, E shared embedding, Q queue, V vocabulary.
"""

import torch
from torch import Tensor, nn

from models import losses
from models.align import AlignmentModel, Draws, itm_rows, pair_rows, unit_features
from models.bert import BertConfig, BertForMaskedLM
from models.momentum import make_twin
from models.vit import VisionTransformer, vit_sizes
from utils import UserError, find_places


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
        mlm_places: Tensor | None = None,
        mim_places: Tensor | None = None,
        draws: Draws | None = None,
    ) -> dict[str, Tensor]:
        """The five losses of one batch.

        image (B, 3, R, R); text_ids, text_mask, mlm_ids, mlm_labels (B, T): the caption, its padding mask,
        the caption with masked words, their ids (-100 elsewhere); patch_mask (B, N-1) bool: patches hidden
        from MIM; visual_codes (B, N-1): their targets; alpha: weight of the momentum targets; mlm_places (M,)
        of B * T, mim_places (K,) of B * (N-1): the numbers of the masked words and patches. Without them the
        host waits for the device to count.
        """
        mlm_places = find_places(mlm_labels != -100) if mlm_places is None else mlm_places
        mim_places = find_places(patch_mask) if mim_places is None else mim_places
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
            self.update_twins()
        # Every image is encoded twice, whole and with hidden patches: the same weights, so one batch.
        images, hidden = torch.cat([image, image]), torch.cat([torch.zeros_like(patch_mask), patch_mask])
        image_embeds, masked_embeds = self.visual_encoder(images, hidden).chunk(2)  # (B, N, D) each
        text_cls = self.text_encoder.bert.first_state(text_ids, text_mask)  # (B, D)
        image_feat = unit_features(self.vision_proj, image_embeds[:, 0])  # (B, E)
        feats = image_feat, unit_features(self.text_proj, text_cls)
        with torch.no_grad():
            image_embeds_m, masked_embeds_m = self.visual_encoder_m(images, hidden).chunk(2)
            text_cls_m = self.text_encoder_m.bert.first_state(text_ids, text_mask)
            image_feat_m = unit_features(self.vision_proj_m, image_embeds_m[:, 0])
            feats_m = image_feat_m, unit_features(self.text_proj_m, text_cls_m)

        itself = torch.eye(len(image), dtype=torch.bool, device=image.device)
        positives = nn.functional.pad(itself.float(), (0, self.image_queue.shape[1]))  # (B, B+Q)
        loss_ita, sim_i2t, sim_t2i = self._ita(feats, feats_m, positives, alpha)
        self._enqueue(feats_m)
        negatives = self._negatives(sim_i2t, sim_t2i, itself, draws or Draws())
        logits_m = self._word_logits_m(image_embeds_m, mlm_ids, text_mask, mlm_places)
        loss_itm, loss_mlm = self._itm_mlm(
            image_embeds, text_ids, text_mask, mlm_ids, mlm_labels, mlm_places, negatives, logits_m, alpha
        )
        loss_mim = self._mim(
            masked_embeds, masked_embeds_m, text_ids, text_mask, mim_places, visual_codes, alpha
        )
        loss_psl = self._psl(image_embeds, image_feat, image_feat_m, text_ids, text_mask, alpha)
        return {
            "loss_ita": loss_ita,
            "loss_itm": loss_itm,
            "loss_mlm": loss_mlm,
            "loss_mim": loss_mim,
            "loss_psl": loss_psl,
        }

    @torch.no_grad()
    def _word_logits_m(
        self, image_embeds_m: Tensor, mlm_ids: Tensor, text_mask: Tensor, mlm_places: Tensor
    ) -> Tensor:
        """Returns the momentum encoder's logits at the masked words (M, V), the targets of MLM, or with
        mlm_distill_over_sequence everywhere (B, T, V).
        """
        bert_m = self.text_encoder_m.bert
        places = None if self.mlm_distill_over_sequence else mlm_places
        hidden = bert_m(mlm_ids, text_mask, bert_m.project(image_embeds_m), places=places)
        return self.text_encoder_m.predict(hidden)

    @torch.no_grad()
    def _attention_m(self, image_embeds: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Returns how much [CLS] attends to every word in the momentum encoder's last self-attention,
        (B, H, T), the text having read the online image states (B, N, D): where PSL finds its keywords.
        """
        bert_m = self.text_encoder_m.bert
        cross = bert_m.project(image_embeds, num_layers=-1)  # the last layer does not come to read it
        hidden, mask = bert_m.before_last(text_ids, text_mask, cross)
        return bert_m.last_self_attention(hidden, mask)[:, :, 0]

    def _itm_mlm(
        self,
        image_embeds: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        mlm_ids: Tensor,
        mlm_labels: Tensor,
        mlm_places: Tensor,
        negatives: tuple[Tensor, Tensor, Tensor],
        logits_m: Tensor,
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        """Matching and masked words in one multimodal pass of 4B rows over the same projected image keys:
        each image is read by its text, a negative one and its text with masked words; B texts read a negative
        image.
        """
        image_neg, text_neg, has_negative = negatives
        batch, length = text_ids.shape
        number_in_pass = 3 * (mlm_places // length) + 2  # the row of a masked word's text
        words = number_in_pass * length + mlm_places % length  # (M,)
        cls = itm_rows(3, batch, text_ids.device) * length  # (3B,)
        hidden = self.text_encoder.bert(
            pair_rows([text_ids, text_ids[text_neg], mlm_ids], text_ids),
            pair_rows([text_mask, text_mask[text_neg], text_mask], text_mask),
            self.text_encoder.bert.project(image_embeds).rows(image_neg),
            places=None if self.mlm_distill_over_sequence else torch.cat([cls, words]),
        )  # (3B + M, D)
        if self.mlm_distill_over_sequence:  # (4B, T, D)
            loss_itm = self._itm_loss(hidden.flatten(0, 1)[cls], has_negative)
            logits = self.text_encoder.predict(hidden[2 : 3 * batch : 3])
            return loss_itm, losses.mlm_loss_over_sequence(logits, mlm_labels, logits_m, alpha)
        loss_itm = self._itm_loss(hidden[: len(cls)], has_negative)
        logits = self.text_encoder.predict(hidden[len(cls) :])
        labels = mlm_labels.flatten().index_select(0, mlm_places)
        return loss_itm, losses.mlm_loss(logits, labels, logits_m, alpha)

    def _mim(
        self,
        masked_embeds: Tensor,
        masked_embeds_m: Tensor,
        text_ids: Tensor,
        text_mask: Tensor,
        mim_places: Tensor,
        visual_codes: Tensor,
        alpha: float,
    ) -> Tensor:
        """Cross-modality masked image modelling: the image's tokens run through the text encoder's layers and
        read the text's embeddings; both momentum and online pass read the online ones."""
        bert, bert_m = self.text_encoder.bert, self.text_encoder_m.bert
        words = bert.embeddings(text_ids)  # (B, T, D)
        places = mim_places + mim_places // visual_codes.shape[1] + 1  # each image has its [CLS] before it
        cross = bert.project(words, text_mask)
        logits = self.mim_head(bert(inputs_embeds=masked_embeds, cross=cross, places=places))  # (K, codes)
        with torch.no_grad():
            cross_m = bert_m.project(words, text_mask)
            logits_m = self.mim_head_m(bert_m(inputs_embeds=masked_embeds_m, cross=cross_m, places=places))
        codes = visual_codes.flatten().index_select(0, mim_places)
        return losses.mim_loss(logits, codes, logits_m, alpha)

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
            attention = self._attention_m(image_embeds, text_ids, text_mask)
            _, positions, counted = self._choose_keywords(attention, text_mask)
            vocab_size = self.text_encoder.bert.config.vocab_size
            target = losses.keyword_targets(text_ids, positions, counted, vocab_size, self.cls_id)
            logits_m = self.concept_head_m(image_feat_m)
        return losses.psl_loss(self.concept_head(image_feat), target, logits_m, alpha)

    def _choose_keywords(self, attention: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """attention (B, H, T) -> votes (B, T), chosen positions (B, K) and which of them count (B, K) bool"""
        votes = losses.keyword_votes(attention, None if self.psl_padding else text_mask)
        return votes, *losses.choose_keywords(votes)

    @torch.no_grad()
    def keywords(self, image: Tensor, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What PSL takes its targets from: image (B, 3, R, R); text_ids, text_mask (B, T) -> the momentum
        encoder's attention from [CLS] to every word (B, H, T), the votes of its heads (B, T; padding -1) and
        which places are keywords (B, T) bool, [CLS] never
        """
        attention = self._attention_m(self.visual_encoder(image), text_ids, text_mask)
        votes, positions, counted = self._choose_keywords(attention, text_mask)
        chosen = torch.zeros_like(votes, dtype=torch.bool).scatter(1, positions, counted)
        return attention, votes, chosen & (text_ids != self.cls_id)
