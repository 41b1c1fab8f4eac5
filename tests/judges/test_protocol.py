"""Any object with the four members is a judge; whole-episode use equals streaming use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hma_gym.errors import InvalidArgument, InvalidImage, UnknownName
from hma_gym.judges import registry
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from hma_gym.judges.protocol import (
    Judge,
    ProprioceptiveJudge,
    check_window,
    episode_positions,
    episode_probabilities,
    told_state,
    verdict,
    windows_at,
)


class BrightnessJudge:
    """Sure of success in proportion to the mean brightness of its window, weighted to the newest frame."""

    name, window, threshold = "brightness", 3, 0.4

    def probability(self, frames_BKHWC: Tensor) -> Tensor:
        check_window(self, frames_BKHWC)
        weight_K = torch.tensor([0.1, 0.2, 0.7])
        return (frames_BKHWC.float().mean(dim=(-3, -2, -1)) / 255 * weight_K).sum(dim=1)


def make_brightness_judge() -> BrightnessJudge:
    return BrightnessJudge()


def _video(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(0, 256, (batch, length, 16, 16, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_windows_repeat_the_first_frame() -> None:
    frames = _video(1, 5)
    windows = windows_at(frames, torch.tensor([0, 1, 4]), 3)
    assert windows.shape == (1, 3, 3, 16, 16, 3)
    for row, expected in zip(range(3), ([0, 0, 0], [0, 0, 1], [2, 3, 4]), strict=True):
        assert torch.equal(windows[:, row], frames[:, expected])


@pytest.mark.parametrize("judge", [BrightnessJudge(), ClassifierJudge(ClassifierConfig(image_size=(16, 16))).eval()])
def test_whole_episode_equals_streaming(judge: Judge) -> None:
    frames = _video()
    whole = episode_probabilities(judge, frames, batch=4)
    assert whole.shape == (3, 7)
    history = [frames[:, 0]] * judge.window
    for t in range(7):
        history = [*history[1:], frames[:, t]]
        assert torch.allclose(judge.probability(torch.stack(history, dim=1)), whole[:, t], atol=1e-6)
    assert torch.allclose(episode_probabilities(judge, frames, torch.tensor([6])), whole[:, -1:], atol=1e-6)
    assert torch.equal(verdict(judge, whole), whole >= judge.threshold)


class Holding:
    """A judge that is told agent_pos: the oldest pose of its window decides where it is known, else the light."""

    name, window, threshold, state_dim = "holding", 3, 0.5, 2

    def probability(self, frames_BKHWC: Tensor, agent_pos_BKP: Tensor | None = None) -> Tensor:
        if agent_pos_BKP is None:
            return frames_BKHWC[:, -1].float().mean(dim=(1, 2, 3)) / 255
        return agent_pos_BKP[:, 0, 0]


def test_a_judge_is_told_agent_pos_where_it_can_be() -> None:
    frames = _video()
    poses = torch.rand(3, 7, 2, generator=torch.Generator().manual_seed(1))
    assert isinstance(Holding(), ProprioceptiveJudge) and told_state(Holding()) == 2
    assert told_state(BrightnessJudge()) == 0
    said = episode_probabilities(Holding(), frames, batch=4, agent_pos_BTP=poses)
    assert torch.equal(said, poses[:, [0, 0, 0, 1, 2, 3, 4], 0])
    assert torch.equal(episode_probabilities(Holding(), frames), frames.float().mean(dim=(2, 3, 4)) / 255)
    assert torch.equal(
        episode_probabilities(BrightnessJudge(), frames, agent_pos_BTP=poses),
        episode_probabilities(BrightnessJudge(), frames),
    )
    with pytest.raises(InvalidArgument, match=r"'holding' needs floating agent_pos of shape \(3, 7, 2\)"):
        episode_probabilities(Holding(), frames, agent_pos_BTP=poses[:, 1:])


def test_streaming_equals_whole_episode_with_agent_pos() -> None:
    torch.manual_seed(0)
    told = {"state_dim": 2, "state_mean": (0.5, 0.5), "state_std": (0.3, 0.3)}
    judge = ClassifierJudge(ClassifierConfig(image_size=(16, 16), **told)).eval()  # type: ignore[arg-type]
    assert judge.sense is not None
    torch.nn.init.normal_(judge.sense[-1].weight, std=0.3)
    frames, poses = _video(), torch.rand(3, 7, 2)
    whole = episode_probabilities(judge, frames, batch=4, agent_pos_BTP=poses)
    where = episode_positions(judge, frames, agent_pos_BTP=poses)
    assert not torch.allclose(whole, episode_probabilities(judge, frames), atol=1e-4)
    seen, felt = [frames[:, 0]] * judge.window, [poses[:, 0]] * judge.window
    for t in range(7):
        seen, felt = [*seen[1:], frames[:, t]], [*felt[1:], poses[:, t]]
        now = torch.stack(seen, dim=1), torch.stack(felt, dim=1)
        assert torch.allclose(judge.probability(*now), whole[:, t], atol=1e-6)
        assert torch.allclose(judge.position(*now), where[:, t], atol=1e-6)


def test_rows_outside_the_episode_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"\[0, 7\)"):
        episode_probabilities(BrightnessJudge(), _video(), torch.tensor([7]))


def test_a_window_of_another_length_is_refused() -> None:
    with pytest.raises(InvalidImage, match="repeat the first frame"):
        BrightnessJudge().probability(_video(2, 4))


def test_judges_by_name_object_and_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", {})
    judge = BrightnessJudge()
    assert registry.get_judge(judge) is judge
    registry.register_judge("bright", make_brightness_judge)
    assert isinstance(registry.get_judge("bright"), BrightnessJudge)
    with pytest.raises(InvalidArgument, match="already registered"):
        registry.register_judge("bright", make_brightness_judge)
    with pytest.raises(UnknownName, match="bright"):
        registry.get_judge("absent")
    with pytest.raises(InvalidArgument, match="probability"):
        registry.get_judge(object())  # type: ignore[arg-type]


def test_a_judge_of_an_installed_package(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution found on the path, as pip leaves it, is enough."""
    from pathlib import Path

    folder = Path(str(tmp_path))
    (folder / "third_party_judging.py").write_text(
        "class Always:\n"
        "    name, window, threshold = 'always', 1, 0.5\n"
        "    def probability(self, frames_BKHWC):\n"
        "        return frames_BKHWC.new_ones(len(frames_BKHWC)).float()\n"
    )
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hma_gym.judges]\nalways = third_party_judging:Always\n")
    monkeypatch.syspath_prepend(str(folder))
    assert "always" in registry.known_judges()
    judge = registry.get_judge("always")
    assert torch.equal(episode_probabilities(judge, _video()), torch.ones(3, 7))
