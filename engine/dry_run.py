"""`--dry_run` of every script: what its run would take, found out on random input of the configured shapes.

It reads the config, and of the data only how long the training files are, where they are there; it writes
nothing but the index of large ones, which the run would write. `--dry_run estimate` computes nothing: it says
what a GPU would need.
"""

import datetime
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from simla.checkpoint.image_tokenizers import untrained_image_tokenizer
from simla.dataset.loaders import check_enough
from simla.dataset.pretrain import read_sets
from simla.dataset.readers.annotations import read_annotations
from simla.dataset.retrieval import RetrievalEvalData
from simla.dataset.transforms import normalise
from simla.engine.data_parallel import set_checkpointing
from simla.engine.launch import Run
from simla.engine.measure import clock, peak_bytes, reset_peak
from simla.engine.memory import Estimate, estimate
from simla.engine.step import Losses, Step, target_weight, weighted_sum
from simla.evaluation.rerank import SIZES, make_groups, score_group
from simla.models.bert_config import BertConfig
from simla.models.dvae import STRIDE
from simla.models.retrieval import SIMLARetrieval
from simla.optim import create_optimizer
from simla.utils import (
    UserError,
    all_gather_objects,
    as_one_process,
    autocast,
    dtype_of,
    is_main,
    log,
    true_indices,
    world_size,
)

CLS, MASK, FIRST_WORD = 1, 2, 3  # of the random texts; 0 is padding
LONG_TEXT = 40  # tokens where no max_tokens cuts: 30 words, some of several word pieces
BYTES_OF_A_PAIR = 10  # on the device, of every image with every text: see evaluation/rerank.py
NUM_ANSWERS, ANSWER_TOKENS = 4, 6  # different ones to a VQA question; of the longest, with [CLS] and end mark
BEGIN = "dry run: random weights and input of the configured shapes, no output"

# ---- training ----


def dry_run(
    make_model: Callable[[dict], nn.Module],
    losses: Losses,
    config: dict,
    run: Run,
    num_images: int = 1,
) -> dict[str, float]:
    """Log parameters, arithmetic, memory, speed and length of the training of this config; return no scores.

    make_model(config): with random weights; num_images: of a sample. An image tokenizer of the config comes
    last among what `losses` takes. Raises UserError with --evaluate.
    """
    if run.evaluate:
        raise UserError("--dry_run tries a training; leave out --evaluate, or use zero_shot_retrieval.py")
    log.info(BEGIN)
    batch, seconds = random_batch(config, num_images), None
    if is_main():  # the others would find the same
        needs = estimate_training(make_model, losses, batch, config)
        report_estimate(needs, f"{needs.flops / len(batch['text_ids']) / 1e9:,.4g} GFLOP a sample")
    accumulation = config["grad_accumulation_steps"]
    if run.dry_run == "steps":
        seconds = take_steps(make_model, losses, [batch] * accumulation, config, run)
    if is_main():
        report_length(config, len(batch["text_ids"]) * accumulation * world_size(), seconds)
    return {}


def build(make_model: Callable[[dict], nn.Module], config: dict) -> list[nn.Module]:
    """Return the model in training mode and, where a loss of the config reads one, the image tokenizer."""
    model = make_model(config).train()
    set_checkpointing(model, config["checkpoint_activations"])
    if not config.get("loss_weights", {}).get("mim"):
        return [model]
    return [model, untrained_image_tokenizer(config["image_tokenizer"]).eval()]


def estimate_training(
    make_model: Callable[[dict], nn.Module], losses: Losses, batch: dict[str, Tensor], config: dict
) -> Estimate:
    """Return what a forward and a backward pass on the batch need."""

    def loss(model: nn.Module, *others: nn.Module) -> Tensor:
        inputs = {name: v.float() if v.dtype == torch.uint8 else v.clone() for name, v in batch.items()}
        return weighted_sum(losses(model, inputs, target_weight(config), *others), config)

    return estimate(lambda: build(make_model, config), loss, config["precision"])


def random_batch(config: dict, num_images: int = 1) -> dict[str, Tensor]:
    """Return all fields that the losses of any task take, of full length: B samples of the training config.

    image (num_images * B, 3, R, R) and code_view (B, 3, r, r) uint8, as the loaders have them; one of two
    labels, an identity of its own for every image; the rest as `PretrainCollate` and `AnswerCollate` say.
    """
    rng = torch.Generator().manual_seed(0)
    batch_size = config.get("batch_size") or config["batch_size_train"]
    bert, resolution = BertConfig.read(config["bert_config"]), config["image_res"]
    grid = resolution // config["vit"]["patch_size"]

    def texts(rows: int, length: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(FIRST_WORD, bert.vocab_size, (rows, length), generator=rng)
        ids[:, 0] = CLS
        return ids, torch.ones_like(ids)

    def pixels(rows: int, size: int) -> Tensor:
        return torch.randint(256, (rows, 3, size, size), generator=rng, dtype=torch.uint8)

    num_tokens = min(config.get("max_tokens", LONG_TEXT), bert.max_position_embeddings)
    text_ids, text_mask = texts(batch_size, num_tokens)
    is_masked = torch.rand(text_ids.shape, generator=rng) < config.get("mlm_probability", 0.0)
    patch_mask = torch.arange(grid**2).repeat(batch_size, 1) < config.get("num_masking_patches", 0)
    answer_ids, answer_mask = texts(NUM_ANSWERS * batch_size, ANSWER_TOKENS)
    return {
        "image": pixels(num_images * batch_size, resolution),
        "text_ids": text_ids,
        "text_mask": text_mask,
        "idx": torch.arange(batch_size),
        "label": torch.arange(batch_size) % 2,
        "code_view": pixels(batch_size, STRIDE * grid),
        "mlm_ids": text_ids.masked_fill(is_masked, MASK),
        "mlm_labels": text_ids.masked_fill(~is_masked, -100),
        "mlm_indices": true_indices(is_masked),
        "patch_mask": patch_mask,
        "mim_indices": true_indices(patch_mask),
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "answer_indices": true_indices(answer_mask[:, 1:]),
        "weights": torch.full((len(answer_ids),), 1 / NUM_ANSWERS),
        "num_answers": torch.full((batch_size,), NUM_ANSWERS),
    }


def take_steps(
    make_model: Callable[[dict], nn.Module],
    losses: Losses,
    batches: list[dict],
    config: dict,
    run: Run,
) -> float:
    """Take two steps as the run does; log memory and speed, of several ranks the fullest and slowest; return
    the seconds of the second step, since the first one sets much up.
    """
    reset_peak(run.device)
    torch.manual_seed(run.seed)
    model, *others = (module.to(run.device) for module in build(make_model, config))
    optimizer = create_optimizer(model, config["optimizer"])
    take_step = Step(model, optimizer, lambda *inputs: losses(*inputs, *others), config, run.device)

    def step() -> bool:
        _, check = take_step([dict(batch) for batch in batches], target_weight(config))
        return check.read()[0]

    seconds, is_bad = [clock(step, run.device) for _ in range(2)][1]
    seconds = max(all_gather_objects(seconds))
    if is_bad:
        log.info("the second step's loss or gradient was not finite; on random input that need not mean much")
    num_samples = len(batches[0]["text_ids"]) * len(batches) * world_size()
    report_measured(
        run.device,
        f"{seconds:.3f} s for a step of {num_samples} samples on {world_size()} rank(s), "
        f"{num_samples / seconds:.3g} samples a second",
    )
    return seconds


def report_estimate(estimate: Estimate, arithmetic: str) -> None:
    log.info(
        f"parameters        {estimate.trainable:,} trained, {estimate.parameters:,} with momentum twins\n"
        f"arithmetic        {arithmetic}\n"
        f"memory, estimated {mebibytes(estimate.peak)} on cuda, of it {mebibytes(estimate.weights)} weights "
        f"and queues, {mebibytes(estimate.optimizer)} the optimiser's, {mebibytes(estimate.step)} "
        "gradients and activations"
    )


def report_measured(device: torch.device, speed: str) -> None:
    """Log the speed and the most memory that torch had allocated on a GPU, or that the process held."""
    peak = max(all_gather_objects(peak_bytes(device)))
    log.info(f"memory, measured  {mebibytes(peak)} on {device.type}\nspeed             {speed}")


def report_length(config: dict, per_step: int, seconds_per_step: float | None) -> None:
    """Log the length of the whole run, where the training files are there."""
    try:
        num_samples, origin = samples_of_an_epoch(config)
        check_enough(num_samples, config.get("batch_size") or config["batch_size_train"], config)
    except UserError as error:
        log.info(f"whole run         {error}")
        return
    epochs = config["schedular"]["epochs"]
    num_steps = num_samples // per_step * epochs
    time = "" if seconds_per_step is None else f", {duration(num_steps * seconds_per_step)}"
    log.info(
        f"whole run         {num_samples:,} samples{origin}, {epochs} epochs, {num_steps:,} steps{time} "
        "without reading images, evaluations and saving"
    )


def samples_of_an_epoch(config: dict) -> tuple[int, str]:
    """Return how many samples an epoch has, and in words of how many they are taken if of more or fewer.

    Raises UserError where the training files cannot be read.
    """
    if "samples_per_epoch" not in config:
        return len(read_annotations(config["train_file"], {}, config.get("image_root", ""))), ""
    with as_one_process():  # to count shards the ranks would meet
        mixture = read_sets(config["train_file"], config["samples_per_epoch"], config["image_root"])
    num_samples = mixture.samples_per_epoch
    return num_samples, "" if num_samples == len(mixture) else f" of {len(mixture):,} to an epoch"


def mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))


# ---- evaluation ----


def dry_run_retrieval(
    make_model: Callable[[], SIMLARetrieval],
    config: dict,
    run: Run,
    num_tokens: int,
) -> dict[str, float]:
    """Log parameters, arithmetic, memory, speed and length of this config's evaluation; return no scores.

    make_model(): with random weights; num_tokens: of every text.
    """
    log.info(BEGIN)
    needs = {}  # of an image, a text, a pair: FLOPs or seconds
    if is_main():  # the others would find the same
        fullest, needs = estimate_retrieval(make_model, config, num_tokens)
        gigaflops = {name: f"{flops / 1e9:,.4g} GFLOP" for name, flops in needs.items()}
        report_estimate(fullest, "{images} an image, {texts} a text, {pairs} a pair".format(**gigaflops))
    if run.dry_run == "steps":
        reset_peak(run.device)
        model = make_model().to(run.device).eval()
        with torch.inference_mode(), autocast(run.device, config["precision"]):
            for name, (num, work) in retrieval_work(config, num_tokens, run.device).items():
                second = [clock(partial(work, model), run.device)[0] for _ in range(2)][1]
                needs[name] = max(all_gather_objects(second)) / num
        rates = {name: f"{1 / seconds:.3g} {name}" for name, seconds in needs.items()}
        report_measured(run.device, "{images}, {texts}, {pairs} a second and rank".format(**rates))
    if is_main():
        report_whole_evaluation(needs, config, run.dry_run == "steps")
    return {}


def estimate_retrieval(
    make_model: Callable[[], SIMLARetrieval], config: dict, num_tokens: int
) -> tuple[Estimate, dict[str, float]]:
    """Return what the work that needs most memory needs, and the FLOPs of an image, a text and a pair."""
    estimates, flops = [], {}
    for name, (num, work) in retrieval_work(config, num_tokens, torch.device("cpu"), "cuda").items():
        estimates.append(
            estimate(lambda: [make_model().eval()], work, config["precision"], is_training=False)
        )
        flops[name] = estimates[-1].flops / num
    return max(estimates, key=lambda needs: needs.peak), flops


def retrieval_work(
    config: dict, num_tokens: int, device: torch.device, kind: str = ""
) -> dict[str, tuple[int, Callable[[SIMLARetrieval], object]]]:
    """Return by name how many units of work there are, and what does them with a model on the device: a batch
    of images, one of texts, a group of images with `k_test` texts each as `rerank` forms it for that kind of
    device.
    """
    size, k_test = config["batch_size_test"], config["k_test"]
    batch = random_batch({**config, "batch_size": size, "max_tokens": num_tokens})
    rows = torch.arange(max(size, k_test)) % size
    ids, mask = (batch[name][rows].to(device) for name in ("text_ids", "text_mask"))
    num_images, tokens_to_a_call = SIZES.get(kind or device.type, SIZES["cuda"])
    wanted = torch.ones(num_images, k_test, dtype=torch.bool)
    scores = torch.zeros(wanted.numel() + 1, 2, device=device)
    num_image_tokens = (config["image_res"] // config["vit"]["patch_size"]) ** 2 + 1
    shape = num_images, num_image_tokens, config["vision_width"]
    states = torch.zeros(shape, dtype=dtype_of(config["precision"]))  # on the host, as in the evaluation
    (group,) = make_groups(wanted, torch.full((k_test,), ids.shape[1]), num_images, tokens_to_a_call)
    return {
        "images": (size, lambda model: model.encode_image(normalise(batch["image"].to(device)))),
        "texts": (size, lambda model: model.encode_text(ids[:size], mask[:size])),
        "pairs": (wanted.numel(), lambda model: score_group(model, group, states, ids, mask, scores)),
    }


def report_whole_evaluation(needs: dict[str, float], config: dict, is_time: bool) -> None:
    """Log what the whole evaluation takes, where the test file is there."""
    try:  # no image is opened
        data = RetrievalEvalData(config["test_file"], {**config, "skip_unreadable": False})
    except UserError as error:
        log.info(f"whole evaluation  {error}")
        return
    images, texts = len(data), len(data.texts)
    pairs = most_pairs(images, texts, config["k_test"])
    total = images * needs["images"] + texts * needs["texts"] + pairs * needs["pairs"]
    takes = duration(total / world_size()) if is_time else f"{total / 1e12:,.4g} TFLOP"
    log.info(
        f"whole evaluation  {images:,} images, {texts:,} texts, at most {pairs:,} pairs: "
        f"{takes} without reading images; the matrix of all pairs takes some "
        f"{mebibytes(BYTES_OF_A_PAIR * images * texts)} more"
    )


def most_pairs(num_images: int, num_texts: int, k_test: int) -> int:
    """Return the most pairs that two stages score, each once: fewer where images and texts want the same."""
    wanted = num_images * min(k_test, num_texts) + num_texts * min(k_test, num_images)
    return min(wanted, num_images * num_texts)
