"""One policy through whole episodes: a batch of them in a learned environment, one at a time in ground truth.

Shape legend: N episodes played at once, H actions of a chunk, A action dims, T frames of an episode, H W C image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import PolicyError
from hma_gym.policies.loading import EpisodeSeed, PolicyFactory
from hma_gym.policies.protocol import Policy, WatchingPolicy

Watch = Callable[[], AbstractContextManager[None]]
"""Put around each call of a policy, so that somebody else may see how long it takes."""


@dataclass(frozen=True)
class Played:
    """One finished episode.

    Attributes:
        episode: its start and seed.
        frames_THWC: uint8, the start's frame first.
        success_end: the verdict at the last frame.
        success_ever: whether any frame was judged a success.
        probability: the judge's at the last frame; 1.0 or 0.0 in ground truth.
        seconds: wall time that it took, its policy included; its share, if played in a batch.
    """

    episode: EpisodeSeed
    frames_THWC: NDArray[np.uint8]
    success_end: bool
    success_ever: bool
    probability: float
    seconds: float


class GuardedPolicy:
    """A policy whose every mistake is a :class:`~hma_gym.errors.PolicyError` that names it.

    Args:
        label: the policy's name.
        make: its factory.
        episodes: what it is about to play.
        action_shape: (A,).
        watch: see :data:`Watch`.
    """

    def __init__(
        self,
        label: str,
        make: PolicyFactory,
        episodes: Sequence[EpisodeSeed],
        action_shape: tuple[int, ...],
        watch: Watch,
    ) -> None:
        self._label = label
        self._count = len(episodes)
        self._action_shape = action_shape
        self._watch = watch
        with self._calling("its factory"):
            self._policy: Policy = make(episodes)
            self._watches = isinstance(self._policy, WatchingPolicy)
        if not isinstance(self._policy, Policy):
            raise PolicyError(
                f"policy {label!r}: the factory must return an object with reset(mask) and act(observation), got "
                f"{type(self._policy).__name__}; see hma_gym.policies.protocol."
            )
        with self._calling("reset"):
            self._policy.reset(np.ones(self._count, dtype=np.bool_))

    def act(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """(N, H, A), checked."""
        with self._calling("act"):
            actions = np.asarray(self._policy.act(observation))
        if actions.ndim != 3 or actions.shape[0] != self._count or actions.shape[2:] != self._action_shape:
            raise PolicyError(
                f"policy {self._label!r}: act() must return actions of shape (N, H, A) = ({self._count}, H, "
                f"{self._action_shape[0]}), got {actions.shape}; a single action a step is H = 1."
            )
        if not actions.shape[1] or actions.dtype.kind != "f":
            raise PolicyError(
                f"policy {self._label!r}: act() must return at least one action of floats, got {actions.dtype} of "
                f"shape {actions.shape}."
            )
        if not np.isfinite(actions).all():
            row, step, dim = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
            raise PolicyError(
                f"policy {self._label!r}: act() must return finite actions, got {actions[row, step, dim]} in dim {dim} "
                f"of action {step} in row {row}."
            )
        return actions.astype(np.float32)

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Show an observation between chunks to a policy that watches."""
        if self._watches:
            with self._calling("observe"):
                self._policy.observe(observation)  # type: ignore[attr-defined]

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        try:
            with self._watch():
                yield
        # Foreign code: whatever it raises is about this policy, and the evaluation of the others goes on.
        except Exception as error:
            raise PolicyError(f"policy {self._label!r}: {what} raised {type(error).__name__}: {error}") from error


def play_learned(
    envs: HMAVectorEnv, label: str, make: PolicyFactory, episodes: Sequence[EpisodeSeed], steps: int, watch: Watch
) -> list[Played]:
    """Play N = ``envs.num_envs`` episodes at once.

    Raises:
        PolicyError: the policy made a mistake.
    """
    shape = envs.single_action_space.shape or ()
    begun = time.perf_counter()
    starts = np.array([episode.start for episode in episodes])
    observation, info = envs.reset(seed=[episode.seed for episode in episodes], options={"start": starts})
    policy = GuardedPolicy(label, make, episodes, shape, watch)
    frames = [observation["pixels"][:, None]]
    ever_N = np.array(info["is_success"], dtype=np.bool_)
    done = 0
    while done < steps:
        actions_NHA = policy.act(observation)[:, : steps - done]
        chunk = envs.step_chunk(actions_NHA, decode="all")
        count = actions_NHA.shape[1]
        for step in range(count - 1):
            policy.observe({key: value[:, step] for key, value in chunk.path.items()})
        observation, info = chunk.observations, chunk.infos
        frames.append(np.array(chunk.path["pixels"]))
        ever_N |= np.asarray(chunk.rewards) > 0
        done += count
    seconds = (time.perf_counter() - begun) / len(episodes)
    video_NTHWC = np.concatenate(frames, axis=1)
    return [
        Played(
            episode,
            video_NTHWC[n],
            bool(info["is_success"][n]),
            bool(ever_N[n]),
            float(info["success_probability"][n]),
            seconds,
        )
        for n, episode in enumerate(episodes)
    ]


def play_truth(
    env: gymnasium.Env[Any, Any], label: str, make: PolicyFactory, episode: EpisodeSeed, steps: int, watch: Watch
) -> Played:
    """Play one episode in ground truth.

    Raises:
        PolicyError: the policy made a mistake.
    """
    begun = time.perf_counter()
    observation, info = env.reset(seed=episode.seed, options={"start": episode.start})
    policy = GuardedPolicy(label, make, [episode], env.action_space.shape or (), watch)
    frames, ever, done = [observation["pixels"]], bool(info["is_success"]), 0
    while done < steps:
        actions_HA = policy.act(_batched(observation))[0, : steps - done]
        for step, action in enumerate(actions_HA):
            observation, _, _, _, info = env.step(action)
            frames.append(observation["pixels"])
            ever |= bool(info["is_success"])
            if step < len(actions_HA) - 1:
                policy.observe(_batched(observation))
        done += len(actions_HA)
    return Played(
        episode,
        np.stack(frames),
        bool(info["is_success"]),
        ever,
        float(info["success_probability"]),
        time.perf_counter() - begun,
    )


def _batched(observation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: np.asarray(value)[None] for key, value in observation.items()}
