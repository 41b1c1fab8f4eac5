"""Caches for training: an image dataset once turned into tokens, or into JPEGs small enough to copy to another machine.

A token cache is one HDF5 file of flat arrays over all frames F of N episodes, so that a training window is a slice:
``tokens`` (F, S, C) float16 or (F, S) int32, ``actions`` (F, A), ``agent_pos`` (F, P), ``targets`` (F, X),
``starts`` (N + 1), and ``name``, ``split``, ``category``, ``success`` (N). Row f's action leads to row f + 1 of its
episode. Of stills (see :data:`hma_gym.data.episodes.STILL`) each row is an episode of its own, ``demo_3[12]`` by name,
whose ``success`` is that of its state.

Shape legend: F frames of all episodes, N episodes, T frames of one, S tokens of a frame, C channels, A action dims,
P agent_pos dims, X privileged target dims.
"""

from __future__ import annotations

import dataclasses
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from hma_gym.data.episodes import EEF_POS, Episode, success_of_stills
from hma_gym.data.object_pose import OBJECT_KEY, POSITION, QUATERNION, object_poses, turned_alike
from hma_gym.data.robomimic_hdf5 import Dataset, Demo, storage_errors
from hma_gym.domains import Domain
from hma_gym.errors import DatasetError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class TokenCache:
    """A token cache in memory. Attributes are the arrays of the module's docstring; ``split`` holds indices into
    :data:`SPLITS`, and ``category`` strings ("" where the data has none); ``name_N`` are the episodes' names in their
    dataset and ``tokenizer`` is a digest of the tokenizer's weights (both empty in caches of the first version)."""

    tokens: NDArray[Any]
    actions_FA: NDArray[np.float32]
    agent_pos_FP: NDArray[np.float32]
    targets_FX: NDArray[np.float32]
    starts_N1: NDArray[np.int64]
    split_N: NDArray[np.int64]
    success_N: NDArray[np.bool_]
    category_N: tuple[str, ...]
    name_N: tuple[str, ...] = ()
    domain: str = ""
    tokenizer: str = ""

    def __len__(self) -> int:
        return len(self.starts_N1) - 1

    def episodes(self, split: str) -> NDArray[np.int64]:
        """Positions of the episodes of a split."""
        return np.flatnonzero(self.split_N == SPLITS.index(split))

    def moving(self, split: str) -> NDArray[np.int64]:
        """Positions of the episodes of a split that go on after their first row, which stills do not."""
        episodes = self.episodes(split)
        return episodes[np.diff(self.starts_N1)[episodes] > 1]

    def frames(self, split: str) -> NDArray[np.int64]:
        """All frames of the episodes of a split, in order."""
        rows = [self.rows(int(n)) for n in self.episodes(split)]
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(r.start, r.stop) for r in rows)])

    def rows(self, episode: int) -> slice:
        """The frames of one episode."""
        return slice(int(self.starts_N1[episode]), int(self.starts_N1[episode + 1]))

    def has_object_pose(self) -> bool:
        """Whether the targets are an object's pose (see :class:`hma_gym.domains.Domain`)."""
        return self.targets_FX.shape[1] == 9

    def turned_alike(self, turns: int) -> TokenCache:
        """The same with the objects' poses of each episode described alike where they look so, see
        :func:`hma_gym.data.object_pose.turned_alike`; itself where the targets are no poses or ``turns`` is 0."""
        if not turns or not self.has_object_pose():
            return self
        targets = [turned_alike(self.targets_FX[self.rows(n)], turns) for n in range(len(self))]
        return dataclasses.replace(self, targets_FX=np.concatenate(targets))

    def without_tokens(self) -> TokenCache:
        """Actions, agent_pos and targets alone; tokens are (F, 0)."""
        return dataclasses.replace(self, tokens=np.zeros((len(self.tokens), 0), np.float16), tokenizer="")

    def make_domain(
        self,
        name: str,
        *,
        stride: int,
        control_hz: float,
        image_size: tuple[int, int],
        object_turns: int = 0,
        camera_projection: Sequence[float] = (),
    ) -> Domain:
        """A domain with the statistics of this cache's training episodes.

        ``object_turns`` and ``camera_projection`` count where the targets are an object's pose. Action bounds are -1
        and 1, or the extremes in the data where these lie outside. Changes of agent_pos are over ``stride`` steps.
        Actions of episodes of one row, which lead nowhere, do not count.

        Raises:
            DatasetError: no training episode is longer than ``stride``.
        """
        turns = object_turns if self.has_object_pose() else 0
        episodes = [self.rows(int(n)) for n in self.episodes("train")]
        changes = [self.agent_pos_FP[r][stride:] - self.agent_pos_FP[r][:-stride] for r in episodes]
        if not sum(map(len, changes)):
            raise DatasetError(
                f"domain {name!r}: no training episode is longer than a stride of {stride} steps (of {len(episodes)}); "
                "record longer or more episodes."
            )
        rows = self.frames("train")
        actions = np.concatenate([self.actions_FA[self.rows(int(n))] for n in self.moving("train")])
        return Domain.from_statistics(
            name,
            actions_FA=actions,
            agent_pos_FP=self.agent_pos_FP[rows] if self.agent_pos_FP.shape[1] else None,
            deltas_FP=np.concatenate(changes) if self.agent_pos_FP.shape[1] else None,
            targets_FX=self.targets_FX[rows] if self.targets_FX.shape[1] else None,
            action_low=tuple(np.minimum(actions.min(axis=0), -1.0).tolist()),
            action_high=tuple(np.maximum(actions.max(axis=0), 1.0).tolist()),
            object_turns=turns,
            camera_projection=tuple(camera_projection) if turns else (),
            stride=stride,
            control_hz=control_hz,
            image_size=image_size,
        )

    def change_scale(self, stride: int = 1) -> float:
        """Root mean square of a soft token's change in ``stride`` steps, in the first 200 training episodes that go on
        after their first row."""
        total, count = 0.0, 0
        for n in self.moving("train")[:200]:
            tokens = self.tokens[self.rows(n)].astype(np.float32)
            change = tokens[stride:] - tokens[:-stride]
            total, count = total + float(np.square(change).sum()), count + change.size
        return float(np.sqrt(total / max(count, 1)))

    def save(self, path: str | Path) -> Path:
        """Write atomically; :func:`load_token_cache` reads it. Raises :class:`StorageError`."""
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(temporary, "w") as file:
                file.attrs["hma_gym_token_cache"] = 1
                file.attrs["domain"], file.attrs["tokenizer"] = self.domain, self.tokenizer
                file["tokens"] = self.tokens
                file["actions"], file["agent_pos"] = self.actions_FA, self.agent_pos_FP
                file["targets"], file["starts"] = self.targets_FX, self.starts_N1
                file["split"], file["success"] = self.split_N, self.success_N
                for key, names in (("category", self.category_N), ("name", self.name_N)):
                    file.create_dataset(key, data=list(names), dtype=h5py.string_dtype())
            os.replace(temporary, path)
        return path


def load_token_cache(path: str | Path) -> TokenCache:
    """Read a token cache into memory. Raises :class:`DatasetError` where the file is not one, or is damaged."""
    path = Path(path)
    try:
        with h5py.File(path, "r") as file:
            if "hma_gym_token_cache" not in file.attrs:
                raise DatasetError(f"{str(path)!r} is no token cache; write one with: hma-gym train dynamics.")
            return TokenCache(
                tokens=file["tokens"][()],
                actions_FA=file["actions"][()],
                agent_pos_FP=file["agent_pos"][()],
                targets_FX=file["targets"][()],
                starts_N1=file["starts"][()],
                split_N=file["split"][()],
                success_N=file["success"][()],
                category_N=tuple(file["category"].asstr()[()]),
                name_N=tuple(file["name"].asstr()[()]) if "name" in file else (),
                domain=str(file.attrs["domain"]),
                tokenizer=str(file.attrs.get("tokenizer", "")),
            )
    except (OSError, KeyError) as error:
        raise DatasetError(
            f"{str(path)!r} must be a readable token cache, got: {error}; delete it to make it anew."
        ) from error


def join_caches(caches: Sequence[TokenCache]) -> TokenCache:
    """The episodes of several caches of one domain, in order.

    Raises:
        DatasetError: the caches differ in their dims or tokenizers.
    """
    first = caches[0]
    if len(caches) == 1:
        return first
    for name in ("tokens", "actions_FA", "agent_pos_FP", "targets_FX"):
        shapes = [getattr(cache, name).shape[1:] for cache in caches]
        if len(set(shapes)) > 1 or len({cache.tokenizer for cache in caches}) > 1:
            raise DatasetError(
                f"the files of domain {first.domain!r} must be alike, got {name.split('_')[0]} of shapes {shapes} a "
                "frame (or tokens of different tokenizers); name them as different domains."
            )
    offsets = np.cumsum([0, *(cache.starts_N1[-1] for cache in caches)])
    return TokenCache(
        tokens=np.concatenate([cache.tokens for cache in caches]),
        actions_FA=np.concatenate([cache.actions_FA for cache in caches]),
        agent_pos_FP=np.concatenate([cache.agent_pos_FP for cache in caches]),
        targets_FX=np.concatenate([cache.targets_FX for cache in caches]),
        starts_N1=np.concatenate(
            [[0], *(cache.starts_N1[1:] + offset for cache, offset in zip(caches, offsets[:-1], strict=True))]
        ),
        split_N=np.concatenate([cache.split_N for cache in caches]),
        success_N=np.concatenate([cache.success_N for cache in caches]),
        category_N=tuple(category for cache in caches for category in cache.category_N),
        name_N=tuple(f"{i}/{name}" for i, cache in enumerate(caches) for name in cache.name_N),
        domain=first.domain,
        tokenizer=first.tokenizer,
    )


def targets_of(episode: Episode) -> NDArray[np.float32]:
    """The privileged targets of an episode, (T, X): the object's pose (9) where the data has it and ``agent_pos`` is a
    hand's, its position (3) where only that is known, else X = 0."""
    if OBJECT_KEY not in episode.obs:
        return np.zeros((len(episode), 0), np.float32)
    thing = np.asarray(episode.obs[OBJECT_KEY])
    hand = episode.obs.get(EEF_POS)
    if thing.shape[1] >= QUATERNION.stop and hand is not None and episode.agent_pos_TP.shape[1] >= 7:
        is_rotation = np.allclose(np.linalg.norm(thing[:, QUATERNION], axis=1), 1.0, atol=1e-2)
        if is_rotation and np.allclose(episode.agent_pos_TP[:, POSITION], hand, atol=1e-4):
            return object_poses(thing)
    return np.ascontiguousarray(thing[:, POSITION], dtype=np.float32)


def episode_names(dataset: Dataset) -> tuple[str, ...]:
    """The names of a dataset's episodes in its token cache, in order."""
    return tuple(name for demo in dataset.demos for name in _names(demo))


def demo_of(name: str) -> str:
    """The demo that an episode of a token cache is, or is a row of."""
    return name.partition("[")[0]


def _names(demo: Demo) -> tuple[str, ...]:
    return tuple(f"{demo.name}[{row}]" for row in range(demo.length)) if demo.still else (demo.name,)


def build_token_cache(
    dataset: Dataset,
    encode: Callable[[Tensor], Tensor] | None,
    *,
    domain: str = "",
    tokenizer: str = "",
    previous: TokenCache | None = None,
    progress: bool = True,
) -> TokenCache:
    """Encode all frames of a dataset; stills become episodes of one row.

    Args:
        encode: a tokenizer's ``encode``: (T, H, W, 3) uint8 to tokens. None reads no image: tokens are (F, 0).
        domain, tokenizer: the domain's name and the tokenizer's digest, kept with the cache.
        previous: a cache of some episodes of the same dataset; what it knows by name is not encoded again. (While a
            dataset is recorded by several workers, new episodes come in between old ones.)
        progress: show a progress bar.
    """
    known = {} if previous is None else {name: n for n, name in enumerate(previous.name_N)}
    parts: dict[str, list[NDArray[Any]]] = {key: [] for key in ("tokens", "actions", "agent_pos", "targets")}
    members = {name: set(dataset.split(name)) if name in dataset.masks else set() for name in SPLITS}
    lengths: list[int] = []
    success: list[bool] = []
    for n, demo in enumerate(
        tqdm(
            dataset.demos,
            desc="reading" if encode is None else "encoding frames",
            unit="episode",
            disable=not progress,
        )
    ):
        names = _names(demo)
        if previous is not None and names[0] in known:
            first, last = known[names[0]], known[names[-1]]
            rows = slice(previous.rows(first).start, previous.rows(last).stop)
            found = (previous.tokens, previous.actions_FA, previous.agent_pos_FP, previous.targets_FX)
            arrays = tuple(array[rows] for array in found)
            done = previous.success_N[first : last + 1].tolist()
        else:
            episode = dataset.without_images(n) if encode is None else dataset[n]
            tokens = np.zeros((len(episode), 0), np.float16)
            if encode is not None:
                tokens = encode(torch.from_numpy(np.ascontiguousarray(episode.images_THWC))).cpu().numpy()
                tokens = tokens.astype(np.float16 if tokens.dtype.kind == "f" else np.int32)
            arrays = (tokens, episode.actions_TA, episode.agent_pos_TP, targets_of(episode))
            done = success_of_stills(episode.rewards_T).tolist()
        lengths += [1] * demo.length if demo.still else [demo.length]
        success += done if demo.still else [bool(demo.attrs.get("success"))]
        for (key, part), array in zip(parts.items(), arrays, strict=True):
            if part and part[0].shape[1:] != array.shape[1:]:
                raise DatasetError(
                    f"episodes must be alike: {key} of {demo.name!r} has {array.shape[1:]} numbers a frame, of those "
                    f"before {part[0].shape[1:]}; record them alike, or delete a token cache of an earlier version."
                )
            part.append(array)
    each = [len(_names(demo)) for demo in dataset.demos]
    split = [next((i for i, s in enumerate(SPLITS) if n in members[s]), 0) for n in range(len(each))]
    return TokenCache(
        tokens=np.concatenate(parts["tokens"]),
        actions_FA=np.concatenate(parts["actions"]),
        agent_pos_FP=np.concatenate(parts["agent_pos"]),
        targets_FX=np.concatenate(parts["targets"]),
        starts_N1=np.cumsum([0, *lengths]),
        split_N=np.repeat(split, each),
        success_N=np.array(success),
        category_N=tuple(str(demo.attrs.get("category") or "") for demo in dataset.demos for _ in _names(demo)),
        name_N=episode_names(dataset),
        domain=domain,
        tokenizer=tokenizer,
    )


def write_frame_pack(path: str | Path, frames: Sequence[NDArray[np.uint8]], quality: int = 95) -> Path:
    """Pack the frames of episodes as JPEGs into one HDF5 file, to train a tokenizer on another machine.

    Args:
        frames: one (T, H, W, 3) uint8 array an episode.
        quality: JPEG quality, 1 to 100.
    """
    from PIL import Image

    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    blobs: list[NDArray[np.uint8]] = []
    for frame in (frame for episode in frames for frame in episode):
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format="JPEG", quality=quality, subsampling=0)
        blobs.append(np.frombuffer(buffer.getvalue(), np.uint8))
    with storage_errors(path):
        with h5py.File(temporary, "w") as file:
            file.attrs["hma_gym_frame_pack"] = 1
            file["bytes"] = np.concatenate(blobs)
            file["ends"] = np.cumsum([len(blob) for blob in blobs])
            file["starts"] = np.cumsum([0, *(len(episode) for episode in frames)])
        os.replace(temporary, path)
    return path


def read_frame_pack(path: str | Path) -> list[NDArray[np.uint8]]:
    """The frames that :func:`write_frame_pack` packed, one (T, H, W, 3) uint8 array an episode."""
    from PIL import Image

    try:
        with h5py.File(path, "r") as file:
            if "hma_gym_frame_pack" not in file.attrs:
                raise DatasetError(f"{str(path)!r} is no frame pack; write one with write_frame_pack.")
            data, ends, starts = file["bytes"][()], file["ends"][()], file["starts"][()]
    except (OSError, KeyError) as error:
        raise DatasetError(f"{str(path)!r} must be a readable frame pack, got: {error}.") from error
    begins = np.concatenate(([0], ends[:-1]))
    frames = [np.asarray(Image.open(io.BytesIO(data[a:b].tobytes()))) for a, b in zip(begins, ends, strict=True)]
    return [np.stack(frames[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]
