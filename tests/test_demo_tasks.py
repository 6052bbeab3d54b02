"""The demo's task annotations, read by their words alone and compared with the scene records."""

import json
import pickle
import random
import re
from collections import Counter, defaultdict

import pytest

from simla.dataset.grounding import read_targets
from simla.dataset.nlvr import official_identifiers, read_nlvr
from simla.dataset.readers.annotations import TEXT, read_annotations
from simla.dataset.ve import read_ve
from simla.dataset.vqa import read_answer_list
from simla.demo import data as demo
from simla.demo import scenes as demo_scenes
from simla.demo import tasks as demo_tasks
from simla.demo.scenes import BACKGROUNDS, KINDS
from simla.evaluation.vqa import most_common_answer, normalize_answer

COUNTS = {"train": 40, "val": 12, "test": 12}
SINGULAR = {**{kind: kind for kind in KINDS}, **{kind.plural: name for name, kind in KINDS.items()}}
SINGULAR |= {"animal": "animal", "animals": "animal", "vehicle": "vehicle", "vehicles": "vehicle"}
PLACES = {background.noun: name for name, background in BACKGROUNDS.items()}
NUMBERS = {"one": 1, "two": 2, "three": 3}
SIDES = {"left": lambda dx, dy: dx > 0, "right": lambda dx, dy: dx < 0}
SIDES |= {"above": lambda dx, dy: dy > 0, "below": lambda dx, dy: dy < 0}


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "data"
    demo.make_demo(out, *COUNTS.values(), size=48)
    return out


def drawn_scene(split, index):
    """A scene record as the data set's, with square objects and without a picture."""
    rng = random.Random(f"{split}/{index}")
    kinds, boxes = demo_scenes.draw_kinds(rng, split, demo_scenes.held_out_pairs(0)), None
    while boxes is None:
        sizes = demo_scenes.draw_sizes(rng, len(kinds))
        sides = [round(rng.uniform(*demo_scenes.SIZES[word]) * 96) for word in sizes]
        boxes = demo_scenes.lay_out([(side, side) for side in sides], 96, rng)
    objects = [{"kind": k, "size": s, "box": b} for k, s, b in zip(kinds, sizes, boxes, strict=True)]
    place = {"id": f"{split}_{index:05d}", "image": f"images/{split}/{index:05d}.jpg", "size": 96}
    shown = {"background": rng.choice(list(BACKGROUNDS)), "objects": objects}
    return {**place, **shown, "relations": demo_scenes.relations_of(boxes, 96)}


@pytest.fixture(scope="module")
def scenes():
    numbers = {"train": 2400, "val": 800, "test": 800}
    return {split: [drawn_scene(split, i) for i in range(number)] for split, number in numbers.items()}


@pytest.fixture(scope="module")
def made(scenes):
    return demo_tasks.make_tasks(scenes, 0)


@pytest.fixture(scope="module")
def by_image(scenes):
    return {scene["image"]: scene for shown in scenes.values() for scene in shown}


# ------------------------------------------------------------------------- what a scene shows, read anew
def number_of(noun, scene):
    """How many of 'a dog', 'dogs' or 'animals' there are; 1 or 0 for 'a sandy beach'."""
    if noun in PLACES:
        return int(scene["background"] == PLACES[noun])
    name = SINGULAR[re.sub(r"^(an?|no|the) ", "", noun)]
    return sum(name in (thing["kind"], KINDS[thing["kind"]].category) for thing in scene["objects"])


def offset(a, b):
    """From the centre of thing a to that of thing b, in pixels."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["box"], b["box"]
    return bx + bw / 2 - ax - aw / 2, by + bh / 2 - ay - ah / 2


def things(noun, scene):
    name = SINGULAR[re.sub(r"^(an?|the) ", "", noun)]
    return [thing for thing in scene["objects"] if thing["kind"] == name]


def meant(text, scene):
    """The objects that a referring expression fits."""
    *words, kind = text.removeprefix("the ").split()
    found = things(kind, scene)
    for word in words:
        if word in ("larger", "smaller"):
            assert len(found) == 2
            found = [sorted(found, key=lambda thing: max(thing["box"][2:]))[word == "larger"]]
        elif word in demo_scenes.SIZES:
            found = [thing for thing in found if thing["size"] == word]
        else:
            found = [thing for thing in found if KINDS[thing["kind"]].colour == word]
    return found


def true_answers(question, scene):
    """All answers that the scene allows."""
    if match := re.fullmatch(r"is there (an? \w+)( in the picture)?", question):
        return ["yes" if number_of(match[1], scene) else "no"]
    if match := re.fullmatch(r"how many (\w+) are there", question):
        return [str(number_of(match[1], scene))]
    if question in ("where is this", "what scene is this"):
        return [scene["background"]]
    if match := re.fullmatch(r"what (animal|vehicle|food) is (this|in the picture)", question):
        return [t["kind"] for t in scene["objects"] if KINDS[t["kind"]].category == match[1]]
    match = re.fullmatch(r"what is (left|right|above|below)(?: of)? (the \w+)", question)
    (target,) = things(match[2], scene)
    return [t["kind"] for t in scene["objects"] if t is not target and SIDES[match[1]](*offset(t, target))]


EACH = re.compile(r"there is (.+) in one of the images and (.+) in the other")


def is_true_of_both(sentence, left, right):
    if match := EACH.fullmatch(sentence):
        orders = ((left, right), (right, left))
        return any(number_of(match[1], a) and number_of(match[2], b) for a, b in orders)
    if match := re.fullmatch(r"there are (\w+) (\w+) in all", sentence):
        return NUMBERS[match[1]] == number_of(match[2], left) + number_of(match[2], right)
    subject, noun = re.fullmatch(r"(.+?) images? shows? (.+)", sentence).groups()
    shown = bool(number_of(noun, left)), bool(number_of(noun, right))
    if subject == "one":
        assert sum(shown) < 2, "said only where it holds of exactly one or of none"
    wanted = {"both": (2,), "one": (1,), "exactly one": (1,), "neither": (0,)}
    one_side = {"the left": shown[0], "the right": shown[1]}
    return one_side[subject] if subject in one_side else sum(shown) in wanted[subject]


CLAIM = re.compile(r"(an?|no) (\w+) (belongs to a child|was a gift|was found today|is lost|.*)")
NOT_SEEN = {"belongs to a child", "was a gift", "was found today", "is lost"}
NOT_SEEN |= {"is hungry", "is tired", "has a name"}


def entailed(sentence, scene):
    """The label of a sentence: what is said of a thing that is there, and not seen, is neutral."""
    if match := re.fullmatch(r"there (?:is|are) exactly (\w+) (\w+)", sentence):
        truth = number_of(match[2], scene) == NUMBERS[match[1]]
    elif match := re.fullmatch(r"(?:there is|the picture shows) (.+)", sentence):
        truth = (number_of(match[1], scene) > 0) != match[1].startswith("no ")
    elif match := re.fullmatch(r"(an? \w+) is (left|right|above|below)(?: of)? (an? \w+)", sentence):
        pairs = [offset(a, b) for a in things(match[1], scene) for b in things(match[3], scene)]
        holding = [SIDES[match[2]](*pair) for pair in pairs]
        assert holding and len(set(holding)) == 1
        truth = holding[0]
    else:
        negated, noun, claim = CLAIM.fullmatch(sentence).groups()
        assert claim in NOT_SEEN
        if number_of(noun, scene):
            return "neutral"
        truth = negated == "no"
    return "entailment" if truth else "contradiction"


# --------------------------------------------------------------------------------------------- all tasks
def test_the_vocabulary_fits_the_demo_models(folder):
    lines = (folder / "bert" / "vocab.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) <= 400


def test_same_seed_same_entries_other_seed_others(scenes, made):
    few = {split: shown[:60] for split, shown in scenes.items()}
    assert demo_tasks.make_tasks(few, 0) == demo_tasks.make_tasks(few, 0)
    one, other = demo_tasks.make_tasks(few, 0)[0], demo_tasks.make_tasks(few, 1)[0]
    fixed = {"refcoco+/instances.json", "refcoco+/cocos.json"}
    assert {name for name in one if one[name] == other[name]} - {"vqa_answer_list.json"} == fixed


def test_splits_use_their_own_images_and_every_one_exists(folder):
    for task in ("grounding", "vqa", "nlvr", "ve"):
        for path in folder.glob(f"{task}_*.json"):
            if path.name == "vqa_answer_list.json":
                continue
            allowed = {path.stem.removeprefix(f"{task}_")}
            if path.name == "grounding_test.json":
                allowed = {"val", "test"}
            for entry in load(path):
                for image in entry.get("images") or [entry["image"]]:
                    image = f"images/{image}.jpg" if task == "ve" else image
                    assert image.split("/")[1] in allowed and (folder / image).is_file()


def test_every_word_is_one_token(folder):
    from simla.dataset.text import build_tokenizer

    tokenizer, texts = build_tokenizer(str(folder / "bert")), set()
    for path in folder.glob("*_*.json"):
        for entry in load(path) if path.name.startswith(("grounding", "vqa", "nlvr", "ve")) else []:
            entry = {"answer": entry} if isinstance(entry, str) else entry
            answers = entry.get("answer", [])
            texts |= {answers} if isinstance(answers, str) else set(answers)
            texts |= {entry[key] for key in ("text", "question", "sentence") if key in entry}
    assert all(tokenizer.tokenize(text) == text.split() for text in texts)
    answers = read_answer_list(str(folder / "vqa_answer_list.json"), tokenizer, "[SEP]", 32)
    assert len(answers.texts) > 10


def test_manifest_counts_what_is_in_the_files(folder):
    tasks = load(folder / "manifest.json")["tasks"]
    assert list(tasks) == ["grounding", "vqa", "nlvr", "ve"]
    for task in ("vqa", "nlvr", "ve"):
        for split in COUNTS:
            number = len(load(folder / f"{task}_{split}.json"))
            assert tasks[task]["num_entries"][split] == number == sum(tasks[task]["balance"][split].values())
        assert set(tasks[task]["chance"]) == {"val", "test"}
    numbers = tasks["grounding"]["num_entries"]
    assert numbers["train"] == len(load(folder / "grounding_train.json"))
    assert numbers["val"] + numbers["testA"] + numbers["testB"] == len(load(folder / "grounding_test.json"))


@pytest.mark.parametrize("numbers", [(0, 0, 0), (1, 0, 1), (2, 1, 2), (0, 3, 3)])
def test_small_splits_have_what_fits(scenes, numbers):
    few = {split: scenes[split][:number] for split, number in zip(scenes, numbers, strict=True)}
    files, _, statistics = demo_tasks.make_tasks(few, 0)
    for split, number in zip(scenes, numbers, strict=True):
        assert len(files[f"vqa_{split}.json"]) >= number
        if number < 2:
            assert not files[f"nlvr_{split}.json"]
    assert all(0 <= value <= 100 for s in ("val", "test") for value in statistics["ve"]["chance"][s].values())


# --------------------------------------------------------------------------------------------- grounding
def test_refcoco_files_have_the_official_fields(folder):
    raw = (folder / "refcoco+" / "refs(unc).p").read_bytes()
    refs, instances = pickle.loads(raw), load(folder / "refcoco+" / "instances.json")
    assert raw[:2] == b"\x80\x02"
    images = {image["id"]: image for image in instances["images"]}
    annotations = {thing["id"]: thing for thing in instances["annotations"]}
    categories = {category["id"]: category for category in instances["categories"]}
    assert set(instances) == {"info", "images", "annotations", "categories"}
    assert len(images) == sum(COUNTS.values()) and len(categories) == len(KINDS)
    for image in images.values():
        assert (
            set(image) == {"id", "file_name", "height", "width"} and (folder / image["file_name"]).is_file()
        )
        assert image["height"] == image["width"] == 48
    for thing in annotations.values():
        assert set(thing) == {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}
        assert thing["area"] == thing["bbox"][2] * thing["bbox"][3] and thing["iscrowd"] == 0
        assert all(type(value) is float for value in thing["bbox"])
    fields = ["ann_id", "category_id", "file_name", "image_id", "ref_id", "sent_ids", "sentences", "split"]
    sent_ids = []
    for number, ref in enumerate(refs, 1):
        assert sorted(ref) == fields and ref["ref_id"] == number
        thing, image = annotations[ref["ann_id"]], images[ref["image_id"]]
        assert (thing["image_id"], thing["category_id"]) == (ref["image_id"], ref["category_id"])
        assert image["file_name"] == ref["file_name"]
        assert ref["file_name"].split("/")[1] == ref["split"].rstrip("AB")
        for sentence in ref["sentences"]:
            assert sorted(sentence) == ["raw", "sent", "sent_id", "tokens"]
            assert sentence["tokens"] == sentence["sent"].split()
        assert [sentence["sent_id"] for sentence in ref["sentences"]] == ref["sent_ids"]
        sent_ids += ref["sent_ids"]
        is_animal = categories[ref["category_id"]]["supercategory"] == "animal"
        assert ref["split"] not in ("testA", "testB") or is_animal == (ref["split"] == "testA")
    assert sent_ids == list(range(1, len(sent_ids) + 1))
    shown = [{k: entry[k] for k in ("image", "text")} for entry in load(folder / "grounding_train.json")]
    shown += [{k: entry[k] for k in ("image", "text")} for entry in load(folder / "grounding_test.json")]
    said = [{"image": r["file_name"], "text": s["sent"]} for r in refs for s in r["sentences"]]
    assert shown == said


def test_the_reader_joins_the_grounding_files(folder):
    fields = {"image": TEXT, "text": TEXT, "ref_id": (int,)}
    entries = read_annotations(str(folder / "grounding_test.json"), fields)
    targets = read_targets(entries, folder, folder / "refcoco+" / "dets.json")
    assert {target.split for target in targets} == {"val", "testA", "testB"}
    by_path = {s["image"]: s for split in COUNTS for s in load(folder / f"scenes_{split}.json")}
    for entry, target in zip(entries, targets, strict=True):
        assert [thing["box"] for thing in meant(entry["text"], by_path[entry["image"]])] == [target.box]


def test_every_expression_fits_one_object(made, by_image):
    files, refs, _ = made
    box = {thing["id"]: thing["bbox"] for thing in files["refcoco+/instances.json"]["annotations"]}
    words = Counter()
    for ref in refs:
        scene = by_image[ref["file_name"]]
        assert len(scene["objects"]) > 1
        for sentence in ref["sentences"]:
            assert [thing["box"] for thing in meant(sentence["sent"], scene)] == [box[ref["ann_id"]]]
            words.update(sentence["tokens"])
    assert not {"left", "right", "above", "below"} & set(words)
    assert {"the", "small", "large", "larger", "smaller", "orange"} <= set(words)
    splits = Counter(ref["split"] for ref in refs)
    assert (
        splits["testA"] > 0.3 * splits["testB"] and splits["val"] + splits["testA"] + splits["testB"] < 1350
    )


def iou(a, b):
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2], b[0] + b[2]), min(a[1] + a[3], b[1] + b[3])
    common = max(0, right - left) * max(0, bottom - top)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def test_detector_boxes_of_every_evaluated_image(made, by_image):
    files, refs, statistics = made
    dets, boxes = files["refcoco+/dets.json"], files["refcoco+/cocos.json"]
    images = {str(image["id"]): image["file_name"] for image in files["refcoco+/instances.json"]["images"]}
    evaluated = {key for key, name in images.items() if not name.startswith("images/train/")}
    assert set(dets) == set(boxes) == evaluated
    for key, found in dets.items():
        truths = [thing["box"] for thing in by_image[images[key]]["objects"]]
        assert boxes[key] == truths and len(found) - len(truths) in (2, 3)
        overlaps = [[iou(box, truth) for truth in truths] for box in found]
        assert all(max(column) > 0.65 for column in zip(*overlaps, strict=True))
        assert sum(max(row) < 0.41 for row in overlaps) == len(found) - len(truths)
        for x, y, w, h, score in found:
            assert min(x, y) >= 0 and x + w <= 96.02 and y + h <= 96.02 and 0 < score <= 1
    for split, chance in statistics["grounding"]["chance"].items():
        shown = [str(r["image_id"]) for r in refs if r["split"] == split for _ in r["sent_ids"]]
        for rule, choices, low, high in (("by_box", dets, 15, 30), ("by_object", boxes, 35, 50)):
            wanted = [100 / len(choices[image]) for image in shown]
            assert chance[rule] == pytest.approx(sum(wanted) / len(wanted)) and low < chance[rule] < high


# --------------------------------------------------------------------------------------------------- VQA
def test_vqa_fields(made):
    files, _, _ = made
    train, ids = files["vqa_train.json"], []
    assert all(len(entry["answer"]) == 10 for entry in train if entry["dataset"] == "vqa")
    share = sum(entry["dataset"] == "vg" for entry in train) / len(train)
    assert 0.07 < share < 0.13 and all(isinstance(e["answer"], str) for e in train if e["dataset"] == "vg")
    assert {key for entry in train for key in entry} == {"dataset", "image", "question", "answer"}
    official = {"dataset", "image", "question", "question_id", "answer", "question_type", "answer_type"}
    types = defaultdict(set)
    for entry in files["vqa_val.json"] + files["vqa_test.json"]:
        assert set(entry) == official and entry["dataset"] == "vqa" and len(entry["answer"]) == 10
        assert entry["question"].startswith(entry["question_type"])
        types[entry["question_type"]].add(entry["answer_type"])
        ids.append(entry["question_id"])
    assert len(ids) == len(set(ids)) and all(type(number) is int for number in ids)
    assert types.pop("is there") == {"yes/no"} and types.pop("how many") == {"number"}
    assert len(types) == 6 and all(found == {"other"} for found in types.values())
    asked = [(entry["image"], entry["question"]) for entry in train]
    assert len(asked) == len(set(asked)) == 2 * 2400 and 1100 < len(files["vqa_test.json"]) < 1300


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_vqa_answers_are_true_and_given_by_six(made, by_image, split):
    for entry in made[0][f"vqa_{split}.json"]:
        answers = true_answers(entry["question"], by_image[entry["image"]])
        assert len(answers) == 1, "unambiguous"
        given = [entry["answer"]] if entry["dataset"] == "vg" else entry["answer"]
        assert given.count(answers[0]) >= 0.6 * len(given), entry


def test_vqa_balance_and_variants(made):
    files, _, statistics = made
    ten = [entry for split in ("train", "val", "test") for entry in files[f"vqa_{split}.json"]]
    ten = [entry for entry in ten if entry["dataset"] == "vqa"]
    types = Counter(demo_tasks.question_type(entry["question"]) for entry in ten)
    answers = Counter(most_common_answer(e["answer"]) for e in ten if e["question"].startswith("is there"))
    assert abs(answers["yes"] / types["is there"] - 0.5) < 0.03
    numbers = Counter(most_common_answer(e["answer"]) for e in ten if e["question"].startswith("how many"))
    assert set(numbers) == {"0", "1", "2", "3"} and max(numbers.values()) < 0.5 * types["how many"]
    assert 0.3 < types["is there"] / len(ten) < 0.4
    said = {answer for entry in ten for answer in entry["answer"]}
    assert {"two", "grass", "a dog", "no", "yes", "beach"} <= said
    chance = statistics["vqa"]["chance"]["test"]
    assert 15 < chance["overall"] < 30 and chance["overall"] < chance["by_question_type"] < 45


def test_answer_list_has_every_normalised_training_answer(made):
    files, _, _ = made
    said = Counter()
    for entry in files["vqa_train.json"]:
        answers = [entry["answer"]] if entry["dataset"] == "vg" else entry["answer"]
        said.update(map(normalize_answer, answers))
    listed = files["vqa_answer_list.json"]
    assert sorted(listed) == sorted(said) and {"two", "a dog"}.isdisjoint(listed)
    assert [said[answer] for answer in listed] == sorted(said.values(), reverse=True)


def test_vqa_chance_by_hand():
    def entry(question, *answers):
        return {
            "question": question,
            "question_type": " ".join(question.split()[:2]),
            "answer": list(answers),
        }

    train = [entry("is there a dog", *["no"] * 10), entry("how many dogs are there", *["two"] * 8, "3", "3")]
    train += [{"question": "is there a cat", "answer": "no"}]
    test = [entry("how many cats are there", *["2"] * 10), entry("is there a pig", *["yes"] * 8, "no", "no")]
    # "no", said by two: each of the other eight finds 2 of 3 agreeing, each of the two one of 3
    no = (8 * 2 / 3 + 2 / 3) / 10
    assert demo_tasks.vqa_chance(train, test) == {
        "overall": pytest.approx(50 * no),
        "by_question_type": pytest.approx(50 * (1 + no)),
    }


# ------------------------------------------------------------------------------------- NLVR2 and SNLI-VE
def test_readers_accept_nlvr_and_ve(folder):
    for split in COUNTS:
        statements = load(folder / f"nlvr_{split}.json")
        assert set(statements[0]) == {"images", "sentence", "label", "identifier"}
        identifiers = official_identifiers(statements)
        assert identifiers is not None  # each its own
        sentence_of = {
            name.rsplit("-", 2)[0]: e["sentence"] for name, e in zip(identifiers, statements, strict=True)
        }
        assert len(sentence_of) == len({entry["sentence"] for entry in statements})
        assert all(sentence_of[e["identifier"].rsplit("-", 2)[0]] == e["sentence"] for e in statements)
        assert all(entry["images"][0] != entry["images"][1] for entry in statements)
        read = read_nlvr(str(folder / f"nlvr_{split}.json"), str(folder))
        assert [item["label"] for item in read] == [int(entry["label"] == "True") for entry in statements]
        sentences = load(folder / f"ve_{split}.json")
        assert set(sentences[0]) == {"image", "sentence", "label"}
        assert re.fullmatch(rf"{split}/\d{{5}}", sentences[0]["image"])
        assert len(read_ve(str(folder / f"ve_{split}.json"), str(folder / "images"))) == len(sentences)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_nlvr_labels(made, by_image, split):
    forms = Counter()
    entries = made[0][f"nlvr_{split}.json"]
    for entry in entries:
        left, right = (by_image[image] for image in entry["images"])
        assert str(is_true_of_both(entry["sentence"], left, right)) == entry["label"], entry
        if (match := EACH.fullmatch(entry["sentence"])) and entry["label"] == "False":
            assert any(not number_of(match[1], s) and not number_of(match[2], s) for s in (left, right))
        start = re.match(r"the left|the right|both|one|exactly|neither|there is|there are", entry["sentence"])
        forms[start[0], entry["label"]] += 1
    assert len(forms) == 16
    for form, _ in list(forms):
        assert abs(forms[form, "True"] - forms[form, "False"]) <= 3, form
    presence = sum(
        forms[form, label] for form, label in forms if form in ("the left", "the right", "both", "one")
    )
    assert presence > 0.7 * len(entries)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_ve_labels(made, by_image, split):
    classes, claimed = Counter(), Counter()
    for entry in made[0][f"ve_{split}.json"]:
        label = entailed(entry["sentence"], by_image[f"images/{entry['image']}.jpg"])
        assert label == entry["label"], entry
        classes[label] += 1
        if any(entry["sentence"].endswith(claim) for claim in NOT_SEEN):
            claimed[entry["sentence"].split()[0] == "no", label] += 1
    assert max(classes.values()) - min(classes.values()) < 0.02 * sum(classes.values())
    assert set(claimed) == {
        (n, x) for n in (0, 1) for x in ("neutral", "entailment" if n else "contradiction")
    }
    assert max(claimed.values()) - min(claimed.values()) < 0.02 * sum(classes.values())


def test_consistency_without_pictures_is_that_of_the_most_frequent_label_of_each_sentence():
    def entry(sentence, number, label):
        return {"sentence": sentence, "label": label, "identifier": f"test-{sentence}-{number}-0"}

    train = [entry("a", 0, "True"), entry("b", 0, "False"), entry("c", 0, "True")]
    test = [entry("a", 0, "True"), entry("a", 1, "True"), entry("b", 0, "True"), entry("b", 1, "False")]
    chance = demo_tasks.sentence_chance(train, test)
    assert (chance["by_sentence"], chance["consistency"]) == (75, 50)
    assert "consistency" not in demo_tasks.sentence_chance(train, [])


def test_the_words_alone_say_nothing(made):
    files, _, statistics = made
    for task, floor in (("nlvr", 50), ("ve", 50)):
        chance = statistics[task]["chance"]
        for split in ("val", "test"):
            assert abs(chance[split]["by_sentence"] - floor) < 6, (task, split)
        # in training, too, the same word must not go with one label
        labels = defaultdict(Counter)
        for entry in files[f"{task}_train.json"]:
            for kind in {word for word in entry["sentence"].split() if word in KINDS}:
                labels[kind][entry["label"]] += 1
        classes = 2 if task == "nlvr" else 3
        assert len(labels) == len(KINDS)
        assert all(abs(n / sum(c.values()) - 1 / classes) < 0.14 for c in labels.values() for n in c.values())


def test_sentence_chance_by_hand():
    train = [("a", "yes"), ("a", "yes"), ("a", "no"), ("b", "no"), ("c", "yes")]
    test = [("a", "yes"), ("b", "no"), ("b", "yes"), ("d", "no")]
    train, test = ([{"sentence": s, "label": x} for s, x in found] for found in (train, test))
    assert demo_tasks.sentence_chance(train, test) == {"overall": 50, "by_sentence": 50}
    assert demo_tasks.sentence_chance([], test) == {"overall": 0, "by_sentence": 0}
    assert demo_tasks.sentence_chance(train, []) == {"overall": 0, "by_sentence": 0}
