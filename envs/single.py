"""One learned environment: Gymnasium's ``Env`` over a vector environment of one.

>>> import gymnasium, hma_gym
>>> env = gymnasium.make("HMA-Lift-v0", obs_type="pixels_agent_pos")
>>> observation, info = env.reset(seed=0)
>>> observation, reward, terminated, truncated, info = env.step(env.action_space.sample())

Shape legend: A numbers of an action, H W image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from hma_gym.dynamics.checkpoint import Checkpoint
from hma_gym.envs.actions import read_actions
from hma_gym.envs.spaces import ObsType
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.judges.protocol import Judge, TokenJudge


class HMAEnv(gymnasium.Env[Any, Any]):
    """A learned environment with NumPy observations.

    Arguments, observations, rewards, infos and options of ``reset`` are those of
    :class:`~hma_gym.envs.vector.HMAVectorEnv`, without the leading N. ``gymnasium.make`` counts the steps of an
    episode (``max_episode_steps``); this class does not.

    Raises:
        InvalidArgument: an argument breaks its rule.
        UnknownName: no such task, domain or judge.
        CheckpointError: the checkpoint is missing, damaged, newer, or does not fit.
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self,
        task: str | None = None,
        checkpoint: str | Path | Checkpoint | LearnedWorld | None = None,
        obs_type: ObsType = "pixels",
        image_size: int | None = None,
        judge: Judge | TokenJudge | str | None = None,
        terminate_on_success: bool = False,
        temperature: float | None = None,
        decode_steps: int | None = None,
        domain: str | None = None,
        device: str | torch.device | None = None,
        render_mode: str | None = "rgb_array",
        render_size: int = 256,
        max_uncertainty: float | None = None,
    ) -> None:
        self._vector = HMAVectorEnv(
            num_envs=1,
            task=task,
            checkpoint=checkpoint,
            obs_type=obs_type,
            image_size=image_size,
            judge=judge,
            autoreset_mode=AutoresetMode.DISABLED,
            terminate_on_success=terminate_on_success,
            temperature=temperature,
            decode_steps=decode_steps,
            domain=domain,
            device=device,
            render_mode=render_mode,
            render_size=render_size,
            max_uncertainty=max_uncertainty,
        )
        self.action_space = self._vector.single_action_space
        self.observation_space = self._vector.single_observation_space
        self.render_mode = render_mode
        self.metadata = {key: value for key, value in self._vector.metadata.items() if key != "autoreset_mode"}

    @property
    def world(self) -> LearnedWorld:
        """The checkpoint in use, its judge and its starts."""
        return self._vector.world

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; see :meth:`HMAVectorEnv.reset <hma_gym.envs.vector.HMAVectorEnv.reset>` for ``options``.

        Returns:
            The observation, and info with ``is_success`` and ``success_probability``.
        """
        super().reset(seed=seed)
        self._vector.set_generator(0, self.np_random)
        observations, infos = self._vector.reset(options=options)
        return _first(observations), _info(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step.

        Args:
            action: (A,) floating, finite; values outside the action space are clipped to it.

        Returns:
            Observation, reward, terminated, truncated (by ``max_uncertainty``), info.

        Raises:
            InvalidAction: wrong shape or dtype, or a value that is not finite.
            EnvironmentState: before reset, after close, or after the episode's end.
        """
        checked = read_actions(action, (), self._vector.single_action_box, torch.device("cpu"))
        observations, rewards, terminations, truncations, infos = self._vector.step(checked[None])
        return _first(observations), float(rewards[0]), bool(terminations[0]), bool(truncations[0]), _info(infos)

    def render(self) -> NDArray[np.uint8] | None:
        """The current frame, enlarged to (render_size, render_size, 3) uint8; None without a render mode."""
        frames = self._vector.render()
        return None if frames is None else frames[0]

    def get_state(self) -> dict[str, Any]:
        """Everything that the future depends on, generators included: a picklable dict for :meth:`set_state`.

        The count of ``max_episode_steps`` is the wrapper's and not part of it.
        """
        return self._vector.save_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Return to what :meth:`get_state` gave, in this or an equal environment: the same frames will follow.

        Raises:
            EnvironmentState: the state is of another version, checkpoint or domain, or the environment is closed.
        """
        self._vector.set_generator(0, self.np_random)
        self._vector.load_state(state)

    def close(self) -> None:
        """Free the rollout's memory. Calling it twice is harmless; any other call afterwards is an error."""
        self._vector.close()


def _first(observations: Any) -> Any:
    """The observation of environment 0."""
    return {k: v[0] for k, v in observations.items()} if isinstance(observations, dict) else observations[0]


def _info(infos: dict[str, Any]) -> dict[str, Any]:
    """Infos of environment 0 as plain Python values."""
    return {key: value[0].item() for key, value in infos.items() if not key.startswith("_")}
