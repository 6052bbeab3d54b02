"""Runs the same work as 1, 2 and 3 processes and saves what each computed: two_rank_worker.py FOLDER

Wants the repository root on PYTHONPATH. One process imports everything and forks the ranks, since the imports
take longer than the work.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from goldens_io import fill_model, golden, golden_image
from models_for_tests import (
    golden_pretrain_model,
    losses_of,
    pretrain_inputs,
    tiny_batch,
    tiny_pretrain_model,
    tiny_texts,
)
from test_retrieval_goldens import golden_retrieval_model, step_of
from torch.nn.attention import SDPBackend, sdpa_kernel

from simla.dataset.loaders import EpochSampler
from simla.engine.data_parallel import distribute
from simla.engine.launch import start
from simla.engine.metric_log import MetricLog
from simla.engine.peers import leave_together
from simla.evaluation.rerank import rerank
from simla.models.align import Draws
from simla.models.pretrain import LOSSES
from simla.models.retrieval import SIMLARetrieval
from simla.utils import all_gather_rows, all_gather_shares, gather_in_order, rank, world_size
from zero_shot_retrieval import encode_texts

CPU = torch.device("cpu")


def buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "queue" in name}


def spoil_buffers_unless_rank_0(model: torch.nn.Module) -> None:
    if rank() > 0:
        model.image_queue.zero_()
        model.text_queue.fill_(9.0)
        model.queue_ptr.fill_(7)


def pretrain_step() -> dict:
    """The recorded step of this rank, after buffers that differed between the ranks."""
    recorded = golden("pretrain_ws2")
    model = golden_pretrain_model()
    fill_model(model, golden("pretrain_structure")["aliases"])
    seen = {"before": buffers(model)}
    spoil_buffers_unless_rank_0(model)
    with mock.patch("simla.engine.data_parallel.DistributedDataParallel", lambda model, *_, **__: model):
        distribute(model, CPU)  # not every version of torch's wrapper would make them equal
    seen["after, torch's wrapper aside"] = buffers(model)
    spoil_buffers_unless_rank_0(model)
    wrapped = distribute(model, CPU)
    seen["after"] = buffers(model)
    inputs, draws = recorded["ranks"][rank()]["inputs"], recorded["ranks"][rank()]["draws"]
    negatives = Draws(torch.tensor(draws["image_neg"]), torch.tensor(draws["text_neg"]))
    named = losses_of(
        wrapped, {**pretrain_inputs(inputs, draws["mlm"]), "alpha": recorded["alpha"]}, negatives
    )
    sum(named.values()).backward()
    return {
        "buffers": seen,
        "losses": {name: loss.item() for name, loss in named.items()},
        "state": model.state_dict(),
        "grads": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def steps_without_a_loss() -> list[dict]:
    """The gradients of two steps of two batches each, from losses of which the script leaves one out."""
    torch.manual_seed(0)
    model = tiny_pretrain_model().eval()
    wrapped, gradients = distribute(model, CPU), []
    for step in range(2):
        model.zero_grad(set_to_none=True)
        for number in range(2):
            with nullcontext() if number or world_size() == 1 else wrapped.no_sync():
                named = losses_of(wrapped, tiny_batch(3, seed=10 * step + 2 * rank() + number))
                del named["loss_mim"]
                sum(named.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    return gradients


def steps_with_a_loss_off() -> dict[str, dict]:
    """For each loss that is not computed: the gradients of a step, and the names of what waits for one."""
    steps = {}
    for off in LOSSES:
        torch.manual_seed(0)
        model = tiny_pretrain_model(computed=set(LOSSES) - {off}).eval()
        wrapped = distribute(model, CPU)
        sum(losses_of(wrapped, tiny_batch(3, seed=rank())).values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        steps[off] = {"grads": grads, "trained": set(model.trained_parameters())}
    return steps


def retrieval_step() -> dict:
    """The recorded step of this rank, with the published switch, and idx_queue after one without it."""
    recorded = golden("retrieval_ws2")
    inputs = recorded["ranks"][rank()]["inputs"]
    draws = recorded["ranks"][rank()]["draws"]
    result = {}
    for frozen in (False, True):
        model = golden_retrieval_model(frozen_idx_queue=frozen)
        fill_model(model, {})
        wrapped = distribute(model, CPU)
        named = step_of(wrapped, inputs, draws, recorded["alpha"])
        result[f"idx_queue, frozen {frozen}"] = model.idx_queue.clone()
    sum(named.values()).backward()
    return {
        **result,
        "losses": {name: loss.item() for name, loss in named.items()},
        "state": model.state_dict(),
        "grads": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


def share_of_scores(
    model: SIMLARetrieval,
    image: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    k: int,
    sizes: tuple[int, int] = (1, 20),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-ranking where this rank holds every world_size-th image."""
    image_embeds, image_feat = model.encode_image(image)
    similarity = image_feat @ model.encode_text(ids, mask).T
    return rerank(model, similarity, k, image_embeds[rank() :: world_size()], ids, mask, sizes)


@torch.no_grad()
def all_scores() -> dict:
    """Of the recorded evaluation, and of numbers of images that 2 and 3 ranks do not divide."""
    recorded = golden("retrieval_eval")
    model = golden_retrieval_model()
    fill_model(model, {})
    ids, mask = (torch.tensor(recorded["text"][name]) for name in ("input_ids", "attention_mask"))
    image = golden_image(recorded["image_seed"], recorded["image_shape"])
    scores = {"recorded": share_of_scores(model, image, ids, mask, recorded["k_test"])}
    rng = torch.Generator().manual_seed(3)
    lengths = [2 + i % 7 for i in range(15)]
    for num_images in (7, 2, 1):
        image = torch.randn(num_images, *recorded["image_shape"][1:], generator=rng)
        texts = tiny_texts(lengths, 8, rng)
        scores[f"{num_images} images"] = share_of_scores(model, image, *texts, k=3)
        scores[f"{num_images} images, grouped"] = share_of_scores(model, image, *texts, k=3, sizes=(4, 50))
    return scores


def shares() -> dict:
    """What this rank reads in two epochs, under two seeds."""
    result = {}
    for seed in (0, 1):
        sampler = EpochSampler(23, 2, seed)
        for epoch in (0, 1, 0):
            sampler.set_epoch(epoch)
            result.setdefault((seed, epoch), []).append(list(sampler))
    return result


def gathered() -> dict:
    log = MetricLog()
    for value in range(rank() + 1):  # rank r adds r + 1 values: 0, then 0 and 1, ...
        log.add({"value": float(value)})
    own = torch.arange(rank(), 7, world_size())
    model = golden_retrieval_model()
    fill_model(model, {})
    texts = tiny_texts([3, 2, 5, 4, 2], 6, torch.Generator().manual_seed(0))
    feats = [encode_texts(model, *(part[:total] for part in texts), 2).detach() for total in (5, 2, 1)]
    return {
        "texts": feats,
        "means": log.global_means(),
        "rows": all_gather_rows(torch.full((2, 1), float(rank()))),
        "shares": all_gather_shares(torch.full((rank(), 2), rank()), list(range(world_size()))),
        "in order": [gather_in_order(own[own < total], total) for total in (7, 2, 1)],
    }


def work(this_rank: int, num_ranks: int, folder: str) -> None:
    os.environ |= {"RANK": str(this_rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(this_rank)}
    meeting_place = f"file://{folder}/meet_{num_ranks}"  # unlike a port, nobody else can have taken it
    start(
        argparse.Namespace(
            device="cpu",
            dist_url=meeting_place,
            output_dir=folder,
            seed=0,
            resume=False,
            evaluate=True,
            notes=[],
            checkpoint="",
            dry_run="",
        ),
        {"precision": "fp32"},
    )
    result = {"scores": all_scores(), "shares": shares(), "gathered": gathered()}
    if num_ranks == 2:
        with sdpa_kernel(SDPBackend.MATH):
            result |= pretrain_step()
            result["retrieval"] = retrieval_step()
            result["without a loss"] = steps_without_a_loss()
            result["a loss off"] = steps_with_a_loss_off()
    torch.save(result, Path(folder) / f"{num_ranks}_{this_rank}.pt")
    if dist.is_initialized():
        leave_together()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    for num_ranks in (1, 2, 3):
        torch.multiprocessing.start_processes(work, (num_ranks, sys.argv[1]), num_ranks, start_method="fork")
