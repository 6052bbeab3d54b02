"""Fine-tuning for visual question answering: the decoder writes an answer, or ranks a list of answers.

Data     JSON lists of {"dataset": "vqa" or "vg", "image": path, "question": text, "answer": [text, ...] or
         text} (`train_file`, `val_file`) and of {"dataset", "image", "question", "question_id": number or
         text}, with or without answers (`test_file`); a JSON list of texts (`answer_list`: python -m
         simla.dataset.prepare answers)
Command  torchrun --nproc_per_node=8 VQA.py \\
             --config configs/VQA.yaml --checkpoint output/Pretrain/checkpoint_29.pth
Expected the paper's VQA v2 test-dev / test-std 74.5 / 74.8, by the server, which takes
         result/vqa_result_epoch7.json (training on train, val and Visual Genome; ranked answers, k_test 128)
"""

if __name__ == "__main__":
    from simla.engine.command import prepare

    prepare()

import argparse

from torch import Tensor, nn

from simla.checkpoint.initial import starting_weights
from simla.configs.reader import parse
from simla.configs.schema import VQA
from simla.dataset.items import evaluation_batches, position_limit
from simla.dataset.text import build_tokenizer, check_vocabulary
from simla.dataset.vqa import AnswerList, VQAEvalData, answer_texts, eos_token, read_answer_list, vqa_loader
from simla.engine.dry_run import dry_run
from simla.engine.fit import fit
from simla.engine.launch import run_script, script_arguments, start
from simla.engine.results import forget_results, record_evaluation, save_result
from simla.engine.training import Training
from simla.evaluation.vqa import answer_scores, best_constant, mean_by_label
from simla.models.answer_tree import AnswerTree
from simla.models.vqa import SIMLAVQA, VQABatch
from simla.optim import create_optimizer
from simla.scheduler import create_scheduler
from simla.utils import UserError, all_gather_objects, autocast, check_scores, log


def losses(model: nn.Module, batch: dict, alpha: float) -> dict[str, Tensor]:
    """Return the answers' token cross-entropy, a sum over answers of any length, without a chance level."""
    questions = batch["image"], batch["text_ids"], batch["text_mask"]
    answers = (batch[name] for name in VQABatch._fields[len(questions) :])
    return model(VQABatch(*questions, *answers), alpha)


def answer(
    model: SIMLAVQA, data: VQAEvalData, candidates: AnswerList | None, tokenizer, config: dict, device
) -> list[dict]:
    """Return {"answers", "probabilities"} of every question, best first, on all ranks: ranked `candidates`,
    or generated ones where there are none. Raises UserError for a probability that is not finite.
    """
    model.eval()
    tree = None if candidates is None else AnswerTree.build(candidates.ids, candidates.mask).to(device)
    ends = tokenizer.cls_token_id, eos_token(tokenizer, config["eos"]), tokenizer.pad_token_id
    rows, top = [], config["num_top_answers"]
    for batch in evaluation_batches(data, config, tokenizer, device, "Questions"):
        questions = batch["image"], batch["text_ids"], batch["text_mask"]
        with autocast(device, config["precision"]):
            if tree is not None:
                numbers, probabilities = model.rank_answers(*questions, tree, config["k_test"])
                texts = [[candidates.texts[number] for number in row] for row in numbers[:, :top].tolist()]
            else:
                lengths = config["num_beams"], config["max_answer_tokens"]
                ids, scores = model.generate(*questions, *lengths, *ends)
                texts = answer_texts(tokenizer, ids[:, :top])
                probabilities = scores.exp()
        check_scores(probabilities, "probabilities of answers", config["precision"])
        rows += zip(batch["index"].tolist(), texts, probabilities[:, :top].tolist(), strict=True)
    gathered = sorted(row for share in all_gather_objects(rows) for row in share)
    return [{"answers": texts, "probabilities": shares} for _, texts, shares in gathered]


def evaluate(data: VQAEvalData, given: list[dict]) -> dict[str, float]:
    """Return the official accuracy of the first answers in percent: of all, and of each answer type."""
    scores = answer_scores([row["answers"][0] for row in given], data.annotations)
    by_type = mean_by_label(scores, data.labels("answer_type"))
    return {"accuracy": sum(scores) / len(scores)} | {f"accuracy_{k}": value for k, value in by_type.items()}


def report(
    data: VQAEvalData, given: list[dict], accuracy: dict, protocol: dict, name: str, output_dir: str
) -> None:
    """Write the answers as the server takes them, and the top ones; tell the accuracy where it is known."""
    rows = [{"question_id": e["question_id"], **row} for e, row in zip(data.questions, given, strict=True)]
    first = [{"question_id": row["question_id"], "answer": row["answers"][0]} for row in rows]
    save_result(output_dir, name, first)
    save_result(output_dir, "vqa_top_answers", rows)
    log.info("vqa: " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
    if not accuracy:
        forget_results(output_dir, "vqa_accuracy.json")
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
    run = start(args, config)
    if run.dry_run:
        return dry_run(SIMLAVQA.from_config, losses, config, run)

    # data
    tokenizer = build_tokenizer(config["text_encoder"])
    eos_token(tokenizer, config["eos"])
    test, val = VQAEvalData(config["test_file"], config, is_test=True), None
    if config["val_file"] and not run.evaluate:
        val = VQAEvalData(config["val_file"], config, is_test=False)
    loader = None if run.evaluate else vqa_loader(config, tokenizer, run.seed)

    # model
    model = SIMLAVQA.from_config(config)
    check_vocabulary(tokenizer, model.text_encoder.config.vocab_size)
    sources = {**config, "text_decoder": args.text_decoder}
    weights = starting_weights(model, sources, "VQA", run.checkpoint, run.resume, tokenizer)
    log.info(weights)
    model = model.to(run.device)
    candidates = None
    if args.inference == "rank":
        if not config["answer_list"]:
            raise UserError(f"config {args.config}: ranking needs answer_list; or use --inference generate")
        limit = position_limit(config)
        candidates = read_answer_list(config["answer_list"], tokenizer, config["eos"], limit)
        if config["k_test"] > len(candidates.texts):
            log.info(f"k_test {config['k_test']}: all {len(candidates.texts)} answers are re-scored")

    def evaluate_val(epoch: int) -> dict[str, float]:
        scores = evaluate(val, answer(model, val, candidates, tokenizer, config, run.device))
        return {f"val_{name}": value for name, value in scores.items()}

    epoch = 0
    if not run.evaluate:
        # optimiser and schedule
        optimizer = create_optimizer(model, config["optimizer"])
        schedule = create_scheduler(optimizer, config["schedular"], epoch_step="start")

        # resume
        training = Training(model, optimizer, schedule, loader, losses, config, run)
        if run.resume:
            training.resume(run.checkpoint)

        # train, evaluate and save
        weights, _ = fit(training, evaluate_val if val else None)
        epoch = training.epoch - 1

    given = answer(model, test, candidates, tokenizer, config, run.device)
    accuracy = evaluate(test, given) if test.annotations else {}
    record_evaluation({f"test_{name}": value for name, value in accuracy.items()}, config, run.output_dir)

    # report
    setting = "k_test" if candidates else "num_beams"
    protocol = {"test_file": config["test_file"], "weights": weights, "n": len(test)}
    protocol |= {"left_out": test.left_out, "inference": args.inference, setting: config[setting]}
    report(test, given, accuracy, protocol, f"vqa_result_epoch{epoch}", run.output_dir)
    return accuracy


def parse_and_run() -> None:
    parser = script_arguments(__doc__, "configs/VQA.yaml", "output/VQA")
    parser.add_argument(
        "--inference", default="rank", choices=("rank", "generate"), help="rank the answer list, or write"
    )
    main(*parse(parser, VQA))


if __name__ == "__main__":
    run_script(parse_and_run)
