"""Which files of a config hold what: each task's splits, read by the functions that its script reads with."""

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
from simla.dataset.text import clean_caption, clean_question
from simla.dataset.ve import read_ve
from simla.dataset.vqa import (
    MAX_WORDS_IN_EVALUATION,
    MAX_WORDS_IN_TRAINING,
    VQAEvalData,
    read_answer_list,
    read_questions,
)
from simla.utils import UserError, fill_in, is_url

Said = tuple[list[str], list[str]]  # problems, notes
NOTHING: Said = ([], [])


@dataclass(frozen=True)
class Split:
    """read(file, config): entries with images and text; a text longer than `max_words` is cut; whole(config,
    tokenizer, position_limit): the problems and the notes, a sentence each, of files that are right entry by
    entry; raises UserError for a problem that hides others. takes_shards: whether the script reads shards,
    too.
    """

    read: Callable[[str, dict], Sequence[dict]]
    clean: Callable[[str, int], str] = clean_caption
    max_words: int = 30
    whole: Callable[[dict, object, int], "Said"] | None = None
    takes_shards: bool = False


@dataclass
class Source:
    """An annotation file, or the shards of a pattern; `problem` says why it has no entries where it cannot be
    used. data_set, weight: number and weight of the data set of a mixture that it is of; else 0 and None.
    """

    split: str
    name: str
    spec: Split
    max_tokens: int  # a longer text is cut
    entries: Sequence[dict]
    problem: str = ""
    data_set: int = 0
    weight: float | None = None

    @property
    def path(self) -> Path:
        return Path(self.name)

    @property
    def shards(self) -> Shards | None:
        return self.entries if isinstance(self.entries, Shards) else None


def _pairs(file: str, config: dict) -> Mapped:
    return read_pairs(file, config.get("image_root", ""))


def _at_root(file: str, config: dict, read: Callable) -> Sequence[dict]:
    return read(file, config["image_root"])


def _with_text(file: str, config: dict, read: Callable, field: str) -> Mapped:
    """Return the items of entries that have their text in the field of that name."""
    return Mapped(read(file, config), partial(item_of, text=field))


def _answers_fit(config: dict, tokenizer, position_limit: int) -> Said:
    if config["answer_list"]:
        read_answer_list(config["answer_list"], tokenizer, config["eos"], position_limit)
    return NOTHING


def _test_questions_fit(config: dict, *_) -> Said:
    VQAEvalData(config["test_file"], config, is_test=True)
    return NOTHING


def _targets_fit(config: dict, *_) -> Said:
    GroundingEvalData(config)
    return NOTHING


def _ids_fit(config: dict, *_) -> Said:
    identities = by_path_and_id(read_train_pairs(config["train_file"], config["image_root"]))
    return identities.problems, identities.notes


def _rows_of_images(config: dict, *_, key: str) -> Said:
    note = CaptionedImages(read_captioned_images(config[key], config["image_root"])).note
    return [], [f"{config[key]}: {note}"] if note else []


def _captions(read: Callable, whole: Callable) -> Split:
    return Split(partial(_with_text, read=partial(_at_root, read=read), field="caption"), whole=whole)


def _expressions(read: Callable, whole: Callable | None = None) -> Split:
    return Split(partial(_with_text, read=read, field="text"), whole=whole)


def _questions(max_words: int, whole: Callable | None = None, **fields: tuple) -> Split:
    read = partial(_with_text, read=partial(read_questions, **fields), field="question")
    return Split(read, clean_question, max_words, whole)


def _sentences(read: Callable) -> dict[str, Split]:
    return dict.fromkeys(("train", "val", "test"), Split(partial(_at_root, read=read)))


# Script -> its splits, by the name of the config key: that of the file is train_file, ...
SPLITS: dict[str, dict[str, Split]] = {
    "Pretrain": {"train": Split(_pairs, takes_shards=True)},
    "Retrieval": {
        "train": _captions(read_train_pairs, _ids_fit),
        "val": _captions(read_captioned_images, partial(_rows_of_images, key="val_file")),
        "test": _captions(read_captioned_images, partial(_rows_of_images, key="test_file")),
    },
    "Grounding": {
        "train": _expressions(read_expressions),
        "test": _expressions(read_located_expressions, _targets_fit),
    },
    "VQA": {
        "train": _questions(MAX_WORDS_IN_TRAINING, _answers_fit, answer=TEXTS),
        "val": _questions(MAX_WORDS_IN_EVALUATION, answer=TEXTS),
        "test": _questions(MAX_WORDS_IN_EVALUATION, _test_questions_fit, question_id=NUMBER_OR_TEXT),
    },
    "Pretrain_NLVR": {"train": Split(_pairs)},
    "NLVR": _sentences(read_nlvr),
    "VE": _sentences(read_ve),
}


def open_sources(splits: dict[str, Split], config: dict, position_limit: int) -> list[Source]:
    """Return the annotation files and shards that the config names. Raises UserError where it names none."""
    sources = []
    for split, spec in splits.items():
        max_tokens = position_limit
        if split == "train" and "max_tokens" in config:
            max_tokens = min(max_tokens, config["max_tokens"])
        for file, data_set, weight in files_of(config, split):
            problem, found = "", [[]]
            try:
                with checked_late():
                    if spec.takes_shards and is_shards(file):
                        found = read_set([file], "", must_count=True)
                    else:
                        found = [spec.read(file, config)]
            except UserError as error:
                problem = str(error)
            name = file if is_url(file) else fill_in(file)
            sources += [
                Source(split, name, spec, max_tokens, entries, problem, data_set, weight) for entries in found
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
