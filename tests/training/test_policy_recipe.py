"""Training a diffusion policy: checkpoints along the way, exact resumption, and what is asked of the data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import EpisodeWriter, open_dataset
from hma_gym.errors import DatasetError, InvalidArgument
from hma_gym.policies.diffusion import DiffusionConfig, load_diffusion
from hma_gym.training.recipes.policy import PolicyBatches, PolicyOptions, read_demonstrations, train_policy
from hma_gym.training.saved import saved_files

ROWS = 12


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    writer = EpisodeWriter(tmp_path_factory.mktemp("demos") / "demos.hdf5", env_args={}, info={})
    for seed in range(7):  # the sixth is for validation
        rng = np.random.default_rng(seed)
        writer.append(
            Episode(
                images_THWC=rng.integers(0, 256, (ROWS, 16, 16, 3), dtype=np.uint8),
                agent_pos_TP=rng.normal(size=(ROWS, 9)).astype(np.float32),
                actions_TA=rng.uniform(-1, 1, (ROWS, 7)).astype(np.float32),
                states_TS=np.zeros((ROWS, 0)),
                rewards_T=np.zeros(ROWS, np.float32),
                dones_T=np.zeros(ROWS, np.bool_),
                obs={"object": rng.normal(size=(ROWS, 10))},
            )
        )
    return writer.merge()


def options(recorded: Path, out: Path) -> PolicyOptions:
    return PolicyOptions(
        recorded, out, steps=4, keep_every=2, unet_channels=(8, 8), read_object=True, batch_size=2, progress=False
    )


def test_checkpoints_are_kept_and_a_resumed_run_ends_the_same(recorded: Path, tmp_path: Path) -> None:
    whole = train_policy(options(recorded, tmp_path / "whole"))
    assert [path.name for path in sorted((tmp_path / "whole").glob("step-*"))] == ["step-0000002", "step-0000004"]
    assert whole.name == "step-0000004"
    provenance = json.loads((whole / "config.json").read_text())["training"]
    assert provenance == {"data": "demos.hdf5", "demonstrations": 6, "seed": 0, "batch_size": 2, "step": 4}
    figures = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in figures if line["kind"] == "eval"] == [2, 4]
    assert all(line["object_error_cm"] > 0 for line in figures if line["kind"] == "eval")
    assert load_diffusion(whole).config.auxiliary_dim == 5

    half = options(recorded, tmp_path / "half")
    train_policy(half)
    for folder in sorted((tmp_path / "half").glob("step-*")):  # as after a kill between the saved state and the policy
        (folder / "config.json").unlink()
    saved_files(tmp_path / "half")[-1].unlink()
    resumed = train_policy(half)
    for step in ("step-0000002", "step-0000004"):
        theirs, ours = (load_file(folder.parent / step / "policy.safetensors") for folder in (whole, resumed))
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_sample_is_what_was_seen_and_then_done(recorded: Path) -> None:
    training, _, targets, _ = read_demonstrations(open_dataset(recorded), 3, read_object=True)
    assert len(training) == 3
    config = DiffusionConfig(image_size=(16, 16), observation_horizon=2, auxiliary_dim=5)
    batches = PolicyBatches(training, targets, config, 16, seed=1)
    batch = batches.batch(0)
    again = batches.batch(0)
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert not torch.equal(batch["images_BOHWC"], batches.batch(1)["images_BOHWC"])
    for images, actions, targets_OX in zip(
        batch["images_BOHWC"], batch["actions_BHA"], batch["auxiliary_BOX"], strict=True
    ):
        present = [
            (e, t) for e in range(3) for t in range(ROWS) if np.array_equal(training[e].images_THWC[t], images[1])
        ]
        assert len(present) == 1
        episode, row = present[0]
        np.testing.assert_array_equal(images[0], training[episode].images_THWC[max(row - 1, 0)])
        np.testing.assert_array_equal(actions[1], training[episode].actions_TA[row])
        np.testing.assert_array_equal(actions[0], training[episode].actions_TA[max(row - 1, 0)])
        np.testing.assert_array_equal(actions[-1], training[episode].actions_TA[min(row + 14, ROWS - 1)])
        np.testing.assert_array_equal(targets_OX[1], targets[episode][row])


def test_too_little_data_and_wrong_options_are_said(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="6 demonstrations to learn from and 1 for validation; 9 and 1 are needed"):
        train_policy(replace(options(recorded, tmp_path), demonstrations=9))
    with pytest.raises(InvalidArgument, match="keep_every must be positive, got 0"):
        PolicyOptions(recorded, tmp_path, keep_every=0)
    with pytest.raises(InvalidArgument, match="demonstrations must be at least 1, got 0"):
        PolicyOptions(recorded, tmp_path, demonstrations=0)
