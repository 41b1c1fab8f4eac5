"""A learned environment as robomimic's ``EnvBase``: robomimic's own rollout code runs its policies in it.

>>> learned = gymnasium.make("HMA-Lift-v0", obs_type="pixels_agent_pos")  # doctest: +SKIP
>>> env = make_robomimic_env(learned)  # doctest: +SKIP
>>> logs, _ = rollout_with_stats(policy, {"lift": env}, horizon=60, num_episodes=10)  # doctest: +SKIP

Shape legend: H W image, A action dims, P agent_pos dims.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from hma_gym.data.episodes import EEF_POS, EEF_QUAT, GRIPPER
from hma_gym.errors import EnvironmentState, InvalidArgument
from hma_gym.robomimic_compat import import_robomimic

_PURPOSE = "environments of robomimic"
_IMAGE_KEY = "agentview_image"


def make_robomimic_env(env: gymnasium.Env[Any, Any], *, seed: int = 0, starts: Sequence[int] | None = None) -> Any:
    """An environment of this package as robomimic's ``EnvBase``.

    Observations have robomimic's names: ``agentview_image``, ``agent_pos``, ``robot0_eef_pos``, ``robot0_eef_quat`` and
    ``robot0_gripper_qpos``; images float (3, H, W) in [0, 1], as robomimic's networks take them.

    Args:
        env: made with ``obs_type="pixels_agent_pos"``: a learned one, or ground truth for the same in MuJoCo.
        seed: of the first episode; episode k has seed + k.
        starts: of the episodes, one after the other and then from the first again; None draws them.

    Raises:
        InvalidArgument: the environment shows no agent_pos.
        MissingExtra: robomimic is not installed.
    """
    if not isinstance(env.observation_space, gymnasium.spaces.Dict) or "agent_pos" not in env.observation_space.spaces:
        raise InvalidArgument(
            "env must show pixels and agent_pos; make it with gymnasium.make(..., obs_type='pixels_agent_pos')."
        )
    return _env_class()(env.spec.id if env.spec is not None else "HMA", env=env, seed=seed, starts=starts)


@functools.cache
def _env_class() -> type:
    """The class, made when first asked for: its base comes from an optional package."""
    base = import_robomimic("robomimic.envs.env_base", purpose=_PURPOSE).EnvBase
    types = import_robomimic("robomimic.envs.env_base", purpose=_PURPOSE).EnvType
    process = import_robomimic("robomimic.utils.obs_utils", purpose=_PURPOSE).process_frame

    class RobomimicEnv(base):  # type: ignore[misc, valid-type]
        """See :func:`make_robomimic_env`."""

        def __init__(
            self,
            env_name: str,
            render: bool = False,
            render_offscreen: bool = False,
            use_image_obs: bool = True,
            postprocess_visual_obs: bool = True,
            *,
            env: gymnasium.Env[Any, Any],
            seed: int = 0,
            starts: Sequence[int] | None = None,
        ) -> None:
            if render or not use_image_obs:
                raise InvalidArgument(
                    "a learned environment has no window and sees images only; use render=False and use_image_obs=True."
                )
            self._name = env_name
            self.env = env
            self._postprocess = postprocess_visual_obs
            self._episodes = _episodes(seed, starts)
            self._last: tuple[dict[str, Any], float, bool, dict[str, Any]] | None = None

        def step(self, action: NDArray[np.floating[Any]]) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
            """Observation, reward, done, info after one action (A,)."""
            observation, reward, terminated, truncated, info = self.env.step(np.asarray(action, dtype=np.float32))
            self._last = (self._named(observation), float(reward), bool(terminated or truncated), info)
            return self._last

        def reset(self) -> dict[str, Any]:
            """The next episode's first observation."""
            seed, options = next(self._episodes)
            observation, info = self.env.reset(seed=seed, options=options)
            self._last = (self._named(observation), 0.0, False, info)
            return self._last[0]

        def reset_to(self, state: dict[str, Any]) -> dict[str, Any]:
            """Return to what :meth:`get_state` gave."""
            self.env.unwrapped.set_state(state["states"])  # type: ignore[attr-defined]
            self._last = (state["observation"], 0.0, False, state["info"])
            return self._last[0]

        def get_state(self) -> dict[str, Any]:
            """Everything that the future depends on, for :meth:`reset_to`."""
            observation, _, _, info = self._current()
            return {
                "states": self.env.unwrapped.get_state(),  # type: ignore[attr-defined]
                "observation": observation,
                "info": info,
            }

        def render(
            self,
            mode: str = "human",
            height: int | None = None,
            width: int | None = None,
            camera_name: str | None = None,
        ) -> NDArray[np.uint8]:
            """The frame, at the environment's ``render_size``; ``mode`` must be ``rgb_array``."""
            if mode != "rgb_array":
                raise InvalidArgument(f"mode must be 'rgb_array', got {mode!r}; there is no window.")
            return np.asarray(self.env.render())

        def get_observation(self) -> dict[str, Any]:
            """The present observation."""
            return self._current()[0]

        def get_reward(self) -> float:
            """The last step's reward."""
            return self._current()[1]

        def get_goal(self) -> dict[str, Any]:
            """These tasks have no goal observations."""
            raise InvalidArgument("this environment has no goals; use a policy that is not conditioned on one.")

        def set_goal(self, **kwargs: Any) -> None:
            """These tasks have no goal observations."""
            raise InvalidArgument("this environment has no goals; use a policy that is not conditioned on one.")

        def is_done(self) -> bool:
            """Whether the episode is over."""
            return self._current()[2]

        def is_success(self) -> dict[str, bool]:
            """``{"task": verdict}``: the judge's in a learned environment, the simulator's in ground truth."""
            return {"task": bool(self._current()[3]["is_success"])}

        @property
        def action_dimension(self) -> int:
            """A."""
            return int((self.env.action_space.shape or (0,))[0])

        @property
        def name(self) -> str:
            """The gymnasium id."""
            return self._name

        @property
        def type(self) -> int:
            """robomimic's type of Gymnasium environments."""
            return int(types.GYM_TYPE)

        def serialize(self) -> dict[str, Any]:
            """robomimic's description of the environment."""
            return {"env_name": self.name, "type": self.type, "env_kwargs": {}}

        @classmethod
        def create_for_data_processing(cls, *args: Any, **kwargs: Any) -> Any:
            """Not for data: a learned environment cannot render recorded MuJoCo states."""
            raise InvalidArgument("a learned environment cannot process datasets; use hma-gym data import.")

        @property
        def rollout_exceptions(self) -> tuple[Any, ...]:
            """No exception may be ignored in a rollout."""
            return ()

        def _current(self) -> tuple[dict[str, Any], float, bool, dict[str, Any]]:
            if self._last is None:
                raise EnvironmentState("call reset() before using the environment.")
            return self._last

        def _named(self, observation: dict[str, Any]) -> dict[str, Any]:
            pose = observation["agent_pos"]
            quaternion = -pose[3:7] if pose[6] < 0 else pose[3:7]  # robosuite's sign, not agent_pos's
            image = observation["pixels"]
            return {
                _IMAGE_KEY: process(image, channel_dim=3, scale=255.0) if self._postprocess else image,
                "agent_pos": pose,
                EEF_POS: pose[:3],
                EEF_QUAT: quaternion,
                GRIPPER: pose[7:9],
            }

    return RobomimicEnv


def _episodes(seed: int, starts: Sequence[int] | None) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Seeds and reset options of one episode after the other."""
    for k in itertools.count():
        yield seed + k, None if starts is None else {"start": int(starts[k % len(starts)])}
