"""`Simla`: what a trained model can be asked. Every method takes one or many images and texts.

I images, T texts, B pairs of them, E shared embedding, R side of the square input.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from simla.answers import ranking, writing
from simla.checkpoint.tasks import written_by
from simla.configs.schema import SCORES
from simla.dataset.nlvr import CLASSES as NLVR_CLASSES
from simla.dataset.text import MAX_TEXT_TOKENS, clean_caption, clean_question, tokenize
from simla.dataset.transforms import EVALUATION_VIEW, normalise
from simla.dataset.ve import CLASSES as VE_CLASSES
from simla.dataset.vqa import MAX_WORDS_IN_EVALUATION
from simla.evaluation.alignment.rows import Row
from simla.evaluation.alignment.scores import summarise
from simla.evaluation.rerank import rerank
from simla.heat import Grounding, check_boxes, grounding, heat_maps
from simla.index import CONTENTS, UPDATE, Hit, Index, build_index, check_made_by, open_index
from simla.inputs import Images, Texts, check_count, good_pictures, listed, paired, read_texts
from simla.keywords import Concepts
from simla.models.align import unit_features
from simla.models.gradcam import MODES, check_block, default_block
from simla.suites import blind_scores, score_rows
from simla.utils import UserError, autocast, check_scores, dtype_of, own_surroundings, set_precision

PAIRS_AT_A_TIME = 512  # in `match`
MAX_WORDS = {clean_caption: 30, clean_question: MAX_WORDS_IN_EVALUATION}  # as the scripts read texts


class Head(NamedTuple):
    """A part of a model that answers, the kinds of checkpoint that have it, the loss that pre-trains it."""

    name: str
    kinds: tuple[str, ...]
    loss: str = ""


FEATURES = Head("projection to features", ("pretrain", "retrieval"), "ita")
MATCHING = Head("matching head", ("pretrain", "retrieval"), "itm")
CONCEPTS = Head("concept head", ("pretrain",), "psl")
ANSWERS = Head("answer decoder", ("vqa",))
ENTAILMENT = Head("entailment head", ("ve",))
TWO_IMAGES = Head("two-image head", ("nlvr",))


def _asked(method: Callable) -> Callable:
    """Make a method compute without dropout and as the model was loaded, whatever the caller has set."""

    @wraps(method)
    def ask(self: "Simla", *args, **kwargs):
        self.model.eval()
        if self.device.type == "cuda":  # of all threads
            set_precision(self.device, self.precision)
        with own_surroundings(self.device):
            return method(self, *args, **kwargs)

    return ask


class Simla:
    """A trained model; `load` makes it. What a checkpoint has no head for raises UserError.

    A result that is not finite, as of an overflow in fp16, raises UserError instead of being returned.
    max_tokens, where a method has it: tokens of a text that are read, [CLS] being one, at most the text
    encoder's positions; of captions at most 30 words are read, of questions 50. What is cut is logged.

    kind: pretrain, retrieval (also what Grounding.py writes), vqa, ve or nlvr; source: the checkpoint file;
    config: the sizes, and the defaults of what may be chosen; untrained: losses of pre-training that had
    weight 0, whose heads are not asked.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        config: dict,
        kind: str,
        source: str,
        device: torch.device,
        precision: str,
        concept_head: nn.Linear | None = None,
        word_head: nn.Module | None = None,
        untrained: frozenset[str] = frozenset(),
    ):
        if device.type == "cuda":
            set_precision(device, precision)  # raises UserError where the GPU lacks it
        self.model = model.to(device).eval().requires_grad_(False)
        self.concepts = None if concept_head is None else Concepts(concept_head.to(device), tokenizer)
        self.word_head = None if word_head is None else word_head.to(device).requires_grad_(False)
        self.tokenizer, self.config, self.kind, self.source = tokenizer, config, kind, source
        self.device, self.precision, self.untrained = device, precision, untrained
        self._weights_seen, self._weights_hash = None, ""

    def __repr__(self) -> str:
        return f"Simla({self.kind} checkpoint {self.source}, {self.device}, {self.precision})"

    # ---- contrast and matching ----

    @_asked
    def encode_image(self, images: Images) -> Tensor:
        """Return unit-length features of the images, (I, E) float32 on the CPU."""
        self._need("encode_image", FEATURES)
        return self._encode_images(listed(images, "image")[0])

    def _encode_images(self, images: Sequence) -> Tensor:
        with self._scoring():
            features = [self.model.encode_image(batch)[1].cpu() for batch in self._batches(images)]
        return self._finite(torch.cat(features), "features of images")

    @_asked
    def encode_text(self, texts: Texts, max_tokens: int = MAX_TEXT_TOKENS) -> Tensor:
        """Return unit-length features of the texts, (T, E) float32 on the CPU."""
        self._need("encode_text", FEATURES)
        ids, mask = self._captions(listed(texts, "text")[0], max_tokens)
        return self._encode_captions(ids, mask)

    def _encode_captions(self, ids: Tensor, mask: Tensor) -> Tensor:
        size = self.config["batch_size_test"]
        with self._scoring():
            rows = zip(ids.split(size), mask.split(size), strict=True)
            features = [self.model.encode_text(*row).cpu() for row in rows]
        return self._finite(torch.cat(features), "features of texts")

    @_asked
    def similarity(self, images: Images, texts: Texts, max_tokens: int = MAX_TEXT_TOKENS) -> Tensor:
        """Return the cosine of every image's and text's features, (I, T); a single one has no axis."""
        self._need("similarity", FEATURES)
        (images, one_image), (texts, one_text) = listed(images, "image"), listed(texts, "text")
        cosines = self.encode_image(images) @ self.encode_text(texts, max_tokens).T
        return _without_single_axes(cosines, one_image, one_text)

    @_asked
    def match(self, images: Images, texts: Texts, max_tokens: int = MAX_TEXT_TOKENS) -> Tensor:
        """Return the matching head's probability that a text describes an image, (I, T); a single image or
        text has no axis. Every pair is read jointly, which takes longer than `similarity` and tells more
        apart.
        """
        self._need("match", MATCHING)
        (images, one_image), (texts, one_text) = listed(images, "image"), listed(texts, "text")
        ids, mask = self._captions(texts, max_tokens)
        rows = []
        with self._scoring():
            for image in self._batches(images):
                cross, num = self.model.text_encoder.project(self.model.visual_encoder(image)), len(image)
                size, logits = max(1, PAIRS_AT_A_TIME // num), []
                for some_ids, some_mask in zip(ids.split(size), mask.split(size), strict=True):
                    # All texts for image 0, for image 1, ...
                    texts = some_ids.repeat(num, 1), some_mask.repeat(num, 1)
                    hidden = self.model.text_encoder(*texts, cross, first_only=True)
                    logits.append(self.model.match_logits(hidden[:, 0]).view(num, -1, 2).cpu())
                rows.append(torch.cat(logits, dim=1))
        # The scores, since one that is infinite would pass as the probability 0 or 1.
        probabilities = self._finite(torch.cat(rows), "matching scores").softmax(-1)[..., 1]
        return _without_single_axes(probabilities, one_image, one_text)

    # ---- search ----

    @_asked
    def index(
        self,
        images: str | Path | Sequence[str | Path],
        folder: str | Path | None = None,
        update: bool = False,
        everything: bool = False,
    ) -> Index:
        """Encode a folder of images, subfolders included, or a list of files, for `search`.

        folder: a new one to write the index to, for `open_index`; None: it stays in memory. An image takes
        4 N D bytes (1.8 MB at 384 x 384 for the base size), half of it in bf16 or fp16. update: `folder` may
        hold an index already, of which only images with a new content are then encoded, whatever they are
        called and wherever they lie now. everything: of a folder also what hidden folders, thumbnails and
        waste hold. Files that cannot be read are left out and listed in the index's `unreadable`.
        """
        self._need("index", FEATURES)

        def encode(pixels: list[Tensor]) -> tuple[Tensor, Tensor]:
            with self._scoring():
                states, features = self.model.encode_image(normalise(torch.stack(pixels).to(self.device)))
            states = self._finite(states.to(dtype_of(self.precision)), "token states of images")
            return states, self._finite(features, "features of images")

        sizes = (*self.model.visual_encoder.pos_embed.shape[1:], self.model.embed_dim)
        res, batch_size = self.config["image_res"], self.config["batch_size_test"]
        side = self.image_side
        return build_index(images, folder, encode, sizes, res, batch_size, side, update, everything)

    @_asked
    def open_index(self, folder: str | Path, images: str | Path | None = None) -> Index:
        """Return an index that `index` has written, memory-mapped. images: where the folder that was indexed
        is now, if it has been moved or copied. Raises UserError where the index is damaged, its images have
        changed, or this model would have computed it otherwise.
        """
        self._need("open_index", FEATURES)
        return open_index(folder, self.image_side, images)

    @_asked
    def search(
        self,
        images: Index | str | Path | Sequence[str | Path],
        queries: Texts,
        top: int = 5,
        candidates: int | None = None,
        max_tokens: int = MAX_TEXT_TOKENS,
        score: str | None = None,
        score_itc_weight: float | None = None,
    ) -> list:
        """Return the images that match a text best: a list of Hit, best first, or one for each of many texts.

        The features choose `candidates` images (None: k_test of the config, or `top` if more), which the
        matching head then ranks, exactly as zero_shot_retrieval.py does. So the first hits depend on the
        number of candidates: with a `top` above k_test, give `candidates` to have the same ones for each
        `top`. images: an index, or what `index` takes. score: "itm", the matching logit; "itc", the cosine
        alone, no image being read again; "itm+itc", both, the cosine with the weight `score_itc_weight`;
        None: the config's. Raises UserError where an image found is not as it was when it was indexed.
        """
        score = self.config.get("score") if score is None else score
        for head in (FEATURES,) if score == "itc" else (MATCHING, FEATURES):
            self._need("search", head)
        weight = self.config["score_itc_weight"] if score_itc_weight is None else score_itc_weight
        if score not in SCORES:
            raise UserError(f"score {score!r}: expected {' or '.join(SCORES)}")
        check_count(top, "top")
        num = max(top, self.config["k_test"]) if candidates is None else check_count(candidates, "candidates")
        if num < top:
            raise UserError(
                f"candidates {num} are fewer than top {top}: give more candidates or a smaller top"
            )
        queries, is_single = listed(queries, "query")
        ids, mask = self._captions(queries, max_tokens)
        index = images if isinstance(images, Index) else self.index(images)
        check_made_by(index.made_by, self.image_side, "the index")
        similarity = index.features @ self._encode_captions(ids, mask).T  # (I, T)
        self._finite(similarity, "similarities")
        results = []
        for number in range(len(queries)):
            query = slice(number, number + 1)
            # All of them: the order in which topk has equal ones depends on how many there are.
            rows = similarity[:, number].argsort(descending=True, stable=True)[:num]
            cosines = similarity[rows, number]
            if score == "itc":
                results.append(_hits(index, rows[:top], cosines, cosines))
                continue
            states = index.states[rows]
            with self._scoring():
                features = unit_features(self.model.vision_proj, states[:, 0].to(self.device)).cpu()
                if not (features * index.features[rows]).sum(1).gt(0.99).all():
                    raise UserError("the index is damaged: its states are not of its features; index again")
                inputs = cosines[:, None].to(self.device), num, states, ids[query], mask[query]
                rule = {"score": score, "itc_weight": weight, "rank_and_size": (0, 1)}
                scores = rerank(self.model, *inputs, **rule)[1][0]
                self._finite(scores, "matching scores")
            order = scores.argsort(descending=True, stable=True)[:top]
            results.append(_hits(index, rows[order], scores[order], cosines[order]))
        index.check(dict.fromkeys(hit.file for hits in results for hit in hits))
        return results[0] if is_single else results

    @property
    def image_side(self) -> dict:
        """Return what an index depends on: the weights that read images, by their hash, how the encoder is
        built, how an image comes to it, and the precision.
        """
        return {
            "weights": self._hash_of_weights(),
            "architecture": {**self.config["vit"], "vision_width": self.config["vision_width"]},
            "preprocessing": {"image_res": self.config["image_res"], **EVALUATION_VIEW},
            "precision": self.precision,
        }

    def _hash_of_weights(self) -> str:
        """Return a hash that is computed anew where the weights are not those of the last time:
        `load_state_dict` and optimisers raise their versions; writing to `.data` does not, but changes their
        sums.
        """
        weights = {
            name: value.detach()
            for name, value in self.model.state_dict().items()
            if name.startswith(("visual_encoder.", "vision_proj."))
        }
        versions = [None if value.is_inference() else value._version for value in weights.values()]
        sums = torch.stack([value.sum(dtype=torch.float32) for value in weights.values()]).tolist()
        if self._weights_seen != (seen := (versions, sums)):
            digest = hashlib.blake2b(digest_size=8)
            for name, value in weights.items():
                digest.update(name.encode())
                digest.update(value.float().cpu().numpy().tobytes())
            self._weights_seen, self._weights_hash = seen, digest.hexdigest()
        return self._weights_hash

    # ---- alignment suites ----

    @_asked
    def score_suite(self, rows: Sequence[Row], blind: "Simla | None" = None) -> dict:
        """Return how often this model prefers the right text, or image, of an alignment suite.

        rows: of `dataset.readers.suites`, or of your own, `evaluation.alignment.rows.Row`; blind: a model
        whose head for masked words tells the likelihood of the texts alone, None = this one. ->
        "summary": {group: {"n", "chance", score: ...}} as `evaluation.alignment.scores.summarise` has it, the
        scores being "itc", the cosine; "itm", the log-odds of a match; "itm+itc", their sum with the config's
        `score_itc_weight`; "blind"; each where its head was trained. "rows": those that were scored;
        "scores": of each score a matrix (images, texts) for each of them. "left_out": causes -> numbers of
        rows, of which an image could not be read.
        """
        unasked = {"ita": ("itc", "itm+itc"), "itm": ("itm", "itm+itc")}
        self._need("score_suite", FEATURES if "itm" in self.untrained else MATCHING)
        blind = self if blind is None else blind
        suite = score_rows(self, list(rows))
        for loss in self.untrained & unasked.keys():
            for name in unasked[loss]:
                suite.scores.pop(name, None)
        if suite.rows and blind.word_head is not None and len(suite.rows[0].images) == 1:
            suite.scores["blind"] = blind_scores(blind, suite.rows)
        summary = summarise(suite.rows, suite.scores) if suite.rows else {}
        return {**suite._asdict(), "summary": summary}

    # ---- grounding ----

    @_asked
    def ground(
        self,
        images: Images,
        texts: Texts,
        boxes: Sequence | None = None,
        mode: str = "itm",
        block: int | None = None,
        max_tokens: int = MAX_TEXT_TOKENS,
    ) -> Grounding | list[Grounding]:
        """Return where in the image a text and each of its words is seen, for every pair of image and text.

        boxes: proposals to rank, [[x, y, width, height, ...], ...] in pixels of the image, a list of those
        for many pairs; mode: itm (cross-attention, by the matching head) or itc (the image encoder's
        attention, by the features); block: the layer, from 0, None = two thirds up (8 of 12, as in
        Grounding.py). In the last layer itm only hears [CLS]: the maps of the words are empty there.
        max_tokens: by default what `match` reads; 512 is what Grounding.py does. Always in float32.
        """
        if mode not in MODES:
            raise UserError(f"mode {mode!r}: expected {' or '.join(MODES)}")
        self._need("ground", MATCHING if mode == "itm" else FEATURES)
        block = default_block(self.model, mode) if block is None else block
        check_block(self.model, mode, block)
        limit = self._token_limit(max_tokens)
        images, texts, is_single = self._pairs(images, texts, clean_caption, "texts", limit)
        proposals = [[]] * len(texts) if boxes is None else [boxes] if is_single else list(boxes)
        if len(proposals) != len(texts):
            raise UserError(f"{len(proposals)} lists of boxes for {len(texts)} pairs: give one for each")
        proposals = [check_boxes(rows, f"boxes of pair {number}") for number, rows in enumerate(proposals)]
        results = []
        for start, pictures in self._pictures(images):
            batch = slice(start, start + len(pictures))
            pixels = self._normalised([picture.pixels for picture in pictures])
            maps = heat_maps(self.model, self.tokenizer, mode, block, pixels, texts[batch], limit)
            for (text, heat, words), picture, ranked in zip(maps, pictures, proposals[batch], strict=True):
                for values in (heat, *(of_word for _, of_word in words)):
                    check_scores(values, f"values of the heat map of {text!r}", "fp32")
                results.append(grounding(text, heat, words, picture.height, picture.width, ranked))
        return results[0] if is_single else results

    # ---- questions and statements ----

    @_asked
    def answer(
        self,
        images: Images,
        questions: Texts,
        answers: Sequence[str] | str | Path | None = None,
        top: int = 5,
    ) -> list:
        """Return the best answers as (answer, probability), best first, for every pair of image and question.

        answers: those to rank, as a list or the path of a JSON list; probabilities are among the k_test
        likeliest. None: free answers by beam search, num_beams of them, the probability being that of the
        words one after the other.
        """
        self._need("answer", ANSWERS)
        check_count(top, "top")
        images, questions, is_single = self._pairs(images, questions, clean_question, "questions")
        context = self.model, self.tokenizer, {**self.config, "precision": self.precision}
        give = writing(*context) if answers is None else ranking(*context, answers)
        with self._scoring():
            results = [row[:top] for batch in self._pair_batches(images, questions) for row in give(batch)]
        return results[0] if is_single else results

    @_asked
    def entails(self, images: Images, sentences: Texts) -> dict[str, float] | list[dict[str, float]]:
        """Return {class: probability} of `dataset.ve.CLASSES` for every pair of image and sentence."""
        self._need("entails", ENTAILMENT)
        images, sentences, is_single = self._pairs(images, sentences, clean_caption, "sentences")
        with self._scoring():
            results = [
                dict(zip(VE_CLASSES, row, strict=True))
                for inputs in self._pair_batches(images, sentences)
                for row in self._probabilities(*inputs).tolist()
            ]
        return results[0] if is_single else results

    @_asked
    def compare(self, first: Images, second: Images, statements: Texts) -> float | list[float]:
        """Return the probability that a statement is true of two images, for every triple of them."""
        self._need("compare", TWO_IMAGES)
        left, right, one_pair = paired(listed(first, "image"), listed(second, "image"), "images")
        couples, statements, is_single = self._pairs(
            list(zip(left, right, strict=True)), statements, clean_caption, "statements", one_image=one_pair
        )
        results = []
        with self._scoring():
            batches = (self._pair_batches([couple[i] for couple in couples], statements) for i in (0, 1))
            for (left, ids, mask), (right, _, _) in zip(*batches, strict=True):
                probabilities = self._probabilities(torch.cat([left, right]), ids, mask)
                results += probabilities[:, NLVR_CLASSES.index("True")].tolist()
        return results[0] if is_single else results

    # ---- keywords ----

    @_asked
    def keywords(self, images: Images, top: int = 5, words: str | Sequence[str] | None = None) -> list:
        """Return the words that the concept head of pre-training sees in an image, for each image a list of
        (word, probability), best first. Each word has a probability of its own; they do not sum to 1.

        words: those to choose from, single words of the vocabulary; None: all, function words left out.
        """
        self._need("keywords", CONCEPTS)
        if self.concepts is None:
            raise UserError(f"{self.source} was exported without its concept head; load its source instead")
        check_count(top, "top")
        words = None if words is None else listed(words, "word")[0]
        images, is_single = listed(images, "image")
        features = self._encode_images(images).to(self.device)
        with torch.no_grad():
            results = self.concepts.best(features, top, words)
        return results[0] if is_single else results

    # ---- inputs ----

    def _need(self, method: str, head: Head) -> None:
        needed = f"{method} needs a checkpoint of {written_by(head.kinds)}"
        if self.kind not in head.kinds:
            raise UserError(f"{self.source} is a {self.kind} checkpoint, which has no {head.name}; {needed}")
        if head.loss in self.untrained:
            what = (
                f"{self.source} was trained without the loss of its {head.name}, loss_weights.{head.loss} 0"
            )
            raise UserError(f"{what}; {needed} that was trained with it")

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Score as the task scripts do: no gradients, the precision of the model."""
        with torch.no_grad(), autocast(self.device, self.precision):
            yield

    def _probabilities(self, *inputs: Tensor) -> Tensor:
        """Return those of the classes, (B, C); inputs: what `predict` of the model takes."""
        return self._finite(self.model.predict(*inputs).float(), "scores of classes").softmax(-1)

    def _finite(self, values: Tensor, what: str) -> Tensor:
        return check_scores(values, what, self.precision)

    @property
    def _position_limit(self) -> int:
        return self.model.text_encoder.config.max_position_embeddings

    def _token_limit(self, max_tokens: int) -> int:
        return min(check_count(max_tokens, "max_tokens", least=2), self._position_limit)

    def _captions(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        """Return ids and mask (T, max_tokens or less) as retrieval reads them."""
        limit = self._token_limit(max_tokens)
        texts = read_texts(texts, self.tokenizer, clean_caption, MAX_WORDS[clean_caption], limit)
        ids, mask = tokenize(self.tokenizer, texts, limit, position_limit=self._position_limit)
        return ids.to(self.device), mask.to(self.device)

    def _pairs(
        self,
        images: Images,
        texts: Texts,
        clean: Callable[..., str],
        names: str,
        max_tokens: int | None = None,
        one_image: bool | None = None,
    ) -> tuple[list, list[str], bool]:
        """Return what `paired` does, with clean texts. max_tokens: None = all that there are positions for;
        one_image: whether a list stands for a single input.
        """
        images, is_single = listed(images, "image")
        texts, one_text = listed(texts, names.removesuffix("s"))
        is_single = is_single if one_image is None else one_image
        limit = self._position_limit if max_tokens is None else max_tokens
        texts = read_texts(texts, self.tokenizer, clean, MAX_WORDS[clean], limit)
        return paired((images, is_single), (texts, one_text), f"images and {names}")

    def _pictures(self, images: list) -> Iterator[tuple[int, list]]:
        """Yield the images read, batch by batch, with the number of the first."""
        size = self.config["batch_size_test"]
        for start in range(0, len(images), size):
            yield start, good_pictures(images[start : start + size], self.config["image_res"], start)

    def _normalised(self, pixels: list[Tensor]) -> Tensor:
        return normalise(torch.stack(pixels).to(self.device))

    def _batches(self, images: list) -> Iterator[Tensor]:
        """Yield batches (B, 3, R, R) as the encoder takes them."""
        for _, pictures in self._pictures(images):
            yield self._normalised([picture.pixels for picture in pictures])

    def _pair_batches(self, images: list, texts: list[str]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield image (B, 3, R, R), ids and mask (B, T) of the pairs, as the task scripts collate them."""
        size = self.config["batch_size_test"]
        for start, image in zip(range(0, len(images), size), self._batches(images), strict=True):
            batch = texts[start : start + size]
            ids, mask = tokenize(self.tokenizer, batch, position_limit=self._position_limit)
            yield image, ids.to(self.device), mask.to(self.device)


def _hits(index: Index, rows: Tensor, scores: Tensor, cosines: Tensor) -> list[Hit]:
    values = zip(rows.tolist(), scores.tolist(), cosines.tolist(), strict=False)
    return [Hit(index.files[row], score, cosine) for row, score, cosine in values]


def _without_single_axes(values: Tensor, one_image: bool, one_text: bool) -> Tensor:
    return values[0 if one_image else slice(None), ..., 0 if one_text else slice(None)]


def kept_index(model: "Simla", images: str | Path, folder: str | Path, everything: bool = False) -> Index:
    """Return the index of a folder of images that `folder` keeps, made where it is missing. Raises UserError
    where it is of other images, and for what `open_index` and `build_index` refuse.
    """
    if not Path(folder, CONTENTS).exists():
        return model.index(images, folder, everything=everything)
    index = model.open_index(folder, images)
    if everything and not index.everything:
        what = f"the index {folder} is without hidden folders and waste"
        raise UserError(f"{what}; {UPDATE} and everything=True")
    return index
