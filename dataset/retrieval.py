"""Images with their captions, for retrieval fine-tuning and evaluation."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch

from dataset.annotations import ANY, TEXT, Annotations, Mapped, item_of, read_annotations
from dataset.items import EvalItems, finetune_loader, leave_out_unreadable
from dataset.text import clean_caption


class WithIdentities(Sequence):
    """The entries with `idx`, equal for equal `values`, one of each entry: 0, 1, ... as they appear."""

    def __init__(self, entries: Sequence, values: Iterable):
        numbers: dict[str, int] = {}
        found = (numbers.setdefault(repr(value), len(numbers)) for value in values)
        self.entries = entries
        # a tensor: what spawned loader processes get of it is not a copy
        self.idx = torch.from_numpy(np.fromiter(found, np.int64, len(entries)))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict:
        return {**self.entries[index], "idx": int(self.idx[index])}


def read_train_pairs(files: str | list[str], image_root: str) -> Annotations:
    """Entries of training files."""
    return read_annotations(files, {"image": TEXT, "caption": TEXT, "image_id": ANY}, image_root)


def read_captioned_images(files: str | list[str], image_root: str) -> Annotations:
    """Entries of val and test files."""
    return read_annotations(files, {"image": TEXT, "caption": (list,)}, image_root)


def retrieval_loader(config: dict, tokenizer, position_limit: int, seed: int, pin: bool):
    """Training batches with image, text_ids, text_mask and idx (B,), the identity of each row's image."""
    entries = read_train_pairs(config["train_file"], config["image_root"])
    pairs = Mapped(entries, partial(item_of, text="caption"))
    identified = WithIdentities(pairs, (entry["image_id"] for entry in entries))
    return finetune_loader(identified, config, tokenizer, position_limit, seed, pin)


class RetrievalEvalData(EvalItems):
    """The images of a val or test file, and beside them its texts.

    Entries {"image", "caption": [text, ...]}. texts: all captions, cleaned, in order; img2txt: the texts of
    each image; txt2img: the image of each text.
    """

    def __init__(self, file: str, config: dict, max_words: int = 30):
        found = read_captioned_images(file, config["image_root"])
        entries = leave_out_unreadable(found, config)
        super().__init__(Mapped(entries, _without_text), config["image_res"])
        self.left_out = len(found) - len(entries)
        self.texts: list[str] = []
        self.img2txt: list[list[int]] = []
        self.txt2img: list[int] = []
        for number, entry in enumerate(entries):
            first = len(self.texts)
            self.texts += [clean_caption(caption, max_words) for caption in entry["caption"]]
            self.img2txt.append(list(range(first, len(self.texts))))
            self.txt2img += [number] * len(entry["caption"])


def _without_text(entry: dict) -> dict:
    return {"images": entry["images"], "text": "", "where": entry["where"]}
