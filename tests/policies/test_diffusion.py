"""Diffusion policy: training signal, sampling, memory, seeds, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from toy_policies import CONFIG, SIZE, STATISTICS, observations, toy_diffusion

from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.policies.diffusion import DiffusionConfig, DiffusionPolicy, load_diffusion, save_diffusion
from hma_gym.policies.diffusion.encoder import SpatialSoftmax
from hma_gym.policies.protocol import WatchingPolicy

ALL = np.array([True, True])


def batch(count: int = 8) -> dict[str, torch.Tensor]:
    """Actions that the image alone decides: the side on which a bright bar stands."""
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(count) % 2
    images = torch.zeros(count, 2, SIZE, SIZE, 3, dtype=torch.uint8)
    images[side == 0, :, :, :8] = 255
    images[side == 1, :, :, -8:] = 255
    actions = (2.0 * side - 1)[:, None, None].expand(count, 16, 7).clone()
    return {
        "images_BOHWC": images,
        "agent_pos_BOP": torch.randn(count, 2, 9, generator=generator),
        "actions_BHA": actions,
        "auxiliary_BOX": torch.zeros(count, 2, 5),
    }


@pytest.mark.parametrize("network", ["unet", "transformer"])
def test_it_learns_what_the_image_says(network: str) -> None:
    model = toy_diffusion(network)
    data = batch()
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss, metrics = model.loss(data, generator)
        loss.backward()
        optimizer.step()
    assert set(metrics) == {"denoising", "auxiliary"}
    noise = torch.randn(8, 16, 7, generator=generator)
    sampled = model.eval().sample(data["images_BOHWC"], data["agent_pos_BOP"], noise)
    assert sampled.shape == (8, 8, 7)
    assert (sampled.sign() == data["actions_BHA"][:, :8].sign()).float().mean() > 0.9
    assert all(p.grad is not None for p in model.parameters())


def test_the_reading_is_acted_on_and_taught_by_its_own_targets_alone() -> None:
    model = toy_diffusion()
    unread = type(model)(replace(CONFIG, auxiliary_weight=0.0), STATISTICS)
    unread.load_state_dict(model.state_dict())
    unread.loss(batch(), torch.Generator().manual_seed(0))[0].backward()
    assert model.auxiliary is not None and unread.auxiliary is not None
    assert all(not p.grad.any() for p in unread.auxiliary.parameters() if p.grad is not None)
    data, noise = batch(), torch.zeros(8, 16, 7)
    before = model.eval().sample(data["images_BOHWC"], data["agent_pos_BOP"], noise)
    with torch.no_grad():
        for parameter in model.auxiliary.parameters():
            parameter.add_(1.0)
    assert not torch.allclose(before, model.sample(data["images_BOHWC"], data["agent_pos_BOP"], noise))


def test_noise_prediction_is_the_other_target() -> None:
    model = toy_diffusion()
    other = type(model)(replace(CONFIG, prediction="epsilon"))
    other.load_state_dict(model.state_dict())
    losses = [m.loss(batch(), torch.Generator().manual_seed(0))[1]["denoising"] for m in (model, other)]
    assert losses[0] != losses[1]


def test_the_spatial_softmax_says_where() -> None:
    features = torch.full((1, 2, 5, 9), -20.0)
    features[0, 0, 0, 8] = features[0, 1, 4, 4] = 20.0
    np.testing.assert_allclose(SpatialSoftmax((5, 9))(features), [[1.0, -1.0, 0.0, 1.0]], atol=1e-5)


def test_n_environments_are_n_single_ones_and_seeds_decide() -> None:
    model = toy_diffusion()
    together = DiffusionPolicy(model, [5, 6])
    assert isinstance(together, WatchingPolicy)
    singles = [DiffusionPolicy(model, [seed]) for seed in (5, 6)]
    together.reset(ALL)
    for single in singles:
        single.reset(ALL[:1])
    for step in range(3):
        seen = observations(2, step)
        ours = together.act(seen)
        assert ours.shape == (2, 8, 7) and ours.dtype == np.float32 and np.abs(ours).max() <= 1
        for n, single in enumerate(singles):
            theirs = single.act({key: value[n : n + 1] for key, value in seen.items()})
            np.testing.assert_allclose(ours[n], theirs[0], atol=1e-5)
    same_image = {key: np.repeat(value[:1], 2, axis=0) for key, value in observations(2, 9).items()}
    together.reset(ALL)
    drawn = together.act(same_image)
    assert not np.allclose(drawn[0], drawn[1])


def test_an_episode_depends_on_nothing_before_it_and_on_no_neighbour() -> None:
    first, second = (DiffusionPolicy(toy_diffusion(), [1, 2]) for _ in range(2))
    for policy in (first, second):
        policy.reset(ALL)
    first.act(observations(2, 0))
    second.act(observations(2, 1))
    for policy in (first, second):
        policy.reset(np.array([True, False]))
    np.testing.assert_allclose(first.act(observations(2, 2))[0], second.act(observations(2, 2))[0], atol=1e-6)


def test_it_remembers_the_observation_before() -> None:
    watched, blind = (DiffusionPolicy(toy_diffusion(), [1, 2]) for _ in range(2))
    for policy in (watched, blind):
        policy.reset(ALL)
        policy.observe(observations(2, 0))
    watched.observe(observations(2, 1))
    assert not np.allclose(watched.act(observations(2, 3)), blind.act(observations(2, 3)))


def test_a_checkpoint_gives_the_same_policy_back(tmp_path: Path) -> None:
    model = toy_diffusion("transformer")
    folder = save_diffusion(tmp_path / "policy", model.config, model.state_dict(), {"seed": 3})
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "policy.safetensors"]
    loaded = load_diffusion(folder)
    assert loaded.config == model.config
    answers = []
    for source in (model, loaded):
        policy = DiffusionPolicy(source, [0, 1])
        policy.reset(ALL)
        answers.append(policy.act(observations(2, 0)))
    np.testing.assert_array_equal(*answers)


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    model = toy_diffusion()
    with pytest.raises(CheckpointError, match="must hold config.json and policy.safetensors"):
        load_diffusion(tmp_path)
    folder = save_diffusion(tmp_path / "a", model.config, model.state_dict(), {})
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(CheckpointError, match="version 9, and this hma_gym reads"):
        load_diffusion(folder)
    config.write_text(text.replace('"keypoints": 8', '"keypoints": 16'))
    with pytest.raises(CheckpointError, match="does not fit its config.json"):
        load_diffusion(folder)
    config.write_text(text.replace('"keypoints"', '"key_points"'))
    with pytest.raises(CheckpointError, match="is damaged.*key_points"):
        load_diffusion(folder)
    config.write_text(text)
    weights = folder / "policy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a diffusion policy"):
        load_diffusion(folder)


def test_wrong_settings_and_observations_say_what_is_right() -> None:
    with pytest.raises(InvalidArgument, match="action_horizon must lie between 1 and .* = 15, got 16"):
        DiffusionConfig(observation_horizon=2, action_horizon=16)
    with pytest.raises(InvalidArgument, match="must be a multiple of 4 for a U-Net of 3 levels, got 14"):
        DiffusionConfig(unet_channels=(8, 8, 8), prediction_horizon=14)
    with pytest.raises(InvalidArgument, match="network must be one of"):
        DiffusionConfig(network="mlp")  # type: ignore[arg-type]
    policy = DiffusionPolicy(toy_diffusion(), [0, 1])
    policy.reset(ALL)
    with pytest.raises(InvalidArgument, match="needs observation\\['agent_pos'\\]"):
        policy.act(observations(2, 0)["pixels"])
    with pytest.raises(InvalidArgument, match=r"needs uint8 images \(2, 40, 40, 3\).*got uint8 \(3, 40, 40, 3\)"):
        policy.act(observations(3, 0))
    with pytest.raises(InvalidArgument, match="one seed per environment"):
        DiffusionPolicy(toy_diffusion(), [])
