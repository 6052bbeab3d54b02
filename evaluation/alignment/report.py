"""The table of an alignment suite."""

SCORES = ("itc", "itm", "itm+itc", "blind")
NAMES = {"itc": "contrast", "itm": "matching", "itm+itc": "both", "blind": "blind"}
WITHOUT_BLIND = (
    "no blind baseline: {why}. A suite that can be solved without looking is not told from one that cannot"
)


def table(suite: str, result: dict) -> str:
    """Return a row of text for each kind: accuracy with its interval at 95%, or Kendall's correlation."""
    summary = result["summary"]
    first = next(iter(summary.values()), {})
    names = [name for name in SCORES if name in first]
    width = max(map(len, (*summary, suite))) + 2
    if "chance" in first:
        head = [f"{'':{width}}{'n':>7}{'chance':>8}", *(f"{NAMES[name] + ' (95%)':>22}" for name in names)]
        lines = [_accuracies(kind, group, names, width) for kind, group in summary.items()]
    else:
        head = [f"{'':{width}}{'n':>7}{'ratings':>9}", *(f"{NAMES[name]:>18}" for name in names)]
        lines = [_correlations(kind, group, names, width) for kind, group in summary.items()]
        head.append("   tau-c / tau-b x 100")
    notes = [f"left out: {number:,} {cause}" for cause, number in result["left_out"].items()]
    if "blind" not in names:
        two = any(len(row.images) > 1 for row in result["rows"])
        why = (
            "each text is right for one of the images"
            if two
            else "no head for masked words; --blind_checkpoint"
        )
        notes.append(WITHOUT_BLIND.format(why=why))
    return "\n".join(
        [f"{suite}: accuracy in percent" if "chance" in first else suite, "".join(head), *lines, *notes]
    )


def _accuracies(kind: str, group: dict, names: list[str], width: int) -> str:
    cells = []
    for name in names:
        values = group[name]
        cells.append(f"{values['accuracy']:8.1f} ({values['low']:5.1f}-{values['high']:5.1f})".rjust(22))
    return f"{kind:{width}}{group['n']:7}{group['chance']:8.1f}" + "".join(cells)


def _correlations(kind: str, group: dict, names: list[str], width: int) -> str:
    cells = [
        " / ".join(_hundredfold(group[name][tau]) for tau in ("tau_c", "tau_b")).rjust(18) for name in names
    ]
    return f"{kind:{width}}{group['n']:7}{group['num_ratings']:9}" + "".join(cells)


def _hundredfold(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
