"""The question encoder and answer decoder: recorded numbers, then everything against the slow obvious way."""

import hashlib
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from goldens_io import digest, fill_model, golden, golden_image
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import (
    TINY_BERT,
    TINY_CLS_ID,
    TINY_VIT,
    check_gradients,
    shake,
    tiny_pretrain_model,
    tiny_texts,
    vit_sizes,
)
from test_losses import CLOSE, cross_entropy, generator, log_softmax, mixed, one_hot, seeds, softmax
from test_pretrain_goldens import check_grads
from torch.nn.attention import SDPBackend, sdpa_kernel

from simla.checkpoint.initial import load_initial_weights
from simla.checkpoint.load import load_weights
from simla.models import losses
from simla.models.answer_tree import AnswerTree
from simla.models.bert import BertConfig
from simla.models.vqa import SIMLAVQA, VQABatch, extend_beams
from simla.utils import UserError, autocast, true_indices

# ---- recorded numbers ----


def golden_vqa_model() -> SIMLAVQA:
    """With the published code's switches."""
    config = golden("vqa_structure")["config"]
    model = SIMLAVQA(
        vit_sizes(config),
        BertConfig.read(config["bert"]),
        vqa_no_distill=True,
        mlm_distill_over_sequence=True,
    )
    return model.eval()


@pytest.fixture
def filled():
    model = golden_vqa_model()
    fill_model(model, golden("vqa_structure")["aliases"])
    return model


def text(record: dict) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(record["input_ids"]), torch.tensor(record["attention_mask"])


def golden_questions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = golden("vqa")["inputs"]
    return golden_image(inputs["image_seed"], inputs["image_shape"]), *text(inputs["question"])


def test_state_dict_is_the_published_one():
    structure, model = golden("vqa_structure"), golden_vqa_model()
    state = model.state_dict()
    actual = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]
    assert actual == structure["state_dict"]
    assert [[n, p.requires_grad] for n, p in model.named_parameters()] == structure["named_parameters"]
    assert [n for n, _ in model.named_buffers()] == structure["named_buffers"]
    for later, deciding in structure["aliases"].items():
        assert state[later].data_ptr() == state[deciding].data_ptr()
    assert len(model.text_decoder.bert.encoder.layer) == structure["decoder_layers"] == 6
    fill_model(model, structure["aliases"])
    all_bytes = b"".join(v.contiguous().numpy().tobytes() for v in state.values() if v.is_floating_point())
    assert hashlib.sha256(all_bytes).hexdigest() == structure["filled_weights"]["sha256"]


@pytest.mark.parametrize("alpha", ["0.0", "0.4"])
@sdpa_kernel(SDPBackend.MATH)
def test_one_step(filled, alpha):
    """Published: the decoder never receives alpha, so that the loss is the same for both."""
    recorded, inputs = golden("vqa"), golden("vqa")["inputs"]
    weights, num_answers = torch.tensor(inputs["weights"]), torch.tensor(inputs["answers_per_question"])
    answers = text(inputs["answer"])
    indices = true_indices(answers[1][:, 1:])
    batch = VQABatch(*golden_questions(), *answers, indices, weights, num_answers)
    named = filled(batch, float(alpha))
    assert list(named) == ["loss"]
    assert named["loss"].item() == pytest.approx(recorded["alphas"][alpha]["loss"], rel=5e-6)
    assert named["loss"].item() == pytest.approx(recorded["loss_without_distill"], rel=5e-6)
    state = filled.state_dict()
    for name, value in recorded["momentum_after_forward"].items():
        assert digest(state[name]) == pytest.approx(value, rel=1e-6, abs=1e-7), name
    named["loss"].backward()
    check_grads(filled, recorded["alphas"]["0.4"] | recorded["alphas"][alpha])


@pytest.mark.parametrize("chunk_rows", [1024, 9, 3, 1])
def test_recorded_ranking(filled, chunk_rows):
    recorded = golden("vqa")["rank_answer"]
    answers = AnswerTree.build(*text(recorded["candidates"]))
    numbers, probabilities = filled.rank_answers(*golden_questions(), answers, recorded["k"], chunk_rows)
    assert numbers.tolist() == recorded["topk_ids"]
    for row, expected in zip(probabilities.tolist(), recorded["topk_probs"], strict=True):
        assert row == pytest.approx(expected, rel=5e-6)


# ---- the loss ----


def tiny_model(vit: dict = TINY_VIT, bert: BertConfig = TINY_BERT, **switches) -> SIMLAVQA:
    return shake(SIMLAVQA(vit, bert, **switches))


NUM_ANSWERS = torch.tensor([2, 1, 3])


def tiny_batch(padding: int = 0, seed: int = 0) -> dict:
    """Three questions with two, one and three answers of 2 to 4 tokens; `padding` more columns of nothing."""
    rng = generator(seed)
    image = torch.randn(3, 3, 24, 24, generator=rng)
    question_ids, question_mask = tiny_texts([3, 5, 2], 5, rng)
    answer_ids, answer_mask = tiny_texts([3, 2, 4, 2, 3, 2], 4, rng)
    texts = [
        torch.nn.functional.pad(part, (0, padding))
        for part in (question_ids, question_mask, answer_ids, answer_mask)
    ]
    names = ("question_ids", "question_mask", "answer_ids", "answer_mask")
    weights = torch.tensor([0.7, 0.3, 0.5, 0.6, 0.3, 0.1])
    return {
        "answer_indices": true_indices(texts[3][:, 1:]),
        "image": image,
        **dict(zip(names, texts, strict=True)),
        "weights": weights,
        "num_answers": NUM_ANSWERS,
    }


def loss_of(model: SIMLAVQA, batch: dict, alpha: float) -> torch.Tensor:
    return model(VQABatch(**batch), alpha)["loss"]


def test_every_trainable_parameter_gets_a_gradient():
    model = tiny_model({**TINY_VIT, "mask_token": True})
    loss_of(model, tiny_batch(), 0.4).backward()
    check_gradients(model)


def decoder_logits(model: SIMLAVQA, batch: dict, suffix: str) -> torch.Tensor:
    """Question by question, answer by answer, keys and values anew for each: (A, L-1, V)"""
    parts = [getattr(model, name + suffix) for name in ("visual_encoder", "text_encoder", "text_decoder")]
    visual, encoder, decoder = parts
    own = [question for question, num in enumerate(batch["num_answers"].tolist()) for _ in range(num)]
    rows = []
    for row, question in enumerate(own):
        one = slice(question, question + 1)
        mask = batch["question_mask"][one]
        image_cross = encoder.project(visual(batch["image"][one]))
        states = encoder(batch["question_ids"][one], mask, image_cross)
        ids, answer_mask = batch["answer_ids"][row : row + 1], batch["answer_mask"][row : row + 1]
        cross = decoder.bert.project(states, mask)
        rows.append(decoder.predict(decoder.bert(ids, answer_mask, cross, causal=True))[:, :-1])
    return torch.cat(rows).detach()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("over_sequence", [False, True])
def test_loss_equals_loops(alpha, over_sequence):
    model, batch = tiny_model(mlm_distill_over_sequence=over_sequence), tiny_batch()
    found = loss_of(model, batch, alpha).item()
    logits, logits_m = (decoder_logits(model, batch, suffix) for suffix in ("", "_m"))
    assert (logits - logits_m).abs().max() > 0.01
    expected = 0.0
    for row, weight in enumerate(batch["weights"].tolist()):
        over_places = list(zip(*map(log_softmax, logits[row].T.tolist()), strict=True))  # [position][word]
        for place in range(int(batch["answer_mask"][row].sum()) - 1):
            student, teacher = logits[row, place].tolist(), softmax(logits_m[row, place].tolist())
            label = one_hot(int(batch["answer_ids"][row, place + 1]), len(student))
            hard, soft = cross_entropy(student, label), cross_entropy(student, teacher)
            if over_sequence:
                soft = -sum(t * value for t, value in zip(teacher, over_places[place], strict=True))
            expected += weight * mixed(alpha, hard, soft) / len(batch["image"])
    assert found == pytest.approx(expected, **CLOSE)


def test_the_published_switch_leaves_alpha_out():
    published = tiny_model(vqa_no_distill=True)
    without = loss_of(tiny_model(), tiny_batch(), 0.0)
    assert loss_of(published, tiny_batch(), 0.4) == without != loss_of(tiny_model(), tiny_batch(), 0.4)
    online, twin = (
        part.cls["predictions"].bias for part in (published.text_decoder, published.text_decoder_m)
    )
    expected = 0.995 * twin + 0.005 * online
    loss_of(published, tiny_batch(), 0.4)
    torch.testing.assert_close(twin, expected)  # the twins move all the same


@given(seeds, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40)
def test_with_a_teacher_like_the_labels_alpha_changes_nothing(seed, answers, length):
    rng = generator(seed)
    logits = torch.randn(answers, length, 7, generator=rng)
    labels = torch.randint(0, 7, (answers, length), generator=rng)
    weights = torch.rand(answers, generator=rng)
    sure = torch.nn.functional.one_hot(labels, 7) * 1000.0
    flat = logits.flatten(0, 1), labels.flatten(), sure.flatten(0, 1), weights.repeat_interleave(length)
    hard = losses.answer_loss(*flat, 0.0).item()
    assert losses.answer_loss(*flat, 0.7).item() == pytest.approx(hard, rel=1e-5)
    over_sequence = losses.answer_loss_over_sequence(logits, labels, sure, weights, 0.0)
    assert over_sequence.item() == pytest.approx(hard, rel=1e-5)
    padded = labels.masked_fill(torch.rand(answers, length, generator=rng) < 0.5, -100)
    nothing = losses.answer_loss_over_sequence(logits, padded.fill_(-100), sure, weights, 0.4)
    assert nothing.item() == 0


def test_padding_changes_nothing():
    for switches, alpha in (({}, 0.4), ({"mlm_distill_over_sequence": True}, 0.0)):
        plain, padded = (loss_of(tiny_model(**switches), tiny_batch(n), alpha).item() for n in (0, 3))
        assert padded == pytest.approx(plain, rel=1e-5)
    model, (questions, candidates) = tiny_model(), ranking_inputs(12)
    more = [questions[0], *(torch.nn.functional.pad(part, (0, 4)) for part in questions[1:])]
    wide = [torch.nn.functional.pad(part, (0, 4)) for part in candidates]
    for one, other in (
        tuple(
            model.rank_answers(*asked, AnswerTree.build(*listed), 5)
            for asked, listed in ((questions, candidates), (more, wide))
        ),
        (model.generate(*questions, 2, 4, 1, 2), model.generate(*more, 2, 4, 1, 2)),
    ):
        assert torch.equal(one[0], other[0])
        torch.testing.assert_close(one[1], other[1], rtol=1e-5, atol=1e-5)


def test_no_prediction_sees_a_later_token():
    model, batch = tiny_model(), tiny_batch()
    before = decoder_logits(model, batch, "")
    for place in range(1, 4):
        changed = batch["answer_ids"].clone()
        changed[:, place] = (changed[:, place] + 5) % 40
        after = decoder_logits(model, {**batch, "answer_ids": changed}, "")
        assert torch.equal(after[:, :place], before[:, :place])
        if place < 3:
            long_enough = batch["answer_mask"][:, place] == 1
            assert (after[:, place] != before[:, place]).any(-1)[long_enough].all()


# ---- ranking ----


def ranking_inputs(num_candidates: int, seed: int = 1) -> tuple[tuple, tuple]:
    """Questions and candidates of 1 to 4 tokens after [CLS], several with the same first one."""
    rng = generator(seed)
    image = torch.randn(3, 3, 24, 24, generator=rng)
    candidate_ids, candidate_mask = tiny_texts([2 + i % 4 for i in range(num_candidates)], 5, rng)
    candidate_ids[:, 1] = torch.randint(3, 9, (num_candidates,), generator=rng)
    return (image, *tiny_texts([4, 2, 6], 6, rng)), (candidate_ids, candidate_mask)


def slow_ranking(model: SIMLAVQA, questions: tuple, candidates: tuple, k: int) -> list[list]:
    """[(score, number), ...] of each question, one candidate at a time."""
    decoder, ranked = model.text_decoder, []
    for image, ids, mask in zip(*(part.split(1) for part in questions), strict=True):
        states = model.question_states(image, ids, mask)

        def next_words(answer: list[int], states=states, mask=mask) -> list[float]:
            rows = torch.tensor([answer])
            cross = decoder.bert.project(states, mask)
            hidden = decoder.bert(rows, torch.ones_like(rows), cross, causal=True)
            return log_softmax(decoder.predict(hidden[:, -1])[0].tolist())

        first = next_words([TINY_CLS_ID])
        answers = [row[: int(m.sum())].tolist() for row, m in zip(*candidates, strict=True)]
        chosen = sorted(range(len(answers)), key=lambda number: -first[answers[number][1]])[:k]
        scored = []
        for number in chosen:
            answer = answers[number]
            likelihood = sum(next_words(answer[:i])[answer[i]] for i in range(1, len(answer)))
            scored.append((first[answer[1]] + likelihood, number))
        ranked.append(sorted(scored, key=lambda pair: -pair[0]))
    return ranked


@pytest.mark.parametrize(("k", "chunk_rows"), [(1, 1024), (4, 8), (5, 3), (10, 1024), (99, 4)])
@torch.no_grad()
def test_ranking_is_the_slow_way_made_fast(k, chunk_rows):
    model, (questions, candidates) = tiny_model(), ranking_inputs(10)
    numbers, probabilities = model.rank_answers(*questions, AnswerTree.build(*candidates), k, chunk_rows)
    assert numbers.shape == probabilities.shape == (3, min(k, 10))
    slow = slow_ranking(model, questions, candidates, k)
    for row, shares, expected in zip(numbers.tolist(), probabilities.tolist(), slow, strict=True):
        assert row == [number for _, number in expected]
        assert shares == pytest.approx(softmax([score for score, _ in expected]), rel=1e-4, abs=1e-6)


def test_of_equal_answers_the_earlier_ones_are_kept():
    model, (questions, (ids, mask)) = tiny_model(), ranking_inputs(1)
    answers = AnswerTree.build(ids.repeat(30, 1), mask.repeat(30, 1))
    numbers, probabilities = model.rank_answers(*questions, answers, 4)
    assert numbers.tolist() == [[0, 1, 2, 3]] * 3
    assert probabilities.flatten().tolist() == pytest.approx([0.25] * 12)


def chosen_by(model: SIMLAVQA, monkeypatch, *ranking) -> tuple[list, list]:
    """What the decoder read while it ranked, (streams, tokens to each), and the rows of its LM head."""
    read, predicted = [], []
    original, predict = model.text_decoder.bert.forward, model.text_decoder.predict

    def forward(ids, mask, cross, **rest):
        read.append((len(cross[0].keys), ids.shape[1]))
        assert cross[0].index is None and len(ids) == read[-1][0]
        return original(ids, mask, cross, **rest)

    def spied_predict(hidden):
        predicted.append(len(hidden))
        return predict(hidden)

    monkeypatch.setattr(model.text_decoder.bert, "forward", forward)
    monkeypatch.setattr(model.text_decoder, "predict", spied_predict)
    model.rank_answers(*ranking)
    return read, predicted


@pytest.mark.parametrize("chunk_rows", [1, 4, 7, 16])
def test_ranking_scores_a_bounded_number_of_answers_and_keeps_one_stream_a_question(chunk_rows, monkeypatch):
    model, (questions, candidates) = tiny_model(), ranking_inputs(10)
    answers = AnswerTree.build(*candidates)
    read, predicted = chosen_by(model, monkeypatch, *questions, answers, 6, chunk_rows)
    assert {streams for streams, _ in read} <= {min(3, max(1, chunk_rows // 6)), 1}
    longest = int(candidates[1].sum(1).max()) - 2  # beginnings of an answer beside [CLS], which all share
    assert all(streams * (tokens - 1) <= chunk_rows * longest for streams, tokens in read)
    assert max(predicted) <= max(3, chunk_rows * longest)


def test_what_answers_begin_with_is_read_and_predicted_from_once(monkeypatch):
    model, (questions, _) = tiny_model(), ranking_inputs(1)
    listed = [[1, 5, 2], [1, 5, 6, 2], [1, 5, 6, 7, 2], [1, 5, 6, 8, 2], [1, 9, 2], [1, 5, 6, 8, 2]]
    beginnings = {tuple(row[:end]) for row in listed for end in range(1, len(row))}
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in listed])
    answers = AnswerTree.build(ids, (ids > 0).long())
    read, predicted = chosen_by(model, monkeypatch, *questions, answers, 99)
    assert read == [(3, 1), (3, len(beginnings))]
    assert predicted == [3, 3 * (len(beginnings) - 1)]


@pytest.mark.parametrize("lengths", [[2, 2, 2], [2, 5, 2, 2]])
@torch.no_grad()
def test_answers_that_end_after_a_word_are_ranked_too(lengths):
    model, (questions, _) = tiny_model(), ranking_inputs(1)
    candidates = tiny_texts(lengths, 5, generator(4))
    numbers, probabilities = model.rank_answers(*questions, AnswerTree.build(*candidates), 2, 1024)
    slow = slow_ranking(model, questions, candidates, 2)
    for row, shares, expected in zip(numbers.tolist(), probabilities.tolist(), slow, strict=True):
        assert row == [number for _, number in expected]
        assert shares == pytest.approx(softmax([score for score, _ in expected]), rel=1e-4, abs=1e-6)


@given(seeds, st.integers(1, 12), st.integers(1, 9))
@settings(max_examples=60)
def test_branches_are_the_beginnings_of_the_chosen_answers(seed, num_answers, k):
    """Few words and short answers, so that many begin alike."""
    rng = generator(seed)
    ids = torch.randint(1, 4, (num_answers, 5), generator=rng)
    ids[:, 0] = TINY_CLS_ID
    lengths = torch.randint(2, 6, (num_answers,), generator=rng)
    mask = (torch.arange(5) < lengths[:, None]).long()
    chosen = torch.randint(0, num_answers, (2, k), generator=rng)
    branches = AnswerTree.build(ids * mask, mask).branches(chosen)
    for question, numbers in enumerate(chosen.tolist()):
        answers = [ids[number, : lengths[number]].tolist() for number in numbers]
        expected = {tuple(answer[:end]) for answer in answers for end in range(1, len(answer))}
        num = int(branches.num[question])
        found = []
        for row in range(num):
            seen = branches.seen[question, row].nonzero().flatten().tolist()
            assert branches.positions[question, seen].tolist() == list(range(len(seen))) and seen[-1] == row
            found.append(tuple(branches.ids[question, seen].tolist()))
        assert len(found) == len(expected) and set(found) == expected
        for answer, places in zip(answers, branches.predictors[question].tolist(), strict=True):
            assert [found[place] for place in places[: len(answer) - 1]] == [
                tuple(answer[:end]) for end in range(1, len(answer))
            ]
            assert not any(places[len(answer) - 1 :])


def test_ranking_and_writing_in_half_precision_are_close():
    """bf16 keeps 8 bits of every step; scores and probabilities are single precision."""
    model, (questions, candidates) = shake(tiny_model(), std=0.1), ranking_inputs(10)
    answers = AnswerTree.build(*candidates)
    numbers, probabilities = model.rank_answers(*questions, answers, 10)
    with autocast(torch.device("cpu"), "bf16"):
        found, shares = model.rank_answers(*questions, answers, 10)
        _, scores = model.generate(*questions, 2, 4, 1, 2)
    assert shares.dtype == scores.dtype == torch.float32
    in_list_order = [p.gather(1, n.argsort(1)) for n, p in ((numbers, probabilities), (found, shares))]
    torch.testing.assert_close(*in_list_order, rtol=0.1, atol=0.01)


# ---- generation ----

SMALL = replace(TINY_BERT, vocab_size=6)  # 0 padding, 1 [CLS], 2 [SEP], 3 words
SEP, PAD = 2, 0


def next_log_probs(model: SIMLAVQA, states: torch.Tensor, mask: torch.Tensor, answer: tuple) -> list[float]:
    decoder = model.text_decoder
    ids = torch.tensor([[TINY_CLS_ID, *answer]])
    hidden = decoder.bert(ids, torch.ones_like(ids), decoder.bert.project(states, mask), causal=True)
    return log_softmax(decoder.predict(hidden[:, -1])[0].tolist())


def all_answers(model: SIMLAVQA, states: torch.Tensor, mask: torch.Tensor, length: int) -> dict:
    """Every answer that ends with [SEP] or is cut off at `length` tokens -> its log-probability."""
    found, known = {}, {}
    for answer in product(range(1, 6), repeat=length):
        end = answer.index(SEP) + 1 if SEP in answer else length
        answer = answer[:end]
        if answer not in found:
            for i in range(end):
                if answer[:i] not in known:
                    known[answer[:i]] = next_log_probs(model, states, mask, answer[:i])
            found[answer] = sum(known[answer[:i]][token] for i, token in enumerate(answer))
    return found


@pytest.fixture(scope="module")
def small():
    """A model of three words, two questions, and all their answers of up to three tokens."""
    model, rng = tiny_model(bert=SMALL), generator(3)
    questions = torch.randn(2, 3, 24, 24, generator=rng), torch.tensor([[1, 3, 4], [1, 5, 0]])
    questions = *questions, (questions[1] > 0).long()
    with torch.no_grad():
        states = model.question_states(*questions)
        rows = zip(states.split(1), questions[2].split(1), strict=True)
        return model, questions, [all_answers(model, *row, 3) for row in rows], states


def plain(ids: list[int]) -> tuple[int, ...]:
    return tuple(token for token in ids if token != PAD)


def test_a_wide_beam_finds_all_answers_in_order(small):
    model, questions, expected, _ = small
    ids, scores = model.generate(*questions, 120, 3, TINY_CLS_ID, SEP, PAD)
    for rows, row_scores, answers in zip(ids.tolist(), scores.tolist(), expected, strict=True):
        found = {plain(r): s for r, s in zip(rows, row_scores, strict=True) if s > -math.inf}
        assert set(found) == set(answers) and len(found) < 120
        assert all(found[answer] == pytest.approx(answers[answer], abs=1e-4) for answer in answers)
        assert row_scores == sorted(row_scores, reverse=True)
        assert sum(math.exp(score) for score in found.values()) <= 1


@torch.no_grad()
def test_narrow_beams_are_those_of_a_plain_search(small):
    model, questions, _, states = small
    for num_beams in (1, 2, 3):
        ids, scores = model.generate(*questions, num_beams, 5, TINY_CLS_ID, SEP, PAD)
        for question in range(2):
            row, beams = slice(question, question + 1), [((), 0.0)]
            for _ in range(5):
                longer = []
                for answer, score in beams:
                    if answer[-1:] == (SEP,):
                        longer.append((answer, score))
                        continue
                    following = next_log_probs(model, states[row], questions[2][row], answer)
                    longer += [((*answer, token), score + following[token]) for token in range(1, 6)]
                beams = sorted(longer, key=lambda beam: -beam[1])[:num_beams]
            assert [plain(r) for r in ids[question].tolist()] == [answer for answer, _ in beams]
            assert scores[question].tolist() == pytest.approx([score for _, score in beams], abs=1e-4)


def test_generation_never_runs_past_the_position_table(small):
    model, questions, _, _ = small
    model.text_decoder.cls["predictions"].bias.data[SEP] -= 1000  # never ends by itself
    try:
        ids, scores = model.generate(*questions, 2, 1000, TINY_CLS_ID, SEP, PAD)
    finally:
        model.text_decoder.cls["predictions"].bias.data[SEP] += 1000
    assert ids.shape == (2, 2, SMALL.max_position_embeddings) and scores.isfinite().all()


def test_a_finished_beam_goes_on_by_padding_alone():
    ids = torch.tensor([[[1, 2], [1, 3]]])
    following = torch.tensor([0.9, 0.02, 0.05, 0.03]).log().expand(1, 2, 4)
    longer, scores = extend_beams(ids, torch.tensor([[-1.0, -1.5]]), following, SEP, PAD)
    assert longer.tolist() == [[[1, 2, 0], [1, 3, 2]]]
    assert scores[0].tolist() == pytest.approx([-1.0, -1.5 + math.log(0.05)])


# ---- initial weights ----


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """Two folders of plain BERT weights and a ViT file."""
    import timm
    from transformers import BertConfig as HubConfig
    from transformers import BertForMaskedLM as HubBert

    folder = tmp_path_factory.mktemp("berts")
    names = ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")
    sizes = {name: getattr(TINY_BERT, name) for name in (*names, "max_position_embeddings")}
    for seed, name in enumerate(("encoder", "decoder")):
        torch.manual_seed(seed)
        HubBert(HubConfig(num_hidden_layers=3, **sizes)).save_pretrained(folder / name)
    vit = {"img_size": 24, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    torch.save(timm.models.VisionTransformer(**vit).state_dict(), folder / "vit.pth")
    return folder


@pytest.mark.parametrize("decoder", ["encoder", "decoder"])
def test_the_decoder_starts_from_the_upper_layers_of_bert(berts, decoder):
    from transformers import BertForMaskedLM as HubBert

    model = SIMLAVQA(TINY_VIT, replace(TINY_BERT, num_hidden_layers=3))
    before = {name: value.clone() for name, value in model.text_decoder.state_dict().items()}
    config = {
        "init": "pretrained",
        "image_encoder": str(berts / "vit.pth"),
        "text_encoder": str(berts / "encoder"),
    }
    load_initial_weights(
        model, config | ({"text_decoder": str(berts / decoder)} if decoder != "encoder" else {})
    )
    source = HubBert.from_pretrained(berts / decoder).state_dict()
    for name, value in model.text_decoder.state_dict().items():
        if "crossattention" in name:
            assert torch.equal(value, before[name]), name
        elif not name.endswith(("decoder.bias", "position_ids")):
            origin = name.replace("layer.1.", "layer.2.").replace("layer.0.", "layer.1.")  # 3 layers: 1 and 2
            assert torch.equal(value, source[origin]), name
        assert torch.equal(value, model.text_decoder_m.state_dict()[name]), name
    encoder = HubBert.from_pretrained(berts / "encoder").state_dict()
    own = model.text_encoder.encoder.layer[0].output.dense.weight
    assert torch.equal(own, encoder["bert.encoder.layer.0.output.dense.weight"])
    with pytest.raises(UserError, match=r"text_decoder '/no/where': transformers cannot get"):
        load_initial_weights(model, config | {"text_decoder": "/no/where"})


def test_a_pretraining_checkpoint_fills_encoder_and_decoder(tmp_path):
    pretrained = shake(tiny_pretrain_model(bert=replace(TINY_BERT, num_hidden_layers=4)))
    torch.save({"model": pretrained.state_dict()}, tmp_path / "pretrained.pth")
    model = SIMLAVQA(TINY_VIT, replace(TINY_BERT, num_hidden_layers=4))
    report = load_weights(model, tmp_path / "pretrained.pth", "VQA")
    assert not report.fresh
    state, source = model.state_dict(), pretrained.state_dict()
    for suffix in ("", "_m"):
        for i in range(2):
            name = "crossattention.self.key.weight"
            found = state[f"text_decoder{suffix}.bert.encoder.layer.{i}.{name}"]
            assert torch.equal(found, source[f"text_encoder{suffix}.bert.encoder.layer.{2 + i}.{name}"])
        head = "cls.predictions.transform.dense.weight"
        assert torch.equal(state[f"text_decoder{suffix}.{head}"], source[f"text_encoder{suffix}.{head}"])
