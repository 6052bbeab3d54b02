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
import math

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
from simla.engine.training import Training
from simla.models.pretrain_nlvr import SIMLAPretrainNLVR
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import UserError, log


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """Return that of text assignment; there are no momentum targets to weigh with alpha."""
    return model(batch["image"], batch["text_ids"], batch["text_mask"])


def chance(config: dict) -> dict[str, float]:
    """Return what an even guess has: one of the two images, or neither."""
    return {"loss": math.log(3)}


def main(args: argparse.Namespace, config: dict) -> None:
    # start
    check_batch(config, args.config, least=3)  # the pair of neither image takes two others
    run = start(args, config, chance(config))
    if run.evaluate:
        raise UserError("Pretrain_NLVR.py only trains; NLVR.py --evaluate scores what was fine-tuned from it")
    if run.dry_run:
        dry_run(SIMLAPretrainNLVR.from_config, losses, config, run)
        return

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    entries = read_pairs(config["train_file"], config["image_root"])
    loader = finetune_loader(entries, config, tokenizer, run.seed, config["max_tokens"])

    # model
    model = SIMLAPretrainNLVR.from_config(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    log.info(starting_weights(model, config, "Pretrain_NLVR", run.checkpoint, run.resume, tokenizer))
    model = model.to(run.device)

    # optimiser and schedule
    optimizer = create_optimizer(model, config["optimizer"])
    schedule = create_scheduler(optimizer, config["schedular"], epoch_step="start")

    # resume
    training = Training(model, optimizer, schedule, loader, losses, config, run)
    if run.resume:
        training.resume(run.checkpoint)

    # train and save
    fit(training)


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/NLVR_Pretrain.yaml", "output/NLVR_Pretrain")
    main(*parse(parser, PRETRAIN_NLVR))


if __name__ == "__main__":
    run_script(parse_and_run)
