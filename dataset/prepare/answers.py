"""The list of answers that VQA ranks, from annotation files with answers.

python -m simla.dataset.prepare answers --train data/vqa_train.json --out data/answer_list.json
"""

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from simla.dataset.readers.annotations import TEXTS, read_annotations
from simla.evaluation.vqa import most_common_answer, normalize_answer
from simla.utils import UserError, atomic_write, fill_in

NUM_ANSWERS = 3128  # the length of the published list


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
    from simla.dataset.vqa import FIELDS, given_answers  # here, because torch comes with it

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


def frequent_answers(
    annotations: Iterable[Sequence[str]], num: int | None = None, min_count: int = 1
) -> list[str]:
    """Return the `num` most frequent answers among those counted `min_count` times, most frequent first.

    A question counts for one answer: the one that most of its annotators gave, normalised as for the official
    accuracy (of equally many the first). Of equally frequent answers the one that appears first stands first;
    answers with nothing left after normalisation are left out. Listed is how an answer is mostly spelled.
    """
    counts, spellings = Counter(), defaultdict(Counter)
    for answers in annotations:
        answer = most_common_answer(answers)
        counts[answer] += 1
        spellings[answer].update(a.strip() for a in answers if normalize_answer(a) == answer)
    kept = [answer for answer, count in counts.most_common() if answer and count >= min_count][:num]
    return [spellings[answer].most_common(1)[0][0] for answer in kept]


def covered_share(listed: Iterable[str], annotations: Sequence[Sequence[str]]) -> float:
    """Return the share, 0 to 1, of the questions whose most common answer is in the list."""
    known = set(map(normalize_answer, listed))
    return sum(most_common_answer(given) in known for given in annotations) / len(annotations)
