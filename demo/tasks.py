"""The demo data's annotations for grounding, VQA, NLVR2 and SNLI-VE, made from its scene records.

Pure functions: scene records (data.py describes them) and a random generator in, entries out; `make_tasks`
puts them together. No text tells its answer: a statement is drawn first, then pictures of which it is true or
false, so that each sentence is as often the one as the other. Chance levels are percentages.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice

from simla.demo.scenes import BACKGROUNDS, KINDS, noun_phrase, related_kinds
from simla.evaluation.classification import consistency
from simla.evaluation.grounding import box_iou, grounding_chance
from simla.evaluation.vqa import answer_scores, normalize_answer

COUNTED = ("animal", "vehicle")  # categories that are counted as a kind is; a toy bear is no animal
NUMBERS = ("zero", "one", "two", "three")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TRIES = 50  # at pictures of which a statement is true or false; a small split may have none


def evenly(rng: random.Random, items: Sequence) -> Iterator:
    """Yield the items for ever, in a new order each round, so that they come equally often."""
    while True:
        yield from rng.sample(items, len(items))


def contents(scene: dict) -> Counter:
    """Count each kind and category in the scene, and 1 for its background."""
    kinds = [thing["kind"] for thing in scene["objects"]]
    return Counter([*kinds, *(KINDS[kind].category for kind in kinds), scene["background"]])


def plural(noun: str) -> str:
    return KINDS[noun].plural if noun in KINDS else f"{noun}s"


def phrase(noun: str) -> str:
    """Return 'an apple' for a kind, 'a sandy beach' for a background."""
    return noun_phrase(noun, 1, None) if noun in KINDS else BACKGROUNDS[noun].noun


def all_related(scene: dict) -> list[tuple[str, str, str]]:
    """Return all (kind, relation, kind): every object of the first stands so to every one of the second."""
    return [(a, relation, b) for (a, b), relations in related_kinds(scene).items() for relation in relations]


class Pool:
    """The scenes of a split, to be drawn by how many of something they show."""

    def __init__(self, scenes: list[dict], rng: random.Random):
        self.scenes, self.rng = scenes, rng
        self.by_number: dict[tuple[str, int], list[dict]] = {}  # (noun, number) -> scenes
        for scene in scenes:
            counts = contents(scene)
            for noun in (*KINDS, *COUNTED, *BACKGROUNDS):
                self.by_number.setdefault((noun, counts[noun]), []).append(scene)

    def draw(self, noun: str, *numbers: int) -> dict | None:
        """Return a scene that shows one of these numbers of it; None if there is none."""
        scenes = [scene for number in numbers for scene in self.by_number.get((noun, number), ())]
        return self.rng.choice(scenes) if scenes else None

    def draw_present(self, noun: str, present: bool) -> dict | None:
        """Return a scene that shows it, or one that does not; None if there is none."""
        return self.draw(noun, 1, 2, 3) if present else self.draw(noun, 0)


# --------------------------------------------------------------------------------------------- grounding
EVALUATED = 0.8  # share of the val and test scenes with an expression: each costs a backward pass
SIZE_ORDER = ("small", "medium", "large")


def descriptions(scene: dict) -> list[list[str]]:
    """Return for each object the phrases true of it and of no other in the scene, the likelier more often."""
    described = []
    for thing in scene["objects"]:
        kind, size = thing["kind"], thing["size"]
        rivals = [other["size"] for other in scene["objects"] if other is not thing and other["kind"] == kind]
        phrases = [f"{size} {kind}"] * 2 if size != "medium" and size not in rivals else []
        if not rivals:
            phrases += [kind] * 3 + [f"{KINDS[kind].colour} {kind}"]
        elif len(rivals) == 1 and size not in rivals:
            is_larger = SIZE_ORDER.index(size) > SIZE_ORDER.index(rivals[0])
            phrases.append(f"{'larger' if is_larger else 'smaller'} {kind}")
        described.append(phrases)
    return described


def detector_boxes(scene: dict, rng: random.Random) -> list[list[float]]:
    """Return boxes [x, y, w, h, score] in pixels, in any order: each true one with its edges moved by up to
    8% of its sides, an overlap of 0.7 at least, and 2 or 3 that overlap all true ones by less than 0.4.
    """
    side, truths = scene["size"], [thing["box"] for thing in scene["objects"]]
    boxes = []
    for x, y, w, h in truths:
        x0, x1 = (max(0, min(side, edge + rng.uniform(-0.08, 0.08) * w)) for edge in (x, x + w))
        y0, y1 = (max(0, min(side, edge + rng.uniform(-0.08, 0.08) * h)) for edge in (y, y + h))
        boxes.append([x0, y0, x1 - x0, y1 - y0, rng.uniform(0.6, 1)])
    wanted = len(boxes) + rng.choice((2, 3))
    while len(boxes) < wanted:
        w, h = rng.uniform(0.25, 0.65) * side, rng.uniform(0.25, 0.65) * side
        box = [rng.uniform(0, side - w), rng.uniform(0, side - h), w, h, rng.uniform(0.4, 0.8)]
        if all(box_iou(box, truth) < 0.4 for truth in truths):
            boxes.append(box)
    return [[round(value, 2) for value in box] for box in rng.sample(boxes, wanted)]


def grounding_files(scenes: dict[str, list[dict]], seed: int) -> tuple[dict[str, list | dict], list[dict]]:
    """Return contents by file name, and the refs of RefCOCO+: at most one per scene, of two objects or more.
    Images, objects, refs and sentences are each numbered from 1 over all splits.
    """
    images, objects, refs, dets, boxes = [], [], [], {}, {}
    numbers = {kind: number for number, kind in enumerate(KINDS, 1)}
    for split, scene in [(split, scene) for split, shown in scenes.items() for scene in shown]:
        rng = random.Random(f"{seed}/grounding/{scene['id']}")
        image_id, first, things = len(images) + 1, len(objects) + 1, scene["objects"]
        side = scene["size"]
        images.append({"id": image_id, "file_name": scene["image"], "height": side, "width": side})
        for number, thing in enumerate(things, first):
            box = [float(value) for value in thing["box"]]
            label = {"id": number, "image_id": image_id, "category_id": numbers[thing["kind"]]}
            objects.append({**label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        if split != "train":
            dets[str(image_id)] = detector_boxes(scene, rng)
            boxes[str(image_id)] = [thing["box"] for thing in things]

        described = [(i, phrases) for i, phrases in enumerate(descriptions(scene)) if phrases]
        if len(things) < 2 or not described or (split != "train" and rng.random() > EVALUATED):
            continue
        index, phrases = rng.choice(described)
        kind = things[index]["kind"]
        ref_split = ("testA" if KINDS[kind].category == "animal" else "testB") if split == "test" else split
        chosen = dict.fromkeys(rng.choices(phrases, k=rng.choice((1, 1, 1, 2))))
        texts = [rng.choice(("the ", "")) + text for text in chosen]
        sent_id = refs[-1]["sent_ids"][-1] + 1 if refs else 1
        ref = {"sent_ids": list(range(sent_id, sent_id + len(texts))), "file_name": scene["image"]}
        ref |= {"ann_id": first + index, "ref_id": len(refs) + 1, "image_id": image_id, "split": ref_split}
        ref["sentences"] = [
            {"tokens": text.split(), "raw": text, "sent_id": number, "sent": text}
            for number, text in enumerate(texts, sent_id)
        ]
        refs.append({**ref, "category_id": numbers[kind]})

    train, test = [], []
    for ref in refs:
        entries = [{"image": ref["file_name"], "text": sentence["sent"]} for sentence in ref["sentences"]]
        if ref["split"] == "train":
            train += entries
        else:
            test += [{**entry, "ref_id": ref["ref_id"]} for entry in entries]
    categories = [
        {"id": numbers[name], "name": name, "supercategory": kind.category} for name, kind in KINDS.items()
    ]
    info = {"description": "drawn scenes of the demo data, in the format of RefCOCO+"}
    instances = {"info": info, "images": images, "annotations": objects, "categories": categories}
    files = {"grounding_train.json": train, "grounding_test.json": test}
    files |= {"refcoco+/instances.json": instances, "refcoco+/dets.json": dets, "refcoco+/cocos.json": boxes}
    return files, refs


def grounding_chances(refs: list[dict], instances: dict, dets: dict) -> dict[str, dict[str, float]]:
    """Return for val, testA and testB the expected accuracy over their sentences of a detector box drawn
    evenly, and of an object drawn evenly, which takes seeing but no reading.
    """
    truth = {thing["id"]: thing["bbox"] for thing in instances["annotations"]}
    num_objects = Counter(thing["image_id"] for thing in instances["annotations"])
    chances = {split: {"by_box": [], "by_object": []} for split in ("val", "testA", "testB")}
    for ref in (ref for ref in refs if ref["split"] in chances):
        image, times = ref["image_id"], len(ref["sentences"])
        box = grounding_chance(truth[ref["ann_id"]], dets[str(image)])
        chances[ref["split"]]["by_box"] += [100 * box] * times
        chances[ref["split"]]["by_object"] += [100 / num_objects[image]] * times
    return {split: {rule: mean(v) for rule, v in rules.items()} for split, rules in chances.items()}


def mean(scores: list[float]) -> float:
    return sum(scores) / max(1, len(scores))


# --------------------------------------------------------------------------------------------------- VQA
ALSO = {  # what else an annotator may call a background
    "field": "grass", "beach": "sand", "night": "sky", "snow": "hill", "street": "city", "room": "wall",
    "desert": "sand", "sea": "water", "sunset": "sun", "kitchen": "tiles",
}  # fmt: skip
NUMBER_WEIGHTS = (2, 3, 8, 16)  # of asking for something of which the scene has 0, 1, 2 or 3
AGREEING = (*[10] * 10, *[9] * 3, *[8] * 3)  # annotators who give the true answer; four others would count
VG_SHARE = 0.1  # of the training questions have one answer, as Visual Genome's
Question = tuple[str, str, list[str]]  # text, true answer, what the other annotators say: some mean the same


def ask_presence(scene: dict, rng: random.Random, answer: str) -> Question:
    """Ask for a kind that is there, or that is not, as the answer says."""
    counts = contents(scene)
    kind = rng.choice([kind for kind in KINDS if bool(counts[kind]) == (answer == "yes")])
    text = f"is there {phrase(kind)}{rng.choice(('', ' in the picture'))}"
    return text, answer, ["no" if answer == "yes" else "yes"]


def ask_number(scene: dict, rng: random.Random) -> Question:
    """Ask how many there are of a kind or category."""
    counts, nouns = contents(scene), {}
    for noun in (*KINDS, *COUNTED):
        nouns.setdefault(counts[noun], []).append(noun)
    number = rng.choices(sorted(nouns), [NUMBER_WEIGHTS[n] for n in sorted(nouns)])[0]
    text = f"how many {plural(rng.choice(nouns[number]))} are there"
    return text, str(number), [NUMBERS[number], NUMBERS[number], str(number + 1)]


def ask_place(scene: dict, rng: random.Random) -> Question:
    """Ask for the background."""
    place = scene["background"]
    return rng.choice(("where is this", "what scene is this")), place, [ALSO[place]]


def ask_kind(scene: dict, rng: random.Random) -> Question | None:
    """Ask for the one thing of its category."""
    category = rng.choice(("animal", "vehicle", "food"))
    kinds = [thing["kind"] for thing in scene["objects"] if KINDS[thing["kind"]].category == category]
    text = f"what {category} is {rng.choice(('this', 'in the picture'))}"
    return (text, kinds[0], [phrase(kinds[0]), rng.choice(list(KINDS))]) if len(kinds) == 1 else None


def ask_relation(scene: dict, rng: random.Random) -> Question | None:
    """Ask what stands so to the one thing of its kind: one does, all others clearly on the other side."""
    related, counts = all_related(scene), contents(scene)
    unique = [
        (a, relation, b)
        for a, relation, b in related
        if counts[a] == counts[b] == 1
        and all((c, OPPOSITE[relation], b) in related for c in counts if c in KINDS and c not in (a, b))
    ]
    if not unique:
        return None
    kind, relation, target = rng.choice(unique)
    return f"what is {relation} the {target}", kind, [phrase(kind), target]


ASK_YES, ASK_NO = partial(ask_presence, answer="yes"), partial(ask_presence, answer="no")
WAYS = [*[ASK_YES, ASK_NO] * 3, *[ask_number, ask_place] * 4, *[ask_kind] * 5, *[ask_relation] * 3]
ANSWER_TYPES = {"is there": "yes/no", "how many": "number"}  # of question types; of the rest "other"


def question_type(question: str) -> str:
    """Return the first two words, such as "how many": they say what kind of answer is wanted."""
    return " ".join(question.split()[:2])


def vqa_entries(scenes: list[dict], split: str, first: int, rng: random.Random) -> list[dict]:
    """Return two questions a scene in training, else one or two; question_id is 10 * image number + 0 or 1,
    where images are numbered from `first`.
    """
    ways, entries = evenly(rng, WAYS), []
    for number, scene in enumerate(scenes, first):
        asked: dict[str, Question] = {}
        wanted = 2 if split == "train" else rng.choice((1, 2))
        while len(asked) < wanted:
            question = next(ways)(scene, rng)
            if question:
                asked.setdefault(question[0], question)
        for index, (text, answer, others) in enumerate(asked.values()):
            is_vg = split == "train" and rng.random() < VG_SHARE
            entry = {"dataset": "vg" if is_vg else "vqa", "image": scene["image"], "question": text}
            agreeing = rng.choice(AGREEING)
            answers = rng.sample([answer] * agreeing + rng.choices(others, k=10 - agreeing), 10)
            entries.append({**entry, "answer": answer if is_vg else answers})
            if split != "train":
                kind = question_type(text)
                official = {"question_type": kind, "answer_type": ANSWER_TYPES.get(kind, "other")}
                entries[-1] |= {"question_id": 10 * number + index, **official}
    return entries


def all_answers(entries: list[dict]) -> list[str]:
    """Return what any annotator said, normalised as for the official accuracy, most frequent first."""
    given = [[e["answer"]] if isinstance(e["answer"], str) else e["answer"] for e in entries]
    counts = Counter(normalize_answer(answer) for answers in given for answer in answers)
    return sorted(counts, key=lambda answer: (-counts[answer], answer))


def vqa_chance(train: list[dict], entries: list[dict]) -> dict[str, float]:
    """Return the official accuracy of training's most frequent answer, overall or of the question type."""
    by_type: dict[str, list[dict]] = {}
    for entry in train:
        by_type.setdefault(question_type(entry["question"]), []).append(entry)
    best = {kind: all_answers(asked)[0] for kind, asked in by_type.items()}
    overall = (all_answers(train) or [""])[0]
    guesses = [best.get(entry["question_type"], overall) for entry in entries]
    given = [entry["answer"] for entry in entries]
    typed = mean(answer_scores(guesses, given))
    return {"overall": mean(answer_scores([overall] * len(entries), given)), "by_question_type": typed}


# ------------------------------------------------------------------------------------------------- NLVR2
# By form and label, which of (left, right) show the thing. "One image shows" is never said where both do, as
# readers differ on it.
BOTH, ONE, NEITHER = ((True, True),), ((True, False), (False, True)), ((False, False),)
SHOWN = {
    "the left image shows {}": {True: ((True, False), (True, True)), False: ((False, True), (False, False))},
    "the right image shows {}": {True: ((False, True), (True, True)), False: ((True, False), (False, False))},
    "both images show {}": {True: BOTH, False: ONE},
    "one image shows {}": {True: ONE, False: NEITHER},
    "exactly one image shows {}": {True: ONE, False: BOTH + NEITHER},
    "neither image shows {}": {True: NEITHER, False: ONE + BOTH},
}
EACH = "there is {} in one of the images and {} in the other"
IN_ALL = "there are {} {} in all"
NLVR_FORMS = [*list(SHOWN)[:4] * 3, *list(SHOWN)[4:], EACH, IN_ALL]


def nlvr_pair(pool: Pool, form: str, true: bool, noun: str) -> tuple[str, list[dict | None]]:
    """Return a sentence of this form, about the noun where it names one, and two scenes."""
    rng = pool.rng
    if form == EACH:  # where it is false, one image shows one of the two things and the other image neither
        kinds = rng.sample(list(KINDS), 2)
        pair = [pool.draw_present(kinds[0], True), pool.draw_present(kinds[1], true)]
        if not true and pair[1] and contents(pair[1])[kinds[0]]:
            pair[1] = None
        return form.format(*map(phrase, rng.sample(kinds, 2))), rng.sample(pair, 2)
    if form == IN_ALL:  # where it is false, there is one more or one less
        noun, said = rng.choice(COUNTED), rng.choice((2, 3))
        total = said if true else said + rng.choice((-1, 1))
        left = rng.randint(max(0, total - 3), min(3, total))
        pair = [pool.draw(noun, left), pool.draw(noun, total - left)]
        return form.format(NUMBERS[said], plural(noun)), pair
    pair = [pool.draw_present(noun, present) for present in rng.choice(SHOWN[form][true])]
    return form.format(phrase(noun)), pair


def nlvr_entries(scenes: list[dict], split: str, number: int, rng: random.Random) -> list[dict]:
    """Return `number` statements on two scenes (fewer where a small split lacks fitting ones). Identifiers
    are as NLVR2's: split, number of the sentence, number of the pair that it is said of, and 0.
    """
    pool, nouns, entries = Pool(scenes, rng), evenly(rng, [*KINDS, *BACKGROUNDS]), []
    num_pairs: Counter[str] = Counter()
    forms = evenly(rng, [(form, true) for form in NLVR_FORMS for true in (True, False)])
    for form, true in islice(forms, number):
        for _ in range(TRIES):
            sentence, pair = nlvr_pair(pool, form, true, next(nouns))
            if None not in pair and pair[0] is not pair[1]:
                entry = {"images": [scene["image"] for scene in pair], "sentence": sentence}
                num_pairs[sentence] += 1
                sentence_number = list(num_pairs).index(sentence)
                identifier = f"{split}-{sentence_number}-{num_pairs[sentence] - 1}-0"
                entries.append({**entry, "label": str(true), "identifier": identifier})
                break
    return entries


# ----------------------------------------------------------------------------------------------- SNLI-VE
ENTAILMENT, NEUTRAL, CONTRADICTION = "entailment", "neutral", "contradiction"
CLAIMS = ("belongs to a child", "was a gift", "was found today", "is lost")  # what no picture tells
ANIMAL_CLAIMS = ("is hungry", "is tired", "has a name")
# A claim about what the picture shows is neutral. About what it does not show "a dog is hungry" is false and
# "no dog is hungry" true. So the classes are even, and a sentence alone leaves two of them, equally likely.
VISIBLE = ("kind", "kind", "no kind", "place", "relation", "number")
VE_FORMS = [(form, label) for form in VISIBLE for label in (ENTAILMENT, CONTRADICTION)]
VE_FORMS += [("claim", NEUTRAL), ("claim", CONTRADICTION)] * len(VISIBLE)
VE_FORMS += [("no claim", NEUTRAL), ("no claim", ENTAILMENT)] * len(VISIBLE)


def ve_pair(pool: Pool, form: str, label: str, noun: str) -> tuple[str, dict | None]:
    """Return a sentence of this form, about the noun where it names one, and a scene with this label."""
    rng, true = pool.rng, label == ENTAILMENT
    if form == "relation":
        scene = rng.choice(pool.scenes)
        a, relation, b = rng.choice(all_related(scene) or [("", "", "")])
        if not relation:
            return "", None
        return f"{phrase(a)} is {relation if true else OPPOSITE[relation]} {phrase(b)}", scene
    if form == "number":
        noun = rng.choice((noun, *COUNTED))
        said = rng.randint(1, 3 if noun in COUNTED else 2)  # hardly any scene shows three of a kind
        shown = said if true else rng.choice([n for n in range(4) if n != said])
        what = f"is exactly one {noun}" if said == 1 else f"are exactly {NUMBERS[said]} {plural(noun)}"
        return f"there {what}", pool.draw(noun, shown)
    negated = form.startswith("no")
    subject = f"no {noun}" if negated else phrase(noun)
    if form.endswith("claim"):
        is_animal = KINDS[noun].category == "animal"
        sentence = f"{subject} {rng.choice(CLAIMS + ANIMAL_CLAIMS * is_animal)}"
        return sentence, pool.draw_present(noun, label == NEUTRAL)
    sentence = f"{rng.choice(('there is', 'the picture shows'))} {subject}"
    return sentence, pool.draw_present(noun, true != negated)


def ve_entries(scenes: list[dict], number: int, rng: random.Random) -> list[dict]:
    """Return `number` sentences on one scene each (fewer where a small split lacks fitting ones)."""
    pool, kinds, places = Pool(scenes, rng), evenly(rng, list(KINDS)), evenly(rng, list(BACKGROUNDS))
    entries = []
    for form, label in islice(evenly(rng, VE_FORMS), number):
        for _ in range(TRIES):
            sentence, scene = ve_pair(pool, form, label, next(places if form == "place" else kinds))
            if scene:
                image = scene["image"].removeprefix("images/").removesuffix(".jpg")
                entries.append({"image": image, "sentence": sentence, "label": label})
                break
    return entries


# --------------------------------------------------------------------------------------------- all tasks
def sentence_chance(train: list[dict], entries: list[dict]) -> dict[str, float]:
    """Return the accuracy of training's most frequent label, overall or of the sentence, without a picture;
    and of the latter, where entries have identifiers, the consistency.
    """
    overall, by_sentence = Counter(entry["label"] for entry in train), {}
    for entry in train:
        by_sentence.setdefault(entry["sentence"], Counter())[entry["label"]] += 1
    guesses = {text: max(labels, key=labels.get) for text, labels in by_sentence.items()}
    guess = max(overall, key=overall.get, default=None)
    told = [guesses.get(entry["sentence"], guess) == entry["label"] for entry in entries]
    plain = mean([entry["label"] == guess for entry in entries])
    chance = {"overall": 100 * plain, "by_sentence": 100 * mean(told)}
    if entries and "identifier" in entries[0]:
        chance["consistency"] = consistency([entry["identifier"] for entry in entries], told)
    return chance


def make_tasks(scenes: dict[str, list[dict]], seed: int) -> tuple[dict[str, list | dict], list[dict], dict]:
    """Return the annotations of all tasks for the splits train, val and test: contents by file name; the refs
    of RefCOCO+; and per task the numbers of entries (for grounding sentences), of labels or question types,
    and the chance levels.
    """
    files, refs = grounding_files(scenes, seed)
    sentences = Counter(ref["split"] for ref in refs for _ in ref["sentences"])
    chance = grounding_chances(refs, files["refcoco+/instances.json"], files["refcoco+/dets.json"])
    statistics = {"grounding": {"num_entries": dict(sorted(sentences.items())), "chance": chance}}

    first = 1
    for split, shown in scenes.items():
        number = round(len(shown) * (5 / 3 if split == "train" else 1.5))
        rng = {task: random.Random(f"{seed}/{task}/{split}") for task in ("vqa", "nlvr", "ve")}
        files[f"vqa_{split}.json"] = vqa_entries(shown, split, first, rng["vqa"])
        files[f"nlvr_{split}.json"] = nlvr_entries(shown, split, number, rng["nlvr"])
        files[f"ve_{split}.json"] = ve_entries(shown, number, rng["ve"])
        first += len(shown)
    files["vqa_answer_list.json"] = all_answers(files["vqa_train.json"])

    for task, chance_of in (("vqa", vqa_chance), ("nlvr", sentence_chance), ("ve", sentence_chance)):
        entries = {split: files[f"{task}_{split}.json"] for split in scenes}
        labels = {
            s: Counter(e.get("label") or question_type(e["question"]) for e in entries[s]) for s in scenes
        }
        statistics[task] = {
            "num_entries": {split: len(entries[split]) for split in scenes},
            "balance": {split: dict(sorted(labels[split].items())) for split in scenes},
            "chance": {split: chance_of(entries["train"], entries[split]) for split in ("val", "test")},
        }
    # Through JSON, because a pickle keeps whether equal strings are one object: that depends on how many
    # processes drew the scenes.
    return files, json.loads(json.dumps(refs)), statistics
