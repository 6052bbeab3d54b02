"""The task scripts run for real: every launch mode, outputs, resume, one rank against several."""

import json
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from timm.scheduler import CosineLRScheduler
from tiny import make_tiny, run, run_forked

import Pretrain
from simla.configs.reader import read_config
from simla.configs.schema import PRETRAIN
from simla.engine.launch import script_arguments
from simla.models.pretrain import SIMLA
from simla.utils import UserError, free_port


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def pretrained(tiny, tmp_path_factory):
    """Two epochs on two ranks."""
    out = tmp_path_factory.mktemp("pretrained")
    done = run(
        "Pretrain.py", "--config", tiny["Pretrain"], "--output_dir", out, num_processes=2, launcher="launch"
    )
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_pretraining_writes_its_outputs(pretrained):
    out, stdout = pretrained
    assert "eta" in stdout
    records = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1]
    for name in ("loss_ita", "loss_itm", "loss_mlm", "loss_mim", "loss_psl", "lr", "bad_images"):
        assert all(isinstance(record[f"train_{name}"], float | int) for record in records)
    steps = [json.loads(line)["step"] for line in (out / "train_steps.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 5, 6]  # 24 samples, 2 ranks of 4, a line every 2 steps and at the end
    assert "code revision" in (out / "config.yaml").read_text()
    config = YAML(typ="safe").load(out / "config.yaml")
    assert config["momentum"] == 0.995 and config["schedular"]["epochs"] == 2
    assert json.loads((out / "run.json").read_text())["chance"] == Pretrain.chance(config)
    assert not list(out.glob(".*"))  # no temporary files left


def test_checkpoints_hold_plain_values_and_published_names(pretrained):
    out, _ = pretrained
    checkpoint = torch.load(out / "checkpoint_01.pth", weights_only=True)  # plain values only, or this raises
    assert {"model", "optimizer", "lr_scheduler", "config", "epoch"} < set(checkpoint)
    assert checkpoint["epoch"] == 1
    assert "text_encoder.bert.embeddings.word_embeddings.weight" in checkpoint["model"]
    assert int(checkpoint["model"]["queue_ptr"]) == 2 * 3 * 2 * 4 % 24
    assert len(checkpoint["optimizer"]["param_groups"]) == 2


def test_code_that_expects_the_published_layout_can_go_on_from_our_checkpoint(pretrained, tiny):
    """Plain torch and timm, as the published scripts resume: model, two AdamW groups, schedule, epoch."""
    out, _ = pretrained
    checkpoint = torch.load(out / "checkpoint_00.pth", weights_only=True)
    config = read_config(str(tiny["Pretrain"]), PRETRAIN)
    model = SIMLA.from_config(config, cls_id=2)
    model.load_state_dict(checkpoint["model"])
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    no_decay = [param for name, param in named if param.ndim == 1 or name.endswith(".bias")]
    decay = [param for name, param in named if not (param.ndim == 1 or name.endswith(".bias"))]
    optimizer = torch.optim.AdamW([{"params": no_decay, "weight_decay": 0.0}, {"params": decay}])
    optimizer.load_state_dict(checkpoint["optimizer"])
    moments = checkpoint["optimizer"]["state"]
    for i, param in enumerate([*no_decay, *decay]):
        if i in moments:
            assert torch.equal(optimizer.state[param]["exp_avg"], moments[i]["exp_avg"])
    assert optimizer.param_groups[1]["lr"] == checkpoint["optimizer"]["param_groups"][1]["lr"] > 0
    schedule = CosineLRScheduler(optimizer, t_initial=2)
    schedule.load_state_dict(checkpoint["lr_scheduler"])
    assert (schedule.t_initial, schedule.warmup_t) == (2, 2)
    assert checkpoint["epoch"] + 1 == 1


def test_resume_continues_at_the_next_epoch(pretrained, tiny, tmp_path):
    out, _ = pretrained
    common = [
        "--config",
        tiny["Pretrain"],
        "--output_dir",
        tmp_path,
        "--checkpoint",
        out / "checkpoint_00.pth",
    ]
    resumed = run("Pretrain.py", *common, "--resume", "True", num_processes=2, launcher="run")
    assert resumed.returncode == 0, resumed.stderr
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [1]
    whole = torch.load(out / "checkpoint_01.pth", weights_only=True)
    again = torch.load(tmp_path / "checkpoint_01.pth", weights_only=True)
    assert again["lr_scheduler"] == whole["lr_scheduler"]
    assert again["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for name, value in whole["model"].items():  # dropout and negatives are drawn anew each epoch: bit for bit
        assert torch.equal(again["model"][name], value), name


def test_a_run_goes_on_with_the_codebook_that_it_began_with(pretrained, tiny, tmp_path, monkeypatch, capfd):
    """Any other one numbers the patches otherwise."""
    out, codebook = pretrained[0], tmp_path / "c.safetensors"

    def pretrain(checkpoint: Path, folder: str, *flags: str) -> None:
        files = "--config", tiny["Pretrain"], "--output_dir", tmp_path / folder, "--checkpoint", checkpoint
        overrides = "--overrides", f"image_tokenizer.path={codebook}", "schedular.epochs=2"
        monkeypatch.setattr(
            sys, "argv", ["Pretrain.py", "--device", "cpu", *map(str, files), *flags, *overrides]
        )
        Pretrain.parse_and_run()

    first, without_mim = out / "checkpoint_00.pth", tmp_path / "checkpoint_00.pth"
    with pytest.raises(UserError, match=r"c.safetensors: the codebook of the training of .*_00.pth is not"):
        pretrain(first, "out", "--resume")
    assert not codebook.exists()
    centres = load_file(tiny["Pretrain"].with_name("codebook.safetensors"))["centres"]
    save_file({"centres": centres.flip(0).contiguous()}, codebook)
    with pytest.raises(UserError, match=r"visual tokens .* not those that .*_00.pth was trained on"):
        pretrain(first, "out", "--resume")
    pretrain(first, "started from it")
    assert "checkpoint_00.pth was trained on: MIM learns them anew" in "".join(capfd.readouterr())

    codebook.unlink()
    checkpoint = torch.load(first, weights_only=True)
    checkpoint["config"]["loss_weights"]["mim"] = 0.0  # MIM begins on resume
    del checkpoint["image_tokenizer"]
    torch.save(checkpoint, without_mim)
    pretrain(without_mim, "out", "--resume")
    assert codebook.exists()


def test_every_rank_count_and_launch_mode_gives_the_same_retrieval_scores(pretrained, tiny, tmp_path):
    out, _ = pretrained
    flags = ["--evaluate", "--config", tiny["Retrieval"], "--checkpoint", out / "checkpoint_01.pth"]
    flags += ["--overrides", "save_scores=true"]
    results = {}
    for name, processes, launcher in (("plain", 0, ""), ("two", 2, "launch"), ("three", 3, "")):
        folder = tmp_path / name
        done = run(
            "zero_shot_retrieval.py",
            *flags,
            "--output_dir",
            folder,
            num_processes=processes,
            launcher=launcher,
        )
        assert done.returncode == 0, done.stderr
        results[name] = json.loads((folder / "result" / "retrieval.json").read_text())
        scores = torch.load(folder / "result" / "retrieval_scores.pt", weights_only=True)
        first = torch.load(tmp_path / "plain" / "result" / "retrieval_scores.pt", weights_only=True)
        for key in scores:
            torch.testing.assert_close(scores[key], first[key], rtol=1e-5, atol=1e-5)
        record = json.loads((folder / "log.txt").read_text())
        assert record["test_r_mean"] == results[name]["r_mean"]
    assert results["plain"] == results["two"] == results["three"]
    assert results["plain"]["n"] == 7
    assert "k_test 3" in done.stdout


def test_scores_before_training_do_not_depend_on_the_ranks_either(tiny, tmp_path):
    results = []
    for processes in (0, 2):
        folder = tmp_path / str(processes)
        flags = ["--evaluate", "--config", tiny["Retrieval"], "--output_dir", folder]
        done = run("zero_shot_retrieval.py", *flags, num_processes=processes)
        assert done.returncode == 0 and "before any training" in done.stdout, done.stderr
        results.append(json.loads((folder / "result" / "retrieval.json").read_text()))
    assert results[0] == results[1]


def test_k_test_above_the_number_of_candidates(pretrained, tiny, tmp_path):
    out, _ = pretrained
    done = run(
        "zero_shot_retrieval.py",
        *("--evaluate", "--config", tiny["Retrieval"], "--checkpoint", out / "checkpoint_01.pth"),
        *("--output_dir", tmp_path, "--overrides", "k_test=1000", "save_scores=true"),
    )
    assert done.returncode == 0, done.stderr
    scores = torch.load(tmp_path / "result" / "retrieval_scores.pt", weights_only=True)
    assert (scores["scores_i2t"] != -100).all() and torch.equal(scores["scores_i2t"], scores["scores_t2i"].T)


def test_slurm_variables(pretrained, tiny, tmp_path):
    """Two tasks as srun starts them: no launcher, only variables."""
    out, _ = pretrained
    command = ["zero_shot_retrieval.py", "--evaluate", "--device", "cpu"]
    command += ["--config", str(tiny["Retrieval"]), "--output_dir", str(tmp_path)]
    command += ["--checkpoint", str(out / "checkpoint_01.pth")]
    shared = {"SLURM_NTASKS": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with ThreadPool(2) as pool:
        tasks = pool.map(
            lambda i: run_forked(*command, env={**shared, "SLURM_PROCID": i, "SLURM_LOCALID": i}), (0, 1)
        )
    assert [task.returncode for task in tasks] == [0, 0], [task.stderr for task in tasks]
    assert json.loads((tmp_path / "result" / "retrieval.json").read_text())["n"] == 7


def test_main_can_be_called_and_an_epoch_does_not_depend_on_the_workers(tiny, tmp_path):
    finals = []
    for workers in (0, 2):
        args = script_arguments(Pretrain.__doc__, "", str(tmp_path / str(workers))).parse_args(
            ["--device", "cpu"]
        )
        overrides = [f"num_workers={workers}", "schedular.epochs=1"]
        before = dict(vars(args))
        Pretrain.main(args, read_config(str(tiny["Pretrain"]), PRETRAIN, overrides))
        assert vars(args) == before  # a caller's flags are the caller's
        finals.append(torch.load(tmp_path / str(workers) / "checkpoint_00.pth", weights_only=True)["model"])
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], False),
        (["--resume"], True),
        (["--resume", "True"], True),
        (["--resume", "False"], False),
        (["--resume", "0"], False),
    ],
)
def test_boolean_flags(flags, expected):
    assert script_arguments("x", "c", "o").parse_args(flags).resume is expected


def test_a_boolean_flag_refuses_other_words(capsys):
    with pytest.raises(SystemExit):
        script_arguments("x", "c", "o").parse_args(["--resume", "perhaps"])
    assert "expected true or false" in capsys.readouterr().err
