"""Images with a text, the items of every task, for training (augmented, bad images replaced) and evaluation.

An entry is {"images": [file, ...], "text": str or list of texts, "where": its place in the annotation file,
and what else the task needs}, as `read_annotations` makes it. B items of n images each.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from simla.dataset.images import BadImage, load_image, open_image
from simla.dataset.loaders import stop_at_unreadable, test_loader, to_device, train_loader
from simla.dataset.mixture import near
from simla.dataset.readers.annotations import Mapped
from simla.dataset.text import clean_caption, lowers_case, names_side, tokenize
from simla.dataset.transforms import EvalTransform, ItemRandom, TrainTransform
from simla.models.bert_config import BertConfig
from simla.utils import UserError, all_gather_objects, log, with_progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TRIES = 50
NUM_LOOKED_AT = 256  # entries, for the share of unknown words
UNKNOWN_SHARE = (
    0.05  # every other caption has a hole then; of its own language a vocabulary lacks below 0.001
)


@dataclass(eq=False)
class TrainItems(Dataset):
    """Training items. One of several texts is drawn each time; images are not mirrored under a text, or an
    answer to it, that says left or right (`names_side`), unless `flip_captions`.
    """

    entries: Sequence[dict]
    transform: Callable
    seed: int
    flip_captions: bool = False
    side_words: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Return the item of (epoch, index), or, where `make` cannot read an image, of another entry, drawn
        from all; `bad` lists such images as (file, cause). After MAX_TRIES of them that is all of the item;
        of an entry that itself cannot be read there is only `unreadable`, the message.
        """
        epoch, index, *_ = key
        rng, bad = ItemRandom(self.seed, epoch, index), []
        for num_tries in range(1, MAX_TRIES + 1):
            try:
                return {**self.make(self.entries[index], rng), "bad": bad}
            except UserError as error:
                return {"unreadable": str(error)}
            except BadImage as error:
                bad.append((error.path, error.cause))
                others = near(self.entries, index, num_tries)
                index = rng.python.randrange(others.start, others.stop)
        return {"bad": bad}

    def make(self, entry: dict, rng: ItemRandom) -> dict:
        """Return the entry with images (n, 3, R, R) uint8, their `files`, and one text."""
        images = [open_image(file) for file in entry["images"]]
        text = entry["text"] if isinstance(entry["text"], str) else rng.python.choice(entry["text"])
        if not text.strip():
            raise BadImage(str(getattr(entry["images"][0], "name", entry["images"][0])), "its text is empty")
        texts = [text, *entry.get("answers", [])]
        may_flip = self.flip_captions or not any(names_side(each, self.side_words) for each in texts)
        files = [getattr(file, "name", file) for file in entry["images"]]
        return {**entry, "files": files, "text": text, **self.views(images, rng, may_flip)}

    def views(self, images: list[Image.Image], rng: ItemRandom, may_flip: bool) -> dict[str, Tensor]:
        """Return what of the images goes into the item."""
        return {"images": torch.stack([self.transform(image, rng, may_flip) for image in images])}


class EvalItems(Dataset):
    """Every entry as it is, images resized."""

    left_out = 0  # entries of the files that are not among these
    is_looked_through = False  # for words that the vocabulary lacks
    clean: Callable[..., str] = staticmethod(clean_caption)  # of their texts, see `Collate`

    def __init__(self, entries: Sequence[dict], image_res: int):
        self.entries, self.transform = entries, EvalTransform(image_res)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def with_texts(self) -> Sequence[dict]:
        return self.entries

    def __getitem__(self, index: int) -> dict:
        """Return the entry with images (n, 3, R, R) uint8 and `index`, its number, or only `unreadable`, the
        message for a file that cannot be read.
        """
        try:
            entry = self.entries[index]
            images = torch.stack([self.transform(load_image(file)) for file in entry["images"]])
        except UserError as error:
            return {"unreadable": str(error)}
        except BadImage as error:
            return {
                "unreadable": f"{error}; {entry['where']}: scores without it would not compare; with "
                "skip_unreadable: true it is left out, and the report says so"
            }
        return {**entry, "images": images, "index": index}


@dataclass(eq=False)
class Collate:
    """Makes a batch of items: image (n * B, 3, R, R) uint8, all first images first; text, cleaned by `clean`,
    in lower case where the tokenizer reads no capital letters; text_ids, text_mask (B, T) of it, padded to
    the longest and cut to `max_tokens`, or, with a message, to the text encoder's `position_limit`; every
    other field as a tensor (numbers) or a list; `bad` of all items together; `counts`, for the log, where all
    show one image, so that matching (ITM) has no negatives in it.
    """

    tokenizer: "PreTrainedTokenizerBase"
    position_limit: int
    max_tokens: int | None = None
    clean: Callable[..., str] = clean_caption

    def __call__(self, items: list[dict]) -> dict[str, Tensor | list | str]:
        bad = [pair for item in items for pair in item.get("bad", [])]
        for item in items:
            if "unreadable" in item:
                return item
            if "images" not in item:
                return {
                    "unreadable": f"{MAX_TRIES} images drawn in a row could not be read, the last one "
                    f"{bad[-1][0]} ({bad[-1][1]}); check the paths in the annotation files"
                }
        batch = {name: [item[name] for item in items] for name in items[0]}
        batch |= {k: torch.tensor(v) for k, v in batch.items() if isinstance(v[0], int | float)}
        if "idx" in batch and (batch["idx"] == batch["idx"][0]).all():
            batch["counts"] = {"num_batches_of_one_image": 1}
        image = torch.stack(batch.pop("images"), dim=1).flatten(0, 1)  # (n, B, 3, R, R) -> (n * B, 3, R, R)
        lower = lowers_case(self.tokenizer.backend_tokenizer)
        batch["text"] = [self.clean(text, lower=lower) for text in batch["text"]]
        cut = {"position_limit": self.position_limit, "names": batch["where"]}
        text_ids, text_mask = tokenize(self.tokenizer, batch["text"], self.max_tokens, **cut)
        return {**batch, "image": image, "text_ids": text_ids, "text_mask": text_mask, "bad": bad}


# ---- loaders ----


def position_limit(config: dict) -> int:
    """Return how many tokens the text encoder of the config has positions for."""
    return BertConfig.read(config["bert_config"]).max_position_embeddings


def warn_of_unknown_words(
    entries: Sequence[dict],
    tokenizer: "PreTrainedTokenizerBase",
    text_encoder: str,
    clean: Callable[..., str] = clean_caption,
) -> None:
    """Warn where more than UNKNOWN_SHARE of the pieces of the entries' texts, of which some are looked at,
    evenly spread, are unknown to the vocabulary of `text_encoder`.
    """
    lower, texts = lowers_case(tokenizer.backend_tokenizer), []
    for index in range(0, len(entries), len(entries) // NUM_LOOKED_AT + 1):
        try:
            text = entries[index]["text"]
        except (UserError, BadImage):  # training says it
            continue
        texts += [clean(each, lower=lower) for each in ([text] if isinstance(text, str) else text)]
    words = Counter(word for text in texts for word in text.split())
    pieces = {word: tokenizer.tokenize(word) for word in words}
    num_pieces = sum(len(pieces[word]) * times for word, times in words.items())
    unknown = Counter({word: times for word, times in words.items() if tokenizer.unk_token in pieces[word]})
    num_unknown = sum(pieces[word].count(tokenizer.unk_token) * times for word, times in unknown.items())
    if num_unknown > UNKNOWN_SHARE * num_pieces:
        shown = ", ".join(repr(word) for word, _ in unknown.most_common(3))
        log.warning(
            f"{num_unknown / num_pieces:.0%} of the pieces of {len(texts)} texts that were looked at are "
            f"{tokenizer.unk_token}: text_encoder {text_encoder!r} has no pieces for words such as {shown}, "
            "which the model cannot tell apart. Name one of the texts' language, or fit one: "
            "python -m simla.dataset.prepare vocabulary"
        )


def finetune_items(entries: Sequence[dict], config: dict, seed: int, crop: bool = True) -> TrainItems:
    """Return training items with the crops, flips and RandAugment of a fine-tuning config."""
    augment = config["randaugment"]
    operations = augment["num_ops"], augment["magnitude"]
    transform = TrainTransform(config["image_res"], config["min_crop_scale"], operations, crop=crop)
    flip_captions = config["released_code"]["flip_captions"]
    return TrainItems(entries, transform, seed, flip_captions, config["side_words"])


def finetune_loader(
    entries: Sequence[dict],
    config: dict,
    tokenizer,
    seed: int,
    max_tokens: int | None = None,
    crop: bool = True,
) -> DataLoader:
    """Return the training batches of a fine-tuning config, augmented; texts are cut as `Collate` says."""
    warn_of_unknown_words(entries, tokenizer, config["text_encoder"])
    items = finetune_items(entries, config, seed, crop)
    collate = Collate(tokenizer, position_limit(config), max_tokens)
    return train_loader(items, config["batch_size_train"], seed, config, collate)


def evaluation_batches(
    items: EvalItems, config: dict, tokenizer, device: torch.device, header: str
) -> Iterator[dict]:
    """Yield this rank's share of the items in batches on the device, and log progress under the header; the
    first time, warn of unknown words. Raise UserError for an item that cannot be read.
    """
    if not items.is_looked_through:
        warn_of_unknown_words(items.with_texts, tokenizer, config["text_encoder"], items.clean)
        items.is_looked_through = True
    collate = Collate(tokenizer, position_limit(config), clean=items.clean)
    loader = test_loader(items, config["batch_size_test"], config, collate)
    for batch in with_progress(stop_at_unreadable(loader), len(loader), header, config["log_steps"]):
        yield to_device(batch, device)


def _problem(file: str) -> tuple[str, str] | None:
    """Return the file and what is wrong with it, or None."""
    try:
        load_image(file)
    except BadImage as error:
        return error.path, error.cause
    return None


def leave_out_unreadable(entries: Sequence[dict], config: dict) -> Sequence[dict]:
    """Return the entries of an evaluation; with config `skip_unreadable` without those that have an image
    which cannot be read, on all ranks the same: each reads its share of all images beforehand.

    Raises UserError where none is left.
    """
    if not config["skip_unreadable"]:
        return entries
    files = list(dict.fromkeys(file for entry in entries for file in entry["images"]))
    loader = test_loader(Mapped(files, _problem), config["batch_size_test"], config, list)
    batches = with_progress(loader, len(loader), "Checking images", config["log_steps"])
    problems_of_rank = [problem for batch in batches for problem in batch if problem]
    problems = dict(problem for share in all_gather_objects(problems_of_rank) for problem in share)
    if not problems:
        return entries
    kept = [number for number, entry in enumerate(entries) if problems.keys().isdisjoint(entry["images"])]
    example = "{}: {}".format(*next(iter(problems.items())))
    found = f"{len(problems)} of {len(files)} images cannot be read, such as {example}"
    if not kept:
        raise UserError(f"{found}; no entry is left to evaluate, check the paths in the annotation files")
    log.warning(f"{found}; {len(entries) - len(kept)} of {len(entries)} entries are left out")
    return Subset(entries, kept)


def evaluation_items(entries: Sequence[dict], config: dict) -> EvalItems:
    """Return the entries that `leave_out_unreadable` leaves, as items."""
    kept = leave_out_unreadable(entries, config)
    items = EvalItems(kept, config["image_res"])
    items.left_out = len(entries) - len(kept)
    return items
