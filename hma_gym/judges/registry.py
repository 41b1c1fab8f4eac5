"""Judges by name: those registered in this process, and those that installed packages offer as entry points.

A third-party package adds a judge without touching this one::

    [project.entry-points."hma_gym.judges"]
    my-judge = "my_package.judging:make_judge"

where ``make_judge()`` takes no argument and returns a :class:`~hma_gym.judges.protocol.Judge` (which environments can
use, too) or an :class:`~hma_gym.judges.protocol.EpisodeJudge`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points

from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.judges.protocol import AtLastRow, EpisodeJudge, Judge, TokenJudge

ENTRY_POINT_GROUP = "hma_gym.judges"

_factories: dict[str, Callable[[], Judge | TokenJudge | EpisodeJudge]] = {}


def register_judge(name: str, factory: Callable[[], Judge | TokenJudge | EpisodeJudge]) -> None:
    """Offer a judge under a name in this process; a name already taken here raises :class:`InvalidArgument`."""
    if name in _factories:
        raise InvalidArgument(f"judge name {name!r} is already registered; choose another name.")
    _factories[name] = factory


def known_judges() -> list[str]:
    """All names that :func:`get_judge` accepts."""
    return sorted({*_factories, *(point.name for point in entry_points(group=ENTRY_POINT_GROUP))})


def get_judge(judge: str | Judge) -> Judge:
    """The streaming judge itself if given one, else the one registered under that name.

    Raises:
        UnknownName: no such name in this process or among the installed entry points.
        InvalidArgument: what was given or made is not a judge, or judges whole episodes only.
    """
    return _streaming(*_make(judge))


def get_step_judge(judge: str | Judge | TokenJudge) -> Judge | TokenJudge:
    """As :func:`get_judge`, and judges that read tokens too: for learned worlds, which have both."""
    made, origin = _make(judge)
    return made if isinstance(made, TokenJudge) else _streaming(made, origin)


def get_episode_judge(judge: str | Judge | EpisodeJudge) -> EpisodeJudge:
    """A judge of whole episodes, given or registered under that name; a streaming one is asked at the last row.

    Raises:
        UnknownName: no such name in this process or among the installed entry points.
        InvalidArgument: what was given or made is not a judge.
    """
    made, origin = _make(judge)
    if isinstance(made, EpisodeJudge):
        return made
    if isinstance(made, Judge):
        return AtLastRow(made)
    raise InvalidArgument(
        f"{origin} must have name, threshold and episode_probability(frames_BTHWC), or be a streaming judge, got "
        f"{type(made).__name__}; see hma_gym.judges.protocol."
    )


def _make(judge: str | Judge | TokenJudge | EpisodeJudge) -> tuple[object, str]:
    """What was given or made under that name, and how to call it in an error."""
    if not isinstance(judge, str):
        return judge, "judge"
    if judge in _factories:
        return _factories[judge](), f"judge {judge!r}"
    points = [point for point in entry_points(group=ENTRY_POINT_GROUP) if point.name == judge]
    if not points:
        raise UnknownName(
            "judge",
            judge,
            known_judges(),
            f"A package offers one through the entry point group {ENTRY_POINT_GROUP!r}.",
        )
    return points[0].load()(), f"judge {judge!r}"


def _streaming(made: object, origin: str) -> Judge:
    """What was made, if it judges frames step by step."""
    if isinstance(made, Judge):
        return made
    if isinstance(made, EpisodeJudge):
        raise InvalidArgument(
            f"{origin} must judge the last frames, step by step, and {made.name!r} judges whole episodes only; use it "
            "on finished episodes (get_episode_judge), and another one here."
        )
    raise InvalidArgument(
        f"{origin} must have name, window, threshold and probability(frames_BKHWC), got "
        f"{type(made).__name__}; see hma_gym.judges.protocol.Judge."
    )
