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
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import parse
from simla.configs.schema import VE
from simla.dataset.items import evaluation_loader, finetune_loader
from simla.dataset.loaders import stop_at_unreadable, to_device
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.dataset.ve import CLASSES, read_ve
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import record_evaluation, save_result
from simla.evaluation.classification import accuracy, confusion_counts, confusion_table, majority_accuracy
from simla.models.ve import SIMLAVE
from simla.utils import all_gather_objects, autocast, check_scores, log, with_progress

SPLITS = ("val", "test")
ScoreEntries = Callable[[str, Sequence[dict], Tensor], dict[str, float]]


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """Cross-entropy with the labels and the momentum twins' answers."""
    return model(batch["image"], batch["text_ids"], batch["text_mask"], batch["label"], alpha)


def evaluate(
    model: nn.Module,
    loaders: dict[str, DataLoader],
    num_classes: int,
    config: dict,
    device: torch.device,
    score_entries: ScoreEntries | None = None,
) -> dict[str, float | list]:
    """Of each split the accuracy in percent, `val_acc`, and the counts [true][predicted], `val_confusion`;
    score_entries(split, entries, classes) -> further scores of a task; classes (N, 2): the true and the
    predicted one of each of the loader's entries.
    """
    scores = {}
    for split, loader in loaders.items():
        classes = evaluate_classes(model, loader, config, device, split)
        counts = confusion_counts(*classes.unbind(1), num_classes)
        scores |= {f"{split}_acc": accuracy(counts), f"{split}_confusion": counts.tolist()}
        if score_entries is not None:
            scores |= score_entries(split, loader.dataset.entries, classes)
    return scores


def train_and_evaluate(
    model: nn.Module,
    entries: dict[str, list[dict]],
    tokenizer,
    num_classes: int,
    weights: str,
    config: dict,
    args: argparse.Namespace,
    device: torch.device,
    score_entries: ScoreEntries | None = None,
    on_best: Callable[[], None] = lambda: None,
) -> tuple[str, dict]:
    """Fine-tunes on the entries of `train`, unless only `val` and `test` are there; returns what the scores
    belong to and the scores of `evaluate`. on_best() is called after an evaluation whose scores may be those.
    """
    limit = model.text_encoder.config.max_position_embeddings
    pin = device.type == "cuda"
    loaders = {split: evaluation_loader(entries[split], config, tokenizer, limit, pin) for split in SPLITS}

    def evaluate_splits(epoch: int = 0) -> dict:
        return evaluate(model, loaders, num_classes, config, device, score_entries)

    if "train" not in entries:
        scores = evaluate_splits()
        on_best()
        record_evaluation(scores, config, args.output_dir)
        return weights, scores
    loader = finetune_loader(entries["train"], config, tokenizer, limit, args.seed, pin)
    return fit(model, loader, losses, config, args, device, "end", evaluate_splits, "val_acc", on_best)


def report(
    name: str,
    scores: dict,
    classes: tuple[str, ...],
    weights: str,
    entries: dict[str, Sequence[dict]],
    config: dict,
    output_dir: str,
) -> None:
    """The accuracies beside what the most frequent class would get, on the screen and in result/."""
    result = {"weights": weights, "classes": classes}
    log.info(f"{name}, weights: {weights}")
    for split in SPLITS:
        counts = torch.tensor(scores[f"{split}_confusion"])
        num_scored = int(counts.sum())
        left_out = len(entries[split]) - num_scored
        more = {
            name.removeprefix(f"{split}_"): value
            for name, value in scores.items()
            if name.startswith(f"{split}_") and not name.endswith(("_acc", "_confusion"))
        }
        result[split] = {
            "file": config[f"{split}_file"],
            "n": num_scored,
            "left_out": left_out,
            "acc": accuracy(counts),
            **more,
            "most_frequent_class": majority_accuracy(counts),
            "confusion": counts.tolist(),
        }
        shown = "".join(f"{name} {value:.2f}, " for name, value in more.items())
        log.info(
            f"{config[f'{split}_file']}: accuracy {accuracy(counts):.2f}, {shown}always the most frequent "
            f"class {majority_accuracy(counts):.2f}, n {num_scored}, left out {left_out}"
        )
        log.info(confusion_table(counts, classes))
    save_result(output_dir, name, result)


def main(args: argparse.Namespace, config: dict) -> dict:
    # start
    device = start(args, config)
    if args.dry_run:
        return dry_run(SIMLAVE.from_config, losses, config, args, device, "end")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    splits = SPLITS if args.evaluate else ("train", *SPLITS)
    entries = {split: read_ve(config[f"{split}_file"], config["image_root"]) for split in splits}

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLAVE.from_config(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    weights = starting_weights(model, config, "VE", args.checkpoint, args.resume, tokenizer)
    log.info(weights)
    model = model.to(device)

    # train, evaluate and save
    weights, scores = train_and_evaluate(
        model, entries, tokenizer, len(CLASSES), weights, config, args, device
    )

    # report
    report("ve", scores, CLASSES, weights, entries, config, args.output_dir)
    return scores


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/VE.yaml", "output/VE")
    main(*parse(parser, VE))


@torch.no_grad()
def evaluate_classes(
    model: nn.Module, loader: DataLoader, config: dict, device: torch.device, header: str
) -> Tensor:
    """Return the true and the predicted class of every entry that the ranks' loaders share, in order.

    (N, 2) on the CPU, the same on all ranks; VE and NLVR share it. Raises UserError for a score that is not
    finite.
    """
    model.eval()
    rows: list[tuple[int, int, int]] = []
    for batch in with_progress(stop_at_unreadable(loader), len(loader), header, config["log_steps"]):
        batch = to_device(batch, device)
        with autocast(device, config["precision"]):
            logits = model.predict(batch["image"], batch["text_ids"], batch["text_mask"])
        predicted = check_scores(logits, "scores of classes", config["precision"]).argmax(-1)
        columns = batch["index"], batch["label"], predicted
        rows += zip(*(column.tolist() for column in columns), strict=True)
    gathered = sorted(row for part in all_gather_objects(rows) for row in part)
    return torch.tensor(gathered)[:, 1:]


if __name__ == "__main__":
    run_script(parse_and_run)
