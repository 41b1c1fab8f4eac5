"""A toy robot world, recorded for real, and untrained two-layer checkpoints of both token kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import Dataset, EpisodeWriter, open_dataset
from hma_gym.domains import Domain
from hma_gym.dynamics.checkpoint import Checkpoint, StartBank, save_checkpoint, start_bank
from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from hma_gym.nn.transformer import TrunkConfig
from hma_gym.tokenizers.soft import SoftConfig, SoftTokenizer
from hma_gym.tokenizers.vq import VQConfig, VQTokenizer

SIZE, ROWS = 16, 8
CATEGORIES = ("held", "dropped", "near_miss", "pushed")


def toy_episode(seed: int, rows: int = ROWS) -> Episode:
    """A red square on a grey table that is held, dropped or never lifted; each split sees every kind."""
    kind = (seed + seed // 12) % 4
    generator = np.random.default_rng(seed)
    images = np.full((rows, SIZE, SIZE, 3), 150, dtype=np.uint8)
    column, height = int(generator.integers(1, 12)), np.zeros(rows, dtype=int)
    if kind == 0:
        height[rows // 2 :] = 6
    if kind == 1:
        height[2:-2] = 6
    for t in range(rows):
        top = SIZE - 4 - height[t]
        images[t, top : top + 3, column : column + 3] = (200, 20, 20)
    success = height > 0
    position = np.zeros((rows, 3), dtype=np.float32)
    position[:, 0], position[:, 2] = column / 100, 0.82 + height / 100
    return Episode(
        images_THWC=images,
        agent_pos_TP=generator.normal(0, 0.1, (rows, 9)).astype(np.float32),
        actions_TA=generator.uniform(-1, 1, (rows, 7)).astype(np.float32),
        states_TS=np.zeros((rows, 2)),
        rewards_T=np.append(success[1:], success[-1]).astype(np.float32),
        dones_T=np.zeros(rows, bool),
        obs={"object": position},
        attrs={"category": CATEGORIES[kind], "success": bool(success[-1])},
    )


@pytest.fixture(scope="session")
def toy_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("evaluation") / "toy.hdf5"
    writer = EpisodeWriter(path, env_args={"env_name": "Toy", "type": 1, "env_kwargs": {}}, info={"seed": 0})
    for seed in range(48):
        writer.append(toy_episode(seed))
    return open_dataset(writer.merge())


def tiny_checkpoint(kind: str, size: int = SIZE, starts: StartBank | None = None) -> Checkpoint:
    torch.manual_seed(0)
    episode = toy_episode(0)
    domain = Domain.from_statistics(
        "lift",
        actions_FA=episode.actions_TA,
        agent_pos_FP=episode.agent_pos_TP,
        deltas_FP=np.diff(episode.agent_pos_TP, axis=0),
        targets_FX=episode.obs["object"],
        image_size=(size, size),
    )
    trunk = TrunkConfig(layers=2, width=16, heads=2, window=4)
    widths = {"encoder_widths": (4, 8, 8), "decoder_widths": (8, 8, 4), "decoder_blocks": (1, 0, 0)}
    if kind == "soft":
        tokenizer: SoftTokenizer | VQTokenizer = SoftTokenizer(SoftConfig((size, size), **widths, channels=4))
        head: FlowHeadConfig | MaskGITHeadConfig = FlowHeadConfig(
            grid=tokenizer.grid, channels=4, patch=1, flow_width=16, flow_layers=1
        )
    else:
        tokenizer = VQTokenizer(VQConfig((size, size), **widths, levels=(4, 3), vocabulary=(12,)))
        head = MaskGITHeadConfig(grid=tokenizer.grid, vocabulary=(12,))
    return Checkpoint(
        name="tiny",
        task="lift",
        tokenizer=tokenizer.eval(),
        dynamics=Dynamics(DynamicsConfig(trunk=trunk, head=head), [domain]).eval(),
        judge=ClassifierJudge(
            ClassifierConfig(window=2, image_size=(size, size), channels=(4, 4, 8), width=8, threshold=0.5)
        ).eval(),
        starts=starts or start_bank([episode.images_THWC[0]], [episode.agent_pos_TP[0]]),
    )


@pytest.fixture(scope="session", params=["soft", "vq"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(request.param)


@pytest.fixture(scope="session")
def soft_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_checkpoint("soft"), tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture(scope="session")
def lift_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint for Lift at 64 x 64 whose two starts are MuJoCo's."""
    from hma_gym.envs.ground_truth import GroundTruthEnv

    env = GroundTruthEnv(obs_type="pixels_agent_pos")
    frames, agent_pos, states = [], [], []
    for seed in range(2):
        observation, _ = env.reset(seed=seed)
        assert isinstance(observation, dict)
        frames.append(observation["pixels"])
        agent_pos.append(observation["agent_pos"])
        states.append(env.simulation.flattened_state())
    env.close()
    starts = start_bank(frames, agent_pos, states, seeds=[0, 1])
    return save_checkpoint(tiny_checkpoint("soft", 64, starts), tmp_path_factory.mktemp("lift") / "tiny-lift")
