"""Fine-tuning for visual entailment (SNLI-VE): does the image entail, contradict or leave open the sentence?

Data     JSON lists of {"image": id without .jpg, "sentence": text, "label": "entailment", "neutral" or
         "contradiction"}: `train_file`, `val_file`, `test_file`
Command  torchrun --nproc_per_node=8 VE.py --config configs/VE.yaml \\
             --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's accuracy: val 79.6, test 80.2
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import parse
from simla.configs.schema import VE
from simla.dataset.items import EvalItems, evaluation_batches, evaluation_items, finetune_loader
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.dataset.ve import CLASSES, read_ve
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import protocol, record_evaluation, save_result
from simla.engine.training import Training
from simla.evaluation.classification import accuracy, confusion_counts, confusion_table, majority_accuracy
from simla.models.ve import SIMLAVE
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import all_gather_objects, autocast, check_scores, log


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """Return the cross-entropy with the labels and the momentum twins' answers."""
    return model(batch["image"], batch["text_ids"], batch["text_mask"], batch["label"], alpha)


def chance(config: dict) -> dict[str, float]:
    """Return what an even guess has."""
    return {"loss": math.log(len(CLASSES))}


@torch.no_grad()
def evaluate(
    model: SIMLAVE, data: EvalItems, tokenizer, config: dict, device: torch.device, header: str
) -> dict[str, float | list]:
    """Return the accuracy in percent, `acc`, the counts [true][predicted], `confusion`, and the class
    `predicted` of each item in order; the same on all ranks.

    Raises UserError for a score that is not finite.
    """
    model.eval()
    rows: list[tuple[int, int, int]] = []  # of this rank: index, true and predicted class
    for batch in evaluation_batches(data, config, tokenizer, device, header):
        with autocast(device, config["precision"]):
            logits = model.predict(batch["image"], batch["text_ids"], batch["text_mask"])
        predicted = check_scores(logits, "scores of classes", config["precision"]).argmax(-1)
        columns = batch["index"], batch["label"], predicted
        rows += zip(*(column.tolist() for column in columns), strict=True)
    gathered = torch.tensor(sorted(row for share in all_gather_objects(rows) for row in share))
    _, true, predicted = gathered.unbind(1)
    counts = confusion_counts(true, predicted, model.num_classes)
    return {"acc": accuracy(counts), "confusion": counts.tolist(), "predicted": predicted.tolist()}


def report(
    name: str,
    scores: dict[str, float | list],
    classes: Sequence[str],
    weights: str,
    data: dict[str, EvalItems],
    config: dict,
    output_dir: str,
) -> None:
    """Tell each split's scores beside those of always the most frequent class; write result/NAME.json."""
    result = {"weights": weights, "classes": classes, "sentence_only": config["sentence_only"]}
    log.info(f"{name}, weights: {weights}" + ", blind: sentence_only" * config["sentence_only"])
    for split, items in data.items():
        counts = torch.tensor(scores[f"{split}_confusion"])
        shown = {"acc": accuracy(counts)}
        if f"{split}_consistency" in scores:  # NLVR2's
            shown["consistency"] = scores[f"{split}_consistency"]
        shown["most_frequent_class"] = majority_accuracy(counts)
        file = config[f"{split}_file"]
        num = {"n": len(items), "left_out": items.left_out}
        result[split] = {"file": file, **num, **shown, "confusion": counts.tolist()}
        names = {"acc": "accuracy", "most_frequent_class": "always the most frequent class"}
        told = ", ".join(f"{names.get(key, key)} {value:.2f}" for key, value in shown.items())
        log.info(f"{file}: {told}, n {len(items)}, left out {items.left_out}")
        log.info(confusion_table(counts, classes))
    save_result(output_dir, name, result)


def main(args: argparse.Namespace, config: dict) -> dict[str, float | list]:
    # start
    run = start(args, config, chance(config))
    if run.dry_run:
        return dry_run(SIMLAVE.from_config, losses, config, run)

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    splits = ("val", "test") if run.evaluate else ("train", "val", "test")
    entries = {split: read_ve(config[f"{split}_file"], config["image_root"]) for split in splits}
    data = {split: evaluation_items(entries[split], config) for split in ("val", "test")}
    loader = None if run.evaluate else finetune_loader(entries["train"], config, tokenizer, run.seed)

    # model
    model = SIMLAVE.from_config(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    weights = starting_weights(model, config, "VE", run.checkpoint, run.resume, tokenizer)
    log.info(weights)
    model = model.to(run.device)

    def evaluate_splits(epoch: int = -1) -> dict[str, float | list]:
        scores = {}
        for split, items in data.items():
            result = evaluate(model, items, tokenizer, config, run.device, split)
            scores |= {f"{split}_{name}": result[name] for name in ("acc", "confusion")}
        return scores

    if run.evaluate:
        scores = evaluate_splits()
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
        weights, scores = fit(training, evaluate_splits)

    # report
    report("ve", scores, CLASSES, weights, data, config, run.output_dir)
    return scores


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/VE.yaml", "output/VE")
    main(*parse(parser, VE))


if __name__ == "__main__":
    run_script(parse_and_run)
