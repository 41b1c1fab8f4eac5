"""The episodes of an evaluation on disk: one small file for each finished one, and its video.

Layout::

    RUN/run.json                                    what decides the results: policies, environments
    RUN/episodes/<env>/<policy>/start_0003.json     one episode, written atomically once it is over
    RUN/episodes/<env>/<policy>/start_0003.mp4      its video, written before

So a kill at any moment loses the running episodes only, and the same call goes on. An environment's folder depends on
nothing outside it and may be copied into another run whose environment is the same.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hma_gym.data.robomimic_hdf5 import storage_errors, write_atomically
from hma_gym.errors import InvalidArgument, ResumeError
from hma_gym.evaluation.rollouts import Played
from hma_gym.judges.videos import enlarge, write_video

_RUN_FILE = "run.json"
_VIDEO_SIDE = 128
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class EpisodeResult:
    """One finished episode.

    Attributes:
        policy: label.
        env: gymnasium id.
        start: index into the start bank.
        seed: of the environment and the policy.
        steps: length.
        success_end, success_ever, probability, seconds: see :class:`hma_gym.evaluation.rollouts.Played`.
        workers: how many such processes played at the same time.
    """

    policy: str
    env: str
    start: int
    seed: int
    steps: int
    success_end: bool
    success_ever: bool
    probability: float
    seconds: float
    workers: int


def check_label(label: str) -> None:
    """Raise :class:`InvalidArgument` unless the label can name a folder."""
    if not _LABEL.fullmatch(label):
        raise InvalidArgument(
            f"policy label {label!r} must be letters, digits and . _ + -, for it names a folder; "
            "give one with LABEL=POLICY."
        )


class EpisodeStore:
    """Reads and writes a run's folder; holds no open file, so that worker processes may each have one.

    Args:
        run: the folder.
    """

    def __init__(self, run: Path) -> None:
        self.run = run

    def video(self, env: str, policy: str, start: int) -> Path:
        """Where an episode's video is."""
        return self.run / "episodes" / env / policy / f"start_{start:04d}.mp4"

    def has(self, env: str, policy: str, start: int) -> bool:
        """Whether the episode is finished."""
        return self.video(env, policy, start).with_suffix(".json").exists()

    def write(self, played: Played, result: EpisodeResult, fps: float) -> None:
        """Put an episode on disk, its video first.

        Raises:
            StorageError: the folder cannot be written or the disk is full.
        """
        video = write_video(
            self.video(result.env, result.policy, result.start), enlarge(played.frames_THWC, _VIDEO_SIDE), fps
        )
        write_atomically(video.with_suffix(".json"), (json.dumps(dataclasses.asdict(result)) + "\n").encode())

    def read(self, env: str, policy: str, start: int) -> EpisodeResult:
        """A finished episode.

        Raises:
            ResumeError: its file is damaged.
        """
        path = self.video(env, policy, start).with_suffix(".json")
        try:
            return EpisodeResult(**json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError, TypeError) as error:
            raise ResumeError(
                f"{str(path)!r} cannot be read ({error}); delete it to play this episode again."
            ) from error

    def agree_on(self, policies: Mapping[str, Any], environments: Mapping[str, Any]) -> None:
        """Note what the run consists of; a run that is resumed must agree, and may have more of both.

        Raises:
            ResumeError: a policy or an environment of the same name was another one.
            StorageError: the folder cannot be written.
        """
        path = self.run / _RUN_FILE
        before: dict[str, dict[str, Any]] = {"policies": {}, "environments": {}}
        if path.exists():
            try:
                before = json.loads(path.read_text())
            except json.JSONDecodeError as error:
                raise ResumeError(f"{str(path)!r} cannot be read ({error}); choose another folder.") from error
        now = {"policies": dict(policies), "environments": dict(environments)}
        for part, entries in now.items():
            for name, entry in entries.items():
                then = before[part].get(name, entry)
                if then != entry:
                    raise ResumeError(
                        f"{str(self.run)!r} was evaluated with {name!r} = {then}, and now it is {entry}; choose "
                        "another folder for the results (--out), or another label."
                    )
        merged = {part: {**before[part], **entries} for part, entries in now.items()}
        with storage_errors(self.run):
            self.run.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(merged, indent=1) + "\n").encode())
