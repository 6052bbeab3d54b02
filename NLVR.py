"""Fine-tuning for NLVR2: is the sentence true of two images?

Data     JSON lists of {"images": [path, path], "sentence": text, "label": "True" or "False"}: `train_file`,
         `val_file`, `test_file`; with NLVR2's "identifier" in the last two, consistency is told and
         result/nlvr_val_predictions.csv and nlvr_test_predictions.csv are written, as its script takes them
Command  torchrun --nproc_per_node=8 NLVR.py --config configs/NLVR.yaml \\
             --checkpoint output/NLVR_Pretrain/checkpoint_00.pth
         after Pretrain_NLVR.py, from whose result it starts
Expected the paper's accuracy: dev 79.8, test-P 79.5
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import parse
from simla.configs.schema import NLVR
from simla.dataset.nlvr import CLASSES, official_identifiers, read_nlvr
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import dry_run
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import result_path
from simla.evaluation.classification import consistency
from simla.models.nlvr import SIMLANLVR
from simla.utils import atomic_write, is_main, log
from VE import SPLITS, losses, report, train_and_evaluate


class OfficialScores:
    """What NLVR2's own script scores: consistency, and each split's predictions in a file."""

    def __init__(self, output_dir: str):
        self.output_dir = output_dir
        self.predictions: dict[str, str] = {}  # split -> lines "identifier,prediction" of the last evaluation

    def score(self, split: str, items: Sequence[dict], classes: Tensor) -> dict[str, float]:
        """Return `val_consistency`, if it can be known; classes: the true and predicted ones, (N, 2)."""
        identifiers = official_identifiers(items)
        if identifiers is None:
            return {}
        true, predicted = classes.unbind(1)
        rows = zip(identifiers, predicted.tolist(), strict=True)
        self.predictions[split] = "".join(f"{name},{CLASSES[number]}\n" for name, number in rows)
        return {f"{split}_consistency": consistency(identifiers, (true == predicted).tolist())}

    def save(self) -> None:
        """Write result/nlvr_val_predictions.csv and so on, of the last evaluation; on the main rank only."""
        if not is_main():
            return
        for split, lines in self.predictions.items():
            path = result_path(self.output_dir, f"nlvr_{split}_predictions.csv")
            with atomic_write(path, text=True) as file:
                file.write(lines)


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
    weights = starting_weights(model, config, "NLVR", args.checkpoint, args.resume, tokenizer, copy_twins)
    log.info(weights)
    model = model.to(device)

    # train, evaluate and save: the losses and scores of VE.py
    official = OfficialScores(args.output_dir)
    settings = len(CLASSES), weights, config, args, device
    weights, scores = train_and_evaluate(model, entries, tokenizer, *settings, official.score, official.save)

    # report
    report("nlvr", scores, CLASSES, weights, entries, config, args.output_dir)
    for split in SPLITS:
        if f"{split}_consistency" not in scores:
            log.info(
                f"{config[f'{split}_file']}: no consistency, and no file of predictions; for them every "
                "entry needs an 'identifier' of its own like dev-850-0-0: python -m simla.dataset.prepare "
                "nlvr2"
            )
    return scores


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/NLVR.yaml", "output/NLVR")
    main(*parse(parser, NLVR))


if __name__ == "__main__":
    run_script(parse_and_run)
