"""Image-caption pairs for pre-training."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset import train_loader
from dataset.annotations import TEXT, TEXTS, read_annotations
from dataset.masking import BlockMask
from dataset.text import clean_caption, mask_tokens, names_side, tokenize
from dataset.transforms import (
    BadImage,
    ItemRandom,
    PretrainTransform,
    load_image,
    resized_crop,
    to_tensor,
)
from utils import UserError

MAX_TRIES = 50


class PretrainData(Dataset):
    """Entries {"image", "caption": text or list of texts}; one caption is drawn each time."""

    def __init__(
        self,
        entries: list[dict],
        transform: PretrainTransform,
        block_mask: BlockMask,
        seed: int,
        flip_captions: bool,
    ):
        self.entries, self.transform, self.block_mask, self.seed = entries, transform, block_mask, seed
        self.flip_captions = flip_captions

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """(epoch, index) -> image (3, R, R), code_view (3, r, r), caption, patch_mask (h * w,) bool, key,
        bad.

        An image that cannot be read is replaced by another entry, drawn from all, and listed in `bad` as
        (file, cause). After MAX_TRIES of them there is no `image`.
        """
        epoch, index = key
        rng = ItemRandom(self.seed, epoch, index)
        bad = []
        for _ in range(MAX_TRIES):
            entry = self.entries[index]
            try:
                image = load_image(entry["image"])
            except BadImage as error:
                bad.append((error.path, error.cause))
                index = rng.python.randrange(len(self.entries))
                continue
            captions = entry["caption"]
            caption = captions if isinstance(captions, str) else rng.python.choice(captions)
            may_flip = self.flip_captions or not names_side(caption)
            view, code_view = self.transform(image, rng, may_flip)
            patch_mask = torch.from_numpy(self.block_mask(rng.python).reshape(-1))
            return {
                "image": view,
                "code_view": code_view,
                "caption": clean_caption(caption),
                "patch_mask": patch_mask,
                "mask_seed": rng.python.getrandbits(63),
                "bad": bad,
            }
        return {"bad": bad}


class PretrainCollate:
    """Batches items, tokenizes their captions and draws the masked words, each item's by its own seed."""

    def __init__(self, tokenizer, max_tokens: int, position_limit: int, mlm_probability: float):
        self.tokenizer, self.max_tokens, self.position_limit = tokenizer, max_tokens, position_limit
        self.mlm_probability = mlm_probability

    def __call__(self, items: list[dict]) -> dict[str, Tensor | list]:
        bad = [pair for item in items for pair in item["bad"]]
        if any("image" not in item for item in items):
            return {
                "unreadable": f"{MAX_TRIES} images drawn in a row could not be read, the last one "
                f"{bad[-1][0]} ({bad[-1][1]}); check the paths in the annotation files"
            }
        text_ids, text_mask = tokenize(
            self.tokenizer,
            [item["caption"] for item in items],
            self.max_tokens,
            position_limit=self.position_limit,
        )
        mlm_ids, mlm_labels = text_ids.clone(), torch.full_like(text_ids, -100)
        for row, item in enumerate(items):
            length = int(
                text_mask[row].sum()
            )  # without the padding, so that the draw does not depend on the batch
            mlm_ids[row, :length], mlm_labels[row, :length] = mask_tokens(
                text_ids[row, :length],
                pad_id=self.tokenizer.pad_token_id,
                cls_id=self.tokenizer.cls_token_id,
                mask_id=self.tokenizer.mask_token_id,
                vocab_size=len(self.tokenizer),
                probability=self.mlm_probability,
                generator=torch.Generator().manual_seed(item["mask_seed"]),
            )
        return {
            "image": torch.stack([item["image"] for item in items]),  # (B, 3, R, R)
            "code_view": torch.stack([item["code_view"] for item in items]),  # (B, 3, r, r)
            "patch_mask": torch.stack([item["patch_mask"] for item in items]),  # (B, h * w)
            "text_ids": text_ids,  # (B, T)
            "text_mask": text_mask,
            "mlm_ids": mlm_ids,
            "mlm_labels": mlm_labels,
            "bad": bad,
        }


def pretrain_loader(
    config: dict, tokenizer, code_res: int, grid_size: int, position_limit: int, seed: int, pin: bool
):
    """The training loader of a pre-training config; UserError for files that cannot be used."""
    entries = read_annotations(config["train_file"], {"image": TEXT, "caption": TEXTS})
    augment, released = config["randaugment"], config["released_code"]
    transform = PretrainTransform(
        config["image_res"],
        config["min_crop_scale"],
        (augment["num_ops"], augment["magnitude"]),
        code_res,
        released["mim_independent_views"],
    )
    block_mask = BlockMask(grid_size, config["num_masking_patches"], config["min_num_patches"])
    dataset = PretrainData(entries, transform, block_mask, seed, released["flip_captions"])
    collate = PretrainCollate(tokenizer, config["max_tokens"], position_limit, config["mlm_probability"])
    return train_loader(dataset, config["batch_size"], seed, config["num_workers"], collate, pin_memory=pin)


def code_views(files: str | list[str], code_res: int, num_images: int) -> Iterator[Tensor]:
    """The readable ones of the first `num_images` images, uncropped, (3, r, r) in [0, 1].

    Raises UserError where none can be read.
    """
    num_read = 0
    for entry in read_annotations(files, {"image": TEXT, "caption": TEXTS})[:num_images]:
        try:
            image = load_image(entry["image"])
        except BadImage as error:
            problem = error
            continue
        num_read += 1
        yield to_tensor(resized_crop(image, None, code_res))
    if not num_read:
        raise UserError(f"none of the first {num_images} training images could be read; the last: {problem}")
