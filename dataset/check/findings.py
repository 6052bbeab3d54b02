"""Findings of the check: the causes of every entry, and what there is to say about one."""

import re
import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from simla.dataset.check.causes import NO_PIXELS, PROBLEMS, Cause
from simla.dataset.check.images import Images, explain
from simla.dataset.check.similar import Similar
from simla.dataset.check.tasks import Source
from simla.dataset.check.texts import Shared, Texts, WordPieces, measured_texts
from simla.dataset.images import BadImage
from simla.dataset.items import TrainItems
from simla.dataset.readers.shard_index import Picture
from simla.dataset.transforms import TrainTransform
from simla.utils import UserError

MAX_LISTED = 200  # of each cause and file
READING_SECONDS = 2.0  # to measure how fast training data is read


@dataclass
class Finding:
    """One entry, one cause. `twin` is the image that `image` is like: files, or pictures of shards."""

    split: str
    file: str
    entry: int
    cause: Cause
    detail: str = ""
    image: str | Picture = ""
    twin: str | Picture = ""

    def as_dict(self) -> dict:
        names = {"image": str(self.image), "twin": str(self.twin)}
        return {**vars(self), **names, "cause": self.cause.label, "is_problem": bool(self.cause & PROBLEMS)}


class Findings:
    """The causes of all entries.

    flags: of each source, (N,) uint16, the `Cause` bits of its entries; whole: what is wrong with files as a
    whole; notes: what else there is to say of them.
    """

    def __init__(self, shared: Shared, texts: list[Texts], images: Images):
        self.shared, self.texts, self.images = shared, texts, images
        self.whole = [source.problem for source in shared.sources if source.problem]
        self.notes: list[str] = []
        for shards in filter(None, (source.shards for source in shared.sources)):
            problems, notes = shards.notes()
            self.whole += problems
            self.notes += notes
        in_train, in_evaluation = (np.zeros(len(images.records), bool) for _ in range(2))
        for source, numbers in zip(shared.sources, images.numbers, strict=True):
            (in_train if source.split == "train" else in_evaluation)[numbers] = True
        self.similar = Similar(images, in_train, in_evaluation)
        self.flags = [text.flags.copy() for text in texts]
        for flags, source, text, numbers in zip(
            self.flags, shared.sources, texts, images.numbers, strict=True
        ):
            np.bitwise_or.at(flags, text.images["entry"], self.image_flags(source)[numbers])

    def image_flags(self, source: Source) -> np.ndarray:
        """Return the flags (U,) of every file, as an image of this source."""
        flags = self.images.records["flags"] | self.similar.flags
        return flags | self.similar.train_flags if source.split == "train" else flags

    def has_problems(self) -> bool:
        return bool(self.whole) or any((flags & PROBLEMS).any() for flags in self.flags)

    def all_entries_are_right(self, split: str) -> bool:
        """Return whether the split has files and could read all their entries."""
        of_split = [n for n, source in enumerate(self.shared.sources) if source.split == split]
        wrong = (
            self.shared.sources[n].problem or (self.flags[n] & Cause.WRONG_ENTRY).any() for n in of_split
        )
        return bool(of_split) and not any(wrong)

    def splits(self) -> dict[str, dict]:
        """Return of each split the numbers of files, entries and different images, and of entries of each
        cause; how many texts have how many tokens.
        """
        splits = {}
        for split in dict.fromkeys(source.split for source in self.shared.sources):
            numbers = [n for n, source in enumerate(self.shared.sources) if source.split == split]
            flags = np.concatenate([self.flags[n] for n in numbers])
            splits[split] = {
                "files": len(numbers),
                "entries": len(flags),
                "images": len(np.unique(np.concatenate([self.images.numbers[n] for n in numbers]))),
                "lengths": sum(self.texts[n].lengths for n in numbers),
                "limit": self.shared.sources[numbers[0]].max_tokens,
                "counts": {cause: int(np.count_nonzero(flags & cause)) for cause in Cause},
            }
        return splits

    def examples(self, cause: Cause, limit: int) -> Iterator[Finding]:
        """Yield at most `limit` entries of each file that have the cause."""
        for number, flags in enumerate(self.flags):
            for entry in np.flatnonzero(flags & cause)[:limit]:
                yield self._describe(number, int(entry), cause)

    def _describe(self, number: int, index: int, cause: Cause) -> Finding:
        source = self.shared.sources[number]
        finding = Finding(source.split, source.name, index, cause)
        try:
            entry = source.entries[index]
        except (UserError, BadImage) as error:
            finding.detail = re.sub(r"^.*?: entry \d+:? *", "", str(error))
            return finding
        if cause in Cause.EMPTY_TEXT | Cause.TEXT_IS_CUT:
            finding.image, finding.detail = entry["images"][0], self._text_detail(source, entry, cause)
            return finding
        images = self.images.numbers[number][bisect_left(self.texts[number].images["entry"], index) :]
        flags = self.image_flags(source)[images[: len(entry["images"])]]
        position = int(np.flatnonzero(flags & cause)[0])
        image, finding.image = images[position], entry["images"][position]
        if cause in self.similar.twins:
            twin = self.similar.twins[cause][image]
            finding.twin = self.images.image(twin, self.shared)
            finding.detail = "it is named there, too" if twin == image else f"{finding.twin}"
        else:
            finding.detail = explain(finding.image, self.images.records[image])
        return finding

    def _text_detail(self, source: Source, entry: dict, cause: Cause) -> str:
        texts = measured_texts(source, entry, WordPieces.of(self.shared.tokenizer))
        text = next(text for text in texts if text.flags & cause)
        if cause == Cause.EMPTY_TEXT:
            return f"{text.text!r}"[:200]
        limits = (
            f"{text.num_words} words of {source.max_words}, {text.num_tokens} tokens of {source.max_tokens}"
        )
        return f"{limits}: {text.text}"[:300]

    def usable(self, number: int) -> np.ndarray:
        """Return the indices of a source's entries whose images can be read."""
        return np.flatnonzero(self.flags[number] & (Cause.WRONG_ENTRY | NO_PIXELS) == 0)


def measure_reading(findings: Findings, config: dict) -> dict[str, float]:
    """Return how fast one process reads, crops and augments training entries, and what an epoch takes; {}
    where there is nothing to read, or it would have to be fetched.
    """
    sources = findings.shared.sources
    number = next((n for n, source in enumerate(sources) if source.split == "train"), None)
    usable = findings.usable(number) if number is not None else np.zeros(0)
    if not len(usable) or getattr(sources[number].entries, "is_stream", False):
        return {}
    augment = (config["randaugment"]["num_ops"], config["randaugment"]["magnitude"])
    transform = TrainTransform(config["image_res"], config["min_crop_scale"], augment)
    items = TrainItems(sources[number].entries, transform, seed=0)
    torch_threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)  # as in a loader's process
    cv2.setNumThreads(0)
    chosen = np.random.RandomState(0).permutation(usable)
    items[0, int(chosen[0])]  # what is done once
    begin, num_read = time.perf_counter(), 0
    for index in np.resize(chosen, max(len(chosen), 50)):
        items[0, int(index)]
        num_read += 1
        if time.perf_counter() - begin > READING_SECONDS:
            break
    rate = num_read / (time.perf_counter() - begin)
    torch.set_num_threads(torch_threads)
    cv2.setNumThreads(cv2_threads)
    num_entries = sum(len(source.entries) for source in sources if source.split == "train")
    num_workers = max(config["num_workers"], 1)
    return {
        "entries_per_second_of_a_process": round(rate, 1),
        "num_workers": num_workers,
        "seconds_per_epoch_of_one_rank": round(num_entries / rate / num_workers, 1),
    }
