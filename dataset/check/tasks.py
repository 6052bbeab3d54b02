"""Which files of a config hold what: each task's splits, read by the functions that its script reads with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from config import GROUNDING, NLVR, PRETRAIN, PRETRAIN_NLVR, RETRIEVAL, VE, VQA, Key
from dataset.annotations import NUMBER, NUMBER_OR_TEXT, TEXTS, Mapped, checked_late, item_of
from dataset.grounding import GroundingEvalData, read_expressions
from dataset.mixture import weighted
from dataset.nlvr import read_nlvr
from dataset.pretrain import read_pairs
from dataset.retrieval import read_captioned_images, read_train_pairs
from dataset.shards import is_shards
from dataset.text import clean_caption, clean_question
from dataset.ve import read_ve
from dataset.vqa import (
    MAX_WORDS_IN_EVALUATION,
    MAX_WORDS_IN_TRAINING,
    VQAEvalData,
    read_answer_list,
    read_questions,
)
from utils import UserError, fill_in


@dataclass(frozen=True)
class Split:
    """read(file, config): entries with images and text; a text longer than `max_words` is cut; whole(config,
    tokenizer, position_limit): raises UserError where files that are right by themselves do not fit together.
    """

    read: Callable[[str, dict], Sequence[dict]]
    clean: Callable[[str, int], str] = clean_caption
    max_words: int = 30
    whole: Callable[[dict, object, int], object] | None = None


@dataclass(frozen=True)
class Task:
    table: dict[str, Key]
    splits: dict[str, Split]  # by the name of the config key: that of the file is train_file, ...


@dataclass
class Source:
    """An annotation file; `problem` says why it has no entries where it cannot be used."""

    split: str
    path: Path
    spec: Split
    max_tokens: int  # a longer text is cut
    entries: Sequence[dict]
    problem: str = ""


def _pairs(file: str, config: dict) -> Mapped:
    return read_pairs(file, config.get("image_root", ""))


def _at_root(file: str, config: dict, read: Callable) -> Sequence[dict]:
    return read(file, config["image_root"])


def _with_text(file: str, config: dict, read: Callable, field: str) -> Mapped:
    """The items of entries that have their text in the field of that name."""
    return Mapped(read(file, config), partial(item_of, text=field))


def _answers_fit(config: dict, tokenizer, position_limit: int) -> None:
    if config["answer_list"]:
        read_answer_list(config["answer_list"], tokenizer, config["eos"], position_limit)


def _test_questions_fit(config: dict, *_) -> None:
    VQAEvalData(config["test_file"], config, is_test=True)


def _targets_fit(config: dict, *_) -> None:
    GroundingEvalData(config)


def _captions(read: Callable) -> Split:
    return Split(partial(_with_text, read=partial(_at_root, read=read), field="caption"))


def _expressions(whole: Callable | None = None, **fields: tuple) -> Split:
    read = partial(read_expressions, **fields)
    return Split(partial(_with_text, read=read, field="text"), whole=whole)


def _questions(max_words: int, whole: Callable | None = None, **fields: tuple) -> Split:
    read = partial(_with_text, read=partial(read_questions, **fields), field="question")
    return Split(read, clean_question, max_words, whole)


def _sentences(read: Callable) -> dict[str, Split]:
    return dict.fromkeys(("train", "val", "test"), Split(partial(_at_root, read=read)))


TASKS = {
    "Pretrain": Task(PRETRAIN, {"train": Split(_pairs)}),
    "Retrieval": Task(
        RETRIEVAL,
        {
            "train": _captions(read_train_pairs),
            "val": _captions(read_captioned_images),
            "test": _captions(read_captioned_images),
        },
    ),
    "Grounding": Task(
        GROUNDING, {"train": _expressions(), "test": _expressions(_targets_fit, ref_id=NUMBER)}
    ),
    "VQA": Task(
        VQA,
        {
            "train": _questions(MAX_WORDS_IN_TRAINING, _answers_fit, answer=TEXTS),
            "val": _questions(MAX_WORDS_IN_EVALUATION, answer=TEXTS),
            "test": _questions(MAX_WORDS_IN_EVALUATION, _test_questions_fit, question_id=NUMBER_OR_TEXT),
        },
    ),
    "NLVR_Pretrain": Task(PRETRAIN_NLVR, {"train": Split(_pairs)}),
    "NLVR": Task(NLVR, _sentences(read_nlvr)),
    "VE": Task(VE, _sentences(read_ve)),
}


def task_of(config_file: str) -> str:
    """The task that the file is named after, as those of configs/ are: Retrieval_coco.yaml."""
    name = Path(config_file).stem.lower()
    for task in sorted(TASKS, key=len, reverse=True):
        if name == task.lower() or name.startswith(f"{task.lower()}_"):
            return task
    raise UserError(f"{config_file} is not named after a task; say which one with --task: {', '.join(TASKS)}")


def open_sources(task: Task, config: dict, position_limit: int) -> list[Source]:
    """The annotation files that the config names. UserError where it names none, or shards."""
    sources = []
    for name, spec in task.splits.items():
        files = files_of(config, name)
        max_tokens = position_limit
        if name == "train" and "max_tokens" in config:
            max_tokens = min(max_tokens, config["max_tokens"])
        for file in files:
            if is_shards(file):
                raise UserError(
                    f"{name}_file {file}: this check reads JSON lists, not shards; check the list that the "
                    "shards were made of"
                )
            problem, entries = "", []
            try:
                with checked_late():
                    entries = spec.read(file, config)
            except UserError as error:
                problem = str(error)
            sources.append(Source(name, Path(fill_in(file)), spec, max_tokens, entries, problem))
    if not sources:
        raise UserError(f"the config names no annotation file ({', '.join(task.splits)})")
    return sources


def files_of(config: dict, split: str) -> list[str]:
    """Of a mixture of data sets those of all."""
    files = config[f"{split}_file"]
    return [path for paths in weighted(files)[0] for path in paths] if files else []
