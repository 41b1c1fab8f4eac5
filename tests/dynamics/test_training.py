"""Training: forward, passive and policy dynamics are learned by one model; losses are functions of their generator."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from toy_dynamics import TRUNK, batch, begin, domain, fit, model

from hma_gym.dynamics.maskgit import MaskGITHeadConfig
from hma_gym.dynamics.model import Dynamics
from hma_gym.errors import InvalidArgument
from hma_gym.nn.vocabulary import join_factors, split_factors

KINDS = ["soft", "vq"]
MODES = [(kind, conditioning) for kind in KINDS for conditioning in ("shifted", "in_place")]


def _loss(dynamics: Dynamics, clip: dict[str, Tensor], seed: int = 0) -> tuple[float, dict[str, float]]:
    loss, metrics = dynamics.loss(clip, torch.Generator().manual_seed(seed))
    return float(loss), {name: float(value) for name, value in metrics.items()}


@pytest.mark.parametrize(("kind", "conditioning"), MODES)
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_loss_is_a_pure_function_of_its_generator(kind: str, conditioning: str, share: float) -> None:
    domains = (domain("small", actions=2), domain("large", actions=14, state=0, targets=0))
    dynamics = model(kind, *domains, conditioning=conditioning, rollout_share=share, rollout_max=3, action_mask=0.3)
    clip = batch(kind, dynamics, 4, 6)
    state = torch.get_rng_state()
    first = _loss(dynamics, clip)
    assert _loss(dynamics, clip) == first
    assert _loss(dynamics, clip, seed=1)[0] != first[0]
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn from torch's own generator


@pytest.mark.parametrize(("kind", "conditioning"), MODES)
def test_every_parameter_learns(kind: str, conditioning: str) -> None:
    domains = (domain("small", actions=2), domain("large", actions=14, state=0, targets=0))
    dynamics = model(
        kind, *domains, conditioning=conditioning, action_mask=0.5, mask_full=0.3, action_tokens=2, rollout_share=0.0
    ).requires_grad_(True)
    dynamics.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        loss, _ = dynamics.loss(batch(kind, dynamics, 8, 4), generator)
        loss.backward()  # type: ignore[no-untyped-call]
    idle = [n for n, p in dynamics.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    unused = ["adapters.large.state_out", "adapters.large.target_out", "adapters.large.state_in.weight"]
    if conditioning == "in_place":
        unused.append("head.previous_in")  # frames hold their own tokens only
        unused.append("adapters.large.pose.0.weight")  # no position, and in place no motion
    assert [name for name in idle if not name.startswith(tuple(unused))] == []


def test_own_rollouts_are_what_the_model_is_trained_on() -> None:
    """The columns of a clip that begins after r own steps are given the frames of that rollout, without gradient."""
    dynamics = model("soft", rollout_share=1.0, rollout_max=2, mask_full=1.0, action_mask=0.0)
    clip = batch("soft", dynamics, 3, 5)
    seen: list[Tensor] = []
    original = dynamics.clip_features

    def spy(current: Tensor, previous: Tensor, *rest: Tensor) -> object:
        seen.append(previous)
        return original(current, previous, *rest)

    dynamics.clip_features = spy  # type: ignore[method-assign,assignment]
    dynamics.requires_grad_(True)
    starts = set()
    for seed in range(24):
        seen.clear()
        loss, _ = dynamics.loss(clip, torch.Generator().manual_seed(seed))
        previous = seen[0]
        assert previous.shape[1] == 3 and not previous.requires_grad
        first = [t for t in range(6) if torch.equal(previous[:, 0], clip["tokens"][:, t])]
        starts.add(bool(first))
        assert first in ([0], [])  # either the real first frame, or a generated one: never a later real frame
    assert starts == {True, False}


def test_training_without_actions_is_passive() -> None:
    """No dummy actions: the key is left out, and what is learned about actions is nothing."""
    dynamics = model("soft").requires_grad_(True)
    clip = batch("soft", dynamics, 2, 3)
    del clip["actions"], clip["targets"]
    loss, metrics = dynamics.loss(clip, torch.Generator().manual_seed(0))
    loss.backward()  # type: ignore[no-untyped-call]
    adapter = dynamics.adapter(0)
    assert float(metrics["action_loss"]) == 0.0 and float(metrics["target_loss"]) == 0.0
    assert adapter.stem[0].weight.grad is None or not adapter.stem[0].weight.grad.any()  # type: ignore[union-attr]
    assert adapter.no_action.grad is not None and adapter.no_action.grad.any()
    nothing = model("soft", domain(actions=0))
    clip = batch("soft", nothing, 2, 3)
    assert clip["actions"].shape == (2, 3, 0)
    assert torch.isfinite(nothing.loss(clip, torch.Generator().manual_seed(0))[0])


def test_unknown_actions_are_no_target_of_the_policy() -> None:
    """Where the data has no action, zeros in its place must not teach the action head."""
    dynamics = model("soft", action_mask=0.0)
    clip = batch("soft", dynamics, 2, 3)
    assert _loss(dynamics, {**clip, "given": torch.zeros(2, 3, dtype=torch.bool)})[1]["action_loss"] == 0.0
    hidden = model("soft", action_mask=1.0)
    assert _loss(hidden, clip)[1]["action_loss"] > 0.0


def test_clips_of_the_wrong_length_are_refused() -> None:
    dynamics = model("soft", rollout_share=0.5, rollout_max=4)
    with pytest.raises(InvalidArgument, match="longer than rollout_max = 4"):
        _loss(dynamics, batch("soft", dynamics, 2, 4))
    learned = model("soft", trunk=type(TRUNK)(layers=1, width=32, heads=2, window=4, positions="learned"))
    assert _loss(learned, batch("soft", learned, 2, 4))[0] > 0
    with pytest.raises(InvalidArgument, match="at most 4 frames"):
        _loss(learned, batch("soft", learned, 2, 5))


# ---------------------------------------------------------------- a small world that one model learns in every mode


def _world(kind: str, rows: int, frames: int, seed: int) -> dict[str, Tensor]:
    """A place moves by half of the action; a colour shows which way actions tend to go: 3 in 4 are +1 or -1 by it.

    Soft tokens: channel 0 is the place, channel 1 the colour. Discrete: the first factor counts places round a ring of
    four, the second is the colour. agent_pos is the place, and the target twice the place.
    """
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(2, (rows, 1), generator=generator) * 2.0 - 1
    follows = torch.rand(rows, frames, generator=generator) < 0.75
    action = torch.where(follows, colour, torch.randint(2, (rows, frames), generator=generator) * 2.0 - 1)
    moved = torch.cat((torch.zeros(rows, 1), action.cumsum(dim=1)), dim=1)
    if kind == "soft":
        place = 0.5 * moved
        frame = torch.stack((place, colour.expand_as(place), torch.zeros_like(place)), dim=-1)
    else:
        place = (moved + torch.randint(4, (rows, 1), generator=generator)) % 4
        frame = join_factors(torch.stack((place, (colour + 1).expand_as(place)), dim=-1).long(), (4, 3))
    return {
        "tokens": frame[:, :, None].expand(-1, -1, 16, *frame.shape[2:]),
        "actions": action[..., None],
        "agent_pos": 0.5 * moved[..., None],
        "targets": moved[..., None],
        "domain": torch.zeros(rows, dtype=torch.int64),
        "at_rest": torch.ones(rows, dtype=torch.bool),
    }


def _batches(kind: str, frames: int) -> Iterator[dict[str, Tensor]]:
    for seed in itertools.count(1000):
        yield _world(kind, 24, frames, seed)


def _place(kind: str, shown: Tensor) -> Tensor:
    return shown[..., 0].mean(dim=-1) if kind == "soft" else split_factors(shown, (4, 3))[..., 0].float().mean(dim=-1)


def _distance(kind: str, a: Tensor, b: Tensor) -> float:
    """Mean distance of places; discrete ones lie on a ring of four."""
    away = (a - b).abs()
    return float((away if kind == "soft" else torch.minimum(away % 4, -away % 4)).mean())


@pytest.mark.parametrize(
    ("kind", "conditioning", "frames", "steps", "lr"),
    [("soft", "shifted", 4, 400, 5e-3), ("vq", "shifted", 4, 250, 3e-3), ("vq", "in_place", 2, 700, 2e-3)],
)
def test_forward_passive_policy_and_full_dynamics_in_one_model(
    kind: str, conditioning: str, frames: int, steps: int, lr: float
) -> None:
    owner = domain(actions=1, state=1, targets=1)
    head = {"head": MaskGITHeadConfig((4, 4), (4, 3), patch=2, corrupt_max=0.0)} if kind == "vq" else {}
    dynamics = model(kind, owner, conditioning=conditioning, action_mask=0.4, temperature=0.0, **head)
    losses = fit(dynamics, _batches(kind, frames), steps, lr)
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])
    clip = _world(kind, 32, 4, seed=1)
    first, second = clip["tokens"][:, 0], clip["tokens"][:, 1]
    colour = clip["tokens"][:, 0, 0, 1] if kind == "soft" else split_factors(first, (4, 3))[:, 0, 1].float() - 1
    before = _place(kind, first)

    # forward: the frame goes where the action sends it, whatever the colour says, for several steps
    for sign in (1.0, -1.0):
        state, place = begin(dynamics, clip), before
        for _ in range(2):
            state, out = dynamics.step(state, torch.full((32, 1), sign))
            place = place + 0.5 * sign if kind == "soft" else place + sign
        assert _distance(kind, _place(kind, out.tokens), place) < 0.15, sign
        assert float((out.agent_pos_BP[:, 0] - sign).abs().mean()) < 0.25
    state, out = dynamics.step(begin(dynamics, clip), clip["actions"][:, 0])
    assert _distance(kind, _place(kind, out.tokens), _place(kind, second)) < 0.15

    # passive and full: without an action it goes where actions tend to go, and the action is guessed from the frame
    start = begin(dynamics, clip)
    _, out = dynamics.step(start, None)
    if kind == "soft":
        moved = _place(kind, out.tokens) - before
        assert float((moved - 0.5 * 0.75 * colour).abs().mean()) < 0.15
    else:
        assert _distance(kind, _place(kind, out.tokens), before + colour) < 0.15

    # policy: the mean of the actions that the data takes here
    action = dynamics.act(start)[:, 0]
    assert float((action - 0.75 * colour).abs().mean()) < 0.25
