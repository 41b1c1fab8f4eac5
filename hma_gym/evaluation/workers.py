"""Worker processes that play episodes, and are ended when a policy does not answer."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import gymnasium
import torch
from gymnasium.vector import AutoresetMode

from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.errors import PolicyError
from hma_gym.evaluation.episode_store import EpisodeResult, EpisodeStore
from hma_gym.evaluation.rollouts import Played, play_learned, play_truth
from hma_gym.judges.human import LabelQueue
from hma_gym.judges.labels import Machine
from hma_gym.policies.loading import EpisodeSeed, PolicyFactory, load_policy

_POLL_SECONDS = 0.2
_ONE_THREAD = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS", "LP")}  # LP is Mesa's llvmpipe


@dataclass(frozen=True)
class Stage:
    """One environment, played in one or more processes.

    Attributes:
        env: gymnasium id.
        learned: whether it is a learned one, played in batches.
        arguments: for ``gymnasium.make`` or ``make_vec``.
        steps: length of every episode.
        fps: frames per second of the videos.
        run: the run's folder.
        workers: processes.
        threads: torch threads in each.
        timeout: seconds that one call of a policy may take.
        labels: folder of the queue in which the episodes wait for people's verdicts; None without.
    """

    env: str
    learned: bool
    arguments: dict[str, Any]
    steps: int
    fps: float
    run: Path
    workers: int
    threads: int
    timeout: float
    labels: Path | None = None


@dataclass(frozen=True)
class Job:
    """Episodes that one process plays in one go.

    Attributes:
        label: of the policy.
        policy: its specification, or its factory.
        episodes: all that are played together; which ones decides the last bits of a learned world.
    """

    label: str
    policy: str | PolicyFactory
    episodes: tuple[EpisodeSeed, ...]


def label_key(env: str, policy: str, start: int) -> str:
    """The name of an episode in the queue of videos to be judged by people."""
    return f"{env}/{policy}/{start}"


def run_jobs(stage: Stage, jobs: Sequence[Job]) -> Iterator[tuple[Job, PolicyError | None]]:
    """Play the jobs; yields each one when it is on disk, or has failed.

    After a failure the other jobs of that policy are left out.

    Raises:
        HMAError: the environment cannot be made, or results cannot be written.
    """
    waiting = deque(jobs)
    failed: set[str] = set()
    idle = [_Worker(stage) for _ in range(min(stage.workers, len(jobs)))]
    running: dict[Future[None], tuple[_Worker, Job]] = {}
    try:
        while waiting or running:
            while idle and waiting:
                job = waiting.popleft()
                if job.label not in failed:
                    worker = idle.pop()
                    running[worker.submit(job)] = (worker, job)
            done, _ = wait(running, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
            for worker, _ in running.values():
                worker.end_if_overdue()
            for future in done:
                worker, job = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    error = PolicyError(
                        f"policy {job.label!r}: it did not answer within {stage.timeout:g} seconds and was ended"
                        if worker.ended
                        else f"policy {job.label!r}: its process ended by itself (out of memory, or a crash)"
                    )
                    worker.close()
                    worker = _Worker(stage)
                idle.append(worker)
                if error is not None and not isinstance(error, PolicyError):
                    raise error
                if error is not None:
                    failed.add(job.label)
                yield job, error
    finally:
        for worker in [*idle, *(worker for worker, _ in running.values())]:
            worker.close()


class _Worker:
    """One process, and since when a policy has been at work in it."""

    def __init__(self, stage: Stage) -> None:
        context = multiprocessing.get_context("spawn")  # a forked child would inherit OpenGL and threads in use
        self._since: Synchronized[float] = context.Value("d", 0.0)
        self._pid: Synchronized[int] = context.Value("q", 0)
        self._timeout = stage.timeout
        self._pool = ProcessPoolExecutor(1, context, _begin, (stage, self._since, self._pid))
        self._threads = stage.threads
        self.ended = False

    def submit(self, job: Job) -> Future[None]:
        with _thread_limits(self._threads):  # the process is started by the first job
            return self._pool.submit(_play, job)

    def end_if_overdue(self) -> None:
        since = self._since.value
        if since and time.monotonic() - since > self._timeout:
            self.ended = True
            self._kill()

    def close(self) -> None:
        self._kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _kill(self) -> None:
        if self._pid.value:
            with contextlib.suppress(ProcessLookupError):  # it is over already
                os.kill(self._pid.value, signal.SIGKILL)
            self._pid.value = 0


@contextmanager
def _thread_limits(threads: int) -> Iterator[None]:
    """Libraries in a process that begins here read their number of threads as they are loaded."""
    wanted = {name: str(threads) if name == "OMP_NUM_THREADS" else one for name, one in _ONE_THREAD.items()}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Process:
    """What one worker process keeps between jobs."""

    def __init__(self, stage: Stage, since: Synchronized[float]) -> None:
        self.stage = stage
        self.store = EpisodeStore(stage.run)
        self._since = since
        self._policies: dict[str, PolicyFactory] = {}
        self._truth: gymnasium.Env[Any, Any] | None = None
        self._learned: dict[int, HMAVectorEnv] = {}
        torch.set_num_threads(stage.threads)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Tell the parent since when a policy is at work."""
        self._since.value = time.monotonic()
        try:
            yield
        finally:
            self._since.value = 0.0

    def play(self, job: Job) -> None:
        """Play a job's episodes and put those on disk that are not there."""
        stage, make = self.stage, self._factory(job)
        if stage.learned:
            finished = play_learned(
                self._learned_envs(len(job.episodes)), job.label, make, job.episodes, stage.steps, self.watch
            )
            for played in finished:
                self._write(job, played)
        else:
            for episode in job.episodes:
                self._write(job, play_truth(self._truth_env(), job.label, make, episode, stage.steps, self.watch))

    def _write(self, job: Job, played: Played) -> None:
        stage, episode = self.stage, played.episode
        if self.store.has(stage.env, job.label, episode.start):
            return
        result = EpisodeResult(
            job.label,
            stage.env,
            episode.start,
            episode.seed,
            len(played.frames_THWC) - 1,
            played.success_end,
            played.success_ever,
            played.probability,
            played.seconds,
            stage.workers,
        )
        if stage.labels is not None:
            with LabelQueue.open(stage.labels) as queue:
                machine = Machine("checkpoint's judge", played.probability, played.success_end)
                key = label_key(stage.env, job.label, episode.start)
                queue.add(key, played.frames_THWC, fps=stage.fps, policy=job.label, machine=machine)
        self.store.write(played, result, stage.fps)

    def _factory(self, job: Job) -> PolicyFactory:
        if not isinstance(job.policy, str):
            return job.policy
        if job.policy not in self._policies:
            self._policies[job.policy] = load_policy(job.policy).make
        return self._policies[job.policy]

    def _learned_envs(self, count: int) -> HMAVectorEnv:
        if count not in self._learned:
            envs = gymnasium.make_vec(
                self.stage.env,
                num_envs=count,
                autoreset_mode=AutoresetMode.DISABLED,
                **self.stage.arguments,
            )
            assert isinstance(envs, HMAVectorEnv)
            self._learned[count] = envs
        return self._learned[count]

    def _truth_env(self) -> gymnasium.Env[Any, Any]:
        if self._truth is None:
            self._truth = gymnasium.make(self.stage.env, **self.stage.arguments)
        return self._truth


_process: _Process | None = None  # in a worker process


def _begin(stage: Stage, since: Synchronized[float], pid: Synchronized[int]) -> None:
    global _process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    pid.value = os.getpid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _process = _Process(stage, since)


def _end_with_parent() -> None:
    """An evaluation that was killed must not leave processes behind that write on."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _play(job: Job) -> None:
    assert _process is not None
    _process.play(job)
