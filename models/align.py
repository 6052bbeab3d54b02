"""What pre-training and retrieval share: the contrast with queues (ITA) and the hard negatives of ITM.

B batch, E shared embedding, Q queue.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import losses
from models.momentum import MomentumModel, advance, enqueue, new_queue
from utils import all_gather_rows


@dataclass
class Draws:
    """The random choices of one step; None = drawn here. Tests replay recorded ones."""

    image_neg: Tensor | None = None  # (B,) the image drawn for each text
    text_neg: Tensor | None = None  # (B,) the text drawn for each image


def unit_features(projection: nn.Module, cls_states: Tensor) -> Tensor:
    """The projected [CLS] states at unit length: (B, D) -> (B, E) float32, whatever the precision"""
    return F.normalize(projection(cls_states).float(), dim=-1)


def pair_rows(own: list[Tensor], apart: Tensor) -> Tensor:
    """The rows of a multimodal pass: n texts that read each image, each (B, T), image by image, then the B
    texts `apart` (B, T) that read other images -> ((n + 1) * B, T)
    """
    return torch.cat([torch.stack(own, dim=1).flatten(0, 1), apart])


def itm_rows(num_own: int, batch: int, device: torch.device) -> Tensor:
    """Where `pair_rows` has the pairs of ITM, the first two of the n own texts being the true and the
    negative one -> (3B,): true pairs, (text i, negative image), (negative text, image i)
    """
    number = torch.arange(batch, device=device)
    return torch.cat([num_own * number, num_own * batch + number, num_own * number + 1])


class AlignmentModel(MomentumModel):
    """A model with `temp`, `image_queue`, `text_queue` and `queue_ptr`."""

    def _add_queues(self, embed_dim: int, queue_size: int) -> None:
        self.register_buffer("image_queue", new_queue(embed_dim, queue_size))
        self.register_buffer("text_queue", new_queue(embed_dim, queue_size))

    def _ita(
        self,
        feats: tuple[Tensor, Tensor],
        feats_m: tuple[Tensor, Tensor],
        positives: Tensor,
        alpha: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Contrast with this batch's momentum features and the queues.

        feats, feats_m: image and text features (B, E), online and momentum; positives (B, B+Q) ->
        loss, sim_i2t (B, B), sim_t2i (B, B): the similarities within the batch
        """
        (image_feat, text_feat), (image_feat_m, text_feat_m) = feats, feats_m
        with torch.autocast(image_feat.device.type, enabled=False):  # differences of 1e-3 decide here
            texts = torch.cat([text_feat_m.T, self.text_queue], dim=1)  # (E, B+Q)
            images = torch.cat([image_feat_m.T, self.image_queue], dim=1)
            sim_i2t = image_feat @ texts / self.temp
            sim_t2i = text_feat @ images / self.temp
            with torch.no_grad():
                target_i2t = losses.contrast_targets(image_feat_m @ texts / self.temp, positives, alpha)
                target_t2i = losses.contrast_targets(text_feat_m @ images / self.temp, positives, alpha)
            loss = losses.ita_loss(sim_i2t, sim_t2i, target_i2t, target_t2i)
        batch = len(image_feat)
        return loss, sim_i2t[:, :batch], sim_t2i[:, :batch]

    @torch.no_grad()
    def _enqueue(self, feats_m: tuple[Tensor, Tensor], idx: Tensor | None = None) -> None:
        """The queues take in the features of all ranks, and idx_queue the image identities idx (B,)."""
        images, texts = map(all_gather_rows, feats_m)
        enqueue(self.image_queue, self.queue_ptr, images)
        enqueue(self.text_queue, self.queue_ptr, texts)
        if idx is not None:
            enqueue(self.idx_queue, self.queue_ptr, all_gather_rows(idx)[:, None])
        advance(self.queue_ptr, len(images), self.image_queue.shape[1])

    @torch.no_grad()
    def _negatives(
        self, sim_i2t: Tensor, sim_t2i: Tensor, same: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A hard negative image for each text and text for each image.

        sim (B, B); same (B, B) bool, pairs of one image identity -> image_neg (B,), text_neg (B,),
        counted (2B,) bool: which of these rows have a negative
        """
        weights_t2i, has_image = losses.negative_weights(sim_t2i, same)
        weights_i2t, has_text = losses.negative_weights(sim_i2t, same)
        image_neg = losses.draw_negatives(weights_t2i) if draws.image_neg is None else draws.image_neg
        text_neg = losses.draw_negatives(weights_i2t) if draws.text_neg is None else draws.text_neg
        return image_neg, text_neg, torch.cat([has_image, has_text])

    def _itm_loss(self, cls_states: Tensor, has_negative: Tensor) -> Tensor:
        """cls_states (3B, D): true pairs, (text i, negative image), (negative text, image i); has_negative
        (2B,). A true pair without negatives is left out, too: on matches alone the head learns to say yes.
        """
        batch = len(cls_states) // 3
        is_true = torch.arange(3 * batch, device=cls_states.device) < batch
        has_image, has_text = has_negative.chunk(2)
        counted = torch.cat([has_image | has_text, has_negative])
        return losses.itm_loss(self.itm_head(cls_states), is_true.long(), counted)
