"""The tiny models that the recorded numbers were made with."""

import torch
from goldens_io import golden, golden_image

from models.bert import BertConfig
from models.pretrain import SIMLA

RELEASED = {"mlm_distill_over_sequence": True, "psl_padding": True}


def vit_sizes(config: dict) -> dict:
    return {**config["vit"], "img_size": config["image_res"]}


def golden_pretrain_model(image_res: int | None = None) -> SIMLA:
    """Unfilled, in eval mode (no dropout), with the published code's switches on."""
    config = golden("pretrain_structure")["config"]
    vit = vit_sizes(config) | ({"img_size": image_res} if image_res else {})
    model = SIMLA(
        vit,
        BertConfig.read(config["bert"]),
        embed_dim=config["embed_dim"],
        queue_size=config["queue_size"],
        temp=config["temp"],
        momentum=config["momentum"],
        **RELEASED,
    )
    return model.eval()


def pretrain_inputs(inputs: dict, mlm: dict) -> dict:
    """Keyword arguments of the pre-training forward from recorded inputs and masked words."""
    return {
        "image": golden_image(inputs["image_seed"], inputs["image_shape"]),
        "text_ids": torch.tensor(inputs["text"]["input_ids"]),
        "text_mask": torch.tensor(inputs["text"]["attention_mask"]),
        "mlm_ids": torch.tensor(mlm["input_ids"]),
        "mlm_labels": torch.tensor(mlm["labels"]),
        "patch_mask": torch.tensor(inputs["masked_visual_token_pos"]).bool(),
        "visual_codes": torch.tensor(inputs["visual_token_ids"]),
    }
