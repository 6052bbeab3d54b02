"""Your own photographs and captions: from a table to a model that is scored and searched, in one command.

make mine PHOTOS=photos CSV=captions.csv
(or: python -m simla.demo.mine --photos photos --csv captions.csv [--output_dir output/mine])

The table is split, a vocabulary made of its captions, the photos checked, a small model pre-trained and
fine-tuned, and scored on photos that it has not seen. Each step is told in a sentence, shown as the command
that does the same, and done once: a second call goes on, and after a finished one shows the scores again.
"""

import argparse
import hashlib
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from simla.dataset.check.__main__ import main as check
from simla.dataset.prepare.__main__ import main as prepare
from simla.dataset.prepare.common import SPLITS, Report
from simla.dataset.prepare.table import read_rows
from simla.demo.data import write_json
from simla.demo.pretrain import METRICS, Stage, gallery, read_retrieval, recall_table, run_stage
from simla.engine.command import GOES_ON, run_command
from simla.folders import list_images
from simla.utils import ROOT, UserError, atomic_write, fill_in, import_pyplot, make_output_folder

CONFIGS = ROOT / "configs" / "small"
SPLIT = "80/10/10"
MIN_PHOTOS = 100  # of which 10 are scored
NUM_EPOCHS = 10  # of pre-training
WARMUP_STEPS = 9
SECONDS_A_PAIR = {"pretrain": 0.047, "retrieval": 0.03}  # on two cores of an AMD EPYC


# ---- steps ----


class Steps:
    """The steps before the training; those that are done are noted in a file.

    Raises UserError where they were done with other input. Where photos have changed, they are done again, or
    it is said, once a training has begun (`is_trained`), that it goes on with what it has.
    """

    def __init__(self, file: Path, given: dict[str, str], photos: str, is_trained: bool):
        """photos: a checksum of their names and sizes."""
        new = {"given": given, "photos": photos, "done": []}
        self.file, self.record = file, json.loads(file.read_bytes()) if file.is_file() else new
        for name, value in self.record["given"].items():
            if given[name] != value:
                raise UserError(
                    f"{file.parent} was made with {name} {value!r}, not {given[name]!r}: give another "
                    f"--output_dir (make mine OUT=...), or delete {file.parent}"
                )
        if self.record.setdefault("photos", photos) != photos:
            print(
                "photos of the table were added, removed or replaced since the first call"
                + (
                    ", which this training knows as they were; for one with them give another --output_dir"
                    if is_trained
                    else ": all steps are done again"
                ),
                flush=True,
            )
            self.record |= {} if is_trained else {"photos": photos, "done": []}

    def do(self, name: str, sentence: str, work: Callable[..., None], *arguments: object) -> None:
        """Do the step and note it, or say that it was done."""
        if name in self.record["done"]:
            print(f"{name}: done already", flush=True)
            return
        print(f"\n{name}: {sentence}", flush=True)
        work(*arguments)
        self.record["done"].append(name)
        write_json(self.file, self.record)


def call(main: Callable[[list[str]], object], *words: object) -> object:
    """Show the command `python -m ...` and do what it does in this process; return its exit code."""
    module, *arguments = map(str, words)
    print(f"$ {shlex.join(['python', '-m', module, *arguments])}", flush=True)
    return main(arguments)


def names_in(table: Path) -> list[str]:
    """Return the photos that the table names, each once."""
    return list(dict.fromkeys(name for name, _ in read_rows([table], Report("table"))))


def checksum_of(photos: Path, names: list[str]) -> str:
    """Return one that changes when a photo comes, goes or is replaced by one of another size; dates do not
    count, which a copy may not keep.
    """
    digest = hashlib.sha256()
    for name in names:
        try:
            status = (photos / name).stat()
            digest.update(repr((name, status.st_size)).encode(errors="surrogatepass"))
        except (OSError, ValueError):  # no such file; a name that none can have
            continue
    return digest.hexdigest()


def make_files(photos: Path, table: Path, names: list[str], out: Path, seed: str) -> None:
    """Write retrieval_{train,val,test}.json. Raises UserError where there are too few photos."""
    missing = [name for name in names if not os.path.isfile(photos / name)]  # noqa: PTH113, any name
    num_photos = len(names) - len(missing)
    if num_photos < MIN_PHOTOS:
        raise UserError(
            f"{table} names {num_photos} photos that are in {photos}; {MIN_PHOTOS} at least are needed, to "
            "learn from eight of ten and to score on one of ten"
            + (f". Photos that are not there: {len(missing)}, first {missing[0]!r}" if missing else "")
        )
    words = "--root", photos, "--table", table, "--out", out, "--name", "retrieval"
    call(prepare, "simla.dataset.prepare", "table", *words, "--split", SPLIT, "--seed", seed)
    files = [out / f"retrieval_{split}.json" for split in SPLITS]
    used = {os.path.realpath(entry["image"]) for file in files for entry in json.loads(file.read_bytes())}
    if unused := [file for file in list_images(photos).files if os.path.realpath(file) not in used]:
        print(f"photos of {photos} without a caption in {table}: {len(unused)}, first {unused[0]}")


def make_vocabulary(data: Path, out: Path) -> None:
    """Write vocab.txt, of the training captions alone."""
    words = "vocabulary", "--texts", data / "retrieval_train.json", "--out", out
    call(prepare, "simla.dataset.prepare", *words)


def look_through(data: Path, out: Path, text_encoder: str) -> None:
    """Look through texts and photos, and write copies of the files without what cannot be used."""
    config = "--config", CONFIGS / "Retrieval.yaml", "--full", "--output_dir", out, "--fix", out / "fixed"
    files = [f"{split}_file={data / f'retrieval_{split}.json'}" for split in SPLITS]
    overrides = "--overrides", *files, "image_root=", f"text_encoder={text_encoder}"
    if call(check, "simla.dataset.check", *config, *overrides) == 2:
        raise UserError("the photos could not be checked; see the message above")


def checked_files(report: Path) -> dict[str, str]:
    """Return the config's keys of the files, and of each the copy without problems where it had some.

    Raises UserError where a split has nothing left.
    """
    config = json.loads(report.read_bytes())["fix"]["config"]
    if empty := [name for name, files in config.items() if not files]:
        raise UserError(f"{report}: no photo of {empty[0]} can be used; mend or replace them")
    return {name: files[0] for name, files in config.items()}


# ---- training ----


class Plan(NamedTuple):
    """The lengths that the number of training photos decides.

    batch: of all processes together; pairs_an_epoch: of the NUM_EPOCHS of pre-training; epochs: of
    fine-tuning, each of all captions.
    """

    batch: int
    pairs_an_epoch: int
    epochs: int
    minutes: int


def make_plan(train_file: str) -> Plan:
    """Return the plan: pre-training sees each photo 30 times, of more than 1,000 photos fewer times, but 10
    times at least; fine-tuning half as often, and each caption once at least.
    """
    entries = json.loads(Path(train_file).read_bytes())
    num_photos = len({entry["image"] for entry in entries})
    pairs = max(10 * num_photos, min(30 * num_photos, 30_000))
    epochs = max(1, round(pairs / 2 / len(entries)))
    seconds = pairs * SECONDS_A_PAIR["pretrain"] + epochs * len(entries) * SECONDS_A_PAIR["retrieval"]
    return Plan(64 if num_photos >= 1000 else 32, pairs // NUM_EPOCHS, epochs, round(seconds / 60))


def write_configs(out: Path, files: dict[str, str], text_encoder: str, plan: Plan) -> None:
    """Write Pretrain.yaml and Retrieval.yaml, in which is what differs from configs/small."""
    from simla.dataset.text import build_tokenizer

    text = {"text_encoder": text_encoder, "bert_config": {"vocab_size": len(build_tokenizer(text_encoder))}}
    steps = plan.pairs_an_epoch // plan.batch
    schedule = {
        "warmup_epochs": WARMUP_STEPS,
        "warmup_step_size": max(1, min(10, steps // (WARMUP_STEPS + 1))),
    }
    configs = {
        "Pretrain": {
            "train_file": files["train_file"],
            "image_root": "",
            **text,
            "samples_per_epoch": plan.pairs_an_epoch,
            "schedular": {"epochs": NUM_EPOCHS, **schedule},
        },
        "Retrieval": {
            **files,
            "image_root": "",
            **text,
            "save_scores": True,
            "schedular": {"epochs": plan.epochs, **schedule},
        },
    }
    for name, values in configs.items():
        values = {"base": os.path.relpath(CONFIGS / f"{name}.yaml", out), **values}
        with atomic_write(out / f"{name}.yaml", text=True) as file:  # JSON of one line is YAML, too
            file.writelines(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


# ---- result ----


def scores_of(out: Path) -> dict[str, dict]:
    """Return the recalls on the photos kept for it: of chance, after pre-training, and after fine-tuning."""
    before, after = (
        json.loads((out / "retrieval" / when / "result" / "retrieval.json").read_bytes())
        for when in ("before", "after")
    )
    return {"chance": after["chance"], "pre-trained": before, "fine-tuned": after}


def caution(chance: dict, scores: dict) -> str:
    """Return a sentence where R@5 is, one way or the other, not clearly above chance: by two standard
    deviations of a random order's on so many photos.
    """
    names = {"txt_r5": "image to text", "img_r5": "text to image"}
    spread = {name: 2 * (chance[name] * (100 - chance[name]) / scores["n"]) ** 0.5 for name in names}
    weak = [
        f"{way} {scores[name]:.1f} (chance {chance[name]:.1f} +- {spread[name]:.1f})"
        for name, way in names.items()
        if scores[name] <= chance[name] + spread[name]
    ]
    if not weak:
        return ""
    return (
        f"R@5 is near chance on these {scores['n']} photos: {', '.join(weak)}. This model has hardly learnt "
        "to find photos of which it has not seen captions; more photos, or longer training, would be needed."
    )


def show(out: Path, seconds: int) -> None:
    """Print the table, draw the pictures, and write summary.json."""
    from simla.engine.curves import plot_curves

    scores = scores_of(out)
    after = scores["fine-tuned"]
    columns = {title: {name: values[name] for name in METRICS} for title, values in scores.items()}
    print(f"\nretrieval, {after['n']} photos kept for it, {after['num_texts']} captions, recall in %\n")
    print(recall_table(columns, width=13))
    warning = caution(scores["chance"], after)
    print(f"\n{warning}" if warning else "")
    counts = {"n": after["n"], "num_texts": after["num_texts"], "caution": warning, "seconds": seconds}
    write_json(out / "summary.json", {**columns, **counts})
    plot_curves([out / "pretrain", out / "retrieval"], out / "losses.png")
    gallery(out / "retrieval", test_file=Path(after["test_file"]), what="photos")
    pictures = f"{out}/retrieval/gallery.png, {out}/losses.png"
    print(f"{seconds} s of training and scoring; {out}/summary.json, {pictures}")


# ---- make mine ----


def parse_arguments() -> argparse.Namespace:
    """Return the flags. Raises UserError where there is no such folder or file, or no matplotlib."""
    parser = argparse.ArgumentParser("python -m simla.demo.mine", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--photos", required=True, help="folder of the photos")
    add("--csv", required=True, help="table with the columns image (a path below --photos) and caption")
    add("--output_dir", default="output/mine", help="default: %(default)s")
    add("--seed", default="42", help="of split and training; default: %(default)s")
    text = "folder with a BERT vocabulary to use in place of one made of the captions; weights are not read"
    add("--text_encoder", default="", help=text)
    args = parser.parse_args()
    photos, table, usage = fill_in(args.photos), fill_in(args.csv), "make mine PHOTOS=folder CSV=table"
    if not photos or not Path(photos).is_dir():
        raise UserError(f"--photos {photos or '(nothing)'}: there is no such folder; {usage}")
    if not Path(table).is_file():
        raise UserError(f"--csv {table or '(nothing)'}: there is no such file; {usage}")
    if not args.seed.isdecimal():
        raise UserError(f"--seed {args.seed}: must be a whole number, such as 42")
    args.photos, args.csv, args.output_dir = Path(photos), Path(table), Path(fill_in(args.output_dir))
    import_pyplot()
    return args


def main() -> None:
    args = parse_arguments()
    photos, table, out = args.photos, args.csv.absolute(), make_output_folder(args.output_dir)
    data, text_encoder = out / "data", args.text_encoder or str(out / "vocabulary")
    given = {"photos": str(photos.absolute()), "csv": str(table), "seed": args.seed}
    given |= {"table of SHA-256": hashlib.sha256(table.read_bytes()).hexdigest()}
    given["text_encoder"], names = text_encoder, names_in(table)
    steps = Steps(out / "steps.json", given, checksum_of(photos, names), (out / "pretrain").exists())

    sentence = (
        f"the rows of {args.csv} become a file to learn from, one to choose by and one to score ({SPLIT})"
    )
    steps.do("table", sentence, make_files, photos, table, names, data, args.seed)
    if not args.text_encoder:
        sentence = "the captions to learn from are cut into word pieces, which are the vocabulary"
        steps.do("vocabulary", sentence, make_vocabulary, data, text_encoder)
    sentence = "every photo is decoded and every caption read; what cannot be used is named and left out"
    steps.do("check", sentence, look_through, data, out / "check", text_encoder)
    files = checked_files(out / "check" / "report.json")
    plan = make_plan(files["train_file"])
    sentence = (
        f"{out}/Pretrain.yaml and Retrieval.yaml say what is trained, and for how long with so many photos"
    )
    steps.do("config", sentence, write_configs, out, files, text_encoder, plan)

    print(
        f"\ntraining: {NUM_EPOCHS} epochs of {plan.pairs_an_epoch:,} pairs, {plan.epochs} of fine-tuning; "
        f"about {plan.minutes} minutes on two CPU cores, the log says how long here (eta)",
        flush=True,
    )
    records, checkpoint = [], ""
    for name, script, result in (("pretrain", "Pretrain.py", ""), ("retrieval", "Retrieval.py", "retrieval")):
        config = str((out / script).with_suffix(".yaml").absolute())
        stage = Stage(name, script, config, result=result, read=read_retrieval, batch=plan.batch)
        records.append(run_stage(stage, out / name, args.seed, checkpoint))
        checkpoint = records[-1]["checkpoint"]
    show(out, sum(record["seconds"] for record in records))
    words = ["--checkpoint", checkpoint, "--images", photos, "--index", out / "index", "--demo_data", data]
    print(f"\nto search your photos in a browser:\n$ python -m simla.web {shlex.join(map(str, words))}")


if __name__ == "__main__":
    run_command(main, GOES_ON)
