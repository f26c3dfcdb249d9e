"""What `tune doctor` found: a line for each row, and what they amount to."""

from collections import Counter
from dataclasses import dataclass, field

from ftlib.data.preview import Shown
from ftlib.data.report import UNWRITTEN, counted, spread

LISTED = 20  # broken rows that are printed
MOST_WEIGHTS = 8  # that are listed with their counts


@dataclass
class Row:
    """One row of the data: `state` is ok, or why it would not be trained on."""

    where: str
    tokens: int
    trained: int
    state: str = "ok"
    repeat_of: str = ""
    held_out: bool = False
    weight: float = 0.0  # of its trained tokens together: their number, if none has another than 1


@dataclass
class Findings:
    """All rows of a data set, and what they amount to."""

    path: str
    shape: str
    rows: list[Row]
    roles: Counter[str] = field(default_factory=Counter)
    samples: list[tuple[str, Shown]] = field(default_factory=list)
    weights: Counter[float] = field(default_factory=Counter)  # other than 1 -> trained tokens
    unwritten: int = 0  # messages whose reasoning the template left out

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of each number."""
        rows = self.rows
        good = [row for row in rows if row.tokens]
        tokens, trained = sum(row.tokens for row in good), sum(row.trained for row in good)
        facts = [("rows", f"{len(rows):,}"), ("format", self.shape), ("tokens", f"{tokens:,}")]
        if good:
            facts.append(("trained", f"{trained:,} ({trained / tokens:.1%})"))
            facts.append(("length of a row", spread([row.tokens for row in good])))
            facts.append(("trained tokens of a row", spread([row.trained for row in good])))
            longest = sorted(good, key=lambda row: -row.trained)[: max(1, len(good) // 100)]
            share = sum(row.trained for row in longest) / max(trained, 1)
            facts += self._weights(trained)
            facts.append(("imbalance", f"the 1 % of rows with most trained tokens hold {share:.0%} of them"))
        if self.roles:
            facts.append(("messages", ", ".join(f"{count:,} {role}" for role, count in self.roles.most_common())))
        if self.unwritten:
            facts.append(("warning", f"the reasoning of {counted(self.unwritten, 'message')} {UNWRITTEN}"))
        facts += [(state, f"{count:,} rows") for state, count in self.states().items() if state != "ok"]
        facts.append(("exact repeats", f"{sum(bool(row.repeat_of) for row in rows):,} rows"))
        both = sum(row.held_out for row in rows)
        return [*facts, ("held out as well", f"{both:,} rows")] if both else facts

    def _weights(self, trained: int) -> list[tuple[str, str]]:
        """Of the tokens whose rows give them a weight: how many have which; nothing where all count 1."""
        if not self.weights:
            return []
        most = [f"{weight:.6g}: {count:,}" for weight, count in sorted(self.weights.most_common(MOST_WEIGHTS))]
        more = [f"and {len(self.weights) - len(most):,} others"] if len(self.weights) > len(most) else []
        mean = sum(row.weight for row in self.rows) / trained
        said = f"{self.weights.total():,} trained tokens ({', '.join([*most, *more])}); mean of all {mean:.3g}"
        return [("weights other than 1", said)]

    def states(self) -> Counter[str]:
        """How many rows are in which state; broken ones counted together."""
        return Counter("broken" if row.state.startswith("broken") else row.state for row in self.rows)

    def lines(self) -> list[str]:
        """Human lines: the facts, then the first broken rows."""
        broken = [f"  {row.where}: {row.state}" for row in self.rows if row.state.startswith("broken")]
        more = [f"  … and {len(broken) - LISTED:,} more"] if len(broken) > LISTED else []
        return [self.path, *(f"  {name}: {value}" for name, value in self.facts()), *broken[:LISTED], *more]
