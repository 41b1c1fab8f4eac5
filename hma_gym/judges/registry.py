"""Judges by name: those registered in this process, and those that installed packages offer as entry points.

A third-party package adds a judge without touching this one::

    [project.entry-points."hma_gym.judges"]
    my-judge = "my_package.judging:make_judge"

where ``make_judge()`` takes no argument and returns a :class:`~hma_gym.judges.protocol.Judge`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.judges.protocol import Judge

ENTRY_POINT_GROUP = "hma_gym.judges"

_factories: dict[str, Callable[[], Judge]] = {}


def register_judge(name: str, factory: Callable[[], Judge]) -> None:
    """Offer a judge under a name in this process; a name already taken here raises :class:`InvalidArgument`."""
    if name in _factories:
        raise InvalidArgument(f"judge name {name!r} is already registered; choose another name.")
    _factories[name] = factory


def known_judges() -> list[str]:
    """All names that :func:`get_judge` accepts."""
    return sorted({*_factories, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_judge(judge: str | Judge) -> Judge:
    """The judge itself if given one, else the one registered under that name.

    Raises:
        UnknownName: no such name in this process or among the installed entry points.
        InvalidArgument: what was given or made is not a judge.
    """
    if isinstance(judge, str):
        if judge in _factories:
            made: object = _factories[judge]()
        else:
            points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == judge]
            if not points:
                raise UnknownName(
                    "judge",
                    judge,
                    known_judges(),
                    f"A package offers one through the entry point group {ENTRY_POINT_GROUP!r}.",
                )
            made = points[0].load()()
        origin = f"judge {judge!r}"
    else:
        made, origin = judge, "judge"
    if not isinstance(made, Judge):
        raise InvalidArgument(
            f"{origin} must have name, window, threshold and probability(frames_BKHWC), got "
            f"{type(made).__name__}; see hma_gym.judges.protocol.Judge."
        )
    return made
