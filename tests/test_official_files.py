"""Files in result/ as the official scripts read them, on excerpts of the official annotations.

The readers here do what the official ones do, written anew: nlvr2/eval/metrics.py of github.com/lil-lab/nlvr;
VQA.loadRes and VQAEval.evaluate of github.com/GT-Vision-Lab/VQA, on answers that its normalisation leaves as
they are; eccv_caption.Metrics is the package itself, in test_coco_captions.py.
"""

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import ROOT

import NLVR
import VQA
from simla.dataset.nlvr import CLASSES, read_nlvr
from simla.dataset.prepare.nlvr2 import sentences
from simla.dataset.vqa import VQAEvalData
from simla.evaluation.classification import consistency
from simla.evaluation.coco_captions import _package

EXCERPTS = ROOT / "tests" / "excerpts"


def official_nlvr2_metrics(predictions: Path, examples: Path) -> dict[str, float]:
    """A prediction for each example, compared without case; a sentence counts where all of its pairs do."""
    predicted = dict(line.strip().split(",") for line in predictions.read_text(encoding="utf-8").splitlines())
    labelled = [json.loads(line) for line in examples.read_text(encoding="utf-8").splitlines()]
    assert len(predicted) >= len(labelled), "Some predictions are missing!"
    right, sentences = 0, {}
    for example in labelled:
        split, images, _, sentence = example["identifier"].split("-")
        is_right = predicted[example["identifier"]].lower() == example["label"].lower()
        right += is_right
        sentences[split, images, sentence] = sentences.get((split, images, sentence), True) and is_right
    return {"precision": right / len(labelled), "consistency": sum(sentences.values()) / len(sentences)}


@pytest.mark.parametrize("wrong", [[], [0], [0, 1], [2, 5], list(range(8))])
def test_nlvr2_s_script_finds_our_numbers(tmp_path, wrong):
    examples = EXCERPTS / "nlvr2_dev.json"
    (tmp_path / "dev.json").write_text(json.dumps(list(sentences(examples))))
    items = read_nlvr(str(tmp_path / "dev.json"), "")
    predicted = [item["label"] ^ (i in wrong) for i, item in enumerate(items)]
    NLVR.report_predictions({"val": SimpleNamespace(entries=items)}, {"val": predicted}, {}, str(tmp_path))
    official = official_nlvr2_metrics(tmp_path / "result" / "nlvr_val_predictions.csv", examples)
    right = [item["label"] == number for item, number in zip(items, predicted, strict=True)]
    assert official["precision"] == sum(right) / 8 and set(CLASSES) == {"True", "False"}
    assert 100 * official["consistency"] == consistency([item["identifier"] for item in items], right)


def test_predictions_of_an_earlier_evaluation_do_not_stay(tmp_path):
    """Those of the test set stay, which this one writes anew; dev has no identifiers, so its file goes."""
    (tmp_path / "dev.json").write_text(json.dumps(list(sentences(EXCERPTS / "nlvr2_dev.json"))))
    items, config = read_nlvr(str(tmp_path / "dev.json"), ""), {"val_file": "dev.json"}
    data = {split: SimpleNamespace(entries=items) for split in ("val", "test")}
    files = [tmp_path / "result" / f"nlvr_{split}_predictions.csv" for split in data]
    NLVR.report_predictions(data, {"val": [0] * 8, "test": [0] * 8}, config, str(tmp_path))
    assert all(file.exists() for file in files)
    data["val"] = SimpleNamespace(entries=[{**item, "identifier": ""} for item in items])
    NLVR.report_predictions(data, {"val": [1] * 8, "test": [1] * 8}, config, str(tmp_path))
    assert not files[0].exists() and "True" in files[1].read_text() and "False" not in files[1].read_text()


def official_vqa_accuracy(result_file: Path, annotation_file: Path) -> dict:
    """A row for each question, and no other; min(1, others who agree / 3), averaged over the annotators."""
    rows = json.loads(result_file.read_bytes())
    annotations = {row["question_id"]: row for row in json.loads(annotation_file.read_bytes())["annotations"]}
    assert type(rows) is list, "results is not an array of objects"
    assert {row["question_id"] for row in rows} == set(annotations), "Results do not correspond"
    accuracies, by_type = [], defaultdict(list)
    for row in rows:
        annotation = annotations[row["question_id"]]
        answers = [given["answer"] for given in annotation["answers"]]
        scores = []
        for number in range(len(answers)):
            others = answers[:number] + answers[number + 1 :]
            scores.append(min(1, others.count(row["answer"]) / 3))
        accuracies.append(sum(scores) / len(scores))
        by_type[annotation["question_type"]].append(accuracies[-1])
    overall = 100 * sum(accuracies) / len(accuracies)
    return {"overall": overall, "types": {name: 100 * sum(v) / len(v) for name, v in by_type.items()}}


@pytest.mark.parametrize(
    "answers", [("tea", "blue"), ("brunch", "red"), ("lunch", "blue"), ("coffee", "green")]
)
def test_vqa_s_script_finds_our_numbers(tmp_path, answers):
    files = [
        EXCERPTS / f"v2_{name}.json"
        for name in ("mscoco_train2014_annotations", "OpenEnded_mscoco_train2014_questions")
    ]
    annotations, questions = (json.loads(file.read_bytes()) for file in files)
    asked = {row["question_id"]: row["question"] for row in questions["questions"]}
    entries = [
        {
            "dataset": "vqa",
            "image": "x.jpg",
            "question": asked[row["question_id"]],
            "answer": [given["answer"] for given in row["answers"]],
            **{key: row[key] for key in ("question_id", "question_type", "answer_type")},
        }
        for row in annotations["annotations"]
    ]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    config = {"vqa_root": "", "vg_root": "", "image_root": "", "image_res": 32, "skip_unreadable": False}
    data = VQAEvalData(str(tmp_path / "val.json"), config, is_test=True)
    given = [{"answers": [answer], "probabilities": [1.0]} for answer in answers]
    protocol = {"test_file": "val.json"}
    VQA.report(data, given, VQA.evaluate(data, given), protocol, "vqa_result_epoch7", str(tmp_path))
    official = official_vqa_accuracy(tmp_path / "result" / "vqa_result_epoch7.json", files[0])
    ours = json.loads((tmp_path / "result" / "vqa_accuracy.json").read_bytes())
    assert ours["accuracy"] == pytest.approx(official["overall"])
    assert ours["by_question_type"] == pytest.approx(official["types"])


def test_coco_s_numbers_of_captions_are_the_package_s():
    """Those of annotations in cocodataset.org's files: of three images one is in Karpathy's test split."""
    excerpt = json.loads((EXCERPTS / "captions_val2017.json").read_bytes())
    known = _package().coco_gts["i2t"]
    (image,) = [row["id"] for row in excerpt["images"] if row["id"] in known]
    assert {row["id"] for row in excerpt["annotations"] if row["image_id"] == image} == set(known[image])
