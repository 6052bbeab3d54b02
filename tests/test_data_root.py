"""Where the files of a config and the images of annotation files are looked for, in every task."""

import json
import shutil
from pathlib import Path

import pytest
from test_exact_resume import make_tasks
from test_ve_nlvr_scripts import write_config
from tiny import ROOT

from simla.configs import reader as config_module
from simla.configs.reader import read_config, task_of
from simla.configs.schema import DATA, OTHER, TABLES
from simla.dataset.grounding import GroundingEvalData, grounding_loader
from simla.dataset.nlvr import read_nlvr
from simla.dataset.pretrain import code_views, pretrain_loader, read_pairs, read_sets
from simla.dataset.retrieval import RetrievalEvalData, retrieval_loader
from simla.dataset.text import build_tokenizer
from simla.dataset.ve import read_ve
from simla.dataset.vqa import VQAEvalData, read_answer_list, vqa_loader
from simla.engine.run_record import save_config

SHIPPED = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.stem != "common")


def table_of(path: Path) -> dict:
    return TABLES[task_of(path.name)]


def paths_in(config: dict, table: dict, root: str) -> dict[str, list[str]]:
    """Return the keys with that root that are set."""
    named = {name: config[name] for name, key in table.items() if key.root == root}
    lists = {name: value if isinstance(value, list) else [value] for name, value in named.items()}
    return {name: [v for v in values if isinstance(v, str) and v] for name, values in lists.items()}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_config_takes_a_data_root(path):
    table = table_of(path)
    plain, moved = (read_config(str(path), table, flags) for flags in ([], ["data_root=/sets"]))
    before = paths_in(plain, table, DATA)
    assert before["train_file"]
    for name, files in paths_in(moved, table, DATA).items():
        if not before[name]:
            assert files == (["/sets"] if name == "image_root" else [])
        else:
            assert files == [f"/sets/{file}" for file in before[name]], name
    assert paths_in(moved, table, OTHER) == paths_in(plain, table, OTHER)
    assert moved["bert_config"] == plain["bert_config"]


def test_every_key_that_names_a_file_or_a_folder_is_marked():
    for table in TABLES.values():
        for name, key in {**table, **table.get("image_tokenizer", config_module.Key({}, {})).type}.items():
            names_one = name.endswith(("_file", "_root", "_data", "_list", "_encoder")) or name in (
                "bert_config",
                "path",
            )
            assert bool(key.root) == (names_one and name != "data_root"), name


def test_variables_and_home_are_filled_in_everywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("SETS", "/sets")
    monkeypatch.setenv("HOME", "/home/me")
    path = write_config(
        tmp_path / "c.yaml",
        {
            "image_res": 256,
            "data_root": "$SETS/all",
            "train_file": ["a.json", "~/b.json", "${SETS}/c.json", "s3://d.tar", "pipe:cat $X/{0..9}.tar"],
            "image_tokenizer": {"path": "~/codes/encoder.pkl"},
            "text_encoder": "./bert",
            "image_encoder": "$SETS/vit.pth",
            "bert_config": "~/bert.json",
            "optimizer": {"lr": 1},
            "schedular": {"epochs": 1},
        },
    )
    config = read_config(str(path), TABLES["Pretrain"])
    local, others = config["train_file"][:3], config["train_file"][3:]
    assert local == ["/sets/all/a.json", "/home/me/b.json", "/sets/c.json"]
    assert others == ["s3://d.tar", "pipe:cat $X/{0..9}.tar"]
    overrides = ["train_file=[{path: '{0..9}.tar', weight: 1}, {path: [~/b.json, 'pipe:x'], weight: 2}]"]
    assert read_config(str(path), TABLES["Pretrain"], overrides)["train_file"] == [
        {"path": "/sets/all/{0..9}.tar", "weight": 1},
        {"path": ["/home/me/b.json", "pipe:x"], "weight": 2},
    ]
    assert (config["data_root"], config["image_root"]) == ("/sets/all", "/sets/all")
    assert config["image_tokenizer"]["path"] == "/home/me/codes/encoder.pkl"
    assert config["image_encoder"] == "/sets/vit.pth" and config["bert_config"] == "/home/me/bert.json"
    assert config["text_encoder"] == "./bert"  # a folder; "bert" would be looked up on the hub
    rooted = read_config(str(path), TABLES["Pretrain"], ["image_root=pictures"])
    assert rooted["image_root"] == "/sets/all/pictures"


def test_the_copy_beside_the_results_means_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, table = str(ROOT / "configs" / "VQA.yaml"), TABLES["VQA"]
    config = read_config(source, table, ["data_root=sets", "vg_root=''"])
    assert config["train_file"][0] == f"{tmp_path}/sets/data/vqa_train.json"
    save_config(config, str(tmp_path))
    assert read_config(str(tmp_path / "config.yaml"), table) == config


@pytest.fixture(scope="module")
def moved(tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """The tiny data set of every task with its lists in one folder of a root and its images in another; paths
    in lists and configs are relative to the root.
    """
    folder = tmp_path_factory.mktemp("moved")
    configs, root = make_tasks(folder), folder / "data"
    (root / "lists").mkdir()
    for file in root.glob("*.json"):
        shutil.move(file, root / "lists" / file.name)

    def relative(value: object) -> object:
        if isinstance(value, list):
            return [relative(part) for part in value]
        if not isinstance(value, str) or not value.startswith(f"{root}/"):
            return "" if value == str(root) else value
        inside = value.removeprefix(f"{root}/")
        return f"lists/{inside}" if (root / "lists" / inside).is_file() else inside

    for name, config in configs.items():
        outside = {"text_encoder": config["text_encoder"], "refcoco_data": "."}
        values = {key: relative(value) for key, value in config.items()}
        values |= {key: value for key, value in outside.items() if key in config}
        configs[name] = values | {"data_root": str(root)}
    return root, configs


def config_of(moved: tuple, name: str) -> dict:
    root, configs = moved
    return read_config(str(write_config(root.parent / f"{name}.yaml", configs[name])), TABLES[name])


def assert_found(entries, expected: int | None = None) -> None:
    files = [file for entry in entries for file in entry["images"]]
    assert files and (expected is None or len(files) == expected)
    assert all(Path(file).is_file() for file in files), files


def assert_readable(loader, names_bad: int = 0) -> None:
    bad = [pair for batch in loader for pair in batch["bad"]]
    assert len(bad) == names_bad, bad


def test_pretraining(moved):
    config = config_of(moved, "Pretrain")
    tokenizer = build_tokenizer(config["text_encoder"])
    entries = read_sets(config["train_file"], image_root=config["image_root"])
    assert_found(map(entries.__getitem__, range(len(entries))))
    assert_readable(pretrain_loader(entries, config, tokenizer, 32, 0))
    assert len(list(code_views(entries, 32, num_images=3))) == 3
    config = config_of(moved, "Pretrain_NLVR")
    assert_found(read_pairs(config["train_file"], config["image_root"]))


def test_retrieval(moved):
    config = config_of(moved, "Retrieval")
    tokenizer = build_tokenizer(config["text_encoder"])
    assert_readable(retrieval_loader(config, tokenizer, 0))
    assert_found(RetrievalEvalData(config["test_file"], config).entries, 7)


def test_grounding(moved):
    config = config_of(moved, "Grounding")
    tokenizer = build_tokenizer(config["text_encoder"])
    assert_readable(grounding_loader(config, tokenizer, 0))
    data = GroundingEvalData(config)
    assert_found(data.entries)
    assert data.targets[0].candidates


def test_questions(moved):
    config = config_of(moved, "VQA")
    tokenizer = build_tokenizer(config["text_encoder"])
    assert_readable(vqa_loader(config, tokenizer, 0))
    assert_found(VQAEvalData(config["test_file"], config, is_test=True).entries)
    assert read_answer_list(config["answer_list"], tokenizer, config["eos"], 64).texts


def test_pairs_and_entailment(moved):
    config = config_of(moved, "NLVR")
    assert_found(read_nlvr(config["test_file"], config["image_root"]))
    config = config_of(moved, "VE")  # with an image_root, itself relative
    assert config["image_root"] == str(moved[0] / "images")
    assert_found(read_ve(config["test_file"], config["image_root"]))


def test_an_image_root_goes_before_the_data_root_and_an_absolute_path_before_both(tmp_path):
    for folder in ("root", "root/pictures", "root/lists"):
        (tmp_path / folder).mkdir()
    entries = [{"image": "a.jpg", "caption": "a"}, {"image": "/abs/b.jpg", "caption": "b"}]
    (tmp_path / "root" / "lists" / "train.json").write_text(json.dumps(entries))
    for flags, folder in (
        ([f"data_root={tmp_path}/root", "image_root=pictures"], tmp_path / "root" / "pictures"),
        ([f"data_root={tmp_path}/root", "image_root=/else"], Path("/else")),
        ([f"data_root={tmp_path}/root"], tmp_path / "root"),
        ([], tmp_path / "root" / "lists"),
    ):
        file = "lists/train.json" if flags else f"{tmp_path}/root/lists/train.json"
        path, table = str(ROOT / "configs" / "Pretrain.yaml"), TABLES["Pretrain"]
        config = read_config(path, table, [*flags, f"train_file={file}"])
        found = read_pairs(config["train_file"], config["image_root"])
        assert [entry["images"] for entry in found] == [[f"{folder}/a.jpg"], ["/abs/b.jpg"]]
