"""VQA v2, the questions of Visual Genome, and the list of answers.

Needs below --root:
    vqa/v2_OpenEnded_mscoco_{train2014,val2014,test2015}_questions.json     (or in a folder of vqa/)
    vqa/v2_mscoco_{train2014,val2014}_annotations.json
    visual_genome/question_answers.json, image_data.json
    coco/images/{train2014,val2014,test2015}/..., visual_genome/images/VG_100K/..., VG_100K_2/...
Writes (config vqa_root: coco/images, vg_root: visual_genome/images):
    vqa_train.json, vqa_val.json    {"dataset": "vqa", "image", "question", "answer": [ten texts],
                                    "question_id", "question_type", "answer_type"}
    vqa_test.json                   the same without what only annotators know
    vg_qa.json                      {"dataset": "vg", "image", "question", "answer": text}
    answer_list.json                the 3,128 answers to rank (the length of the published list), counted in
                                    train and val as by `python -m simla.dataset.prepare answers`

Sets of --only: train, val, test, vg. The last one needs the questions of val, too; answer_list.json is made
with train, and counts val where val is made.

Visual Genome's answers are sentences ("On the table."), so they go through the normalisation of the official
VQA accuracy; those of which nothing is left are left out. So are questions on images of COCO that VQA v2 has
in val or test, or its score there would not be on unseen images; image_data.json knows COCO's number of an
image only if it is in train2014 or val2014.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from sys import intern

from simla.dataset.prepare.answers import NUM_ANSWERS, covered_share, frequent_answers
from simla.dataset.prepare.common import (
    OR_ONLY,
    Images,
    Report,
    add_only,
    add_without_images,
    find_all,
    read_source,
    sets_to_make,
)
from simla.dataset.prepare.visual_genome import NUM_IMAGES, id_elsewhere, image_name, number_of_image
from simla.dataset.readers.json_list import JsonList
from simla.dataset.readers.tables import by_id, checked, look_up
from simla.evaluation.vqa import most_common_answer, normalize_answer
from simla.utils import UserError

SOURCE = "visualqa.org (VQA v2), cocodataset.org (images) and visualgenome.org (version 1.2)"
FOLDERS = {"train": "train2014", "val": "val2014", "test": "test2015"}
OFFICIAL = {"train": 443_757, "val": 214_354, "test": 447_793}  # questions
FILES = {  # set -> what it needs -> where that may lie: the authors' own reader has folders
    split: {
        f"{split}, {kind}": [f"vqa/{name.format(folder)}", f"vqa/*/{name.format(folder)}"]
        for kind, name in (
            ("questions", "v2_OpenEnded_mscoco_{}_questions.json"),
            ("annotations", "v2_mscoco_{}_annotations.json"),
        )
        if (split, kind) != ("test", "annotations")
    }
    for split, folder in FOLDERS.items()
}
FILES["vg"] = {name: [f"visual_genome/{name}"] for name in ("question_answers.json", "image_data.json")}


def add_options(parser: argparse.ArgumentParser) -> None:
    add_only(parser)
    add_without_images(parser)


def prepare(root: Path, out: Path, options: argparse.Namespace, report: Report) -> None:
    sets = sets_to_make(options, FILES, report)
    splits = [split for split in FOLDERS if split in sets]
    wanted = {what: places for name in sets for what, places in FILES[name].items()}
    folders = {"COCO's images": ["coco/images"]} if splits else {}
    if "vg" in sets:
        wanted["val, questions"] = FILES["val"]["val, questions"]  # to leave out their images
        folders["Visual Genome's images"] = ["visual_genome/images"]
    files = find_all(root, SOURCE + OR_ONLY, wanted, folders, report)
    report.source = "visualqa.org and Krishna et al. 2017"
    if splits:
        _prepare_vqa(files, splits, out, report)
    if "vg" in sets:
        _prepare_vg(files, out, _held_out(files), report)


# ---- VQA v2 ----


def _prepare_vqa(files: dict[str, Path], splits: list[str], out: Path, report: Report) -> None:
    """Write the files of the splits and, where train is one of them, the list of answers."""
    images = Images(files["COCO's images"], report, "VQA v2 questions whose image is")
    answers: list[list[str]] = []
    for split in splits:
        annotations = files.get(f"{split}, annotations")
        entries = list(vqa_entries(files[f"{split}, questions"], annotations, FOLDERS[split]))
        report.count(f"VQA v2 {split}, questions", len(entries), OFFICIAL[split])
        kept = [entry for entry in entries if images.has(entry["image"])]
        report.write(out / f"vqa_{split}.json", kept)
        answers += [entry["answer"] for entry in kept if annotations]
        if split == "test" and len(kept) < len(entries):
            report.notes.append(
                "vqa_test.json is incomplete: the evaluation server wants answers to all questions"
            )
    if "train" not in splits:
        report.notes.append("answer_list.json is not written: its answers are counted in train, and in val")
        return
    listed = frequent_answers(answers, NUM_ANSWERS)
    report.count("answers to rank", len(listed), NUM_ANSWERS)
    report.write(out / "answer_list.json", listed)
    rarest = normalize_answer(listed[-1])
    least = sum(most_common_answer(given) == rarest for given in answers)
    report.notes.append(
        f"answer_list.json: its answers are the most common one of {least:,} questions or more each, "
        f"together of {covered_share(listed, answers):.1%} of train{' and val' if 'val' in splits else ''}"
    )


def _held_out(files: dict[str, Path]) -> set[str]:
    """Return the images of those of val and test whose questions are at hand."""
    questions = {split: files.get(f"{split}, questions") for split in ("val", "test")}
    return {
        entry["image"]
        for split, file in questions.items()
        if file is not None
        for entry in vqa_entries(file, None, FOLDERS[split])
    }


def coco_image(folder: str, number: int) -> str:
    return f"{folder}/COCO_{folder}_{number:012d}.jpg"


def vqa_entries(questions_file: Path, annotations_file: Path | None, folder: str) -> Iterator[dict]:
    """Yield the entries, of images in this folder, with answers where there is a file of annotations.

    Raises UserError that names a wrong question or annotation.
    """
    questions = _by_question(questions_file, "questions")
    annotations = _by_question(annotations_file, "annotations") if annotations_file else {}
    if annotations_file and len(annotations) != len(questions):
        raise UserError(
            f"{annotations_file} annotates {len(annotations)} questions, {questions_file} has "
            f"{len(questions)}; the two files must be of the same release"
        )
    for number, question in questions.items():
        where = f"{questions_file}: question_id"
        entry = {
            "dataset": "vqa",
            "image": coco_image(folder, checked(question, "image_id", int, f"{where} {number}")),
            "question": checked(question, "question", str, f"{where} {number}"),
            "question_id": number,
        }
        if annotations_file:
            annotation = look_up(annotations, number, where, annotations_file)
            entry |= _annotated(annotation, f"{annotations_file}: question_id {number}")
        yield entry


def _by_question(file: Path, key: str) -> dict[int, dict]:
    return by_id(checked(read_source(file), key, list, str(file)), "question_id", file, f" {key}")


def _annotated(annotation: dict, where: str) -> dict:
    answers = checked(annotation, "answers", list, where)
    if not answers:
        raise UserError(f"{where} has no answers")
    kinds = {field: checked(annotation, field, str, where) for field in ("question_type", "answer_type")}
    # The same few texts come again and again: one copy of each is kept in memory.
    return {"answer": [intern(checked(answer, "answer", str, where)) for answer in answers], **kinds}


# ---- Visual Genome ----


def _prepare_vg(files: dict[str, Path], out: Path, held_out: set[str], report: Report) -> None:
    images_file = files["image_data.json"]
    about = by_id(read_source(images_file), "image_id", images_file)
    report.count("Visual Genome, images", len(about), NUM_IMAGES)
    # Hundreds of megabytes, most of them not wanted: read image by image.
    groups = JsonList(files["question_answers.json"], _check_group, f"{__name__}._check_group")
    report.count("Visual Genome, questions", sum(len(group["qas"]) for group in groups))
    images = Images(files["Visual Genome's images"], report, "Visual Genome questions whose image is")
    entries = _vg_entries(groups, about, images_file, held_out, report)
    report.write(out / "vg_qa.json", (entry for entry in entries if images.has(entry["image"])))


def _check_group(group: object, where: str) -> None:
    """Raise UserError for other questions on an image than {"id", "qas": [{"question", "answer"}, ...]}."""
    number_of_image(group, where)
    for qa in checked(group, "qas", list, where):
        for field in ("question", "answer"):
            checked(qa, field, str, f"{where}, qas")


def _vg_entries(
    groups: Sequence[dict], about: dict[int, dict], images_file: Path, held_out: set[str], report: Report
) -> Iterator[dict]:
    """Yield the entries of images that are none of `held_out`, which has names by `coco_image`."""
    for group in groups:
        number, questions = number_of_image(group, "question_answers.json"), group["qas"]
        image = look_up(about, number, "question_answers.json: id", images_file)
        where = f"{images_file}: image_id {number}"
        coco_id = id_elsewhere(image, "coco_id", where)
        if coco_id is not None and any(
            coco_image(folder, coco_id) in held_out for folder in FOLDERS.values()
        ):
            cause = "Visual Genome questions on an image of VQA v2's val or test"
            report.leave_out(cause, f"image {number}", len(questions))
            continue
        name = image_name(image, where)
        for question in questions:
            answer = normalize_answer(question["answer"])
            if answer:
                yield {"dataset": "vg", "image": name, "question": question["question"], "answer": answer}
            else:
                report.leave_out("Visual Genome questions without an answer", f"image {number}")
