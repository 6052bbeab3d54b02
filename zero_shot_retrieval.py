"""Image-text retrieval with a checkpoint as it is: contrast picks candidates, matching re-ranks them.

Data     JSON list of {"image": path, "caption": [text, ...]}: `test_file` in the config
Command  python -m torch.distributed.launch --nproc_per_node=8 --use_env zero_shot_retrieval.py --evaluate \\
             --config configs/Retrieval_flickr.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected Flickr30k test, k_test 128 (the paper's numbers): TR@1 86.2, IR@1 69.5 from pre-training alone,
         91.9 / 78.1 from a checkpoint fine-tuned on COCO
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import load_weights
from config import RETRIEVAL, read_config, save_config
from dataset import stop_at_unreadable, test_loader
from dataset.retrieval import RetrievalEvalData, collate_images
from dataset.text import build_tokenizer, check_vocabulary, tokenize
from metrics import retrieval_chance, retrieval_recall
from models.initial import load_initial_weights
from models.rerank import rerank
from models.retrieval import SIMLARetrieval
from utils import (
    all_gather_objects,
    append_log,
    is_main,
    log,
    rank,
    run_script,
    script_arguments,
    start,
    with_progress,
    world_size,
)

MAX_TEXT_TOKENS = 30


@torch.no_grad()
def score(model: SIMLARetrieval, data: RetrievalEvalData, tokenizer, config: dict, device: torch.device):
    """The two score matrices of `rerank`, equal on all ranks: images (I), texts (T) -> (I, T), (T, I)"""
    model.eval()
    batch_size = config["batch_size_test"]
    loader = test_loader(data, batch_size, config["num_workers"], collate_images)
    embeds = []
    feats = [torch.empty(0, model.vision_proj.out_features, device=device)]  # a rank may hold no image
    for batch in with_progress(stop_at_unreadable(loader), len(loader), "Images", config["log_steps"]):
        image_embeds, image_feat = model.encode_image(batch["image"].to(device))
        embeds += image_embeds.split(1)
        feats.append(image_feat)
    own = range(rank(), len(data), world_size())
    image_embeds = dict(zip(own, embeds, strict=True))  # image -> (1, N, D)
    image_feats = gather_in_order(own, torch.cat(feats), len(data))  # (I, E)

    limit = model.text_encoder.config.max_position_embeddings
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


def evaluate(model: SIMLARetrieval, data: RetrievalEvalData, tokenizer, config: dict, device: torch.device):
    """Recall@1/5/10 in percent both ways, and the score matrices."""
    scores_i2t, scores_t2i = score(model, data, tokenizer, config, device)
    recall = retrieval_recall(scores_i2t.numpy(), scores_t2i.numpy(), data.img2txt, data.txt2img)
    return recall, scores_i2t, scores_t2i


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    device = start(args)

    # data
    data = RetrievalEvalData(config["test_file"], config["image_root"], config["image_res"])
    tokenizer = build_tokenizer(config["text_encoder"])

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLARetrieval.from_config(config, momentum=False)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    if args.checkpoint:
        weights = load_weights(model, args.checkpoint, "zero_shot_retrieval")
    else:
        weights = "no --checkpoint: the scores before any training"
        load_initial_weights(model, config)
    log.info(weights)
    model = model.to(device)

    # evaluate
    recall, scores_i2t, scores_t2i = evaluate(model, data, tokenizer, config, device)

    # report
    chance = retrieval_chance(data.img2txt, data.txt2img)
    protocol = {
        "test_file": config["test_file"],
        "weights": str(weights),
        "n": len(data),
        "num_texts": len(data.texts),
        "k_test": config["k_test"],
    }
    log.info(
        "retrieval without fine-tuning here: "
        + ", ".join(f"{key} {value}" for key, value in protocol.items())
    )
    for name, value in recall.items():
        log.info(f"{name:12} {value:6.2f}   chance {chance[name]:6.2f}")
    append_log(args.output_dir, {f"test_{name}": value for name, value in recall.items()})
    if is_main():
        save_config(config, args.output_dir)
        folder = Path(args.output_dir) / "result"
        folder.mkdir(exist_ok=True)
        (folder / "retrieval.json").write_text(json.dumps({**protocol, **recall, "chance": chance}, indent=1))
        if config["save_scores"]:
            torch.save({"scores_i2t": scores_i2t, "scores_t2i": scores_t2i}, folder / "retrieval_scores.pt")
    return recall


def parse_and_run() -> None:
    args = script_arguments(
        __doc__, "configs/Retrieval_flickr.yaml", "output/zero_shot_retrieval"
    ).parse_args()
    config = read_config(args.config, RETRIEVAL, args.overrides)
    config["text_encoder"] = args.text_encoder or config["text_encoder"]
    main(args, config)


if __name__ == "__main__":
    run_script(parse_and_run)
