"""The judge learns a toy task through the common loop, and says truly how well."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_toy import toy_episode, toy_stills, write_toy
from toy_checkpoint import SIZE, toy_checkpoint

from hma_gym.data.episodes import Episode
from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.dynamics.checkpoint import save_checkpoint
from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument
from hma_gym.judges import augment
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge, load_judge
from hma_gym.judges.protocol import episode_probabilities, verdict
from hma_gym.judges.rows import label_rows, object_by_row, success_by_row
from hma_gym.tokenizers import SoftConfig, SoftTokenizer
from hma_gym.tokenizers.files import save_tokenizer
from hma_gym.training.judge import (
    JudgeBatches,
    JudgeTrainConfig,
    JudgeTraining,
    drawn_frames,
    fit_temperature,
    fit_threshold,
    round_trip,
    train_judge,
)


def _config(data: Path, out: Path, **changes: object) -> JudgeTrainConfig:
    fields: dict[str, object] = {
        "data": data,
        "out": out,
        "steps": 300,
        "upper_steps": 20,
        "window": 2,
        "channels": (8, 8, 16),
        "width": 32,
        "decision_height": 0.85,
        "fade_red": False,
        "progress": False,
        **changes,
    }
    return JudgeTrainConfig(**fields)  # type: ignore[arg-type]


def test_success_of_a_row_is_the_reward_of_the_row_before(toy_data: Path) -> None:
    episode = open_dataset(toy_data)[3]
    assert np.array_equal(success_by_row(episode)[1:], object_by_row(episode)[1:, 2] >= 0.85 - 1e-6)


def test_windows_stay_inside_their_episode(toy_data: Path) -> None:
    dataset = open_dataset(toy_data)
    rows = label_rows([dataset[0], dataset[1]])
    assert rows.windows(np.array([0, 10, 11, 19]), 3).tolist() == [[0, 0, 0], [10, 10, 10], [10, 10, 11], [17, 18, 19]]
    assert rows.last_N.tolist() == [9, 19]


def test_each_still_is_its_own_window() -> None:
    rows = label_rows([toy_episode(0), toy_stills(1)])
    everything = np.arange(len(rows))
    np.testing.assert_array_equal(rows.first_F, np.r_[np.zeros(10, int), 10 + np.arange(10)])
    np.testing.assert_array_equal(rows.last_N, 9 + np.arange(11))
    np.testing.assert_array_equal(rows.windows(everything[10:], 4), np.repeat(everything[10:, None], 4, axis=1))
    stills = toy_stills(1)
    np.testing.assert_array_equal(rows.success_F[10:], stills.obs["object"][:, 2] >= 0.845)
    np.testing.assert_array_equal(rows.frames_FHWC[10:], stills.images_THWC)
    assert rows.success_F[10:].any() and not rows.success_F[10:].all()


def test_batches_are_pure_and_show_the_boundary(toy_data: Path, tmp_path: Path) -> None:
    dataset = open_dataset(toy_data)
    rows = label_rows([dataset[i] for i in dataset.split("train")])
    batches = JudgeBatches(rows, _config(toy_data, tmp_path))
    first, again, other = batches.batch(5), batches.batch(5), batches.batch(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["frames_BKHWC"], other["frames_BKHWC"])
    near = (first["position_B3"][:, 2] - 0.85).abs() < 0.03
    assert near[:32].all()


def test_it_learns_and_is_stored_with_its_report(toy_data: Path, tmp_path: Path) -> None:
    result = train_judge(_config(toy_data, tmp_path))
    assert result.measured.frames.accuracy > 0.9
    assert result.measured.position_error_m < 0.02
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["frames"]["accuracy"] == result.measured.frames.accuracy
    again = load_judge(tmp_path)
    dataset = open_dataset(toy_data)
    episodes = [dataset[i] for i in dataset.split("test")]
    frames = torch.from_numpy(np.stack([episode.images_THWC for episode in episodes]))
    truth = torch.from_numpy(np.stack([success_by_row(episode) for episode in episodes]))
    agreement = (verdict(again, episode_probabilities(again, frames)) == truth).double().mean()
    assert float(agreement) == pytest.approx(result.measured.frames.accuracy)
    (tmp_path / "judge.safetensors").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="hma-gym train judge"):
        load_judge(tmp_path)


def test_round_trips_enter_the_batches(toy_data: Path, tmp_path: Path) -> None:
    tokenizer = SoftTokenizer(
        SoftConfig((16, 16), encoder_widths=(4, 4, 4), decoder_widths=(4, 4, 4), decoder_blocks=(0, 0, 0), channels=2)
    ).eval()
    folder = save_tokenizer(tokenizer, tmp_path / "tokenizer")
    dataset = open_dataset(toy_data)
    rows = label_rows([dataset[i] for i in dataset.split("train")])
    config = _config(toy_data, tmp_path)
    coded = round_trip(tokenizer, rows.frames_FHWC[:30], noise=0.5, seed=0)
    assert coded.shape == (30, 16, 16, 3) and coded.dtype == np.uint8
    assert np.array_equal(coded, round_trip(tokenizer, rows.frames_FHWC[:30], noise=0.5, seed=0))
    assert not np.array_equal(coded, round_trip(tokenizer, rows.frames_FHWC[:30], noise=0.0, seed=0))
    with_coded, without = JudgeBatches(rows, config, coded).batch(0), JudgeBatches(rows, config).batch(0)
    changed = (with_coded["frames_BKHWC"] != without["frames_BKHWC"]).flatten(1).any(dim=1)
    assert changed.any() and torch.equal(with_coded["success_B"], without["success_B"])
    result = train_judge(_config(toy_data, tmp_path / "run", steps=2, tokenizer=folder, roundtrip_episodes=3))
    assert 0 <= result.measured.frames.accuracy <= 1


def test_a_judge_is_taught_how_a_world_draws(toy_data: Path, tmp_path: Path) -> None:
    world = toy_checkpoint(judge=False)
    data = write_toy(tmp_path / "large.hdf5", [toy_episode(seed, size=SIZE) for seed in range(12)])
    episodes = [open_dataset(data)[n] for n in (0, 3)]
    episodes[1].agent_pos_TP[5:] += 0.2
    drawn = drawn_frames(world, episodes, batch=7)
    body = world.dynamics.adapter(0).body
    nothing = torch.zeros(1, 0)
    for row, (episode, t) in {3: (0, 3), 14: (1, 4), 15: (1, 5)}.items():
        tokens = body.drawn(torch.from_numpy(episodes[episode].agent_pos_TP[t : t + 1]), nothing)
        assert tokens is not None
        difference = drawn[row].astype(int) - world.tokenizer.decode(tokens)[0].numpy().astype(int)
        assert np.abs(difference).max() <= 1  # batches of other sizes round otherwise
    assert len(drawn) == 20 and not np.array_equal(drawn[14], drawn[15])

    folder = save_checkpoint(world, tmp_path / "world")
    result = train_judge(_config(data, tmp_path / "run", steps=2, world=str(folder), more_data=(data,)))
    assert 0 <= result.measured.frames.accuracy <= 1
    for wrong, error, message in (
        ({"data": toy_data}, DatasetError, r"draws frames of \(40, 40\) pixels, the data has \(16, 16\)"),
        ({"tokenizer": tmp_path}, InvalidArgument, "name world or tokenizer"),
    ):
        with pytest.raises(error, match=message):
            train_judge(_config(**{"data": data, "out": tmp_path / "no", "world": str(folder), **wrong}))


def test_data_without_success_is_refused(data_without_success: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="one outcome"):
        train_judge(_config(data_without_success, tmp_path / "out"))


def test_what_is_red_fades_and_is_then_no_success() -> None:
    scene = torch.zeros(3, 16, 16)
    frames = scene.expand(64, 2, -1, -1, -1).clone()
    frames[..., 0, 4:7, 4:7] = 0.8
    faded, gone = augment.fade_red(frames, scene, torch.Generator().manual_seed(0), share=1.0)
    left = faded[:, 0, 0, 5, 5] / 0.8
    assert torch.equal(gone, left <= 0.25) and gone.any() and not gone.all()
    assert torch.equal(faded[..., 10:, :], frames[..., 10:, :])
    same, none = augment.fade_red(frames, scene, torch.Generator().manual_seed(0), share=0.0)
    assert torch.equal(same, frames) and not none.any()


def test_training_goes_on_from_a_judge(toy_data: Path, tmp_path: Path) -> None:
    first = train_judge(_config(toy_data, tmp_path / "first", steps=60))
    second = train_judge(
        _config(toy_data, tmp_path / "second", steps=1, upper_steps=0, lr=1e-9, init=tmp_path / "first")
    )
    assert second.judge.config.position_mean == first.judge.config.position_mean
    for name, tensor in second.judge.state_dict().items():
        assert torch.allclose(tensor, first.judge.state_dict()[name], atol=1e-3)


def _blind(seed: int, robot: int = 2) -> Episode:
    """Pictures that show nothing; the height that decides is told by agent_pos alone, to a millimetre or so."""
    episode = toy_episode(seed)
    poses = np.full((len(episode), robot), 0.5, np.float32)
    poses[:, 0] = episode.obs["object"][:, 2]
    return dataclasses.replace(episode, images_THWC=np.full_like(episode.images_THWC, 90), agent_pos_TP=poses)


def test_what_no_picture_shows_agent_pos_tells(tmp_path: Path) -> None:
    data = write_toy(tmp_path / "blind.hdf5", [_blind(seed) for seed in range(48)])
    result = train_judge(_config(data, tmp_path / "told"))
    report = json.loads((tmp_path / "told" / "report.json").read_text())
    assert result.judge.state_dim == 2 and result.measured.frames.accuracy > 0.95
    assert result.measured.position_error_m < 0.04
    alone = train_judge(_config(data, tmp_path / "alone", state=False))
    counts = alone.measured.frames
    share = (counts.true_positives + counts.false_negatives) / counts.count
    most = max(share, 1 - share)
    assert alone.judge.state_dim == 0 and alone.measured.frames.accuracy <= most + 1e-9
    assert report["without_agent_pos"]["frames"]["accuracy"] <= most + 1e-9
    assert "without_agent_pos" not in json.loads((tmp_path / "alone" / "report.json").read_text())

    picture = torch.full((2, 2, 16, 16, 3), 90, dtype=torch.uint8)
    high_and_low = torch.tensor([[0.87, 0.5], [0.81, 0.5]])[:, None].expand(2, 2, 2)
    for judge in (result.judge, load_judge(tmp_path / "told")):
        assert verdict(judge, judge.probability(picture, high_and_low)).tolist() == [True, False]
        untold = judge.probability(picture)
        assert torch.allclose(untold[0], untold[1])

    again = train_judge(_config(data, tmp_path / "again", steps=1, upper_steps=0, lr=1e-9, init=tmp_path / "told"))
    assert again.judge.config.state_mean == result.judge.config.state_mean
    other = write_toy(tmp_path / "other.hdf5", [_blind(seed, robot=3) for seed in range(12)])
    for changes in ({"data": other}, {"data": data, "state": False}):
        with pytest.raises(InvalidArgument, match=r"init must be .* \(state=(True|False), data of [23] dims\)"):
            train_judge(_config(**{"out": tmp_path / "no", "init": tmp_path / "told", **changes}))  # type: ignore[arg-type]


def test_a_judge_of_frames_alone_goes_on_as_one_that_is_told(toy_data: Path, tmp_path: Path) -> None:
    alone = train_judge(_config(toy_data, tmp_path / "alone", steps=60, state=False)).judge
    told = train_judge(
        _config(toy_data, tmp_path / "told", steps=1, upper_steps=0, lr=1e-9, init=tmp_path / "alone")
    ).judge
    frames = torch.from_numpy(toy_episode(3).images_THWC)[None]
    poses = torch.randn(1, 10, 9)
    raw = [judge.calibrated(1.0, 0.5) for judge in (alone, told)]
    said = [episode_probabilities(judge, frames, agent_pos_BTP=poses) for judge in raw]
    assert told.state_dim == 9 and torch.allclose(*said, atol=2e-3)


def test_training_hides_agent_pos_at_times_and_adds_noise(toy_data: Path, tmp_path: Path) -> None:
    rows = label_rows([toy_episode(seed) for seed in range(8)])
    told = {"state_dim": 9, "state_mean": (0.0,) * 9, "state_std": (0.1,) * 9}
    judge = ClassifierJudge(ClassifierConfig("toy", 2, (16, 16), (4, 4, 4), 8, **told))  # type: ignore[arg-type]
    heard: list[torch.Tensor] = []
    judge.register_forward_pre_hook(lambda module, args: heard.append(args[1]))
    for hidden, noise in ((0.0, 0.01), (0.5, 0.0), (1.0, 0.01)):
        config = _config(toy_data, tmp_path, state_hidden=hidden, state_noise=noise, batch_size=256)
        batch = JudgeBatches(rows, config).batch(0)
        JudgeTraining(judge, config, None).loss(batch, torch.Generator().manual_seed(0))
        said, known = heard[-1][..., :-1], heard[-1][..., -1]
        assert torch.equal(known[:, 0], known[:, 1]) and torch.equal(said[:, 0], said[:, 1])  # the toy's hand rests
        assert float(known.mean()) == pytest.approx(1 - hidden, abs=0.1)
        assert float(said[known > 0].std()) == pytest.approx(noise / 0.1, rel=0.2) if hidden < 1 else not said.any()


def test_robots_of_different_size_are_not_told(tmp_path: Path) -> None:
    rows = label_rows([_blind(0), _blind(1, robot=3)])
    assert rows.agent_pos_FP.shape == (20, 0)
    with pytest.raises(InvalidArgument, match="state_hidden"):
        _config(tmp_path, tmp_path, state_hidden=1.5)


def test_temperature_and_threshold_undo_a_known_fault() -> None:
    generator = np.random.default_rng(0)
    logit = generator.normal(0, 2, 20_000)
    success = generator.random(20_000) < 1 / (1 + np.exp(-logit))
    assert fit_temperature(3 * logit, success) == pytest.approx(3.0, rel=0.06)
    optimist = 1 / (1 + np.exp(-(logit + 1.0)))
    threshold = fit_threshold(optimist, success)
    assert threshold > 0.6
    assert (optimist >= threshold).mean() == pytest.approx(success.mean(), abs=0.01)


def test_augmentations_keep_range_and_repeat_with_their_generator() -> None:
    frames = torch.rand(6, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    once = augment.augment(frames, torch.Generator().manual_seed(1))
    assert once.shape == frames.shape and once.min() >= -1 and once.max() <= 1
    assert torch.equal(once, augment.augment(frames, torch.Generator().manual_seed(1)))
    assert not torch.equal(once, augment.augment(frames, torch.Generator().manual_seed(2)))
    paused = augment.repeat_frames(frames, torch.Generator().manual_seed(0), share=1.0)
    assert torch.equal(paused, frames[:, -1:].expand_as(frames))
    smooth = augment.blur(frames, torch.Generator().manual_seed(0), share=1.0)
    assert smooth.std() < frames.std()
    assert torch.allclose(smooth.mean(), frames.mean(), atol=0.01)
    lossless = augment.compress_blocks(frames, torch.Generator().manual_seed(0), share=0.0)
    assert torch.equal(lossless, frames)
    lossy = augment.compress_blocks(frames, torch.Generator().manual_seed(0), share=1.0)
    assert 0 < float((lossy - frames).abs().mean()) < 0.2
