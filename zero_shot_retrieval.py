"""Image-text retrieval with a checkpoint as it is: contrast picks candidates, matching re-ranks them.

Data     JSON list of {"image": path, "caption": [text, ...]}: `test_file` in the config
Command  python -m torch.distributed.launch --nproc_per_node=8 --use_env zero_shot_retrieval.py --evaluate \\
             --config configs/Retrieval_flickr.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected Flickr30k test, k_test 128 (the paper's numbers): TR@1 86.2, IR@1 69.5 from pre-training alone,
         91.9 / 78.1 from a checkpoint fine-tuned on COCO
"""

import argparse
from pathlib import Path

import torch

from config import RETRIEVAL, parse
from dataset.retrieval import RetrievalEvalData
from dataset.text import build_tokenizer, check_vocabulary
from engine import record_evaluation
from models.initial import starting_weights
from models.retrieval import SIMLARetrieval
from Retrieval import evaluate, report
from utils import log, run_script, script_arguments, start


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    device = start(args)

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
