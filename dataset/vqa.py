"""Questions about images, with what several people answered: training, evaluation, the list of answers."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from simla.dataset.items import (
    Collate,
    EvalItems,
    finetune_items,
    leave_out_unreadable,
    position_limit,
    warn_of_unknown_words,
)
from simla.dataset.loaders import train_loader
from simla.dataset.readers.annotations import NUMBER_OR_TEXT, TEXT, TEXTS, Mapped, item_of, read_annotations
from simla.dataset.readers.json_list import read_json
from simla.dataset.text import clean_question, tokenize, written
from simla.utils import UserError, log, printable, true_indices

FIELDS = {"dataset": TEXT, "image": TEXT, "question": TEXT}
ROOTS = {"vqa": "vqa_root", "vg": "vg_root"}  # data set of an entry -> config key
WEIGHT_OF_ALL_ANSWERS = {"vqa": 1.0, "vg": 0.5}  # a Visual Genome question has a single annotator
MAX_WORDS_IN_TRAINING, MAX_WORDS_IN_EVALUATION = 30, 50


def read_questions(files: str | list[str], config: dict, **fields: tuple) -> Mapped:
    """Return the entries of VQA annotation files, which have `fields` beside FIELDS; image paths are relative
    to the root of the entry's data set, or where the config has none to image_root, or else to the file.
    """
    entries = read_annotations(files, {**FIELDS, **fields}, config["image_root"], check=_check_data_set)
    roots = {name: Path(config[key]).absolute() for name, key in ROOTS.items() if config[key]}
    return Mapped(entries, partial(_at_its_root, roots=roots))


def _check_data_set(entry: dict, where: str) -> None:
    if entry["dataset"] not in ROOTS:
        raise UserError(f"{where}: 'dataset' must be 'vqa' or 'vg', found {entry['dataset']!r}")


def _at_its_root(entry: dict, roots: dict[str, Path]) -> dict:
    root = roots.get(entry["dataset"])
    return {**entry, "images": [str(root / entry["image"])]} if root else entry


def given_answers(entry: dict) -> list[str]:
    """Return what the annotators said, one answer each."""
    return [entry["answer"]] if isinstance(entry["answer"], str) else entry["answer"]


def answer_texts(tokenizer, ids: Tensor) -> list[list[str]]:
    """Return the texts of generated ids (B, K, L), without special tokens."""
    tokens = partial(tokenizer.convert_ids_to_tokens, skip_special_tokens=True)
    # An untrained head may name rows of the embedding that the vocabulary has no word for.
    return [[written(filter(None, tokens(answer))) for answer in answers] for answers in ids.tolist()]


# ---- training ----


def vqa_loader(config: dict, tokenizer, seed: int) -> DataLoader:
    """Return training batches as `AnswerCollate` makes them."""
    entries = Mapped(read_questions(config["train_file"], config, answer=TEXTS), _with_weights)
    items = finetune_items(entries, config, seed)
    clean = partial(clean_question, max_words=MAX_WORDS_IN_TRAINING)
    warn_of_unknown_words(entries, tokenizer, config["text_encoder"], clean)
    collate = AnswerCollate(tokenizer, position_limit(config), config["max_tokens"], clean, config["eos"])
    return train_loader(items, config["batch_size_train"], seed, config, collate)


def _with_weights(entry: dict) -> dict:
    counts = Counter(given_answers(entry))
    share = WEIGHT_OF_ALL_ANSWERS[entry["dataset"]] / counts.total()
    weights = [share * count for count in counts.values()]
    return {**item_of(entry, "question"), "answers": list(counts), "weights": weights}


@dataclass(eq=False)
class AnswerCollate(Collate):
    """Adds answer_ids, answer_mask (A, L): the answers of all questions in turn, each with the end mark
    `eos`; weights (A,): an answer's share of the annotators; num_answers (B,): of each question, A in all;
    answer_indices: see `VQABatch`.
    """

    eos: str = "[SEP]"

    def __call__(self, items: list[dict]) -> dict[str, Tensor | list | str]:
        batch = super().__call__(items)
        if "unreadable" in batch:
            return batch
        answers = [answer + self.eos for item in items for answer in item["answers"]]
        names = [item["where"] for item in items for _ in item["answers"]]
        limit = self.position_limit
        answer_ids, answer_mask = tokenize(self.tokenizer, answers, position_limit=limit, names=names)
        return {
            **batch,
            "answer_ids": answer_ids,
            "answer_mask": answer_mask,
            "weights": torch.tensor(list(chain(*batch["weights"]))),
            "num_answers": torch.tensor(list(map(len, batch["answers"]))),
            "answer_indices": true_indices(answer_mask[:, 1:]),  # counted here, where nobody waits for it
        }


# ---- evaluation ----


class VQAEvalData(EvalItems):
    """A val file, whose entries have answers, or test files, whose entries have a question_id, and maybe
    answers.

    questions: the entries as they are; annotations: the answers of all annotators to each question, or None.
    """

    clean = partial(clean_question, max_words=MAX_WORDS_IN_EVALUATION)

    def __init__(self, files: str | list[str], config: dict, is_test: bool):
        fields = {"question_id": NUMBER_OR_TEXT} if is_test else {"answer": TEXTS}
        questions = read_questions(files, config, **fields)
        if is_test and any("answer" in entry for entry in questions):
            fields["answer"] = TEXTS  # all have them or none
            questions = read_questions(files, config, **fields)
        if is_test:
            check_question_ids(questions)
        num_found, questions = len(questions), leave_out_unreadable(questions, config)
        items = Mapped(questions, partial(item_of, text="question"))
        super().__init__(items, config["image_res"])
        self.left_out = num_found - len(questions)
        self.questions = questions
        self.annotations = list(map(given_answers, questions)) if "answer" in fields else None

    def labels(self, field: str) -> list[str | None]:
        """Return question_type or answer_type of every question, None where an entry does not say."""
        return [entry.get(field) for entry in self.questions]


def check_question_ids(questions: Iterable[dict]) -> None:
    """Raise UserError for a question_id that stands twice."""
    seen: dict[int | str, str] = {}
    for entry in questions:
        number, where = entry["question_id"], entry["where"]
        if number in seen:
            raise UserError(f"{where}: question_id {number!r} is that of {seen[number]} too; remove one")
        seen[number] = where


@dataclass(frozen=True)
class AnswerList:
    """The K answers to rank: texts, and from [CLS] to the end mark ids, mask (K, L)."""

    texts: list[str]
    ids: Tensor
    mask: Tensor


def read_answer_list(file: str, tokenizer, eos: str, position_limit: int) -> AnswerList:
    """Return the answers; UserError for a file that is no list of texts, or has one too long to decode."""
    path = Path(file)
    return make_answer_list(read_json(path, list), f"answer_list {path}", tokenizer, eos, position_limit)


def make_answer_list(texts: list, name: str, tokenizer, eos: str, position_limit: int) -> AnswerList:
    """Return the answers of what such a file holds; `name` is for messages.

    Answers of the same tokens are one to the decoder: the first of them stays, and a message counts the rest.
    """
    wrong = [text for text in texts if not isinstance(text, str) or printable(text) != text]
    if wrong or not texts:
        raise _no_answers(name, repr(wrong[0]) if wrong else "an empty list")
    no_word, *rows = tokenizer([eos, *(text + eos for text in texts)])["input_ids"]
    kept: dict[tuple[int, ...], str] = {}
    merged: list[tuple[str, str]] = []
    for text, ids in zip(texts, rows, strict=True):
        if ids == no_word:
            raise _no_answers(name, repr(text))
        if len(ids) > position_limit:
            raise UserError(
                f"{name}: {text[:60]!r} is {len(ids)} tokens long, the decoder has "
                f"{position_limit} positions; shorten it or raise max_position_embeddings in bert_config"
            )
        if tuple(ids) in kept:
            merged.append((text, kept[tuple(ids)]))
        else:
            kept[tuple(ids)] = text
    if merged:
        log.warning(
            f"{name}: {len(merged)} of {len(texts)} answers have the tokens of an earlier one and are merged "
            f"with it, such as {merged[0][0]!r} with {merged[0][1]!r}"
        )
    texts = list(kept.values())
    ended = [text + eos for text in texts]
    return AnswerList(texts, *tokenize(tokenizer, ended, position_limit=position_limit))


def _no_answers(name: str, found: str) -> UserError:
    return UserError(
        f"{name} must be a JSON list of answers, each a text, found {found[:100]}; make one "
        "with python -m simla.dataset.prepare answers"
    )


def eos_token(tokenizer, eos: str) -> int:
    """Return the id of the mark that ends an answer; UserError where the vocabulary has no such word."""
    number = tokenizer.convert_tokens_to_ids(eos)
    if not eos or number == tokenizer.unk_token_id:
        raise UserError(f"config eos {eos!r} is no word of the vocabulary; BERT's end mark is '[SEP]'")
    return number
