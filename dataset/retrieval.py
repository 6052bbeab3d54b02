"""Images with their captions, for retrieval fine-tuning and evaluation."""

import re
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch.utils.data import DataLoader

from simla.dataset.identity import by_path, by_path_and_id, first_equal, hash_of
from simla.dataset.items import EvalItems, finetune_loader, leave_out_unreadable
from simla.dataset.readers.annotations import ANY, TEXT, TEXTS, Annotations, Mapped, item_of, read_annotations
from simla.dataset.text import clean_caption
from simla.utils import log

COCO_NAME = re.compile(r"COCO_val2014_(\d{12})\.\w+$")  # of Karpathy's test images


class WithIdentities(Sequence):
    """The entries with `idx`, equal for equal `values`, one of each entry: 0, 1, ... as they appear."""

    def __init__(self, entries: Sequence, values: Iterable):
        hashes = np.fromiter((hash_of(repr(value)) for value in values), np.uint64, len(entries))
        numbers = np.unique(first_equal(hashes), return_inverse=True)[1]
        self.entries = entries
        # a tensor: what spawned loader processes get of it is not a copy
        self.idx = torch.from_numpy(numbers.ravel())

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        return {**self.entries[index], "idx": int(self.idx[index])}


def read_train_pairs(files: str | list[str], image_root: str) -> Annotations:
    """Return the entries of training files."""
    return read_annotations(files, {"image": TEXT, "caption": TEXT, "image_id": ANY}, image_root)


def read_captioned_images(files: str | list[str], image_root: str) -> Annotations:
    """Return the rows of val and test files: an image has one, or several that `CaptionedImages` merges."""
    return read_annotations(files, {"image": TEXT, "caption": TEXTS}, image_root)


def retrieval_loader(config: dict, tokenizer, seed: int) -> DataLoader:
    """Return training batches with image, text_ids, text_mask and idx (B,), the identity of each row's image,
    as `by_path_and_id` has it; log what is odd about the ids.
    """
    entries = read_train_pairs(config["train_file"], config["image_root"])
    pairs, identities = Mapped(entries, partial(item_of, text="caption")), by_path_and_id(entries)
    for problem in identities.problems:
        log.warning(problem)
    for note in identities.notes:
        log.info(note)
    identified = WithIdentities(pairs, identities.first)
    return finetune_loader(identified, config, tokenizer, seed)


class CaptionedImages(Sequence):
    """An entry for each image of a val or test file, with the captions of all rows that show it, in order."""

    def __init__(self, rows: Sequence[dict]):
        """rows: with one caption, as text, or a list of some."""
        first = by_path(rows)
        order = np.argsort(first, kind="stable")
        ends = np.flatnonzero(np.diff(first[order])) + 1
        self.rows, self.numbers = rows, np.split(order, ends)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        rows = [self.rows[number] for number in self.numbers[index].tolist()]
        listed = ([row["caption"]] if isinstance(row["caption"], str) else row["caption"] for row in rows)
        return {**rows[0], "caption": list(chain(*listed))}

    @property
    def note(self) -> str:
        """Return what there is to say of rows that were merged, or ""."""
        merged = next((numbers for numbers in self.numbers if len(numbers) > 1), None)
        if merged is None:
            return ""
        one, other = (self.rows[number] for number in merged[:2].tolist())
        return (
            f"{len(self.rows):,} rows show {len(self):,} images ({one['where']} and {other['where']} both "
            f"{one['image']}): rows of one image are read as one, with the captions of all of them"
        )


class RetrievalEvalData(EvalItems):
    """The images of a val or test file, and beside them its texts.

    Rows {"image", "caption": text or [text, ...]}; an image may have several. texts: all captions, cleaned,
    in order; img2txt: the texts of each image; txt2img: the image of each text; coco_ids: see `coco_ids`.
    lower: `lowers_case` of the tokenizer that will read them.
    """

    def __init__(self, file: str, config: dict, lower: bool = True):
        in_files = CaptionedImages(read_captioned_images(file, config["image_root"]))
        if in_files.note:
            log.info(in_files.note)
        entries = leave_out_unreadable(in_files, config)
        super().__init__(Mapped(entries, _without_text), config["image_res"])
        self.left_out = len(in_files) - len(entries)
        self.texts: list[str] = []
        self.img2txt: list[list[int]] = []
        self.txt2img: list[int] = []
        for number, entry in enumerate(entries):
            first = len(self.texts)
            self.texts += [clean_caption(caption, lower=lower) for caption in entry["caption"]]
            self.img2txt.append(list(range(first, len(self.texts))))
            self.txt2img += [number] * len(entry["caption"])
        self.coco_ids = coco_ids(entries)

    @property
    def with_texts(self) -> Sequence[dict]:
        return [{"text": text} for text in self.texts]


def coco_ids(entries: Iterable[dict]) -> list[tuple[int, list[int]]]:
    """Return COCO's number of each image, and those of its captions, or [] where the entry does not have them
    ("image_id", "caption_ids"); nothing where an image is not COCO's.
    """
    ids = []
    for entry in entries:
        number, numbers = entry.get("image_id"), entry.get("caption_ids")
        name = COCO_NAME.search(entry["image"])
        is_numbered = isinstance(numbers, list) and len(numbers) == len(entry["caption"])
        if is_numbered and all(type(value) is int for value in (number, *numbers)):
            ids.append((number, numbers))
        elif name:
            ids.append((int(name[1]), []))
        else:
            return []
    return ids


def _without_text(entry: dict) -> dict:
    return {"images": entry["images"], "text": "", "where": entry["where"]}
