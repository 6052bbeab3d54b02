"""Awkward files, most of them Pillow's own: read rightly, or replaced and counted, or left out of scores."""

import errno
import io
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from awkward_images import examine, load_for_training
from awkward_images import main as examine_all
from PIL import Image
from test_exact_resume import make_tasks
from test_ve_nlvr_scripts import write_config
from tiny import ROOT

import Grounding
import NLVR
import Pretrain
import VE
import VQA
import zero_shot_retrieval
from simla.configs.reader import read_config
from simla.configs.schema import RETRIEVAL
from simla.dataset import images
from simla.dataset.images import BadImage, JpegFile, load_image, open_image
from simla.dataset.items import TrainItems
from simla.dataset.retrieval import RetrievalEvalData
from simla.dataset.transforms import TrainTransform, View, crops
from simla.engine.launch import run_script
from simla.utils import UserError

FOLDER = Path(__file__).parent / "awkward"
NOT_READ = {
    "00r1_graya_la.jp2": "damaged",
    "1.eps": "not an image",
    "LICENSE": "not an image",
    "README.md": "not an image",
    "badwidth.bmp": "too many pixels",
    "broken.png": "not an image",
    "broken_data_stream.png": "damaged",
    "chunk_no_fctl.png": "damaged",
    "decompression_bomb.gif": "too many pixels",
    "decompression_bomb.ico": "too many pixels",
    "duplicate_xref_entry.pdf": "not an image",
    "i_trns.png": "one shade",  # 8 bits in 16
    "libtiff_segfault.tif": "not an image",
    "seek_too_large.tif": "damaged",
    "shortfile.bmp": "truncated",
    "test-ole-file.doc": "not an image",
    "truncated_end_chunk.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "zero_bb.eps": "not an image",
    "zero_width.gif": "not an image",
}
FILES = sorted(FOLDER.iterdir())
pytestmark = pytest.mark.filterwarnings("ignore")  # what PIL thinks of such files


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_each_file_is_read_as_pil_converts_it_or_refused_in_training_and_evaluation_alike(path):
    assert examine(path) == (NOT_READ.get(path.name, "read"), "")


def test_the_command_for_a_whole_folder(capsys):
    examine_all(FOLDER)
    printed = capsys.readouterr().out
    assert f"{len(FILES) - len(NOT_READ):5}  read\n" in printed
    assert (
        f"{Counter(NOT_READ.values())['too many pixels']:5}  too many pixels  such as badwidth.bmp" in printed
    )
    assert f"{len(FILES)} files" in printed


# ---- what they show


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(load_image(image) if isinstance(image, Path) else image, np.int16)


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_pictures_that_exif_turns_are_all_upright(suffix):
    upright = pixels(FOLDER / "hopper.jpg")
    for orientation in range(2, 9):
        path = FOLDER / f"hopper_orientation_{orientation}.{suffix}"
        for found in (load_image(path), load_for_training(path)):
            assert np.abs(pixels(found) - upright).mean() < 8, path
    assert np.abs(pixels(FOLDER / "hopper_orientation_2.jpg") - upright[:, ::-1]).mean() > 30


def test_a_picture_that_is_turned_by_a_right_angle_changes_sides():
    with Image.open(FOLDER / "orientation_rectangle.jpg") as image:
        assert image.size == load_image(FOLDER / "orientation_rectangle.jpg").size[::-1] == (2, 1)


def test_adobe_s_inverted_cmyk_is_not_a_negative():
    assert np.abs(pixels(FOLDER / "pil_sample_cmyk.jpg") - pixels(FOLDER / "rgb.jpg")).mean() < 40


def test_transparent_parts_are_white_in_every_kind_of_file():
    for name in ("p_trns_single.png", "1_trns.png", "l_trns.png", "rgb_trns.png", "la.tga"):
        with Image.open(FOLDER / name) as image:
            clear = np.asarray(image.convert("RGBA"))[..., 3] == 0
        assert 0 < clear.mean() < 1, name
        assert (pixels(FOLDER / name)[clear] == 255).all(), name
    for name in ("transparent.webp", "transparency.avif", "first_frame_transparency.gif"):
        assert (pixels(FOLDER / name) == 255).all(-1).any(), name


def test_sixteen_bits_keep_their_shades():
    for name in ("16bit.cropped.tif", "16_bit_binary.pgm", "9bit.j2k", "uint16_1_4660.tif"):
        with Image.open(FOLDER / name) as image:
            deep = np.asarray(image).astype(int)
        assert np.array_equal(pixels(FOLDER / name)[..., 0], deep // 256), name


def test_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    for suffix in ("gif", "png", "webp", "tif", "avif"):
        path = tmp_path / f"moves.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(path) - [250, 0, 0]).max() < 12, suffix
        assert np.array_equal(load_for_training(path), load_image(path)), suffix


def a_jpeg(**options) -> bytes:
    image = Image.open(FOLDER / "hopper.jpg").convert(options.pop("mode", "RGB"))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"progressive": True},
        {"subsampling": "4:1:1"},
        {"subsampling": "4:2:2"},
        {"keep_rgb": True},
        {"restart_marker_blocks": 2},
        {"mode": "CMYK"},
        {"mode": "L", "progressive": True},
        {"comment": b"x" * 60000},
    ],
    ids=str,
)
def test_jpegs_are_decoded_alike_on_both_paths_and_cut_ones_are_truncated_on_both(options):
    content = a_jpeg(**options)
    file = open_image(content, "a.jpg")
    assert isinstance(file, JpegFile) == (options.get("mode") != "CMYK")
    whole = crops(file, [View(None, False, 128)])[0].astype(int)
    assert np.abs(whole - np.asarray(load_image(content))).mean() < 1
    for share in (0.3, 0.6, 0.9, 0.99):
        cut = content[: int(len(content) * share)]
        for res in (16, 128):  # an eighth and the whole
            outcomes = []
            for read in (
                load_image,
                lambda source, res=res: crops(open_image(source), [View(None, False, res)]),
            ):
                try:
                    read(cut)
                    outcomes.append("read")
                except BadImage as error:
                    outcomes.append(error.cause.partition(":")[0])
            assert outcomes[0] == outcomes[1] != "read", (share, res, outcomes)


def test_bytes_and_open_files_are_read_as_the_file_itself():
    path = FOLDER / "hopper.webp"
    with path.open("rb") as file:
        for source in (path.read_bytes(), file, str(path)):
            assert np.array_equal(open_image(source), load_image(path))
    for source, name, expected in (
        (b"", "shard.tar/7.jpg", "shard.tar/7.jpg"),
        (io.BytesIO(b"<p>"), "", "an image"),
    ):
        for read in (load_image, open_image):
            with pytest.raises(BadImage, match=f"^{expected}: (empty file|not an image)"):
                read(source, name)


# ---- what a network loses


class Flaky:
    """Path.read_bytes with an error the first `times` times."""

    def __init__(self, monkeypatch, times: int, number: int):
        self.calls, self.times, self.number, self.waits = 0, times, number, []
        whole = Path.read_bytes
        monkeypatch.setattr(Path, "read_bytes", lambda path: self.read(whole, path))
        monkeypatch.setattr(images.time, "sleep", self.waits.append)

    def read(self, whole, path: Path) -> bytes:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self.number, "of the network", str(path))
        return whole(path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_read_that_the_network_lost_is_tried_again_after_growing_waits(number, monkeypatch):
    flaky = Flaky(monkeypatch, 3, number)
    assert open_image(FOLDER / "hopper.jpg").size == (128, 128)
    assert flaky.waits == sorted(flaky.waits) == list(images.RETRY_SECONDS)
    flaky.calls, flaky.times = 0, 4
    with pytest.raises(BadImage) as error:
        load_image(FOLDER / "hopper.jpg")
    assert (error.value.cause, flaky.calls) == ("cannot be read: of the network", 4)


def test_a_wrong_path_is_not(monkeypatch):
    flaky = Flaky(monkeypatch, 0, 0)
    for path, cause in ((FOLDER / "none.jpg", "no such file"), (FOLDER, "cannot be read: Is a directory")):
        with pytest.raises(BadImage) as error:
            open_image(path)
        assert error.value.cause == cause
    assert flaky.waits == []


# ---- training and evaluation


def test_training_replaces_what_cannot_be_read(tmp_path):
    names = ["empty.jpg", "page.jpg", "gone.jpg", *(path.name for path in FILES)]
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>404 Not Found</html>")
    paths = [str((tmp_path if (FOLDER / name) not in FILES else FOLDER) / name) for name in names]
    entries = [{"images": [path], "text": "a picture", "where": path} for path in paths]
    items = TrainItems(entries, TrainTransform(32), seed=0)
    wrong = {"empty.jpg": "empty file", "page.jpg": "not an image", "gone.jpg": "no such file", **NOT_READ}
    for index, name in enumerate(names):
        item = items[(0, index)]
        assert item["images"].shape == (1, 3, 32, 32) and item["images"].dtype == torch.uint8
        own = {Path(path).name: cause.partition(":")[0] for path, cause in item["bad"]}
        assert own.items() <= wrong.items() and (name in own) == (name in wrong), name
        assert Path(item["files"][0]).name not in wrong


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """Every task's tiny files and configs, where one image of each test file cannot be read."""
    folder = tmp_path_factory.mktemp("tasks")
    configs = make_tasks(folder)
    for name in ("retrieval", "grounding", "vqa", "nlvr", "ve"):
        entry = json.loads((folder / "data" / f"{name}_test.json").read_text())[1]
        image = entry["images"][1] if "images" in entry else entry["image"]
        path = folder / "data" / ("images" if name == "ve" else "") / image
        (path.with_name(path.name + ".jpg") if name == "ve" else path).write_bytes(b"")
    return folder, configs


def evaluate(monkeypatch, tasks, script, out: Path, *overrides: str) -> dict:
    """The script's result file after --evaluate, with the same random weights each time."""
    folder, configs = tasks
    name = script.__name__ if script is not zero_shot_retrieval else "Retrieval"
    config = write_config(folder / f"{name}.yaml", configs[name])
    flags = ["--device", "cpu", "--config", str(config), "--output_dir", str(out), "--evaluate"]
    block = ["--block_num", "1"] if script is Grounding else []
    monkeypatch.setattr(sys, "argv", ["script", *flags, *block, "--overrides", *overrides])
    script.parse_and_run()
    return json.loads((out / "result" / RESULTS[script]).read_text())


RESULTS = {
    zero_shot_retrieval: "retrieval.json",
    Grounding: "grounding.json",
    VQA: "vqa_accuracy.json",
    NLVR: "nlvr.json",
    VE: "ve.json",
}


@pytest.mark.parametrize("script", RESULTS, ids=lambda script: script.__name__)
def test_evaluation_leaves_out_what_it_is_told_to_and_says_so(script, tasks, monkeypatch, tmp_path, capsys):
    """The scores are those of a test file without the entries."""
    with pytest.raises(UserError, match=r"empty file; .* entry .* skip_unreadable: true"):
        evaluate(monkeypatch, tasks, script, tmp_path / "stops")
    found = evaluate(monkeypatch, tasks, script, tmp_path / "skips", "skip_unreadable=true")
    printed = capsys.readouterr().out
    assert "empty file" in printed and "entries are left out" in printed
    folder, configs = tasks
    overrides = []
    for split in ("val", "test") if script in (NLVR, VE) else ("test",):
        file = Path(
            configs["Retrieval" if script is zero_shot_retrieval else script.__name__][f"{split}_file"]
        )
        entries = json.loads(file.read_text(encoding="utf-8"))
        kept = [entry for entry in entries if all(map(is_good, files_of(entry, folder / "data")))]
        (folder / "data" / f"kept_{file.name}").write_text(json.dumps(kept))
        overrides.append(f"{split}_file={folder / 'data'}/kept_{file.name}")
        of_split = found[split] if script in (NLVR, VE) else found
        assert of_split["left_out"] == len(entries) - len(kept)
        if script is not Grounding:
            assert of_split["n"] == len(kept)
        assert split == "val" or 0 < len(kept) < len(entries)
    expected = evaluate(monkeypatch, tasks, script, tmp_path / "kept", *overrides)
    for result in (found, expected):
        for part in (result, *(result[split] for split in ("val", "test") if script in (NLVR, VE))):
            part.pop("left_out", None), part.pop("file", None), part.pop("test_file", None)
    assert found == expected


def files_of(entry: dict, data: Path) -> list[Path]:
    if "images" in entry:
        return [data / image for image in entry["images"]]
    is_ve = "label" in entry
    return [data / "images" / f"{entry['image']}.jpg" if is_ve else data / entry["image"]]


def is_good(path: Path) -> bool:
    return path.stat().st_size > 0


def test_nothing_left_to_evaluate_is_an_error(tasks, tmp_path):
    entries = [{"image": f"{i}.jpg", "caption": ["a"]} for i in range(3)]
    (tmp_path / "test.json").write_text(json.dumps(entries))
    flags = [f"test_file={tmp_path}/test.json", "skip_unreadable=true"]
    config = read_config(str(write_config(tmp_path / "c.yaml", tasks[1]["Retrieval"])), RETRIEVAL, flags)
    with pytest.raises(
        UserError, match=r"3 of 3 images cannot be read, such as .*0.jpg: no such file; no entry"
    ):
        RetrievalEvalData(config["test_file"], config)


# ---- two ranks


def work(rank: int, script, out: Path, flags: list[str]) -> None:
    with (out / f"printed_{rank}.txt").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    command = ["--device", "cpu", "--output_dir", str(out), "--dist_url", f"file://{out}/meet"]
    sys.argv = ["script", *command, *flags]
    run_script(script.parse_and_run)


def run_on_two_ranks(folder: Path) -> None:
    """The evaluation and the training of the tests below, in the folder's `scores` and `stops`."""
    jobs = {
        "scores": (zero_shot_retrieval, "Retrieval", ["--evaluate", "--overrides", "skip_unreadable=true"]),
        "stops": (Pretrain, "Pretrain", ["--overrides", "batch_size=100", f"train_file={folder}/half.json"]),
    }
    for name, (script, config, flags) in jobs.items():
        (folder / name).mkdir()
        flags = ["--config", str(folder / f"{config}.yaml"), *flags]
        ranks = [
            multiprocessing.Process(target=work, args=(rank, script, folder / name, flags)) for rank in (0, 1)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
            rank.kill()
        (folder / name / "codes.json").write_text(json.dumps([rank.exitcode for rank in ranks]))


@pytest.fixture(scope="module")
def two_ranks(tasks) -> Path:
    folder, configs = tasks
    for name in ("Retrieval", "Pretrain"):
        write_config(folder / f"{name}.yaml", configs[name])
    good = str(FOLDER / "hopper.jpg")
    entries = [{"image": good if i % 8 else "none.jpg", "caption": "a picture"} for i in range(1200)]
    (folder / "half.json").write_text(json.dumps(entries))
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def test_two_ranks_leave_out_the_same_images_and_score_as_one(two_ranks, tasks, monkeypatch, tmp_path):
    assert json.loads((two_ranks / "scores" / "codes.json").read_text()) == [0, 0]
    found = json.loads((two_ranks / "scores" / "result" / "retrieval.json").read_text())
    assert found["left_out"] == 1
    assert found == evaluate(monkeypatch, tasks, zero_shot_retrieval, tmp_path, "skip_unreadable=true")


def test_ranks_stop_together_over_too_many_bad_images(two_ranks):
    out = two_ranks / "stops"
    assert json.loads((out / "codes.json").read_text()) == [1, 1]
    sentences = set()
    for rank in (0, 1):
        printed = (out / f"printed_{rank}.txt").read_text()
        assert "none.jpg (no such file)" in printed and "Traceback" not in printed
        assert "lost rank" not in printed
        sentences.add(printed.split(f"error (rank {rank}): ")[1].split("; the last one: ")[0])
    (sentence,) = sentences  # of the images of both
    assert sentence.endswith("images of this epoch could not be read, more than max_bad_fraction 0.05")
    assert int(sentence.split()[2]) >= 500 and not list(out.glob("checkpoint_*"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork")
    run_on_two_ranks(Path(sys.argv[1]))
