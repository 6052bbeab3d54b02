"""The list of answers that VQA ranks, from annotation files with answers.

python -m simla.dataset.prepare answers --train data/vqa_train.json --out data/answer_list.json
"""

import argparse
import json

from simla.dataset.readers.annotations import TEXTS, read_annotations
from simla.dataset.vqa import FIELDS, NUM_ANSWERS, covered_share, frequent_answers, given_answers
from simla.utils import UserError, atomic_write, fill_in


def main(arguments: list[str] | None = None) -> None:
    rule = " ".join(frequent_answers.__doc__.split("\n\n")[1].split())
    answers = argparse.ArgumentParser("python -m simla.dataset.prepare answers", description=rule)
    answers.add_argument(
        "--train", nargs="+", action="extend", required=True, help="VQA annotation files with answers"
    )
    answers.add_argument("--out", required=True, help="the JSON list")
    limit = answers.add_mutually_exclusive_group()
    limit.add_argument(
        "--num", type=int, default=NUM_ANSWERS, help="length of the list (default: %(default)s)"
    )
    limit.add_argument("--min_count", type=int, help="all answers counted so often, instead of --num")
    args = answers.parse_args(arguments)
    entries = read_annotations(args.train, {**FIELDS, "answer": TEXTS})
    annotations = list(map(given_answers, entries))
    by_count = args.min_count is not None
    listed = frequent_answers(annotations, None if by_count else args.num, args.min_count if by_count else 1)
    if not listed:
        raise UserError(f"no answer in {', '.join(args.train)} is counted {args.min_count} times")
    with atomic_write(fill_in(args.out), text=True) as file:
        json.dump(listed, file)
    share = covered_share(listed, annotations)
    print(
        f"{args.out}: {len(listed)} answers, the most common one of {share:.1%} of {len(entries)} questions"
    )
