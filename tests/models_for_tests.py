"""The tiny models that the recorded numbers were made with."""

import torch
from goldens_io import golden, golden_image

from simla.models.align import Draws
from simla.models.bert import BertConfig
from simla.models.pretrain import SIMLA, PretrainBatch
from simla.models.retrieval import RetrievalBatch
from simla.utils import true_indices

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
    """For `losses_of`, from recorded inputs and masked words."""
    return {
        "image": golden_image(inputs["image_seed"], inputs["image_shape"]),
        "text_ids": torch.tensor(inputs["text"]["input_ids"]),
        "text_mask": torch.tensor(inputs["text"]["attention_mask"]),
        "mlm_ids": torch.tensor(mlm["input_ids"]),
        "mlm_labels": torch.tensor(mlm["labels"]),
        "patch_mask": torch.tensor(inputs["masked_visual_token_pos"]).bool(),
        "visual_codes": torch.tensor(inputs["visual_token_ids"]),
    }


TINY_VIT = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY_BERT = BertConfig(
    vocab_size=40,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=32,
    max_position_embeddings=16,
    encoder_width=24,
)
TINY_CLS_ID = 1


def shake(module: torch.nn.Module, seed: int = 0, std: float = 0.3) -> torch.nn.Module:
    """Random weights so large that attention is far from even; in eval mode (no dropout)."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 0:  # the temperature stays
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)
    return module.eval()


def tiny_pretrain_model(vit: dict | None = None, bert: BertConfig = TINY_BERT, **switches) -> SIMLA:
    """Width 24, 10 image tokens, 40 words; dropout 0.1 in train mode."""
    return SIMLA(
        vit or TINY_VIT,
        bert,
        embed_dim=8,
        queue_size=12,
        visual_vocab_size=30,
        cls_id=TINY_CLS_ID,
        **switches,
    )


def tiny_texts(lengths: list[int], width: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[CLS] and random words other than padding, padded to `width`: ids, mask (len(lengths), width)."""
    ids = torch.randint(2, TINY_BERT.vocab_size, (len(lengths), width), generator=rng)
    ids[:, 0] = TINY_CLS_ID
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def losses_of(model: torch.nn.Module, batch: dict, draws: Draws | None = None) -> dict[str, torch.Tensor]:
    """A step's losses on the fields of a pre-training or retrieval batch without indices, and alpha."""
    fields = {name: value for name, value in batch.items() if name != "alpha"}
    if "mlm_labels" not in batch:
        return model(RetrievalBatch(**fields), batch["alpha"], draws)
    words, patches = true_indices(batch["mlm_labels"] != -100), true_indices(batch["patch_mask"])
    return model(PretrainBatch(**fields, mlm_indices=words, mim_indices=patches), batch["alpha"], draws)


def tiny_batch(batch: int, seed: int = 0) -> dict:
    """For `losses_of`, for the tiny model: captions of 2 to 6 tokens, a masked word in each."""
    rng = torch.Generator().manual_seed(seed)
    lengths = [2 + i % 5 for i in range(batch)]
    text_ids, text_mask = tiny_texts(lengths, 6, rng)
    labels = torch.full_like(text_ids, -100)
    labels[:, 1] = text_ids[:, 1]
    patch_mask = torch.rand(batch, 9, generator=rng) < 0.4
    patch_mask[:, 0] = True
    return {
        "image": torch.randn(batch, 3, 24, 24, generator=rng),
        "text_ids": text_ids,
        "text_mask": text_mask,
        "mlm_ids": text_ids.masked_fill(labels != -100, 3),
        "mlm_labels": labels,
        "patch_mask": patch_mask,
        "visual_codes": torch.randint(30, (batch, 9), generator=rng),
        "alpha": 0.4,
    }


def check_gradients(model: torch.nn.Module) -> None:
    """After a backward pass: every trainable parameter has a gradient, the others have none. (Data-parallel
    training waits for all of them; those of key biases are zero in theory, since softmax ignores a shift.)
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name.startswith(model.without_gradient):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert name.endswith("key.bias") or parameter.grad.norm() > 1e-7, name
