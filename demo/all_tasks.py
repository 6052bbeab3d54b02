"""The whole chain on the embedded scenes: pre-training and every downstream task; a table and pictures.

make demo-all        (or: python -m simla.demo.all_tasks [--output_dir output/demo-all])

A second call goes on: finished stages are read from their stage.json, an interrupted one continues at its
newest checkpoint. Each task is scored on the test split before its training (from the checkpoint it starts
with, a fresh head where it has one) and after it. What imports torch is imported where it is needed, as in
pretrain.py.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from simla.demo.data import write_json
from simla.demo.pretrain import (
    DATA,
    PRETRAINING,
    Stage,
    gallery,
    make_data,
    parse_arguments,
    read_retrieval,
    run_stage,
    spread,
)
from simla.engine.command import GOES_ON, run_command


def over_splits(values: dict[str, float], result: dict) -> dict:
    """Return the mean of the splits' values over their expressions, and the number of those."""
    num = {split: result["splits"][f"{split}_d"]["n"] for split in values}
    total = sum(num.values())
    return {"value": sum(values[split] * num[split] for split in num) / total, "n": total}


def read_grounding(result: dict) -> dict:
    """Return both test splits' accuracy; chance is any object of the picture, chosen without reading."""
    splits = {split: result["splits"][f"{split}_d"] for split in ("testA", "testB")}
    right = over_splits({name: split["accuracy"] for name, split in splits.items()}, result)
    guessed = over_splits({name: blind_guess("grounding", "by_object", name) for name in splits}, result)
    return {"metric": "boxes right on testA and testB (%)", "chance": guessed["value"], **right}


def read_heat_boxes(result: dict) -> dict:
    """Return the same of the box round the heat, which needs no detector; chance is the whole picture."""
    splits = {split: result["splits"][f"{split}_d"] for split in ("testA", "testB")}
    right, guessed = (
        over_splits({name: split[f"heat_{score}"] for name, split in splits.items()}, result)
        for score in ("accuracy", "chance")
    )
    return {"metric": "boxes round the heat right on both (%)", "chance": guessed["value"], **right}


def blind_guess(task: str, rule: str, split: str = "test") -> float:
    """Return the accuracy (%) of a guess that sees picture or text alone, by the data set's statistics."""
    return json.loads((DATA / "manifest.json").read_bytes())["tasks"][task]["chance"][split][rule]


def read_vqa(result: dict) -> dict:
    """Return the VQA accuracy; chance is training's most frequent answer to the question's type."""
    chance = blind_guess("vqa", "by_question_type")
    return {"metric": "VQA accuracy (%)", "value": result["accuracy"], "chance": chance, "n": result["n"]}


def read_classes(result: dict, task: str) -> dict:
    """Return the accuracy; chance is the most frequent class, or training's for the sentence if better."""
    test = result["test"]
    chance = max(test["most_frequent_class"], blind_guess(task, "by_sentence"))
    return {"metric": "accuracy (%)", "value": test["acc"], "chance": chance, "n": test["n"]}


def read_consistency(result: dict) -> dict:
    """Return the share of NLVR's sentences that are right on all their pairs; chance as of their accuracy."""
    num_sentences = len({entry["sentence"] for entry in json.loads((DATA / "nlvr_test.json").read_bytes())})
    metric, chance = "sentences right on all their pairs (%)", blind_guess("nlvr", "consistency")
    return {"metric": metric, "value": result["test"]["consistency"], "chance": chance, "n": num_sentences}


GRADCAM_MODE, GRADCAM_BLOCK = "itc", 3
GRADCAM = ("--gradcam_mode", GRADCAM_MODE, "--block_num", str(GRADCAM_BLOCK))
read_nlvr, read_ve = partial(read_classes, task="nlvr"), partial(read_classes, task="ve")
STAGES = (  # name, script, config, the stage it starts from, result file, how that is read, flags
    PRETRAINING,
    Stage("retrieval", "Retrieval.py", "Retrieval.yaml", "pretrain", "retrieval", read_retrieval),
    Stage("grounding", "Grounding.py", "Grounding.yaml", "pretrain", "grounding", read_grounding, GRADCAM),
    Stage("vqa", "VQA.py", "VQA.yaml", "pretrain", "vqa_accuracy", read_vqa),
    Stage("nlvr_pretrain", "Pretrain_NLVR.py", "NLVR_Pretrain.yaml", "pretrain"),
    Stage("nlvr", "NLVR.py", "NLVR.yaml", "nlvr_pretrain", "nlvr", read_nlvr),
    Stage("ve", "VE.py", "VE.yaml", "pretrain", "ve", read_ve),
)

SECOND_SCORES = {  # stage -> key in summary.json, how the stage's result file is read for it
    "grounding": ("grounding_heat_box", read_heat_boxes),
    "nlvr": ("nlvr_consistency", read_consistency),
}


def second_score(stage: Stage, folder: Path, read: Callable[[dict], dict]) -> dict:
    """Return the row of another score of a stage that is done; it took no seconds of its own."""
    before, after = (
        read(json.loads((folder / when / "result" / f"{stage.result}.json").read_bytes()))
        for when in ("before", "after")
    )
    value = after.pop("value")
    return {**after, "before": before["value"], "after": value, "seconds": 0}


def suite_row(checkpoint: str, folder: Path, seed: str) -> dict:
    """Return the row of the alignment suite for pre-training, and write suite.json and suite.png. Before: the
    same model with random weights.
    """
    file = folder / "suite.json"
    if file.is_file():
        return json.loads(file.read_bytes())["row"]
    import torch

    from simla.checkpoint.tasks import TASKS
    from simla.demo.swaps import scene_rows
    from simla.loading import load
    from simla.plots import plot_suite

    begin, model, rows = time.monotonic(), load(checkpoint), scene_rows(DATA)
    summary = model.score_suite(rows)["summary"]
    with torch.random.fork_rng():
        torch.manual_seed(int(seed))
        model.model.load_state_dict(TASKS["zero_shot_retrieval"].build(model.config).state_dict())
    before = model.score_suite(rows)["summary"]
    values = summary["all"]
    row = {"metric": "right text of two by matching (%)", "chance": values["chance"], "n": values["n"]}
    row |= {"before": before["all"]["itm"]["accuracy"], "after": values["itm"]["accuracy"]}
    row["seconds"] = round(time.monotonic() - begin)
    plot_suite("scenes", summary, folder / "suite.png")
    write_json(file, {"row": row, "summary": summary})
    return row


def draw_heat_maps(folder: Path, num_pictures: int = 12) -> None:
    """Draw where the fine-tuned model looks for test expressions, evenly spread, and the box it chooses."""
    from simla.checkpoint.load import load_weights
    from simla.configs.reader import read_config
    from simla.configs.schema import GROUNDING
    from simla.dataset.grounding import GroundingEvalData
    from simla.dataset.items import Collate
    from simla.dataset.text import build_tokenizer
    from simla.dataset.transforms import normalise
    from simla.evaluation.grounding import RIGHT_IOU
    from simla.models.gradcam import grad_cam
    from simla.models.retrieval import SIMLARetrieval
    from simla.plots import plot_heat_maps

    config = read_config(str(folder / "config.yaml"), GROUNDING)
    data, tokenizer = GroundingEvalData(config), build_tokenizer(config["text_encoder"])
    model = SIMLARetrieval.from_config(config)
    load_weights(model, json.loads((folder / "stage.json").read_bytes())["checkpoint"], "Grounding")
    choices = json.loads((folder / "after" / "result" / "grounding.json").read_bytes())["choices"]
    shown = spread([i for i, target in enumerate(data.targets) if target.split != "val"], num_pictures)
    batch = Collate(tokenizer, model.text_encoder.config.max_position_embeddings)([data[i] for i in shown])
    inputs = normalise(batch["image"]), batch["text_ids"], batch["text_mask"]
    heats = grad_cam(model.eval(), GRADCAM_MODE, GRADCAM_BLOCK, *inputs)
    plot_heat_maps(
        [data.entries[i]["images"][0] for i in shown],
        batch["text"],
        list(heats),
        [data.targets[i].box for i in shown],
        [choices[i]["box"] for i in shown],
        [choices[i]["iou"] >= RIGHT_IOU for i in shown],
        folder / "heat_maps.png",
    )


def draw_answers(folder: Path, num_pictures: int = 12) -> None:
    """Draw the fine-tuned model's answers to test questions, evenly spread."""
    from simla.evaluation.vqa import answer_scores
    from simla.plots import plot_answers

    questions = json.loads((DATA / "vqa_test.json").read_bytes())
    given = json.loads((folder / "after" / "result" / "vqa_top_answers.json").read_bytes())
    shown = spread(range(len(questions)), num_pictures)
    answers = [given[i]["answers"][0] for i in shown]
    annotated = [questions[i]["answer"] for i in shown]
    plot_answers(
        [str(DATA / questions[i]["image"]) for i in shown],
        [questions[i]["question"] for i in shown],
        answers,
        [score > 99 for score in answer_scores(answers, annotated)],  # in percent
        [max(answers, key=answers.count) for answers in annotated],
        folder / "answers.png",
    )


def table(summary: dict) -> str:
    """Return a row of text for each task."""
    rows = [f"{'':22}{'chance':>8}{'before':>8}{'after':>8}{'n':>7}{'seconds':>9}  metric"]
    for name, row in summary.items():
        numbers = "".join(f"{row[key]:8.1f}" for key in ("chance", "before", "after"))
        rows.append(f"{name:22}{numbers}{row['n']:7}{row['seconds'] or '':9}  {row['metric']}")
    return "\n".join(rows)


def main() -> None:
    args = parse_arguments(__doc__, "output/demo-all")
    out = args.output_dir
    make_data()
    summary, seconds, checkpoints = {}, 0, {"": ""}
    for stage in STAGES:
        record = run_stage(stage, out / stage.name, args.seed, checkpoints[stage.start])
        checkpoints[stage.name] = record["checkpoint"]
        seconds += record["seconds"]
        if stage.result:
            columns = ("metric", "chance", "before", "after", "n", "seconds")
            summary[stage.key or stage.name] = {column: record[column] for column in columns}
        if stage.name in SECOND_SCORES:
            key, read = SECOND_SCORES[stage.name]
            with suppress(KeyError):  # results that an earlier version wrote do not have it
                summary[key] = second_score(stage, out / stage.name, read)
    suite = suite_row(checkpoints["pretrain"], out / "pretrain", args.seed)
    summary["alignment_suite"] = suite
    seconds += suite["seconds"]
    write_json(out / "summary.json", summary)

    from simla.engine.curves import plot_curves

    plot_curves([out / "pretrain"], out / "pretrain" / "losses.png")
    gallery(out / "retrieval")
    draw_heat_maps(out / "grounding")
    draw_answers(out / "vqa")
    print(f"\n{table(summary)}\n\n{seconds} s in all; {out}/summary.json")
    for picture in sorted(out.glob("*/*.png")):
        print(picture)


if __name__ == "__main__":
    run_command(main, GOES_ON)
