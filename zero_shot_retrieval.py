"""Image-text retrieval with a checkpoint as it is: contrast picks candidates, matching re-ranks them.

Data     JSON list of {"image": path, "caption": [text, ...]}: `test_file` in the config
Command  python -m torch.distributed.launch --nproc_per_node=8 --use_env zero_shot_retrieval.py --evaluate \\
             --config configs/Retrieval_flickr.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected Flickr30k test, k_test 128 (the paper's numbers): TR@1 86.2, IR@1 69.5 from pre-training alone,
         91.9 / 78.1 from a checkpoint fine-tuned on COCO
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from config import RETRIEVAL, parse
from dataset import stop_at_unreadable, test_loader
from dataset.items import Collate
from dataset.retrieval import RetrievalEvalData
from dataset.text import build_tokenizer, check_vocabulary, tokenize
from engine import record_evaluation
from launch import run_script, script_arguments, start
from metrics import retrieval_chance, retrieval_recall
from models.initial import starting_weights
from models.rerank import rerank
from models.retrieval import SIMLARetrieval
from training import to_device
from utils import all_gather_objects, is_main, log, rank, save_result, with_progress, world_size

MAX_TEXT_TOKENS = 30


@torch.no_grad()
def score(model: SIMLARetrieval, data: RetrievalEvalData, tokenizer, config: dict, device: torch.device):
    """The two score matrices of `rerank`, equal on all ranks: images (I), texts (T) -> (I, T), (T, I)"""
    model.eval()
    batch_size = config["batch_size_test"]
    limit = model.text_encoder.config.max_position_embeddings
    collate, pin = Collate(tokenizer, limit), device.type == "cuda"
    loader = test_loader(data, batch_size, config["num_workers"], collate, pin)
    embeds = []
    feats = [torch.empty(0, model.vision_proj.out_features, device=device)]  # a rank may hold no image
    for batch in with_progress(stop_at_unreadable(loader), len(loader), "Images", config["log_steps"]):
        image_embeds, image_feat = model.encode_image(to_device(batch, device)["image"])
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
    }
    log.info("retrieval: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    for name, value in recall.items():
        log.info(f"{name:12} {value:6.2f}   chance {chance[name]:6.2f}")
    save_result(output_dir, "retrieval", {**protocol, **recall, "chance": chance})


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    device = start(args, config)

    # data
    data = RetrievalEvalData(config["test_file"], config["image_root"], config["image_res"])
    tokenizer = build_tokenizer(config["text_encoder"])

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLARetrieval.from_config(config, twins=False)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    weights = starting_weights(model, config, "zero_shot_retrieval", args.checkpoint)
    log.info(weights)
    model = model.to(device)

    # evaluate
    scores_file = Path(args.output_dir, "result", "retrieval_scores.pt") if config["save_scores"] else None
    recall = evaluate(model, data, tokenizer, config, device, scores_file)

    # report
    record_evaluation({f"test_{name}": value for name, value in recall.items()}, config, args.output_dir)
    report(data, recall, f"without fine-tuning here, {weights}", config, args.output_dir)
    return recall


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/Retrieval_flickr.yaml", "output/zero_shot_retrieval")
    main(*parse(parser, RETRIEVAL))


if __name__ == "__main__":
    run_script(parse_and_run)
