"""Answers to questions, as VQA.py gives them: ranked ones of a list, or written ones.

B questions, T question tokens, R side of the square input.
"""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from simla.dataset.vqa import answer_texts, eos_token, make_answer_list, read_answer_list
from simla.models.answer_tree import AnswerTree
from simla.models.vqa import SIMLAVQA
from simla.utils import UserError, check_scores, log

NAME_OF_DATA = re.compile(r"\.(jsonl?|txt|csv|tsv|ya?ml)\s*$", re.IGNORECASE)
PATH = re.compile(r"[/\\]|^~|\.[a-z]\w*$", re.IGNORECASE)

Questions = tuple[Tensor, Tensor, Tensor]  # image (B, 3, R, R), ids and mask (B, T)
Answers = list[list[tuple[str, float]]]  # of each question (answer, probability), best first


def ranking(
    model: SIMLAVQA, tokenizer, config: dict, answers: Sequence[str] | str | Path
) -> Callable[[Questions], Answers]:
    """Return a function that ranks a list of answers, or those of a JSON file. A single answer, which is
    certain whatever the image shows, is logged. Raises UserError for what is no list, or one that holds the
    name of a file.
    """
    settings = tokenizer, config["eos"], model.text_encoder.config.max_position_embeddings
    if isinstance(answers, str | Path):
        candidates = read_answer_list(str(answers), *settings)
    else:
        if isinstance(answers, bytes) or not isinstance(answers, Iterable):
            raise UserError(
                f"answers are a {type(answers).__name__}; expected a list of texts or the path of a JSON list"
            )
        answers = list(answers)
        check_no_file(answers)
        candidates = make_answer_list(answers, "answers", *settings)
    if len(candidates.texts) == 1:
        (answer,) = candidates.texts
        log.warning(f"there is one answer to rank, {answer!r}: its probability is 1 for any image")
    device = next(model.parameters()).device
    tree = AnswerTree.build(candidates.ids, candidates.mask).to(device)

    def rank(questions: Questions) -> Answers:
        numbers, probabilities = model.rank_answers(*questions, tree, config["k_test"])
        texts = [[candidates.texts[number] for number in row] for row in numbers.tolist()]
        return _pairs(texts, probabilities, config["precision"])

    return rank


def check_no_file(answers: Sequence[object]) -> None:
    """Raise UserError where an answer is named like a data file, or is the only one and looks like a path."""
    of_path = NAME_OF_DATA if len(answers) > 1 else PATH
    for answer in answers:
        if isinstance(answer, str) and (NAME_OF_DATA.search(answer) or of_path.search(answer)):
            there = "which is a file" if os.path.isfile(answer) else "and there is no such file"  # noqa: PTH113
            remedy = "give the path of a JSON list by itself, or the answers"
            raise UserError(f"one of the answers is {answer!r}, {there}; {remedy}")


def writing(model: SIMLAVQA, tokenizer, config: dict) -> Callable[[Questions], Answers]:
    """Return a function that writes answers by beam search."""
    ends = tokenizer.cls_token_id, eos_token(tokenizer, config["eos"]), tokenizer.pad_token_id

    def write(questions: Questions) -> Answers:
        ids, scores = model.generate(*questions, config["num_beams"], config["max_answer_tokens"], *ends)
        return _pairs(answer_texts(tokenizer, ids), scores.exp(), config["precision"])

    return write


def _pairs(texts: list[list[str]], probabilities: Tensor, precision: str) -> Answers:
    check_scores(probabilities, "probabilities of answers", precision)
    return [list(zip(*row, strict=True)) for row in zip(texts, probabilities.tolist(), strict=True)]
