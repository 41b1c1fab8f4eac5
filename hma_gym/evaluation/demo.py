"""The demonstration: the learned Lift beside the true one, from the same starts, under the same actions.

    hma-gym demo                 # about a minute and a half on 2 CPU cores

A scripted policy (it lifts, lifts and drops, or aims beside the cube) and a random one drive MuJoCo; their actions
are replayed in the learned simulator from the same start. ``<out>/report.html`` is one self-contained page; the videos
lie beside it as mp4.

Shape legend: T steps, H W C image, A action dims.
"""

from __future__ import annotations

import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

import hma_gym
from hma_gym.dynamics.checkpoint import checkpoint_folder
from hma_gym.envs.tasks import get_task
from hma_gym.errors import InvalidArgument, StorageError
from hma_gym.evaluation.page import Element, Heading, Picture, Table, Text, Video, render_page, write_video
from hma_gym.evaluation.provenance import provenance
from hma_gym.evaluation.strips import Panel, Strip, draw_sheet
from hma_gym.metrics.video import psnr
from hma_gym.policies.scripted import ScriptedConfig, ScriptedLift

PANEL, BAND, GAP = 256, 32, 16
"""Pixels: side of one world's picture in a video, height of the caption above, gap between the two."""


@dataclass(frozen=True)
class Scene:
    """One paired episode.

    Attributes:
        title: heading in the report.
        mode: of the scripted policy; None for uniform random actions.
    """

    title: str
    mode: str | None


SCENES = (
    Scene("A scripted policy lifts the cube", "expert"),
    Scene("A scripted policy lifts the cube and lets it go", "drop"),
    Scene("A scripted policy aims beside the cube", "near_miss"),
    Scene("A scripted policy pushes the cube", "push"),
    Scene("Random actions", None),
    Scene("Random actions, another start", None),
)


@dataclass(frozen=True)
class DemoConfig:
    """What the demonstration shows.

    Attributes:
        out: folder for the report and the videos.
        checkpoint: name, folder or hub id.
        steps: length of each episode (20 steps are a second).
        scenes: how many of the scenes, in order.
        seed: of the policies and the learned world.
        show: open the report in the web browser at the end.
    """

    out: Path = Path("outputs/demo")
    checkpoint: str = "lift-64"
    steps: int = 60
    scenes: int = len(SCENES)
    seed: int = 0
    show: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.scenes <= len(SCENES):
            raise InvalidArgument(
                f"need steps >= 1 and scenes from 1 to {len(SCENES)}, got steps={self.steps}, scenes={self.scenes}."
            )


@dataclass(frozen=True)
class Episode:
    """What one world showed: T + 1 frames, T actions, and success at each frame.

    ``seconds`` is what the T steps took, without making the environment.
    """

    frames_THWC: NDArray[np.uint8]
    actions_TA: NDArray[np.float32]
    success_T: NDArray[np.bool_]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """One scene in both worlds."""

    scene: Scene
    start: int
    truth: Episode
    learned: Episode

    def psnr(self) -> float:
        """Mean over the generated frames, dB."""
        truth, learned = torch.from_numpy(self.truth.frames_THWC[1:]), torch.from_numpy(self.learned.frames_THWC[1:])
        return float(psnr(truth, learned).mean())

    def agrees(self) -> bool:
        """Whether both worlds end in success or both in failure."""
        return bool(self.truth.success_T[-1] == self.learned.success_T[-1])


@contextmanager
def _environment(env_id: str, **arguments: Any) -> Iterator[gymnasium.Env[Any, Any]]:
    env = gymnasium.make(env_id, obs_type="pixels_agent_pos", **arguments)
    try:
        yield env
    finally:
        env.close()


def record_truth(env: gymnasium.Env[Any, Any], scene: Scene, start: int, steps: int, seed: int) -> Episode:
    """Drive MuJoCo with the scene's policy from one start of the bank."""
    generator = np.random.default_rng([seed, start])
    script = ScriptedLift(ScriptedConfig(scene.mode), seed=seed) if scene.mode is not None else None
    observation, info = env.reset(seed=seed, options={"start": start})
    frames, actions, success = [observation["pixels"]], [], [bool(info["is_success"])]
    begun = time.perf_counter()
    if script is not None:
        script.reset(np.ones(1, dtype=np.bool_))
    for _ in range(steps):
        if script is None:
            action = generator.uniform(-1, 1, env.action_space.shape or ()).astype(np.float32)
        else:
            privileged = {key: np.asarray(value)[None] for key, value in info["privileged"].items()}
            action = script.act({"privileged": privileged})[0, 0]
        observation, _, _, _, info = env.step(action)
        frames.append(observation["pixels"])
        actions.append(action)
        success.append(bool(info["is_success"]))
    return Episode(np.stack(frames), np.stack(actions), np.array(success), time.perf_counter() - begun)


def replay(env: gymnasium.Env[Any, Any], start: int, actions_TA: NDArray[np.float32], seed: int) -> Episode:
    """The same actions from the same start in another world."""
    observation, info = env.reset(seed=seed, options={"start": start})
    frames, success = [observation["pixels"]], [bool(info["is_success"])]
    begun = time.perf_counter()
    for action in actions_TA:
        observation, _, _, _, info = env.step(action)
        frames.append(observation["pixels"])
        success.append(bool(info["is_success"]))
    return Episode(np.stack(frames), actions_TA, np.array(success), time.perf_counter() - begun)


def side_by_side(comparison: Comparison) -> NDArray[np.uint8]:
    """Both worlds with captions, MuJoCo at the left: (T, 288, 528, 3) uint8."""
    font = ImageFont.load_default(size=15)
    pictures = []
    for t in range(len(comparison.truth.frames_THWC)):
        canvas = Image.new("RGB", (2 * PANEL + GAP, BAND + PANEL), "white")
        draw = ImageDraw.Draw(canvas)
        for column, (name, episode) in enumerate((("MuJoCo", comparison.truth), ("learned", comparison.learned))):
            x = column * (PANEL + GAP)
            caption = f"{name}  {'success' if episode.success_T[t] else ''}"
            draw.text((x + 6, 7), caption, fill="#1a7f37" if episode.success_T[t] else "black", font=font)
            frame = Image.fromarray(episode.frames_THWC[t]).resize((PANEL, PANEL), Image.Resampling.BICUBIC)
            canvas.paste(frame, (x, BAND))
        draw.text((2 * PANEL + GAP - 6, 7), f"step {t}", fill="gray", font=font, anchor="ra")
        pictures.append(np.asarray(canvas))
    return np.stack(pictures)


def strip(comparison: Comparison, columns: int = 11) -> Image.Image:
    """A few frames of both worlds, one above the other."""
    last = len(comparison.truth.frames_THWC) - 1
    rows = np.unique(np.linspace(0, last, columns).round().astype(int))
    strips = (
        Strip("MuJoCo", comparison.truth.frames_THWC[rows]),
        Strip("learned", comparison.learned.frames_THWC[rows]),
    )
    return draw_sheet([Panel("", strips)], [str(row) for row in rows], scale=1.25, label_width=60)


def _success(episode: Episode) -> str:
    if episode.success_T[-1]:
        return "lifted at the end"
    return "lifted, then lost" if episode.success_T.any() else "never lifted"


def demo_page(comparisons: list[Comparison], videos: list[Path], checkpoint: str, minutes: float) -> str:
    """The report."""
    steps = sum(len(c.truth.actions_TA) for c in comparisons)
    learned_rate = steps / sum(c.learned.seconds for c in comparisons)
    true_rate = steps / sum(c.truth.seconds for c in comparisons)
    agreeing = sum(c.agrees() for c in comparisons)
    elements: list[Element] = [
        Text(
            "Lift twice: in MuJoCo, and in a simulator that learned it from video. Both begin at the same start; the "
            "learned one is given one real frame and then only the actions. It draws every further frame itself, and "
            "says itself whether the cube is lifted."
        ),
        Table(
            ("scene", "start", "MuJoCo", "learned", "same outcome", "PSNR, dB"),
            [
                (
                    c.scene.title,
                    str(c.start),
                    _success(c.truth),
                    _success(c.learned),
                    "yes" if c.agrees() else "no",
                    f"{c.psnr():.1f}",
                )
                for c in comparisons
            ],
        ),
        Text(
            f"{agreeing} of {len(comparisons)} outcomes agree. The learned world made {learned_rate:.0f} frames a "
            f"second (one environment), MuJoCo {true_rate:.0f} with its images; the whole demonstration took "
            f"{minutes:.1f} minutes.",
        ),
    ]
    for comparison, video in zip(comparisons, videos, strict=True):
        elements += [
            Heading(comparison.scene.title),
            Video(video, f"{comparison.scene.title}: MuJoCo at the left, the learned world at the right"),
            Picture(strip(comparison), "MuJoCo above, the learned world below"),
        ]
    facts = provenance(torch.device("cpu"))
    elements += [
        Heading("Drive it yourself"),
        Text(
            "import gymnasium, hma_gym\n\n"
            'env = gymnasium.make("HMA-Lift-v0")\n'
            "observation, info = env.reset(seed=0)\n"
            "observation, reward, terminated, truncated, info = env.step(env.action_space.sample())",
            code=True,
        ),
        Text(
            f"Checkpoint {checkpoint}; hma_gym {hma_gym.__version__}, commit {facts['commit']}; {facts['processor']}, "
            f"{facts['cpus']} cores; {facts['date']}.",
            dim=True,
        ),
    ]
    return render_page("Lift, true and learned", elements)


def demo(config: DemoConfig) -> Path:
    """Run the scenes, write videos and report, and return the report's path.

    Raises:
        MissingExtra: MuJoCo is not installed; the demonstration compares with it.
        StorageError: the folder cannot be written.
    """
    begun = time.perf_counter()
    task = get_task("lift")
    comparisons, videos = [], []
    with (
        _environment(
            f"GroundTruth-{task.id_stem}-v0",
            privileged_info=True,
            starts=config.checkpoint,
            max_episode_steps=config.steps,
        ) as truth_env,
        _environment(
            f"HMA-{task.id_stem}-v0", checkpoint=config.checkpoint, max_episode_steps=config.steps
        ) as learned_env,
    ):
        for start, scene in enumerate(SCENES[: config.scenes]):
            print(f"[{start + 1}/{config.scenes}] {scene.title} ...", flush=True)
            truth = record_truth(truth_env, scene, start, config.steps, config.seed)
            learned = replay(learned_env, start, truth.actions_TA, config.seed)
            comparison = Comparison(scene, start, truth, learned)
            print(f"    MuJoCo: {_success(truth)}; learned: {_success(learned)}; PSNR {comparison.psnr():.1f} dB")
            comparisons.append(comparison)
            videos.append(
                write_video(config.out / f"scene_{start + 1}.mp4", side_by_side(comparison), fps=task.control_hz)
            )
    report = config.out / "report.html"
    minutes = (time.perf_counter() - begun) / 60
    try:
        report.write_text(demo_page(comparisons, videos, checkpoint_folder(config.checkpoint).name, minutes))
    except OSError as error:
        raise StorageError(f"cannot write {str(report)!r}: {error}; choose another folder.") from error
    print(f"\nThe report: {report.resolve()}\nThe videos: {config.out.resolve()}/scene_*.mp4")
    if config.show:
        webbrowser.open(report.resolve().as_uri())
    return report
