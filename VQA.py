"""Fine-tuning for visual question answering: the decoder writes an answer, or ranks a list of answers.

Data     JSON lists of {"dataset": "vqa" or "vg", "image": path, "question": text, "answer": [text, ...] or
         text} (`train_file`, `val_file`) and of {"dataset", "image", "question", "question_id": number or
         text}, with or without answers (`test_file`); a JSON list of texts (`answer_list`: python -m
         dataset.vqa answers)
Command  torchrun --nproc_per_node=8 VQA.py \\
             --config configs/VQA.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's VQA v2 test-dev / test-std 74.5 / 74.8, by the server, which takes
         result/vqa_result_epoch7.json (training on train, val and Visual Genome; ranked answers, k_test 128)
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse

import torch
from torch import Tensor, nn

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import parse
from simla.configs.schema import VQA
from simla.dataset.items import Collate
from simla.dataset.loaders import stop_at_unreadable, test_loader, to_device
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.dataset.vqa import AnswerList, VQAEvalData, eos_token, read_answer_list, vqa_loader
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import record_evaluation, save_result
from simla.evaluation.vqa import answer_scores, best_constant, mean_by_label
from simla.models.answer_tree import AnswerTree
from simla.models.vqa import SIMLAVQA, VQABatch
from simla.utils import UserError, all_gather_objects, autocast, check_scores, log, with_progress


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """The answers' token cross-entropy."""
    questions = batch["image"], batch["text_ids"], batch["text_mask"]
    answers = (batch[name] for name in VQABatch._fields[len(questions) :])
    return model(VQABatch(*questions, *answers), alpha)


def answer(
    model: SIMLAVQA, data: VQAEvalData, candidates: AnswerList | None, tokenizer, config: dict, device
) -> list[dict]:
    """{"answers", "probabilities"} of every question, best first, equal on all ranks: ranked `candidates`, or
    generated ones where there are none. Raises UserError for a probability that is not finite."""
    model.eval()
    limit = model.text_encoder.config.max_position_embeddings
    collate, pin = Collate(tokenizer, limit), device.type == "cuda"
    loader = test_loader(data, config["batch_size_test"], config, collate, pin)
    tree = None if candidates is None else AnswerTree.build(candidates.ids, candidates.mask).to(device)
    own, top = [], config["num_top_answers"]
    for batch in with_progress(stop_at_unreadable(loader), len(loader), "Questions", config["log_steps"]):
        batch = to_device(batch, device)
        questions = batch["image"], batch["text_ids"], batch["text_mask"]
        with autocast(device, config["precision"]):
            if tree is not None:
                numbers, probabilities = model.rank_answers(*questions, tree, config["k_test"])
                texts = [[candidates.texts[number] for number in row] for row in numbers[:, :top].tolist()]
            else:
                ends = tokenizer.cls_token_id, eos_token(tokenizer, config["eos"]), tokenizer.pad_token_id
                ids, scores = model.generate(
                    *questions, config["num_beams"], config["max_answer_tokens"], *ends
                )
                texts = [tokenizer.batch_decode(row, skip_special_tokens=True) for row in ids[:, :top]]
                probabilities = scores.exp()
        check_scores(probabilities, "probabilities of answers", config["precision"])
        own += zip(batch["index"].tolist(), texts, probabilities[:, :top].tolist(), strict=True)
    gathered = sorted(row for rows in all_gather_objects(own) for row in rows)
    return [{"answers": texts, "probabilities": shares} for _, texts, shares in gathered]


def evaluate(data: VQAEvalData, given: list[dict]) -> dict[str, float]:
    """The official accuracy of the first answers in percent: of all, and of each answer type."""
    scores = answer_scores([row["answers"][0] for row in given], data.annotations)
    by_type = mean_by_label(scores, data.labels("answer_type"))
    return {"accuracy": sum(scores) / len(scores)} | {f"accuracy_{k}": value for k, value in by_type.items()}


def report(data: VQAEvalData, given: list[dict], accuracy: dict, protocol: dict, name: str, output_dir: str):
    """The answers as the server takes them, the top answers, and the accuracy where it can be known."""
    rows = [{"question_id": e["question_id"], **row} for e, row in zip(data.questions, given, strict=True)]
    first = [{"question_id": row["question_id"], "answer": row["answers"][0]} for row in rows]
    save_result(output_dir, name, first)
    save_result(output_dir, "vqa_top_answers", rows)
    log.info("vqa: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    if not accuracy:
        log.info(f"without answers in test_file only the server can score result/{name}.json")
        return
    constant, score = best_constant(data.annotations)
    for label, value in accuracy.items():
        log.info(f"{label:24} {value:6.2f}")
    log.info(f"always {constant!r:17} {score:6.2f}")
    scores = answer_scores([row["answer"] for row in first], data.annotations)
    by_question_type = mean_by_label(scores, data.labels("question_type"))
    details = {"by_question_type": by_question_type, "best_constant": {"answer": constant, "accuracy": score}}
    save_result(output_dir, "vqa_accuracy", {**protocol, **accuracy, **details})


def main(args: argparse.Namespace, config: dict) -> dict[str, float]:
    # start
    device = start(args, config)
    if args.dry_run:
        return dry_run(SIMLAVQA.from_config, losses, config, args, device, "start")

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    eos_token(tokenizer, config["eos"])
    test = VQAEvalData(config["test_file"], config, is_test=True)
    val = None
    if config["val_file"] and not args.evaluate:
        val = VQAEvalData(config["val_file"], config, is_test=False)

    # model
    torch.manual_seed(args.seed)  # the same weights on every rank, also where no checkpoint fills them
    model = SIMLAVQA.from_config(config)
    limit = model.text_encoder.config.max_position_embeddings
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    sources = {**config, "text_decoder": args.text_decoder}
    weights = starting_weights(model, sources, "VQA", args.checkpoint, args.resume, tokenizer)
    log.info(weights)
    model = model.to(device)
    candidates = None
    if args.inference == "rank":
        if not config["answer_list"]:
            raise UserError(f"config {args.config}: ranking needs answer_list; or use --inference generate")
        candidates = read_answer_list(config["answer_list"], tokenizer, config["eos"], limit)
        if config["k_test"] > len(candidates.texts):
            log.info(f"k_test {config['k_test']}: all {len(candidates.texts)} answers are re-scored")

    def evaluate_val(epoch: int) -> dict[str, float]:
        scores = evaluate(val, answer(model, val, candidates, tokenizer, config, device))
        return {f"val_{name}": value for name, value in scores.items()}

    # train, evaluate and save
    epoch = 0
    if not args.evaluate:
        loader = vqa_loader(config, tokenizer, limit, args.seed, device.type == "cuda")
        weights, _ = fit(model, loader, losses, config, args, device, "start", evaluate_val if val else None)
        epoch = config["schedular"]["epochs"] - 1
    given = answer(model, test, candidates, tokenizer, config, device)
    accuracy = evaluate(test, given) if test.annotations else {}
    record_evaluation({f"test_{name}": value for name, value in accuracy.items()}, config, args.output_dir)

    # report
    setting = "k_test" if candidates else "num_beams"
    protocol = {"test_file": config["test_file"], "weights": weights, "n": len(test)}
    protocol |= {"left_out": test.left_out, "inference": args.inference, setting: config[setting]}
    report(test, given, accuracy, protocol, f"vqa_result_epoch{epoch}", args.output_dir)
    return accuracy


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/VQA.yaml", "output/VQA")
    parser.add_argument(
        "--inference", default="rank", choices=("rank", "generate"), help="rank the answer list, or write"
    )
    main(*parse(parser, VQA))


if __name__ == "__main__":
    run_script(parse_and_run)
