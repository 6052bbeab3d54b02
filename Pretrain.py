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
import math
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from simla.checkpoint.image_tokenizers import build_image_tokenizer, fingerprint, fit_kmeans_codebook
from simla.checkpoint.initial import starting_weights
from simla.checkpoint.load import config_in, untrained_by
from simla.checkpoint.save import load_checkpoint
from simla.configs.reader import check_batch, parse
from simla.configs.schema import PRETRAIN
from simla.dataset.mixture import Mixture
from simla.dataset.pretrain import code_views, pretrain_loader, read_sets
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import CLS, dry_run
from simla.engine.fit import fit
from simla.engine.launch import Run, run_script, script_arguments, start
from simla.engine.training import Training
from simla.models.align import alignment_chance
from simla.models.bert_config import BertConfig
from simla.models.dvae import STRIDE
from simla.models.pretrain import SIMLA, PretrainBatch
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import UserError, barrier, is_main, log


def losses(
    model: nn.Module, batch: dict, alpha: float, image_tokenizer: nn.Module | None = None
) -> dict[str, Tensor]:
    """Return the losses that `loss_weights` weighs, as they are. The visual codes are MIM's targets."""
    fields = {name: batch[name] for name in PretrainBatch._fields if name != "visual_codes"}
    visual_codes = None if image_tokenizer is None else image_tokenizer(batch["code_view"])  # (B, h * w)
    return model(PretrainBatch(**fields, visual_codes=visual_codes), alpha)


def chance(config: dict) -> dict[str, float]:
    """Return what even guesses have: of all words (MLM), of all codes (MIM), a half for each word (PSL)."""
    levels = {
        **alignment_chance(config["batch_size"] + config["queue_size"]),
        "loss_mlm": math.log(BertConfig.read(config["bert_config"]).vocab_size),
        "loss_mim": math.log(config["image_tokenizer"]["vocab_size"]),
        "loss_psl": math.log(2),
    }
    return {f"loss_{name}": levels[f"loss_{name}"] for name, on in config["loss_weights"].items() if on}


def make_image_tokenizer(config: dict, entries: Mixture, code_res: int, run: Run) -> tuple[nn.Module, str]:
    """Return the config's image tokenizer and its fingerprint; the main rank fits a k-means codebook that is
    not there yet.

    Raises UserError where a resumed run has lost that of its MIM, or has another one: its codes mean
    something else. Of a checkpoint that is only started from that is warned of.
    """
    settings = config["image_tokenizer"]
    trained = load_checkpoint(run.checkpoint) if run.checkpoint else {}
    had_mim = "mim" not in untrained_by(config_in(trained, run.checkpoint))
    is_missing = settings["kind"] == "kmeans" and not Path(settings["path"]).is_file()
    if is_missing and run.resume and had_mim:
        raise UserError(
            f"image_tokenizer.path {settings['path']}: the codebook of the training of {run.checkpoint} "
            "is not there; copy it there, or name it"
        )
    if settings["kind"] == "kmeans" and not is_missing:
        log.info(f"visual tokens are those of {settings['path']}")
    if is_missing and is_main():
        log.info(
            f"fitting {settings['vocab_size']} visual tokens on the training images -> {settings['path']}"
        )
        views = code_views(entries, code_res, num_images=2000)
        fit_kmeans_codebook(settings["path"], views, settings["vocab_size"])
    barrier()
    tokenizer = build_image_tokenizer(settings)
    ours = fingerprint(tokenizer)
    if trained.get("image_tokenizer", ours) != ours:
        others = f"the visual tokens of image_tokenizer are not those that {run.checkpoint} was trained on"
        if run.resume:
            raise UserError(f"{others}; name the file that they are in")
        log.warning(f"{others}: MIM learns them anew")
    return tokenizer.to(run.device).eval(), ours


def main(args: argparse.Namespace, config: dict) -> None:
    # start
    check_batch(config, args.config)
    run = start(args, config, chance(config))
    if run.evaluate:
        raise UserError("Pretrain.py only trains; zero_shot_retrieval.py --evaluate scores its checkpoints")
    if run.dry_run:
        dry_run(partial(SIMLA.from_config, cls_id=CLS), losses, config, run)
        return

    # data
    entries = read_sets(config["train_file"], config["samples_per_epoch"], config["image_root"])
    code_res = config["image_res"] // config["vit"]["patch_size"] * STRIDE  # one code for each patch
    tokenizer = build_tokenizer(config["text_encoder"])
    loader = pretrain_loader(entries, config, tokenizer, code_res, run.seed)

    # model
    model = SIMLA.from_config(config, tokenizer.cls_token_id)
    check_vocabulary(tokenizer, model.text_encoder.bert.config.vocab_size)
    log.info(starting_weights(model, config, "Pretrain", run.checkpoint, run.resume, tokenizer))
    model = model.to(run.device)
    image_tokenizer, also_saved = None, {}
    if config["loss_weights"]["mim"]:  # last, because to fit a codebook takes minutes
        image_tokenizer, also_saved["image_tokenizer"] = make_image_tokenizer(config, entries, code_res, run)

    def losses_of(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
        return losses(model, batch, alpha, image_tokenizer)

    # optimiser and schedule
    optimizer = create_optimizer(model, config["optimizer"])
    schedule = create_scheduler(optimizer, config["schedular"], epoch_step="start")

    # resume
    training = Training(model, optimizer, schedule, loader, losses_of, config, run, also_saved=also_saved)
    if run.resume:
        training.resume(run.checkpoint)

    # train and save
    fit(training)


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/Pretrain.yaml", "output/Pretrain")
    main(*parse(parser, PRETRAIN))


if __name__ == "__main__":
    run_script(parse_and_run)
