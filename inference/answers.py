"""Answers to questions, as VQA.py gives them: ranked ones of a list, or written ones.

B questions, T question tokens, R side of the square input.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from dataset.vqa import eos_token, make_answer_list, read_answer_list
from models.answer_tree import AnswerTree
from models.vqa import SIMLAVQA
from utils import check_scores

Questions = tuple[Tensor, Tensor, Tensor]  # image (B, 3, R, R), ids and mask (B, T)
Answers = list[list[tuple[str, float]]]  # of each question (answer, probability), best first


def ranking(
    model: SIMLAVQA, tokenizer, config: dict, answers: Sequence[str] | str | Path
) -> Callable[[Questions], Answers]:
    """Ranks a list of answers, or those of a JSON file; UserError for what is none."""
    settings = tokenizer, config["eos"], model.text_encoder.config.max_position_embeddings
    if isinstance(answers, str | Path):
        candidates = read_answer_list(str(answers), *settings)
    else:
        candidates = make_answer_list(list(answers), "answers", *settings)
    device = next(model.parameters()).device
    tree = AnswerTree.build(candidates.ids, candidates.mask).to(device)

    def rank(questions: Questions) -> Answers:
        numbers, probabilities = model.rank_answers(*questions, tree, config["k_test"])
        texts = [[candidates.texts[number] for number in row] for row in numbers.tolist()]
        return _pairs(texts, probabilities, config["precision"])

    return rank


def writing(model: SIMLAVQA, tokenizer, config: dict) -> Callable[[Questions], Answers]:
    """Writes answers by beam search."""
    ends = tokenizer.cls_token_id, eos_token(tokenizer, config["eos"]), tokenizer.pad_token_id

    def write(questions: Questions) -> Answers:
        ids, scores = model.generate(*questions, config["num_beams"], config["max_answer_tokens"], *ends)
        texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in ids]
        return _pairs(texts, scores.exp(), config["precision"])

    return write


def _pairs(texts: list[list[str]], probabilities: Tensor, precision: str) -> Answers:
    check_scores(probabilities, "probabilities of answers", precision)
    return [list(zip(*row, strict=True)) for row in zip(texts, probabilities.tolist(), strict=True)]
