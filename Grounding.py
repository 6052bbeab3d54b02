"""Grounding without boxes: trains on images with expressions, then asks Grad-CAM where an expression looks.

Data     JSON lists of {"image": path, "text": expression} (`train_file`) and {"image", "text", "ref_id"}
         (`test_file`); in `refcoco_data` refcoco+/refs(unc).p and refcoco+/instances.json, the true boxes; in
         `det_file` {image_id: [[x, y, w, h, ...], ...]}, a detector's boxes to choose from. Of your own
         photos {"image", "text", "box": [x, y, w, h]} and maybe "split", without `refcoco_data`
Command  torchrun --nproc_per_node=8 Grounding.py \\
             --config configs/Grounding.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's RefCOCO+ val / testA / testB 58.1 / 67.4 / 47.5 (val_d, testA_d, testB_d: detector boxes)
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse

import torch

from Retrieval import losses
from simla.checkpoint.initial import starting_weights
from simla.checkpoint.load import load_weights
from simla.configs.reader import check_batch, parse
from simla.configs.schema import GROUNDING
from simla.dataset.grounding import GroundingEvalData, Target, grounding_loader
from simla.dataset.items import Collate
from simla.dataset.loaders import stop_at_unreadable, test_loader, to_device
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import record_evaluation, save_result
from simla.evaluation.grounding import (
    box_iou,
    choose_box,
    grounding_accuracy,
    grounding_chance,
    heat_box,
    resize_heat,
)
from simla.models.gradcam import MODES, check_block, default_block, grad_cam
from simla.models.retrieval import SIMLARetrieval
from simla.utils import UserError, all_gather_objects, check_scores, log, with_progress


def choice(heat: torch.Tensor, target: Target) -> dict:
    """The box that a heat map (h, w) points at and its IoU with the truth; no box: None and 0."""
    heat = resize_heat(heat, target.height, target.width)
    box = heat_box(heat) if target.candidates is None else choose_box(heat, target.candidates)
    iou = 0.0 if box is None else box_iou(target.box, box)
    name = {"entry": target.where} if target.ref_id is None else {"ref_id": target.ref_id}
    return {**name, "score": target.score_name, "box": box, "iou": iou}


def evaluate(
    model: SIMLARetrieval,
    data: GroundingEvalData,
    tokenizer,
    args: argparse.Namespace,
    config: dict,
    device: torch.device,
) -> list[dict]:
    """The `choice` for every expression, in order, on every rank; UserError for a map that is not finite."""
    model.eval()
    limit = model.text_encoder.config.max_position_embeddings
    collate, pin = Collate(tokenizer, limit), device.type == "cuda"
    loader = test_loader(data, config["batch_size_test"], config, collate, pin)
    own = {}
    for batch in with_progress(stop_at_unreadable(loader), len(loader), "Grad-CAM", config["log_steps"]):
        batch = to_device(batch, device)
        inputs = batch["image"], batch["text_ids"], batch["text_mask"]
        heats = grad_cam(model, args.gradcam_mode, args.block_num, *inputs).float().cpu()
        check_scores(heats, "values of heat maps", "fp32")
        for index, heat in zip(batch["index"].tolist(), heats, strict=True):
            own[index] = choice(heat, data.targets[index])
    choices = {index: found for part in all_gather_objects(own) for index, found in part.items()}
    return [choices[index] for index in range(len(data))]


def accuracies(choices: list[dict]) -> dict[str, float]:
    """val_d, testA_d, testB_d (or val_h, ...) in percent, those that have expressions."""
    return grounding_accuracy([found["score"] for found in choices], [found["iou"] for found in choices])


def report(
    data: GroundingEvalData, choices: list[dict], weights: str, args: argparse.Namespace, config: dict
) -> dict[str, float]:
    """The protocol, and the accuracies beside chance, on the screen and in result/grounding.json."""
    scores, has_detector = accuracies(choices), bool(config["det_file"])
    protocol = {
        "test_file": config["test_file"],
        "weights": weights,
        "left_out": data.left_out,
        "gradcam_mode": args.gradcam_mode,
        "block_num": args.block_num,
        "boxes": f"chosen from {config['det_file']}" if has_detector else "from the heat map alone",
        "chance": "an even choice among the boxes" if has_detector else "the whole image as box",
    }
    log.info("grounding: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    splits = {}
    for name in (f"{split}_{'d' if has_detector else 'h'}" for split in data.splits):
        chances = [grounding_chance(t.box, t.guesses) for t in data.targets if t.score_name == name]
        no_box = sum(found["box"] is None for found in choices if found["score"] == name)
        splits[name] = {"n": len(chances), "accuracy": scores.get(name), "without_box": no_box}
        if not chances:
            log.info(f"{name:9} no expressions in test_file, no accuracy")
            continue
        chance = splits[name]["chance"] = 100.0 * sum(chances) / len(chances)
        log.info(f"{name:9} {scores[name]:6.2f}   chance {chance:6.2f}   n {len(chances)}")
        if no_box:
            log.info(f"{name:9} {no_box} counted as wrong: no box has a score above 0")
    save_result(args.output_dir, "grounding", {**protocol, "splits": splits, "choices": choices})
    return scores


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    if not args.evaluate:
        check_batch(config, args.config)
    device = start(args, config)
    if args.dry_run:
        return dry_run(SIMLARetrieval.from_config, losses, config, args, device, "end")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    data = GroundingEvalData(config)
    if not args.evaluate and all(target.split != "val" for target in data.targets):
        raise UserError(
            f"test_file {config['test_file']}: split val, which chooses the best epoch, is empty; with "
            "--evaluate none is needed"
        )

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLARetrieval.from_config(config)
    if args.block_num is None:
        args.block_num = default_block(model, args.gradcam_mode)
    check_block(model, args.gradcam_mode, args.block_num)
    bert = model.text_encoder.config
    check_vocabulary(tokenizer, bert.vocab_size)
    weights = starting_weights(model, config, "Grounding", args.checkpoint, args.resume, tokenizer)
    log.info(weights)
    model = model.to(device)
    choices = {}  # epoch -> its choices; -1: without training

    def evaluate_epoch(epoch: int = -1) -> dict[str, float]:
        choices[epoch] = evaluate(model, data, tokenizer, args, config, device)
        return accuracies(choices[epoch])

    # train, evaluate and save
    epoch = -1
    if args.evaluate:
        record_evaluation(evaluate_epoch(), config, args.output_dir)
    else:
        loader = grounding_loader(
            config, tokenizer, bert.max_position_embeddings, args.seed, device.type == "cuda"
        )
        best = "val_d" if config["det_file"] else "val_h"
        weights, scores = fit(model, loader, losses, config, args, device, "end", evaluate_epoch, best)
        epoch = scores["epoch"]
        if epoch not in choices:  # the best one was before the resume
            log.info(load_weights(model, weights, "Grounding"))
            evaluate_epoch(epoch)

    # report
    return report(data, choices[epoch], weights, args, config)


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/Grounding.yaml", "output/Grounding")
    parser.add_argument("--gradcam_mode", default="itm", choices=MODES, help="which score is explained")
    parser.add_argument(
        "--block_num",
        type=int,
        help="layer whose attention map is used, from 0 (default: two thirds up, 8 of 12)",
    )
    main(*parse(parser, GROUNDING))


if __name__ == "__main__":
    run_script(parse_and_run)
