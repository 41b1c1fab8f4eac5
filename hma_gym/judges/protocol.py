"""What a judge is: it sees the last frames of an episode and gives the probability that the task is done now.

Two ways to use a :class:`Judge`: streaming (``judge.probability`` on the window of the last frames, one call per step
for the whole batch) and whole-episode (:func:`episode_probabilities`, every row at once). Success must be SEEN: it is
the state of the current frame (cube lifted now), so the outcome of an episode is the verdict at its last frame.

A :class:`ProprioceptiveJudge` can be told agent_pos beside the frames, for a picture does not show all: whether what
lies in line of sight with the hand is in it. :func:`told_state` says which judges are, :func:`ask` tells those alone.

An :class:`EpisodeJudge` needs the whole video (as a question about an episode does): it gives outcomes, and cannot
serve an environment step by step. Every :class:`Judge` is one too, through :class:`AtLastRow`. A :class:`TokenJudge`
reads a learned world's tokens and no pixels.

Shape legend: B batch, T rows of an episode, K window of last frames, H W C image, P agent_pos dims.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument, InvalidImage


class _StepJudge(Protocol):
    """What all judges have that can serve an environment step by step."""

    @property
    def name(self) -> str: ...

    @property
    def window(self) -> int: ...

    @property
    def threshold(self) -> float: ...


@runtime_checkable
class Judge(_StepJudge, Protocol):
    """A success detector. Write your own by giving a class these four members.

    Attributes:
        name: for reports.
        window: K, how many last frames it sees (1 or more).
        threshold: the verdict is ``probability >= threshold``.
    """

    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        """(B, K, H, W, C) uint8, oldest first, to (B,) float32 in [0, 1].

        At the start of an episode the first frame is repeated to fill the window.
        """
        ...


@runtime_checkable
class ProprioceptiveJudge(Judge, Protocol):
    """A judge that can be told agent_pos: also its ``position`` and ``code``, if it has these, take it then.

    Attributes:
        state_dim: P, dims of agent_pos that it is told; 0 for a judge that is told none after all.
    """

    @property
    def state_dim(self) -> int: ...

    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        """As :meth:`Judge.probability`; agent_pos of the same frames in own units, None where it is not known."""
        ...


@runtime_checkable
class Locator(Judge, Protocol):
    """A judge that also says where the task's object is, so that misplaced objects can be measured in metres."""

    def position(self, frames_BKHWC: Tensor) -> Tensor:
        """(B, K, H, W, C) uint8 to the object's position in the last frame: (B, 3) float32 metres, world frame."""
        ...


@runtime_checkable
class FrameCoder(Judge, Protocol):
    """A judge that reads each frame by itself first, so that an environment can let it read each frame only once.

    Attributes:
        code_size: D, numbers of a frame's code.
    """

    @property
    def code_size(self) -> int: ...

    def code(self, frames_BHWC: Tensor) -> Tensor:
        """Frames (B, H, W, C) uint8, each alone, to codes (B, D) float32; a judge that is told agent_pos takes theirs,
        (B, P), as a second argument."""
        ...

    def probability_of_codes(self, codes_BKD: Tensor) -> Tensor:
        """What ``probability`` says of the frames that have these codes: (B, K, D), oldest first, to (B,) float32."""
        ...


@runtime_checkable
class TokenJudge(_StepJudge, Protocol):
    """A success detector that reads a world's tokens, so that no frame need be decoded for it.

    Attributes:
        name: for reports.
        window: K, how many last frames it reads (1 or more).
        threshold: the verdict is ``probability >= threshold``.
    """

    def probability_of_tokens(self, tokens_BK: Tensor) -> Tensor:
        """Tokens of the last frames, (B, K, S, C) float or (B, K, S) int64, oldest first, to (B,) float32 in [0, 1].

        At the start of an episode the first frame is repeated to fill the window.
        """
        ...


@runtime_checkable
class EpisodeJudge(Protocol):
    """A judge of whole episodes. Write your own by giving a class these three members.

    Attributes:
        name: for reports.
        threshold: the verdict is ``probability >= threshold``.
    """

    @property
    def name(self) -> str: ...

    @property
    def threshold(self) -> float: ...

    def episode_probability(self, frames_BTHWC: Tensor) -> Tensor:
        """(B, T, H, W, C) uint8 videos to the probability that each ends in success: (B,) float32 in [0, 1]."""
        ...


class AtLastRow:
    """A streaming judge as a judge of episodes: what it says of the last row, from frames alone. An
    :class:`EpisodeJudge`."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @property
    def name(self) -> str:
        """Of the streaming judge."""
        return self.judge.name

    @property
    def threshold(self) -> float:
        """Of the streaming judge."""
        return self.judge.threshold

    def episode_probability(self, frames_BTHWC: Tensor) -> Tensor:
        """(B, T, H, W, C) uint8 to (B,) float32."""
        last = torch.tensor([frames_BTHWC.shape[1] - 1], device=frames_BTHWC.device)
        return episode_probabilities(self.judge, frames_BTHWC, last)[:, 0]


def check_window(judge: Judge, frames_BKHWC: Tensor) -> None:
    """Raise :class:`InvalidImage` unless these are uint8 windows of the judge's length."""
    if frames_BKHWC.dtype != torch.uint8 or frames_BKHWC.ndim != 5 or frames_BKHWC.shape[1] != judge.window:
        raise InvalidImage(
            f"judge {judge.name!r} needs torch.uint8 frames of shape (B, {judge.window}, H, W, 3), got "
            f"{frames_BKHWC.dtype} with shape {tuple(frames_BKHWC.shape)}; repeat the first frame to fill a window."
        )


def told_state(judge: object) -> int:
    """P, dims of agent_pos that a judge is told; 0 for judges of frames alone."""
    return judge.state_dim if isinstance(judge, ProprioceptiveJudge) else 0


def check_agent_pos(judge: Judge, agent_pos: Tensor | None, frames: Tensor) -> None:
    """Raise :class:`InvalidArgument` unless agent_pos (..., P) is the judge's, of frames (..., H, W, C), or None."""
    if agent_pos is None:
        return
    told = told_state(judge)
    expected = (*frames.shape[:-3], told)
    if not told or not agent_pos.is_floating_point() or tuple(agent_pos.shape) != expected:
        rule = f"floating agent_pos of shape {expected}" if told else "frames alone"
        raise InvalidArgument(
            f"judge {judge.name!r} needs {rule}, got {agent_pos.dtype} agent_pos of shape {tuple(agent_pos.shape)}; "
            "give that of the same frames in its own units, or None."
        )


def ask(judge: Judge, read: Callable[..., Tensor], frames: Tensor, agent_pos: Tensor | None) -> Tensor:
    """What a method of a judge (``probability``, ``position`` or ``code``) says of frames, told their agent_pos where
    the judge can be and it is known."""
    return read(frames, agent_pos) if told_state(judge) and agent_pos is not None else read(frames)


def windows_at(values_BT: Tensor, rows: Tensor, window: int) -> Tensor:
    """The windows of frames, or of what comes with them, that end at the given rows: (B, R, K, ...) for rows (R,) of
    (B, T, ...); row 0 repeats before the start."""
    offsets_K = torch.arange(1 - window, 1, device=rows.device)
    index_RK = (rows[:, None] + offsets_K).clamp_min(0)
    return values_BT[:, index_RK]


def episode_probabilities(
    judge: Judge,
    frames_BTHWC: Tensor,
    rows: Tensor | None = None,
    batch: int = 256,
    agent_pos_BTP: Tensor | None = None,
) -> Tensor:
    """The judge's probability at every row (or at the given rows) of whole episodes.

    Args:
        judge: any judge.
        frames_BTHWC: uint8 videos.
        rows: (R,) int64 row indices; all rows by default.
        batch: windows per call of the judge.
        agent_pos_BTP: of all frames, own units, for judges that are told it; None where it is not known.

    Returns:
        (B, R) float32.

    Raises:
        InvalidArgument: no episode, rows outside of them, or agent_pos that is not theirs.
    """
    return _over_episodes(judge, judge.probability, frames_BTHWC, rows, batch, agent_pos_BTP)


def episode_positions(
    judge: Locator,
    frames_BTHWC: Tensor,
    rows: Tensor | None = None,
    batch: int = 256,
    agent_pos_BTP: Tensor | None = None,
) -> Tensor:
    """Where the object is at every row (or at the given rows) of whole episodes: (B, R, 3) float32 metres.

    Arguments and errors as for :func:`episode_probabilities`.
    """
    return _over_episodes(judge, judge.position, frames_BTHWC, rows, batch, agent_pos_BTP)


def _over_episodes(
    judge: Judge,
    read: Callable[..., Tensor],
    frames_BTHWC: Tensor,
    rows: Tensor | None,
    batch: int,
    agent_pos_BTP: Tensor | None,
) -> Tensor:
    count, length = frames_BTHWC.shape[:2]
    if rows is None:
        rows = torch.arange(length, device=frames_BTHWC.device)
    if not count or not len(rows) or int(rows.min()) < 0 or int(rows.max()) >= length:
        raise InvalidArgument(
            f"need at least one episode and rows in [0, {length}), got {count} episodes and rows {rows.tolist()}; "
            "count rows from the episode's start."
        )
    given: tuple[Tensor, ...] = (frames_BTHWC,)
    if told_state(judge) and agent_pos_BTP is not None:
        check_agent_pos(judge, agent_pos_BTP, frames_BTHWC)
        given = (frames_BTHWC, agent_pos_BTP.to(frames_BTHWC.device))
    per_call = max(1, batch // len(rows))
    parts = []
    for start in range(0, count, per_call):
        windows = (windows_at(x[start : start + per_call], rows, judge.window).flatten(0, 1) for x in given)
        parts.append(read(*windows).unflatten(0, (-1, len(rows))))
    return torch.cat(parts)


def verdict(judge: Judge | EpisodeJudge, probability: Tensor) -> Tensor:
    """Probabilities to verdicts, elementwise: bool."""
    return probability >= judge.threshold
