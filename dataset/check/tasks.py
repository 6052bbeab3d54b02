"""Files of a config by split: which task reads what, by the functions that its script reads with."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from simla.configs.reader import weighted
from simla.dataset.grounding import GroundingEvalData, read_expressions, read_located_expressions
from simla.dataset.identity import by_path_and_id
from simla.dataset.nlvr import read_nlvr
from simla.dataset.pretrain import read_pairs, read_set
from simla.dataset.readers.annotations import NUMBER_OR_TEXT, TEXTS, Mapped, checked_late, item_of
from simla.dataset.readers.shards import Shards, is_shards
from simla.dataset.retrieval import CaptionedImages, read_captioned_images, read_train_pairs
from simla.dataset.text import MAX_TEXT_TOKENS, clean_caption, clean_question
from simla.dataset.ve import read_ve
from simla.dataset.vqa import (
    MAX_WORDS_IN_EVALUATION,
    MAX_WORDS_IN_TRAINING,
    VQAEvalData,
    read_answer_list,
    read_questions,
)
from simla.utils import UserError, fill_in, is_url

ProblemsAndNotes = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Split:
    """A split as its script reads it.

    read(file, config): the entries; text: their field that has text; clean(text, max_words, lower): what
    is made of it; whole(config, tokenizer, position_limit): the problems and the notes, a sentence each, of
    files that are right entry by entry, or UserError for a problem that hides others; takes_shards: whether
    the script reads shards, too; max_tokens: what the script cuts texts to.
    """

    read: Callable[[str, dict], Sequence[dict]]
    text: str = "text"
    clean: Callable[[str, int, bool], str] = clean_caption
    max_words: int = 30
    whole: Callable[[dict, object, int], ProblemsAndNotes] | None = None
    takes_shards: bool = False
    max_tokens: int | None = None


@dataclass
class Source:
    """An annotation file, or the shards of a pattern, with entries that have images and text.

    clean, max_words: see `Split`; max_tokens: a longer text is cut; problem: why it has no entries where it
    cannot be used; data_set, weight: number and weight of its data set in a mixture, else 0 and None.
    """

    split: str
    name: str
    clean: Callable[[str, int, bool], str]
    max_words: int
    max_tokens: int
    entries: Sequence[dict]
    problem: str
    data_set: int
    weight: float | None

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def shards(self) -> Shards | None:
        return self.entries if isinstance(self.entries, Shards) else None


def _check_answers(config: dict, tokenizer, position_limit: int) -> ProblemsAndNotes:
    if config["answer_list"]:
        read_answer_list(config["answer_list"], tokenizer, config["eos"], position_limit)
    return [], []


def _check_test_questions(config: dict, *_) -> ProblemsAndNotes:
    VQAEvalData(config["test_file"], config, is_test=True)
    return [], []


def _check_targets(config: dict, *_) -> ProblemsAndNotes:
    GroundingEvalData(config)
    return [], []


def _check_ids(config: dict, *_) -> ProblemsAndNotes:
    identities = by_path_and_id(read_train_pairs(config["train_file"], config["image_root"]))
    return identities.problems, identities.notes


def _check_rows(config: dict, *_, key: str) -> ProblemsAndNotes:
    note = CaptionedImages(read_captioned_images(config[key], config["image_root"])).note
    return [], [f"{config[key]}: {note}"] if note else []


def _at_root(read: Callable[[str, str], Sequence[dict]]) -> Callable[[str, dict], Sequence[dict]]:
    return lambda file, config: read(file, config.get("image_root", ""))


def _captioned(key: str) -> Split:
    whole = partial(_check_rows, key=key)
    return Split(_at_root(read_captioned_images), "caption", whole=whole, max_tokens=MAX_TEXT_TOKENS)


def _questions(max_words: int, whole: Callable | None = None, **fields: tuple) -> Split:
    return Split(partial(read_questions, **fields), "question", clean_question, max_words, whole)


# Script -> its splits, by the name of the config key: that of the file is train_file, ...
SPLITS: dict[str, dict[str, Split]] = {
    "Pretrain": {"train": Split(_at_root(read_pairs), takes_shards=True)},
    "Retrieval": {
        "train": Split(_at_root(read_train_pairs), "caption", whole=_check_ids),
        "val": _captioned("val_file"),
        "test": _captioned("test_file"),
    },
    "Grounding": {
        "train": Split(read_expressions),
        "test": Split(read_located_expressions, whole=_check_targets),
    },
    "VQA": {
        "train": _questions(MAX_WORDS_IN_TRAINING, _check_answers, answer=TEXTS),
        "val": _questions(MAX_WORDS_IN_EVALUATION, answer=TEXTS),
        "test": _questions(MAX_WORDS_IN_EVALUATION, _check_test_questions, question_id=NUMBER_OR_TEXT),
    },
    "Pretrain_NLVR": {"train": Split(_at_root(read_pairs))},
    "NLVR": dict.fromkeys(("train", "val", "test"), Split(_at_root(read_nlvr))),
    "VE": dict.fromkeys(("train", "val", "test"), Split(_at_root(read_ve))),
}


def open_sources(splits: dict[str, Split], config: dict, position_limit: int) -> list[Source]:
    """Return the annotation files and shards that the config names; raise UserError where it names none."""
    sources = []
    for split, spec in splits.items():
        of_config = config.get("max_tokens") if split == "train" else None
        max_tokens = min(position_limit, spec.max_tokens or of_config or position_limit)
        for file, data_set, weight in files_of(config, split):
            problem, opened = "", [[]]
            try:
                with checked_late():
                    if spec.takes_shards and is_shards(file):
                        opened = read_set([file], "", must_count=True)
                    else:
                        opened = [Mapped(spec.read(file, config), partial(item_of, text=spec.text))]
            except UserError as error:
                problem = str(error)
            name = file if is_url(file) else fill_in(file)
            limits = (spec.clean, spec.max_words, max_tokens)
            sources += [
                Source(split, name, *limits, entries, problem, data_set, weight) for entries in opened
            ]
    if not sources:
        raise UserError(f"the config names no annotation file ({', '.join(splits)})")
    return sources


def files_of(config: dict, split: str) -> Iterator[tuple[str, int, float | None]]:
    """Yield each file of a split, with number and weight of its data set in a mixture; else 0 and None."""
    files = config[f"{split}_file"]
    if not files:
        return
    is_mixture = isinstance(files, list) and isinstance(files[0], dict)
    for number, (paths, weight) in enumerate(zip(*weighted(files), strict=True)):
        for path in paths:
            yield path, number, weight if is_mixture else None
