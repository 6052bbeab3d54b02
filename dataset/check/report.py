"""The result of a check: a table for the screen, report.json, and report.html with pictures."""

import base64
import html
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from simla.dataset.check.causes import PROBLEMS, Cause
from simla.dataset.check.findings import MAX_LISTED, Finding, Findings
from simla.dataset.check.images import show
from simla.dataset.images import BadImage
from simla.dataset.readers.shard_index import Picture
from simla.utils import UserError, atomic_write

NUM_SAMPLES = 12  # of each split on the page
NUM_SHOWN = 12  # of each cause and file on the page
NUM_NAMED = 3  # of each cause and file on the screen
THUMBNAIL = 160  # pixels
STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em }
table { border-collapse: collapse }
td, th { padding: .2em .9em; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } .problem td { color: #b2182b } h2 { margin-top: 2em }
.cards { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0; width: 170px; overflow-wrap: anywhere }
figcaption { font-size: 12px } small { color: #777; display: block } .pair img { max-width: 82px }
.none { width: 160px; height: 90px; background: #eee; color: #b2182b; display: grid; place-items: center }
img { max-width: 160px; max-height: 160px; vertical-align: top } svg text { font-size: 10px; fill: #777 }
"""


class Report:
    """what: config, task, full; reading: of `measure_reading`; fixed: of `write_fixed`."""

    def __init__(self, findings: Findings, what: dict, reading: dict, fixed: dict | None):
        self.findings, self.what, self.reading, self.fixed = findings, what, reading, fixed
        self.splits = findings.splits()
        self.title = f"{what['config']}, task {what['task']}"

    def write(self, folder: Path) -> None:
        listed = (finding for cause in Cause for finding in self.findings.examples(cause, MAX_LISTED))
        content = {
            **self.what,
            "has_problems": self.findings.has_problems(),
            "splits": {name: _plain(split) for name, split in self.splits.items()},
            "files": self.findings.whole,
            "notes": self.findings.notes,
            "found": [finding.as_dict() for finding in listed],
            "max_listed_of_each_cause_and_file": MAX_LISTED,
            "reading": self.reading,
            "fix": self.fixed,
        }
        for name, text in (("report.json", json.dumps(content, indent=1)), ("report.html", self.page())):
            with atomic_write(folder / name) as file:
                file.write(text.encode("utf-8", "replace"))

    # ---- the screen ----

    def rows(self) -> list[tuple[Cause | None, str, list[str]]]:
        """Return cause, name, a text for each split; causes that nothing has are left out."""
        splits = self.splits.values()
        rows = [(None, name, [f"{split[name]:,}" for split in splits]) for name in ("files", "entries")]
        rows.append((None, "different images", [f"{split['images']:,}" for split in splits]))
        for cause in Cause:
            if any(split["counts"][cause] for split in splits):
                rows.append((cause, cause.label, [f"{split['counts'][cause]:,}" for split in splits]))
        tokens = [" / ".join(map(str, quantiles(split["lengths"]))) for split in splits]
        rows.append((None, "tokens: middle / 95% / most", tokens))
        return [*rows, (None, "tokens kept", [str(split["limit"]) for split in splits])]

    def text(self) -> str:
        lines = ["", self.title, f"{'':40}" + "".join(f"{name:>18}" for name in self.splits)]
        for cause, name, values in self.rows():
            kind = "" if cause is None else "problem: " if cause & PROBLEMS else "note: "
            lines.append(f"{kind + name:40}" + "".join(f"{value:>18}" for value in values))
        lines += [f"problem: {problem}" for problem in self.findings.whole]
        lines += [f"note: {note}" for note in self.findings.notes]
        for cause in [cause for cause in Cause if cause & PROBLEMS]:  # a flag is no list before Python 3.11
            for finding in self.findings.examples(cause, NUM_NAMED):
                detail = " ".join(filter(None, [str(finding.image), finding.detail]))
                lines.append(f"{finding.file}: entry {finding.entry}: {cause.label}: {detail}"[:300])
        return "\n".join([*lines, *self._last_lines()])

    def _last_lines(self) -> list[str]:
        """Return what reading takes and what --fix has done."""
        lines = []
        if self.reading:
            rate, workers, seconds = self.reading.values()
            lines.append(
                f"reading: {rate:,} training entries a second of a process; an epoch takes {seconds:,} s "
                f"with {workers} (num_workers) on one rank, and as much less as there are ranks"
            )
        if self.fixed is None:
            return lines
        if not self.fixed["files"] and not self.fixed["shards"]:
            return [*lines, "--fix: there is nothing to leave out"]
        for row in self.fixed["files"]:
            counts = ", ".join(f"{count:,} {name}" for name, count in row["left_out"].items())
            copy = row["copy"] or "nothing is left"
            lines.append(f"{copy} of {row['file']}: {row['kept']:,} entries kept, left out {counts}")
        for name in self.fixed["shards"]:
            rest = "in training, what cannot be read is replaced and counted"
            lines.append(f"{name}: shards are not written anew; {rest}")
        changed = {row["file"] for row in self.fixed["files"]}
        if any(s.split != "train" and s.name in changed for s in self.findings.shared.sources):
            lines.append("scores on a split that entries were left out of do not compare with published ones")
        config = self.fixed["config"].items()
        return [*lines, *(f"in the config:  {name}: {json.dumps(files)}" for name, files in config)]

    # ---- the page ----

    def page(self) -> str:
        """Return self-contained HTML."""
        head = "".join(f"<th>{_safe(name)}</th>" for name in self.splits)
        rows = "".join(
            f"<tr{' class=problem' if cause and cause & PROBLEMS else ''}><td>{_safe(name)}</td>"
            + "".join(f"<td>{value}</td>" for value in values)
            + "</tr>"
            for cause, name, values in self.rows()
        )
        title = _safe(self.title)
        parts = [
            f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{STYLE}</style>",
            f"<h1>{title}</h1><table><tr><th></th>{head}</tr>{rows}</table>",
            *(f"<p class=problem>{_safe(problem)}</p>" for problem in self.findings.whole),
            *(f"<p>{_safe(line)}</p>" for line in [*self.findings.notes, *self._last_lines()]),
        ]
        for name, split in self.splits.items():
            if split["lengths"].any():
                parts.append(f"<h2>Tokens of a text: {_safe(name)}</h2>{_histogram(split)}")
        for cause in Cause:
            if total := sum(split["counts"][cause] for split in self.splits.values()):
                shown = "".join(map(_card, self.findings.examples(cause, NUM_SHOWN)))
                parts.append(f"<h2>{_safe(cause.label)}: {total:,}</h2><div class=cards>{shown}</div>")
        for name in self.splits:
            parts.append(f"<h2>Samples: {_safe(name)}</h2><div class=cards>{self._samples(name)}</div>")
        return "\n".join(parts)

    def _samples(self, split: str) -> str:
        """Return cards of entries drawn at random."""
        rng, cards = random.Random(0), []
        drawn = [
            (source, index)
            for source in self.findings.shared.sources
            if source.split == split
            for index in _drawn(source.entries, rng)
        ]
        for source, index in rng.sample(drawn, min(len(drawn), NUM_SAMPLES)):
            try:
                entry = source.entries[index]
            except (UserError, BadImage):
                continue
            text = entry["text"] if isinstance(entry["text"], str) else " · ".join(entry["text"])
            cards.append(_figure(entry["images"], text, f"{source.path.name}: entry {index}"))
        return "".join(cards)


def _drawn(entries: Sequence[dict], rng: random.Random) -> list[int]:
    """Return entries drawn at random, of shards that are fetched from the first one alone."""
    numbers = range(entries.sizes[0] if getattr(entries, "is_stream", False) else len(entries))
    return rng.sample(numbers, min(len(numbers), NUM_SAMPLES))


def quantiles(lengths: np.ndarray) -> list[int]:
    """Return the middle, the length that 95% of the texts have at most, and the longest."""
    total = lengths.cumsum()
    return [int(np.searchsorted(total, share * total[-1])) for share in (0.5, 0.95, 1)]


def _plain(split: dict) -> dict:
    counts = {cause.label: count for cause, count in split["counts"].items()}
    return {**split, "counts": counts, "lengths": np.trim_zeros(split["lengths"], "b").tolist()}


def _safe(text: object) -> str:
    return html.escape(str(text))


def _histogram(split: dict) -> str:
    """Return bars of the numbers of texts by their tokens; those that are cut in red."""
    lengths, width, height = np.trim_zeros(split["lengths"], "b"), 12, 120
    bars = []
    for length, count in enumerate(lengths.tolist()):
        tall = height * count / lengths.max()
        colour = "#b2182b" if length > split["limit"] else "#0b5fa5"
        bars.append(
            f'<rect x="{length * width}" y="{height - tall:.1f}" width="{width - 2}" height="{tall:.1f}" '
            f'fill="{colour}"><title>{length} tokens: {count:,}</title></rect>'
        )
        if length % 5 == 0:
            bars.append(f'<text x="{length * width}" y="{height + 13}">{length}</text>')
    size = f'viewBox="0 0 {len(lengths) * width + 10} {height + 18}" height="{height + 18}"'
    return f'<svg {size} xmlns="http://www.w3.org/2000/svg">{"".join(bars)}</svg>'


def _card(finding: Finding) -> str:
    images = [image for image in (finding.image, finding.twin) if image != ""]
    where = f"{finding.split}, {Path(finding.file).name}: entry {finding.entry}"
    return _figure(images, finding.detail, where)


def _figure(images: list[str | Picture], text: str, where: str) -> str:
    pictures = "".join(map(_thumbnail, images))
    kind = " class=pair" if len(images) > 1 else ""
    names = " ".join(map(str, images))
    return (
        f"<figure{kind}>{pictures}<figcaption>{_safe(text[:300])}<small>{_safe(where)}</small>"
        f"<small>{_safe(names)}</small></figcaption></figure>"
    )


def _thumbnail(picture: str | Picture) -> str:
    try:
        image = show(picture)
    except BadImage as error:
        return f"<div class=none>{_safe(error.cause[:60])}</div>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=75)
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}" alt="">'
