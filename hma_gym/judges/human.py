"""The human judge: rollouts become short videos in a queue, people label them, verdicts are read back later.

For whoever writes the queue (``hma-gym evaluate --judge human``, or a few lines of your own)::

    from hma_gym.judges.human import LabelQueue
    from hma_gym.judges.labels import Machine

    with LabelQueue.create("outputs/eval/labels", overlap=2) as queue:      # or open the one that is there
        for rollout in rollouts:
            queue.add(
                f"{rollout.policy}/{rollout.start}",                         # your own name of it: any unique text
                rollout.frames_THWC,                                         # uint8, T frames, the first one included
                fps=20.0,
                policy=rollout.policy,                                       # hidden from annotators
                machine=Machine("classifier", rollout.probability, rollout.success),  # hidden too; or None
            )

    # hma-gym serve --data outputs        (people label, today or next week)

    with LabelQueue.open("outputs/eval/labels") as queue:
        outcomes = queue.outcomes()                 # {key: Outcome}, also while people are still at it
        agreement = queue.agreement()               # kappas, and the confusion with the machine
        if queue.complete():
            ...

``add`` may be repeated: a key that is already there is left as it is, so that an interrupted evaluation goes on. The
folder holds ``labels.sqlite`` and ``videos/<opaque name>.mp4``; ``hma-gym serve`` finds it anywhere below its data
folder. Several processes may add, label and read at the same time.

A person is no :class:`~hma_gym.judges.protocol.Judge`: verdicts come later, so an environment cannot ask for them.

Shape legend: T frames, H W image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hma_gym.errors import InvalidImage
from hma_gym.judges.agreement import Agreement, majority, measure_agreement
from hma_gym.judges.labels import FILE_NAME, LabelStore, Machine
from hma_gym.judges.videos import enlarge, write_video

VIDEO_SIDE = 384
"""Pixels: at least the shorter side of a queued video."""


@dataclass(frozen=True)
class Outcome:
    """What people say of one rollout.

    Attributes:
        key: the name that it was added under.
        success: the majority's verdict; None while nobody judged it, at a tie, or where nobody is sure.
        probability: share of success among the verdicts that are not ``unsure``; None without any.
        verdicts: by annotator: ``success``, ``failure`` or ``unsure``.
        complete: whether as many people as the queue asks for judged it.
    """

    key: str
    success: bool | None
    probability: float | None
    verdicts: dict[str, str]
    complete: bool


class LabelQueue:
    """Videos that wait for people, and what these said. Close it, or use ``with``.

    Raises:
        StorageError: the folder cannot be read or written, or another program keeps its file locked.
        DatasetError: its file is damaged, not a label store, or of a newer version.
    """

    def __init__(self, folder: Path, store: LabelStore) -> None:
        self.folder = folder
        self.store = store

    @classmethod
    def create(cls, folder: str | Path, *, overlap: int = 1) -> LabelQueue:
        """Make a queue, or open the one that is there.

        Args:
            folder: made if needed.
            overlap: how many people shall judge each video.

        Raises:
            InvalidArgument: overlap below 1, or another one than the existing queue's.
        """
        folder = Path(folder)
        return cls(folder, LabelStore.create(folder / FILE_NAME, overlap=overlap))

    @classmethod
    def open(cls, folder: str | Path) -> LabelQueue:
        """Open an existing queue; :class:`StorageError` if there is none."""
        folder = Path(folder)
        return cls(folder, LabelStore.open(folder / FILE_NAME))

    def __enter__(self) -> LabelQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Calling it twice is harmless."""
        self.store.close()

    def add(
        self,
        key: str,
        frames_THWC: NDArray[np.uint8],
        *,
        fps: float,
        policy: str = "",
        machine: Machine | None = None,
    ) -> bool:
        """Queue a rollout; a key that is there already is left as it is.

        Args:
            key: the caller's own name of it, unique in the queue.
            frames_THWC: uint8.
            fps: frames a second at which it is shown.
            policy, machine: kept for the report, hidden from annotators.

        Returns:
            Whether it was new.

        Raises:
            InvalidImage: frames of another dtype or shape.
        """
        if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[-1] != 3 or not len(frames_THWC):
            raise InvalidImage(
                f"frames must be uint8 of shape (T, H, W, 3) with T of at least 1, got {frames_THWC.dtype} "
                f"{frames_THWC.shape}."
            )
        video = self.video(self.store.item_name(key))
        if not video.exists():  # the video first: what is on the list can always be shown
            temporary = video.with_name(f"{video.stem}.part.mp4")
            write_video(temporary, enlarge(frames_THWC, VIDEO_SIDE), fps)
            temporary.replace(video)
        _, new = self.store.add_item(key, frames=len(frames_THWC), fps=fps, policy=policy, machine=machine)
        return new

    def video(self, item: str) -> Path:
        """Where the video of an item lies."""
        return self.folder / "videos" / f"{item}.mp4"

    def outcomes(self) -> dict[str, Outcome]:
        """What people say so far, by key, in the order in which the rollouts were added."""
        found = {}
        for entry in self.store.entries():
            said = list(entry.verdicts.values())
            sure = [verdict for verdict in said if verdict != "unsure"]
            found[entry.key] = Outcome(
                key=entry.key,
                success=majority(said),
                probability=sure.count("success") / len(sure) if sure else None,
                verdicts=entry.verdicts,
                complete=len(said) >= self.store.overlap,
            )
        return found

    def complete(self) -> bool:
        """Whether every video has as many verdicts as the queue asks for."""
        return all(outcome.complete for outcome in self.outcomes().values())

    def agreement(self) -> Agreement:
        """How far people agree with each other, and with the machine judge."""
        return measure_agreement(self.store.entries())
