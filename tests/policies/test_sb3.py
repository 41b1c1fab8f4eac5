"""stable-baselines3 models as policies."""

from __future__ import annotations

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from toy_policies import SIZE, observations

from hma_gym.errors import CheckpointError
from hma_gym.policies.loading import EpisodeSeed, load_policy

sb3 = pytest.importorskip("stable_baselines3")

PIXELS = gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
AGENT_POS = gymnasium.spaces.Box(-2, 2, (9,), np.float32)


class Stub(gymnasium.Env):
    """Spaces only: the model is saved untrained."""

    def __init__(self, observation_space: gymnasium.Space) -> None:
        self.observation_space = observation_space
        self.action_space = gymnasium.spaces.Box(-1, 1, (7,), np.float32)


@pytest.mark.parametrize("dict_space", [True, False], ids=["pixels_agent_pos", "pixels"])
def test_a_saved_model_acts_as_it_predicts(tmp_path: Path, dict_space: bool) -> None:
    space = gymnasium.spaces.Dict({"pixels": PIXELS, "agent_pos": AGENT_POS}) if dict_space else PIXELS
    kind = "MultiInputPolicy" if dict_space else "CnnPolicy"
    model = sb3.PPO(kind, Stub(space), n_steps=8, batch_size=8, seed=0, device="cpu")
    model.save(tmp_path / "model.zip")
    source = load_policy(f"sb3:PPO:{tmp_path / 'model.zip'}")
    policy = source.make([EpisodeSeed(0, 0), EpisodeSeed(1, 1)])
    policy.reset(np.array([True, True]))
    seen = observations(2, 0)
    actions = policy.act(seen)
    assert actions.shape == (2, 1, 7) and actions.dtype == np.float32
    predicted, _ = model.predict(seen if dict_space else seen["pixels"], deterministic=True)
    np.testing.assert_allclose(actions[:, 0], predicted, atol=1e-5)


def test_no_model_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no zip file"):
        load_policy(f"sb3:PPO:{tmp_path / 'none.zip'}")
