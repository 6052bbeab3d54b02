"""The official VQA accuracy: its normalisation by example, its score against leaving each annotator out."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simla.dataset.prepare.answers import frequent_answers
from simla.evaluation.vqa import (
    CONTRACTIONS,
    answer_scores,
    best_constant,
    mean_by_label,
    most_common_answer,
    normalize_answer,
)

quickly = settings(deadline=None, max_examples=150)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # case, spaces, articles
        ("Yes", "yes"),
        ("  a  red\tball\n", "red ball"),
        ("The Dog", "dog"),
        ("an apple on the table", "apple on table"),
        ("the", ""),
        ("", ""),
        ("another", "another"),
        # number words
        ("none", "0"),
        ("zero", "0"),
        ("one", "1"),
        ("two dogs", "2 dogs"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("someone", "someone"),
        # contractions
        ("dont", "don't"),
        ("isnt", "isn't"),
        ("wouldn'tve", "wouldn't've"),
        ("wouldnt've", "wouldn't've"),
        ("yalld've", "yalld've"),
        ("y'alld've", "y'all'd've"),
        ("oclock", "o'clock"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),  # the official list has this one the wrong way round
        ("its", "its"),
        ("Im", "im"),  # the official key is capitalised, and words are lowered before
        ("shes", "shes"),
        ("lets", "lets"),
        ("can't", "can't"),
        # punctuation
        ("yes!", "yes"),
        ("yes, please", "yes please"),
        ("left/right", "left right"),
        ("left / right", "left right"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # one hyphen beside a space: all go
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: all punctuation goes
        ('"stop"', "stop"),
        ("(blue)", "blue"),
        ("what?", "what"),
        ("12:30", "12:30"),
        ("#1", "#1"),
        ("$5", "$5"),
        ("50%", "50%"),
        # periods
        ("dr. smith", "dr smith"),
        ("u.s.", "us"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (".5", ".5"),
        ("v.2", "v.2"),
        # together
        ("The  two dogs, dont!", "2 dogs don't"),
        ("a.m.", "am"),
    ],
)
def test_normalisation(answer, expected):
    assert normalize_answer(answer) == expected


@given(st.text("aA tThe1,.0-/'?\n dnot", max_size=20))
@quickly
def test_normal_answers_are_single_spaced_lower_case_without_marks(answer):
    result = normalize_answer(answer)
    assert result == result.lower() == " ".join(result.split())
    assert not re.search(r"[,?/\-]|\.(?!\d)", result)
    assert not {"a", "an", "the", "two"} & set(result.split())


def test_the_list_of_contractions_is_the_official_one_s():
    """120 entries there, less four with a capital I and two that name themselves (let's, she's)."""
    assert len(CONTRACTIONS) == 114
    for key, form in CONTRACTIONS.items():
        assert key == form.replace("'", "") or key.replace("'", "") == form.replace("'", "")
        assert form.count("'") == key.count("'") + (1 if key != "somebody'd" else -1)
    for key in (
        "aint",
        "hed've",
        "itd",
        "'ow'sat",
        "'ows'at",
        "ow's'at",
        "yall",
        "yall'll",
        "notve",
        "youve",
    ):
        assert key in CONTRACTIONS


# ---- the score ----


def slow_score(prediction: str, answers: list[str]) -> float:
    """As the official script counts: leave each annotator out in turn."""
    total = 0.0
    for left_out in range(len(answers)):
        others = [answer for i, answer in enumerate(answers) if i != left_out]
        if not others:
            return 100.0 * (answers[0] == prediction)
        matching = sum(answer == prediction for answer in others)
        total += min(1.0, matching / min(3, len(others)))
    return 100.0 * total / len(answers)


words = st.sampled_from(["yes", "no", "2", "red"])


@given(words, st.lists(words, min_size=1, max_size=10))
@quickly
def test_score_is_leaving_each_annotator_out(prediction, answers):
    assert answer_scores([prediction], [answers]) == pytest.approx([slow_score(prediction, answers)])


def test_scores_of_ten_annotators():
    for matches, expected in ((0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)):
        answers = ["yes"] * matches + [f"word{i}" for i in range(10 - matches)]
        assert answer_scores(["yes" if matches == 10 else "Yes!"], [answers]) == pytest.approx([expected])


def test_nothing_is_normalised_where_all_annotators_agree_to_the_letter():
    assert answer_scores(["Two.", "two "], [["two"] * 10] * 2) == [0.0, 100.0]
    assert answer_scores(["2", "Two."], [["two"] * 9 + ["2"]] * 2) == [100.0, 100.0]
    assert answer_scores(["t shirt", "t-shirt"], [["t-shirt"] * 10] * 2) == [0.0, 100.0]
    assert best_constant([["t-shirt"] * 10, ["t-shirt"] * 10]) == ("t-shirt", 100.0)


def test_the_best_constant_is_best_among_all_answers_given():
    answers = [["Yes"] * 10, ["Yes"] * 9 + ["No"]], [["two"] * 10, ["2"] * 9 + ["no"], ["red"] * 10]
    assert best_constant(answers[0]) == ("Yes", 100.0)
    assert best_constant(answers[1]) == ("two", pytest.approx(200 / 3))
    for annotations in answers:
        constant, score = best_constant(annotations)
        scores = answer_scores([constant] * len(annotations), annotations)
        assert score == pytest.approx(sum(scores) / len(scores))


def official_score(prediction: str, answers: list[str]) -> float:
    """min(1, matches among the others / 3), averaged over the annotator left out, however many there are."""
    num_matching = [
        sum(answer == prediction for i, answer in enumerate(answers) if i != left_out)
        for left_out in range(len(answers))
    ]
    return 100.0 * sum(min(1.0, matching / 3) for matching in num_matching) / len(answers)


def test_from_four_annotators_on_the_score_is_the_official_one():
    for num in range(4, 11):
        for matches in range(num + 1):
            answers = ["cat"] * matches + ["dog"] * (num - matches)
            expected = official_score("cat", answers)
            assert answer_scores(["cat"], [answers]) == pytest.approx([expected]), (num, matches)


def test_below_four_annotators_all_the_others_have_to_match():
    """As README says; officially nobody could reach 100."""
    three = [["dog"] * 3, ["cat", "dog", "dog"], ["cat", "cat", "dog"], ["cat"] * 3]
    assert answer_scores(["cat"] * 4, three) == pytest.approx([0, 100 / 3, 200 / 3, 100])
    assert answer_scores(["cat"] * 3, [["dog"] * 2, ["cat", "dog"], ["cat"] * 2]) == [0, 50, 100]
    assert answer_scores(["cat", "cow", "Cat"], [["cat"]] * 3) == [100, 0, 0]
    assert official_score("cat", ["cat"] * 3) == pytest.approx(200 / 3)
    assert [official_score("cat", ["cat"] * num) for num in (2, 1)] == [pytest.approx(100 / 3), 0]


@given(st.lists(st.tuples(words, st.sampled_from(["x", "y", None])), min_size=1, max_size=20), st.randoms())
@quickly
def test_means_of_groups_do_not_depend_on_the_order(rows, rng):
    shuffled = rng.sample(rows, len(rows))
    means = []
    for part in (rows, shuffled):
        scores = answer_scores([word for word, _ in part], [["yes"] * 4] * len(part))
        means.append(mean_by_label(scores, [label for _, label in part]))
    assert means[0] == pytest.approx(means[1]) and list(means[0]) == sorted(means[0])
    for label in {label for _, label in rows} - {None}:
        own = [word for word, other in rows if other == label]
        assert means[0][label] == pytest.approx(100 * own.count("yes") / len(own))
    assert None not in means[0]


@given(st.lists(st.lists(words, min_size=1, max_size=10), min_size=1, max_size=8))
@quickly
def test_no_constant_answer_beats_the_best(annotations):
    constant, score = best_constant(annotations)
    of_all = {}
    for word in {word for answers in annotations for word in answers}:
        scores = answer_scores([word] * len(annotations), annotations)
        of_all[word] = sum(scores) / len(scores)
    assert score == pytest.approx(of_all[constant]) and score == pytest.approx(max(of_all.values()))


# ---- the answer list ----


@given(st.lists(st.lists(words, min_size=1, max_size=5), max_size=12), st.integers(0, 5), st.integers(1, 4))
@quickly
def test_answer_list_is_sorted_by_count_then_first_appearance(annotations, num, min_count):
    majority = [
        max(answers, key=lambda a, own=answers: (own.count(a), -own.index(a))) for answers in annotations
    ]
    distinct = list(dict.fromkeys(majority))
    ranked = sorted(distinct, key=lambda answer: -majority.count(answer))
    expected = [answer for answer in ranked if majority.count(answer) >= min_count]
    assert frequent_answers(annotations, None, min_count) == expected
    assert frequent_answers(annotations, num) == ranked[:num]


def test_answer_list_joins_what_normalises_alike_and_leaves_nothing_empty():
    """And spells it as most annotators do, since where all of them agree only their spelling scores."""
    annotations = [["A dog"], ["dog", "dog", "cat"], ["two"], ["2"], ["2"], ["the"], ["t-shirt"]]
    assert frequent_answers(annotations) == ["2", "dog", "t-shirt"]
    assert most_common_answer(["b", "A cat", "cat", "b"]) == "b"
