"""A learned vector environment as stable-baselines3's ``VecEnv``: PPO, SAC and their callbacks run in it.

>>> envs = gymnasium.make_vec(
...     "HMA-Lift-v0", num_envs=16, obs_type="pixels_agent_pos", autoreset_mode="SameStep"
... )  # doctest: +SKIP
>>> env = make_sb3_env(envs, shaping=1.0)  # doctest: +SKIP
>>> PPO("MultiInputPolicy", env).learn(10_000)  # doctest: +SKIP

Shape legend: N environments, A action dims.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode
from numpy.typing import NDArray

from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.extras import require

_PURPOSE = "environments for stable-baselines3"


def make_sb3_env(
    envs: HMAVectorEnv, *, shaping: float = 0.0, gamma: float = 0.99, uncertainty_weight: float = 0.0
) -> Any:
    """The environments as one ``stable_baselines3.common.vec_env.VecEnv``.

    Infos are SB3's: one dict an environment, with ``terminal_observation`` and ``TimeLimit.truncated`` where an episode
    ended, and ``is_success`` and ``success_probability`` of the step itself. ``seed`` and ``set_options`` (``start``)
    act at the next ``reset``.

    Args:
        envs: with ``autoreset_mode="SameStep"`` and NumPy output.
        shaping: weight of the dense reward ``gamma * p' - p``, p the judge's probability of success before and p' after
            a step: potential-based, so that the best policy stays the best (Ng et al. 1999). Nothing follows a
            terminated episode, so p' counts as 0 there. 0 leaves the sparse reward alone.
        gamma: the learner's discount.
        uncertainty_weight: of ``info["uncertainty"]``, taken off the reward; needs a calibrated checkpoint.

    Raises:
        InvalidArgument: another autoreset mode or output, a weight below 0, gamma outside (0, 1], shaping without a
            judge, or a penalty without calibration.
        MissingExtra: stable-baselines3 is not installed.
    """
    mode, output = envs.metadata["autoreset_mode"], envs.output
    if mode != AutoresetMode.SAME_STEP or output != "numpy":
        raise InvalidArgument(
            "envs must have autoreset_mode='SameStep' and output='numpy', as stable-baselines3 expects, got "
            f"{mode.value!r} and {output!r}."
        )
    if shaping < 0 or uncertainty_weight < 0 or not 0 < gamma <= 1:
        raise InvalidArgument(
            "shaping and uncertainty_weight must be at least 0 and gamma in (0, 1], got "
            f"shaping={shaping}, uncertainty_weight={uncertainty_weight}, gamma={gamma}."
        )
    if shaping and envs.world.judge is None:
        raise InvalidArgument(f"shaping needs a judge, and checkpoint {envs.world.checkpoint.name!r} has none.")
    if uncertainty_weight and envs.world.uncertainty is None:
        raise InvalidArgument(
            f"uncertainty_weight needs a calibrated checkpoint, and {envs.world.checkpoint.name!r} is not; run "
            "hma-gym calibrate."
        )
    return _env_class()(envs, shaping, gamma, uncertainty_weight)


@functools.cache
def _env_class() -> type:
    """The class, made when first asked for: its base comes from an optional package."""
    base = require("stable_baselines3.common.vec_env", extra="rl", purpose=_PURPOSE).VecEnv

    class SB3VecEnv(base):  # type: ignore[misc, valid-type]
        """See :func:`make_sb3_env`."""

        def __init__(self, envs: HMAVectorEnv, shaping: float, gamma: float, uncertainty_weight: float) -> None:
            self.envs = envs
            self._shaping, self._gamma, self._uncertainty_weight = shaping, gamma, uncertainty_weight
            self._potential_N = np.zeros(envs.num_envs)
            self._actions_NA: NDArray[np.float32] | None = None
            super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)

        def reset(self) -> Any:
            """Begin all episodes; their infos are in ``reset_infos``."""
            given = [options for options in self._options if options]
            if given and (len(given) < self.num_envs or any(set(options) != {"start"} for options in given)):
                raise InvalidArgument(f"options must be {{'start': index}} in all environments or none, got {given}.")
            starts = {"start": np.array([options["start"] for options in given])} if given else None
            seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
            observations, infos = self.envs.reset(seed=seeds, options=starts)
            self._reset_seeds()
            self._reset_options()
            self.reset_infos = _by_env(infos, self.num_envs)
            self._potential_N = self._potential(infos)
            return observations

        def step_async(self, actions: NDArray[np.floating[Any]]) -> None:
            """Take note of the actions (N, A)."""
            self._actions_NA = np.asarray(actions, dtype=np.float32)

        def step_wait(self) -> tuple[Any, NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
            """Carry them out: observations (of a new episode where one ended), rewards, dones and infos."""
            if self._actions_NA is None:
                raise EnvironmentState("call step_async(actions) before step_wait().")
            observations, rewards_N, terminated_N, truncated_N, infos = self.envs.step(self._actions_NA)
            self._actions_NA = None
            done_N = terminated_N | truncated_N
            now = {key: value for key, value in infos.items() if not key.startswith(("final_", "_"))}
            # Of the step itself: where an episode ended, ``infos`` is about the new one's first frame.
            of_step = now
            if done_N.any():
                ended = infos["final_info"]
                of_step = {key: np.where(done_N, ended[key], value) for key, value in now.items()}
                for i in np.flatnonzero(done_N):
                    self.reset_infos[i] = {key: value[i].item() for key, value in now.items()}
            after_N = np.where(terminated_N, 0.0, self._potential(of_step))
            shaped_N = rewards_N + self._shaping * (self._gamma * after_N - self._potential_N)
            if self._uncertainty_weight:
                shaped_N = shaped_N - self._uncertainty_weight * of_step["uncertainty"]
            self._potential_N = self._potential(now)
            per_env = _by_env(of_step, self.num_envs)
            for i in np.flatnonzero(done_N):
                per_env[i]["terminal_observation"] = infos["final_obs"][i]
                per_env[i]["TimeLimit.truncated"] = bool(truncated_N[i] and not terminated_N[i])
            return observations, shaped_N.astype(np.float32), done_N, per_env

        def close(self) -> None:
            """Free the rollouts' memory."""
            self.envs.close()

        def get_images(self) -> Sequence[NDArray[np.uint8] | None]:
            """The current frames, enlarged."""
            frames = self.envs.render()
            return [None] * self.num_envs if frames is None else list(frames)

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            """An attribute of the vector environment, once for each environment asked for."""
            return [getattr(self.envs, attr_name) for _ in self._get_indices(indices)]

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            """Refused: the environments are one object."""
            raise InvalidArgument(f"set_attr({attr_name!r}) cannot act on one environment; make the vector anew.")

        def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> Any:
            """Refused: the environments are one object."""
            raise InvalidArgument(f"env_method({method_name!r}) cannot act on one environment; use .envs.")

        def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
            """Never: there are no single environments to wrap."""
            return [False for _ in self._get_indices(indices)]

        def _get_indices(self, indices: Any) -> Iterable[int]:
            if indices is None:
                return range(self.num_envs)
            return [indices] if isinstance(indices, int) else list(indices)

        def _potential(self, infos: dict[str, Any]) -> NDArray[np.float64]:
            if not self._shaping:
                return np.zeros(self.num_envs)
            return np.asarray(infos["success_probability"], dtype=np.float64)

    return SB3VecEnv


def _by_env(infos: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """Gymnasium's infos of a vector as one dict of plain values for each environment."""
    values = {key: value for key, value in infos.items() if not key.startswith("_")}
    return [{key: value[i].item() for key, value in values.items()} for i in range(count)]
