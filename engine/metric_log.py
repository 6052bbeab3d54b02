"""Averages of the losses over an epoch and over a window of steps."""

import torch
from torch import Tensor

from simla.utils import all_gather_objects


class MetricLog:
    """Running means of named values, sums of those named num_...; tensors stay on their device until read."""

    def __init__(self):
        self.sums: dict[str, Tensor | float] = {}
        self.counts: dict[str, Tensor | int] = {}  # of the additions that count

    def add(self, values: dict[str, Tensor | float], counted: Tensor | None = None) -> None:
        """Add a value of each; counted: bool scalar on their device, false where they do not count."""
        number = 1 if counted is None else counted.long()
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().double()
                value = value if counted is None else torch.where(counted, value, 0.0)
            elif counted is not None:
                value = counted.double() * value
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + number

    def means(self) -> dict[str, float | None]:
        """Return the means over this rank's additions; None where no addition counted."""
        return self._means([self.state_dict()])

    def state_dict(self) -> dict:
        return {
            "sums": {name: float(total) for name, total in self.sums.items()},
            "counts": {name: int(count) for name, count in self.counts.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), self._counts(state)

    def merge(self, state: dict) -> None:
        """Add the sums of another rank."""
        for name, count in self._counts(state).items():
            self.sums[name] = self.sums.get(name, 0.0) + state["sums"][name]
            self.counts[name] = self.counts.get(name, 0) + count

    def global_means(self) -> dict[str, float | None]:
        """Return the means over the additions of all ranks; None where none counted."""
        return self._means(all_gather_objects(self.state_dict()))

    @staticmethod
    def _counts(state: dict) -> dict[str, int]:
        """Return the counts of a state; checkpoints of older versions have one number for all names."""
        return dict(state["counts"] if "counts" in state else dict.fromkeys(state["sums"], state["count"]))

    @staticmethod
    def _means(states: list[dict]) -> dict[str, float | None]:
        means = {}
        for name in dict.fromkeys(name for state in states for name in state["sums"]):
            count = sum(state["counts"].get(name, 0) for state in states)
            total = sum(state["sums"].get(name, 0.0) for state in states)
            means[name] = int(total) if name.startswith("num_") else total / count if count else None
        return means


def in_words(means: dict[str, float | int | None]) -> str:
    """Return them as a line of progress shows them; a dash where no step was finite."""

    def number(name: str, value: float | int | None) -> str:
        if value is None or isinstance(value, int):
            return "-" if value is None else str(value)
        return f"{value:.2e}" if name == "lr" else f"{value:.4f}"

    return "  ".join(f"{name} {number(name, value)}" for name, value in means.items())
