"""Episodes on disk in robomimic's HDF5 layout: a crash-safe writer and a lazy reader.

Layout of a file (T rows; robomimic's tools read it as it is)::

    data                     attrs: total (rows), env_args (JSON), hma_gym (JSON: format, seed, collector config ...)
    data/demo_<i>            attrs: num_samples, model_file (MuJoCo XML), policy, mode, competence, category,
                                    success (last row), success_ever, seed, episode (its index); of stills, whose
                                    rows do not follow one another: still, category (no success), episode
        actions (T, A) float32          states (T, S) float64       rewards (T,) float32       dones (T,) int64
        obs/agentview_image (T, H, W, 3) uint8, upright             obs/agent_pos (T, P) float32
        obs/<further robosuite keys>    robot0_eef_pos, robot0_eef_quat, robot0_gripper_qpos, object ...
    mask/train|valid|test    names of demos

``obs[t]`` is before ``actions[t]``; there is no ``next_obs`` group (``obs[t+1]`` is it).

While a file is being recorded, each finished episode is one small file of the same layout,
``FILE.parts/episode_000123.h5``, written under a temporary name and renamed. So a kill at any moment loses
the running episodes only, and :func:`open_dataset` reads ``FILE.parts`` as it reads ``FILE``.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hma_gym.data.episodes import EEF_POS, EEF_QUAT, GRIPPER, STILL, AttrValue, Episode, agent_pos_from_obs
from hma_gym.errors import DatasetError, ResumeError, StorageError

FORMAT_VERSION = 1
SPLITS = ("train", "valid", "test")
IMAGE_KEY = "agentview_image"
FRAMES_PER_CHUNK = 8
"""Frames per compressed HDF5 chunk: a window of a few frames costs one or two chunks, and gzip still pays."""

_SHARD = re.compile(r"episode_(\d{6,})\.h5")


def split_of(index: int) -> str:
    """The split of episode ``index``: of every 12, one is for test, one for validation, ten are for training."""
    return {11: "test", 5: "valid"}.get(index % 12, "train")


def parts_folder(path: str | Path) -> Path:
    """The folder ``FILE.parts`` that holds the finished episodes of ``FILE`` until they are merged."""
    path = Path(path)
    return path.with_name(path.name + ".parts")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while ``path`` is written into a :class:`StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        code = error.errno or 0
        remedy = {
            errno.ENOSPC: "the disk is full: free some space and start the same command again, it resumes",
            errno.EDQUOT: "the disk quota is used up: free some space and start the same command again, it resumes",
            errno.EFBIG: "the file would exceed the size limit: raise it (ulimit -f) or write elsewhere",
            errno.EACCES: "the folder is not writable: choose another path or change its permissions",
            errno.EPERM: "the folder is not writable: choose another path or change its permissions",
            errno.EROFS: "the file system is read-only: choose another path",
            errno.ENOTDIR: "a part of the path is a file, not a folder: choose another path",
            errno.EEXIST: "a part of the path is a file, not a folder: choose another path",
        }.get(code, "check that the folder exists, is writable and has space")
        raise StorageError(f"cannot write {str(path)!r} ({os.strerror(code) if code else error}); {remedy}.") from error


class EpisodeWriter:
    """Records episodes of one dataset, each safe on disk as soon as :meth:`write` returns.

    >>> writer = EpisodeWriter("lift.hdf5", env_args=env_args, info={"seed": 0})  # doctest: +SKIP
    >>> writer.append(episode)  # doctest: +SKIP
    >>> writer.merge()  # doctest: +SKIP

    A writer holds no open file: several processes may each make one for the same path and write different
    indices at the same time.

    Args:
        path: the dataset file to be; its folder is made if needed.
        env_args: robomimic's environment description (``env_name``, ``type``, ``env_kwargs``).
        info: what made the data (seed, collector configuration); kept as JSON in ``data.attrs["hma_gym"]``.

    Raises:
        StorageError: the folder cannot be made or written.
        ResumeError: the file or its parts were made with another ``info``.
    """

    def __init__(self, path: str | Path, *, env_args: Mapping[str, Any], info: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.parts = parts_folder(path)
        self._env_args = json.dumps(env_args, indent=4)
        self._info = json.dumps({"format": FORMAT_VERSION, **info}, sort_keys=True)
        folder = self.path.parent
        with storage_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise StorageError(f"cannot write into {str(folder)!r}; choose another path or change its permissions.")
        self._check_resume()

    def _check_resume(self) -> None:
        recorded = [self.path] if self.path.exists() else list(shard_files(self.parts).values())
        for path in recorded[:1]:
            with _open_h5(path) as file:
                found = str(_group(file, "data", path).attrs.get("hma_gym"))
            if found != self._info:
                raise ResumeError(
                    f"{str(path)!r} was made with other settings ({found}) than now asked for ({self._info}); "
                    "repeat the first command to resume it, delete it, or choose another path."
                )

    def finished(self) -> list[int]:
        """Indices of the episodes that are safe on disk, in the file or in its parts, ascending."""
        return sorted(_episodes(self.parts, self.path))

    def write(self, index: int, episode: Episode) -> None:
        """Put episode ``index`` on disk: whole, or (on any failure) not at all.

        Raises:
            StorageError: the disk is full or not writable.
        """
        # Built in memory first, so that the disk sees one write and a failure has a true errno.
        with h5py.File("shard", "w", driver="core", backing_store=False) as file:
            data = file.create_group("data")
            data.attrs["total"] = len(episode)
            data.attrs["env_args"] = self._env_args
            data.attrs["hma_gym"] = self._info
            demo = data.create_group("demo_0")
            demo.attrs["episode"] = index
            _write_demo(demo, episode)
            file.flush()
            image = file.id.get_file_image()
        with storage_errors(self.parts):
            self.parts.mkdir(exist_ok=True)
        write_atomically(self.parts / f"episode_{index:06d}.h5", image)

    def append(self, episode: Episode) -> int:
        """Write ``episode`` under the next free index (one process only), and return the index."""
        index = (self.finished() or [-1])[-1] + 1
        self.write(index, episode)
        return index

    def merge(self) -> Path:
        """Bring the finished episodes into the file, delete the parts, and return the file's path."""
        merge_shards(self.parts, self.path)
        remove_parts(self.parts)
        return self.path


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` through a temporary file: after any failure the old content (or none) is there.

    Raises:
        StorageError: the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage_errors(path):
        try:
            with open(temporary, "wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def shard_files(parts: str | Path) -> dict[int, Path]:
    """The finished episodes in a ``.parts`` folder, by index; empty if there is no such folder."""
    folder = Path(parts)
    if not folder.is_dir():
        return {}
    found = ((_SHARD.fullmatch(entry.name), entry) for entry in folder.iterdir())
    return dict(sorted((int(match.group(1)), entry) for match, entry in found if match))


def remove_parts(parts: str | Path) -> None:
    """Delete a ``.parts`` folder with its episodes and left-over temporary files."""
    shutil.rmtree(parts, ignore_errors=True)


def merge_shards(parts: str | Path, out: str | Path) -> Path:
    """Make one robomimic file of the episodes in ``parts`` and, if it exists, in ``out``.

    Episodes become ``demo_0, demo_1 ...`` in the order of their indices; splits follow :func:`split_of` of that
    number. Compressed chunks are copied as they are. ``out`` appears whole or not at all; the parts stay.

    Raises:
        DatasetError: there is no finished episode, or one cannot be read.
        StorageError: the disk is full or not writable.
    """
    out = Path(out)
    episodes = _episodes(parts, out)
    if not episodes:
        raise DatasetError(f"no finished episode in {str(parts)!r}; collect at least one before merging.")
    files = {file for file, _ in episodes.values()}
    if files == {out}:
        return out
    needed = sum(file.stat().st_size for file in files)
    with storage_errors(out):
        free = shutil.disk_usage(out.parent).free
    if free < needed:
        raise StorageError(
            f"cannot write {str(out)!r}: merging needs about {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are free; "
            f"free some space and start the same command again, the episodes are kept in {str(parts)!r}."
        )
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with storage_errors(out):
        try:
            with _LatchedFile(temporary) as stream:
                _merge([episodes[index] for index in sorted(episodes)], stream)
                stream.commit()
            os.replace(temporary, out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    for left_over in out.parent.glob(f".{out.name}.*.tmp"):
        left_over.unlink(missing_ok=True)
    return out


def _episodes(parts: str | Path, out: Path) -> dict[int, tuple[Path, str]]:
    """Where each finished episode is: index -> (HDF5 file, group in it)."""
    found: dict[int, tuple[Path, str]] = {}
    if out.exists():
        with _open_h5(out) as file:
            for name, demo in _group(file, "data", out).items():
                found[int(demo.attrs.get("episode", name[5:]))] = (out, f"data/{name}")
    return found | {index: (shard, "data/demo_0") for index, shard in shard_files(parts).items()}


class _LatchedFile(io.RawIOBase):
    """A file that HDF5 writes through, and that keeps the first write error for :meth:`commit` to raise.

    HDF5 cannot close a file whose last writes failed, and aborts the process when it exits. So it is told that
    they succeeded; the caller discards the file.
    """

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb+", buffering=0)
        self._error: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        return self._stream.readinto(buffer) or 0

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            while self._error is None and rest:
                rest = rest[self._stream.write(rest) or 0 :]
        except OSError as error:
            self._error = error
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._stream.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size or 0

    def check(self) -> None:
        """Raise the first write error, if there was one."""
        if self._error is not None:
            raise self._error

    def commit(self) -> None:
        """Bring everything to the disk, or raise the first write error."""
        self.check()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()
        super().close()


def _merge(episodes: Sequence[tuple[Path, str]], stream: _LatchedFile) -> None:
    masks: dict[str, list[str]] = {split: [] for split in SPLITS}
    total = 0
    with h5py.File(stream, "w") as target, _Opened() as opened:
        data = target.create_group("data")
        for number, (path, group) in enumerate(episodes):
            name = f"demo_{number}"
            source = opened(path)
            if number == 0:
                for key in ("env_args", "hma_gym"):
                    data.attrs[key] = _group(source, "data", path).attrs[key]
            source.copy(_group(source, group, path), data, name=name)
            total += int(data[name].attrs["num_samples"])
            masks[split_of(number)].append(name)
            stream.check()
        data.attrs["total"] = total
        for split, names in masks.items():
            target.create_dataset(f"mask/{split}", data=np.array(names, dtype="S"))


class _Opened:
    """Opens HDF5 files, one at a time: asking for the one that is open costs nothing."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: h5py.File | None = None

    def __call__(self, path: Path) -> h5py.File:
        if self._file is None or path != self._path:
            self.close()
            self._path, self._file = path, _open_h5(path)
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _write_demo(group: h5py.Group, episode: Episode) -> None:
    group.attrs["num_samples"] = len(episode)
    for key, value in episode.attrs.items():
        group.attrs[key] = value
    for key, array in (
        ("actions", episode.actions_TA),
        ("states", episode.states_TS),
        ("rewards", episode.rewards_T),
        ("dones", episode.dones_T.astype(np.int64)),
        ("obs/agent_pos", episode.agent_pos_TP),
        *((f"obs/{key}", array) for key, array in episode.obs.items()),
    ):
        group.create_dataset(key, data=array)
    images = episode.images_THWC
    if not images.size:
        return
    chunk = (min(FRAMES_PER_CHUNK, len(images)), *images.shape[1:])
    group.create_dataset(f"obs/{IMAGE_KEY}", data=images, chunks=chunk, compression="gzip", compression_opts=4)


def _open_h5(path: Path) -> h5py.File:
    """Open for reading; everything that can be wrong with the file as such is a DatasetError."""
    if not path.exists():
        raise DatasetError(f"no dataset at {str(path)!r}; check the path, or record one with: hma-gym collect")
    try:
        return h5py.File(path, "r")
    except PermissionError as error:
        raise StorageError(f"cannot read {str(path)!r} (permission denied); change its permissions.") from error
    except OSError as error:
        with open(path, "rb") as stream:
            is_hdf5 = stream.read(8) == b"\x89HDF\r\n\x1a\n"
        if is_hdf5:
            raise DatasetError(
                f"{str(path)!r} is a truncated or damaged HDF5 file ({error}); copy or download it again."
            ) from error
        raise DatasetError(f"{str(path)!r} is not an HDF5 file; give a robomimic dataset (.hdf5).") from error


def _group(file: h5py.File | h5py.Group, key: str, path: Path) -> h5py.Group:
    found = file.get(key)
    if not isinstance(found, h5py.Group):
        raise DatasetError(
            f"{str(path)!r} is HDF5 but not in robomimic's layout: it has no group {key!r}, only {sorted(file)}; "
            "give a robomimic dataset."
        )
    return found


def _array(demo: h5py.Group, key: str, path: Path) -> h5py.Dataset:
    found = demo.get(key)
    if not isinstance(found, h5py.Dataset):
        have = sorted(demo) + [f"obs/{name}" for name in demo.get("obs", ())]
        raise DatasetError(f"{str(path)!r}: {demo.name} has no dataset {key!r}, only {have}.")
    return found


@dataclass(frozen=True)
class Demo:
    """Where one episode lies, and its small facts.

    Attributes:
        name: ``demo_<i>``.
        index: i, which decides the split where a file has no masks.
        file: the HDF5 file, and ``group`` the group in it.
        length: T, rows.
        attrs: the demo's attributes without ``model_file`` (large).
    """

    name: str
    index: int
    file: Path
    group: str
    length: int
    attrs: Mapping[str, AttrValue]

    @property
    def where(self) -> str:
        """File and name, for messages."""
        return f"{str(self.file)!r}, {self.name}"

    @property
    def still(self) -> bool:
        """Whether its rows are stills (:data:`hma_gym.data.episodes.STILL`)."""
        return bool(self.attrs.get(STILL, False))


@dataclass(frozen=True)
class FlatArrays:
    """Everything but the images of all chosen episodes end to end (F rows in all, N episodes).

    ``starts_N1`` holds the first row of each episode, and F at the end, so that episode n is rows
    ``starts_N1[n]:starts_N1[n + 1]``.
    """

    starts_N1: NDArray[np.int64]
    actions_FA: NDArray[np.float32]
    agent_pos_FP: NDArray[np.float32]
    rewards_F: NDArray[np.float32]

    def deltas_FP(self) -> NDArray[np.float32]:
        """One-step changes of agent_pos inside episodes (F - N rows), never across a seam."""
        changes = np.diff(self.agent_pos_FP, axis=0)
        return np.delete(changes, self.starts_N1[1:-1] - 1, axis=0)


class Dataset(Sequence[Episode]):
    """Episodes of a robomimic file or of a ``.parts`` folder; each is read from disk when it is asked for.

    Opening reads the shapes and attributes of every demo and no image. The object holds no open file between
    calls: it may be sent to worker processes.

    Attributes:
        path: the file, or the ``.parts`` folder.
        demos: one :class:`Demo` per episode.
        env_args: robomimic's environment description, {} if the file has none.
        info: what made the data (``hma_gym`` attribute), {} for files of others.
        masks: filter key -> demo names, as in the file (or by :func:`split_of` if it has none).
        image_key: robomimic key of the camera images, None for a low-dim file.
        obs_shapes: observation key -> shape of one row.
    """

    def __init__(self, path: Path, camera: str | None) -> None:
        self.path = path
        if path.is_dir():
            shards = shard_files(path)
            if not shards:
                raise DatasetError(f"{str(path)!r} holds no finished episode yet; wait for the first one.")
            self.demos, masks = _demos_of_shards(shards)
            first_file = self.demos[0].file
        else:
            self.demos, masks = _demos_of_file(path)
            first_file = path
        self.masks = masks or _masks_by_index(self.demos)
        with _open_h5(first_file) as file:
            data = file["data"]
            self.env_args: dict[str, Any] = _json_attr(data, "env_args", path)
            self.info: dict[str, Any] = _json_attr(data, "hma_gym", path)
            first = file[self.demos[0].group]
            self.obs_shapes: dict[str, tuple[int, ...]] = {
                key: tuple(value.shape[1:]) for key, value in first.get("obs", {}).items()
            }
            self.action_dim: int = _array(first, "actions", path).shape[1]
        version = self.info.get("format", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise DatasetError(
                f"{str(path)!r} has format {version}; this version of hma_gym reads up to {FORMAT_VERSION}: upgrade it."
            )
        images = [key for key, shape in self.obs_shapes.items() if len(shape) == 3 and shape[-1] == 3]
        if camera is not None and f"{camera}_image" not in images:
            raise DatasetError(f"{str(path)!r} has no images of camera {camera!r}; it has: {images or 'no images'}.")
        wanted = f"{camera}_image" if camera is not None else IMAGE_KEY
        self.image_key: str | None = wanted if wanted in images else (images[0] if images else None)

    def __len__(self) -> int:
        return len(self.demos)

    def __getitem__(self, index: int) -> Episode:  # type: ignore[override]
        """Read episode ``index`` whole.

        Raises:
            DatasetError: the demo lacks images or proprioception, or its arrays disagree.
        """
        if self.image_key is None:
            raise DatasetError(
                f"{str(self.path)!r} has no camera images (observations: {sorted(self.obs_shapes)}); "
                f"render them from its states with: hma-gym data import {self.path}"
            )
        return self._read(index, self.image_key)

    def without_images(self, index: int) -> Episode:
        """Episode ``index`` but its images (H = W = 0), which need not be there.

        Raises:
            DatasetError: the demo lacks proprioception, or its arrays disagree.
        """
        return self._read(index, None)

    def _read(self, index: int, image_key: str | None) -> Episode:
        demo = self.demos[index]
        length = demo.length
        images = np.zeros((length, 0, 0, 3), dtype=np.uint8)
        with _reading(demo) as group:
            arrays = _arrays(group)
            attrs = _attrs(group, with_model=True)
            if image_key is not None:
                if image_key not in group["obs"]:
                    raise DatasetError(f"{demo.where}: it has no {image_key!r}; other demos have it.")
                images = group["obs"][image_key][()]
        obs = {key[4:]: value for key, value in arrays.items() if key.startswith("obs/")}
        agent_pos = _agent_pos(obs, demo)
        try:
            return Episode(
                images_THWC=images,
                agent_pos_TP=agent_pos,
                actions_TA=arrays["actions"],
                states_TS=arrays.get("states", np.zeros((length, 0))),
                rewards_T=arrays.get("rewards", np.zeros(length)),
                dones_T=arrays.get("dones", np.arange(length) == length - 1),
                obs={key: value for key, value in obs.items() if key != "agent_pos"},
                attrs=attrs,
            )
        except DatasetError as error:
            raise DatasetError(f"{demo.where}: {error}") from error

    def arrays(self, index: int) -> dict[str, NDArray[Any]]:
        """Every array of episode ``index`` but camera images, by key: ``actions``, ``states``, ``obs/object`` ..."""
        with _reading(self.demos[index]) as group:
            return _arrays(group)

    @property
    def lengths_N(self) -> NDArray[np.int64]:
        """Rows of each episode."""
        return np.array([demo.length for demo in self.demos], dtype=np.int64)

    def split(self, name: str) -> list[int]:
        """Positions of the episodes in filter key ``name`` (``train``, ``valid``, ``test``, or another in the file).

        Raises:
            DatasetError: no such filter key.
        """
        if name not in self.masks:
            raise DatasetError(f"{str(self.path)!r} has no filter key {name!r}; it has: {sorted(self.masks)}.")
        members = set(self.masks[name])
        return [position for position, demo in enumerate(self.demos) if demo.name in members]

    def column(self, key: str) -> list[AttrValue | None]:
        """One attribute of every demo (``success``, ``category`` ...), None where a demo has it not."""
        return [demo.attrs.get(key) for demo in self.demos]

    def moving(self, positions: Iterable[int] | None = None) -> list[int]:
        """Those of the given positions (of all by default) whose rows follow one another, which those of stills do
        not."""
        chosen = range(len(self)) if positions is None else positions
        return [position for position in chosen if not self.demos[position].still]

    def action_range(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Least and greatest action, (A,) each, over all rows of all demos."""
        low, high = [], []
        with _Opened() as opened:
            for demo in self.demos:
                actions_TA = _array(_group(opened(demo.file), demo.group, demo.file), "actions", demo.file)[()]
                low.append(actions_TA.min(axis=0))
                high.append(actions_TA.max(axis=0))
        return np.min(low, axis=0), np.max(high, axis=0)

    def flat(self, positions: Sequence[int] | None = None) -> FlatArrays:
        """Actions, agent_pos and rewards of the chosen episodes (all by default), end to end; decodes no image."""
        chosen = range(len(self)) if positions is None else positions
        actions, agent_pos, rewards = [], [], []
        with _Opened() as opened:
            for demo in (self.demos[position] for position in chosen):
                group = _group(opened(demo.file), demo.group, demo.file)
                obs = group["obs"]
                wanted = ("agent_pos",) if "agent_pos" in obs else (EEF_POS, EEF_QUAT, GRIPPER)
                agent_pos.append(_agent_pos({key: obs[key][()] for key in wanted if key in obs}, demo))
                actions.append(_array(group, "actions", demo.file)[()].astype(np.float32))
                rewards.append(group["rewards"][()] if "rewards" in group else np.zeros(demo.length, np.float32))
        if not actions:
            raise DatasetError(f"{str(self.path)!r}: no episode chosen; choose at least one.")
        return FlatArrays(
            starts_N1=np.cumsum([0, *(len(rows) for rows in actions)]),
            actions_FA=np.concatenate(actions),
            agent_pos_FP=np.concatenate(agent_pos),
            rewards_F=np.concatenate(rewards).astype(np.float32),
        )

    def model_file(self, index: int) -> str | None:
        """The MuJoCo XML that episode ``index`` was recorded with, None if the file does not keep it."""
        demo = self.demos[index]
        with _open_h5(demo.file) as file:
            value = file[demo.group].attrs.get("model_file")
            return None if value is None else str(value)


def open_dataset(path: str | Path, *, camera: str | None = None) -> Dataset:
    """Open a robomimic file, a ``.parts`` folder, or (if ``FILE`` is not there yet) its ``FILE.parts``.

    Args:
        path: the dataset.
        camera: which camera's images to read; by default ``agentview``, else the first in the file.

    Raises:
        DatasetError: missing, truncated, not HDF5, not in robomimic's layout, demos that disagree in their dims,
            or written by a newer version.
        StorageError: no permission to read it.
    """
    path = Path(path)
    if not path.exists() and parts_folder(path).is_dir():
        path = parts_folder(path)
    return Dataset(path, camera)


@contextmanager
def _reading(demo: Demo) -> Iterator[h5py.Group]:
    """The demo's group, open; data that cannot be read is a DatasetError."""
    with _open_h5(demo.file) as file:
        group = _group(file, demo.group, demo.file)
        try:
            yield group
        except (OSError, KeyError, RuntimeError) as error:  # what h5py raises for damaged data
            raise DatasetError(
                f"{demo.where}: it cannot be read ({error}); copy or download the file again."
            ) from error


def _arrays(group: h5py.Group) -> dict[str, NDArray[Any]]:
    found = {key: value[()] for key, value in group.items() if isinstance(value, h5py.Dataset)}
    return found | {f"obs/{key}": value[()] for key, value in group.get("obs", {}).items() if value.ndim < 4}


def _agent_pos(obs: Mapping[str, NDArray[Any]], demo: Demo) -> NDArray[np.float32]:
    if "agent_pos" in obs:
        return obs["agent_pos"].astype(np.float32)
    try:
        return agent_pos_from_obs(obs)
    except DatasetError as error:
        raise DatasetError(f"{demo.where}: {error}") from error


def _attrs(group: h5py.Group, *, with_model: bool) -> dict[str, AttrValue]:
    found: dict[str, AttrValue] = {}
    for key in group.attrs:
        if key in ("num_samples", "episode") or (key == "model_file" and not with_model):
            continue
        value = group.attrs[key]
        found[key] = value.item() if isinstance(value, np.generic) else value
    return found


def _json_attr(group: h5py.Group, key: str, path: Path) -> dict[str, Any]:
    text = group.attrs.get(key, "{}")
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, TypeError) as error:
        raise DatasetError(f"{str(path)!r}: attribute {key!r} of 'data' must be JSON, got {text!r:.80}.") from error
    return dict(value) if isinstance(value, dict) else {}


def _demo(group: h5py.Group, name: str, index: int, file: Path) -> tuple[Demo, int]:
    """The demo's facts and its number of action dims. Cheap, for it is done for every demo on opening."""
    actions = _array(group, "actions", file)
    length = int(group.attrs.get("num_samples", len(actions)))
    if actions.ndim != 2 or len(actions) != length:
        raise DatasetError(
            f"{str(file)!r}: {group.name} says {length} rows, and its actions have shape {actions.shape}; "
            "the file was not written to the end: record or download it again."
        )
    return Demo(name, index, file, group.name, length, _attrs(group, with_model=False)), actions.shape[1]


def _same_dims(path: Path, dims: Mapping[str, int]) -> None:
    first_name, first = next(iter(dims.items()))
    for name, found in dims.items():
        if found != first:
            raise DatasetError(
                f"{str(path)!r}: demos disagree in their action dims: {first_name} has {first}, {name} has {found}; "
                "keep different robots in different files."
            )


def _demos_of_file(path: Path) -> tuple[tuple[Demo, ...], dict[str, list[str]]]:
    demos: list[Demo] = []
    dims: dict[str, int] = {}
    with _open_h5(path) as file:
        data = _group(file, "data", path)
        numbers = sorted(int(name[5:]) for name in data if re.fullmatch(r"demo_\d+", name))
        if not numbers:
            raise DatasetError(f"{str(path)!r}: the group 'data' has no demo_<i>, only {sorted(data)[:5]}.")
        for number in numbers:
            name = f"demo_{number}"
            demo, dims[name] = _demo(_group(data, name, path), name, number, path)
            demos.append(demo)
        masks = {
            key: [name.decode() if isinstance(name, bytes) else str(name) for name in names[()]]
            for key, names in file.get("mask", {}).items()
        }
    _same_dims(path, dims)
    return tuple(demos), masks


def _demos_of_shards(shards: Mapping[int, Path]) -> tuple[tuple[Demo, ...], dict[str, list[str]]]:
    demos: list[Demo] = []
    dims: dict[str, int] = {}
    for index, shard in shards.items():
        name = f"demo_{index}"
        with _open_h5(shard) as file:
            demo, dims[name] = _demo(_group(file, "data/demo_0", shard), name, index, shard)
        demos.append(demo)
    _same_dims(next(iter(shards.values())).parent, dims)
    return tuple(demos), {}


def _masks_by_index(demos: Sequence[Demo]) -> dict[str, list[str]]:
    return {split: [demo.name for demo in demos if split_of(demo.index) == split] for split in SPLITS}
