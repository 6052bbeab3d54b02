"""The ablation: pre-training with fewer losses, or otherwise, and several seeds; two tables and a picture.

make ablation        (or: python -m simla.demo.ablation [--quick] [--output_dir output/ablation])

Every variant is pre-trained on the embedded scenes with the same seeds for the same steps, and scored as it
is, on scenes that it has not seen. A second call goes on where an interrupted one stopped, and after a
finished one shows its results again. docs/evidence.md says how to read them.
"""

import argparse
import json
import time
from datetime import timedelta
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from simla.demo.all_tasks import GRADCAM, read_grounding
from simla.demo.data import write_json
from simla.demo.pretrain import DATA, PRETRAINING, Stage, evaluate, make_data, read_retrieval, run_stage
from simla.engine.command import GOES_ON, run_command, whole_number
from simla.utils import UserError, import_pyplot, make_output_folder

SIZES = ("bert_config.num_hidden_layers=4",)  # of which ALBEF's layout has half alone; the demo has three


class Variant(NamedTuple):
    """A way to pre-train, by config values that differ from configs/demo."""

    name: str  # of its folders, and in summary.json
    title: str
    overrides: tuple[str, ...] = ()
    layout: tuple[str, ...] = ()  # such values of the model, which its scores need, too
    is_switch: bool = False  # of released_code: with the first seed alone


def without(*losses: str) -> tuple[str, ...]:
    return tuple(f"loss_weights.{loss}=0" for loss in losses)


SWITCHES = ("mlm_distill_over_sequence", "mim_independent_views", "psl_padding")
VARIANTS = (
    Variant("ita_itm", "ITA + ITM", without("mlm", "mim", "psl")),
    Variant("mlm", "ITA + ITM + MLM", without("mim", "psl")),
    Variant("mim", "ITA + ITM + MLM + MIM", without("psl")),
    Variant("simla", "all five = SIMLA"),
    Variant(
        "albef",
        "ITA + ITM + MLM in ALBEF's layout",
        without("mim", "psl"),
        ("bert_config.text_layers_alone=2",),
    ),
    Variant("no_targets", "SIMLA without momentum targets", ("alpha=0",)),
    *(Variant(name, f"SIMLA, {name}", (f"released_code.{name}=true",), (), True) for name in SWITCHES),
)
COMPARISONS = {  # title -> the names of two variants
    "MLM added": ("mlm", "ita_itm"),
    "MIM added": ("mim", "mlm"),
    "PSL added": ("simla", "mim"),
    "one stream in place of ALBEF's layout": ("mlm", "albef"),
    "SIMLA in place of ALBEF's losses and layout": ("simla", "albef"),
    "momentum targets added": ("simla", "no_targets"),
    **{f"{name} switched on": (name, "simla") for name in SWITCHES},
}
LEVELS = {"chance": "chance", "blind": "the texts alone"}


# ---- a run: a variant with a seed ----


TESTS = (
    Stage("retrieval", *PRETRAINING.evaluation, result="retrieval", read=read_retrieval),
    Stage("grounding", "Grounding.py", "Grounding.yaml", "", "grounding", read_grounding, GRADCAM),
)


def run_variant(variant: Variant, folder: Path, seed: str, epochs: int) -> dict:
    """Train and score, going on where an earlier call stopped; return what scores.json in the folder holds:
    {"seconds", "training_seconds", "scores": {name: {"metric", "value", "chance", "n", ...}}}.
    """
    file, model = folder / "scores.json", (*SIZES, *variant.layout)
    flags = ("--overrides", *model, *variant.overrides, f"schedular.epochs={epochs}")
    # Also where all is done: it says whether the folder is of this variant.
    record = run_stage(Stage(variant.name, "Pretrain.py", "Pretrain.yaml", flags=flags), folder, seed)
    if file.is_file():
        return json.loads(file.read_bytes())
    begin, scores = time.monotonic(), {}
    for test in TESTS:
        test = test._replace(flags=(*test.flags, "--overrides", *model))
        scores[test.name] = evaluate(test, folder / test.name, record["checkpoint"], seed)
    scores |= evaluate_alignment(record["checkpoint"])
    seconds = record["seconds"] + round(time.monotonic() - begin)
    run = {"seconds": seconds, "training_seconds": record["seconds"], "scores": scores}
    write_json(file, run)
    return run


def evaluate_alignment(checkpoint: str) -> dict[str, dict]:
    """Return the scores of a checkpoint in the suite made from the scenes: contrast and matching of all rows,
    and matching of each kind.
    """
    from simla.demo.swaps import scene_rows
    from simla.loading import load

    summary = load(checkpoint).score_suite(scene_rows(DATA))["summary"]
    shown = {"contrast": ("all", "itc"), "matching": ("all", "itm")}
    scores = {}
    for name, (kind, score) in (shown | {kind: (kind, "itm") for kind in summary if kind != "all"}).items():
        group = summary[kind]
        levels = {"chance": group["chance"], "n": group["n"]}
        if "blind" in group:  # ALBEF's layout, and without MLM, there is none
            levels["blind"] = group["blind"]["accuracy"]
        metric = f"the right text preferred, rows of kind {kind}, by {score} (%)"
        scores[name] = {"metric": metric, "value": group[score]["accuracy"], **levels}
    return scores


# ---- the result ----


def summarise(runs: dict[tuple[Variant, int], dict], plan: dict) -> dict:
    """Return what summary.json holds: what each score is, and of every variant and score the value of each
    seed, their mean and standard deviation (None of a single seed).
    """
    full = [run["scores"] for (variant, _), run in runs.items() if variant.name == "simla"]
    scores = {name: dict(score) for name, score in full[0].items()}
    for name, score in scores.items():
        del score["value"]
        if "blind" in score:  # by SIMLA's word head: some variants have none
            score["blind"] = mean(run[name]["blind"] for run in full)
    rows = {}
    for variant in dict.fromkeys(variant for variant, _ in runs):
        of_seeds = {str(seed): run for (other, seed), run in runs.items() if other == variant}
        values = {name: {s: r["scores"][name]["value"] for s, r in of_seeds.items()} for name in scores}
        rows[variant.name] = {
            "title": variant.title,
            "overrides": [*SIZES, *variant.layout, *variant.overrides],
            "training_seconds": round(mean(run["training_seconds"] for run in of_seeds.values())),
            "scores": {name: {"values": v, **spread(list(v.values()))} for name, v in values.items()},
        }
    seconds = sum(run["seconds"] for run in runs.values())
    return {**plan, "seconds": seconds, "scores": scores, "variants": rows}


def spread(values: list[float]) -> dict:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def difference(one: dict, other: dict) -> tuple[float, float | None]:
    """Return by how much one variant's score is higher than another's, in the mean of the seeds that both
    have, and the standard error of that, None with one seed.
    """
    seeds = sorted(one["values"].keys() & other["values"].keys())
    pair = [spread([score["values"][seed] for seed in seeds]) for score in (one, other)]
    error = None if len(seeds) == 1 else (sum(score["std"] ** 2 for score in pair) / len(seeds)) ** 0.5
    return pair[0]["mean"] - pair[1]["mean"], error


def number(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + ("" if error is None else f" ± {error:.1f}")


def markdown(rows: list[list[str]]) -> str:
    """Return a table of Markdown, the first row its head, with columns of even width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def tables(summary: dict) -> str:
    """Return the scores, mean and standard deviation over the seeds; below them the differences that each
    loss makes, with standard errors.
    """
    names, variants = list(summary["scores"]), summary["variants"]
    rows = [["score, %", *names, "minutes"]]
    for level, title in LEVELS.items():
        values = [score.get(level) for score in summary["scores"].values()]
        rows.append([title, *("" if value is None else number(value, None) for value in values), ""])
    for variant in variants.values():
        cells = [number(score["mean"], score["std"]) for score in variant["scores"].values()]
        rows.append([variant["title"], *cells, number(variant["training_seconds"] / 60, None)])
    compared = [["difference, points", *names]]
    for title, (one, other) in COMPARISONS.items():
        one, other = variants[one]["scores"], variants[other]["scores"]
        compared.append([title, *(number(*difference(one[name], other[name]), "+") for name in names)])
    return f"{markdown(rows)}\n\n{markdown(compared)}"


def draw(summary: dict, out: Path) -> None:
    """Draw a panel for each score, in it each variant."""
    from simla.plots import plot_points

    variants, panels, levels = list(summary["variants"].values()), {}, {}
    for name, score in summary["scores"].items():
        scores = [variant["scores"][name] for variant in variants]
        title = f"{name} (%), n {score['n']:,}"
        panels[title] = [list(values["values"].values()) for values in scores]
        levels[title] = {LEVELS[level]: score[level] for level in LEVELS if level in score}
        levels[title][variants[0]["title"]] = scores[0]["mean"]
    plot_points([variant["title"] for variant in variants], panels, levels, out)


# ---- make ablation ----


def parse_arguments() -> argparse.Namespace:
    """Return the flags. Raises UserError where the picture at the end could not be drawn."""
    parser = argparse.ArgumentParser("python -m simla.demo.ablation", description=__doc__.splitlines()[0])
    add, seeds = parser.add_argument, {"type": whole_number(0), "default": [42, 43, 44]}
    add("--output_dir", type=Path, help="default: output/ablation, or output/ablation_quick")
    add("--seeds", nargs="+", **seeds, help="default: 42 43 44")
    add("--epochs", type=whole_number(1), default=4, help="of every training; default: %(default)s")
    add("--quick", action="store_true", help="the first seed alone")
    add("--every_seed", action="store_true", help="all seeds for the switches of released_code, too")
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds[:1] if args.quick else args.seeds))
    args.output_dir = args.output_dir or Path("output/ablation_quick" if args.quick else "output/ablation")
    import_pyplot()
    return args


def check_plan(file: Path, plan: dict) -> None:
    """Note what is run. Raises UserError where the folder holds other runs."""
    before = json.loads(file.read_bytes()) if file.is_file() else plan
    if before != plan:
        old, new = (", ".join(f"{name} {values[name]}" for name in plan) for values in (before, plan))
        raise UserError(f"{file.parent} holds runs with {old}, not with {new}: give another --output_dir")
    write_json(file, plan)


def time_left(done: dict[tuple, dict], remaining: list[tuple]) -> str:
    """Return how long the remaining (variant, seed) take if each does as its variant did, or the mean run."""
    if not done:
        return ""
    seconds = {variant: run["seconds"] for (variant, _), run in done.items()}
    left = sum(seconds.get(variant, mean(seconds.values())) for variant, _ in remaining)
    return f"; eta {timedelta(seconds=round(left))}"


def main() -> None:
    args = parse_arguments()
    out = make_output_folder(args.output_dir)
    plan = {"seeds": args.seeds, "epochs": args.epochs, "every_seed": args.every_seed}
    check_plan(out / "plan.json", plan)
    make_data()
    several = VARIANTS if args.every_seed else [variant for variant in VARIANTS if not variant.is_switch]
    planned = [(v, seed) for seed in args.seeds for v in (VARIANTS if seed == args.seeds[0] else several)]
    runs = {}
    for i, (variant, seed) in enumerate(planned):
        left = time_left(runs, planned[i:])
        print(f"\nrun {i + 1} of {len(planned)}: {variant.title}, seed {seed}{left}", flush=True)
        folder = out / f"{variant.name}-{seed}"
        runs[variant, seed] = run_variant(variant, folder, str(seed), args.epochs)
    summary = summarise(runs, plan)
    write_json(out / "summary.json", summary)
    draw(summary, out / "ablation.png")
    print(f"\n{tables(summary)}\n\n{summary['seconds']} s in all; {out}/summary.json, {out}/ablation.png")


if __name__ == "__main__":
    run_command(main, GOES_ON)
