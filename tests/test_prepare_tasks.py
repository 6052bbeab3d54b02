"""Official downloads of RefCOCO, VQA v2, NLVR2 and SNLI-VE, made small: what they become, by the configs'
names, as the tasks' own loaders read it; and what is said of damaged, missing and odd parts.

The layouts: references and instances.json as refer.py of github.com/lichengunc/refer reads them, the lines of
SNLI-VE as vet/tools/snli_ve_parser.py of github.com/necla-ml/SNLI-VE does; of VQA and NLVR2 real excerpts are
read, too.
"""

import json
import pickle
import shutil
import zlib
from pathlib import Path

import pytest
from PIL import Image

from simla.configs.reader import read_config
from simla.configs.schema import GROUNDING, NLVR, VE, VQA
from simla.dataset.grounding import GroundingEvalData
from simla.dataset.nlvr import official_identifiers, read_nlvr
from simla.dataset.prepare.__main__ import main
from simla.dataset.prepare.nlvr2 import sentences
from simla.dataset.prepare.vqa import vqa_entries
from simla.dataset.readers.annotations import TEXT, read_annotations
from simla.dataset.ve import read_ve
from simla.dataset.vqa import VQAEvalData, given_answers, read_questions
from simla.evaluation.classification import consistency
from simla.utils import UserError

CONFIGS = Path(__file__).parent.parent / "configs"
EXCERPTS = Path(__file__).parent / "excerpts"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty folder where the configs look for their data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, entries: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")


def draw(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), "teal").save(path)


def prepare(name: str, data: Path, capsys, *flags: str) -> str:
    """What is printed, spaces made one."""
    main([name, "--root", str(data), "--out", str(data), *flags])
    return " ".join(capsys.readouterr().out.split())


def fails(name: str, data: Path, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        main([name, "--root", str(data), "--out", str(data), *flags])
    assert "\n" not in str(error.value)
    return str(error.value)


def config_of(name: str, table: dict) -> dict:
    return read_config(str(CONFIGS / f"{name}.yaml"), table, ["image_res=32"])


def content(path: Path) -> list | dict:
    return json.loads(path.read_text(encoding="utf-8"))


def shown(data, index: int = 0) -> tuple:
    """Shape of an evaluation entry's images."""
    return tuple(data[index]["images"].shape)


# ---- RefCOCO, RefCOCO+, RefCOCOg ----


def coco_name(number: int, folder: str = "train2014") -> str:
    return f"COCO_{folder}_{number:012d}.jpg"


def ref(ref_id: int, split: str, image_id: int, ann_id: int, *texts: str) -> dict:
    """As the pickles have it: the file's name is with the object's number, the sentence in two forms."""
    first = 10 * ref_id
    sentences = [
        {"tokens": text.split(), "raw": text.capitalize(), "sent_id": first + place, "sent": text}
        for place, text in enumerate(texts)
    ]
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": f"COCO_train2014_{image_id:012d}_{ann_id}.jpg",
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "category_id": 18,
    }


def refs_of(splits: tuple[str, ...]) -> list[dict]:
    """Three references of training in two images, then one of each other split in an image of its own."""
    return [
        ref(0, "train", 1, 100, "left dog", "the dog that sits"),
        ref(1, "train", 1, 101, "right dog"),
        ref(2, "train", 2, 102, "a red boat"),
        *(ref(3 + i, split, 3 + i, 103 + i, f"thing of {split}") for i, split in enumerate(splits)),
    ]


def make_refcoco(data: Path, name: str, file: str, refs: list[dict]) -> None:
    images = [{"id": i, "file_name": coco_name(i), "height": 60, "width": 80} for i in range(1, 8)]
    places = [(100, 1), (101, 1), *((99 + i, i - 1) for i in range(3, 9))]
    annotations = [
        {"id": id, "image_id": image, "category_id": 18, "bbox": [1.5, 2, 30, 20], "area": 600, "iscrowd": 0}
        for id, image in places
    ]
    write(data / name / "instances.json", {"images": images, "annotations": annotations, "categories": []})
    (data / name / file).write_bytes(pickle.dumps(refs, protocol=0))
    for image in images:
        draw(data / "coco/images/train2014" / image["file_name"])


def test_refcoco_plus_as_its_config_reads_it(data, capsys):
    make_refcoco(data, "refcoco+", "refs(unc).p", refs_of(("val", "testA", "testB")))
    detections = [
        {"image_id": 3, "category_id": 18, "bbox": [1, 2, 30, 20], "score": 0.9},
        {"image_id": 3, "category_id": 1, "bbox": [5, 5, 10, 10], "score": 0.4},
        {"image_id": 5, "category_id": 1, "bbox": [0.5, 5, 10, 10], "score": 0.7},
        {"image_id": 5, "category_id": 1, "bbox": [0.5, 5, 0, 10], "score": 0.7},
        {"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1},
    ]
    write(data / "refcoco+/detections.json", detections)
    printed = prepare("refcoco+", data, capsys)

    assert content(data / "refcoco+_train.json") == [
        {"image": f"train2014/{coco_name(1)}", "text": "left dog"},
        {"image": f"train2014/{coco_name(1)}", "text": "the dog that sits"},
        {"image": f"train2014/{coco_name(1)}", "text": "right dog"},
        {"image": f"train2014/{coco_name(2)}", "text": "a red boat"},
    ]
    test = [
        {"image": f"train2014/{coco_name(3 + i)}", "text": f"thing of {split}", "ref_id": 3 + i}
        for i, split in enumerate(("val", "testA", "testB"))
    ]
    assert content(data / "refcoco+_test.json") == test
    assert content(data / "refcoco+_val.json") == test[:1]
    assert content(data / "refcoco+/dets.json") == {
        "3": [[1, 2, 30, 20, 0.9], [5, 5, 10, 10, 0.4]],
        "4": [],
        "5": [[0.5, 5, 10, 10, 0.7]],
    }
    assert content(data / "refcoco+/cocos.json") == {str(i): [[1.5, 2, 30, 20]] for i in (3, 4, 5)}
    assert "expressions, train 4 120,191 differs by -120,187" in printed
    assert "references (objects) 6 49,856" in printed and "images 5 19,992" in printed
    assert "images without a detection 1" in printed
    assert "1 detections in images that are not evaluated; first: image 1" in printed
    assert "1 detections without an area; first:" in printed

    config = config_of("Grounding", GROUNDING)
    evaluated = GroundingEvalData(config)
    assert shown(evaluated) == (1, 3, 32, 32)
    assert [(t.ref_id, t.split, t.box, (t.height, t.width)) for t in evaluated.targets] == [
        (3 + i, split, [1.5, 2, 30, 20], (60, 80)) for i, split in enumerate(("val", "testA", "testB"))
    ]
    assert [len(target.candidates) for target in evaluated.targets] == [2, 0, 1]
    train = read_annotations(config["train_file"], {"image": TEXT, "text": TEXT}, config["image_root"])
    assert all(Path(image).is_file() for entry in train for image in entry["images"])


def test_another_out_folder_gets_all_that_grounding_reads(data, capsys):
    make_refcoco(data, "refcoco+", "refs(unc).p", refs_of(("val", "testA", "testB")))
    out = data / "made/here"
    for _ in range(2):  # a second run writes the same
        main(["refcoco+", "--root", str(data), "--out", str(out)])
        assert "dets.json is not written" in capsys.readouterr().out
        for name in ("refs(unc).p", "instances.json"):
            assert (out / "refcoco+" / name).read_bytes() == (data / "refcoco+" / name).read_bytes()
        made = {"test_file": str(out / "refcoco+_test.json"), "refcoco_data": str(out), "det_file": ""}
        assert len(GroundingEvalData({**config_of("Grounding", GROUNDING), **made})) == 3


def test_refcoco_and_both_divisions_of_refcocog(data, capsys):
    make_refcoco(data, "refcoco", "refs(unc).p", refs_of(("val", "testA", "testB")))
    make_refcoco(data, "refcocog", "refs(google).p", refs_of(("val",)))
    assert "expressions, testB 1 5,095" in prepare("refcoco", data, capsys)
    assert len(content(data / "refcoco_test.json")) == 3
    assert "expressions, val 1 9,536" in prepare("refcocog", data, capsys)
    assert content(data / "refcocog_test.json") == content(data / "refcocog_val.json")
    make_refcoco(data, "refcocog", "refs(umd).p", refs_of(("val", "test")))
    assert "expressions, test 1 9,602" in prepare("refcocog", data, capsys)
    assert [entry["ref_id"] for entry in content(data / "refcocog_test.json")] == [3, 4]
    assert {entry["dataset"] for entry in content(data / "refcocog_test.json")} == {"refcocog"}
    assert "expressions, val 1 9,536" in prepare("refcocog", data, capsys, "--division", "google")
    assert {entry["dataset"] for entry in content(data / "refcocog_google_test.json")} == {"refcocog_google"}
    assert len(content(data / "refcocog_test.json")) == 2  # umd's stays
    assert list(content(data / "refcocog_google" / "cocos.json")) == ["3"]
    assert "--division is for refcocog alone" in fails("refcoco", data, "--division", "umd")
    config = config_of("Grounding", GROUNDING) | {"refcoco_data": str(data), "det_file": ""}
    config["test_file"] = [
        str(data / f"{name}_test.json") for name in ("refcoco", "refcocog", "refcocog_google")
    ]
    targets = GroundingEvalData(config | {"image_root": str(data / "coco/images")}).targets
    assert [target.score_name for target in targets] == [
        *(f"refcoco_{split}_h" for split in ("val", "testA", "testB")),
        *("refcocog_val_h", "refcocog_test_h", "refcocog_google_val_h"),
    ]


def test_what_refcoco_leaves_out(data, capsys):
    refs = refs_of(("val", "testA", "testB"))
    refs[2]["sentences"][0]["sent"] = " ... "
    refs.append(ref(9, "testC", 3, 100, "a cat"))
    make_refcoco(data, "refcoco+", "refs(unc).p", refs)
    (data / "coco/images/train2014" / coco_name(4)).unlink()
    (data / "coco/images/train2014" / coco_name(5)).write_bytes(b"")
    printed = prepare("refcoco+", data, capsys)
    assert "1 expressions without a word; first: ref_id 2" in printed
    assert "1 expressions of a split 'testC'; first: ref_id 9" in printed
    assert f"1 entries whose image is not in {data}/coco/images/train2014; first: {coco_name(4)}" in printed
    assert f"1 entries whose image is an empty file; first: {coco_name(5)}" in printed
    assert len(content(data / "refcoco+_train.json")) == 3
    assert len(content(data / "refcoco+_test.json")) == 1


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: (folder / "refs(unc).p").unlink(), "references (looked for refcoco+/refs(unc).p)"),
        (lambda folder: damage(folder / "refs(unc).p"), "refs(unc).p is not a complete pickle"),
        (lambda folder: damage(folder / "instances.json"), "instances.json cannot be read"),
        (lambda folder: write(folder / "instances.json", {"images": []}), "'annotations' must be a list"),
        (
            lambda folder: write(folder / "instances.json", {"images": [], "annotations": []}),
            "ref_id 0: image_id 1 is not in",
        ),
        (
            lambda folder: write(
                folder / "detections.json", [{"image_id": 9, "bbox": [0, 0, 1, 1], "score": 1}]
            ),
            "has no box in any of the 3 images",
        ),
        (
            lambda folder: write(folder / "detections.json", [{"image_id": 3, "bbox": [0, 0, 1, 1]}]),
            "entry 0: 'score' must be a number",
        ),
    ],
)
def test_damaged_refcoco_files_are_named(data, change, expected):
    make_refcoco(data, "refcoco+", "refs(unc).p", refs_of(("val", "testA", "testB")))
    change(data / "refcoco+")
    assert expected in fails("refcoco+", data)


# ---- VQA v2 and Visual Genome ----


FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015"}


def make_vqa(data: Path) -> None:
    """Two questions on image 1 of training, one on image 2 of val, one on image 3 of test."""
    asked = {
        "train": [(1, 10, "What is it?"), (1, 11, "Is it red?")],
        "val": [(2, 20, "How many?")],
        "test": [(3, 30, "Where?")],
    }
    given = {10: ["dog"] * 7 + ["a dog", "cat", "cat"], 11: ["yes"] * 10, 20: ["2"] * 6 + ["3"] * 4}
    kinds = {10: ("what is", "other"), 11: ("is it", "yes/no"), 20: ("how many", "number")}
    for split, folder in FOLDERS.items():
        questions = [
            {"image_id": image, "question": text, "question_id": number}
            for image, number, text in asked[split]
        ]
        head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": folder}
        write(
            data / f"vqa/v2_OpenEnded_mscoco_{folder}_questions.json",
            {**head, "task_type": "Open-Ended", "questions": questions},
        )
        for image, _, _ in asked[split]:
            draw(data / "coco/images" / folder / coco_name(image, folder))
        if split != "test":
            annotations = [
                {
                    "image_id": image,
                    "question_id": number,
                    "question_type": kinds[number][0],
                    "answer_type": kinds[number][1],
                    "multiple_choice_answer": given[number][0],
                    "answers": [
                        {"answer": answer, "answer_confidence": "yes", "answer_id": place}
                        for place, answer in enumerate(given[number], 1)
                    ],
                }
                for image, number, _ in reversed(asked[split])
            ]
            write(data / f"vqa/v2_mscoco_{folder}_annotations.json", {**head, "annotations": annotations})


def make_vg(data: Path) -> None:
    """Image 5 is none of COCO's, 6 is in COCO's training set, 7 in VQA v2's val, 8 in its test."""
    images, groups = [], []
    for number, coco_id in ((5, None), (6, 1), (7, 2), (8, 3.0)):
        folder = "VG_100K_2" if number == 5 else "VG_100K"
        url = f"https://cs.stanford.edu/people/rak248/{folder}/{number}.jpg"
        images.append(
            {"image_id": number, "url": url, "width": 8, "height": 6, "coco_id": coco_id, "flickr_id": None}
        )
        draw(data / "visual_genome/images" / folder / f"{number}.jpg")
        said = [("Where is it?", "On the Table."), ("Which letter?", "A.")][: 2 if number == 5 else 1]
        qas = [
            {"qa_id": 10 * number + i, "image_id": number, "question": q, "answer": a, "a_objects": []}
            for i, (q, a) in enumerate(said)
        ]
        groups.append({"id": number, "qas": qas})
    write(data / "visual_genome/image_data.json", images)
    write(data / "visual_genome/question_answers.json", groups)


def test_vqa_as_its_config_reads_it(data, capsys):
    make_vqa(data)
    make_vg(data)
    printed = prepare("vqa", data, capsys)

    def entry(split: str, image: int, **more) -> dict:
        folder = FOLDERS[split]
        return {"dataset": "vqa", "image": f"{folder}/{coco_name(image, folder)}", **more}

    other = {"question_id": 10, "question_type": "what is", "answer_type": "other"}
    yes = {"question_id": 11, "question_type": "is it", "answer_type": "yes/no"}
    number = {"question_id": 20, "question_type": "how many", "answer_type": "number"}
    assert content(data / "vqa_train.json") == [
        entry("train", 1, question="What is it?", answer=["dog"] * 7 + ["a dog", "cat", "cat"], **other),
        entry("train", 1, question="Is it red?", answer=["yes"] * 10, **yes),
    ]
    assert content(data / "vqa_val.json") == [
        entry("val", 2, question="How many?", answer=["2"] * 6 + ["3"] * 4, **number)
    ]
    assert content(data / "vqa_test.json") == [entry("test", 3, question="Where?", question_id=30)]
    assert content(data / "vg_qa.json") == [
        {"dataset": "vg", "image": "VG_100K_2/5.jpg", "question": "Where is it?", "answer": "on table"},
        {"dataset": "vg", "image": "VG_100K/6.jpg", "question": "Where is it?", "answer": "on table"},
    ]
    assert content(data / "answer_list.json") == ["dog", "yes", "2"]
    assert "VQA v2 train, questions 2 443,757" in printed
    assert "Visual Genome, questions 5" in printed and "answers to rank 3 3,128" in printed
    assert "2 Visual Genome questions on an image of VQA v2's val or test; first: image 7, image 8" in printed
    assert "1 Visual Genome questions without an answer; first: image 5" in printed
    assert "most common one of 1 questions or more each, together of 100.0% of train and val" in printed

    config = config_of("VQA", VQA)
    train = read_questions(config["train_file"], config, answer=(str, list))
    assert [len(given_answers(entry)) for entry in train] == [10, 10, 10, 1, 1]
    assert all(Path(entry["images"][0]).is_file() for entry in train)
    test = VQAEvalData(config["test_file"], config, is_test=True)
    assert shown(test) == (1, 3, 32, 32) and test.annotations is None
    val = VQAEvalData("data/vqa_val.json", config, is_test=False)
    assert val.labels("answer_type") == ["number"] and len(val.annotations[0]) == 10


def test_missing_vqa_images_are_counted_by_data_set(data, capsys):
    make_vqa(data)
    make_vg(data)
    draw(data / "coco/images/test2015" / coco_name(4, "test2015"))
    path = data / "vqa/v2_OpenEnded_mscoco_test2015_questions.json"
    questions = content(path)
    more = [{"image_id": image, "question": "Why?", "question_id": 40 + image} for image in (3, 4)]
    write(path, {**questions, "questions": questions["questions"] + more})
    (data / "coco/images/test2015" / coco_name(3, "test2015")).unlink()
    (data / "visual_genome/images/VG_100K/6.jpg").unlink()
    printed = prepare("vqa", data, capsys)
    assert [entry["question_id"] for entry in content(data / "vqa_test.json")] == [44]
    assert f"2 VQA v2 questions whose image is not in {data}/coco/images; first: test2015/" in printed
    assert f"1 Visual Genome questions whose image is not in {data}/visual_genome/images" in printed
    assert "vqa_test.json is incomplete" in printed


def test_vqa_s_own_questions_and_annotations_are_read():
    names = ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json")
    entries = list(vqa_entries(*(EXCERPTS / name for name in names), "train2014"))
    assert entries[0] == {
        "dataset": "vqa",
        "image": "train2014/COCO_train2014_000000228478.jpg",
        "question": "What English meal is this likely for?",
        "question_id": 228478002,
        "answer": [
            "brunch",
            "tea",
            "tea time",
            "brunch",
            "breakfast",
            "tea",
            "teatime",
            "lunch",
            "reception",
            "breakfast",
        ],
        "question_type": "what",
        "answer_type": "other",
    }
    assert [entry["question_id"] for entry in entries] == [228478002, 111756005]


def test_vqa_files_in_the_folders_of_the_authors_reader(data, capsys):
    """Questions/ and Annotations/; the questions of Visual Genome may name their image `image_id`."""
    make_vqa(data)
    make_vg(data)
    prepare("vqa", data, capsys)
    before = {path.name: path.read_bytes() for path in data.glob("*.json")}
    for path in list((data / "vqa").iterdir()):
        folder = data / "vqa" / ("Questions" if "OpenEnded" in path.name else "Annotations")
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)
    groups = content(data / "visual_genome/question_answers.json")
    renamed = [{"image_id": group["id"], "qas": group["qas"]} for group in groups]
    write(data / "visual_genome/question_answers.json", renamed)
    prepare("vqa", data, capsys)
    assert {path.name: path.read_bytes() for path in data.glob("*.json")} == before


@pytest.mark.parametrize(
    ("file", "change", "expected"),
    [
        ("vqa/v2_mscoco_val2014_annotations.json", damage, "cannot be read"),
        ("visual_genome/question_answers.json", damage, "is not valid JSON (truncated?)"),
        ("visual_genome/image_data.json", damage, "cannot be read"),
        (
            "vqa/v2_OpenEnded_mscoco_test2015_questions.json",
            Path.unlink,
            "test, questions (looked for vqa/v2_OpenEnded_mscoco_test2015_questions.json and vqa/*/",
        ),
        (
            "vqa/v2_mscoco_train2014_annotations.json",
            lambda path: write(path, {"annotations": content(path)["annotations"][:1]}),
            "annotates 1 questions",
        ),
        (
            "vqa/v2_mscoco_val2014_annotations.json",
            lambda path: write(
                path, {"annotations": [{**content(path)["annotations"][0], "question_id": 5}]}
            ),
            "question_id 20 is not in",
        ),
        (
            "vqa/v2_mscoco_val2014_annotations.json",
            lambda path: write(path, {"annotations": [{**content(path)["annotations"][0], "answers": []}]}),
            "question_id 20 has no answers",
        ),
        (
            "visual_genome/question_answers.json",
            lambda path: write(path, [{"id": 4, "qas": [{"question": "What?", "answer": "A cat."}]}]),
            "id 4 is not in",
        ),
        (
            "visual_genome/question_answers.json",
            lambda path: write(path, [{"id": 5, "qas": [{"question": "What?"}]}]),
            "entry 0, qas: 'answer' must be text",
        ),
    ],
)
def test_damaged_vqa_files_are_named(data, file, change, expected):
    make_vqa(data)
    make_vg(data)
    change(data / file)
    message = fails("vqa", data)
    assert expected in message and Path(file).stem in message
    assert not list(data.glob(".*.tmp"))


def test_vqa_without_visual_genome_s_images_writes_nothing(data):
    make_vqa(data)
    make_vg(data)
    (data / "visual_genome/images").rename(data / "elsewhere")
    assert "Visual Genome's images (looked for visual_genome/images)" in fails("vqa", data)
    assert not list(data.glob("*.json"))


def test_vqa_of_some_sets_alone(data, capsys):
    make_vqa(data)
    make_vg(data)
    prepare("vqa", data, capsys)
    before = {path.name: path.read_bytes() for path in data.glob("*.json")}
    for path in data.glob("*.json"):
        path.unlink()
    (data / "vqa/v2_OpenEnded_mscoco_test2015_questions.json").unlink()
    assert "missing in" in (message := fails("vqa", data)) and "--only makes some of the sets" in message
    printed = prepare("vqa", data, capsys, "--only", "val")
    assert "not made, as --only says: train, test, vg" in printed
    assert "answer_list.json is not written" in printed
    assert [path.name for path in data.glob("*.json")] == ["vqa_val.json"]
    printed = prepare("vqa", data, capsys, "--only", "vg", "val", "train")
    assert "of 100.0% of train and val" in printed
    without_test = {name: content for name, content in before.items() if "_test" not in name}
    entries = content(data / "vg_qa.json")
    assert [entry["image"] for entry in entries] == ["VG_100K_2/5.jpg", "VG_100K/6.jpg", "VG_100K/8.jpg"]
    for name in without_test.keys() - {"vg_qa.json"}:
        assert (data / name).read_bytes() == before[name]
    assert "train and val" not in prepare("vqa", data, capsys, "--only", "train")
    assert content(data / "answer_list.json") == ["dog", "yes"]
    (data / "vqa/v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    assert "val, questions (looked for" in fails("vqa", data, "--only", "vg")
    assert "--only dev: there is no such set, but train, val, test, vg" in fails("vqa", data, "--only", "dev")


# ---- NLVR2 ----


def nlvr_line(identifier: str, label: str, **more) -> dict:
    pair = identifier.rsplit("-", 1)[0]
    return {
        "validation": {"1": label},
        "sentence": f"A sentence of {identifier}.",
        "left_url": f"https://example.org/{pair}-left.jpg",
        "label": label,
        "identifier": identifier,
        "extra_validations": {},
        **more,
    }


def make_nlvr2(data: Path) -> None:
    lines = {
        "train": [
            nlvr_line("train-10171-0-0", "True", directory=37),
            nlvr_line("train-10171-0-1", "False", directory=37),
            nlvr_line("train-7-2-0", "False", directory=4),
        ],
        "dev": [nlvr_line("dev-850-0-0", "False")],
        "test1": [nlvr_line("test1-0-1-0", "True")],
    }
    for file, entries in lines.items():
        write_lines(data / f"nlvr2/data/{file}.json", entries)
    for pair in (
        "images/train/37/train-10171-0",
        "images/train/4/train-7-2",
        "dev/dev-850-0",
        "test1/test1-0-1",
    ):
        for side in (0, 1):
            draw(data / f"nlvr2/{pair}-img{side}.png")


def test_nlvr2_as_its_config_reads_it(data, capsys):
    make_nlvr2(data)
    printed = prepare("nlvr2", data, capsys)
    first = ["images/train/37/train-10171-0-img0.png", "images/train/37/train-10171-0-img1.png"]
    assert content(data / "nlvr_train.json")[:2] == [
        {
            "images": first,
            "sentence": f"A sentence of train-10171-0-{i}.",
            "label": label,
            "identifier": f"train-10171-0-{i}",
        }
        for i, label in enumerate(("True", "False"))
    ]
    dev = content(data / "nlvr_dev.json")[0]
    assert dev["images"] == ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"] and dev["label"] == "False"
    assert "sentences, train 3 86,373" in printed and "sentences, test 1 6,967" in printed
    assert "left out: nothing" in printed

    config = config_of("NLVR", NLVR)
    for key, labels in (("train_file", [1, 0, 0]), ("val_file", [0]), ("test_file", [1])):
        items = read_nlvr(config[key], config["image_root"])
        assert [item["label"] for item in items] == labels
        assert all(Path(image).is_file() for item in items for image in item["images"])


def test_nlvr2_leaves_out_pairs_that_lack_an_image(data, capsys):
    make_nlvr2(data)
    (data / "nlvr2/images/train/37/train-10171-0-img1.png").unlink()
    printed = prepare("nlvr2", data, capsys)
    assert (
        f"2 entries whose image is not in {data}/nlvr2; first: images/train/37/train-10171-0-img1" in printed
    )
    assert len(content(data / "nlvr_train.json")) == 1


def test_nlvr2_s_own_lines_convert_and_score_as_by_its_script(data):
    """Set 850: two sentences, each on four pairs. The script of its authors gave these numbers."""
    path = EXCERPTS / "nlvr2_dev.json"
    entries = list(sentences(path))
    assert entries[0] == {
        "images": ["dev/dev-850-0-img0.png", "dev/dev-850-0-img1.png"],
        "sentence": "The right image shows a curving walkway of dark glass circles embedded in dirt and "
        "flanked by foliage.",
        "label": "False",
        "identifier": "dev-850-0-0",
    }
    write(data / "nlvr_dev.json", entries)
    items = read_nlvr(str(data / "nlvr_dev.json"), "")
    identifiers = official_identifiers(items)
    assert identifiers == [json.loads(line)["identifier"] for line in path.read_text().splitlines()]
    for wrong, percent in (((), 100.0), ((0,), 50.0), ((5, 6), 50.0), ((0, 4), 0.0)):
        assert consistency(identifiers, [i not in wrong for i in range(8)]) == percent


def test_nlvr2_s_other_files_are_converted_where_they_are_there(data, capsys):
    """test2.json and the subsets; the repository brings test2.json to those who lack its images, too."""
    make_nlvr2(data)
    folder = data / "nlvr2/data"
    write_lines(folder / "test2.json", [nlvr_line("test2-189-0-0", "True")])
    write_lines(folder / "balanced/balanced_dev.json", [nlvr_line("dev-850-0-0", "False")])
    write_lines(folder / "unbalanced/unbalanced_test1.json", [nlvr_line("test1-0-1-0", "True")])
    printed = prepare("nlvr2", data, capsys)
    assert "nlvr_test2.json is not written: not one of the images of" in printed
    assert "sentences, test2 1 6,970" in printed and "sentences, balanced_dev 1 2,300" in printed
    assert not (data / "nlvr_test2.json").exists()
    assert content(data / "nlvr_balanced_dev.json") == content(data / "nlvr_dev.json")
    assert content(data / "nlvr_unbalanced_test1.json") == content(data / "nlvr_test.json")
    for side in (0, 1):
        draw(data / f"nlvr2/test2/test2-189-0-img{side}.png")
    prepare("nlvr2", data, capsys)
    (entry,) = read_nlvr(str(data / "nlvr_test2.json"), str(data / "nlvr2"))
    assert all(Path(image).is_file() for image in entry["images"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"identifier": "dev-1-0-', "dev.json, line 2 is not valid JSON (truncated?)"),
        (json.dumps(nlvr_line("dev-850-0", "True")), "line 2: 'identifier' must be like dev-850-0-0"),
        (json.dumps(nlvr_line("dev-850-0-1", "maybe")), "line 2: 'label' must be True or False"),
        (json.dumps(nlvr_line("train-1-0-1", "True")), "line 2: 'directory' must be a whole number"),
        ("[1]", "line 2 must be an object"),
    ],
)
def test_damaged_nlvr2_lines_are_named_and_old_files_stay(data, capsys, line, expected):
    make_nlvr2(data)
    prepare("nlvr2", data, capsys)
    before = content(data / "nlvr_dev.json")
    with (data / "nlvr2/data/dev.json").open("a") as file:
        file.write(line)
    assert expected in fails("nlvr2", data)
    assert content(data / "nlvr_dev.json") == before


# ---- SNLI-VE ----


def ve_line(image: str, label: str, field: str = "Flickr30K_ID") -> dict:
    return {
        "annotator_labels": [label],
        "captionID": f"{image}.jpg#0",
        "gold_label": label,
        "pairID": f"{image}.jpg#0r1n",
        "sentence1": "Two people outside.",
        "sentence2": f"Somebody is {label}.",
        field: image,
    }


def make_snli_ve(data: Path) -> None:
    labels = ("contradiction", "neutral", "entailment", "-")
    write_lines(data / "snli_ve/snli_ve_train.jsonl", [ve_line("1001", label) for label in labels])
    write_lines(data / "snli_ve/snli_ve_dev.jsonl", [ve_line("1002", "neutral", "Flikr30kID")])
    write_lines(data / "snli_ve/snli_ve_test.jsonl", [ve_line("1003.jpg", "entailment")])
    for number in (1001, 1002, 1003):
        draw(data / f"flickr30k-images/{number}.jpg")


def test_snli_ve_as_its_config_reads_it(data, capsys):
    make_snli_ve(data)
    printed = prepare("snli_ve", data, capsys)
    labels = ("contradiction", "neutral", "entailment")
    assert content(data / "ve_train.json") == [
        {"image": "1001", "sentence": f"Somebody is {label}.", "label": label} for label in labels
    ]
    assert "train 3 529,527" in printed and "dev 1 17,858" in printed and "test 1 17,901" in printed
    assert "contradiction 1 176,550" in printed
    assert "1 sentences without a label; first:" in printed
    assert f"configs/VE.yaml: image_root: {data}/flickr30k-images" in printed

    config = config_of("VE", VE)
    for key, expected in (("train_file", [0, 1, 2]), ("val_file", [1]), ("test_file", [2])):
        items = read_ve(config[key], config["image_root"])
        assert [item["label"] for item in items] == expected
        assert all(Path(item["images"][0]).is_file() for item in items)


def test_snli_ve_without_images_or_with_other_labels(data, capsys):
    make_snli_ve(data)
    prepare("snli_ve", data, capsys)
    (data / "flickr30k-images/1003.jpg").unlink()
    assert "no entry to write to" in fails("snli_ve", data)
    assert "1 entries whose image is not in" in " ".join(capsys.readouterr().out.split())
    assert len(content(data / "ve_test.json")) == 1  # as it was
    write_lines(data / "snli_ve/snli_ve_dev.jsonl", [ve_line("1002", "hidden")])
    assert "line 1: 'gold_label' must be one of contradiction" in fails("snli_ve", data)
    (data / "snli_ve/snli_ve_dev.jsonl").unlink()
    assert "dev (looked for snli_ve/snli_ve_dev.jsonl)" in fails("snli_ve", data)


def test_snli_ve_on_photos_of_flickr8k(data, capsys):
    make_snli_ve(data)
    for number in (1001, 1003, 1002):
        (data / "flickr8k_images").mkdir(exist_ok=True)
        (data / f"flickr30k-images/{number}.jpg").rename(data / f"flickr8k_images/{number}_693b08cb0e.jpg")
        (data / f"flickr8k_images/{number}_clip.jpg").write_text("features, no photo")
    write_lines(data / "snli_ve/snli_ve_test.jsonl", [ve_line(image, "neutral") for image in ("1003", "100")])
    for folder in ("flickr8k_images", str(data / "flickr8k_images")):
        printed = prepare("snli_ve", data, capsys, "--images", folder)
        assert {entry["image"] for entry in content(data / "ve_train.json")} == {"1001_693b08cb0e"}
        assert [entry["image"] for entry in content(data / "ve_test.json")] == ["1003_693b08cb0e"]
        assert f"1 entries whose image is not in {data}/flickr8k_images; first: 100.jpg" in printed
    (data / "flickr8k_images/1003.jpg").write_text("the one that is called so")
    prepare("snli_ve", data, capsys, "--images", "flickr8k_images")
    assert [entry["image"] for entry in content(data / "ve_test.json")] == ["1003"]


# ---- images that are not there yet ----


def make_refcoco_plus(data: Path) -> None:
    make_refcoco(data, "refcoco+", "refs(unc).p", refs_of(("val", "testA", "testB")))


def make_all_of_vqa(data: Path) -> None:
    make_vqa(data)
    make_vg(data)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("refcoco+", make_refcoco_plus),
        ("vqa", make_all_of_vqa),
        ("nlvr2", make_nlvr2),
        ("snli_ve", make_snli_ve),
    ],
)
def test_without_images_the_files_are_those_of_all_images(data, capsys, name, make):
    make(data)
    prepare(name, data, capsys)
    before = {path.name: path.read_bytes() for path in data.glob("*.json")}
    for folder in ("coco", "flickr30k-images", "visual_genome/images", "nlvr2/images", "nlvr2/dev"):
        shutil.rmtree(data / folder, ignore_errors=True)
    message = fails(name, data)
    assert "--without_images goes on without" in message or "no entry to write" in message
    capsys.readouterr()
    assert "kept by --without_images; first: " in prepare(name, data, capsys, "--without_images")
    assert {path.name: path.read_bytes() for path in data.glob("*.json")} == before


def test_without_images_an_entry_of_two_is_counted_once(data, capsys):
    make_nlvr2(data)
    (data / "nlvr2/dev/dev-850-0-img1.png").write_bytes(b"")
    shutil.rmtree(data / "nlvr2/images")
    printed = prepare("nlvr2", data, capsys, "--without_images")
    assert (
        f"3 entries whose image is not in {data}/nlvr2, kept by --without_images; first: images/" in printed
    )
    assert "1 entries whose image is an empty file, kept by --without_images; first: dev/" in printed


# ---- the authors' files ----


def test_coco_s_own_file_of_one_split(data, capsys):
    """Three images of val2017: one has seven captions, two of them a space or a line's end too many."""
    folder = data / "coco/annotations"
    folder.mkdir(parents=True)
    shutil.copy(EXCERPTS / "captions_val2017.json", folder)
    message = fails("coco", data, "--split", "2017")
    assert "captions_train2017.json (looked for" in message and "--only makes some of the sets" in message
    message = fails("coco", data, "--split", "2017", "--only", "val")
    assert "val2017 (looked for" in message and "captions" not in message
    printed = prepare("coco", data, capsys, "--split", "2017", "--only", "val", "--without_images")
    assert "val images 3 5,000" in printed and "val captions 17 25,014" in printed
    assert (
        f"3 images that are not in {data}/coco/images, kept by" in printed and "left out: nothing" in printed
    )
    assert "not made, as --only says: train" in printed
    entries = content(data / "coco2017_val.json")
    assert [(entry["image"], len(entry["caption"])) for entry in entries] == [
        ("val2017/000000431896.jpg", 7),
        ("val2017/000000359219.jpg", 5),
        ("val2017/000000179765.jpg", 5),
    ]
    assert entries[0]["caption"][2] == "a brown and yellow commuter train with headlights on"
    assert entries[1]["caption"][1] == "Two pizza pies sitting atop a stove getting ready to be cut\n."
    assert [path.name for path in data.glob("*.json")] == ["coco2017_val.json"]
    for entry in entries:
        draw(data / "coco/images" / entry["image"])
    before = (data / "coco2017_val.json").read_bytes()
    assert "noticed" not in prepare("coco", data, capsys, "--split", "2017", "--only", "val")
    assert (data / "coco2017_val.json").read_bytes() == before
    assert "--only test: there is no such set, but train, val" in fails(
        "coco", data, "--split", "2017", "--only", "test"
    )


def test_nlvr2_s_own_file_of_one_split(data, capsys):
    (data / "nlvr2/data").mkdir(parents=True)
    shutil.copy(EXCERPTS / "nlvr2_dev.json", data / "nlvr2/data/dev.json")
    message = fails("nlvr2", data, "--without_images")
    assert "sentences of train (looked for" in message and "sentences of dev" not in message
    printed = prepare("nlvr2", data, capsys, "--only", "dev", "--without_images")
    assert "sentences, dev 8 6,982" in printed
    assert "8 entries whose image is not in" in printed and "left out: nothing" in printed
    assert [path.name for path in data.glob("*.json")] == ["nlvr_dev.json"]
    assert content(data / "nlvr_dev.json") == list(sentences(EXCERPTS / "nlvr2_dev.json"))
    assert "sentences of test2 (looked for" in fails("nlvr2", data, "--only", "dev", "test2")


def test_vqa_s_own_files_of_one_split(data, capsys):
    (data / "vqa").mkdir()
    for path in EXCERPTS.glob("v2_*.json"):
        shutil.copy(path, data / "vqa")
    printed = prepare("vqa", data, capsys, "--only", "train", "--without_images")
    assert "VQA v2 train, questions 2 443,757" in printed and "answers to rank 2 3,128" in printed
    assert len(read_questions([str(data / "vqa_train.json")], config_of("VQA", VQA), answer=(list,))) == 2


def test_conceptual_captions_own_list(data, capsys):
    (data / "cc3m").mkdir()
    listed = shutil.copy(EXCERPTS / "Validation_GCC-1.1.0-Validation.tsv", data / "cc3m")
    assert "--without_images makes the file of the list alone" in fails("cc3m", data)
    printed = prepare("cc3m", data, capsys, "--without_images", "--relative")
    assert "cc3m_val: lines 3 15,840" in printed and "cc3m_val: pairs 3 -" in printed
    assert "cc3m_train.json: not made, no list in" in printed
    assert "cc3m_val.json: images are named {row}_{crc32}" in printed
    lines = Path(listed).read_text(encoding="utf-8").splitlines()
    assert content(data / "cc3m_val.json") == [
        {"image": f"cc3m/val/{row}_{zlib.crc32(url.encode())}", "caption": caption}
        for row, (caption, url) in enumerate(line.split("\t") for line in lines)
    ]
    assert "fianc\u00e9 's 25th birthday" in lines[2]
    draw(data / "cc3m/val/1.png")
    prepare("cc3m", data, capsys, "--without_images", "--image-names", "{row}.png")
    assert [Path(entry["image"]).name for entry in content(data / "cc3m_val.json")] == [
        "0.png",
        "1.png",
        "2.png",
    ]
