"""Grounding without boxes: trains on images with expressions, then asks Grad-CAM where an expression looks.

Data     JSON lists of {"image": path, "text": expression} (`train_file`) and {"image", "text", "ref_id"}
         (`test_file`), with "dataset" where it is RefCOCO or RefCOCOg; in `refcoco_data`
         refcoco+/refs(unc).p and refcoco+/instances.json, the true boxes, and so on; in `det_file`
         {image_id: [[x, y, w, h, ...], ...]}, a detector's boxes to choose from. Of your own photos
         {"image", "text", "box": [x, y, w, h]} and maybe "split", without `refcoco_data`
Command  torchrun --nproc_per_node=8 Grounding.py \\
             --config configs/Grounding.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's RefCOCO+ val / testA / testB 58.1 / 67.4 / 47.5 (val_d, testA_d, testB_d: detector boxes)
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse
from collections import Counter

import torch
from torch import Tensor

from Retrieval import losses
from simla.checkpoint.initial import starting_weights
from simla.checkpoint.load import load_weights
from simla.configs.reader import check_batch, parse
from simla.configs.schema import GROUNDING
from simla.dataset.grounding import GroundingEvalData, Target, grounding_loader
from simla.dataset.items import evaluation_batches
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import protocol, record_evaluation, save_result
from simla.engine.training import Training
from simla.evaluation import grounding
from simla.models.align import alignment_chance
from simla.models.gradcam import MODES, check_block, default_block, grad_cam
from simla.models.retrieval import SIMLARetrieval
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import UserError, all_gather_objects, check_scores, log


def chance(config: dict) -> dict[str, float]:
    return alignment_chance(config["batch_size_train"] + config["queue_size"])


def choice(heat: Tensor, target: Target) -> dict:
    """Return what a heat map (h, w) points at, as `point_at` does, and which expression that is of."""
    heat = grounding.resize_heat(heat, target.height, target.width)
    name = {"entry": target.where} if target.ref_id is None else {"ref_id": target.ref_id}
    return name | {"score": target.score_name} | grounding.point_at(heat, target.box, target.candidates)


def choose(
    model: SIMLARetrieval, data: GroundingEvalData, tokenizer, settings: dict, device: torch.device
) -> list[dict]:
    """Return the `choice` for every expression, in order, on every rank; settings: the config, with the mode
    and the layer of `grad_cam`. Raises UserError for a map that is not finite.
    """
    model.eval()
    choices = {}
    for batch in evaluation_batches(data, settings, tokenizer, device, "Grad-CAM"):
        inputs = batch["image"], batch["text_ids"], batch["text_mask"]
        heats = grad_cam(model, settings["gradcam_mode"], settings["block_num"], *inputs).float().cpu()
        check_scores(heats, "values of heat maps", "fp32")
        for index, heat in zip(batch["index"].tolist(), heats, strict=True):
            choices[index] = choice(heat, data.targets[index])
    choices = {index: chosen for share in all_gather_objects(choices) for index, chosen in share.items()}
    return [choices[index] for index in range(len(data))]


def evaluate(choices: list[dict]) -> dict[str, float]:
    """Return val_d, testA_d, testB_d (or val_h, refcocog_test_d, ...) in percent, those with expressions."""
    return grounding.grounding_accuracy([c["score"] for c in choices], [c["iou"] for c in choices])


def report(
    data: GroundingEvalData, choices: list[dict], weights: str, settings: dict, output_dir: str
) -> dict[str, float]:
    """Tell the protocol, and the accuracies beside chance, on the screen and in result/grounding.json."""
    scores, has_detector = evaluate(choices), bool(settings["det_file"])
    told = {
        "test_file": settings["test_file"],
        "expressions": dict(Counter(t.data_set or "boxes in the entries" for t in data.targets)),
        "weights": weights,
        "left_out": data.left_out,
        **{key: settings[key] for key in ("gradcam_mode", "block_num")},
        "boxes": f"chosen from {settings['det_file']}" if has_detector else "from the heat map alone",
        "chance": "an even choice among the boxes" if has_detector else "the whole image as box",
    }
    log.info("grounding: " + ", ".join(f"{key} {value}" for key, value in told.items()))
    names = [f"{split}_{'d' if has_detector else 'h'}" for split in data.splits]
    splits = {name: grounding.summary([c for c in choices if c["score"] == name]) for name in names}
    width = max(9, *map(len, names))
    for name, split in splits.items():
        if not split["n"]:
            log.info(f"{name:{width}} no expressions in test_file, no accuracy")
            continue
        log.info(f"{name:{width}} {split['accuracy']:6.2f}   chance {split['chance']:6.2f}   n {split['n']}")
        if split["without_box"]:
            log.info(f"{name:{width}} {split['without_box']} counted as wrong: no box has a score above 0")
        if has_detector:
            numbers = f"{split['heat_accuracy']:6.2f}   chance {split['heat_chance']:6.2f}"
            log.info(f"{'':{width}} {numbers}   with the box round the heat instead")
    save_result(output_dir, "grounding", {**told, "splits": splits, "choices": choices})
    return scores


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    if not args.evaluate:
        check_batch(config, args.config)
    run = start(args, config, chance(config))
    if run.dry_run:
        return dry_run(SIMLARetrieval.from_config, losses, config, run)

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    data = GroundingEvalData(config)
    val_scores = [target.score_name for target in data.targets if target.split == "val"]
    if not run.evaluate and not val_scores:
        raise UserError(
            f"test_file {config['test_file']}: split val, which chooses the best epoch, is empty; with "
            "--evaluate none is needed"
        )
    loader = None if run.evaluate else grounding_loader(config, tokenizer, run.seed)

    # model
    model = SIMLARetrieval.from_config(config)
    block = default_block(model, args.gradcam_mode) if args.block_num is None else args.block_num
    check_block(model, args.gradcam_mode, block)
    settings = {**config, "gradcam_mode": args.gradcam_mode, "block_num": block}
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    weights = starting_weights(model, config, "Grounding", run.checkpoint, run.resume, tokenizer)
    log.info(weights)
    model = model.to(run.device)
    choices = {}  # epoch -> its choices; -1: without training

    def evaluate_epoch(epoch: int = -1) -> dict[str, float]:
        choices[epoch] = choose(model, data, tokenizer, settings, run.device)
        return evaluate(choices[epoch])

    if run.evaluate:
        epoch = -1
        record_evaluation(evaluate_epoch(), config, run.output_dir)
    else:
        # optimiser and schedule
        optimizer = create_optimizer(model, config["optimizer"])
        schedule = create_scheduler(optimizer, config["schedular"], epoch_step="end")

        # resume
        how = protocol({"test": data}, settings)
        training = Training(model, optimizer, schedule, loader, losses, config, run, val_scores[0], how)
        if run.resume:
            training.resume(run.checkpoint)

        # train, evaluate and save
        weights, scores = fit(training, evaluate_epoch)
        epoch = scores["epoch"]
        if epoch not in choices:  # the best one was before the resume
            log.info(load_weights(model, weights, "Grounding"))
            evaluate_epoch(epoch)

    # report
    return report(data, choices[epoch], weights, settings, run.output_dir)


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/Grounding.yaml", "output/Grounding")
    parser.add_argument("--gradcam_mode", default="itm", choices=MODES, help="which score is explained")
    text = "layer whose attention map is used, from 0 (default: two thirds up, 8 of 12)"
    parser.add_argument("--block_num", type=int, help=text)
    main(*parse(parser, GROUNDING))


if __name__ == "__main__":
    run_script(parse_and_run)
