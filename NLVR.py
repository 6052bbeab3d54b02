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
import math

from simla.checkpoint.initial import starting_weights
from simla.checkpoint.load import load_weights
from simla.configs.reader import parse
from simla.configs.schema import NLVR
from simla.dataset.items import EvalItems, evaluation_items, finetune_loader
from simla.dataset.nlvr import CLASSES, official_identifiers, read_nlvr
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import forget_results, protocol, record_evaluation, result_path
from simla.engine.training import Training
from simla.evaluation.classification import consistency
from simla.models.nlvr import SIMLANLVR
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import atomic_write, is_main, log
from VE import evaluate, losses, report


def chance(config: dict) -> dict[str, float]:
    """Return what an even guess has."""
    return {"loss": math.log(len(CLASSES))}


def report_predictions(
    data: dict[str, EvalItems], predicted: dict[str, list[int]], config: dict, output_dir: str
) -> None:
    """Write result/nlvr_val_predictions.csv and nlvr_test_predictions.csv, lines "identifier,True" as NLVR2's
    own script takes them, or say what they need.
    """
    for split, items in data.items():
        identifiers, name = official_identifiers(items.entries), f"nlvr_{split}_predictions.csv"
        if identifiers is None:
            forget_results(output_dir, name)
            log.info(
                f"{config[f'{split}_file']}: no consistency, and no file of predictions; for them every "
                "entry needs an 'identifier' of its own like dev-850-0-0: python -m simla.dataset.prepare "
                "nlvr2"
            )
        elif is_main():
            rows = zip(identifiers, predicted[split], strict=True)
            with atomic_write(result_path(output_dir, name), text=True) as file:
                file.write("".join(f"{identifier},{CLASSES[number]}\n" for identifier, number in rows))


def main(args: argparse.Namespace, config: dict) -> dict[str, float | list]:
    # start
    run = start(args, config, chance(config))
    if run.dry_run:
        return dry_run(SIMLANLVR.from_config, losses, config, run, num_images=2)

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    splits = ("val", "test") if run.evaluate else ("train", "val", "test")
    entries = {split: read_nlvr(config[f"{split}_file"], config["image_root"]) for split in splits}
    data = {split: evaluation_items(entries[split], config) for split in ("val", "test")}
    loader = None if run.evaluate else finetune_loader(entries["train"], config, tokenizer, run.seed)

    # model
    model = SIMLANLVR.from_config(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    copy_twins = not config["released_code"]["nlvr_teacher_unloaded"]
    weights = starting_weights(model, config, "NLVR", run.checkpoint, run.resume, tokenizer, copy_twins)
    log.info(weights)
    model = model.to(run.device)
    predicted: dict[int, dict[str, list[int]]] = {}  # epoch -> split -> classes; -1: without training

    def evaluate_epoch(epoch: int = -1) -> dict[str, float | list]:
        scores, predicted[epoch] = {}, {}
        for split, items in data.items():
            result = evaluate(model, items, tokenizer, config, run.device, split)
            predicted[epoch][split] = result["predicted"]
            scores |= {f"{split}_{name}": result[name] for name in ("acc", "confusion")}
            if identifiers := official_identifiers(items.entries):
                pairs = zip(items.entries, result["predicted"], strict=True)
                right = [entry["label"] == number for entry, number in pairs]
                scores[f"{split}_consistency"] = consistency(identifiers, right)
        return scores

    if run.evaluate:
        epoch, scores = -1, evaluate_epoch()
        record_evaluation(scores, config, run.output_dir)
    else:
        # optimiser and schedule
        optimizer = create_optimizer(model, config["optimizer"])
        schedule = create_scheduler(optimizer, config["schedular"], epoch_step="end")

        # resume
        how = protocol(data, config)
        training = Training(model, optimizer, schedule, loader, losses, config, run, "val_acc", how)
        if run.resume:
            training.resume(run.checkpoint)

        # train, evaluate and save
        weights, scores = fit(training, evaluate_epoch)
        epoch = scores["epoch"]
        if epoch not in predicted:  # the best one was before the resume
            log.info(load_weights(model, weights, "NLVR"))
            evaluate_epoch(epoch)

    # report
    report("nlvr", scores, CLASSES, weights, data, config, run.output_dir)
    report_predictions(data, predicted[epoch], config, run.output_dir)
    return scores


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/NLVR.yaml", "output/NLVR")
    main(*parse(parser, NLVR))


if __name__ == "__main__":
    run_script(parse_and_run)
