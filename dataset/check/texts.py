"""One pass over the entries: which are wrong, which texts are empty or cut, and which images they name."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from simla.dataset.check.causes import Cause
from simla.dataset.check.tasks import Source
from simla.dataset.identity import hash_of
from simla.dataset.images import BadImage
from simla.dataset.readers.shard_index import Picture
from simla.dataset.text import lowers_case
from simla.dataset.workers import Workers
from simla.utils import UserError, with_progress

ENTRIES_PER_JOB = 20_000
MAX_LENGTH = 1024  # of the histogram; longer texts count as this long
ALL_WORDS = 1 << 30


class Shared(NamedTuple):
    """All that the jobs read."""

    sources: list[Source]
    tokenizer: Tokenizer  # the bare one: transformers takes seconds to import in each process


NAMED = np.dtype([("key", "<u8"), ("entry", "<u4"), ("position", "u1")])  # an image that an entry names


class Texts(NamedTuple):
    """N entries that name M images in all (those of wrong entries are not known), 15 bytes for each."""

    flags: np.ndarray  # (N,) uint16, `Cause` bits
    lengths: np.ndarray  # (MAX_LENGTH + 1,) number of texts by their tokens
    images: np.ndarray  # (M,) NAMED, in the order of the entries


def read_texts(workers: Workers, sources: list[Source]) -> list[Texts]:
    """Return the texts of each source; no text and no path stays in memory."""
    jobs = [
        (number, start, min(start + ENTRIES_PER_JOB, len(source.entries)))
        for number, source in enumerate(sources)
        for start in range(0, len(source.entries), ENTRIES_PER_JOB)
    ]
    empty = Texts(np.zeros(0, np.uint16), np.zeros(MAX_LENGTH + 1, np.int64), np.zeros(0, NAMED))
    shares = [[empty] for _ in sources]
    results = workers.map(check_texts, jobs)
    results = with_progress(results, len(jobs), f"Entries, {ENTRIES_PER_JOB} at a time", 25)
    for (number, *_), texts in zip(jobs, results, strict=True):
        shares[number].append(texts)
    columns = (zip(*of_source, strict=True) for of_source in shares)
    return [
        Texts(np.concatenate(flags), sum(lengths), np.concatenate(images))
        for flags, lengths, images in columns
    ]


def check_texts(shared: Shared, job: tuple[int, int, int]) -> Texts:
    """Return the texts of some entries; job: index of the source, of its first entry and after its last."""
    number, start, stop = job
    source, count = shared.sources[number], WordPieces.of(shared.tokenizer)
    flags, lengths, images = np.zeros(stop - start, np.uint16), np.zeros(MAX_LENGTH + 1, np.int64), []
    for index in range(start, stop):
        try:
            entry = source.entries[index]
        except (UserError, BadImage):  # the latter of a sample of a shard
            flags[index - start] |= Cause.WRONG_ENTRY
            continue
        for text in measured_texts(source, entry, count):
            lengths[min(text.num_tokens, MAX_LENGTH)] += 1
            flags[index - start] |= text.flags
        images += [(path_key(image), index, position) for position, image in enumerate(entry["images"])]
    return Texts(flags, lengths, np.array(images, NAMED))


class Text(NamedTuple):
    text: str
    num_words: int  # after cleaning
    num_tokens: int  # of the words that are kept, [CLS] included
    flags: int  # `Cause` bits


def measured_texts(source: Source, entry: dict, count: "WordPieces") -> Iterator[Text]:
    """Yield each text of the entry with what cleaning and cutting leave of it."""
    for text in [entry["text"]] if isinstance(entry["text"], str) else entry["text"]:
        words = source.clean(text, ALL_WORDS, count.lower).split(" ")
        num_tokens = count(" ".join(words[: source.max_words]))
        is_cut = len(words) > source.max_words or num_tokens > source.max_tokens
        flags = (Cause.EMPTY_TEXT if num_tokens <= 1 else 0) | (Cause.TEXT_IS_CUT if is_cut else 0)
        yield Text(text, len(words), num_tokens, flags)


class WordPieces:
    """text -> number of its tokens; a word is cut into pieces once, whatever the text."""

    def __init__(self, tokenizer: Tokenizer):
        self.lower = lowers_case(tokenizer)
        self.of_word = lru_cache(1 << 20)(lambda word: len(tokenizer.encode(word, add_special_tokens=False)))

    @staticmethod
    @lru_cache(1)
    def of(tokenizer: Tokenizer) -> "WordPieces":
        return WordPieces(tokenizer)

    def __call__(self, text: str) -> int:
        return 1 + sum(map(self.of_word, text.split()))


def path_key(image: str | Picture) -> int:
    """Return 64 bits that stand for the path, or for the sample of a shard."""
    return hash_of(image.sample if isinstance(image, Picture) else image)
