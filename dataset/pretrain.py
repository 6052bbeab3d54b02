"""Image-caption pairs for pre-training, from annotation files and shards."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from simla.configs.reader import weighted
from simla.dataset.images import BadImage, open_image
from simla.dataset.items import Collate, TrainItems, position_limit, warn_of_unknown_words
from simla.dataset.loaders import train_loader
from simla.dataset.masking import BlockMask
from simla.dataset.mixture import Mixture
from simla.dataset.readers.annotations import TEXT, TEXTS, Mapped, item_of, read_annotations
from simla.dataset.readers.shard_stream import count_samples
from simla.dataset.readers.shards import Shards, expand_names, is_shards
from simla.dataset.text import mask_tokens
from simla.dataset.transforms import ItemRandom, PretrainTransform, View, crops, to_tensor, unit_range
from simla.utils import UserError, is_url, true_indices


class PretrainData(TrainItems):
    """Entries {"image", "caption": text or list of texts}. Beside `images` (1, 3, R, R) an item has code_view
    (3, r, r) uint8, patch_mask (h * w,) bool, mask_seed, from which the masked words are drawn, and
    passed_over: what the fetched shard that it was asked from has in no sample, shard -> cause -> number.
    """

    def __init__(
        self,
        entries: Mixture,
        transform: PretrainTransform,
        block_mask: BlockMask,
        seed: int,
        flip_captions: bool,
        side_words: Sequence[str] = (),
    ):
        super().__init__(entries, transform, seed, flip_captions, side_words)
        self.block_mask = block_mask

    def __getitem__(self, key: tuple[int, ...]) -> dict:
        for index in key[2:]:
            self.entries.expect(index)
        return {**super().__getitem__(key), "passed_over": self.entries.passed_over_beside(key[1])}

    def passed_over(self) -> dict[str, int]:
        """Return what the files hold that is in no entry, by cause, for the account of an epoch."""
        return dict(self.entries.passed_over())

    def views(self, images: list[Image.Image], rng: ItemRandom, may_flip: bool) -> dict[str, Tensor | int]:
        view, code_view = self.transform(images[0], rng, may_flip)
        return {
            "images": view[None],
            "code_view": code_view,
            "patch_mask": torch.from_numpy(self.block_mask(rng.python).reshape(-1)),
            "mask_seed": rng.python.getrandbits(63),
        }


class PretrainCollate(Collate):
    """Draws the masked words too, each item's by its seed; `passed_over` of all items together."""

    def __init__(self, tokenizer, max_tokens: int, position_limit: int, mlm_probability: float):
        super().__init__(tokenizer, position_limit, max_tokens)
        self.mlm_probability = mlm_probability

    def __call__(self, items: list[dict]) -> dict[str, Tensor | list | str]:
        batch = super().__call__(items)
        if "unreadable" in batch:
            return batch
        text_ids = batch["text_ids"]
        mlm_ids, mlm_labels = text_ids.clone(), torch.full_like(text_ids, -100)
        for row, length in enumerate(batch["text_mask"].sum(1).tolist()):
            # without the padding, so that the draw does not depend on the batch
            mlm_ids[row, :length], mlm_labels[row, :length] = mask_tokens(
                text_ids[row, :length],
                pad_id=self.tokenizer.pad_token_id,
                cls_id=self.tokenizer.cls_token_id,
                mask_id=self.tokenizer.mask_token_id,
                vocab_size=len(self.tokenizer),
                probability=self.mlm_probability,
                generator=torch.Generator().manual_seed(items[row]["mask_seed"]),
            )
        patch_mask = torch.stack(batch["patch_mask"])  # (B, h * w)
        return {
            **batch,
            "passed_over": dict(pair for found in batch["passed_over"] for pair in found.items()),
            "code_view": torch.stack(batch["code_view"]),  # (B, 3, r, r)
            "patch_mask": patch_mask,
            "mim_indices": true_indices(patch_mask),  # counted here, where nobody waits for it
            "mlm_ids": mlm_ids,  # (B, T)
            "mlm_labels": mlm_labels,
            "mlm_indices": true_indices(mlm_labels != -100),
        }


def read_pairs(files: str | list[str], image_root: str = "") -> Mapped:
    """Return the entries of pre-training files, `text` being the caption or captions."""
    entries = read_annotations(files, {"image": TEXT, "caption": TEXTS}, image_root)
    return Mapped(entries, partial(item_of, text="caption"))


def read_sets(train_file: str | list, samples_per_epoch: int = 0, image_root: str = "") -> Mixture:
    """Return the data sets of a pre-training config, annotation files and shards, with or without weights.

    samples_per_epoch 0: as many as there are. Raises UserError for files that cannot be used.
    """
    listed, weights = weighted(train_file)
    sets, set_weights, names = [], [], []
    for paths, weight in zip(listed, weights, strict=True):
        new = read_set(paths, image_root, samples_per_epoch == 0)
        set_weights += [weight * len(each) / sum(map(len, new)) for each in new]
        names += [", ".join(paths)] * len(new)
        sets += new
    mixture = Mixture(sets, set_weights, samples_per_epoch)
    if never := [name for name, share in zip(names, mixture.shares, strict=True) if not share]:
        raise UserError(
            f"of {mixture.samples_per_epoch} samples an epoch none would be of {never[0]}, by its weight or "
            "size: raise samples_per_epoch or its weight, or leave it out of train_file"
        )
    return mixture


def read_set(paths: list[str], image_root: str, must_count: bool) -> list[Sequence]:
    """Return what one weight is for: annotation files, local shards and others, as far as there are any."""
    files = [path for path in paths if not is_shards(path)]
    names = expand_names([path for path in paths if is_shards(path)])
    local, streams = ([name for name in names if is_url(name) == is_stream] for is_stream in (False, True))
    sets = [read_pairs(files, image_root)] if files else []
    sets += [Shards(local)] if local else []
    if streams:
        # Where the epoch's length is known the shards may be taken to have as many samples as the first.
        sets.append(Shards(streams, None if must_count else count_samples(streams[:1]) * len(streams)))
    return sets


def pretrain_loader(entries: Mixture, config: dict, tokenizer, code_res: int, seed: int) -> DataLoader:
    """Return the training batches of a pre-training config, with code views of code_res x code_res."""
    augment, released = config["randaugment"], config["released_code"]
    transform = PretrainTransform(
        config["image_res"],
        config["min_crop_scale"],
        (augment["num_ops"], augment["magnitude"]),
        code_res=code_res,
        independent_code_view=released["mim_independent_views"],
    )
    grid_size = config["image_res"] // config["vit"]["patch_size"]
    block_mask = BlockMask(grid_size, config["num_masking_patches"], config["min_num_patches"])
    flips = released["flip_captions"], config["side_words"]
    dataset = PretrainData(entries, transform, block_mask, seed, *flips)
    for each in entries.sets:
        if not getattr(each, "is_stream", False):  # it would be fetched for it
            warn_of_unknown_words(each, tokenizer, config["text_encoder"])
    limit, probability = position_limit(config), config["mlm_probability"]
    collate = PretrainCollate(tokenizer, config["max_tokens"], limit, probability)
    return train_loader(dataset, config["batch_size"], seed, config, collate, entries)


def code_views(entries: Mixture, code_res: int, num_images: int) -> Iterator[Tensor]:
    """Yield the readable ones of the first `num_images` images, uncropped, (3, r, r) in [0, 1].

    Raises UserError where none can be read.
    """
    num_read = 0
    for number in range(min(num_images, len(entries))):
        try:
            (pixels,) = crops(open_image(entries[number]["images"][0]), [View(None, False, code_res)])
        except BadImage as error:
            problem = error
            continue
        num_read += 1
        yield unit_range(to_tensor(pixels))
    if not num_read:
        raise UserError(f"none of the first {num_images} training images could be read; the last: {problem}")
