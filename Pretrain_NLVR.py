"""Pre-training for NLVR2 by text assignment: which of two images, if any, does the caption describe?

Data     JSON lists of {"image": path, "caption": text or list of texts}, as for Pretrain.py: `train_file`
Command  torchrun --nproc_per_node=8 Pretrain_NLVR.py \\
             --config configs/NLVR_Pretrain.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected one epoch; NLVR.py starts from its checkpoint_00.pth
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse

import torch
from torch import Tensor, nn

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import check_batch, parse
from simla.configs.schema import PRETRAIN_NLVR
from simla.dataset.items import finetune_loader
from simla.dataset.pretrain import read_pairs
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.models.pretrain_nlvr import SIMLAPretrainNLVR
from simla.utils import UserError, log


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """Text assignment; there are no momentum targets to weigh with alpha."""
    return model(batch["image"], batch["text_ids"], batch["text_mask"])


def main(args: argparse.Namespace, config: dict) -> None:
    # start
    check_batch(config, args.config, least=3)  # the pair of neither image takes two others
    device = start(args, config)
    if args.dry_run:
        dry_run(SIMLAPretrainNLVR.from_config, losses, config, args, device, "start")
        return
    if args.evaluate:
        raise UserError("Pretrain_NLVR.py only trains; NLVR.py --evaluate scores what was fine-tuned from it")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    entries = read_pairs(config["train_file"], config["image_root"])

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLAPretrainNLVR.from_config(config)
    bert = model.text_encoder.config
    check_vocabulary(tokenizer, bert.vocab_size)
    log.info(starting_weights(model, config, "Pretrain_NLVR", args.checkpoint, args.resume, tokenizer))

    # train and save
    limit, pin = bert.max_position_embeddings, device.type == "cuda"
    loader = finetune_loader(entries, config, tokenizer, limit, args.seed, pin, config["max_tokens"])
    fit(model, loader, losses, config, args, device, epoch_step="start")


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/NLVR_Pretrain.yaml", "output/NLVR_Pretrain")
    main(*parse(parser, PRETRAIN_NLVR))


if __name__ == "__main__":
    run_script(parse_and_run)
