"""The part that pre-training and retrieval share: features of both encoders, their contrast with queues
(ITA), and the matching of pairs with hard negatives (ITM).

B batch, Q queue, N image tokens, T text tokens, D width, E shared embedding.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla.models import losses
from simla.models.bert import CrossStates
from simla.models.momentum import MomentumModel, advance, enqueue, new_queue
from simla.utils import all_gather_rows


class Encoded(NamedTuple):
    """A batch as the encoders give it; the features have unit length. None: what no loss reads."""

    image_embeds: Tensor | None  # (B, N, D)
    image_feat: Tensor | None  # (B, E)
    text_feat: Tensor | None  # (B, E)


class Draws(NamedTuple):
    """The random choices of one step; tests replay recorded ones."""

    image_neg: Tensor  # (B,) the image drawn for each text
    text_neg: Tensor  # (B,) the text drawn for each image


class Negatives(NamedTuple):
    """The hard negatives of a batch, and where there is one at all."""

    image_neg: Tensor  # (B,) an image for each text
    text_neg: Tensor  # (B,) a text for each image
    has_image: Tensor  # (B,) bool
    has_text: Tensor  # (B,) bool


def unit_features(projection: nn.Module, cls_states: Tensor) -> Tensor:
    """Return the projected [CLS] states at unit length: (B, D) -> (B, E) float32, whatever the precision."""
    return F.normalize(projection(cls_states).float(), dim=-1)


class AlignmentModel(MomentumModel):
    """A model with both encoders, their projections, `itm_head`, `temp`, and queues of features."""

    def _add_queues(self, embed_dim: int, queue_size: int) -> None:
        self.register_buffer("image_queue", new_queue(embed_dim, queue_size))
        self.register_buffer("text_queue", new_queue(embed_dim, queue_size))

    @torch.no_grad()
    def begin_step(self) -> None:
        self.temp.clamp_(0.001, 0.5)
        self.update_twins()

    def encode_image(self, image: Tensor, suffix: str = "") -> tuple[Tensor, Tensor]:
        """Return token states (B, N, D) and features (B, E) of images (B, 3, R, R); suffix "_m": the momentum
        twins'.
        """
        visual_encoder, vision_proj = (getattr(self, n + suffix) for n in ("visual_encoder", "vision_proj"))
        image_embeds = visual_encoder(image)
        return image_embeds, unit_features(vision_proj, image_embeds[:, 0])

    def encode_text(self, text_ids: Tensor, text_mask: Tensor, suffix: str = "") -> Tensor:
        """Return features (B, E) of texts (B, T)."""
        text_encoder, text_proj = (getattr(self, n + suffix) for n in ("text_encoder", "text_proj"))
        return unit_features(text_proj, text_encoder(text_ids, text_mask, first_only=True)[:, 0])

    def encode(self, batch: NamedTuple, suffix: str = "") -> Encoded:
        """Return states and features of a batch that has `image`, `text_ids` and `text_mask`."""
        text_feat = self.encode_text(batch.text_ids, batch.text_mask, suffix)
        return Encoded(*self.encode_image(batch.image, suffix), text_feat)

    def ita(
        self, online: Encoded, momentum: Encoded, positives: Tensor, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss of the contrast with this batch's momentum features and the queues (paper eq. 1),
        and the similarities within the batch, sim_i2t and sim_t2i (B, B).

        positives (B, B+Q): the hard targets, rows that sum to 1
        """
        with torch.autocast(positives.device.type, enabled=False):  # differences of 1e-3 decide here
            texts = torch.cat([momentum.text_feat.T, self.text_queue], dim=1)  # (E, B+Q)
            images = torch.cat([momentum.image_feat.T, self.image_queue], dim=1)
            sim_i2t = online.image_feat @ texts / self.temp  # (B, B+Q)
            sim_t2i = online.text_feat @ images / self.temp
            with torch.no_grad():
                target_i2t = losses.contrast_targets(
                    momentum.image_feat @ texts / self.temp, positives, alpha
                )
                target_t2i = losses.contrast_targets(
                    momentum.text_feat @ images / self.temp, positives, alpha
                )
            loss = losses.ita_loss(sim_i2t, sim_t2i, target_i2t, target_t2i)
        batch_size = len(positives)
        return loss, sim_i2t[:, :batch_size], sim_t2i[:, :batch_size]

    @torch.no_grad()
    def enqueue(self, momentum: Encoded, idx: Tensor | None = None) -> None:
        """Put the features of all ranks into the queues, and the image identities idx (B,) into idx_queue."""
        images, texts = all_gather_rows(momentum.image_feat), all_gather_rows(momentum.text_feat)
        enqueue(self.image_queue, self.queue_ptr, images)
        enqueue(self.text_queue, self.queue_ptr, texts)
        if idx is not None:
            enqueue(self.idx_queue, self.queue_ptr, all_gather_rows(idx)[:, None])
        advance(self.queue_ptr, len(images), self.image_queue.shape[1])

    @torch.no_grad()
    def draw_negatives(
        self, sim_i2t: Tensor, sim_t2i: Tensor, positives: Tensor, draws: Draws | None
    ) -> Negatives:
        """Return a hard negative image for each text and text for each image, drawn from the similarities
        (B, B); no positive is a negative.
        """
        excluded = positives[:, : len(positives)] > 0  # (B, B)
        weights_t2i, has_image = losses.negative_weights(sim_t2i, excluded)
        weights_i2t, has_text = losses.negative_weights(sim_i2t, excluded)
        if draws is None:
            draws = Draws(losses.draw_negatives(weights_t2i), losses.draw_negatives(weights_i2t))
        return Negatives(*draws, has_image, has_text)

    def itm(self, image_keys: CrossStates, batch: NamedTuple, negatives: Negatives) -> Tensor:
        """Return the loss of telling true pairs from those with a hard negative (paper eq. 2), 3B in all.

        A true pair without negatives is left out, too: on matches alone the head learns to say yes.
        """
        image_neg, text_neg, has_image, has_text = negatives
        row = torch.arange(len(image_neg), device=image_neg.device)
        image = torch.cat([row, image_neg, row])  # (3B,): true pairs, (text, negative image),
        text = torch.cat([row, row, text_neg])  # (negative text, image)
        hidden = self.text_encoder(batch.text_ids[text], batch.text_mask[text], image_keys.rows(image))
        is_match = torch.cat([torch.ones_like(row), torch.zeros_like(row), torch.zeros_like(row)])
        counted = torch.cat([has_image | has_text, has_image, has_text])
        return losses.itm_loss(self.itm_head(hidden[:, 0]), is_match, counted)


def alignment_chance(num_candidates: int) -> dict[str, float]:
    """Return ITA and ITM, in nats, of a model that knows nothing: an even guess among the candidates, B + Q,
    whatever the targets, and a head that knows only that two pairs of three do not match.
    """
    return {"loss_ita": math.log(num_candidates), "loss_itm": math.log(3) - 2 / 3 * math.log(2)}
