"""Tables of names: the parameters of one task's file that start those of another task's model."""

import re
from collections.abc import Callable
from dataclasses import dataclass


def _upper_half(layer: int, num_layers: int) -> int:
    """Return the layer that the VQA decoder's starts from: those of the text encoder's upper half."""
    return num_layers // 2 + layer


def upper_half_twice(layer: int, num_layers: int) -> int:
    """Return the layer that the two-image encoder's starts from: it has each of the upper half twice in a
    row, one per image.
    """
    return layer if layer < num_layers // 2 else num_layers // 2 + (layer - num_layers // 2) // 2


@dataclass(frozen=True)
class Row:
    """A task's way of reading a kind of checkpoint; all names are prefixes.

    `renames`: (model prefix, prefix in the file, rule for the layer number or None), the first that fits.
    `fresh`: model entries that may be absent from the file and stay as built.
    `unused`: entries of the file that this task has no place for.
    """

    renames: tuple[tuple[str, str, Callable[[int, int], int] | None], ...] = ()
    fresh: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    interpolate: bool = True
    may_lack_twins: bool = True  # and queues: all of them, as exported files do; not some

    def name_in_file(self, name: str, num_layers: int) -> str:
        """Return what fills the model's `name`, in a file whose text encoder has so many layers."""
        for prefix, source, layer_rule in self.renames:
            if name.startswith(prefix):
                name = source + name.removeprefix(prefix)
                number = re.search(r"(?<=\.layer\.)\d+", name)
                if layer_rule and number:
                    layer = layer_rule(int(number[0]), num_layers)
                    name = f"{name[: number.start()]}{layer}{name[number.end() :]}"
                return name
        return name


BERT = (("text_encoder.", "text_encoder.bert.", None), ("text_encoder_m.", "text_encoder_m.bert.", None))
DECODER = (
    ("text_decoder.", "text_encoder.", _upper_half),
    ("text_decoder_m.", "text_encoder_m.", _upper_half),
)
BERT_DECODER = Row((("bert.", "bert.", _upper_half),))  # the decoder from plain BERT weights
BERT_TWO_IMAGES = Row((("", "", upper_half_twice),))  # the two-image encoder from plain BERT weights
MIM = ("mim_head", "concept_head", "visual_encoder.mask_token", "visual_encoder_m.mask_token")
MLM = ("text_encoder.cls.", "text_encoder_m.cls.")
TOKEN_TYPES, POSITIONS = "embeddings.token_type_embeddings.weight", "embeddings.position_embeddings.weight"
QUEUES = ("image_queue", "text_queue", "queue_ptr", "idx_queue")
PROJECTIONS = ("temp", "vision_proj", "text_proj")
TWINS = ("visual_encoder_m.", "text_encoder_m.", "vision_proj_m.", "text_proj_m.")

KINDS = (  # the first whose marker begins a name of the checkpoint
    ("vqa", "text_decoder."),
    ("pretrain_nlvr", "ta_head."),
    ("pretrain", "concept_head."),
    ("pretrain", "text_encoder.cls."),  # ALBEF's
    ("retrieval", "itm_head."),  # before NLVR: ALBEF's have token types, too
    ("nlvr", f"text_encoder.{TOKEN_TYPES}"),
    ("ve", "cls_head."),
)
RESUME = Row(interpolate=False, may_lack_twins=False)
TWIN = re.compile(r"[a-z_]+_m\.")
