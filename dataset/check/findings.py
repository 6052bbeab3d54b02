"""What was found, of every entry, and what there is to say about one."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from simla.dataset.check.causes import NAMES, NO_PIXELS, PROBLEMS, Cause
from simla.dataset.check.images import Images, explain
from simla.dataset.check.similar import Similar
from simla.dataset.check.tasks import Source
from simla.dataset.check.texts import Shared, Texts, WordPieces, text_lengths
from simla.dataset.images import BadImage
from simla.dataset.items import TrainItems
from simla.dataset.readers.shard_index import Picture
from simla.dataset.transforms import TrainTransform
from simla.utils import UserError

MAX_LISTED = 200  # of each cause and file
SECONDS_OF_READING = 2.0  # to measure how fast training data is read


@dataclass
class Found:
    """One entry, one cause. `twin` is the image that `image` is like: files, or pictures of shards."""

    split: str
    file: str
    entry: int
    cause: Cause
    detail: str
    image: str | Picture = ""
    twin: str | Picture = ""

    def as_dict(self) -> dict:
        names = {"image": str(self.image), "twin": str(self.twin)}
        return {**vars(self), **names, "cause": NAMES[self.cause], "is_problem": bool(self.cause & PROBLEMS)}


class Findings:
    """flags: of each source, (N,) uint16, the `Cause` bits of its entries; whole: what is wrong with files as
    a whole; notes: what else there is to say of them."""

    def __init__(self, shared: Shared, texts: list[Texts], images: Images, whole: list[str]):
        self.shared, self.texts, self.images, self.whole = shared, texts, images, whole
        self.notes: list[str] = []
        for shards in filter(None, (source.shards for source in shared.sources)):
            problems, notes = shards.notes()
            self.whole += problems
            self.notes += notes
        in_train, in_evaluation = (np.zeros(len(images.records), bool) for _ in range(2))
        for source, numbers in zip(shared.sources, images.numbers, strict=True):
            (in_train if source.split == "train" else in_evaluation)[numbers] = True
        self.similar = Similar(images, in_train, in_evaluation)
        self.flags = []
        for number, (source, text) in enumerate(zip(shared.sources, texts, strict=True)):
            flags = text.flags.copy()
            np.bitwise_or.at(flags, text.owners, self.image_flags(source)[images.numbers[number]])
            self.flags.append(flags)

    def image_flags(self, source: Source) -> np.ndarray:
        """(U,) of every file, as an image of this source."""
        flags = self.images.records["flags"] | self.similar.flags
        return flags | self.similar.train_flags if source.split == "train" else flags

    def has_problems(self) -> bool:
        return bool(self.whole) or any((flags & PROBLEMS).any() for flags in self.flags)

    def has_wrong_entries(self, number: int) -> bool:
        return bool((self.flags[number] & Cause.WRONG_ENTRY).any())

    def splits(self) -> dict[str, dict]:
        """Of each split: numbers of files, entries and different images, and of entries of each cause; how
        many texts have how many tokens."""
        found = {}
        for number, source in enumerate(self.shared.sources):
            split = found.setdefault(source.split, {"files": 0, "entries": 0, "images": [], "lengths": 0})
            split["files"] += 1
            split["entries"] += len(source.entries)
            split["images"].append(self.images.numbers[number])
            split["lengths"] = split["lengths"] + self.texts[number].lengths
            split["limit"] = source.max_tokens
            counts = split.setdefault("counts", dict.fromkeys(NAMES, 0))
            for cause in NAMES:
                counts[cause] += int(np.count_nonzero(self.flags[number] & cause))
        for split in found.values():
            split["images"] = len(np.unique(np.concatenate(split["images"])))
        return found

    def examples(self, cause: Cause, limit: int) -> Iterator[Found]:
        """At most `limit` entries of each file that the cause was found of."""
        for number, flags in enumerate(self.flags):
            for entry in np.flatnonzero(flags & cause)[:limit]:
                yield self._describe(number, int(entry), cause)

    def _describe(self, number: int, index: int, cause: Cause) -> Found:
        source = self.shared.sources[number]
        found = Found(source.split, source.name, index, cause, "")
        try:
            entry = source.entries[index]
        except BadImage as error:
            found.detail = str(error)
            return found
        except UserError as error:
            found.detail = re.sub(r"^.*?: entry \d+:? *", "", str(error))
            return found
        if cause in (Cause.EMPTY_TEXT, Cause.TEXT_CUT):
            found.image, found.detail = entry["images"][0], self._text_detail(source, entry, cause)
            return found
        owners, flags = self.texts[number].owners, self.image_flags(source)
        own = self.images.numbers[number][np.searchsorted(owners, index) :][: len(entry["images"])]
        place, image = next((place, image) for place, image in enumerate(own) if flags[image] & cause)
        found.image = entry["images"][place]
        if cause in self.similar.twins:
            twin = self.similar.twins[cause][image]
            found.twin = self.images.image(twin, self.shared)
            found.detail = "it is named there, too" if twin == image else f"{found.twin}"
        else:
            found.detail = explain(found.image, self.images.records[image])
        return found

    def _text_detail(self, source: Source, entry: dict, cause: Cause) -> str:
        texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
        lengths = text_lengths(source, entry, WordPieces.of(self.shared.tokenizer))
        for text, (length, is_cut) in zip(texts, lengths, strict=True):
            if cause == Cause.EMPTY_TEXT and length <= 1:
                return f"{text!r}"[:200]
            if cause == Cause.TEXT_CUT and is_cut:
                words = len(source.spec.clean(text, len(text) + 1).split(" "))
                limits = f"{words} words of {source.spec.max_words}, {length} tokens of {source.max_tokens}"
                return f"{limits}: {text}"[:300]
        raise AssertionError(cause)

    def usable(self, number: int) -> np.ndarray:
        """The entries of a source whose images can be read."""
        return np.flatnonzero(~(self.flags[number] & (Cause.WRONG_ENTRY | NO_PIXELS)).astype(bool))


def measure_reading(findings: Findings, config: dict) -> dict[str, float]:
    """How fast one process reads, crops and augments training entries, and what an epoch takes; {} where
    there is nothing to read, or it would have to be fetched."""
    number = next((n for n, s in enumerate(findings.shared.sources) if s.split == "train"), None)
    usable = findings.usable(number) if number is not None else np.zeros(0)
    if not len(usable) or getattr(findings.shared.sources[number].entries, "is_stream", False):
        return {}
    augment = config["randaugment"]
    transform = TrainTransform(
        config["image_res"], config["min_crop_scale"], (augment["num_ops"], augment["magnitude"])
    )
    items = TrainItems(findings.shared.sources[number].entries, transform, seed=0)
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)  # as in a loader's process
    cv2.setNumThreads(0)
    chosen = np.random.RandomState(0).permutation(usable)
    items[0, int(chosen[0])]  # what is done once
    begin, num_read = time.perf_counter(), 0
    for index in np.resize(chosen, max(len(chosen), 50)):
        items[0, int(index)]
        num_read += 1
        if time.perf_counter() - begin > SECONDS_OF_READING:
            break
    rate = num_read / (time.perf_counter() - begin)
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    num_entries = findings.splits()["train"]["entries"]
    num_workers = max(config["num_workers"], 1)
    return {
        "entries_per_second_of_a_process": round(rate, 1),
        "num_workers": num_workers,
        "seconds_per_epoch_of_one_rank": round(num_entries / rate / num_workers, 1),
    }
