"""Reinforcement learning in the learned world with stable-baselines3, from scratch or from a cloned policy.

    hma-gym train rl --out runs/ppo --algorithm ppo --clone demos.hdf5 --steps 50000

``out/clone.zip`` is the cloned policy, ``out/step-0010000.zip`` and so on are models kept along the way, each of which
``hma-gym evaluate --policies sb3:PPO:FILE.zip`` takes; ``out/metrics.jsonl`` has, for each of them, the success in the
dream and in ground truth from the same starts, and their difference: the exploitation gap. The score that counts is the
true one. Started again, the same line goes on from the last model that was kept.

Shape legend: B batch, N environments, F frames of the demonstrations, H W C image, A action dims, P agent_pos dims.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from hma_gym.data.robomimic_hdf5 import open_dataset, storage_errors, write_atomically
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint
from hma_gym.dynamics.steppers import Sketch
from hma_gym.envs.sb3 import make_sb3_env
from hma_gym.envs.tasks import get_task
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import DatasetError, InvalidArgument, ResumeError
from hma_gym.evaluation.rollouts import play_learned, play_truth
from hma_gym.extras import require
from hma_gym.policies.diffusion.encoder import ImageEncoder
from hma_gym.policies.loading import EpisodeSeed
from hma_gym.policies.sb3 import SB3Policy

_PURPOSE = "reinforcement learning"
_ENCODER = ((32, 64), 1, 32)  # widths, blocks and keypoints of the image encoder
_HEADS = [128, 128]  # hidden widths of actor and critic


@dataclass(frozen=True)
class RLOptions:
    """Options of ``hma-gym train rl``.

    Attributes:
        out: folder of the run.
        checkpoint: name, folder or hub id of the learned world.
        algorithm: ``ppo`` or ``sac``.
        clone: robomimic HDF5 file whose policy is cloned first; None to begin from scratch.
        clone_steps: optimiser steps of the cloning, 64 frames each.
        world: in which it learns: the ``model``, or a ``sketch`` of it by the body alone (see
            :class:`hma_gym.dynamics.steppers.Sketch`), many times faster. It is evaluated in the model.
        freeze_encoder: keep the cloned actor's image encoder as it is, which has seen real frames only. PPO then sees
            each frame once, and learns from what the encoder said of it.
        critic_steps: the first steps of PPO after cloning, in which it learns the value alone.
        steps: environment steps to learn from, all environments together.
        num_envs: environments at once.
        horizon: length of an episode.
        shaping: weight of the judge's probability as a potential (0: sparse reward alone).
        uncertainty_weight: penalty for uncertainty; needs a calibrated checkpoint.
        max_uncertainty: end episodes where the model is less sure than this; needs a calibrated checkpoint.
        exploration: standard deviation of PPO's actions at the beginning.
        lr: learning rate; gamma: discount.
        rollout: PPO's steps of each environment between updates; SAC updates once for every ``num_envs`` steps.
        buffer: SAC's memory in steps.
        evaluate_every: environment steps between evaluations.
        episodes: of each evaluation, in each world, from the first starts of the bank.
        truth: evaluate in ground truth too; needs the extra ``sim``.
        device: of the learned world and the policy.
        seed: of everything random.
        progress: show progress bars.
    """

    out: Path
    checkpoint: str = "lift-64"
    algorithm: Literal["ppo", "sac"] = "ppo"
    clone: Path | None = None
    clone_steps: int = 2000
    world: Literal["model", "sketch"] = "model"
    freeze_encoder: bool = True
    critic_steps: int = 5_000
    steps: int = 50_000
    num_envs: int = 16
    horizon: int = 63
    shaping: float = 1.0
    uncertainty_weight: float = 0.0
    max_uncertainty: float | None = None
    exploration: float = 0.2
    lr: float = 1e-4
    gamma: float = 0.99
    rollout: int = 63
    buffer: int = 20_000
    evaluate_every: int = 10_000
    episodes: int = 16
    truth: bool = True
    device: str = "cpu"
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "num_envs", "horizon", "exploration", "lr", "rollout", "buffer", "evaluate_every"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be positive, got {getattr(self, name)}.")
        if self.episodes < 1 or self.clone_steps < 1:
            raise InvalidArgument(
                f"episodes and clone_steps must be at least 1, got {self.episodes} and {self.clone_steps}."
            )
        if self.critic_steps < 0:
            raise InvalidArgument(f"critic_steps must be at least 0, got {self.critic_steps}.")
        if self.world not in ("model", "sketch"):
            raise InvalidArgument(f"world must be 'model' or 'sketch', got {self.world!r}.")
        if self.algorithm not in ("ppo", "sac"):
            raise InvalidArgument(f"algorithm must be 'ppo' or 'sac', got {self.algorithm!r}.")


@functools.cache
def _extractor_class() -> type:
    """Features of an observation for SB3's policies; made when first asked for: its base is of an optional package."""
    base = require("stable_baselines3.common.torch_layers", extra="rl", purpose=_PURPOSE).BaseFeaturesExtractor

    class Features(base):  # type: ignore[misc, valid-type]
        """Keypoints of the image and standardised agent_pos.

        Args:
            observation_space: of ``pixels`` (C, H, W) and ``agent_pos``.
            mean, std: of agent_pos, P numbers each.
        """

        def __init__(self, observation_space: Any, mean: Sequence[float], std: Sequence[float]) -> None:
            _, height, width = observation_space["pixels"].shape
            encoder = ImageEncoder((height, width), *_ENCODER)
            super().__init__(observation_space, encoder.size + len(mean))
            self.encoder = encoder
            self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
            self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

        def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
            """SB3's floats in [0, 1], (B, C, H, W), as the encoder has them: (B, H, W, C) in [-1, 1]."""
            images_BHWC = observations["pixels"].permute(0, 2, 3, 1) * 2 - 1
            pose = (observations["agent_pos"] - self.mean) / self.std
            return torch.cat((self.encoder(images_BHWC), pose), dim=1)

    return Features


def make_model(options: RLOptions, env: Any, checkpoint: Checkpoint) -> Any:
    """A fresh SB3 model of the options' algorithm, for an environment of :func:`make_sb3_env`."""
    package = require("stable_baselines3", extra="rl", purpose=_PURPOSE)
    domain = checkpoint.domain
    policy_arguments: dict[str, Any] = {
        "features_extractor_class": _extractor_class(),
        "features_extractor_kwargs": {"mean": domain.state_mean, "std": domain.state_std},
    }
    if options.algorithm == "ppo":
        return _ppo(options, "MultiInputPolicy", env, policy_arguments)
    return package.SAC(
        "MultiInputPolicy",
        env,
        buffer_size=options.buffer,
        batch_size=64,
        learning_starts=options.rollout * options.num_envs,
        policy_kwargs={**policy_arguments, "net_arch": _HEADS},
        **_shared(options),
    )


def _shared(options: RLOptions) -> dict[str, Any]:
    return {"learning_rate": options.lr, "gamma": options.gamma, "seed": options.seed, "device": options.device}


def _ppo(options: RLOptions, policy: str, env: Any, policy_arguments: dict[str, Any]) -> Any:
    batch = options.rollout * options.num_envs
    return require("stable_baselines3", extra="rl", purpose=_PURPOSE).PPO(
        policy,
        env,
        n_steps=options.rollout,
        batch_size=max(size for size in range(1, min(256, batch) + 1) if batch % size == 0),
        n_epochs=4,
        clip_range=0.1,
        policy_kwargs={
            **policy_arguments,
            "net_arch": _HEADS,
            "log_std_init": float(np.log(options.exploration)),
        },
        **_shared(options),
    )


@functools.cache
def _features_env_class() -> type:
    """The class, made when first asked for: its base comes from an optional package."""
    base = require("stable_baselines3.common.vec_env", extra="rl", purpose=_PURPOSE).VecEnvWrapper

    class FeaturesEnv(base):  # type: ignore[misc, valid-type]
        """A vector environment whose observations are what a policy's features extractor says of them, (N, D)."""

        def __init__(self, env: Any, policy: Any) -> None:
            bounds = np.full(policy.features_dim, np.inf, np.float32)
            super().__init__(env, gymnasium.spaces.Box(-bounds, bounds))
            self._policy = policy

        def reset(self) -> NDArray[np.float32]:
            return self._features(self.venv.reset())

        def step_wait(self) -> Any:
            observations, rewards, dones, infos = self.venv.step_wait()
            for info in infos:
                if "terminal_observation" in info:
                    last = {key: value[None] for key, value in info["terminal_observation"].items()}
                    info["terminal_observation"] = self._features(last)[0]
            return self._features(observations), rewards, dones, infos

        @torch.no_grad()
        def _features(self, observations: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
            tensors, _ = self._policy.obs_to_tensor(observations)
            features: Tensor = self._policy.extract_features(tensors)
            return features.cpu().numpy()

    return FeaturesEnv


def _learner(options: RLOptions, env: Any, model: Any) -> Any:
    """What learns in the place of ``model``: itself, or PPO on what its frozen encoder says, with the same heads."""
    if options.algorithm != "ppo" or options.clone is None or not options.freeze_encoder:
        return model
    model.policy.set_training_mode(False)
    seen = _features_env_class()(env, model.policy)
    learner = _ppo(options, "MlpPolicy", seen, {})
    _copy_heads(model, learner)
    return learner


def _copy_heads(source: Any, target: Any) -> None:
    """Everything after the features, and the count of steps."""
    heads = {name: value for name, value in source.policy.state_dict().items() if "features_extractor" not in name}
    target.policy.load_state_dict({**target.policy.state_dict(), **heads})
    target.num_timesteps = source.num_timesteps


def clone_policy(
    model: Any, data: Path, *, steps: int, lr: float, seed: int, batch: int = 64, progress: bool = True
) -> float:
    """Teach an SB3 model's actor the actions of demonstrations (behaviour cloning); the last steps' mean loss.

    The mean action is regressed, with a robust loss; the spread of the actions stays as it is.

    Args:
        model: PPO or SAC with image and agent_pos observations.
        data: robomimic HDF5 file; its training split is used.

    Raises:
        DatasetError: the images or actions do not fit the model.
    """
    dataset = open_dataset(data)
    episodes = [dataset[i] for i in dataset.moving(dataset.split("train"))]
    if not episodes:
        raise DatasetError(f"{str(data)!r} has no training episode to clone, only stills; give demonstrations.")
    images = np.concatenate([episode.images_THWC for episode in episodes])
    poses = np.concatenate([episode.agent_pos_TP for episode in episodes]).astype(np.float32)
    actions = np.concatenate([episode.actions_TA for episode in episodes]).astype(np.float32)
    wanted = (model.observation_space["pixels"].shape, model.action_space.shape)
    found = ((images.shape[3], *images.shape[1:3]), actions.shape[1:])
    if wanted != found:
        raise DatasetError(f"{str(data)!r} must have images and actions of {wanted} (C H W, A), got {found}.")
    rng = np.random.default_rng(seed)
    actor: nn.Module = model.policy
    optimizer = torch.optim.AdamW(actor.parameters(), lr=lr)
    actor.train()
    losses: list[float] = []
    for step in tqdm(range(steps), desc="cloning", unit="step", disable=not progress):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 2.0 * (1.0 - step / steps))
        rows = rng.integers(len(actions), size=batch)
        light = rng.uniform(0.85, 1.15, (batch, 1, 1, 1))
        seen = np.clip(images[rows] * light, 0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
        tensors = {
            "pixels": torch.from_numpy(seen).to(model.device),
            "agent_pos": torch.from_numpy(poses[rows]).to(model.device),
        }
        aim = torch.from_numpy(actions[rows]).to(model.device)
        loss = nn.functional.smooth_l1_loss(_mean_action(model, tensors), aim, beta=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-20:]))


def _mean_action(model: Any, observations: dict[str, Tensor]) -> Tensor:
    """The deterministic action of PPO's or SAC's actor, with gradients."""
    if isinstance(model, require("stable_baselines3", extra="rl", purpose=_PURPOSE).SAC):
        action: Tensor = model.actor(observations, deterministic=True)
        return action
    mean: Tensor = model.policy.get_distribution(observations).distribution.mean
    return mean


@dataclass(frozen=True)
class Score:
    """Success at the last step over the same starts, as shares; ``truth`` is None where it was not played."""

    dream: float
    truth: float | None

    @property
    def gap(self) -> float | None:
        """The exploitation gap: dream minus truth."""
        return None if self.truth is None else self.dream - self.truth


def score_model(model: Any, options: RLOptions, checkpoint: Checkpoint) -> Score:
    """Play the deterministic policy in the dream and, if asked, in ground truth, from the same starts."""
    seeds = [EpisodeSeed(start, options.seed) for start in range(min(options.episodes, len(checkpoint.starts)))]

    def make(episodes: Sequence[EpisodeSeed]) -> SB3Policy:
        return SB3Policy(model)

    envs = HMAVectorEnv(len(seeds), checkpoint=checkpoint, obs_type="pixels_agent_pos")
    dream = play_learned(envs, "model", make, seeds, options.horizon, nullcontext)
    envs.close()
    wins = float(np.mean([episode.success_end for episode in dream]))
    if not options.truth:
        return Score(wins, None)
    env = gymnasium.make(
        f"GroundTruth-{get_task(checkpoint.task).id_stem}-v0",
        obs_type="pixels_agent_pos",
        max_episode_steps=options.horizon,
        starts=options.checkpoint,
    )
    true = [play_truth(env, "model", make, seed, options.horizon, nullcontext).success_end for seed in seeds]
    env.close()
    return Score(wins, float(np.mean(true)))


def train_rl(options: RLOptions) -> Path:
    """Clone, learn, evaluate; returns the last model.

    Raises:
        ResumeError: ``out`` holds a run with other options.
        InvalidArgument: the world has no agent_pos, no judge, or no calibration where one is needed.
    """
    checkpoint = load_checkpoint(options.checkpoint, device=options.device)
    if checkpoint.judge is None or not checkpoint.domain.state_dim:
        raise InvalidArgument(f"checkpoint {checkpoint.name!r} must have a judge and agent_pos to learn in.")
    _claim(options)
    torch.manual_seed(options.seed)
    envs = HMAVectorEnv(
        options.num_envs,
        checkpoint=LearnedWorld(checkpoint, stepper=Sketch if options.world == "sketch" else None),
        obs_type="pixels_agent_pos",
        max_episode_steps=options.horizon,
        autoreset_mode="SameStep",
        max_uncertainty=options.max_uncertainty,
    )
    env = make_sb3_env(
        envs, shaping=options.shaping, gamma=options.gamma, uncertainty_weight=options.uncertainty_weight
    )
    model = make_model(options, env, checkpoint)
    kept = sorted(options.out.glob("step-*.zip"))
    done = 0
    if kept:
        done = int(kept[-1].stem.split("-")[1])
        model = type(model).load(kept[-1], env=env, device=options.device)
        model.set_random_seed(options.seed + done)
        if done not in _logged(options):  # killed between the two
            _log(options, done, score_model(model, options, checkpoint))
    else:
        cloned = options.out / "clone.zip"
        if cloned.exists():
            model = type(model).load(cloned, env=env, device=options.device)
        elif options.clone is not None:
            clone_policy(
                model, options.clone, steps=options.clone_steps, lr=1e-3, seed=options.seed, progress=options.progress
            )
            _keep(model, cloned)
        _log(options, 0, score_model(model, options, checkpoint))
    path = kept[-1] if kept else options.out / "clone.zip"
    critic_steps = options.critic_steps if options.clone is not None and options.algorithm == "ppo" else 0
    learner = _learner(options, env, model)
    while done < options.steps:
        stop = min(done + options.evaluate_every, options.steps)
        if done < critic_steps:
            stop = min(stop, critic_steps)
        _hold(learner, options, actor=done < critic_steps)
        learner.learn(stop - done, reset_num_timesteps=done == 0, progress_bar=False)
        done = learner.num_timesteps
        if learner is not model:
            _copy_heads(learner, model)
        path = _keep(model, options.out / f"step-{done:07d}.zip")
        _log(options, done, score_model(model, options, checkpoint))
    env.close()
    return path


def _hold(model: Any, options: RLOptions, *, actor: bool) -> None:
    """Say which weights of the actor learn: all but a cloned encoder; none of PPO's where ``actor`` is held."""
    network = model.actor if options.algorithm == "sac" else model.policy
    network.features_extractor.requires_grad_(options.clone is None or not options.freeze_encoder)
    if options.algorithm == "ppo":
        for part in (network.mlp_extractor.policy_net, network.action_net):
            part.requires_grad_(not actor)
        network.log_std.requires_grad_(not actor)


def _claim(options: RLOptions) -> None:
    """Note the options in the run's folder, or see that they are those of the run that lies there."""
    free = {"steps", "progress", "device", "out"}  # a run may go on for longer, and elsewhere
    mine = {name: str(value) for name, value in vars(options).items() if name not in free}
    path = options.out / "options.json"
    with storage_errors(path):
        options.out.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(mine, indent=1) + "\n")
            return
        theirs = json.loads(path.read_text())
    other = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if other:
        raise ResumeError(f"{str(options.out)!r} holds a run with other {other}; choose another out, or its options.")


def _keep(model: Any, path: Path) -> Path:
    """Save atomically."""
    temporary = path.with_name(f".{path.name}")
    with storage_errors(path):
        model.save(temporary)
        os.replace(temporary, path)
    return path


def _logged(options: RLOptions) -> dict[int, str]:
    """The lines of the log by step."""
    path = options.out / "metrics.jsonl"
    with storage_errors(path):
        lines = path.read_text().splitlines() if path.exists() else []
    return {json.loads(line)["step"]: line for line in lines}


def _log(options: RLOptions, step: int, score: Score) -> None:
    row = {"step": step, "dream": score.dream, "truth": score.truth, "gap": score.gap}
    lines = {**_logged(options), step: json.dumps(row)}
    write_atomically(options.out / "metrics.jsonl", "".join(f"{lines[key]}\n" for key in sorted(lines)).encode())
    if options.progress:
        said = "not played" if score.truth is None else f"{score.truth:.2f}, gap {score.gap:+.2f}"
        tqdm.write(f"step {step}: success {score.dream:.2f} in the dream, {said} in ground truth")
