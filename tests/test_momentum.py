"""Twins against the formula parameter by parameter, the queue against a ring buffer of Python lists."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import TINY_BERT, losses_of, shake, tiny_batch, tiny_pretrain_model
from torch import nn

from simla.models.bert import BertForMaskedLM
from simla.models.momentum import advance, enqueue, make_twin, new_queue, update_twins


def test_a_new_queue_holds_unit_vectors():
    queue = new_queue(8, 30)
    assert queue.shape == (8, 30)
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(30))


def check_ring_buffer(queue_size: int, batches: list[int], dtype: torch.dtype = torch.float32) -> None:
    queue, pointer = torch.full((3, queue_size), -1.0), torch.zeros(1, dtype=torch.long)
    ring, at, entry = [-1.0] * queue_size, 0, 0
    for size in batches:
        entries = torch.arange(entry, entry + size, dtype=dtype)
        enqueue(queue, pointer, entries[:, None] + torch.tensor([0, 100, 200], dtype=dtype))
        advance(pointer, size, queue_size)
        for value in range(entry, entry + size):
            ring[at] = float(value)
            at = (at + 1) % queue_size
        entry += size
        assert pointer.tolist() == [at]
        for row, offset in enumerate((0, 100, 200)):
            assert queue[row].tolist() == [-1.0 if value < 0 else value + offset for value in ring]


@given(st.integers(1, 7), st.lists(st.integers(0, 17), max_size=6))
@settings(max_examples=150)
def test_queue_is_a_ring_buffer_for_any_batch_size(queue_size, batches):
    check_ring_buffer(queue_size, batches)


def test_queue_takes_batches_that_fill_it_wrap_round_and_exceed_it():
    check_ring_buffer(5, [5, 5])  # exactly full
    check_ring_buffer(5, [3, 4, 3])  # wraps in the middle of a batch
    check_ring_buffer(5, [2, 13, 1])  # only the last 5 of 13 stay
    check_ring_buffer(5, [3, 3], dtype=torch.float16)  # features of mixed precision


def test_queue_entries_carry_no_gradient():
    queue, features = new_queue(3, 4), torch.randn(2, 3, requires_grad=True)
    enqueue(queue, torch.tensor([3]), features)
    assert not queue.requires_grad
    torch.testing.assert_close(queue[:, 3], features[0].detach())
    torch.testing.assert_close(queue[:, 0], features[1].detach())


def test_a_twin_starts_as_a_copy_that_shares_nothing():
    online = shake(BertForMaskedLM(TINY_BERT))
    twin = make_twin(online)
    theirs = dict(twin.named_parameters())
    for name, parameter in online.named_parameters():
        assert torch.equal(parameter, theirs[name]), name
        assert parameter.data_ptr() != theirs[name].data_ptr(), name
        assert parameter.requires_grad and not theirs[name].requires_grad, name


def test_update_is_the_formula_for_every_parameter_and_keeps_ties():
    online, twin = shake(BertForMaskedLM(TINY_BERT), 0), shake(BertForMaskedLM(TINY_BERT), 1)
    projection, projection_m = shake(nn.Linear(3, 2), 2), shake(nn.Linear(3, 2), 3)
    before = {name: value.clone() for name, value in twin.named_parameters()}
    before_projection = projection_m.weight.detach().clone()
    update_twins([(online, twin), (projection, projection_m)], 0.9)
    for name, value in online.named_parameters():
        moved = 0.9 * before[name] + 0.1 * value
        torch.testing.assert_close(twin.get_parameter(name), moved, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(projection_m.weight, 0.9 * before_projection + 0.1 * projection.weight)
    # A tied matrix has two names and must move once.
    head, words = twin.cls["predictions"], twin.bert.embeddings.word_embeddings
    assert head.decoder.weight is words.weight
    assert head.decoder.bias is head.bias


def test_update_with_momentum_1_and_0_keeps_and_copies():
    online, twin = shake(nn.Linear(3, 2), 0), shake(nn.Linear(3, 2), 1)
    kept = twin.weight.detach().clone()
    update_twins([(online, twin)], 1.0)
    assert torch.equal(twin.weight, kept)
    update_twins([(online, twin)], 0.0)
    assert torch.equal(twin.weight, online.weight)


def test_twins_of_the_model_cover_all_but_matching_head_and_temperature():
    model = tiny_pretrain_model()
    online = {id(p) for module, _ in model.twins() for p in module.parameters()}
    twins = {id(p) for _, twin in model.twins() for p in twin.parameters()}
    names = {name for name, p in model.named_parameters() if id(p) not in online | twins}
    assert names == {"temp", "itm_head.weight", "itm_head.bias"}
    assert all(p.requires_grad == (id(p) not in twins) for p in model.parameters())


def test_twins_move_in_the_forward_and_get_no_gradient():
    model = shake(tiny_pretrain_model(momentum=0.5))
    online, twin = model.text_encoder.bert.embeddings, model.text_encoder_m.bert.embeddings
    expected = (online.word_embeddings.weight + twin.word_embeddings.weight) / 2
    sum(losses_of(model, tiny_batch(3)).values()).backward()
    torch.testing.assert_close(twin.word_embeddings.weight, expected.detach())
    assert all(p.grad is None for _, twin in model.twins() for p in twin.parameters())


def test_copy_twins_takes_over_the_online_weights():
    model = shake(tiny_pretrain_model())
    model.copy_twins()
    for online, twin in model.twins():
        for parameter, copy in zip(online.parameters(), twin.parameters(), strict=True):
            assert torch.equal(parameter, copy)
            assert not copy.requires_grad
