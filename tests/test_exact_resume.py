"""A run that is stopped and resumed ends, to the bit, as one that is not: every training script, wherever it
stops, on 1 and 2 processes. What changes at a resume, and what grad_accumulation_steps means.

Run as a script (`test_exact_resume.py FOLDER`) this file is those runs: one process imports everything, makes
the data and forks the ranks of each run, since the imports take longer than the work.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ruamel.yaml import YAML
from test_safe_load import omega
from test_ve_nlvr_scripts import load, records_of, write_config
from tiny import MODEL, make_tiny, run_forked

import Grounding
import NLVR
import Pretrain
import Pretrain_NLVR
import Retrieval
import VE
import VQA
import zero_shot_retrieval
from simla.checkpoint.save import Saver, load_checkpoint
from simla.dataset.prepare.__main__ import main as prepare
from simla.dataset.text import build_tokenizer
from simla.engine import training
from simla.engine.exit import RESUMABLE
from simla.engine.launch import run_script

SCRIPTS = {
    module.__name__: module for module in (Pretrain, Retrieval, Grounding, VQA, Pretrain_NLVR, NLVR, VE)
}
DATA = {  # what each script's files are called, and the splits it evaluates
    "Pretrain": ("pretrain", ()),
    "Retrieval": ("retrieval", ("val", "test")),
    "Grounding": ("grounding", ("test",)),
    "VQA": ("vqa", ("val", "test")),
    "Pretrain_NLVR": ("pretrain", ()),
    "NLVR": ("nlvr", ("val", "test")),
    "VE": ("ve", ("val", "test")),
}
NUM_SAMPLES, EPOCHS = 24, 2
BATCH, STEPS = 8, 3  # of a step, over all ranks and its batches; of an epoch


def make_tasks(folder: Path) -> dict[str, dict]:
    """The tiny data set, cut to NUM_SAMPLES for each script, and configs by script; batches are of BATCH."""
    paths = make_tiny(folder)
    data = paths["data"]
    for name in {name for name, _ in DATA.values()}:
        train = json.loads((data / f"{name}_train.json").read_text())
        if name == "ve":  # one image cannot be read, so that the account of those is resumed too
            (data / "images" / "train" / "broken.jpg").write_text("no image")
            train[3]["image"] = "train/broken"
        if name == "grounding":
            train += train[: NUM_SAMPLES - len(train)]
        (data / f"{name}_train.json").write_text(json.dumps(train[:NUM_SAMPLES]))
    training = {
        "text_encoder": str(data / "bert"),
        "optimizer": {"lr": 1e-3},
        "schedular": {"epochs": EPOCHS, "warmup_epochs": 2, "warmup_step_size": 1},
    }
    configs = {"Pretrain": YAML(typ="safe").load(paths["Pretrain"]) | {"batch_size": BATCH}}
    for script in SCRIPTS.keys() - {"Pretrain"}:
        name, splits = DATA[script]
        files = {f"{split}_file": str(data / f"{name}_{split}.json") for split in ("train", *splits)}
        sizes = {"batch_size_train": BATCH} | ({"batch_size_test": 4} if splits else {})
        contrasts = script in ("Retrieval", "Grounding", "Pretrain_NLVR")
        left_out = () if contrasts else ("embed_dim", "queue_size")
        model = {key: value for key, value in MODEL.items() if key not in left_out}
        configs[script] = {**model, **files, **training, **sizes}
    configs["Grounding"] |= {"refcoco_data": str(data), "det_file": str(data / "refcoco+" / "dets.json")}
    configs["VQA"] |= {"answer_list": str(data / "vqa_answer_list.json"), "k_test": 3}
    configs["Retrieval"]["k_test"] = 3
    configs["VE"]["image_root"] = str(data / "images")
    return configs


# ---- the processes ----


def interfere(script: str, rank: int, note: Callable, call: int, on: tuple[int, ...], how: str) -> None:
    """In the process of a rank: `note` hears what each batch holds, and on the ranks `on` the process sends
    itself SIGTERM as it comes to batch number `call`, from 1.

    how "evaluation": as it comes to that part of the evaluations; "kill": SIGKILL instead, once what was
    saved is on the disk; "forget": the random state is not taken up.
    """
    module = SCRIPTS[script]
    counts = Counter()

    def count(kind: str) -> None:
        counts[kind] += 1
        if counts[kind] == call and rank in on and (kind == "evaluation") == (how == "evaluation"):
            if how == "kill":
                Saver.wait()
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGTERM)

    def losses(model, batch: dict, *rest, original=module.losses) -> dict:
        note(batch["where"])
        count("batch")
        return original(model, batch, *rest)

    def evaluation(original: Callable, *args, **kwargs) -> object:
        count("evaluation")
        return original(*args, **kwargs)

    module.losses = losses
    VE.evaluate = NLVR.evaluate = partial(evaluation, VE.evaluate)
    zero_shot_retrieval.rerank = partial(evaluation, zero_shot_retrieval.rerank)
    if how == "forget":
        training.set_random_state = lambda *_: None


def work(
    script: str, rank: int, num_ranks: int, command: list[str], out: Path, number: int, event: dict
) -> None:
    with (out / f"run_{number}.txt").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

    def note(where: list[str]) -> None:
        with (out / "batches.jsonl").open("a") as file:
            file.write(json.dumps({"run": number, "rank": rank, "where": where}) + "\n")

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)}
    sys.argv = [f"{script}.py", *command]
    interfere(script, rank, note, **event)
    run_script(SCRIPTS[script].parse_and_run)


class Runner:
    """Runs scripts. A run's output folder has its name, and beside the outputs of the script, for every time
    it was started, run_0.txt, run_1.txt, ...: what was printed, and batches.jsonl, what was trained on.
    """

    TIMEOUT = 100  # seconds: a run takes one or two

    def __init__(self, folder: Path, configs: dict[str, dict]):
        self.folder, self.configs = folder, configs

    def __call__(
        self,
        name: str,
        script: str,
        num_ranks: int,
        *flags: object,
        ends: tuple[int, ...] = (0, 0, 0),
        call: int = 0,
        on: tuple[int, ...] = (0, 1),
        how: str = "",
        **changes: object,
    ) -> None:
        """ends: the exit codes to be, by rank; call, on, how: see `interfere`; changes: other config values,
        `__` in place of a dot.
        """
        out = self.folder / name
        out.mkdir(exist_ok=True)
        number = len(list(out.glob("run_*.txt")))
        config = dict(self.configs[script])
        size = "batch_size" if script == "Pretrain" else "batch_size_train"
        config[size] //= num_ranks * changes.get("grad_accumulation_steps", 1)
        command = ["--device", "cpu", "--config", str(write_config(out / "given.yaml", config))]
        command += ["--output_dir", str(out), "--dist_url", f"file://{out}/meet_{number}", *map(str, flags)]
        command += ["--block_num", "1"] if script == "Grounding" else []
        command += ["--overrides", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
        event = {"call": call, "on": on, "how": how}
        ranks = [
            multiprocessing.Process(target=work, args=(script, rank, num_ranks, command, out, number, event))
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(self.TIMEOUT)
            rank.kill()
            rank.join()
        codes = tuple(rank.exitcode for rank in ranks)
        printed = (out / f"run_{number}.txt").read_text()
        assert codes == ends[:num_ranks], f"{name}, run {number}: exit codes {codes}\n{printed[-3000:]}"


STOPS = (RESUMABLE,) * 3


def whole_and_stopped(
    run: Runner, name: str, script: str, num_ranks: int, stops: tuple[int, ...], **changes: object
) -> None:
    """One run unbroken, one that is stopped in those steps, counted from 1, and resumed each time. Of several
    ranks one alone hears the signal, by turns.
    """
    run(f"{name}_whole", script, num_ranks, save_every_steps=1, keep_last=99, **changes)
    num_batches = changes.get("grad_accumulation_steps", 1)
    done, flags = 0, ()
    for number, step in enumerate(stops):
        when = {"call": (step - done - 1) * num_batches + 1, "on": ((number + 1) % num_ranks,)}
        run(name, script, num_ranks, *flags, ends=STOPS, keep_last=99, **when, **changes)
        done, flags = step, ("--resume",)
    run(name, script, num_ranks, *flags, keep_last=99, **changes)


# ---- their stories, by name; each stands alone ----

VARIANTS = (
    ("Pretrain_accumulating_1", "Pretrain", 1, {"grad_accumulation_steps": 2}),
    ("Pretrain_accumulating_2", "Pretrain", 2, {"grad_accumulation_steps": 2}),
    ("VE_accumulating_2", "VE", 2, {"grad_accumulation_steps": 2}),
    ("VE_bf16", "VE", 1, {"precision": "bf16"}),
    ("VE_fp16", "VE", 2, {"precision": "fp16"}),
    ("Pretrain_3", "Pretrain", 3, {"batch_size": 2}),
    ("VE_3", "VE", 3, {"batch_size_train": 2}),
    ("Retrieval_fp16", "Retrieval", 1, {"precision": "fp16"}),
)
STORIES: dict[str, Callable] = {}  # (run, name) -> None


def told(story: Callable) -> Callable:
    STORIES[story.__name__] = story
    return story


for script in SCRIPTS:
    for num_ranks in (1, 2):
        STORIES[f"{script}_{num_ranks}"] = partial(
            whole_and_stopped,
            script=script,
            num_ranks=num_ranks,
            stops=(2, STEPS, STEPS + 1),  # in an epoch, at its end before the evaluation, in the next one
        )
for name, script, num_ranks, changes in VARIANTS:
    STORIES[name] = partial(
        whole_and_stopped, script=script, num_ranks=num_ranks, stops=(2, STEPS + 1), **changes
    )


@told
def every_step(run: Runner, name: str) -> None:
    for step in range(1, STEPS * EPOCHS + 1):
        run(f"{name}_{step}", "Pretrain", 1, ends=STOPS, call=step)
        run(f"{name}_{step}", "Pretrain", 1, "--resume")


@told
def killed(run: Runner, name: str) -> None:
    """In epoch 1, of which nothing but a line in the log is on the disk."""
    run(name, "Pretrain", 1, ends=(-signal.SIGKILL,), call=6, how="kill")
    run(name, "Pretrain", 1, "--resume")


@told
def workers(run: Runner, name: str) -> None:
    """Data comes from two processes; stopped within each epoch, and killed."""
    whole_and_stopped(run, name, "Pretrain", 1, (2, 5), num_workers=2)
    run(f"{name}_killed", "Pretrain", 1, ends=(-signal.SIGKILL,), call=6, how="kill", num_workers=2)
    run(f"{name}_killed", "Pretrain", 1, "--resume", num_workers=2)


@told
def shards(run: Runner, name: str) -> None:
    """An annotation file, shards that are streamed, and shards on the disk, by weights."""
    data = run.folder / "data"
    made = ["--annotations", str(data / "pretrain_train.json"), "--out", str(data / "shards")]
    prepare(["shards", *made, "--samples_per_shard", "4", "--workers", "1"])
    names = f"{data}/shards/{{00000..00005}}.tar"
    sets = {data / "pretrain_train.json": 1, f"pipe:cat {names}": 2, names: 1}
    train_file = [f"{{path: '{path}', weight: {weight}}}" for path, weight in sets.items()]
    settings = {
        "train_file": f"[{', '.join(train_file)}]",
        "samples_per_epoch": NUM_SAMPLES,
        "num_workers": 1,
    }
    whole_and_stopped(run, name, "Pretrain", 2, (2, STEPS + 1), **settings)


@told
def evaluation_1(run: Runner, name: str) -> None:
    """Between the evaluations of two splits in epoch 0, and before the first in epoch 1."""
    run(name, "VE", 1, ends=STOPS, call=2, how="evaluation")
    run(name, "VE", 1, "--resume", ends=STOPS, call=3, how="evaluation")
    run(name, "VE", 1, "--resume")


@told
def evaluation_2(run: Runner, name: str) -> None:
    run(name, "VE", 2, ends=STOPS, call=2, how="evaluation")
    run(name, "VE", 2, "--resume")


@told
def evaluation_alone(run: Runner, name: str) -> None:
    """Only one rank hears the signal, and ends the others."""
    run(name, "VE", 2, ends=STOPS, call=2, how="evaluation", on=(1,))
    run(name, "VE", 2, "--resume")


@told
def evaluation_without_training(run: Runner, name: str) -> None:
    """With the shell's code for SIGTERM: there is nothing to resume."""
    run(name, "VE", 3, "--evaluate", ends=(143,) * 3, call=2, how="evaluation", on=(1,))


@told
def evaluation_retrieval(run: Runner, name: str) -> None:
    run(name, "Retrieval", 1, ends=STOPS, call=2, how="evaluation")
    run(name, "Retrieval", 1, "--resume")


@told
def forgetful(run: Runner, name: str) -> None:
    for script in SCRIPTS:
        run(f"{name}_{script}", script, 1, ends=STOPS, call=2)
        run(f"{name}_{script}", script, 1, "--resume", how="forget")


@told
def fewer_ranks(run: Runner, name: str) -> None:
    run(name, "Pretrain", 2, ends=STOPS, call=1, on=(1,))
    run(name, "Pretrain", 1, "--resume", batch_size=4)


@told
def more_ranks(run: Runner, name: str) -> None:
    run(name, "Pretrain", 1, ends=STOPS, call=2, batch_size=4)
    run(name, "Pretrain", 2, "--resume")


@told
def more_ranks_later(run: Runner, name: str) -> None:
    run(name, "Pretrain", 1, ends=STOPS, call=8, batch_size=4, log_steps=1)
    shutil.copy(run.folder / name / "train_steps.jsonl", run.folder / name / "steps_before.jsonl")
    run(name, "Pretrain", 2, "--resume", log_steps=1)


@told
def fewer_ranks_before_evaluation(run: Runner, name: str) -> None:
    run(name, "VE", 2, ends=STOPS, call=3)
    run(name, "VE", 1, "--resume")


@told
def other_ranks_at_an_epoch(run: Runner, name: str) -> None:
    run(name, "Pretrain", 2, schedular__epochs=1)
    run(name, "Pretrain", 1, "--resume")


@told
def saves(run: Runner, name: str) -> None:
    run(name, "Pretrain", 1, save_every_steps=2, keep_last=2)
    run(f"{name}_one", "Pretrain", 1, save_every_steps=1, keep_last=1)


@told
def saves_best(run: Runner, name: str) -> None:
    run(name, "VE", 1, save_every_steps=1, keep_last=3)


@told
def saves_by_the_clock(run: Runner, name: str) -> None:
    run(name, "Pretrain", 1, save_every_minutes=1e-9, keep_last=99)
    run(f"{name}_not_due", "Pretrain", 1, save_every_minutes=60, keep_last=99)


@told
def other_settings(run: Runner, name: str) -> None:
    run(name, "Pretrain", 1, ends=STOPS, call=2)
    run(name, "Pretrain", 1, "--resume", "--seed", 7, ends=(1,))
    shutil.copytree(run.folder / name, run.folder / f"{name}_lr")
    run(f"{name}_lr", "Pretrain", 1, "--resume", optimizer__lr=2e-3)
    run(name, "Pretrain", 1, "--resume", num_workers=2, keep_last=7)


@told
def published(run: Runner, name: str) -> None:
    run(f"{name}_whole", "Pretrain", 1)
    out = run.folder / name
    out.mkdir()
    as_published(run.folder / f"{name}_whole" / "checkpoint_00.pth", out / "theirs.pth")
    run(name, "Pretrain", 1, "--resume", "--checkpoint", out / "theirs.pth")


def as_published(source: Path, target: Path) -> None:
    """Only what published files hold, as torch and OmegaConf wrote it then."""
    names = ("DictConfig", "ListConfig", "AnyNode", "ContainerMetadata")
    foreign = SimpleNamespace(**{name: type(name, (), {"__module__": "omegaconf"}) for name in names})
    package = ModuleType("omegaconf")
    vars(package).update(vars(foreign))
    checkpoint = load_checkpoint(source)
    content = {key: checkpoint[key] for key in ("model", "optimizer", "lr_scheduler", "epoch")}
    for state in content["optimizer"]["state"].values():
        state["step"] = int(state["step"])
    sys.modules["omegaconf"] = package
    torch.save({**content, "config": omega(foreign, checkpoint["config"])}, target)
    del sys.modules["omegaconf"]


EXACT = {  # neither dropout nor teachers, and twins that move far
    "alpha": 0.0,
    "bert_config__hidden_dropout_prob": 0.0,
    "bert_config__attention_probs_dropout_prob": 0.0,
    "momentum": 0.5,
    "save_every_steps": 1,
    "keep_last": 99,
    "log_steps": 1,
    "schedular__epochs": 1,
}


@told
def mean_gradient(run: Runner, name: str) -> None:
    run(f"{name}_one", "VE", 1, **EXACT)
    for num_ranks in (1, 2):
        run(f"{name}_{num_ranks}", "VE", num_ranks, grad_accumulation_steps=2, **EXACT)


@told
def whole_groups(run: Runner, name: str) -> None:
    """24 samples are 8 batches of 3, and 2 steps of 3 of those."""
    run(name, "VE", 1, grad_accumulation_steps=3, batch_size_train=3, schedular__epochs=1)


def tell(folder: Path) -> None:
    """Every story, two at a time; what went wrong in one is left in NAME.failed."""
    run = Runner(folder, make_tasks(folder))
    build_tokenizer(run.configs["VE"]["text_encoder"])  # imports packages, once for all
    run("first", "Pretrain", 1, schedular__epochs=1)  # makes the codebook that all have then
    waiting = list(STORIES.items())
    next_one = multiprocessing.Value("i", 0)

    def lane() -> None:
        while True:
            with next_one.get_lock():
                number, next_one.value = next_one.value, next_one.value + 1
            if number >= len(waiting):
                return
            name, story = waiting[number]
            try:
                story(run, name=name)
            except Exception:
                (folder / f"{name}.failed").write_text(traceback.format_exc())

    lanes = [multiprocessing.Process(target=lane) for _ in range(2)]
    for process in lanes:
        process.start()
    for process in lanes:
        process.join()


if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    tell(Path(sys.argv[1]))


# ---- what they did ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stories")
    done = run_forked(__file__, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return folder


@pytest.fixture
def story(folder):
    """NAME -> the output folder of that name, when its story was told to the end."""

    def outputs(name: str) -> Path:
        failed = folder / f"{name}.failed"
        assert not failed.exists(), failed.read_text()
        return folder / name

    return outputs


def assert_same(ours: object, theirs: object, where: str = "state") -> None:
    """To the bit, types of tensors and order of dicts included."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key, value in theirs.items():
            assert_same(ours[key], value, f"{where}.{key}")
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


def state(path: Path, is_end: bool = False) -> dict:
    """What decides how a run goes on; how often it is saved does not, and neither at the end of an epoch what
    torch would have drawn next: each epoch begins with a seed of its own.
    """
    content = load(path)
    for name in ("save_every_steps", "keep_last"):
        del content["config"][name]
    for own in content["ranks"] if is_end else []:
        del own["random"]["torch"]
    return {key: value for key, value in content.items() if key not in ("run", "saved")}


def batches(out: Path, first_run: int = 0) -> dict[int, list[list[str]]]:
    """rank -> what each of its batches held, from the run of that number on."""
    lines = [json.loads(line) for line in (out / "batches.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["run"] >= first_run]
    return {rank: [x["where"] for x in lines if x["rank"] == rank] for rank in {x["rank"] for x in lines}}


def printed(out: Path, number: int) -> str:
    return (out / f"run_{number}.txt").read_text()


def assert_same_run(out: Path, whole: Path, and_batches: bool = True) -> None:
    """The ends of both: weights, optimiser, schedule, random state, ...; the logs; result/; and what was
    trained on, nothing twice.
    """
    names = {"checkpoint_01.pth", *(path.name for run in (out, whole) for path in run.glob("*best.pth"))}
    for name in sorted(names):
        assert_same(state(out / name, is_end=True), state(whole / name, is_end=True), name)
    for name in ("log.txt", "train_steps.jsonl"):
        assert (out / name).read_text() == (whole / name).read_text(), name
    results, expected = (
        {path.name: path.read_text().replace(str(run), "RUN") for path in run.glob("result/*")}
        for run in (out, whole)
    )
    assert results == expected
    assert not and_batches or batches(out) == batches(whole)
    assert json.loads((out / "run.json").read_text())["status"] == "done"


# Three numbers can be added in three orders. DistributedDataParallel lays the gradients of a process's first
# step into its buckets otherwise than those of all later steps, and gloo adds in an order that depends on it.
@pytest.mark.parametrize(
    "name",
    [
        *(f"{script}_{num_ranks}" for script in SCRIPTS for num_ranks in (1, 2)),
        *(name for name, *_ in VARIANTS),
        "shards",
    ],
)
def test_a_stopped_run_ends_as_an_unbroken_one(story, name):
    out = story(name)
    whole = out.with_name(f"{name}_whole")
    assert_same_run(out, whole)
    shared = {path.name for path in out.glob("*_0?_*.pth")} & {path.name for path in whole.glob("*_0?_*.pth")}
    assert shared  # what was saved at a stop, too
    for stop in shared:
        assert_same(state(out / stop), state(whole / stop), stop)
    assert "stopped by SIGTERM in epoch 0 after step 2; --resume goes on from here" in printed(out, 0)
    assert ("stopped by a signal to another rank" in printed(out, 0)) == (len(batches(out)) > 1)


@pytest.mark.parametrize("step", range(1, STEPS * EPOCHS + 1))
def test_pretraining_may_stop_after_any_step(story, step):
    out = story("every_step").with_name(f"every_step_{step}")
    assert_same_run(out, story("Pretrain_1").with_name("Pretrain_1_whole"))


def test_what_was_not_saved_when_it_was_killed_is_done_again(story):
    """The line that epoch 1 had in a log already is there once."""
    out, whole = story("killed"), story("Pretrain_1").with_name("Pretrain_1_whole")
    assert_same_run(out, whole, and_batches=False)
    assert "resumed" in printed(out, 1) and "checkpoint_00.pth: epoch 1\n" in printed(out, 1)
    assert batches(out, first_run=1)[0] == batches(whole)[0][STEPS:]


def test_stops_with_loader_processes(story):
    assert_same_run(story("workers"), story("workers").with_name("workers_whole"))


def test_shards_and_annotation_files_are_mixed_by_weight(story):
    own = batches(story("shards"))
    for epoch in range(EPOCHS):
        steps = [step for rank in own.values() for step in rank[epoch * STEPS : (epoch + 1) * STEPS]]
        where = [sample for step in steps for sample in step]
        assert len(set(where)) == len(where) == NUM_SAMPLES
        kinds = Counter("pipe" if sample.startswith("pipe:") else sample.count(".tar: ") for sample in where)
        assert kinds == {"pipe": 12, 0: 6, 1: 6}


def test_an_epoch_of_its_own_with_loader_processes(story):
    out = story("workers").with_name("workers_killed")
    assert_same_run(out, out.with_name("workers_whole"), and_batches=False)


@pytest.mark.parametrize(
    ("name", "unbroken"),
    [
        ("evaluation_1", "VE_1"),
        ("evaluation_2", "VE_2"),
        ("evaluation_alone", "VE_2"),
        ("evaluation_retrieval", "Retrieval_1"),
    ],
)
def test_a_stop_in_an_evaluation_costs_no_training(story, name, unbroken):
    out = story(name)
    assert_same_run(out, story(unbroken).with_name(f"{unbroken}_whole"))
    assert "stopped by SIGTERM; --resume goes on from here" in printed(out, 0)
    assert all(len(own) == STEPS for own in batches(out, first_run=1).values())  # epoch 1 alone
    if name != "evaluation_2":  # of two that are signalled one may hear of it from the other first
        assert ("stopped by a signal to another rank" in printed(out, 0)) == (name == "evaluation_alone")
    assert "lost rank" not in printed(out, 0)


def test_a_stop_in_an_evaluation_without_training_ends_all_ranks(story):
    out = story("evaluation_without_training")
    said = printed(out, 0)
    assert said.count("stopped by a signal to another rank\n") == 2 and "stopped by SIGTERM\n" in said
    assert json.loads((out / "run.json").read_text())["status"] == "stopped"
    assert "Traceback" not in said and "lost" not in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_the_random_state_the_end_is_another(story, script):
    """So what the tests above compare does hang on it."""
    whole = story(f"{script}_1").with_name(f"{script}_1_whole")
    story("forgetful")
    out = whole.with_name(f"forgetful_{script}")
    assert batches(out) == batches(whole)
    with pytest.raises(AssertionError, match=r"checkpoint_01\.pth\.model\."):
        assert_same_run(out, whole)


def test_the_scaler_of_fp16_is_saved(story):
    for name in ("VE_fp16", "Retrieval_fp16"):
        scaler = load(story(name) / "checkpoint_00_000002.pth")["scaler"]
        assert scaler and scaler != torch.amp.GradScaler("cpu").state_dict()
    assert load(story("VE_bf16") / "checkpoint_01.pth")["scaler"] == {}


def test_bad_images_are_counted_over_a_stop(story):
    """The one that cannot be read came before the stop in one of the epochs, or after it."""
    assert [record["train_bad_images"] for record in records_of(story("VE_1"))] == [1, 1]


# ---- what changes at a resume ----


@pytest.mark.parametrize(("name", "left"), [("fewer_ranks", 4), ("more_ranks", 2)])
def test_other_ranks_go_on_at_the_same_sample(story, name, left):
    out = story(name)
    before, after = batches(out), batches(out, first_run=1)
    own = {rank: len(before[rank]) - len(after.get(rank, [])) + left * (rank in after) for rank in before}
    first_epoch = Counter(place for rank, n in own.items() for batch in before[rank][:n] for place in batch)
    both = Counter(place for own in before.values() for batch in own for place in batch)
    assert len(both) == NUM_SAMPLES
    assert set(first_epoch.values()) == {1} and first_epoch.keys() == both.keys()
    assert set(both.values()) == {EPOCHS}
    assert "goes on at the same sample, weights and schedule, but not bit for bit" in printed(out, 1)
    assert [record["epoch"] for record in records_of(out)] == [0, 1]


def test_other_ranks_at_an_epoch_say_so_too(story):
    out = story("other_ranks_at_an_epoch")
    assert "was saved by 2 rank(s): not bit for bit with 1" in printed(out, 1)
    assert len(batches(out, first_run=1)[0]) == STEPS


def test_logs_stay_whole_with_other_ranks(story):
    for name in ("fewer_ranks", "more_ranks", "more_ranks_later", "fewer_ranks_before_evaluation"):
        out = story(name)
        lines = [json.loads(line) for line in (out / "train_steps.jsonl").read_text().splitlines()]
        assert all(len(line) > 2 for line in lines), name
        assert all("train_lr" in record for record in records_of(out)), name
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)), name
    kept = (story("more_ranks_later") / "train_steps.jsonl").read_text()
    assert kept.startswith((story("more_ranks_later") / "steps_before.jsonl").read_text())


def test_another_seed_is_refused_and_other_settings_are_named(story):
    out, whole = story("other_settings"), story("Pretrain_1").with_name("Pretrain_1_whole")
    assert "is of a run with --seed 42; resume it with that seed" in printed(out, 1)
    assert "config differs from the checkpoint's: num_workers was 0, is 2\n" in printed(out, 2)
    ours, theirs = (load(run / "checkpoint_00.pth") for run in (out, whole))
    assert_same(ours["model"], theirs["model"])
    assert (ours["config"]["num_workers"], ours["config"]["keep_last"]) == (2, 7)
    text = printed(out.with_name("other_settings_lr"), 2)
    assert "config differs from the checkpoint's: optimizer.lr was 0.001, is 0.002\n" in text
    lines = (out.with_name("other_settings_lr") / "train_steps.jsonl", whole / "train_steps.jsonl")
    ours, theirs = ([json.loads(line)["lr"] for line in path.read_text().splitlines()] for path in lines)
    assert ours[0] == theirs[0] and ours[-1] > 1.9 * theirs[-1]  # the last of a cosine from twice as high


def test_every_checkpoint_knows_its_training_data(story):
    for script in SCRIPTS:
        out = story(f"{script}_1")
        data = load(out / "checkpoint_00.pth")["data"]
        ((name, number, checksum),) = data["files"]
        assert name == load(out / "checkpoint_00.pth")["config"]["train_file"] and len(checksum) == 8
        assert number == data["samples"] == NUM_SAMPLES
    data = load(story("shards") / "checkpoint_00.pth")["data"]
    assert [number for _, number, _ in data["files"]] == [NUM_SAMPLES] * 3 and data["shares"] == [6, 12, 6]
    assert data["readers"][:2] == [BATCH, 2]


def test_a_published_checkpoint_resumes_exactly(story):
    out = story("published")
    whole = out.with_name("published_whole")
    assert set(torch.load(whole / "checkpoint_00.pth")) > {"model", "optimizer", "lr_scheduler", "epoch"}
    ours, theirs = (load(run / "checkpoint_01.pth") for run in (out, whole))
    for key in ("model", "optimizer", "lr_scheduler", "epoch", "ranks"):
        assert_same(ours[key], theirs[key], key)
    assert records_of(out) == records_of(whole)[1:]
    steps = (whole / "train_steps.jsonl").read_text()
    assert steps.endswith((out / "train_steps.jsonl").read_text())
    assert batches(out)[0] == batches(whole)[0][STEPS:]


# ---- which checkpoints there are ----


def checkpoints(out: Path) -> set[str]:
    return {path.stem.removeprefix("checkpoint_") for path in out.glob("*.pth")}


def test_saving_within_epochs(story):
    """Beside every epoch's the newest `keep_last` in all."""
    out = story("saves")
    assert checkpoints(out) == {"00", "01_000002", "01"}
    assert checkpoints(out.with_name("saves_one")) == {"00", "01"}
    every_step = {f"0{epoch}{step}" for epoch in range(EPOCHS) for step in ("_000001", "_000002", "")}
    assert checkpoints(out.with_name("Pretrain_1_whole")) == every_step
    out = story("saves_by_the_clock")
    assert checkpoints(out) == every_step
    assert checkpoints(out.with_name("saves_by_the_clock_not_due")) == {"00", "01"}


def test_where_a_score_chooses_only_the_newest_and_the_best_stay(story):
    assert checkpoints(story("saves_best")) == {"01_000001", "01_000002", "01", "best"}


# ---- gradient accumulation ----


def gradient(out: Path) -> dict[str, torch.Tensor]:
    """Of the first step, from what Adam made of it, and the loss."""
    content = load(out / "checkpoint_00_000001.pth")
    group = content["optimizer"]["param_groups"][0]
    states = content["optimizer"]["state"]
    found = {str(i): state["exp_avg"] / (1 - group["betas"][0]) for i, state in states.items()}
    losses = [own["window"]["sums"]["loss"] for own in content["ranks"]]
    return found | {"loss": torch.tensor(losses).mean()}


def test_accumulated_gradients_are_the_mean(story):
    """2 batches of 4 are one of 8, and so are 2 of 2 on 2 ranks."""
    one = gradient(story("mean_gradient").with_name("mean_gradient_one"))
    assert max(value.abs().max() for value in one.values()) > 0.1
    for num_ranks in (1, 2):
        other = gradient(story("mean_gradient").with_name(f"mean_gradient_{num_ranks}"))
        assert other.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_twins_move_once_a_step(story):
    story("mean_gradient")
    for name in ("mean_gradient_one", "mean_gradient_1", "mean_gradient_2"):
        out = story(name)
        before, after = (load(out / f"checkpoint_00{at}.pth")["model"] for at in ("_000002", ""))
        twins = [key for key in before if key.partition(".")[0].endswith("_m") and "position_ids" not in key]
        moved = 0
        for key in twins:
            online = before[key.replace("_m.", ".", 1)]
            torch.testing.assert_close(after[key], 0.5 * before[key] + 0.5 * online, rtol=0, atol=2e-7)
            moved = max(moved, (after[key] - before[key]).abs().max())
        assert moved > 5e-6  # a second move would be half as far again


def test_only_whole_groups_of_batches_make_a_step(story):
    (own,) = batches(story("whole_groups")).values()
    assert [len(batch) for batch in own] == [3] * 6
    states = load(story("whole_groups") / "checkpoint_00.pth")["optimizer"]["state"].values()
    assert {int(state["step"]) for state in states} == {2}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_queues_take_in_every_batch_of_a_step(story, num_ranks):
    whole = story(f"Pretrain_accumulating_{num_ranks}").with_name(f"Pretrain_accumulating_{num_ranks}_whole")
    assert load(whole / "checkpoint_00_000001.pth")["model"]["queue_ptr"].tolist() == [BATCH]
