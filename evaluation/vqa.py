"""The official accuracy of VQA v2 as pure functions: an answer is right as far as annotators gave it, too.

An answer scores min(1, matches among the other annotators / 3), averaged over the annotator left out (ten of
them in VQA v2). Prediction and answers are normalised first, unless all annotators agree to the letter: then,
as in the official script, the prediction has to as well.

From four annotators on this is the official script's formula, to the number. Below four it would let nobody
reach 100, since there are no three others; so here all the others have to match: of three annotators min(1,
matches among the other two / 2), of two matches with the other one, each averaged over the annotator left
out. A single annotator leaves no others: a prediction that equals the answer to the letter scores 100, any
other 0 (the official script: always 0).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import cache

MATCHES_FOR_FULL_SCORE = 3
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBER_WORDS)}}
ARTICLES = {"a", "an", "the"}
CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
    they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
    when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# A form that lacks one of its apostrophes gets it back. The official list knows neither it's nor we'd, its
# keys with a capital I (Im, Ive) never match a lowered word, and it takes away the apostrophe of somebody'd.
CONTRACTIONS = {
    form[:i] + form[i + 1 :]: form for form in CONTRACTED.split() for i, c in enumerate(form) if c == "'"
}
CONTRACTIONS["somebody'd"] = "somebodyd"


@cache  # the same few answers come again and again
def normalize_answer(answer: str) -> str:
    """Return the answer in lower case, with no punctuation, no articles, digits for number words,
    contractions with their apostrophes.

    A punctuation mark vanishes where one like it stands beside a space, or where the answer has a comma
    between digits; else it becomes a space. Periods vanish unless a digit follows.
    """
    answer = _plain(answer)
    grouped = re.search(r"\d,\d", answer) is not None
    text = answer
    for mark in PUNCTUATION:
        vanishes = grouped or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if vanishes else " ")
    words = re.sub(r"\.(?!\d)", "", text).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _plain(answer: str) -> str:
    return re.sub(r"[\n\t]", " ", answer).strip()


def _rule(answers: Sequence[str]) -> Callable[[str], str]:
    """Return the function that makes these annotators' answers and a prediction comparable."""
    return normalize_answer if len(set(map(_plain, answers))) > 1 else _plain


def most_common_answer(answers: Sequence[str]) -> str:
    """Return the most common answer, normalised; of equally many the first."""
    return Counter(map(normalize_answer, answers)).most_common(1)[0][0]


def answer_scores(predictions: Sequence[str], annotations: Sequence[Sequence[str]]) -> list[float]:
    """Return the accuracy of each prediction in percent; annotations: all answers to each question."""
    scores = []
    for prediction, answers in zip(predictions, annotations, strict=True):
        normalise = _rule(answers)
        matches = list(map(normalise, answers)).count(normalise(prediction))
        scores.append(_score(matches, len(answers)))
    return scores


def mean_by_label(scores: Sequence[float], labels: Sequence[str | None]) -> dict[str, float]:
    """Return the mean score of each label, in order of the labels; rows without one (None) are left out."""
    groups = defaultdict(list)
    for score, label in zip(scores, labels, strict=True):
        groups[label].append(score)
    groups.pop(None, None)
    return {label: sum(groups[label]) / len(groups[label]) for label in sorted(groups)}


def best_constant(annotations: Sequence[Sequence[str]]) -> tuple[str, float]:
    """Return the answer that would score most if given to every question, and that score in percent."""
    # An answer scores by its letters where all annotators agree, elsewhere by its normal form.
    totals: dict[Callable, Counter[str]] = {_plain: Counter(), normalize_answer: Counter()}
    for answers in annotations:
        rule = _rule(answers)
        for answer, matches in Counter(map(rule, answers)).items():
            totals[rule][answer] += _score(matches, len(answers))
    given = dict.fromkeys(_plain(answer) for answers in annotations for answer in answers)
    scores = {
        answer: totals[_plain][answer] + totals[normalize_answer][normalize_answer(answer)]
        for answer in [*totals[normalize_answer], *given]
    }
    answer = max(scores, key=scores.__getitem__)
    return answer, scores[answer] / len(annotations)


def _score(matches: int, num_annotators: int) -> float:
    """Return the score in percent, by the rule at the head of this file."""
    needed = min(MATCHES_FOR_FULL_SCORE, num_annotators - 1)
    if needed == 0:
        return 100.0 * matches
    a_match_left_out = matches * min(1.0, (matches - 1) / needed)
    another_left_out = (num_annotators - matches) * min(1.0, matches / needed)
    return 100.0 * (a_match_left_out + another_left_out) / num_annotators
