"""A tiny but real checkpoint for tests: random weights that make frames depend on actions, and verdicts vary."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from hma_gym.domains import Domain
from hma_gym.dynamics.body import BodyConfig
from hma_gym.dynamics.checkpoint import Checkpoint, start_bank
from hma_gym.dynamics.mar import FlowHeadConfig
from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.judges.classifier import ClassifierConfig, ClassifierJudge
from hma_gym.nn.transformer import TrunkConfig
from hma_gym.tokenizers import SoftConfig, SoftTokenizer, VQConfig, VQTokenizer

SIZE, STARTS, ACTION_DIM, STATE_DIM = 40, 6, 7, 9


def toy_domain(name: str = "lift", action_dim: int = ACTION_DIM, state_dim: int = STATE_DIM) -> Domain:
    return Domain(
        name=name,
        action_dim=action_dim,
        action_low=(-1.0,) * action_dim,
        action_high=(1.0,) * action_dim,
        action_mean=(0.0,) * action_dim,
        action_std=(0.5,) * action_dim,
        state_dim=state_dim,
        state_mean=(0.1,) * state_dim,
        state_std=(0.3,) * state_dim,
        delta_std=(0.01,) * state_dim,
        image_size=(SIZE, SIZE),
    )


def toy_checkpoint(*domains: Domain, judge: bool = True, task: str = "lift") -> Checkpoint:
    """Random weights, enlarged until frames move and the judge changes its mind; the same ones every time."""
    domains = domains or (toy_domain(),)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = SoftTokenizer(
            SoftConfig((SIZE, SIZE), (8, 8, 16), (16, 8, 8), (1, 1, 1), channels=4),
            torch.randint(256, (SIZE, SIZE, 3)).byte(),
        )
        trunk = TrunkConfig(layers=2, width=32, heads=2, window=4, mlp_ratio=2.0)
        head = FlowHeadConfig((5, 5), channels=4, patch=1, change_scale=0.5, flow_width=16, flow_layers=1, flow_steps=2)
        body = BodyConfig(history=2, octaves=1, coast_width=16, look_width=16, look_layers=1)
        dynamics = Dynamics(DynamicsConfig(trunk, head, body), domains)
        network = ClassifierJudge(ClassifierConfig("toy", 3, (SIZE, SIZE), (4, 4, 4), 8, threshold=0.3))
        for parameter in (*dynamics.parameters(), *tokenizer.decoder.parameters()):
            parameter.data += 0.2 * torch.randn_like(parameter)
        for parameter in network.parameters():
            parameter.data *= 3.0
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (STARTS, SIZE, SIZE, 3), dtype=np.uint8)
    with torch.no_grad():
        tokenizer.set_statistics(torch.from_numpy(frames))
    width = max(domain.state_dim for domain in domains)
    return Checkpoint(
        name="toy",
        task=task,
        tokenizer=tokenizer.eval().requires_grad_(False),
        dynamics=dynamics.eval().requires_grad_(False),
        judge=network.eval().requires_grad_(False) if judge else None,
        starts=start_bank(list(frames), list(rng.uniform(-0.3, 0.3, (STARTS, width)).astype(np.float32))),
    )


def discrete_checkpoint() -> Checkpoint:
    """The toy checkpoint with discrete tokens in place of soft ones."""
    soft = toy_checkpoint(judge=False)
    config = VQConfig((SIZE, SIZE), (4, 4, 4), (4, 4, 4), (1, 0, 0), levels=(4, 3), vocabulary=(12,))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tokenizer = VQTokenizer(config).eval().requires_grad_(False)
        head = MaskGITHeadConfig(tokenizer.grid, vocabulary=(12,))
        dynamics = Dynamics(dataclasses.replace(soft.dynamics.config, head=head), [toy_domain()])
    return dataclasses.replace(soft, tokenizer=tokenizer, dynamics=dynamics.eval().requires_grad_(False))


def told_checkpoint(refresh: int = 0) -> Checkpoint:
    """The same with a judge that heeds agent_pos, too."""
    checkpoint = toy_checkpoint()
    assert checkpoint.judge is not None
    checkpoint.dynamics.config = dataclasses.replace(checkpoint.dynamics.config, refresh=refresh)
    told = {"state_dim": STATE_DIM, "state_mean": (0.1,) * STATE_DIM, "state_std": (0.3,) * STATE_DIM}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = ClassifierJudge(dataclasses.replace(checkpoint.judge.config, **told))  # type: ignore[arg-type]
        assert judge.sense is not None
        torch.nn.init.normal_(judge.sense[-1].weight, std=3.0)
    judge.load_state_dict({**judge.state_dict(), **checkpoint.judge.state_dict()})
    return dataclasses.replace(checkpoint, judge=judge.eval().requires_grad_(False))
