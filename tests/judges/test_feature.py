"""The feature judge: tokens in, verdict out, without a pixel; it learns, is stored, and serves environments."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from judge_toy import toy_episode, toy_stills, write_toy
from torch import Tensor
from toy_checkpoint import ACTION_DIM, toy_checkpoint

from hma_gym.data.cache import build_token_cache
from hma_gym.data.robomimic_hdf5 import open_dataset
from hma_gym.dynamics.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hma_gym.dynamics.precision import with_precision
from hma_gym.envs.vector import HMAVectorEnv
from hma_gym.envs.world import LearnedWorld
from hma_gym.errors import CheckpointError, DatasetError, InvalidArgument, UnknownName
from hma_gym.judges import registry
from hma_gym.judges.feature import (
    EncodedFrames,
    FeatureConfig,
    FeatureJudge,
    build_feature_judge,
    load_feature_judge,
)
from hma_gym.judges.protocol import Judge, TokenJudge, episode_probabilities
from hma_gym.judges.rows import label_rows
from hma_gym.tokenizers import SoftConfig, SoftTokenizer
from hma_gym.tokenizers.files import save_tokenizer
from hma_gym.training.feature_judge import FeatureTrainConfig, token_rows, train_feature_judge

N = 3
SMALL = FeatureConfig(window=2, tokens=6, channels=3, hidden=16, width=8)


def _judge(config: FeatureConfig = SMALL) -> FeatureJudge:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = FeatureJudge(config)
        for parameter in judge.parameters():
            parameter.data *= 3.0  # until it changes its mind
    return judge.eval().requires_grad_(False)


def _tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _with_feature_judge(judge: bool = True) -> Checkpoint:
    checkpoint = toy_checkpoint(judge=judge)
    config = FeatureConfig(window=3, tokens=25, channels=4, hidden=16, width=8)
    return dataclasses.replace(checkpoint, feature_judge=_judge(config))


def test_every_frame_of_the_window_counts_and_rows_do_not_mix() -> None:
    judge, tokens = _judge(), _tokens(5, 2, 6, 3)
    said = judge.probability_of_tokens(tokens)
    assert said.shape == (5,) and said.dtype == torch.float32 and ((said > 0) & (said < 1)).all()
    assert judge.position_of_tokens(tokens).shape == (5, 3)
    assert torch.allclose(judge.probability_of_tokens(tokens[2:3]), said[2:3], atol=1e-6)
    for k in range(2):
        changed = tokens.clone()
        changed[:, k] += 1
        assert not torch.allclose(judge.probability_of_tokens(changed), said, atol=1e-3)
    assert isinstance(judge, TokenJudge) and not isinstance(judge, Judge)


def test_vq_tokens_are_read_as_the_digits_of_their_codes() -> None:
    judge = _judge(FeatureConfig(window=1, tokens=2, channels=0, vocabulary=(3, 5), hidden=8, width=4))
    numbers = judge.numbers(torch.tensor([[[0, 14]], [[4, 7]]]))
    assert torch.allclose(numbers, torch.tensor([[[-1.0, -1.0, 1.0, 1.0]], [[0.0, -0.5, 0.0, 0.0]]]))
    with pytest.raises(InvalidArgument, match="integer tokens of shape"):
        judge.numbers(torch.zeros(1, 1, 2, 2))


def test_foreign_tokens_and_impossible_configs_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"floating tokens of shape \(B, 2, 6, 3\)"):
        _judge().probability_of_tokens(_tokens(5, 2, 6, 4))
    for change in ({"window": 0}, {"channels": 0}, {"vocabulary": (4,)}, {"threshold": 0.0}, {"hidden": 0}):
        with pytest.raises(InvalidArgument):
            dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]


def test_storage_round_trip() -> None:
    judge, tokens = _judge(), _tokens(4, 2, 6, 3)
    again = build_feature_judge(json.loads(json.dumps(judge.config.to_dict())), judge.tensors())
    assert again.config == judge.config
    assert torch.allclose(again.probability_of_tokens(tokens), judge.probability_of_tokens(tokens), atol=5e-3)
    with pytest.raises(CheckpointError, match="window"):
        build_feature_judge({**judge.config.to_dict(), "window": 0}, judge.tensors())


# ---------------------------------------------------------------------- in environments


def test_a_checkpoint_keeps_it_and_does_without(tmp_path: Path) -> None:
    loaded = load_checkpoint(save_checkpoint(_with_feature_judge(), tmp_path / "with"))
    assert loaded.feature_judge is not None and loaded.judge is not None
    without = load_checkpoint(save_checkpoint(toy_checkpoint(), tmp_path / "without"))
    assert without.feature_judge is None
    config = json.loads((tmp_path / "without" / "config.json").read_text())
    del config["feature_judge"]  # as before there were any
    (tmp_path / "without" / "config.json").write_text(json.dumps(config))
    assert load_checkpoint(tmp_path / "without").feature_judge is None
    with pytest.raises(CheckpointError, match="no feature judge"):
        HMAVectorEnv(N, checkpoint=without, judge="feature")
    with pytest.raises(CheckpointError, match="no classifier judge"):
        HMAVectorEnv(N, checkpoint=_with_feature_judge(judge=False), judge="classifier")
    low = with_precision(loaded, "bfloat16")
    assert low.feature_judge is not None and low.feature_judge.hidden.weight.dtype == torch.bfloat16


def test_verdicts_need_no_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = _with_feature_judge()
    decoded: list[int] = []
    original = checkpoint.tokenizer.decode
    monkeypatch.setattr(checkpoint.tokenizer, "decode", lambda tokens: decoded.append(len(tokens)) or original(tokens))
    envs = HMAVectorEnv(N, checkpoint=checkpoint, judge="feature")
    steps = HMAVectorEnv(N, checkpoint=checkpoint, judge="feature")
    actions = np.random.default_rng(0).uniform(-1, 1, (N, 6, ACTION_DIM)).astype(np.float32)
    envs.reset(seed=0)
    chunk = envs.step_chunk(actions, decode="none")
    assert decoded == [] and chunk.observations is None
    steps.reset(seed=0)
    for t in range(6):
        observations, rewards, _, _, infos = steps.step(actions[:, t])
    assert decoded == [N] * 6
    assert np.array_equal(chunk.rewards, rewards)
    assert np.array_equal(chunk.infos["success_probability"], infos["success_probability"])
    assert np.array_equal(envs.observe(), observations)
    decoded.clear()
    envs.step_chunk(actions)
    assert decoded == [N]  # the classifier's window would take three


def test_what_it_says_in_an_environment_is_what_it_says_of_the_tokens() -> None:
    checkpoint = _with_feature_judge()
    judge = checkpoint.feature_judge
    assert judge is not None
    envs = HMAVectorEnv(N, checkpoint=checkpoint, judge="feature")
    _, infos = envs.reset(seed=0)
    tokens = [envs.save_state()["tensors"]["rollout.tokens"]] * 3
    said = []
    for action in np.random.default_rng(0).uniform(-1, 1, (8, N, ACTION_DIM)).astype(np.float32):
        expected = judge.probability_of_tokens(torch.stack(tokens[-3:], dim=1)).numpy()
        assert np.allclose(infos["success_probability"], expected, atol=1e-6)
        said.append(expected)
        _, _, _, _, infos = envs.step(action)
        tokens.append(envs.save_state()["tensors"]["rollout.tokens"])
    assert np.std(np.log(said)) > 0.5  # and they differ


def test_success_that_tokens_show_ends_an_episode_with_its_picture() -> None:
    checkpoint = _with_feature_judge()
    judge = checkpoint.feature_judge
    assert judge is not None
    actions = np.random.default_rng(0).uniform(-1, 1, (N, 8, ACTION_DIM)).astype(np.float32)
    plain = HMAVectorEnv(N, checkpoint=checkpoint, judge=judge, autoreset_mode="Disabled")
    plain.reset(seed=0)
    steps = [plain.step(actions[:, t]) for t in range(8)]
    probability_TN = np.stack([step[4]["success_probability"] for step in steps])
    surest = probability_TN.max(axis=0)
    i = int(surest.argmax())
    threshold = float(np.sort(surest)[-2:].mean())  # one reaches it, the others do not
    world = LearnedWorld(checkpoint, judge=judge.calibrated(1.0, threshold))
    envs = HMAVectorEnv(N, checkpoint=world, terminate_on_success=True, autoreset_mode="Disabled")
    envs.reset(seed=0)
    chunk = envs.step_chunk(actions)
    assert chunk.terminations.tolist() == [row == i for row in range(N)]
    end = int((probability_TN[:, i] >= threshold).argmax())
    assert chunk.steps[i] == end + 1 and chunk.rewards[i] == 1.0
    assert np.array_equal(chunk.observations[i], steps[end][0][i])


def test_a_token_judge_of_others_comes_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sum:
        name, window, threshold = "sum", 1, 0.5

        def probability_of_tokens(self, tokens_BK: Tensor) -> Tensor:
            return torch.sigmoid(tokens_BK.flatten(1).sum(dim=1))

    monkeypatch.setattr(registry, "_factories", {})
    registry.register_judge("sum", Sum)
    envs = HMAVectorEnv(N, checkpoint=toy_checkpoint(judge=False), judge="sum")
    assert envs.reset(seed=0)[1]["success_probability"].shape == (N,)
    with pytest.raises(InvalidArgument, match="probability"):
        registry.get_judge("sum")  # frames are not tokens
    with pytest.raises(UnknownName):
        registry.get_step_judge("product")


# ---------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights keep enough of a red square on grey."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SoftConfig((16, 16), (8, 8, 16), (8, 8, 8), (0, 0, 0), channels=16)
        made = SoftTokenizer(config, torch.full((16, 16, 3), 200, dtype=torch.uint8)).eval()
    return save_tokenizer(made, tmp_path_factory.mktemp("tokenizer"))


def _config(data: Path, tokenizer: Path, out: Path, **changes: object) -> FeatureTrainConfig:
    fields: dict[str, object] = {
        **{"data": data, "tokenizer": tokenizer, "out": out, "steps": 300, "window": 2, "hidden": 64, "width": 32},
        **{"token_noise": 0.0, "varied_episodes": 8, "decision_height": 0.85, "progress": False},
        **changes,
    }
    return FeatureTrainConfig(**fields)  # type: ignore[arg-type]


def test_it_learns_and_is_stored_with_its_report(toy_data: Path, tokenizer: Path, tmp_path: Path) -> None:
    result = train_feature_judge(_config(toy_data, tokenizer, tmp_path))
    assert result.measured.frames.accuracy > 0.9
    report = json.loads((tmp_path / "feature_report.json").read_text())
    assert report["frames"]["accuracy"] == result.measured.frames.accuracy
    again = load_feature_judge(tmp_path)
    tokens = _tokens(3, 2, 4, 16)
    assert torch.equal(again.probability_of_tokens(tokens), result.judge.probability_of_tokens(tokens))
    (tmp_path / "feature_judge.json").unlink()
    with pytest.raises(CheckpointError, match="hma-gym train feature-judge"):
        load_feature_judge(tmp_path)
    # the tokens are there now, and are those of one tokenizer only
    other = SoftTokenizer(SoftConfig((16, 16), (8, 8, 16), (8, 8, 8), (0, 0, 0), channels=16)).eval()
    with pytest.raises(DatasetError, match="another folder"):
        train_feature_judge(_config(toy_data, save_tokenizer(other, tmp_path / "other"), tmp_path))


def test_stills_are_read_one_by_one(tmp_path: Path) -> None:
    path = write_toy(tmp_path / "toy.hdf5", [toy_stills(1), toy_episode(0), toy_stills(2)])
    dataset = open_dataset(path)
    cache = build_token_cache(dataset, lambda frames: frames.float().mean(dim=(1, 2))[:, None], progress=False)
    rows, labelled = token_rows(dataset, cache, ("train",)), label_rows(list(dataset))
    for name in ("success_F", "position_F3", "first_F", "last_N"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(labelled, name))
    assert len(rows.last_N) == 21 and rows.success_F[:10].any()


def test_data_without_success_is_refused(data_without_success: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="one outcome"):
        train_feature_judge(_config(data_without_success, tokenizer, tmp_path))


def test_frames_are_read_through_the_tokenizer() -> None:
    checkpoint = _with_feature_judge()
    assert checkpoint.feature_judge is not None
    judge = EncodedFrames(checkpoint.feature_judge, checkpoint.tokenizer)
    frames = torch.from_numpy(checkpoint.starts.frames_NHWC[None, :4])
    tokens = checkpoint.tokenizer.encode(frames[:, 1:4])
    said = episode_probabilities(judge, frames, torch.tensor([3]))[:, 0]
    assert isinstance(judge, Judge)
    assert torch.allclose(said, checkpoint.feature_judge.probability_of_tokens(tokens), atol=1e-5)
