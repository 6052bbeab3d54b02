"""Images with their captions, for retrieval evaluation."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataset.annotations import TEXT, read_annotations
from dataset.text import clean_caption
from dataset.transforms import BadImage, EvalTransform, load_image


class RetrievalEvalData(Dataset):
    """The images of a val or test file, and beside them its texts.

    Entries {"image", "caption": [text, ...]}. texts: all captions, cleaned, in order; img2txt: the texts of
    each image; txt2img: the image of each text.
    """

    def __init__(self, file: str, image_root: str, image_res: int, max_words: int = 30):
        self.file = file
        self.entries = read_annotations(file, {"image": TEXT, "caption": (list,)}, image_root)
        self.transform = EvalTransform(image_res)
        self.texts: list[str] = []
        self.img2txt: list[list[int]] = []
        self.txt2img: list[int] = []
        for number, entry in enumerate(self.entries):
            first = len(self.texts)
            self.texts += [clean_caption(caption, max_words) for caption in entry["caption"]]
            self.img2txt.append(list(range(first, len(self.texts))))
            self.txt2img += [number] * len(entry["caption"])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        """image (3, R, R), or `unreadable`, the message for a file that cannot be read."""
        try:
            return {"image": self.transform(load_image(self.entries[index]["image"]))}
        except BadImage as error:
            return {
                "unreadable": f"{error}; entry {index} of {self.file}: scores without it would not compare"
            }


def collate_images(items: list[dict]) -> dict[str, Tensor | str]:
    for item in items:
        if "unreadable" in item:
            return item
    return {"image": torch.stack([item["image"] for item in items])}  # (B, 3, R, R)
