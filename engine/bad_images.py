"""An account of the images that cannot be read, and the end of a run that has too many of them."""

from collections import Counter

from simla.utils import UserError, all_gather_objects, log


class BadImages:
    """Counts the images that were replaced, by cause, and names the first file of each cause; and what the
    fetched shards have in no sample.
    """

    CHECK_AFTER = 500  # images of all ranks, before a share is worth a verdict

    def __init__(self):
        self.causes, self.num_seen = Counter(), 0
        self.passed_over: dict[str, dict[str, int]] = {}  # by shard, which several processes may read
        self.last = "see above"

    @property
    def num_bad(self) -> int:
        return self.causes.total()

    def add(
        self,
        bad: list[tuple[str, str]],
        num_images: int,
        passed_over: dict[str, dict[str, int]] | None = None,
    ) -> None:
        """Count `bad`, (file, cause) of every failed read, while `num_images` images were made; passed_over:
        shard -> cause -> number, of the fetched shards that they came from.
        """
        self.passed_over |= passed_over or {}
        self.num_seen += num_images + len(bad)
        for path, cause in bad:
            kind, self.last = cause.partition(":")[0], f"{path} ({cause})"
            if kind not in self.causes:
                others = "others of this cause are counted"
                print(f"replaced an image that cannot be read: {self.last}; {others}", flush=True)
            self.causes[kind] += 1

    def are_too_many(self, num_bad: int, num_seen: int, max_fraction: float) -> bool:
        """Return whether a run must end of them; num_bad, num_seen: of all ranks."""
        return num_seen >= self.CHECK_AFTER and num_bad > max_fraction * num_seen

    def stop(self, num_bad: int, num_seen: int, max_fraction: float) -> None:
        """Raise the UserError for too many of them."""
        raise UserError(
            f"{num_bad} of {num_seen} images of this epoch could not be read, more than max_bad_fraction "
            f"{max_fraction}; the last one: {self.last}. Check the paths and files, or raise max_bad_fraction"
        )

    def state_dict(self) -> dict:
        return {"causes": dict(self.causes), "num_seen": self.num_seen, "passed_over": dict(self.passed_over)}

    def load_state_dict(self, state: dict) -> None:
        causes = state.get("causes") or {"cause not recorded": state.get("num_bad", 0)}  # of older versions
        self.causes, self.num_seen = +Counter(causes), state["num_seen"]
        self.passed_over = dict(state.get("passed_over", {}))  # older versions have none

    def merge(self, state: dict) -> None:
        """Add the account of another rank."""
        other = BadImages()
        other.load_state_dict(state)
        self.causes.update(other.causes)
        self.num_seen += other.num_seen
        self.passed_over |= other.passed_over

    def report(self, in_files: dict[str, int] | None = None) -> dict[str, float | dict]:
        """Log and return, over all ranks, the number of replaced images, their share of all and, if any, the
        numbers by cause; and, if any, those of what was passed over in fetched shards and `in_files`.
        """
        total = BadImages()
        for state in all_gather_objects(self.state_dict()):
            total.merge(state)
        share = total.num_bad / max(total.num_seen, 1)
        account = {"bad_images": total.num_bad, "bad_image_fraction": share}
        if passed_over := sum(map(Counter, total.passed_over.values()), Counter(in_files)):
            account["passed_over"] = dict(passed_over)
        if total.num_bad:
            account["bad_image_causes"] = dict(total.causes.most_common())
            listed = ", ".join(f"{cause} {count}" for cause, count in total.causes.most_common())
            log.info(
                f"{total.num_bad} of {total.num_seen} images ({share:.2%}) could not be read and were "
                f"replaced: {listed}"
            )
        return account
