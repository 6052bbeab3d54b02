"""VE.py, Pretrain_NLVR.py and NLVR.py run for real, one after the other, on 1, 2 and 3 processes.

Run as a script (`test_ve_nlvr_scripts.py FOLDER`) this file is those processes: one imports everything and
forks the ranks, since the imports take longer than the work.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ruamel.yaml import YAML
from tiny import MODEL, make_tiny, run, run_forked

import NLVR
import Pretrain
import Pretrain_NLVR
import VE
from simla.engine.peers import leave_together

TRAINING = {"optimizer": {"lr": 1e-3}, "schedular": {"epochs": 2, "warmup_epochs": 2, "warmup_step_size": 1}}
NUM_ENTRIES = {"train": 16, "val": 2, "test": 7}  # of 3 ranks one has nothing of `val` to do


def make_task_files(folder: Path) -> dict[str, Path]:
    """The tiny data set with entailment and NLVR files of its images, and a config for each script."""
    paths = make_tiny(folder)
    data, tasks = paths["data"], folder / "tasks"
    tasks.mkdir()
    for split, num_entries in NUM_ENTRIES.items():
        images = sorted((data / "images" / split).iterdir())
        labels = ("entailment", "neutral", "contradiction")
        ve = [
            {
                "image": f"{split}/{images[i % len(images)].stem}",
                "sentence": f"{i % 5} ducks",
                "label": labels[i % 3],
            }
            for i in range(num_entries)
        ]
        nlvr = [
            {
                "images": [f"{split}/{images[(i + j) % len(images)].name}" for j in (0, 1)],
                "sentence": f"there are {i % 4} ducks in all",
                "label": ("True", "False", True, "false")[i % 4],
                "identifier": f"{split}-{i // 4}-{i % 2}-{i // 2 % 2}",  # two sentences on two pairs of a set
            }
            for i in range(num_entries)
        ]
        for name, entries in (("ve", ve), ("nlvr", nlvr)):
            (tasks / f"{name}_{split}.json").write_text(json.dumps(entries))
    shared = {"text_encoder": str(data / "bert"), "batch_size_train": 4, **TRAINING}
    for script, name in (("VE", "ve"), ("NLVR", "nlvr")):
        files = {f"{split}_file": str(tasks / f"{name}_{split}.json") for split in NUM_ENTRIES}
        sizes = {key: value for key, value in MODEL.items() if key not in ("embed_dim", "queue_size")}
        config = {**sizes, **shared, **files, "image_root": str(data / "images"), "batch_size_test": 2}
        paths[script] = write_config(folder / f"{script}.yaml", config)
    config = {**MODEL, **shared, "train_file": str(data / "pretrain_train.json")}
    paths["Pretrain_NLVR"] = write_config(folder / "Pretrain_NLVR.yaml", config)
    return paths


def write_config(path: Path, config: dict) -> Path:
    with path.open("w", encoding="utf-8") as file:
        YAML(typ="safe", pure=True).dump(config, file)
    return path


# ---- the processes ----


def work(rank: int, num_ranks: int, script, flags: list[str], meeting_place: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    sys.argv = ["script", "--device", "cpu", "--dist_url", meeting_place, *flags]
    script.parse_and_run()
    if dist.is_initialized():
        leave_together()
        dist.destroy_process_group()


def run_all(folder: Path) -> None:
    """Every run's output folder has the run's name."""
    paths = make_task_files(folder)

    def go(name: str, script, num_ranks: int, *flags: object) -> None:
        config = paths[script.__name__]
        command = ["--config", str(config), "--output_dir", str(folder / name), *map(str, flags)]
        place = f"file://{folder}/meet_{name}"
        print(f"== {name}", flush=True)
        torch.multiprocessing.start_processes(
            work, (num_ranks, script, command, place), num_ranks, start_method="fork"
        )

    go("pretrain", Pretrain, 1, "--overrides", "schedular.epochs=1")
    pretrained = ("--checkpoint", folder / "pretrain" / "checkpoint_00.pth")
    go("assign", Pretrain_NLVR, 2, *pretrained)
    go(
        "assign_resumed",
        Pretrain_NLVR,
        2,
        "--resume",
        "--checkpoint",
        folder / "assign" / "checkpoint_00.pth",
    )
    assigned = ("--checkpoint", folder / "assign" / "checkpoint_01.pth")
    for name, script, start in (("ve", VE, pretrained), ("nlvr", NLVR, assigned)):
        go(name, script, 2, *start)
        best = ("--checkpoint", folder / name / "checkpoint_best.pth")
        for num_ranks in (1, 2, 3):
            go(f"{name}_{num_ranks}", script, num_ranks, "--evaluate", *best)
        for num_ranks in (1, 3):
            go(f"{name}_before_{num_ranks}", script, num_ranks, "--evaluate", *start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_all(Path(sys.argv[1]))


# ---- what they did ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder with the outputs of every run, and what the runs printed."""
    folder = tmp_path_factory.mktemp("runs")
    done = run_forked(__file__, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    printed = dict(part.partition("\n")[::2] for part in done.stdout.split("== ")[1:])
    return folder, printed


def records_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_text_assignment_writes_a_checkpoint_each_epoch(runs):
    folder, printed = runs
    records = records_of(folder / "assign")
    assert [record["epoch"] for record in records] == [0, 1]
    assert all(0 < record["train_loss"] < 3 and record["train_bad_images"] == 0 for record in records)
    assert {path.name for path in (folder / "assign").glob("*.pth")} == {
        "checkpoint_00.pth",
        "checkpoint_01.pth",
    }
    assert "(pretrain checkpoint)" in printed["assign"] and "ta_head" in printed["assign"]
    before, after = (
        load(folder / "pretrain" / "checkpoint_00.pth"),
        load(folder / "assign" / "checkpoint_01.pth"),
    )
    assert after["model"]["temp"] == before["model"]["temp"]  # no loss reaches it, nothing decays it
    assert torch.equal(after["model"]["vision_proj.weight"], before["model"]["vision_proj.weight"])
    name = "encoder.layer.0.output.dense.weight"
    trained, start = after["model"][f"text_encoder.{name}"], before["model"][f"text_encoder.bert.{name}"]
    assert not torch.equal(trained, start) and torch.allclose(trained, start, atol=0.02)


def test_a_resumed_text_assignment_equals_an_unbroken_one(runs):
    folder, _ = runs
    whole, again = (load(folder / name / "checkpoint_01.pth") for name in ("assign", "assign_resumed"))
    assert records_of(folder / "assign_resumed") == records_of(folder / "assign")[1:]
    for name, value in whole["model"].items():
        assert torch.equal(again["model"][name], value), name


@pytest.mark.parametrize(("task", "classes"), [("ve", VE.CLASSES), ("nlvr", NLVR.CLASSES)])
def test_fine_tuning_keeps_the_best_checkpoint_of_validation(runs, task, classes):
    folder, printed = runs
    records = records_of(folder / task)
    assert [record["epoch"] for record in records] == [0, 1]
    best = max(records, key=lambda record: record["val_acc"])
    checkpoint = load(folder / task / "checkpoint_best.pth")
    assert checkpoint["epoch"] == best["epoch"] and checkpoint["best"]["val_acc"] == best["val_acc"]
    assert load(folder / task / "checkpoint_01.pth")["epoch"] == 1
    result = json.loads((folder / task / "result" / f"{task}.json").read_text())
    assert result["classes"] == list(classes) and "checkpoint_best" in result["weights"]
    for split in ("val", "test"):
        entries = json.loads((folder / "tasks" / f"{task}_{split}.json").read_text())
        confusion, own = best[f"{split}_confusion"], result[split]
        assert own["confusion"] == confusion and own["n"] == NUM_ENTRIES[split] == sum(map(sum, confusion))
        labels = [str(entry["label"]).capitalize() for entry in entries]
        assert [sum(row) for row in confusion] == [labels.count(name.capitalize()) for name in classes]
        right = sum(confusion[i][i] for i in range(len(classes)))
        assert own["acc"] == best[f"{split}_acc"] == pytest.approx(100 * right / NUM_ENTRIES[split])
        assert own["most_frequent_class"] == 100 * max(map(sum, confusion)) / NUM_ENTRIES[split]
        assert own["file"].endswith(f"{task}_{split}.json")
    table = [line.split() for line in printed[task].splitlines()]
    for name, row in zip(classes, result["test"]["confusion"], strict=True):
        assert [name, *map(str, row)] in table


def test_nlvr_tells_consistency_and_writes_what_the_official_script_takes(runs):
    """Of the best epoch, in the order of the entries, whatever the number of ranks."""
    folder, printed = runs
    result = json.loads((folder / "nlvr" / "result" / "nlvr.json").read_text())
    for split in ("val", "test"):
        entries = json.loads((folder / "tasks" / f"nlvr_{split}.json").read_text())
        file = folder / "nlvr" / "result" / f"nlvr_{split}_predictions.csv"
        lines = [line.split(",") for line in file.read_text().splitlines()]
        assert [name for name, _ in lines] == [entry["identifier"] for entry in entries]
        right = [
            answer == str(entry["label"]).capitalize()
            for (_, answer), entry in zip(lines, entries, strict=True)
        ]
        assert result[split]["acc"] == pytest.approx(100 * sum(right) / len(right))
        sentences = {name.split("-")[1] + " " + name.split("-")[3] for name, _ in lines}
        wrong = {
            name.split("-")[1] + " " + name.split("-")[3]
            for (name, _), is_right in zip(lines, right, strict=True)
            if not is_right
        }
        expected = 100 * (1 - len(wrong) / len(sentences))
        assert result[split]["consistency"] == pytest.approx(expected)
        assert f"consistency {expected:.2f}" in printed["nlvr"]
        for num_ranks in (1, 2, 3):
            again = folder / f"nlvr_{num_ranks}" / "result" / file.name
            assert again.read_bytes() == file.read_bytes()
    assert not list((folder / "ve" / "result").glob("*.csv")) and "consistency" not in printed["ve"]


def test_the_predictions_of_a_best_epoch_before_a_resume_are_written_too(runs, tmp_path, monkeypatch):
    folder, _ = runs
    out = shutil.copytree(folder / "nlvr", tmp_path / "nlvr")
    files = sorted((out / "result").glob("*.csv"))
    written = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    flags = ["--device", "cpu", "--config", str(folder / "NLVR.yaml"), "--output_dir", str(out), "--resume"]
    monkeypatch.setattr(sys, "argv", ["NLVR.py", *flags])
    NLVR.parse_and_run()
    assert [path.read_bytes() for path in files] == written and len(files) == 2


@pytest.mark.parametrize("task", ["ve", "nlvr"])
def test_evaluation_repeats_the_scores_on_any_number_of_ranks(runs, task):
    folder, _ = runs
    best = max(records_of(folder / task), key=lambda record: record["val_acc"])
    scores = {key: value for key, value in best.items() if key.startswith(("val_", "test_"))}
    for num_ranks in (1, 2, 3):
        out = folder / f"{task}_{num_ranks}"
        assert records_of(out) == [scores]
        one, other = (
            json.loads((path / "result" / f"{task}.json").read_text()) for path in (out, folder / task)
        )
        assert one["test"] == other["test"] and one["val"] == other["val"]
        assert not list(out.glob("*.pth"))


@pytest.mark.parametrize(("task", "start"), [("ve", "pretrain"), ("nlvr", "pretrain_nlvr")])
def test_scores_before_training_do_not_depend_on_the_ranks(runs, task, start):
    folder, printed = runs
    one, three = (records_of(folder / f"{task}_before_{num_ranks}") for num_ranks in (1, 3))
    assert one == three and len(one) == 1
    assert f"({start} checkpoint)" in printed[f"{task}_before_1"]


def test_nlvr_starts_from_text_assignment_with_its_twins(runs):
    folder, printed = runs
    assert "(pretrain_nlvr checkpoint)" in printed["nlvr"]
    start, trained = (
        load(folder / name)["model"] for name in ("assign/checkpoint_01.pth", "nlvr/checkpoint_01.pth")
    )
    for name in ("visual_encoder.pos_embed", "text_encoder.encoder.layer.2.attention.self.query.weight"):
        part, _, rest = name.partition(".")
        twin = trained[f"{part}_m.{rest}"]  # a few steps of momentum 0.995 away from what it was copied from
        assert 0 < (twin - start[name]).abs().max() < 0.1 * (trained[name] - start[name]).abs().max()


def test_the_scripts_start_from_the_command_line(runs, tmp_path):
    folder, _ = runs
    flags = ["--evaluate", "--config", folder / "VE.yaml", "--output_dir", tmp_path]
    done = run("VE.py", *flags, "--checkpoint", folder / "ve" / "checkpoint_best.pth", num_processes=2)
    assert done.returncode == 0, done.stderr
    assert records_of(tmp_path) == records_of(folder / "ve_1")
