"""How far people agree with each other, and a machine with them.

Shape legend: I items, C categories, R raters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from hma_gym.judges.labels import VERDICTS, Entry


@dataclass(frozen=True)
class Pair:
    """Two annotators.

    Attributes:
        names: of both.
        items: judged by both.
        agreement: share of these with the same verdict.
        kappa: Cohen's; None where it is not defined (both always say the same one thing).
    """

    names: tuple[str, str]
    items: int
    agreement: float
    kappa: float | None


@dataclass(frozen=True)
class Confusion:
    """A machine judge against the people's majority.

    Attributes:
        machine: name of the judge.
        both_success, only_people, only_machine, both_failure: numbers of items that people decided.
        disagreements: keys of the items where they differ.
    """

    machine: str
    both_success: int
    only_people: int
    only_machine: int
    both_failure: int
    disagreements: tuple[str, ...]

    @property
    def items(self) -> int:
        """How many items were compared."""
        return self.both_success + self.only_people + self.only_machine + self.both_failure

    @property
    def agreement(self) -> float:
        """Share of these with the same verdict; nan without any."""
        return (self.both_success + self.both_failure) / self.items if self.items else float("nan")


@dataclass(frozen=True)
class Agreement:
    """What the verdicts of a store say about each other.

    Attributes:
        annotators: verdicts that count, by name.
        pairs: every two annotators with items in common.
        fleiss: Fleiss' kappa over the items with two verdicts or more; None where it is not defined.
        shared_items: their number.
        confusions: one for each machine judge.
    """

    annotators: dict[str, int]
    pairs: tuple[Pair, ...]
    fleiss: float | None
    shared_items: int
    confusions: tuple[Confusion, ...]


def cohen_kappa(verdicts: Sequence[tuple[str, str]]) -> float | None:
    """Cohen's kappa (1960), ``(p_o - p_e) / (1 - p_e)``, of two raters' verdicts on the same items.

    Returns:
        The kappa; None without items or where chance alone explains all (``p_e = 1``).
    """
    if not verdicts:
        return None
    count = len(verdicts)
    observed = sum(a == b for a, b in verdicts) / count
    first, second = Counter(a for a, _ in verdicts), Counter(b for _, b in verdicts)
    expected = sum(first[c] * second[c] for c in first) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def fleiss_kappa(counts_IC: Sequence[Sequence[int]]) -> float | None:
    """Fleiss' kappa (1971) of items by categories; items may have different numbers of verdicts, each 2 or more.

    With equal numbers it is Fleiss' own formula; else each item's observed agreement has equal weight and the shares
    of the categories are those of all verdicts.

    Returns:
        The kappa; None without items or where all verdicts are of one category.
    """
    if not counts_IC:
        return None
    total = sum(map(sum, counts_IC))
    shares = [sum(row[c] for row in counts_IC) / total for c in range(len(counts_IC[0]))]
    observed = sum(sum(n * (n - 1) for n in row) / (sum(row) * (sum(row) - 1)) for row in counts_IC) / len(counts_IC)
    expected = sum(share**2 for share in shares)
    return None if expected == 1 else (observed - expected) / (1 - expected)


def majority(verdicts: Sequence[str]) -> bool | None:
    """Whether more people say success than failure; None at a tie and where nobody is sure."""
    lead = sum((v == "success") - (v == "failure") for v in verdicts)
    return None if lead == 0 else lead > 0


def measure_agreement(entries: Sequence[Entry]) -> Agreement:
    """Everything at once; ``unsure`` is a category of its own in both kappas, and abstains in the majority."""
    names = sorted({name for entry in entries for name in entry.verdicts})
    pairs = []
    for a, b in combinations(names, 2):
        common = [(e.verdicts[a], e.verdicts[b]) for e in entries if a in e.verdicts and b in e.verdicts]
        if common:
            same = sum(x == y for x, y in common) / len(common)
            pairs.append(Pair((a, b), len(common), same, cohen_kappa(common)))
    shared = [list(e.verdicts.values()) for e in entries if len(e.verdicts) >= 2]
    counts_IC = [[row.count(category) for category in VERDICTS] for row in shared]
    return Agreement(
        annotators={name: sum(name in e.verdicts for e in entries) for name in names},
        pairs=tuple(pairs),
        fleiss=fleiss_kappa(counts_IC),
        shared_items=len(shared),
        confusions=_confusions(entries),
    )


def _confusions(entries: Sequence[Entry]) -> tuple[Confusion, ...]:
    found: dict[str, Counter[tuple[bool, bool]]] = {}
    differing: dict[str, list[str]] = {}
    for entry in entries:
        people = majority(list(entry.verdicts.values()))
        if entry.machine is None or people is None:
            continue
        name = entry.machine.name
        found.setdefault(name, Counter())[people, entry.machine.success] += 1
        if people != entry.machine.success:
            differing.setdefault(name, []).append(entry.key)
    return tuple(
        Confusion(
            machine=name,
            both_success=counts[True, True],
            only_people=counts[True, False],
            only_machine=counts[False, True],
            both_failure=counts[False, False],
            disagreements=tuple(differing.get(name, ())),
        )
        for name, counts in sorted(found.items())
    )
