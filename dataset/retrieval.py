"""Images with their captions, for retrieval fine-tuning and evaluation."""

from dataset.annotations import ANY, TEXT, read_annotations
from dataset.items import EvalItems, finetune_loader
from dataset.text import clean_caption


def with_identities(entries: list[dict], key: str) -> list[dict]:
    """The entries with `idx`, equal for equal values of `key`: 0, 1, ... in order of appearance."""
    numbers: dict = {}
    return [{**entry, "idx": numbers.setdefault(repr(entry[key]), len(numbers))} for entry in entries]


def retrieval_loader(config: dict, tokenizer, position_limit: int, seed: int, pin: bool):
    """Training batches with image, text_ids, text_mask and idx (B,), the identity of each row's image."""
    fields = {"image": TEXT, "caption": TEXT, "image_id": ANY}
    entries = with_identities(
        read_annotations(config["train_file"], fields, config["image_root"]), "image_id"
    )
    entries = [
        {"images": e["images"], "text": e["caption"], "idx": e["idx"], "where": e["where"]} for e in entries
    ]
    return finetune_loader(entries, config, tokenizer, position_limit, seed, pin)


class RetrievalEvalData(EvalItems):
    """The images of a val or test file, and beside them its texts.

    Entries {"image", "caption": [text, ...]}. texts: all captions, cleaned, in order; img2txt: the texts of
    each image; txt2img: the image of each text.
    """

    def __init__(self, file: str, image_root: str, image_res: int, max_words: int = 30):
        entries = read_annotations(file, {"image": TEXT, "caption": (list,)}, image_root)
        shown = [{"images": entry["images"], "text": "", "where": entry["where"]} for entry in entries]
        super().__init__(shown, image_res)
        self.texts: list[str] = []
        self.img2txt: list[list[int]] = []
        self.txt2img: list[int] = []
        for number, entry in enumerate(entries):
            first = len(self.texts)
            self.texts += [clean_caption(caption, max_words) for caption in entry["caption"]]
            self.img2txt.append(list(range(first, len(self.texts))))
            self.txt2img += [number] * len(entry["caption"])
