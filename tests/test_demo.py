"""`make demo` from end to end on a tiny data set: what it starts, and what it leaves behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tiny import make_tiny

import Pretrain
import zero_shot_retrieval
from simla import plots
from simla.configs.reader import read_yaml
from simla.demo import pretrain as demo
from simla.utils import UserError


@pytest.fixture
def tiny_demo(tmp_path, monkeypatch):
    """The demo over the tiny data set, its task scripts called in this process."""
    paths = make_tiny(tmp_path)
    monkeypatch.setattr(demo, "CONFIGS", tmp_path)
    monkeypatch.setattr(demo, "DATA", paths["data"])
    monkeypatch.setattr(demo, "make_demo", lambda data, workers: None)
    with paths["Retrieval"].open("a") as file:
        file.write("save_scores: true\n")
    started = []

    def launch(script, *arguments):
        started.append((script, arguments))
        monkeypatch.setattr(sys, "argv", [script, "--device", "cpu", *arguments])
        {"Pretrain.py": Pretrain, "zero_shot_retrieval.py": zero_shot_retrieval}[script].parse_and_run()

    monkeypatch.setattr(demo, "launch", launch)
    monkeypatch.setattr(demo, "num_processes", lambda: 8)  # batches of 32 / 8
    return paths, started


def test_demo(tiny_demo, tmp_path, monkeypatch, capsys):
    _, started = tiny_demo
    out = tmp_path / "out"
    out.mkdir()
    (out / "train_steps.jsonl").write_text("left over from an earlier run\n")
    (out / "codebook.safetensors").write_text("left over, too")
    monkeypatch.setattr(sys, "argv", ["simla.demo.pretrain", "--output_dir", str(out)])
    monkeypatch.setattr(demo, "gallery", lambda out, gallery=demo.gallery: gallery(out, 3, 2))
    demo.main()
    assert [script for script, _ in started] == [
        "zero_shot_retrieval.py",
        "Pretrain.py",
        "zero_shot_retrieval.py",
    ]

    summary = json.loads((out / "summary.json").read_text())
    scores = summary["zero_shot_retrieval"]
    assert set(summary) == {"zero_shot_retrieval", "seconds"}
    assert set(scores) == {"n", *demo.METRICS, "before", "chance"}
    assert scores["n"] == 7 and set(scores["before"]) == set(scores["chance"]) == set(demo.METRICS)
    assert scores["chance"]["img_r1"] == pytest.approx(100 / 7)
    after = json.loads((out / "after" / "result" / "retrieval.json").read_text())
    assert all(scores[name] == after[name] for name in demo.METRICS)
    for picture in ("gallery.png", "losses.png"):
        assert np.asarray(Image.open(out / picture).convert("L")).std() > 5
    table = capsys.readouterr().out
    assert "chance  before   after" in table and "r_mean" in table


def test_the_gallery_asks_each_scene_s_own_caption(tiny_demo, tmp_path, monkeypatch):
    """With perfect scores the first picture is the right one for every query."""
    import torch

    paths, _ = tiny_demo
    entries = json.loads((paths["data"] / "retrieval_test.json").read_text())
    owner = [image for image, entry in enumerate(entries) for _ in entry["caption"]]
    folder = tmp_path / "out" / "after" / "result"
    folder.mkdir(parents=True)
    perfect = torch.nn.functional.one_hot(torch.tensor(owner), len(entries)).float()
    torch.save({"scores_i2t": perfect.T, "scores_t2i": perfect}, folder / "retrieval_scores.pt")
    drawn = {}
    names = ("queries", "results", "right", "out", "title")
    monkeypatch.setattr(plots, "plot_gallery", lambda *given: drawn.update(zip(names, given, strict=True)))
    demo.gallery(tmp_path / "out", num_queries=3, num_results=2)
    assert drawn["queries"] == [entries[image]["caption"][0] for image in (0, 2, 4)]
    assert drawn["right"] == [[True, False]] * 3
    for image, files in zip((0, 2, 4), drawn["results"], strict=True):
        assert files[0].endswith(entries[image]["image"])


PROCESS = """
import os, signal, sys, time
rank, event = os.environ["RANK"], sys.argv[1]
if event == "interrupt":
    print("SIGINT is ignored:", signal.getsignal(signal.SIGINT) == signal.SIG_IGN, flush=True)
    def stop(*_):
        print("stopped by SIGTERM", file=sys.stderr)
        sys.exit(int(sys.argv[2]))
    signal.signal(signal.SIGTERM, stop)
    ready = os.path.join(os.path.dirname(__file__), "ready")
    if rank == "0":
        open(ready, "w").close()
    else:
        while not os.path.exists(ready):
            time.sleep(0.01)
        os.kill(os.getppid(), getattr(signal, sys.argv[3]))
    time.sleep(60)
if event == "fail" and rank == "1":
    sys.exit("error: no such file")
time.sleep(0 if event == "done" else 60)
"""


@pytest.fixture
def launch_process(tmp_path, monkeypatch):
    """demo.launch of PROCESS on two ranks, with what it is to do."""
    (tmp_path / "process.py").write_text(PROCESS)
    monkeypatch.setattr(demo, "num_processes", lambda: 2)
    monkeypatch.setattr(demo, "GRACE_SECONDS", 0.2)
    return lambda *event: demo.launch(str(tmp_path / "process.py"), *event)


def test_a_script_that_fails_ends_the_demo(launch_process, capsys):
    """Its other processes, too, which may wait for the one that failed."""
    launch_process("done")
    with pytest.raises(UserError, match=r"process.py failed"):
        launch_process("fail")
    assert capsys.readouterr().err == "error: no such file\n"


@pytest.mark.parametrize(
    ("code", "shown", "name"), [("75", False, "SIGINT"), ("1", True, "SIGINT"), ("75", False, "SIGTERM")]
)
def test_a_stop_is_told_to_the_processes_and_shows_only_what_went_wrong(
    launch_process, capfd, code, shown, name
):
    with pytest.raises(KeyboardInterrupt):
        launch_process("interrupt", code, name)
    said = capfd.readouterr()
    assert said.out.count("SIGINT is ignored: True") == 2
    assert said.err == "stopped by SIGTERM\n" * 2 * shown


def test_an_interrupted_demo_goes_on(tiny_demo, tmp_path, monkeypatch, capsys):
    """In the middle of training, whose run is resumed; of another seed, it is refused."""
    _, started = tiny_demo
    monkeypatch.setattr(demo, "gallery", lambda out: None)
    out, launch = tmp_path / "out", demo.launch

    def interrupted(script, *arguments):
        launch(script, *arguments)
        if script == "Pretrain.py":
            (out / "checkpoint_01.pth").unlink()  # as if it had not come there
            raise KeyboardInterrupt

    def call(*flags):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["simla.demo.pretrain", "--output_dir", str(out), *flags])
        demo.main()

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "launch", interrupted)
        call()
    seconds = json.loads((out / "stage.json").read_bytes())["seconds"]
    with pytest.raises(UserError, match=r"is of seed 42; give seed 43 another --output_dir"):
        call("--seed", "43")
    call()
    assert [script for script, _ in started] == ["Pretrain.py", "zero_shot_retrieval.py"]
    assert "--resume" in started[0][1]
    assert "checkpoint_00.pth: epoch 1" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_bytes())["seconds"] >= seconds
    call()
    assert started == [] and "done already; delete" in capsys.readouterr().out


def test_what_the_drawing_processes_import_is_little():
    """The scripts that start them, and the data set; not torch, which takes seconds and memory."""
    code = "import sys, simla.demo.all_tasks; print({'torch', 'cv2'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_demo_configs_have_the_same_sizes():
    """The retrieval model loads what pre-training saved."""
    pretrain, retrieval = (read_yaml(f"configs/demo/{name}.yaml") for name in ("Pretrain", "Retrieval"))
    for key in ("image_res", "vision_width", "vit", "bert_config", "embed_dim", "queue_size", "text_encoder"):
        assert pretrain[key] == retrieval[key], key
