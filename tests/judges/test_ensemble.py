"""Judges combined, judges of whole episodes, and a judge that another package brings by entry point."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import pytest
import torch
from torch import Tensor

import hma_gym  # noqa: F401 - registers the ids
from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.errors import InvalidArgument, UnknownName
from hma_gym.judges import registry
from hma_gym.judges.ensemble import EnsembleJudge, centred
from hma_gym.judges.protocol import AtLastRow, EpisodeJudge, Judge, told_state, verdict


class LastPixel:
    """Believes the corner pixel of the last frame."""

    def __init__(self, name: str, window: int, threshold: float, channel: int) -> None:
        self.name, self.window, self.threshold, self._channel = name, window, threshold, channel

    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        assert frames_BKHWC.shape[1] == self.window
        return frames_BKHWC[:, -1, 0, 0, self._channel].float() / 255


class Longest:
    """Judges whole episodes: those with a bright frame anywhere."""

    name, threshold = "longest", 0.5

    def episode_probability(self, frames_BTHWC: Tensor) -> Tensor:
        return frames_BTHWC.flatten(1).amax(dim=1).float() / 255


def frames(*corners: tuple[int, int]) -> Tensor:
    made = torch.zeros(len(corners), 3, 4, 4, 3, dtype=torch.uint8)
    for row, (red, green) in enumerate(corners):
        made[row, -1, 0, 0, :2] = torch.tensor([red, green])
    return made


A, B = LastPixel("a", 1, 0.2, 0), LastPixel("b", 3, 0.8, 1)


def test_thresholds_are_brought_together() -> None:
    values = centred(torch.tensor([0.0, 0.1, 0.2, 0.6, 1.0]), 0.2)
    assert torch.allclose(values, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))


@pytest.mark.parametrize(("rule", "expected"), [("lowest", [1, 0, 0]), ("highest", [1, 1, 0]), ("mean", [1, 0, 0])])
def test_rules(rule: str, expected: list[int]) -> None:
    judge = EnsembleJudge([A, B], rule)
    assert isinstance(judge, Judge) and judge.window == 3 and judge.name == f"{rule}(a, b)"
    probability = judge.probability(frames((255, 255), (60, 100), (0, 0)))
    assert verdict(judge, probability).int().tolist() == expected
    assert torch.equal(judge.probability(frames((60, 100))), probability[1:2])


class Feeling(LastPixel):
    """Told agent_pos; its first number, in the oldest frame of the window, decides."""

    def __init__(self, name: str, window: int, state_dim: int) -> None:
        super().__init__(name, window, 0.5, 0)
        self.state_dim = state_dim

    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        return super().probability(frames_BKHWC) if agent_pos_BKP is None else agent_pos_BKP[:, 0, 0]


def test_members_are_told_agent_pos() -> None:
    judge = EnsembleJudge([A, B, Feeling("hand", 2, 4)], "median")
    assert told_state(judge) == 4 and told_state(EnsembleJudge([A, B])) == 0
    poses = torch.rand(1, 3, 4)
    assert torch.allclose(judge.probability(frames((255, 0)), poses), poses[:, 1, 0])
    assert torch.equal(judge.probability(frames((255, 0))), torch.ones(1))
    with pytest.raises(InvalidArgument, match=r"shape \(1, 3, 4\)"):
        judge.probability(frames((255, 0)), poses[:, 1:])
    with pytest.raises(InvalidArgument, match="agent_pos of one size"):
        EnsembleJudge([Feeling("hand", 2, 4), Feeling("other", 2, 5)])


def test_wrong_ensembles_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="at least one judge"):
        EnsembleJudge([])
    with pytest.raises(UnknownName, match="rule"):
        EnsembleJudge([A], "loudest")
    with pytest.raises(InvalidArgument, match="probability"):
        EnsembleJudge([object()])  # type: ignore[list-item]


def test_episode_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", {})
    registry.register_judge("whole", Longest)
    assert isinstance(registry.get_episode_judge("whole"), Longest)
    with pytest.raises(InvalidArgument, match="whole episodes only"):
        registry.get_judge("whole")
    with pytest.raises(InvalidArgument, match="episode_probability"):
        registry.get_episode_judge(object())  # type: ignore[arg-type]
    last = registry.get_episode_judge(A)
    assert isinstance(last, AtLastRow) and isinstance(last, EpisodeJudge) and last.name == "a"
    video = frames((255, 0), (30, 0))
    assert torch.allclose(last.episode_probability(video), torch.tensor([1.0, 30 / 255]))


def test_an_entry_point_serves_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: Checkpoint
) -> None:
    """As pip leaves a package behind: a module and its metadata on the path; nothing of ours knows of it."""
    (tmp_path / "their_judging.py").write_text(
        "class Alternating:\n"
        "    name, window, threshold = 'alternating', 2, 0.5\n"
        "    def __init__(self):\n"
        "        self.calls = 0\n"
        "    def probability(self, frames_BKHWC):\n"
        "        assert frames_BKHWC.shape[1] == 2\n"
        "        self.calls += 1\n"
        "        return frames_BKHWC.new_full((len(frames_BKHWC),), self.calls % 2).float()\n"
    )
    info = tmp_path / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hma_gym.judges]\nalternating = their_judging:Alternating\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    env = gymnasium.make("HMA-Lift-v0", checkpoint=toy, judge="alternating")
    _, told = env.reset(seed=0)
    verdicts = [told["is_success"]]
    for _ in range(3):
        _, reward, _, _, told = env.step(env.action_space.sample())
        assert reward == float(told["is_success"]) and told["success_probability"] in (0.0, 1.0)
        verdicts.append(told["is_success"])
    assert verdicts == [True, False, True, False]
    env.close()
