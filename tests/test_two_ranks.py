"""Several real processes: the recorded two-rank step, and results that do not depend on their number."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from goldens_io import golden
from hypothesis import given, settings
from hypothesis import strategies as st
from models_for_tests import tiny_pretrain_model
from test_pretrain_goldens import check_digest, check_losses, check_queues
from test_retrieval_goldens import check_retrieval_losses
from tiny import run_forked

from simla.dataset.loaders import EpochSampler, check_enough
from simla.engine.data_parallel import distribute
from simla.evaluation.rerank import NOT_SCORED
from simla.models.pretrain import LOSSES
from simla.utils import UserError

WORKER = Path(__file__).parent / "two_rank_worker.py"
QUEUES = ("image_queue", "text_queue", "queue_ptr")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(number of ranks, rank) -> what that process saved"""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_forked(WORKER, folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return {
        (num_ranks, rank): torch.load(folder / f"{num_ranks}_{rank}.pt")
        for num_ranks in (1, 2, 3)
        for rank in range(num_ranks)
    }


# ---- the recorded step of two ranks ----


def test_each_rank_has_its_recorded_losses(results):
    for rank in range(2):
        recorded = golden("pretrain_ws2")["ranks"][rank]["losses"]
        losses = {name: torch.tensor(value) for name, value in results[2, rank]["losses"].items()}
        check_losses(losses, recorded, 5e-6)


def test_a_script_may_leave_a_loss_out(results):
    for one, other in zip(*(results[2, rank]["without a loss"] for rank in range(2)), strict=True):
        assert {name for name, grad in one.items() if grad is None} >= {"mim_head.weight", "mim_head.bias"}
        for name, grad in one.items():
            assert (grad is None and other[name] is None) or torch.equal(grad, other[name]), name
        assert one["vision_proj.weight"].norm() > 0


@pytest.mark.parametrize("off", LOSSES)
def test_ranks_train_together_with_any_loss_off(results, off):
    """Nothing that the other losses do not reach is waited for, and the ranks have one gradient."""
    one, other = (results[2, rank]["a loss off"][off] for rank in range(2))
    assert set(one["grads"]) == one["trained"] == other["trained"]
    assert all(torch.equal(grad, other["grads"][name]) for name, grad in one["grads"].items())


def test_buffers_that_differ_are_made_those_of_rank_0(results):
    for rank in range(2):
        for name, value in results[2, 0]["buffers"]["before"].items():
            assert torch.equal(results[2, rank]["buffers"]["after"][name], value), name
            assert torch.equal(results[2, rank]["buffers"]["after, torch's wrapper aside"][name], value), name


def test_both_ranks_queue_all_features_in_rank_order(results):
    recorded = golden("pretrain_ws2")["queues_after"]
    for rank in range(2):
        state = results[2, rank]["state"]
        check_queues(state, recorded)
        for name in QUEUES[:2]:
            assert torch.equal(state[name], results[2, 0]["state"][name])
        batch = len(golden("pretrain_ws2")["ranks"][0]["draws"]["image_neg"])
        assert state["queue_ptr"].tolist() == recorded["queue_ptr"] == [2 * batch]


def test_gradients_are_the_recorded_mean_over_the_ranks(results):
    recorded = golden("pretrain_ws2")
    grads = results[2, 0]["grads"]
    assert set(grads) == {name for name, value in recorded["mean_grads"].items() if value is not None}
    for name, grad in grads.items():
        check_digest(name, grad, recorded["mean_grads"][name])
        assert torch.equal(grad, results[2, 1]["grads"][name]), name
    norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm().item()
    assert norm == pytest.approx(recorded["mean_grad_norm"], rel=1e-4)


def test_the_recorded_retrieval_step(results):
    recorded = golden("retrieval_ws2")
    for rank in range(2):
        step = results[2, rank]["retrieval"]
        losses = {name: torch.tensor(value) for name, value in step["losses"].items()}
        check_retrieval_losses(losses, recorded["ranks"][rank]["losses"], 5e-6)
        check_queues(step["state"], recorded["queues_after"])
        assert step["idx_queue, frozen True"].tolist() == recorded["queues_after"]["idx_queue"]
        for name, value in recorded["mean_grads"].items():
            assert (value is None) == (name not in step["grads"])
            if value is not None:
                check_digest(name, step["grads"][name], value, key_bias_noise=1e-8)


def test_the_queue_of_identities_takes_in_all_ranks_in_order(results):
    own = [rank["inputs"]["idx"] for rank in golden("retrieval_ws2")["ranks"]]
    for rank in range(2):
        queue = results[2, rank]["retrieval"]["idx_queue, frozen False"][0].tolist()
        assert queue == own[0] + own[1] + [-100] * (len(queue) - len(own[0]) - len(own[1]))


def test_everything_saved_is_equal_on_both_ranks(results):
    state = results[2, 0]["state"]
    for name, value in results[2, 1]["state"].items():
        assert torch.equal(value, state[name]), name


def test_one_process_is_not_wrapped():
    model = tiny_pretrain_model()
    assert distribute(model, torch.device("cpu")) is model


# ---- evaluation ----


@pytest.mark.parametrize("case", ["recorded", "7 images", "2 images", "1 images"])
def test_scores_do_not_depend_on_the_number_of_ranks(results, case):
    """To the last bit, also where a rank holds fewer images than another, or none."""
    alone = results[1, 0]["scores"][case]
    assert (alone[0] != NOT_SCORED).any()
    for result in results.values():
        for scores, expected in zip(result["scores"][case], alone, strict=True):
            assert torch.equal(scores, expected)


@pytest.mark.parametrize("case", ["7 images", "2 images", "1 images"])
def test_grouped_scores_of_all_ranks_are_equal_and_close_to_those_of_one(results, case):
    """Which images make a group depends on the number of ranks, and with it the rounding."""
    for (num_ranks, _), result in results.items():
        for which, scores in enumerate(result["scores"][f"{case}, grouped"]):
            assert torch.equal(scores, results[num_ranks, 0]["scores"][f"{case}, grouped"][which])
            torch.testing.assert_close(scores, results[1, 0]["scores"][case][which], rtol=1e-5, atol=1e-5)


def test_scores_of_two_ranks_are_the_recorded_ones(results):
    """The published code adds up one matrix per rank, so its entries are 100 lower."""
    recorded = golden("retrieval_ws2")["evaluation"]
    for scores, name in zip(
        results[2, 0]["scores"]["recorded"], ("score_matrix_i2t", "score_matrix_t2i"), strict=True
    ):
        expected = torch.tensor(recorded[name], dtype=torch.double) + 100
        torch.testing.assert_close(scores.double(), expected, rtol=5e-6, atol=1e-5)


def test_texts_are_encoded_by_all_ranks_also_where_some_have_none(results):
    """Of one text two ranks of three have none."""
    alone = results[1, 0]["gathered"]["texts"]
    assert list(map(len, alone)) == [5, 2, 1]
    for result in results.values():
        for feats, expected in zip(result["gathered"]["texts"], alone, strict=True):
            torch.testing.assert_close(feats, expected)


def test_gathered_values(results):
    """Rank r adds the values 0 to r: every value counts once, not every rank."""
    for (num_ranks, _), result in results.items():
        values = [value for rank in range(num_ranks) for value in range(rank + 1)]
        assert result["gathered"]["means"] == {"value": pytest.approx(sum(values) / len(values))}
        assert result["gathered"]["rows"].flatten().tolist() == [r for r in range(num_ranks) for _ in (0, 1)]
        assert [rows.tolist() for rows in result["gathered"]["shares"]] == [
            [[rank] * 2] * rank for rank in range(num_ranks)
        ]
        for total, rows in zip((7, 2, 1), result["gathered"]["in order"], strict=True):
            assert rows.tolist() == list(range(total))


# ---- training samples ----


def check_shares(shares: list[list[tuple[int, int]]], num_items: int, batch_size: int, epoch: int) -> None:
    """The ranks' items of one epoch are disjoint and make whole global batches."""
    global_batch = batch_size * len(shares)
    items = [item for share in shares for item in share]
    assert {len(share) for share in shares} == {num_items // global_batch * batch_size}
    assert len(set(items)) == len(items) == num_items // global_batch * global_batch
    assert all(item_epoch == epoch and 0 <= index < num_items for item_epoch, index in items)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_real_ranks_share_an_epoch(results, num_ranks):
    shares = [results[num_ranks, rank]["shares"] for rank in range(num_ranks)]
    for seed, epoch in shares[0]:
        check_shares([share[seed, epoch][0] for share in shares], 23, 2, epoch)
    for share in shares:
        assert share[0, 0][0] == share[0, 0][1]  # the same again when asked again
        assert share[0, 0][0] != share[1, 0][0]
        assert [i for _, i in share[0, 0][0]] != [i for _, i in share[0, 1][0]]
    # A global batch holds the same items however many ranks share it.
    alone = [index for _, index in results[1, 0]["shares"][0, 0][0]]
    first = [index for share in shares for _, index in share[0, 0][0][:2]]
    assert sorted(first) == sorted(alone[: 2 * num_ranks])


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 40), st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=100)
def test_any_number_of_ranks_shares_an_epoch(num_ranks, batch_size, more, seed, epoch):
    num_items = num_ranks * batch_size + more
    shares = []
    for rank in range(num_ranks):
        with mock.patch.multiple(
            "simla.dataset.loaders", rank=lambda rank=rank: rank, world_size=lambda: num_ranks
        ):
            sampler = EpochSampler(num_items, batch_size, seed)
            sampler.set_epoch(epoch)
            shares.append(list(sampler))
            assert len(sampler) == len(shares[-1])
    check_shares(shares, num_items, batch_size, epoch)


def test_fewer_samples_than_a_global_batch_are_refused():
    with (
        mock.patch("simla.dataset.loaders.world_size", lambda: 4),
        pytest.raises(UserError, match=r"15 training samples .* of 16 \(batch_size 4 x 4 rank"),
    ):
        check_enough(15, 4, {"batch_size": 4, "grad_accumulation_steps": 1})
