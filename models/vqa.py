"""SIMLA for visual question answering: a multimodal question encoder and a causal answer decoder.

B questions, A answers (several to a question), N image tokens, T question tokens, L answer tokens, D width, V
vocabulary, K candidate answers.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from simla.models import losses
from simla.models.answer_tree import AnswerTree
from simla.models.bert import BertConfig, BertForMaskedLM, BertModel, CrossStates
from simla.models.momentum import MomentumModel, make_twin
from simla.models.vit import VisionTransformer, vit_sizes


class VQABatch(NamedTuple):
    """The indices are counted where the batch is made, so that no step waits for the device to count."""

    image: Tensor  # (B, 3, R, R)
    question_ids: Tensor  # (B, T)
    question_mask: Tensor  # (B, T) 1 = token, 0 = padding
    answer_ids: Tensor  # (A, L) the answers of question 0, then of question 1, ...; [CLS] first
    answer_mask: Tensor  # (A, L)
    answer_indices: Tensor  # (M,) of the answers' tokens after [CLS] among A * (L-1)
    weights: Tensor  # (A,)
    num_answers: Tensor  # (B,) of each question, A in all


class SIMLAVQA(MomentumModel):
    """State-dict names and their order are the published code's.

    decoder_layers 0: as many as the upper half of the text encoder has, which pre-training fills them from.
    vqa_no_distill: no momentum targets, as published; mlm_distill_over_sequence: the student's soft
    log-probabilities are taken over the sequence, as published.
    """

    twin_names = ("visual_encoder", "text_encoder", "text_decoder")

    def __init__(
        self,
        vit: dict,
        bert: BertConfig,
        decoder_layers: int = 0,
        momentum: float = 0.995,
        vqa_no_distill: bool = False,
        mlm_distill_over_sequence: bool = False,
    ):
        super().__init__()
        self.momentum = momentum
        self.vqa_no_distill = vqa_no_distill
        self.mlm_distill_over_sequence = mlm_distill_over_sequence
        num_layers = bert.num_hidden_layers
        decoder_layers = decoder_layers or num_layers - num_layers // 2
        answers = replace(bert, num_hidden_layers=decoder_layers, text_layers_alone=0)
        self.visual_encoder = VisionTransformer(**vit)
        self.text_encoder = BertModel(bert)
        self.text_decoder = BertForMaskedLM(answers)
        self.visual_encoder_m = make_twin(self.visual_encoder)
        self.text_encoder_m = make_twin(self.text_encoder)
        self.text_decoder_m = make_twin(self.text_decoder)

    @classmethod
    def from_config(cls, config: dict) -> "SIMLAVQA":
        return cls(
            vit=vit_sizes(config),
            bert=BertConfig.read(config["bert_config"]),
            decoder_layers=config["decoder_layers"],
            momentum=config["momentum"],
            vqa_no_distill=config["released_code"]["vqa_no_distill"],
            mlm_distill_over_sequence=config["released_code"]["mlm_distill_over_sequence"],
        )

    def forward(self, batch: VQABatch, alpha: float) -> dict[str, Tensor]:
        """Return the cross-entropy of the answers' tokens after [CLS], weighted, for each question; alpha is
        the weight of the momentum targets.
        """
        self.update_twins()
        alpha = 0.0 if self.vqa_no_distill else alpha
        over_sequence = self.mlm_distill_over_sequence and alpha > 0
        indices = None if over_sequence else batch.answer_indices
        logits = self.answer_logits(batch, indices)  # (M, V), over the sequence (A, L-1, V)
        with torch.no_grad():  # without soft targets the twins need not be asked
            logits_m = self.answer_logits(batch, indices, "_m") if alpha > 0 else logits.detach()
        labels = batch.answer_ids[:, 1:]  # (A, L-1)
        weights = batch.weights / len(batch.image)  # (A,)
        if over_sequence:
            labels = labels.masked_fill(batch.answer_mask[:, 1:] == 0, -100)
            return {"loss": losses.answer_loss_over_sequence(logits, labels, logits_m, weights, alpha)}
        weights = weights[:, None].expand_as(labels).flatten()[indices]  # (M,)
        return {"loss": losses.answer_loss(logits, labels.flatten()[indices], logits_m, weights, alpha)}

    def question_states(
        self, image: Tensor, question_ids: Tensor, question_mask: Tensor, suffix: str = ""
    ) -> Tensor:
        """Return the states (B, T, D) of questions (B, T) read with their images (B, 3, R, R)."""
        visual_encoder, text_encoder = (getattr(self, name + suffix) for name in self.twin_names[:2])
        return text_encoder(question_ids, question_mask, text_encoder.project(visual_encoder(image)))

    def answer_logits(self, batch: VQABatch, indices: Tensor | None, suffix: str = "") -> Tensor:
        """Return the logits of tokens 1 to L-1 of every answer (A, L-1, V), or of those at `indices` (M,)
        among A * (L-1): (M, V); suffix "_m": the momentum twins'.
        """
        decoder = getattr(self, "text_decoder" + suffix)
        questions = self.question_states(batch.image, batch.question_ids, batch.question_mask, suffix)
        question = torch.arange(len(questions), device=questions.device)
        question = question.repeat_interleave(batch.num_answers, output_size=len(batch.answer_ids))  # (A,)
        keys = decoder.project(questions, batch.question_mask).rows(question)
        hidden = decoder(batch.answer_ids[:, :-1], batch.answer_mask[:, :-1], keys, causal=True)
        return decoder.predict(hidden if indices is None else hidden.flatten(0, 1)[indices])

    @torch.no_grad()
    def rank_answers(
        self,
        image: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answers: AnswerTree,
        k: int,
        chunk_rows: int = 1024,
    ) -> tuple[Tensor, Tensor]:
        """Return the k best of a fixed list of K answers to each question, best first: their numbers and
        their probabilities among the k, (B, min(k, K)).

        At most chunk_rows answers are scored at a time. The first token's probability picks the k; their
        score is its logarithm plus the log-likelihood of the whole answer, which counts the first token
        again, as published. Of equal answers the earlier one stands first.
        """
        k = min(k, len(answers.ids))
        questions = self.question_states(image, question_ids, question_mask)
        ranked = [
            self.rank_states(questions[rows], question_mask[rows], answers, k, chunk_rows)
            for rows in torch.arange(len(image), device=image.device).split(max(1, chunk_rows // k))
        ]
        numbers, probabilities = map(torch.cat, zip(*ranked, strict=True))
        return numbers, probabilities

    def rank_states(
        self, questions: Tensor, question_mask: Tensor, answers: AnswerTree, k: int, chunk_rows: int
    ) -> tuple[Tensor, Tensor]:
        """Return what `rank_answers` does, of the states (B, T, D) of few enough questions."""
        cross = self.text_decoder.project(questions, question_mask)
        start = answers.ids[:1, :1].expand(len(questions), 1)  # [CLS]
        hidden = self.text_decoder(start, torch.ones_like(start), cross, causal=True)
        first = log_probabilities(self.text_decoder.predict(hidden[:, 0]))[:, answers.ids[:, 1]]  # (B, K)
        first, chosen = (ranked[:, :k] for ranked in first.sort(descending=True, stable=True))
        rest = [self._log_likelihood(answers, columns, cross) for columns in chosen.split(chunk_rows, dim=1)]
        scores, order = (2 * first + torch.cat(rest, dim=1)).sort(descending=True, stable=True)
        return chosen.gather(1, order), scores.softmax(-1).float()

    def _log_likelihood(self, answers: AnswerTree, chosen: Tensor, cross: CrossStates) -> Tensor:
        """Return the log-likelihood (B, k) of what follows the first two tokens of the chosen answers (B, k).

        The wide LM head sees each beginning once, and [CLS], which predicts the second token, not again.
        """
        branches = answers.branches(chosen)
        hidden = self.text_decoder(branches.ids, branches.seen, cross, position_ids=branches.positions)
        column = torch.arange(hidden.shape[1], device=hidden.device)
        predicts = (column > 0) & (column < branches.num[:, None])  # (B, n), M of them
        log_probs = log_probabilities(self.text_decoder.predict(hidden[predicts]))  # (M, V)
        rows = (predicts.flatten().cumsum(0) - 1).view_as(predicts)
        is_next = answers.mask[chosen][..., 2:].bool()  # (B, k, L-2)
        labels, predictors = answers.ids[chosen][..., 2:], branches.predictors[..., 1:]
        rows = rows.gather(1, predictors.flatten(1)).view_as(predictors)
        likelihoods = torch.zeros_like(is_next, dtype=torch.float64)  # sums near -30 would round in float32
        likelihoods[is_next] = log_probs[rows[is_next], labels[is_next]].double()
        return likelihoods.sum(-1)

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        num_beams: int,
        max_tokens: int,
        cls_id: int,
        sep_id: int,
        pad_id: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Return free answers by beam search (1 beam: greedy), without a reward for length: ids (B,
        num_beams, L) without [CLS], best first, padding after [SEP], an answer of max_tokens (at most the
        decoder's positions) cut off there; log-probabilities (B, num_beams), -inf where there are fewer
        answers.
        """
        decoder = self.text_decoder
        questions = self.question_states(image, question_ids, question_mask)
        cross = decoder.project(questions, question_mask)
        ids = torch.full((len(image), num_beams, 1), cls_id, device=image.device)
        shape = len(image), num_beams
        scores = torch.full(shape, -torch.inf, dtype=torch.float32, device=image.device)
        scores[:, 0] = 0.0  # the others would repeat it
        for _ in range(min(max_tokens, decoder.bert.config.max_position_embeddings)):
            rows = ids.flatten(0, 1)
            hidden = decoder(rows, torch.ones_like(rows), cross, causal=True)[:, -1]
            following = log_probabilities(decoder.predict(hidden)).unflatten(0, scores.shape)
            ids, scores = extend_beams(ids, scores, following, sep_id, pad_id)
            if (is_finished(ids, sep_id, pad_id) | scores.isinf()).all():
                break
        return ids[..., 1:], scores


def log_probabilities(logits: Tensor) -> Tensor:
    """Return those of every token, (..., V) float32, NaN where any of the logits is infinite: one of -inf
    alone, as half precision makes it, would pass as the probability 0.
    """
    logits = logits.float()
    return logits.log_softmax(-1).add_(0 * logits.amin(-1, keepdim=True))


def is_finished(ids: Tensor, sep_id: int, pad_id: int) -> Tensor:
    """Return which beams (B, n, L) have ended, (B, n) bool."""
    return (ids[..., -1] == sep_id) | (ids[..., -1] == pad_id)


def extend_beams(
    ids: Tensor, scores: Tensor, following: Tensor, sep_id: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """Return the n best continuations of n beams by one token, best first, and their scores: (B, n, L+1),
    (B, n).

    ids (B, n, L), scores (B, n) their log-probabilities, following (B, n, V) those of every next token. A
    finished beam goes on by padding alone, at no cost; no other beam does.
    """
    is_pad = torch.arange(following.shape[-1], device=following.device) == pad_id  # (V,)
    finished = is_finished(ids, sep_id, pad_id)[..., None]
    padding = torch.zeros_like(following).masked_fill(~is_pad, -torch.inf)
    following = torch.where(finished, padding, following.masked_fill(is_pad, -torch.inf))
    scores, best = (scores[..., None] + following).flatten(1).topk(scores.shape[1], dim=1)
    beams = (best // following.shape[-1])[..., None]
    kept = ids.gather(1, beams.expand(-1, -1, ids.shape[-1]))
    return torch.cat([kept, (best % following.shape[-1])[..., None]], dim=-1), scores
