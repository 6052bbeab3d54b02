"""What a run will take, before it is started: all that it builds, two steps of it on random input, figures.

`--dry_run` of every task script reads the config, and of its data only how long the training files are, where
they are there; it writes nothing but the index of large ones, which the run would write. `--dry_run estimate`
computes nothing: what a GPU would need.
"""

import argparse
import datetime
import os
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dataset.annotations import read_annotations
from dataset.loaders import check_enough
from dataset.pretrain import read_sets
from dataset.retrieval import RetrievalEvalData
from dataset.text import mask_tokens
from dataset.transforms import normalise, unit_range
from memory import Build, Estimate, Evaluation, estimate_evaluation, estimate_step
from models.bert import BertConfig
from models.dvae import STRIDE, untrained_image_tokenizer
from models.rerank import SIZES, make_groups, score_group
from models.retrieval import SIMLARetrieval
from training import Losses, Training, target_weight
from utils import (
    PRECISIONS,
    UserError,
    all_gather_objects,
    as_one_process,
    autocast,
    clock,
    is_main,
    log,
    peak_bytes,
    reset_peak,
    true_indices,
    world_size,
)

CLS, MASK, FIRST_WORD = 1, 2, 3  # of the random texts; 0 is padding
LONG_TEXT = 40  # tokens where no max_tokens cuts: 30 words, some of several word pieces
BYTES_OF_A_PAIR = 10  # on the device, of every image with every text: see models/rerank.py
NUM_ANSWERS, ANSWER_TOKENS = 4, 6  # different ones to a VQA question; of the longest, with [CLS] and end mark

# ---- training ----


def dry_run(
    make_model: Callable[[dict], nn.Module],
    losses: Losses,
    config: dict,
    args: argparse.Namespace,
    device: torch.device,
    epoch_step: str,
    num_images: int = 1,
) -> dict[str, float]:
    """Says, and returns, what the run of this config would need: parameters, arithmetic, memory, time.

    make_model(config): with random weights; epoch_step: see `fit`; num_images: of a sample. An image
    tokenizer of the config comes last among what `losses` takes. Raises UserError with --evaluate.
    """
    if args.evaluate:
        raise UserError("--dry_run tries a training; leave out --evaluate, or use zero_shot_retrieval.py")
    log.info("dry run: random weights and input of the configured shapes, no output")

    def build() -> list[nn.Module]:
        settings = config.get("image_tokenizer")
        return [make_model(config)] + ([untrained_image_tokenizer(settings)] if settings else [])

    accumulation, batch = config["grad_accumulation_steps"], random_batch(config, num_images)
    batch_size, is_real = len(batch["text_ids"]), args.dry_run == "steps"
    planned = device if is_real else torch.device("cuda")
    found = {}
    if is_main():  # the others would find the same
        pixels = {"image": normalise(batch["image"]), "code_view": unit_range(batch["code_view"])}
        keeps_gradients = accumulation > 1 or world_size() > 1
        inputs = build, losses, {**batch, **pixels}, config, target_weight(config)
        found = report_estimate(estimate_step(*inputs, planned, keeps_gradients), batch_size, planned)
    per_step = batch_size * accumulation * world_size()
    if is_real:
        found |= take_steps(build, losses, [batch] * accumulation, config, args, device, epoch_step)
        found["samples_per_second"] = per_step / found["seconds_per_step"]
        report_steps(found, per_step, device)
    if is_main():
        found |= report_length(config, per_step, found.get("seconds_per_step"))
    return found


def random_batch(config: dict, num_images: int = 1) -> dict[str, Tensor]:
    """Every field that the losses of any task take, of full length: B samples of the training config.

    image (num_images * B, 3, R, R) and code_view (B, 3, r, r) uint8, as the loaders have them; one of two
    labels, an identity of its own for every image; the rest as `PretrainCollate` and `AnswerCollate` say.
    """
    rng = torch.Generator().manual_seed(0)
    batch_size = config.get("batch_size") or config["batch_size_train"]
    bert, resolution = BertConfig.read(config["bert_config"]), config["image_res"]
    grid = resolution // config["vit"]["patch_size"]
    num_tokens = min(config.get("max_tokens", LONG_TEXT), bert.max_position_embeddings)

    def texts(rows: int, length: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(FIRST_WORD, bert.vocab_size, (rows, length), generator=rng)
        ids[:, 0] = CLS
        return ids, torch.ones_like(ids)

    def pixels(rows: int, size: int) -> Tensor:
        return torch.randint(256, (rows, 3, size, size), generator=rng, dtype=torch.uint8)

    text_ids, text_mask = texts(batch_size, num_tokens)
    mlm_ids, mlm_labels = mask_tokens(
        text_ids,
        pad_id=0,
        cls_id=CLS,
        mask_id=MASK,
        vocab_size=bert.vocab_size,
        probability=config.get("mlm_probability", 0.0),
        generator=rng,
    )
    num_hidden = min(config.get("num_masking_patches", 0), grid**2)
    hidden = torch.rand(batch_size, grid**2, generator=rng).topk(num_hidden).indices
    patch_mask = torch.zeros(batch_size, grid**2, dtype=torch.bool).scatter(1, hidden, True)
    answer_ids, answer_mask = texts(NUM_ANSWERS * batch_size, ANSWER_TOKENS)
    return {
        "image": pixels(num_images * batch_size, resolution),
        "text_ids": text_ids,
        "text_mask": text_mask,
        "idx": torch.arange(batch_size),
        "label": torch.arange(batch_size) % 2,
        "code_view": pixels(batch_size, STRIDE * grid),
        "mlm_ids": mlm_ids,
        "mlm_labels": mlm_labels,
        "mlm_indices": true_indices(mlm_labels != -100),
        "patch_mask": patch_mask,
        "mim_indices": true_indices(patch_mask),
        "answer_ids": answer_ids,
        "answer_mask": answer_mask,
        "answer_indices": true_indices(answer_mask[:, 1:]),
        "weights": torch.full((len(answer_ids),), 1 / NUM_ANSWERS),
        "num_answers": torch.full((batch_size,), NUM_ANSWERS),
    }


def take_steps(
    build: Build,
    losses: Losses,
    batches: list[dict],
    config: dict,
    args: argparse.Namespace,
    device: torch.device,
    epoch_step: str,
) -> dict[str, float]:
    """Two steps as the run takes them; the second one is timed, since the first one sets much up. Of several
    ranks the slowest and the fullest count.
    """
    reset_peak(device)
    before = peak_bytes(device)
    torch.manual_seed(args.seed)
    model, *others = build()
    others = [module.to(device).eval() for module in others]
    nowhere = argparse.Namespace(**{**vars(args), "output_dir": os.devnull})  # of another run nothing goes
    loader = SimpleNamespace(batch_size=len(batches[0]["text_ids"]))
    training = Training(
        model,
        loader,
        lambda *inputs: losses(*inputs, *others),
        config,
        nowhere,
        device,
        epoch_step,
        keep_epochs=True,
    )
    model.train()
    training.count_anew()

    def step() -> None:
        training.read_check()
        training.one_step([dict(batch) for batch in batches], target_weight(config))
        training.schedule.after_step(0, 0)

    seconds = [clock(step, device)[0] for _ in range(2)]
    if not training.read_check():
        log.info("the second step's loss or gradient was not finite; on random input that need not mean much")
    found = {"seconds_per_step": seconds[1], "peak_bytes": peak_bytes(device), "bytes_before": before}
    return {name: max(all_gather_objects(value)) for name, value in found.items()}


def report_estimate(estimate: Estimate, batch_size: int, device: torch.device) -> dict[str, float]:
    log.info(
        f"parameters        {estimate.trainable:,} trained, {estimate.parameters:,} with momentum twins\n"
        f"arithmetic        {estimate.flops / batch_size / 1e9:,.4g} GFLOP a sample\n"
        f"memory, estimated {mebibytes(estimate.peak)} on {device.type}, of it {mebibytes(estimate.weights)} "
        f"weights and queues, {mebibytes(estimate.optimizer)} the optimiser's, {mebibytes(estimate.step)} "
        "gradients and activations"
    )
    return {
        "trainable": estimate.trainable,
        "parameters": estimate.parameters,
        "flops_per_sample": estimate.flops / batch_size,
        "estimated_bytes": estimate.peak,
    }


def report_steps(found: dict[str, float], per_step: int, device: torch.device) -> None:
    own = "" if device.type == "cuda" else f", of it {mebibytes(found['bytes_before'])} before the model"
    log.info(
        f"memory, measured  {mebibytes(found['peak_bytes'])}{own}\n"
        f"speed             {found['seconds_per_step']:.3f} s for a step of {per_step} samples on "
        f"{world_size()} rank(s), {found['samples_per_second']:.3g} samples a second"
    )


def report_length(config: dict, per_step: int, seconds_per_step: float | None) -> dict[str, int]:
    """Of the whole run, where the training files are there."""
    try:
        num_samples, origin = samples_of_an_epoch(config)
    except UserError as error:
        log.info(f"whole run         cannot be told without the training files: {error}")
        return {}
    try:
        check_enough(num_samples, config.get("batch_size") or config["batch_size_train"], config)
    except UserError as error:
        log.info(f"whole run         would not begin: {error}")
        return {"num_samples": num_samples, "num_steps": 0}
    num_steps = num_samples // per_step * config["schedular"]["epochs"]
    time = "" if seconds_per_step is None else f", {duration(num_steps * seconds_per_step)}"
    log.info(
        f"whole run         {num_samples:,} samples{origin}, {config['schedular']['epochs']} epochs, "
        f"{num_steps:,} steps{time} without reading images, evaluations and saving"
    )
    return {"num_samples": num_samples, "num_steps": num_steps}


def samples_of_an_epoch(config: dict) -> tuple[int, str]:
    """How many, and in words of how many they are taken, where that is not of as many.

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


Parts = dict[str, tuple[int, Callable[[], Tensor]]]  # name -> how many units of work, and what does them


def dry_run_retrieval(
    make_model: Callable[[], SIMLARetrieval],
    config: dict,
    args: argparse.Namespace,
    num_tokens: int,
    device: torch.device,
) -> dict[str, float]:
    """Says, and returns, what the retrieval evaluation of this config would need: parameters, arithmetic,
    memory, and by the clock images, texts and pairs a second.

    make_model(): with random weights; num_tokens: of every text.
    """
    log.info("dry run: random weights and input of the configured shapes, no output")
    is_real = args.dry_run == "steps"
    planned = device if is_real else torch.device("cuda")
    found = {}
    if is_main():  # the others would find the same
        parts = retrieval_parts(config, num_tokens, planned)
        estimate = estimate_evaluation(make_model, parts, config["precision"], planned)
        found = report_evaluation_estimate(estimate, planned)
    if is_real:
        parts = retrieval_parts(config, num_tokens, device)
        found |= clock_parts(make_model, parts, config["precision"], device)
    if is_main():
        found |= report_whole_evaluation(found, config, is_real)
    return found


def retrieval_parts(config: dict, num_tokens: int, device: torch.device) -> Callable[[SIMLARetrieval], Parts]:
    """Returns what makes of a model the parts of its evaluation on the device: a batch of images, one of
    texts, and a group of images as `rerank` forms them, each with `k_test` texts of full length.
    """
    size, k_test = config["batch_size_test"], config["k_test"]
    batch = random_batch({**config, "batch_size": size, "max_tokens": num_tokens})
    rows = torch.arange(max(size, k_test)) % size
    num_tokens_of_image = (config["image_res"] // config["vit"]["patch_size"]) ** 2 + 1
    num_images, tokens_to_a_call = SIZES.get(device.type, SIZES["cuda"])
    lengths = torch.full((k_test,), batch["text_ids"].shape[1])
    wanted = torch.ones(num_images, k_test, dtype=torch.bool)
    sizes = num_images, num_tokens_of_image, config["vision_width"]
    states = torch.zeros(sizes, dtype=PRECISIONS[config["precision"]])  # on the host, as in the evaluation
    (group,) = make_groups(wanted, lengths, num_images, tokens_to_a_call)

    def parts(model: SIMLARetrieval) -> Parts:
        ids, mask = (batch[name][rows].to(device) for name in ("text_ids", "text_mask"))
        scores = torch.zeros(wanted.numel() + 1, device=device)

        def pairs() -> Tensor:
            score_group(model, group, states, ids, mask, scores)
            return scores

        return {
            "images": (size, lambda: model.encode_image(normalise(batch["image"].to(device)))[0]),
            "texts": (size, lambda: model.encode_text(ids[:size], mask[:size])),
            "pairs": (wanted.numel(), pairs),
        }

    return parts


def clock_parts(
    make_model: Callable[[], SIMLARetrieval],
    parts: Callable[[SIMLARetrieval], Parts],
    precision: str,
    device: torch.device,
) -> dict[str, float]:
    """Units a second of every part, each done twice and the second time timed, and the peak of memory; of
    several ranks the slowest and the fullest count.
    """
    reset_peak(device)
    model = make_model().to(device).eval()
    with torch.inference_mode(), autocast(device, precision):
        rates = {name: num / clock_second(part, device) for name, (num, part) in parts(model).items()}
    found = {name: min(all_gather_objects(rate)) for name, rate in rates.items()}
    found["peak_bytes"] = max(all_gather_objects(peak_bytes(device)))
    log.info(
        f"memory, measured  {mebibytes(found['peak_bytes'])}\n"
        f"speed of a rank   {found['images']:.3g} images, {found['texts']:.3g} texts, {found['pairs']:.3g} "
        "pairs a second"
    )
    return found


def clock_second(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the second call."""
    return [clock(function, device)[0] for _ in range(2)][1]


def report_evaluation_estimate(estimate: Evaluation, device: torch.device) -> dict[str, float]:
    gigaflops = {name: flops / 1e9 for name, flops in estimate.flops.items()}
    log.info(
        f"parameters        {estimate.parameters:,}\n"
        f"arithmetic        {gigaflops['images']:,.4g} GFLOP an image, {gigaflops['texts']:,.4g} a text, "
        f"{gigaflops['pairs']:,.4g} a pair\n"
        f"memory, estimated {mebibytes(estimate.peak)} on {device.type}, of it {mebibytes(estimate.weights)} "
        "weights"
    )
    return {
        "parameters": estimate.parameters,
        "estimated_bytes": estimate.peak,
        "flops": estimate.flops,
    }


def report_whole_evaluation(found: dict, config: dict, is_real: bool) -> dict[str, float]:
    """Of the whole evaluation, where the test file is there."""
    try:  # no image is opened
        data = RetrievalEvalData(config["test_file"], {**config, "skip_unreadable": False})
    except UserError as error:
        log.info(f"whole evaluation  cannot be told without the test file: {error}")
        return {}
    num_images, num_texts = len(data), len(data.texts)
    fewest, most = bounds_of_pairs(num_images, num_texts, config["k_test"])
    num = {"images": num_images, "texts": num_texts, "pairs": most}
    needs = f"{sum(num[name] * found['flops'][name] for name in num) / 1e12:,.4g} TFLOP"
    if is_real:
        needs = duration(sum(num[name] / found[name] for name in num) / world_size())
    pairs = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
    log.info(
        f"whole evaluation  {num_images:,} images, {num_texts:,} texts, {pairs} pairs: {needs}"
        f"{' at most' * (fewest < most)} without reading images; the matrix of all pairs takes some "
        f"{mebibytes(BYTES_OF_A_PAIR * num_images * num_texts)} more"
    )
    return {"num_images": num_images, "num_texts": num_texts, "fewest_pairs": fewest, "most_pairs": most}


def bounds_of_pairs(num_images: int, num_texts: int, k_test: int) -> tuple[int, int]:
    """The fewest and the most pairs that two stages score, each once: those that the images want and those
    that the texts want may be the same or others.
    """
    for_images = num_images * min(k_test, num_texts)
    for_texts = num_texts * min(k_test, num_images)
    return max(for_images, for_texts), min(for_images + for_texts, num_images * num_texts)
