"""Pre-training of SIMLA on image-caption pairs with five losses (ITA, ITM, MLM, MIM, PSL).

Data     JSON lists of {"image": path, "caption": text or list of texts}, or WebDataset shards: `train_file`
         in the config
Command  torchrun --nproc_per_node=8 Pretrain.py \\
             --config configs/Pretrain.yaml --output_dir output/Pretrain
Expected 30 epochs on the 4 M images of the paper: about 7 days on 8 A100 as published
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from simla.checkpoint.image_tokenizers import build_image_tokenizer, fit_kmeans_codebook
from simla.checkpoint.initial import starting_weights
from simla.configs.reader import check_batch, parse
from simla.configs.schema import PRETRAIN
from simla.dataset.mixture import Mixture
from simla.dataset.pretrain import code_views, pretrain_loader, read_sets
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import CLS, dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.models.dvae import STRIDE
from simla.models.pretrain import SIMLA, PretrainBatch
from simla.utils import UserError, barrier, is_main, log


def losses(model: nn.Module, batch: dict, alpha: float, image_tokenizer: nn.Module) -> dict[str, Tensor]:
    """The five losses, summed with weight 1. The visual codes are MIM's targets."""
    fields = {name: batch[name] for name in PretrainBatch._fields if name != "visual_codes"}
    visual_codes = image_tokenizer(batch["code_view"])  # (B, h * w)
    return model(PretrainBatch(**fields, visual_codes=visual_codes), alpha)


def make_image_tokenizer(config: dict, entries: Mixture, code_res: int, device: torch.device) -> nn.Module:
    """The image tokenizer of the config; a k-means codebook that is not there yet is fitted on the main
    rank.
    """
    settings = config["image_tokenizer"]
    if settings["kind"] == "kmeans" and is_main() and not Path(settings["path"]).is_file():
        log.info(
            f"fitting {settings['vocab_size']} visual tokens on the training images -> {settings['path']}"
        )
        views = code_views(entries, code_res, num_images=2000)
        fit_kmeans_codebook(settings["path"], views, settings["vocab_size"])
    barrier()
    return build_image_tokenizer(settings).to(device).eval()


def main(args: argparse.Namespace, config: dict) -> None:
    # start
    check_batch(config, args.config)
    device = start(args, config)
    if args.evaluate:
        raise UserError("Pretrain.py only trains; zero_shot_retrieval.py --evaluate scores its checkpoints")
    if args.dry_run:
        dry_run(partial(SIMLA.from_config, cls_id=CLS), losses, config, args, device, "start")
        return

    # data
    entries = read_sets(config["train_file"], config["samples_per_epoch"], config["image_root"])
    grid_size = config["image_res"] // config["vit"]["patch_size"]
    code_res = grid_size * STRIDE  # one code for each patch
    tokenizer = build_tokenizer(config["text_encoder"])

    # model
    model = SIMLA.from_config(config, tokenizer.cls_token_id)
    bert = model.text_encoder.bert.config
    check_vocabulary(tokenizer, bert.vocab_size)
    limit, pin = bert.max_position_embeddings, device.type == "cuda"
    loader = pretrain_loader(entries, config, tokenizer, code_res, grid_size, limit, args.seed, pin)
    log.info(starting_weights(model, config, "Pretrain", args.checkpoint, args.resume, tokenizer))
    # Last, because to fit a codebook takes minutes.
    image_tokenizer = make_image_tokenizer(config, entries, code_res, device)

    # train and save
    fit(
        model,
        loader,
        lambda model, batch, alpha: losses(model, batch, alpha, image_tokenizer),
        config,
        args,
        device,
        epoch_step="start",
    )


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/Pretrain.yaml", "output/Pretrain")
    main(*parse(parser, PRETRAIN))


if __name__ == "__main__":
    run_script(parse_and_run)
