"""Fine-tuning for NLVR2: is the sentence true of two images?

Data     JSON lists of {"images": [path, path], "sentence": text, "label": "True" or "False"}: `train_file`,
         `val_file`, `test_file`
Command  python -m torch.distributed.launch --nproc_per_node=8 --use_env NLVR.py --config configs/NLVR.yaml \\
             --checkpoint output/NLVR_Pretrain/checkpoint_00.pth
         after Pretrain_NLVR.py, from whose result it starts
Expected the paper's accuracy: dev 79.8, test-P 79.5
"""

import argparse

import torch

from config import NLVR, parse
from dataset.nlvr import CLASSES, read_nlvr
from dataset.text import build_tokenizer, check_vocabulary
from dry_run import dry_run
from launch import run_script, script_arguments, start
from models.initial import starting_weights
from models.nlvr import SIMLANLVR
from utils import log
from VE import SPLITS, losses, report, train_and_evaluate


def main(args: argparse.Namespace, config: dict) -> dict:
    # start
    device = start(args, config)
    if args.dry_run:
        return dry_run(SIMLANLVR.from_config, losses, config, args, device, "end", num_images=2)

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    splits = SPLITS if args.evaluate else ("train", *SPLITS)
    entries = {split: read_nlvr(config[f"{split}_file"], config["image_root"]) for split in splits}

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLANLVR.from_config(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    copy_twins = not config["released_code"]["nlvr_teacher_unloaded"]
    weights = starting_weights(model, config, "NLVR", args.checkpoint, args.resume, copy_twins)
    log.info(weights)
    model = model.to(device)

    # train, evaluate and save: the losses and scores of VE.py
    weights, scores = train_and_evaluate(
        model, entries, tokenizer, len(CLASSES), weights, config, args, device
    )

    # report
    report("nlvr", scores, CLASSES, weights, entries, config, args.output_dir)
    return scores


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/NLVR.yaml", "output/NLVR")
    main(*parse(parser, NLVR))


if __name__ == "__main__":
    run_script(parse_and_run)
