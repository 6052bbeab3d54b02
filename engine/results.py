"""Writes the results of a run, result/NAME.json, and tells whether two were scored alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from simla.dataset.loaders import signatures
from simla.engine.run_record import save_config
from simla.utils import UserError, append_log, atomic_write, is_main, json_text, log

SCORED_BY = (
    *("k_test", "score", "score_itc_weight", "sentence_only"),
    *("refcoco_data", "det_file", "gradcam_mode", "block_num"),
)


def protocol(data: Mapping[str, Sequence], settings: dict) -> dict:
    """Return what decides scores beside the weights: of each split's items how many, and checksums of their
    files, and the settings of SCORED_BY that a task has.
    """
    items = {
        f"entries of {split}_file": [len(items), *(row[1:] for row in signatures(items))]
        for split, items in data.items()
    }
    return items | {key: settings[key] for key in SCORED_BY if key in settings}


def protocol_difference(old: dict | None, new: dict | None) -> str:
    """Return what differs between two of `protocol`, "" where nothing does; old: None where none is known."""
    if new is None:
        return ""
    if old is None:
        return "by which files and settings is not known"
    changed = [key for key in old | new if old.get(key) != new.get(key)]
    return ", ".join(
        f"the {key} are others"
        if key.startswith("entries")
        else f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in changed
    )


def result_path(output_dir: str | Path, name: str) -> Path:
    """Make the folder of results and return result/<name> in it. UserError where it cannot be made."""
    path = Path(output_dir) / "result" / name
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}); choose another folder") from error
    return path


def save_result(output_dir: str | Path, name: str, content: dict | list) -> None:
    """Write result/<name>.json, on the main rank only. UserError for a value that is not finite, and where
    the file cannot be written.
    """
    if is_main():
        path = result_path(output_dir, f"{name}.json")
        text = json_text(content, str(path), indent=1)
        with atomic_write(path, text=True) as file:
            file.write(text)


def forget_results(output_dir: str | Path, *names: str) -> None:
    """Remove files that an earlier evaluation left in result/ and that this one may not write."""
    for path in (Path(output_dir, "result", name) for name in names):
        if is_main() and path.exists():
            path.unlink()
            log.info(f"removed {path}, of an earlier evaluation")


def scores_path(output_dir: str | Path, are_kept: bool) -> Path | None:
    """Return where an evaluation keeps its score matrices, None where it does not. Those of an earlier one,
    with the rankings made of them, go.
    """
    forget_results(output_dir, "retrieval_scores.pt", "coco_rankings.json")
    return result_path(output_dir, "retrieval_scores.pt") if are_kept else None


def record_evaluation(scores: dict[str, float | list], config: dict, output_dir: str) -> None:
    """Write what an evaluation leaves beside its results: config.yaml and a line in log.txt."""
    if is_main():
        save_config(config, output_dir)
    if scores:  # none where the test set has no answers
        append_log(output_dir, scores)
