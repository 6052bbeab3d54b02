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

from torch import Tensor, nn

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import check_batch, parse
from simla.configs.schema import RETRIEVAL
from simla.dataset.retrieval import RetrievalEvalData, retrieval_loader
from simla.dataset.text import build_tokenizer, check_vocabulary, lowers_case
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import add_flag, run_script, script_arguments, start
from simla.engine.results import protocol, record_evaluation, scores_path
from simla.engine.training import Training
from simla.models.align import alignment_chance
from simla.models.retrieval import RetrievalBatch, SIMLARetrieval
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import UserError, log
from zero_shot_retrieval import evaluate, report


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """Return ITA and ITM, summed with weight 1."""
    return model(RetrievalBatch(*(batch[name] for name in RetrievalBatch._fields)), alpha)


def chance(config: dict) -> dict[str, float]:
    return alignment_chance(config["batch_size_train"] + config["queue_size"])


def make_model(config: dict, freeze_visual_encoder: bool) -> SIMLARetrieval:
    model = SIMLARetrieval.from_config(config)
    model.visual_encoder.requires_grad_(not freeze_visual_encoder)
    return model


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    if not args.evaluate:
        check_batch(config, args.config)
    run = start(args, config, chance(config))
    build = partial(make_model, freeze_visual_encoder=args.freeze_visual_encoder)
    if run.dry_run:
        return dry_run(build, losses, config, run)
    select_on_test = config["released_code"]["select_on_test"]
    if not run.evaluate and not (config["train_file"] and (config["val_file"] or select_on_test)):
        raise UserError(f"config {args.config}: fine-tuning needs train_file and val_file (or --evaluate)")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    data = {
        split: RetrievalEvalData(config[f"{split}_file"], config, lowers_case(tokenizer.backend_tokenizer))
        for split in ("val", "test")
        if config[f"{split}_file"] and (split == "test" or not run.evaluate)
    }
    loader = None if run.evaluate else retrieval_loader(config, tokenizer, run.seed)

    # model
    model = build(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    weights = starting_weights(model, config, "Retrieval", run.checkpoint, run.resume, tokenizer)
    log.info(weights)
    model = model.to(run.device)

    def evaluate_splits(epoch: int = -1) -> dict[str, float]:
        files = {"test": scores_path(run.output_dir, config["save_scores"])} if run.evaluate else {}
        scores = {}
        for split, items in data.items():
            recall = evaluate(model, items, tokenizer, config, run.device, files.get(split))
            scores |= {f"{split}_{name}": value for name, value in recall.items()}
        return scores

    if run.evaluate:
        scores = evaluate_splits()
        record_evaluation(scores, config, run.output_dir)
    else:
        # optimiser and schedule
        optimizer = create_optimizer(model, config["optimizer"])
        schedule = create_scheduler(optimizer, config["schedular"], epoch_step="end")

        # resume
        best = "test_r_mean" if select_on_test else "val_r_mean"
        how = protocol(data, config)
        training = Training(model, optimizer, schedule, loader, losses, config, run, best, how)
        if run.resume:
            training.resume(run.checkpoint)

        # train, evaluate and save
        weights, scores = fit(training, evaluate_splits)
        weights = f"{weights}, best by {best}"

    # report
    recall = {name.removeprefix("test_"): value for name, value in scores.items() if name.startswith("test_")}
    report(data["test"], recall, weights, config, run.output_dir)
    return recall


def parse_and_run() -> dict[str, float]:
    parser = script_arguments(__doc__, "configs/Retrieval_coco.yaml", "output/Retrieval")
    add_flag(parser, "--freeze_visual_encoder", "train everything but the image encoder")
    return main(*parse(parser, RETRIEVAL))


if __name__ == "__main__":
    run_script(parse_and_run)
