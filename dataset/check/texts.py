"""One pass over the entries: which are wrong, which texts are empty or cut, and which images they name."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer

from simla.dataset.check.causes import Cause
from simla.dataset.check.tasks import Source
from simla.dataset.identity import hash_of
from simla.dataset.images import BadImage
from simla.dataset.readers.shard_index import Picture
from simla.dataset.workers import Workers
from simla.utils import UserError, with_progress

ENTRIES_PER_JOB = 20_000
MAX_LENGTH = 1024  # of the histogram; longer texts count as this long
ALL_WORDS = 1 << 30


@dataclass
class Shared:
    """What the jobs read."""

    sources: list[Source]
    tokenizer: Tokenizer  # the bare one: transformers takes seconds to import in each process


@dataclass
class Texts:
    """Of a source with N entries that name M images in all (those of wrong entries are not known)."""

    flags: np.ndarray  # (N,) uint16, `Cause` bits
    lengths: np.ndarray  # (MAX_LENGTH + 1,) number of texts by their tokens
    images: np.ndarray  # (M,) uint64, keys of their paths
    owners: np.ndarray  # (M,) uint32, the entries that name them
    places: np.ndarray  # (M,) uint8, which of an entry's images each is


@dataclass
class _Part:
    """Of the entries of a job."""

    source: int
    start: int
    flags: np.ndarray
    lengths: np.ndarray
    images: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


def read_texts(workers: Workers, sources: list[Source]) -> list[Texts]:
    """Of each source; 15 bytes an entry and an image stay in memory, no text and no path."""
    jobs = [
        (number, start, min(start + ENTRIES_PER_JOB, len(source.entries)))
        for number, source in enumerate(sources)
        for start in range(0, len(source.entries), ENTRIES_PER_JOB)
    ]
    parts = [[] for _ in sources]
    results = workers.map(check_texts, jobs)
    for part in with_progress(results, len(jobs), f"Entries, {ENTRIES_PER_JOB} at a time", 25):
        parts[part.source].append(part)
    return [_joined(found) for found in parts]


def _joined(parts: list[_Part]) -> Texts:
    def join(name: str, kind: type) -> np.ndarray:
        arrays = [np.asarray(getattr(part, name), kind) for part in parts]
        return np.concatenate(arrays) if arrays else np.zeros(0, kind)

    return Texts(
        join("flags", np.uint16),
        sum((part.lengths for part in parts), np.zeros(MAX_LENGTH + 1, np.int64)),
        join("images", np.uint64),
        join("owners", np.uint32),
        join("places", np.uint8),
    )


def check_texts(shared: Shared, job: tuple[int, int, int]) -> _Part:
    """job: number of the source, its first entry and the one after the last."""
    number, start, stop = job
    source = shared.sources[number]
    count = WordPieces.of(shared.tokenizer)
    flags = np.zeros(stop - start, np.uint16)
    part = _Part(number, start, flags, np.zeros(MAX_LENGTH + 1, np.int64))
    for index in range(start, stop):
        try:
            entry = source.entries[index]
        except (UserError, BadImage):  # the latter of a sample of a shard
            flags[index - start] |= Cause.WRONG_ENTRY
            continue
        for length, is_cut in text_lengths(source, entry, count):
            part.lengths[min(length, MAX_LENGTH)] += 1
            if length <= 1:
                flags[index - start] |= Cause.EMPTY_TEXT
            if is_cut:
                flags[index - start] |= Cause.TEXT_CUT
        for place, image in enumerate(entry["images"]):
            part.images.append(path_key(image))
            part.owners.append(index)
            part.places.append(place)
    # as arrays, in which form they go from process to process
    part.images = np.array(part.images, np.uint64)
    part.owners, part.places = np.array(part.owners, np.uint32), np.array(part.places, np.uint8)
    return part


def text_lengths(source: Source, entry: dict, count: "WordPieces") -> Iterator[tuple[int, bool]]:
    """Of each text after cleaning: its tokens, [CLS] included; whether words or tokens are cut off."""
    texts = [entry["text"]] if isinstance(entry["text"], str) else entry["text"]
    for text in texts:
        text = source.spec.clean(text, ALL_WORDS)
        is_cut = text.count(" ") >= source.spec.max_words
        if is_cut:
            text = source.spec.clean(text, source.spec.max_words)
        length = count(text)
        yield length, is_cut or length > source.max_tokens


class WordPieces:
    """text -> number of its tokens; a word is cut into pieces once, whatever the text."""

    def __init__(self, tokenizer: Tokenizer):
        self.of_word = lru_cache(1 << 20)(lambda word: len(tokenizer.encode(word, add_special_tokens=False)))

    @staticmethod
    @lru_cache(1)
    def of(tokenizer: Tokenizer) -> "WordPieces":
        return WordPieces(tokenizer)

    def __call__(self, text: str) -> int:
        return 1 + sum(map(self.of_word, text.split()))


def path_key(image: str | Picture) -> int:
    """64 bits that stand for the path, or for the sample of a shard."""
    name = image.sample if isinstance(image, Picture) else image
    return hash_of(name)
