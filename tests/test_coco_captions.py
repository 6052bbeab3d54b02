"""ECCV Caption and CxC: rankings and scores against slow ones, with the package's own annotations."""

import json
import logging
from copy import copy

import numpy as np
import pytest
import torch

import zero_shot_retrieval
from simla.dataset.retrieval import RetrievalEvalData, coco_ids
from simla.engine.results import scores_path
from simla.evaluation import coco_captions
from simla.evaluation.coco_captions import coco_rankings, package_scores, why_no_coco_scores
from simla.evaluation.rerank import NOT_SCORED

WHOLE = coco_captions._package()


def first_images(num_images: int):
    """The package with so many of COCO's test images and their captions as queries."""
    metrics, images = copy(WHOLE), list(WHOLE.coco_gts["i2t"])[:num_images]
    captions = [caption for image in images for caption in WHOLE.coco_gts["i2t"][image]]
    for name in ("coco_gts", "cxc_gts", "eccv_gts"):
        right_of, queries = getattr(WHOLE, name), {"i2t": images, "t2i": captions}
        kept = {way: {q: right_of[way][q] for q in queries[way] if q in right_of[way]} for way in queries}
        setattr(metrics, name, kept)
    return metrics


def slow_scores(ranked: dict, right_of: dict, cxc: dict) -> dict[str, float]:
    """By the definitions: precision at each right place up to R over R, share of the first R, hits."""
    maps, precisions, first = [], [], []
    for query, right in right_of.items():
        hits = [number in right for number in ranked[query][: len(right)]]
        maps.append(sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / len(right))
        precisions.append(sum(hits) / len(right))
        first.append(hits[0])
    scores = {"eccv_map_at_r": maps, "eccv_rprecision": precisions, "eccv_r1": first}
    for k in (1, 5, 10):
        scores[f"cxc_r{k}"] = [any(n in right for n in ranked[query][:k]) for query, right in cxc.items()]
    return {name: 100 * sum(values) / len(values) for name, values in scores.items()}


def test_scores_are_those_of_the_definitions(monkeypatch):
    """Of rankings that have the right ones among others."""
    metrics, rng, rankings = first_images(150), np.random.default_rng(0), {}
    monkeypatch.setattr(coco_captions, "_package", lambda: metrics)
    for way, other in (("i2t", "t2i"), ("t2i", "i2t")):
        candidates = list(metrics.coco_gts[other])
        rankings[way] = {}
        for query in metrics.coco_gts[way]:
            right = metrics.cxc_gts[way].get(query, []) + metrics.eccv_gts[way].get(query, [])
            mixed = right + [candidates[i] for i in rng.integers(len(candidates), size=15)]
            rankings[way][query] = list(dict.fromkeys(mixed[i] for i in rng.permutation(len(mixed))))
    scores = package_scores(rankings)
    for name, way in (("txt", "i2t"), ("img", "t2i")):
        slow = slow_scores(rankings[way], metrics.eccv_gts[way], metrics.cxc_gts[way])
        assert {
            f"{name}_{key}": pytest.approx(value) for key, value in slow.items()
        }.items() <= scores.items()
    assert len(scores) == 12 and all(1 < score < 99 for score in scores.values())


def test_rankings_are_the_sorted_scores_of_five_captions_an_image():
    rng = np.random.default_rng(1)
    ids = [(100 + i, [1000 + 10 * i + j for j in range(n)]) for i, n in enumerate((5, 7, 4, 6))]
    numbers = [number for _, captions in ids for number in captions]
    owner = [image for image, captions in ids for _ in captions]
    kept = [n for _, captions in ids for n in captions[:5]]
    i2t, t2i = rng.permutation(4 * 22).reshape(4, 22) / 10, rng.permutation(22 * 4).reshape(22, 4) / 10
    i2t[1, 3:] = t2i[5] = NOT_SCORED
    ranked = coco_rankings(torch.tensor(i2t), torch.tensor(t2i), ids)
    assert list(ranked["i2t"]) == [100, 101, 102, 103] and list(ranked["t2i"]) == kept
    for row, image in enumerate(ranked["i2t"]):
        by_score = sorted((-i2t[row, t], n) for t, n in enumerate(numbers) if n in kept)
        scored = [n for score, n in by_score if -score > NOT_SCORED]
        assert ranked["i2t"][image][: len(scored)] == scored
        nothing = ranked["i2t"][image][len(scored) :]
        assert len(nothing) == len(set(nothing)) == len(kept) - len(scored) and all(n < 0 for n in nothing)
    assert all(n < 0 for n in ranked["t2i"][numbers[5]])
    images = sorted(set(owner), key=lambda image: -t2i[0, image - 100])
    assert ranked["t2i"][numbers[0]] == images


@pytest.fixture
def few(monkeypatch):
    """The entries of COCO's first eight test images, which are all that the package knows."""
    metrics = first_images(8)
    monkeypatch.setattr(coco_captions, "_package", lambda: metrics)
    return [
        {
            "image": f"val2014/COCO_val2014_{image:012}.jpg",
            "caption": ["a dog"] * 5,
            "image_id": image,
            "caption_ids": captions,
        }
        for image, captions in metrics.coco_gts["i2t"].items()
    ]


def scored(entries: list[dict], monkeypatch, folder) -> tuple[dict, dict]:
    """evaluate() and report() on random scores -> what they return, result/retrieval.json."""
    rng = torch.Generator().manual_seed(0)
    num_texts = 5 * len(entries)
    matrices = (
        torch.rand(len(entries), num_texts, generator=rng),
        torch.rand(num_texts, len(entries), generator=rng),
    )
    monkeypatch.setattr(zero_shot_retrieval, "score", lambda *_: matrices)
    (folder / "coco_test.json").write_text(json.dumps(entries))
    config = {"test_file": f"{folder}/coco_test.json", "k_test": 256, "score": "itm", "score_itc_weight": 1}
    config |= {"image_root": "", "image_res": 32}
    data = RetrievalEvalData(config["test_file"], {**config, "skip_unreadable": False})
    (folder / "result").mkdir(parents=True)
    recall = zero_shot_retrieval.evaluate(None, data, None, {}, None, folder / "result" / "scores.pt")
    zero_shot_retrieval.report(data, recall, "w", config, str(folder))
    return recall, json.loads((folder / "result" / "retrieval.json").read_bytes())


def test_a_coco_run_tells_and_keeps_them(few, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    recall, result = scored(few, monkeypatch, tmp_path)
    names = ("eccv_map_at_r", "eccv_rprecision", "eccv_r1", "cxc_r1", "cxc_r5", "cxc_r10")
    own = {f"{way}_{name}" for way in ("txt", "img") for name in names}
    assert own < set(recall) and all(result[name] == recall[name] for name in recall)
    assert own.isdisjoint(result["chance"])
    assert (
        f"img_cxc_r10  {recall['img_cxc_r10']:6.2f}" in caplog.text and "no ECCV Caption" not in caplog.text
    )
    kept = json.loads((tmp_path / "result" / "coco_rankings.json").read_bytes())
    kept = {
        way: {int(query): ranked for query, ranked in kept[way].items()} for way in kept
    }  # docs/protocols.md
    assert package_scores(kept).items() <= recall.items()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "package",
            "coco_test.json: no ECCV Caption and CxC, the package is missing: pip install eccv-caption",
        ),
        ("numbers", "no ECCV Caption and CxC, its entries have no 'caption_ids'; make the file anew"),
        (
            "captions",
            "8 test images with 40 captions, by their numbers; 8 of the images are there, and 39 of",
        ),
        ("image", "8 test images with 40 captions, by their numbers; 7 of the images are there, and 35 of"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(few, monkeypatch, tmp_path, caplog, change, reason):
    caplog.set_level(logging.INFO)
    if change == "package":
        monkeypatch.setattr(coco_captions, "_package", lambda: None)
    elif change == "numbers":
        del few[3]["caption_ids"]
    elif change == "captions":
        few[3]["caption_ids"] = [7, *few[3]["caption_ids"][1:]]
    else:
        few = few[1:]
    recall, _ = scored(few, monkeypatch, tmp_path)
    assert reason in caplog.text and not any("cxc" in name for name in recall)
    assert (tmp_path / "result" / "coco_rankings.json").exists() == (change != "numbers")


def test_those_of_an_earlier_evaluation_do_not_stay(tmp_path):
    (tmp_path / "result").mkdir()
    kept = [tmp_path / "result" / name for name in ("coco_rankings.json", "retrieval_scores.pt")]
    for are_kept in (False, True):
        for path in kept:
            path.write_text("of an earlier checkpoint")
        assert scores_path(tmp_path, are_kept) == (kept[1] if are_kept else None)
        assert not any(path.exists() for path in kept)


def test_other_images_are_none_of_coco_s():
    assert coco_ids([{"image": "1.jpg", "caption": ["a dog"], "image_id": 1}]) == []
    assert why_no_coco_scores([]) == ""
    merged = {
        "image": "COCO_val2014_000000000042.jpg",
        "caption": ["a", "b"],
        "image_id": 42,
        "caption_ids": [7],
    }
    assert coco_ids([merged]) == [(42, [])]
