"""Fine-tuning for image-text retrieval: contrast and matching, where several captions show one image.

Data     JSON lists of {"image": path, "caption": text, "image_id": any} (`train_file`) and of
         {"image": path, "caption": [text, ...]} (`val_file`, `test_file`)
Command  python -m torch.distributed.launch --nproc_per_node=8 --use_env Retrieval.py \\
             --config configs/Retrieval_coco.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's TR@1 / IR@1: COCO test (5,000 images, k_test 256) 75.8 / 57.7, Flickr30k test (1,000
         images, k_test 128) 94.7 / 83.3
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from config import RETRIEVAL, parse
from dataset import stop_at_unreadable, test_loader
from dataset.items import Collate
from dataset.retrieval import RetrievalEvalData, retrieval_loader
from dataset.text import build_tokenizer, check_vocabulary, tokenize
from engine import fit, record_evaluation
from metrics import retrieval_chance, retrieval_recall
from models.initial import starting_weights
from models.rerank import rerank
from models.retrieval import SIMLARetrieval
from utils import (
    UserError,
    add_flag,
    all_gather_objects,
    is_main,
    log,
    rank,
    run_script,
    save_result,
    script_arguments,
    start,
    with_progress,
    world_size,
)

MAX_TEXT_TOKENS = 30  # in evaluation


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """ITA and ITM, summed with weight 1."""
    return model(batch["image"], batch["text_ids"], batch["text_mask"], batch["idx"], alpha)


@torch.no_grad()
def score(model: SIMLARetrieval, data: RetrievalEvalData, tokenizer, config: dict, device: torch.device):
    """The two score matrices of `rerank`, equal on all ranks: images (I), texts (T) -> (I, T), (T, I)"""
    model.eval()
    batch_size = config["batch_size_test"]
    limit = model.text_encoder.config.max_position_embeddings
    loader = test_loader(data, batch_size, config["num_workers"], Collate(tokenizer, limit))
    embeds = []
    feats = [torch.empty(0, model.vision_proj.out_features, device=device)]  # a rank may hold no image
    for batch in with_progress(stop_at_unreadable(loader), len(loader), "Images", config["log_steps"]):
        image_embeds, image_feat = model.encode_image(batch["image"].to(device))
        embeds += image_embeds.split(1)
        feats.append(image_feat)
    own = range(rank(), len(data), world_size())
    image_embeds = dict(zip(own, embeds, strict=True))  # image -> (1, N, D)
    image_feats = gather_in_order(own, torch.cat(feats), len(data))  # (I, E)

    text_ids, text_mask = tokenize(tokenizer, data.texts, MAX_TEXT_TOKENS, "max_length", limit)
    text_ids, text_mask = text_ids.to(device), text_mask.to(device)
    mine = range(rank(), len(data.texts), world_size())
    rows = torch.tensor(list(mine), dtype=torch.long).split(batch_size)
    text_feats = torch.cat([model.encode_text(text_ids[row], text_mask[row]) for row in rows])
    text_feats = gather_in_order(mine, text_feats, len(data.texts))  # (T, E)

    progress = partial(with_progress, header="Re-ranking", log_steps=config["log_steps"])
    return rerank(
        image_feats @ text_feats.T,
        config["k_test"],
        image_embeds,
        text_ids,
        text_mask,
        model.match,
        progress=lambda images: progress(images, len(images)),
    )


def gather_in_order(own: range, rows: Tensor, total: int) -> Tensor:
    """Rows that the ranks computed for their own items (n, E) -> the rows of all items (total, E)."""
    gathered = torch.empty(total, rows.shape[1], device=rows.device)
    for items, part in all_gather_objects((list(own), rows.cpu())):
        gathered[items] = part.to(rows.device)
    return gathered


def evaluate(
    model: SIMLARetrieval,
    data: RetrievalEvalData,
    tokenizer,
    config: dict,
    device: torch.device,
    scores_file: Path | None = None,
) -> dict[str, float]:
    """Recall@1/5/10 in percent both ways; the score matrices go to `scores_file`."""
    scores_i2t, scores_t2i = score(model, data, tokenizer, config, device)
    if scores_file is not None and is_main():
        scores_file.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"scores_i2t": scores_i2t, "scores_t2i": scores_t2i}, scores_file)
    return retrieval_recall(scores_i2t.numpy(), scores_t2i.numpy(), data.img2txt, data.txt2img)


def report(
    data: RetrievalEvalData, recall: dict[str, float], weights: str, config: dict, output_dir: str
) -> None:
    """The protocol and the recalls beside their chance levels, on the screen and in result/."""
    chance = retrieval_chance(data.img2txt, data.txt2img)
    protocol = {
        "test_file": config["test_file"],
        "weights": weights,
        "n": len(data),
        "num_texts": len(data.texts),
        "k_test": config["k_test"],
        "best checkpoint by": "test" if config["released_code"]["select_on_test"] else "val",
    }
    log.info("retrieval: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    for name, value in recall.items():
        log.info(f"{name:12} {value:6.2f}   chance {chance[name]:6.2f}")
    save_result(output_dir, "retrieval", {**protocol, **recall, "chance": chance})


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    device = start(args)
    select_on_test = config["released_code"]["select_on_test"]
    if not args.evaluate and not (config["train_file"] and (config["val_file"] or select_on_test)):
        raise UserError(f"config {args.config}: fine-tuning needs train_file and val_file (or --evaluate)")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    splits = {
        split: RetrievalEvalData(config[f"{split}_file"], config["image_root"], config["image_res"])
        for split in ("val", "test")
        if config[f"{split}_file"] and (split == "test" or not args.evaluate)
    }

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLARetrieval.from_config(config)
    bert = model.text_encoder.config
    check_vocabulary(tokenizer, bert.vocab_size)
    weights = starting_weights(model, config, "Retrieval", args.checkpoint, args.resume)
    log.info(weights)
    model.visual_encoder.requires_grad_(not args.freeze_visual_encoder)
    model = model.to(device)

    def evaluate_splits(epoch: int = 0) -> dict[str, float]:
        scores_file = (
            Path(args.output_dir, "result", "retrieval_scores.pt") if config["save_scores"] else None
        )
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
