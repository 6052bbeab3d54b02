"""Image-text retrieval with a checkpoint as it is: contrast picks candidates, matching re-ranks them.

Data     JSON list of {"image": path, "caption": [text, ...]}, or a row a caption: `test_file` in the config
Command  torchrun --nproc_per_node=8 zero_shot_retrieval.py --evaluate \\
             --config configs/Retrieval_flickr.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected Flickr30k test, k_test 128 (the paper's numbers): TR@1 86.2, IR@1 69.5 from pre-training alone,
         91.9 / 78.1 from a checkpoint fine-tuned on COCO
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import parse
from simla.configs.schema import RETRIEVAL
from simla.dataset.items import evaluation_batches, position_limit
from simla.dataset.retrieval import RetrievalEvalData
from simla.dataset.text import MAX_TEXT_TOKENS, build_tokenizer, check_vocabulary, lowers_case, tokenize
from simla.engine.dry_run import dry_run_retrieval
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import record_evaluation, save_result, scores_path
from simla.evaluation.coco_captions import coco_scores, why_no_coco_scores
from simla.evaluation.rerank import rerank
from simla.evaluation.retrieval import retrieval_chance, retrieval_recall
from simla.models.retrieval import SIMLARetrieval
from simla.utils import (
    atomic_write,
    autocast,
    check_scores,
    dtype_of,
    gather_in_order,
    is_main,
    log,
    rank,
    with_progress,
    world_size,
)


def encode_images(
    model: SIMLARetrieval, data: RetrievalEvalData, tokenizer, config: dict, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the token states of this rank's images (n, N, D), on the host, and the features of all (I, E).

    The states, 0.9 MB an image of 384 x 384 in half precision, would fill a GPU; that precision costs
    nothing, since autocast rounds them so anyway before it projects them.
    """
    num_images, precision = len(range(rank(), len(data), world_size())), dtype_of(config["precision"])
    size = model.visual_encoder.pos_embed.shape[1:]  # N, D
    states = torch.empty(num_images, *size, dtype=precision, pin_memory=device.type == "cuda")
    feats = torch.empty(num_images, model.embed_dim, device=device)
    for batch in evaluation_batches(data, config, tokenizer, device, "Images"):
        rows = batch["index"] // world_size()
        embeds, feat = model.encode_image(batch["image"])
        states[rows.to("cpu")], feats[rows] = embeds.to("cpu", precision), feat.float()
    return states, gather_in_order(feats, len(data))


def encode_texts(model: SIMLARetrieval, text_ids: Tensor, text_mask: Tensor, batch_size: int) -> Tensor:
    """Return the features (T, E) of text_ids, text_mask (T, L); every rank computes its share."""
    ids, mask = text_ids[rank() :: world_size()], text_mask[rank() :: world_size()]
    feats = torch.empty(len(ids), model.text_proj.out_features, device=ids.device)  # none on some ranks
    for first in range(0, len(ids), batch_size):
        rows = slice(first, first + batch_size)
        feats[rows] = model.encode_text(ids[rows], mask[rows]).float()
    return gather_in_order(feats, len(text_ids))


@torch.no_grad()
def score(
    model: SIMLARetrieval, data: RetrievalEvalData, tokenizer, config: dict, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the score matrices of `rerank`, (I, T) and (T, I), on all ranks: contrast picks, matching ranks.

    Raises UserError for a score that is not finite.
    """
    model.eval()
    limit, precision = position_limit(config), config["precision"]
    text_ids, text_mask = tokenize(tokenizer, data.texts, MAX_TEXT_TOKENS, "max_length", limit)
    texts = text_ids.to(device), text_mask.to(device)
    with autocast(device, precision):
        image_embeds, image_feats = encode_images(model, data, tokenizer, config, device)
        text_feats = encode_texts(model, *texts, config["batch_size_test"])
    similarity = image_feats @ text_feats.T  # never in half precision
    check_scores(similarity, "similarities of images and texts", precision)

    def progress(groups: list):
        return with_progress(groups, len(groups), "Re-ranking", config["log_steps"])

    with autocast(device, precision):
        rule = {"score": config["score"], "itc_weight": config["score_itc_weight"]}
        scores = rerank(model, similarity, config["k_test"], image_embeds, *texts, progress=progress, **rule)
    for values in scores:
        check_scores(values, "matching scores of images and texts", precision)
    return scores


def evaluate(
    model: SIMLARetrieval,
    data: RetrievalEvalData,
    tokenizer,
    config: dict,
    device: torch.device,
    scores_file: Path | None = None,
) -> dict[str, float]:
    """Return recalls in percent, and `coco_scores`; the main rank writes the matrices to `scores_file`."""
    scores_i2t, scores_t2i = score(model, data, tokenizer, config, device)
    if scores_file is not None and is_main():
        with atomic_write(scores_file) as file:
            torch.save({"scores_i2t": scores_i2t, "scores_t2i": scores_t2i}, file)
    recall = retrieval_recall(scores_i2t.numpy(), scores_t2i.numpy(), data.img2txt, data.txt2img)
    return recall | coco_scores(scores_i2t, scores_t2i, data.coco_ids, scores_file)


def report(
    data: RetrievalEvalData, recall: dict[str, float], weights: str, config: dict, output_dir: str
) -> None:
    """Tell the protocol and the recalls beside their chance levels, on the screen and in result/."""
    chance = retrieval_chance(data.img2txt, data.txt2img)
    protocol = {
        "test_file": config["test_file"],
        "weights": weights,
        "n": len(data),
        "left_out": data.left_out,
        "num_texts": len(data.texts),
        **{key: config[key] for key in ("k_test", "score", "score_itc_weight")},
    }
    log.info("retrieval: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    for name, value in recall.items():
        log.info(f"{name:12} {value:6.2f}" + (f"   chance {chance[name]:6.2f}" if name in chance else ""))
    if reason := why_no_coco_scores(data.coco_ids):
        log.info(f"{config['test_file']}: no ECCV Caption and CxC, {reason}")
    save_result(output_dir, "retrieval", {**protocol, **recall, "chance": chance})


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    run = start(args, config)
    if run.dry_run:
        make_model = partial(SIMLARetrieval.from_config, config, twins=False)
        return dry_run_retrieval(make_model, config, run, MAX_TEXT_TOKENS)

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    data = RetrievalEvalData(config["test_file"], config, lowers_case(tokenizer.backend_tokenizer))

    # model
    model = SIMLARetrieval.from_config(config, twins=False)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    weights = starting_weights(model, config, "zero_shot_retrieval", run.checkpoint, tokenizer=tokenizer)
    log.info(weights)
    model = model.to(run.device)

    # evaluate and save
    scores_file = scores_path(run.output_dir, config["save_scores"])
    recall = evaluate(model, data, tokenizer, config, run.device, scores_file)
    record_evaluation({f"test_{name}": value for name, value in recall.items()}, config, run.output_dir)

    # report
    report(data, recall, f"without fine-tuning here, {weights}", config, run.output_dir)
    return recall


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/Retrieval_flickr.yaml", "output/zero_shot_retrieval")
    parser.set_defaults(evaluate=True)  # there is nothing else it does
    main(*parse(parser, RETRIEVAL))


if __name__ == "__main__":
    run_script(parse_and_run)
