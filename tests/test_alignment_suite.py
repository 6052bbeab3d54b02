"""Alignment suites: the scorer against a slow version, readers on excerpts, blind baseline, the command."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from api_data import make_checkpoints
from PIL import Image

import simla
from simla.dataset.readers import suites
from simla.dataset.readers.suites import OTHER_PHOTO, REFUSED, SAME_PHOTO, files_of, locate, read_suite
from simla.demo.scenes import KINDS
from simla.demo.swaps import scene_rows, swaps
from simla.evaluation.alignment import __main__ as command
from simla.evaluation.alignment.blind import pseudo_likelihood
from simla.evaluation.alignment.kendall import kendall
from simla.evaluation.alignment.report import table
from simla.evaluation.alignment.rows import Row
from simla.evaluation.alignment.scores import answers, summarise, wilson
from simla.loading import _word_head
from simla.utils import UserError

EXCERPTS = Path(__file__).parent / "excerpts"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoints(tmp_path_factory.mktemp("suite"))


# ---- intervals and correlations ----


@pytest.mark.parametrize(
    ("num_right", "total", "low", "high"),
    # scipy 1.17.1: binomtest(k, n).proportion_ci(0.95, method="wilson")
    [
        (0, 10, 0.0, 0.27753279986288926),
        (10, 10, 0.7224672001371109, 1.0),
        (7, 10, 0.39677814746114526, 0.892208732593699),
        (50, 100, 0.4038315303659956, 0.5961684696340044),
        (211, 300, 0.6493365822398648, 0.7521886094621532),
        (1, 1, 0.20654931437723745, 1.0),
        (999, 1000, 0.9943574414020421, 0.9998234536293739),
    ],
)
def test_intervals_are_scipys(num_right, total, low, high):
    assert wilson(num_right, total) == pytest.approx((low, high), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "ratings", "tau_b", "tau_c"),
    # scipy 1.17.1: kendalltau(scores, ratings, variant="b"), variant="c"
    [
        (
            [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8],
            [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5],
            0.17109647770728875,
            1 / 6,
        ),
        ([0.1, 0.4, 0.4, 0.2, 0.9, 0.9, 0.9, 0.3], [1, 2, 3, 1, 4, 4, 3, 1], 0.8512565307587487, 5 / 6),
        (np.repeat([0.5, 0.1, 0.8, 0.3], 3), [2, 3, 2, 1, 1, 1, 4, 4, 3, 1, 2, 1], 0.8574929257125441, 5 / 6),
    ],
)
def test_correlations_are_scipys(scores, ratings, tau_b, tau_c):
    assert kendall(np.array(scores), np.array(ratings)) == pytest.approx({"tau_b": tau_b, "tau_c": tau_c})


def test_correlations_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    for num_values in (2, 4, 40):
        scores, ratings = rng.integers(0, 15, 60), rng.integers(0, num_values, 60)
        sides = [
            np.sign(a - b) * np.sign(c - d)
            for (a, c), (b, d) in itertools.combinations(zip(scores, ratings, strict=True), 2)
        ]
        untied = [sum(a != b for a, b in itertools.combinations(values, 2)) for values in (scores, ratings)]
        m = min(len(set(scores)), len(set(ratings)))
        expected = {
            "tau_b": sum(sides) / math.sqrt(math.prod(untied)),
            "tau_c": 2 * sum(sides) * m / 3600 / (m - 1),
        }
        assert kendall(scores, ratings) == pytest.approx(expected)
        assert kendall(ratings, scores) == pytest.approx(expected)
    assert kendall(np.ones(3), np.arange(3)) == {"tau_b": None, "tau_c": None}


# ---- accuracy ----


def test_the_three_scores_of_two_images_and_two_texts():
    row = Row(("a", "b"), ("x", "y"), (0, 1), "Relation")
    by_hand = {  # rows are images
        (0.9, 0.1, 0.2, 0.8): (True, True),
        (0.9, 0.8, 0.3, 0.5): (True, False),  # text y lies nearer to image a
        (0.6, 0.1, 0.9, 0.2): (False, False),
        (0.5, 0.1, 0.7, 0.8): (True, False),
        (0.3, 0.4, 0.1, 0.6): (False, True),
        (0.5, 0.5, 0.1, 0.6): (False, True),  # equal scores count against the model
    }
    for values, (text, image) in by_hand.items():
        given = answers(row, np.array(values).reshape(2, 2), 0)
        assert given == {"text": text, "image": image, "group": text and image}, values
    matrices = [np.array(values).reshape(2, 2) for values in by_hand]
    summary = summarise([row] * 6, {"itm": matrices})
    assert [
        summary[f"all, {name}"]["itm"]["accuracy"] for name in ("text", "image", "group")
    ] == pytest.approx([50, 50, 100 / 6])
    orders = [np.array(order).reshape(2, 2) for order in itertools.permutations(range(4))]
    for name in ("text", "image", "group"):  # the chance levels are those of all orders
        right = [answers(row, order, 0)[name] for order in orders]
        assert summary[f"all, {name}"]["chance"] == pytest.approx(100 * sum(right) / len(right))


def test_summary_is_the_slow_one():
    rng = np.random.default_rng(1)
    rows, matrices = [], []
    for number in range(50):
        num_texts = 2 + number % 3
        rows.append(Row(("i",), ("t",) * num_texts, (number % num_texts,), "odd" if number % 2 else "even"))
        matrices.append(rng.integers(0, 4, (1, num_texts)).astype(float))
    summary = summarise(rows, {"itc": matrices})
    for kind in ("all", "odd", "even"):
        chosen = [n for n, row in enumerate(rows) if kind in ("all", row.kind)]
        right = 0
        for n in chosen:
            best = [t for t, value in enumerate(matrices[n][0]) if value == max(matrices[n][0])]
            right += best == [rows[n].right[0]]
        assert summary[kind]["n"] == len(chosen)
        assert summary[kind]["itc"]["accuracy"] == pytest.approx(100 * right / len(chosen))
        assert summary[kind]["chance"] == pytest.approx(
            100 * sum(1 / len(rows[n].texts) for n in chosen) / len(chosen)
        )


def test_statements_are_true_above_a_threshold():
    right = (0, None, 0, None, None)
    rows = [Row(("i",), ("t",), (is_right,), "on") for is_right in right]
    odds = [np.array([[value]]) for value in (1.0, -1.0, -0.5, 0.5, -3.0)]
    cosines = [np.array([[value]]) for value in (0.9, 0.3, 0.8, 0.2, 0.1)]
    group = summarise(rows, {"itm": odds, "itc": cosines})["all"]
    assert group["itm"]["accuracy"] == pytest.approx(60)  # at 0
    assert group["itc"]["accuracy"] == pytest.approx(100)  # the two highest, as two are true
    assert group["chance"] == pytest.approx(60)


def test_every_rating_is_a_judgement():
    rows = [
        Row(("i",), ("t",), (None,), kind, ratings)
        for kind, ratings in (("a", (1, 1, 2)), ("b", (4, 3, 4)), ("a", (2, 2, 2)), ("a", (3, 1, 2)))
    ]
    values = [0.1, 0.9, 0.4, 0.3]
    summary = summarise(rows, {"itm": [np.array([[v]]) for v in values]})
    ratings = [r for row in rows for r in row.ratings]
    assert summary["all"]["itm"] == kendall(np.repeat(values, 3), np.array(ratings))
    assert (summary["all"]["n"], summary["all"]["num_ratings"], summary["a"]["n"]) == (4, 12, 3)


# ---- blind baseline ----


def test_pseudo_likelihood_masks_every_word_in_turn():
    torch.manual_seed(0)
    table = torch.randn(9, 9)  # the likelihood of a word depends on all unmasked ones

    def predict(ids, mask, positions):
        return (table[ids] * mask[:, :, None]).sum(1) + positions[:, None] * table[0]

    ids = torch.tensor([[1, 3, 4, 0], [1, 5, 0, 0], [1, 6, 7, 8]])
    mask = (ids > 0).long()
    expected = []
    for row in range(3):
        total = 0.0
        for position in range(1, int(mask[row].sum())):
            masked = ids[row].clone()
            masked[position] = 2
            logits = table[masked[mask[row] > 0]].sum(0) + position * table[0]
            total += float(logits.log_softmax(0)[ids[row, position]])
        expected.append(total)
    torch.testing.assert_close(pseudo_likelihood(predict, ids, mask, 2), torch.tensor(expected))


# ---- readers ----


def texts_of(rows: list[Row]) -> list[tuple]:
    return [row.texts for row in rows]


def test_sugar_crepe_and_valse_on_excerpts():
    left_out = Counter()
    rows = read_suite("sugar_crepe", files_of("sugar_crepe", EXCERPTS / "sugar_crepe"), left_out)
    assert [row.kind for row in rows] == ["add_obj", "add_obj", "swap_att", "swap_att"] and not left_out
    assert rows[2] == Row(
        ("000000565045.jpg",),
        (
            "Blue bathroom with two white towels hanging by the shower.",
            "White bathroom with two blue towels hanging by the shower.",
        ),
        (0,),
        "swap_att",
    )
    rows = read_suite("valse", files_of("valse", EXCERPTS / "valse"), left_out)
    assert [row.kind for row in rows] == ["foil-it", "foil-it", "plurals", "plurals"]
    assert left_out == {REFUSED: 2}
    assert rows[0].images == ("COCO_val2014_000000165831.jpg",) and rows[0].right == (0,)
    assert rows[0].texts == (
        "a giant bowl of food, with broccoli and other food on it.",
        "a giant bottle of food, with broccoli and other food on it.",
    )


def test_vsr_lines_are_statements(tmp_path):
    lines = [  # invented, in the layout of data/README.md of the official repository
        {
            "image": "1.jpg",
            "caption": "The cup is on the table.",
            "label": 1,
            "relation": "on",
            "annotator_id": 1,
        },
        {"image": "2.jpg", "caption": "The cat is under the bed.", "label": 0, "relation": "under"},
    ]
    file = tmp_path / "test.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    rows = read_suite("vsr", [file], Counter())
    assert [(row.right, row.kind) for row in rows] == [((0,), "on"), ((None,), "under")]
    file.write_text(json.dumps({**lines[0], "label": 2}))
    with pytest.raises(UserError, match=r"line 1: 'label' must be 0 or 1, found 2"):
        read_suite("vsr", [file], Counter())


def test_vl_checklist_kinds_are_folders_and_names(tmp_path):
    entry = ["VG_100K/1.jpg", {"POS": ["lamp ON desk", "more"], "NEG": ["lamp under desk"]}]
    names = (
        "Relation/vg/spatial",
        "Relation/swig_action",
        "Attribute/vaw/size",
        "Object/Size/vg_size/vg_obj_small",
    )
    for name in names:  # as its data_loader.py and evaluate.py read them
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps([entry]))
    rows = read_suite("vl_checklist", files_of("vl_checklist", tmp_path), Counter())
    kinds = ["Attribute size", "Object size", "Relation action", "Relation spatial"]
    assert sorted(row.kind for row in rows) == kinds
    assert set(texts_of(rows)) == {("lamp ON desk", "lamp under desk")}


def test_winoground_and_aro(tmp_path):
    line = {"id": 0, "image_0": "ex_0_img_0", "image_1": "ex_0_img_1", "caption_0": "a cup in a box"}
    line |= {"caption_1": "a box in a cup", "tag": "Preposition", "collapsed_tag": "Relation"}
    (tmp_path / "examples.jsonl").write_text(json.dumps(line))
    (row,) = read_suite("winoground", files_of("winoground", tmp_path), Counter())
    assert row == Row(
        ("ex_0_img_0.png", "ex_0_img_1.png"), ("a cup in a box", "a box in a cup"), (0, 1), "Relation"
    )
    entry = {"image_path": "1.jpg", "true_caption": "the cup is on the box", "bbox_x": 3, "bbox_y": 4}
    entry |= {"false_caption": "the box is on the cup", "bbox_w": 20, "bbox_h": 10, "relation_name": "on"}
    file = tmp_path / "visual_genome_relation.json"
    file.write_text(json.dumps([entry]))  # as VG_Relation of its dataset_zoo/aro_datasets.py reads it
    (row,) = read_suite("aro", [file], Counter())
    assert row.box == (3, 4, 20, 10) and row.kind == "relation" and row.texts[0] == "the cup is on the box"
    file.write_text(json.dumps([{**entry, "bbox_w": 0}]))
    with pytest.raises(UserError, match=r"entry 0: the box \[3, 4, 0, 10\] has no area"):
        read_suite("aro", [file], Counter())


def test_flickr8k_judgements_know_the_captions_of_the_photo_itself(tmp_path):
    tokens = ["a.jpg#0\tA dog runs .", "a.jpg#1\tA brown dog .", "b.jpg#0\tA man .", "c.jpg#0\tA dog runs ."]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(tokens))
    expert, crowd = tmp_path / "ExpertAnnotations.txt", tmp_path / "CrowdFlowerAnnotations.txt"
    expert.write_text("a.jpg\tb.jpg#0\t1\t1\t2\na.jpg\tc.jpg#0\t4\t4\t3\n")
    crowd.write_text("b.jpg\ta.jpg#1\t0.25\t1\t3\n")
    rows = read_suite("flickr8k_expert", [expert], Counter())
    assert [(row.texts[0], row.kind, row.ratings) for row in rows] == [
        ("A man .", OTHER_PHOTO, (1, 1, 2)),
        ("A dog runs .", SAME_PHOTO, (4, 4, 3)),
    ]
    (row,) = read_suite("flickr8k_cf", [crowd], Counter())
    assert row.ratings == (0.25,) and row.texts == ("A brown dog .",)
    expert.write_text("a.jpg\td.jpg#0\t1\t1\t2\n")
    with pytest.raises(UserError, match=r"line 1 is not a photo, a caption of Flickr8k.token.txt and three"):
        read_suite("flickr8k_expert", [expert], Counter())


def test_images_lie_in_whichever_folder(tmp_path):
    for name in ("val2017/000000000001.jpg", "vg/VG_100K/2.jpg", "vg/VG_100K_2/2.jpg", "hake/4.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    rows = [
        Row((name,), ("a", "b"), (0,), "k")
        for name in (
            "COCO_val2014_000000000001.jpg",
            "VG_100K_2/2.jpg",
            "VG_100K/2.jpg",
            "3.jpg",
            "2.jpg",  # of which folder?
            "VG_100K/4.jpg",  # HAKE's is another photo
            "4.jpg",
        )
    ]
    left_out = Counter()
    images = [
        Path(row.images[0]).relative_to(tmp_path).as_posix() for row in locate(rows, [tmp_path], left_out)
    ]
    assert images == ["val2017/000000000001.jpg", "vg/VG_100K_2/2.jpg", "vg/VG_100K/2.jpg", "hake/4.jpg"]
    assert left_out == {suites.NO_FILE: 1, suites.UNCLEAR: 2}
    (row,) = locate(rows[-1:], [tmp_path, tmp_path / "hake"], left_out)  # one photo, found twice
    assert Path(row.images[0]) == tmp_path / "hake" / "4.jpg"
    with pytest.raises(UserError, match=r"none of the files of valse there: actant-swap.json, "):
        files_of("valse", tmp_path)


def test_files_of_a_suite_that_are_missing_or_there_twice_are_named(tmp_path, caplog):
    for name in ("add_att", "swap_obj"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert [file.stem for file in files_of("sugar_crepe", tmp_path)] == ["add_att", "swap_obj"]
    assert "sugar_crepe without add_obj.json, replace_att.json, replace_obj.json, replace_rel" in caplog.text
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "add_att.json").write_text("{}")
    with pytest.raises(UserError, match=r"has add_att.json twice: .*add_att.json and .*; name a folder"):
        files_of("sugar_crepe", tmp_path)


# ---- the embedded scenes ----

SCENE = {
    "id": "test_00000",
    "image": "images/test/00000.jpg",
    "background": "sea",
    "objects": [{"kind": kind, "size": size} for kind, size in (("dog", "small"), ("cat", "large"))],
    "relations": [[0, "left of", 1], [1, "right of", 0]],
}


def test_swaps_of_a_scene_are_true_and_false():
    for seed in range(20):
        asked = {kind: (true, false) for kind, true, false in swaps(SCENE, random.Random(seed))}
        assert list(asked) == ["object", "attribute", "number", "relation", "order"]
        relations = {
            ("a dog left of a cat", "a dog right of a cat"),
            ("a cat right of a dog", "a cat left of a dog"),
        }
        assert asked["relation"] in relations
        true, false = asked["order"]
        assert sorted(true.split()) == sorted(false.split()) and true in {pair[0] for pair in relations}
        assert asked["order"][1] in {"a cat left of a dog", "a dog right of a cat"}
        true, false = asked["attribute"]
        assert true.startswith(("a small dog", "a large cat")) and false.startswith(
            ("a large dog", "a small cat")
        )
        assert true.split()[2:] == false.split()[2:]
        true, false = (text.split()[1] for text in asked["object"])
        assert true in ("dog", "cat") and false in KINDS and false not in ("dog", "cat")
        assert asked["number"][0].startswith("a single ") and asked["number"][1].startswith("two ")


def test_the_scenes_ask_for_both_numbers_alike(tiny):
    rows = scene_rows(tiny.data)
    assert {"object", "attribute", "relation", "order"} <= {row.kind for row in rows}
    assert all(Path(row.images[0]).is_file() and row.texts[0] != row.texts[1] for row in rows)
    assert rows == scene_rows(tiny.data)
    numbers = [row.texts[0].startswith("a single") for row in rows if row.kind == "number"]
    assert 2 * sum(numbers) == len(numbers)
    with pytest.raises(UserError, match=r"make the scenes with `python -m simla.demo.data --out "):
        scene_rows(tiny.data / "nowhere")


def test_the_command_writes_table_json_and_picture(tiny, tmp_path, monkeypatch, capsys):
    arguments = [
        "--checkpoint",
        str(tiny.checkpoints["pretrain"]),
        "--suite",
        "scenes",
        "--root",
        str(tiny.data),
    ]
    monkeypatch.setattr(
        "sys.argv", ["alignment", *arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]
    )
    command.main()
    shown, written = capsys.readouterr().out, json.loads((tmp_path / "out" / "suite.json").read_bytes())
    assert written["summary"]["all"]["n"] == len(written["rows"]) == len(written["scores"]["itm"])
    for kind, group in written["summary"].items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{kind} ")]
        assert f"{group['itm']['accuracy']:.1f} (" in line
    assert Image.open(tmp_path / "out" / "suite.png").width > 400
    monkeypatch.setattr("sys.argv", ["alignment", *arguments[:2], "--suite", "vsr"])
    with pytest.raises(UserError, match=r"--suite vsr needs --file or --root: its official files"):
        command.main()


# ---- a model on a suite ----


@pytest.fixture(scope="module")
def rows(tiny):
    entries = tiny.entries("retrieval_test")
    images = [str(tiny.data / entry["image"]) for entry in entries]
    captions = [caption for entry in entries for caption in entry["caption"]]
    number = len(captions)
    result = [
        Row(
            (images[i % len(images)],),
            tuple(captions[(5 * i + j) % number] for j in range(2 + i % 2)),
            (0,),
            "abc"[i % 3],
        )
        for i in range(9)
    ]
    return [*result, Row((images[0],), tuple(captions[:2]), (1,), "a", box=(2, 3, 9, 8))]


def test_a_suite_has_the_numbers_of_similarity_and_match(tiny, rows):
    model = simla.load(
        tiny.checkpoints["pretrain"], "cpu", config={**tiny.config("Retrieval"), "score_itc_weight": 2.0}
    )
    result = model.score_suite(rows)
    assert result["rows"] == rows and not result["left_out"]
    of_json = model.score_suite([rows[-1]._replace(box=list(rows[-1].box))])  # a list is a box, too
    np.testing.assert_allclose(of_json["scores"]["itc"][0], result["scores"]["itc"][-1], atol=1e-5)
    for number, row in enumerate(rows):
        image = row.images[0]
        if row.box:
            x, y, w, h = row.box
            image = Image.open(image).convert("RGB").crop((x, y, x + w, y + h))
        cosines = model.similarity(image, list(row.texts)).numpy()
        odds = torch.logit(model.match(image, list(row.texts)).double()).numpy()
        np.testing.assert_allclose(result["scores"]["itc"][number][0], cosines, atol=1e-5)
        np.testing.assert_allclose(result["scores"]["itm"][number][0], odds, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(
            result["scores"]["itm+itc"][number][0], odds + 2 * cosines, rtol=1e-3, atol=1e-3
        )
    assert result["summary"] == summarise(rows, result["scores"])
    assert set(result["scores"]) == {"itc", "itm", "itm+itc", "blind"}


def test_blind_scores_are_those_of_the_pre_training_model(tiny, rows):
    model = simla.load(tiny.checkpoints["pretrain"], "cpu")
    trained, _ = tiny.script_model("Pretrain", "pretrain")
    text = rows[0].texts[0]
    ids, mask = model._captions([text], 30)
    total = 0.0
    with torch.no_grad():
        for position in range(1, int(mask.sum())):
            masked = ids.clone()
            masked[0, position] = model.tokenizer.mask_token_id
            logits = trained.text_encoder.predict(trained.text_encoder(masked, mask))
            total += float(logits[0, position].log_softmax(-1)[ids[0, position]])
    blind = model.score_suite(rows[:1])["scores"]["blind"][0]
    assert blind[0, 0] == pytest.approx(total, rel=1e-4)
    fine_tuned = simla.load(tiny.checkpoints["retrieval"], "cpu")
    result = fine_tuned.score_suite(rows)
    assert "blind" not in result["scores"]
    assert "no blind baseline: no head for masked words; --blind_checkpoint" in table("mine", result)
    result = fine_tuned.score_suite(rows[:1], blind=model)
    assert result["scores"]["blind"][0] == pytest.approx(blind)


def test_unreadable_images_are_counted(tiny, rows, tmp_path):
    (tmp_path / "broken.jpg").write_text("no picture")
    model = simla.load(tiny.checkpoints["retrieval"], "cpu")
    broken = [
        rows[0]._replace(images=(str(tmp_path / "broken.jpg"),), box=box) for box in (None, (0, 0, 2, 2))
    ]
    result = model.score_suite([*broken, rows[0]])
    assert result["rows"] == rows[:1] and result["left_out"] == {"rows with an image that cannot be read": 2}
    assert "left out: 2 rows with an image that cannot be read" in table("mine", result)
    with pytest.raises(UserError, match="has no matching head"):
        simla.load(tiny.checkpoints["ve"], "cpu").score_suite(rows)


def test_rows_of_another_shape_are_refused(tiny, rows, caplog):
    model, image = simla.load(tiny.checkpoints["retrieval"], "cpu"), rows[0].images[0]
    wrong = {
        r"row 1 has 1 images and 0 texts": Row((image,), (), (), "k"),
        r"row 1 has 2 images and 3 texts": Row((image, image), ("a", "b", "c"), (0, 1), "k"),
        r"row 1: right is \(2,\)": Row((image,), ("a", "b"), (2,), "k"),
        r"row 1: right is \(0, 0\); expected for each": Row((image, image), ("a", "b"), (0, 0), "k"),
        r"row 1 is of kind 'all'": Row((image,), ("a", "b"), (0,), "all"),
        r"row 1 has several texts, and none that is right": Row((image,), ("a", "b"), (None,), "k"),
        r"row 1 is not of the shape of row 0": Row((image,), ("a",), (0,), "k"),
    }
    for message, row in wrong.items():
        with pytest.raises(UserError, match=message):
            model.score_suite([rows[0], row])
    with pytest.raises(UserError, match="no rows given"):
        model.score_suite([])
    model.score_suite([rows[0], Row((image,), ("two ducks", "Two  ducks"), (0,), "k")])
    assert "1 of 2 rows have texts that are read alike" in caplog.text


def test_heads_that_no_loss_trained_are_not_asked(tiny, rows, tmp_path):
    content = torch.load(tiny.checkpoints["pretrain"], weights_only=True)
    content["config"]["loss_weights"] |= {"mlm": 0, "psl": 0}
    torch.save(content, tmp_path / "two.pth")
    model = simla.load(tmp_path / "two.pth", "cpu")
    assert "blind" not in model.score_suite(rows)["scores"]
    image = rows[0].images[0]
    with pytest.raises(UserError, match=r"trained without the loss of its concept head, loss_weights.psl 0"):
        model.keywords(image)

    content["config"]["loss_weights"] |= {"ita": 1, "itm": 0}
    torch.save(content, tmp_path / "contrast.pth")
    model = simla.load(tmp_path / "contrast.pth", "cpu")
    assert list(model.score_suite(rows)["scores"]) == ["itc"]
    assert model.search([image], "a dog", score="itc")
    for ask in (model.match, model.ground, lambda *pair: model.search([image], "a dog")):
        with pytest.raises(UserError, match=r"without the loss of its matching head, loss_weights.itm 0; "):
            ask(image, "a dog")

    content["config"]["loss_weights"] |= {"ita": 0, "itm": 1, "psl": 1}
    torch.save(content, tmp_path / "matching.pth")
    model = simla.load(tmp_path / "matching.pth", "cpu")
    assert list(model.score_suite(rows)["scores"]) == ["itm"] and len(model.keywords(image)) == 5
    for ask in (model.similarity, lambda *pair: model.search([image], "a dog")):
        with pytest.raises(UserError, match=r"loss of its projection to features, loss_weights.ita 0; "):
            ask(image, "a dog")


def test_albefs_layout_has_no_blind_reader(tiny):
    content = torch.load(tiny.checkpoints["pretrain"], weights_only=True)
    model = simla.load(tiny.checkpoints["pretrain"], "cpu")
    assert _word_head(content["model"], model.model, "f") is not None
    object.__setattr__(model.model.text_encoder.config, "text_layers_alone", 1)
    assert _word_head(content["model"], model.model, "f") is None
