"""Fine-tuning for image-text retrieval: contrast and matching, where several captions show one image.

Data     JSON lists of {"image": path, "caption": text, "image_id": any} (`train_file`) and of
         {"image": path, "caption": [text, ...]}, or a row a caption (`val_file`, `test_file`)
Command  torchrun --nproc_per_node=8 Retrieval.py \\
             --config configs/Retrieval_coco.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's TR@1 / IR@1: COCO test (5,000 images, k_test 256) 75.8 / 57.7, Flickr30k test (1,000
         images, k_test 128) 94.7 / 83.3
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import check_batch, parse
from simla.configs.schema import RETRIEVAL
from simla.dataset.retrieval import RetrievalEvalData, retrieval_loader
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import add_flag, run_script, script_arguments, start
from simla.engine.results import record_evaluation, result_path
from simla.models.retrieval import RetrievalBatch, SIMLARetrieval
from simla.utils import UserError, log
from zero_shot_retrieval import evaluate, report


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """ITA and ITM, summed with weight 1."""
    return model(RetrievalBatch(*(batch[name] for name in RetrievalBatch._fields)), alpha)


def make_model(args: argparse.Namespace, config: dict) -> SIMLARetrieval:
    model = SIMLARetrieval.from_config(config)
    model.visual_encoder.requires_grad_(not args.freeze_visual_encoder)
    return model


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    if not args.evaluate:
        check_batch(config, args.config)
    device = start(args, config)
    if args.dry_run:
        return dry_run(partial(make_model, args), losses, config, args, device, "end")
    select_on_test = config["released_code"]["select_on_test"]
    if not args.evaluate and not (config["train_file"] and (config["val_file"] or select_on_test)):
        raise UserError(f"config {args.config}: fine-tuning needs train_file and val_file (or --evaluate)")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    splits = {
        split: RetrievalEvalData(config[f"{split}_file"], config)
        for split in ("val", "test")
        if config[f"{split}_file"] and (split == "test" or not args.evaluate)
    }

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = make_model(args, config)
    bert = model.text_encoder.config
    check_vocabulary(tokenizer, bert.vocab_size)
    weights = starting_weights(model, config, "Retrieval", args.checkpoint, args.resume, tokenizer)
    log.info(weights)
    model = model.to(device)

    def evaluate_splits(epoch: int = 0) -> dict[str, float]:
        scores_file = result_path(args.output_dir, "retrieval_scores.pt") if config["save_scores"] else None
        scores = {}
        for split, data in splits.items():
            recall = evaluate(
                model, data, tokenizer, config, device, scores_file if split == "test" else None
            )
            scores |= {f"{split}_{name}": value for name, value in recall.items()}
        return scores

    # train, evaluate and save
    if args.evaluate:
        scores = evaluate_splits()
        record_evaluation(scores, config, args.output_dir)
    else:
        loader = retrieval_loader(
            config, tokenizer, bert.max_position_embeddings, args.seed, device.type == "cuda"
        )
        best = "test_r_mean" if select_on_test else "val_r_mean"
        weights, scores = fit(model, loader, losses, config, args, device, "end", evaluate_splits, best)
        weights = f"{weights}, best by {best}"

    # report
    recall = {name.removeprefix("test_"): value for name, value in scores.items() if name.startswith("test_")}
    report(splits["test"], recall, weights, config, args.output_dir)
    return recall


def parse_and_run() -> dict[str, float]:
    parser = script_arguments(__doc__, "configs/Retrieval_coco.yaml", "output/Retrieval")
    add_flag(parser, "--freeze_visual_encoder", "train everything but the image encoder")
    return main(*parse(parser, RETRIEVAL))


if __name__ == "__main__":
    run_script(parse_and_run)
