"""The soft heads: they learn distributions, not only means, and give the closed form where there is one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from toy_dynamics import SOFT, batch, begin, domain, fit, model, rollout, tokens

from hma_gym.dynamics.heads import Draw, Scene
from hma_gym.dynamics.mar import Diffusion, DiffusionHeadConfig, FlowHeadConfig, SoftHead, SoftHeadConfig
from hma_gym.dynamics.masking import masked_after
from hma_gym.dynamics.model import Dynamics, DynamicsConfig
from hma_gym.errors import CheckpointError, InvalidArgument
from hma_gym.nn.transformer import TrunkConfig

WIDTH = 8
Kind = tuple[type[SoftHeadConfig], dict[str, object]]
FLOW: Kind = (FlowHeadConfig, {"flow_steps": 16})
RESIDUAL: Kind = (DiffusionHeadConfig, {"flow_steps": 25})
LATENT: Kind = (DiffusionHeadConfig, {"flow_steps": 25, "predicts": "latent"})
EACH = pytest.mark.parametrize("kind", [FLOW, RESIDUAL, LATENT], ids=["flow", "residual", "latent"])
TOY = DiffusionHeadConfig((4, 4), 3, 2, change_scale=0.5, flow_width=16, flow_layers=1, flow_steps=3, train_steps=10)


def _head(kind: Kind = FLOW, **fields: object) -> SoftHead:
    torch.manual_seed(0)
    settings = {"grid": (2, 2), "channels": 2, "patch": 1, "flow_width": 32, "flow_layers": 2}
    config = kind[0](**{**settings, **kind[1], **fields})  # type: ignore[arg-type]
    return SoftHead(config, WIDTH)


def _draw(rows: int, step: int = 0) -> Draw:
    return Draw(torch.arange(rows), torch.full((rows,), step), 0)


def _fit(head: SoftHead, draw: Callable[[torch.Generator], tuple[Tensor, Tensor]], steps: int = 400) -> None:
    """Train on features (B, 1, 4, D) and the changes (B, 1, 4, 2) that follow them, drawn anew at every step.

    A head of latents knows the previous tokens by the features alone, so these are zero.
    """
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    head.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
        features, change = draw(generator)
        previous = torch.zeros_like(change) if head.of_latents else torch.randn(change.shape, generator=generator)
        masked = torch.ones(features.shape[:3], dtype=torch.bool)
        loss, _ = head.loss(features, previous + change, Scene(previous, None), masked, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    head.eval().requires_grad_(False)


@EACH
def test_two_modes_stay_two_modes(kind: Kind) -> None:
    """The change is -0.8 or 0.8 in both channels of a token: its mean, 0, never happens."""
    head = _head(kind, change_scale=0.8)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        sign = torch.randint(2, (128, 1, 4, 1), generator=generator) * 2.0 - 1
        return torch.zeros(128, 1, 4, WIDTH), 0.8 * sign + 0.02 * torch.randn(128, 1, 4, 2, generator=generator)

    _fit(head, draw)
    rows = 200
    start = torch.zeros(rows, 4, 2)
    sampled, _ = head.sample(torch.zeros(rows, 4, WIDTH), Scene(start, None), _draw(rows), 1.0)
    near = (sampled.abs() - 0.8).abs() < 0.25
    assert near.float().mean() > 0.9
    assert ((sampled[..., 0] > 0) == (sampled[..., 1] > 0)).float().mean() > 0.95  # the channels agree
    assert abs(float((sampled > 0).float().mean()) - 0.5) < 0.1
    mean, _ = head.sample(torch.zeros(rows, 4, WIDTH), Scene(start, None), _draw(rows), 0.0)
    assert mean.abs().max() < 0.15


@EACH
def test_linear_gaussian_closed_form(kind: Kind) -> None:
    """change = A feature + noise: the mean is least squares, the spread around it the noise."""
    head = _head(kind, change_scale=1.0)
    noise, matrix = 0.2, 0.2 * torch.randn(WIDTH, 2, generator=torch.Generator().manual_seed(0))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        features = torch.randn(128, 1, 4, WIDTH, generator=generator)
        return features, features @ matrix + noise * torch.randn(128, 1, 4, 2, generator=generator)

    _fit(head, draw)
    rows = 300
    features = torch.randn(rows, 4, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted, previous = features @ matrix, torch.full((rows, 4, 2), 0.0 if head.of_latents else 1.0)
    mean, _ = head.sample(features, Scene(previous, None), _draw(rows), 0.0)
    assert float((mean - previous - wanted).abs().max()) < 0.05
    for temperature in (1.0,) if head.of_latents else (0.5, 1.0):  # a residual keeps the scale of its noise
        sampled, _ = head.sample(features, Scene(previous, None), _draw(rows), temperature)
        spread = sampled - previous - wanted
        assert abs(float(spread.mean())) < 0.03
        assert float(spread.std()) == pytest.approx(temperature * noise, rel=0.2)


@EACH
def test_only_masked_tokens_count(kind: Kind) -> None:
    head = _head(kind, flow_weight=0.5)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.eval()
    generator = torch.Generator().manual_seed(0)
    features, tokens = torch.randn(3, 2, 4, WIDTH), torch.randn(3, 2, 4, 2)
    previous = torch.randn(3, 2, 4, 2)
    masked = torch.rand(3, 2, 4, generator=generator) < 0.5
    other = torch.where(masked[..., None], tokens, tokens + 5.0)
    a, b, c = (
        float(head.loss(features, t, Scene(previous, None), masked, torch.Generator().manual_seed(1))[0].detach())
        for t in (tokens, other, tokens + 5.0)
    )
    assert a == pytest.approx(b, rel=1e-6) and a != pytest.approx(c, rel=1e-3)


def test_the_mean_learns_nothing_from_the_flow() -> None:
    """The flow models what the mean leaves over; the mean is regression alone."""
    head = _head()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    gradients = []
    for weight in (0.0, 10.0):
        head.config = FlowHeadConfig((2, 2), 2, 1, flow_weight=weight)
        head.zero_grad()
        loss, _ = head.loss(
            torch.ones(1, 1, 4, WIDTH),
            torch.ones(1, 1, 4, 2),
            Scene(torch.zeros(1, 1, 4, 2), None),
            torch.ones(1, 1, 4, dtype=torch.bool),
            torch.Generator().manual_seed(0),
        )
        loss.backward()  # type: ignore[no-untyped-call]
        assert head.mean_out.weight.grad is not None
        gradients.append(head.mean_out.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_patches_put_every_token_back_in_its_place() -> None:
    head = _head(grid=(4, 4), patch=2)
    tokens = torch.arange(16.0)[:, None] + torch.tensor([0.0, 0.5])
    assert torch.equal(head._unpatch(head._patch(tokens)), tokens)
    assert head._patch(tokens)[0].tolist() == [0.0, 0.5, 1.0, 1.5, 4.0, 4.5, 5.0, 5.5]
    masked = torch.zeros(1, 4, dtype=torch.bool)
    masked[0, 3] = True
    merged = head.merge(tokens[None], tokens[None] + 100, masked)
    assert [i for i in range(16) if merged[0, i, 0] >= 100] == [10, 11, 14, 15]


def test_corruption_has_one_level_a_row_within_its_bound() -> None:
    head = _head(grid=(8, 8), noise_max=0.3)
    tokens = torch.zeros(200, 4, 64, 2)
    level = head.corrupt(tokens, torch.Generator().manual_seed(0)).flatten(1).std(dim=1)
    assert float(level.max()) < 0.33 and abs(float(level.mean()) - 0.15) < 0.02 and float(level.std()) > 0.05


@EACH
def test_samples_depend_on_seed_and_step_only(kind: Kind) -> None:
    head = _head(kind)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    head.requires_grad_(False)
    features, previous = torch.ones(3, 4, WIDTH), torch.zeros(3, 4, 2)
    same = Draw(torch.tensor([7, 8, 7]), torch.tensor([2, 2, 2]), 0)
    sampled, _ = head.sample(features, Scene(previous, None), same, 1.0)
    assert torch.equal(sampled[0], sampled[2]) and not torch.equal(sampled[0], sampled[1])
    later, _ = head.sample(features, Scene(previous, None), Draw(same.seed_B, same.step_B + 1, 0), 1.0)
    assert not torch.equal(later[0], sampled[0])


@pytest.mark.parametrize("steps", [1, 4, 100])
def test_ddim_is_that_of_diffusers(steps: int) -> None:
    """The same weights and the same noise through diffusers' scheduler end in the same samples."""
    schedulers = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    torch.manual_seed(0)
    config = DiffusionHeadConfig(flow_steps=steps, flow_width=16, flow_layers=1, clip=1.5)
    diffusion = Diffusion(config, 3, 4, 0, 1).requires_grad_(False)
    torch.nn.init.normal_(diffusion.out.weight, std=0.3)
    scheduler = schedulers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        clip_sample=True,
        clip_sample_range=1.5,
        prediction_type="v_prediction",
    )
    torch.testing.assert_close(diffusion.kept[1:], scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6)
    scheduler.set_timesteps(steps)
    noise, context = torch.randn(5, 3), torch.randn(5, 4)
    theirs = noise
    for time in scheduler.timesteps:
        predicted = diffusion(theirs, torch.full((5, 1), (float(time) + 1) / 1000), context)
        theirs = scheduler.step(predicted, time, theirs, use_clipped_model_output=True).prev_sample
    ours = diffusion.sample(noise, context)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert float(ours.abs().max()) <= 1.5 and float(ours.std()) > 0.1


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="patch must divide the grid"):
        FlowHeadConfig((8, 7), patch=2)
    for kind in (FlowHeadConfig, DiffusionHeadConfig):
        with pytest.raises(InvalidArgument, match="flow_steps must be at least 1, got 0"):
            kind(flow_steps=0)
    with pytest.raises(InvalidArgument, match="at most train_steps, got 11 and 10"):
        DiffusionHeadConfig(flow_steps=11, train_steps=10)
    with pytest.raises(InvalidArgument, match="'latent' or 'residual', got 'noise'"):
        DiffusionHeadConfig(predicts="noise")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="clip=0.0"):
        DiffusionHeadConfig(clip=0.0)


# ---------------------------------------------------------------- the heads in the model


def test_a_diffusion_head_survives_its_config() -> None:
    dynamics = model("soft", head=TOY)
    fields = json.loads(json.dumps(dynamics.config.to_dict()))
    assert fields["head"]["kind"] == "diffusion" and DynamicsConfig.from_dict(fields) == dynamics.config
    fields["head"]["kind"] = "soft"
    with pytest.raises(CheckpointError, match="FlowHeadConfig.*unknown.*train_steps"):
        DynamicsConfig.from_dict(fields)


@pytest.mark.parametrize("conditioning", ["shifted", "in_place"])
@pytest.mark.parametrize("head", [SOFT, TOY], ids=["flow", "diffusion"])
def test_one_and_two_unmasking_steps_leave_unmasked_tokens_untouched(head: SoftHeadConfig, conditioning: str) -> None:
    """Every token is drawn once, in the step that unmasks it: what a step gave for other tokens never shows."""
    for steps in (1, 2):
        dynamics = model("soft", head=head, conditioning=conditioning, decode_steps=steps)
        clip = batch("soft", dynamics, 3, 1)
        drawn: list[tuple[Tensor, Tensor]] = []
        original = dynamics.head.merge

        def spy(old: Tensor, new: Tensor, masked_BN: Tensor) -> Tensor:
            drawn.append((new, masked_BN))  # noqa: B023
            return original(old, new, masked_BN)  # noqa: B023

        dynamics.head.merge = spy  # type: ignore[method-assign]
        _, out = next(rollout(dynamics, begin(dynamics, clip), clip["actions"]))
        left = [4, masked_after(0, 2, 4)][:steps]
        assert [int(masked.sum()) for _, masked in drawn] == [3 * count for count in left]
        shown = dynamics.head._patch(out.tokens)
        for step, (new, masked_BN) in enumerate(drawn):
            stays = masked_BN & ~drawn[step + 1][1] if step + 1 < steps else masked_BN
            assert torch.equal(dynamics.head._patch(new)[stays], shown[stays])


def test_a_cached_rollout_of_the_diffusion_head_equals_one_uncached_pass() -> None:
    dynamics = model("soft", head=TOY)
    clip = batch("soft", dynamics, 2, 9)
    state = begin(dynamics, clip)
    shown, pos, features = [state.tokens], [state.agent_pos_BP], []
    for _, out in rollout(dynamics, state, clip["actions"]):
        shown.append(out.tokens)
        pos.append(out.agent_pos_BP)
        features.append(out.features_BD)
    columns = dynamics.clip_features(
        tokens("soft", 2, 9, seed=5),  # hidden
        torch.stack(shown[:-1], 1),
        torch.ones(2, 9, dynamics.head.positions, dtype=torch.bool),
        dynamics.normalise_actions(clip["actions"], clip["domain"]),
        torch.ones(2, 9, dtype=torch.bool),
        torch.stack(pos[:-1], 1),
        torch.zeros(2, 9, 0),
        clip["domain"],
        torch.ones(2, dtype=torch.bool),
    )
    torch.testing.assert_close(torch.stack(features, 1), columns.pooled_BTD, rtol=1e-4, atol=1e-5)


ACTION, SHARED, OWN = 0.8, 0.6, 0.3


def _gaussian(rows: int, seed: int) -> dict[str, Tensor]:
    """Two tokens of one number: ACTION * the action + SHARED * what they share + OWN * their own; the past is 0."""
    generator = torch.Generator().manual_seed(seed)
    action = torch.randn(rows, 1, 1, generator=generator)
    shared = torch.randn(rows, 1, 1, generator=generator)
    own = torch.randn(rows, 1, 2, generator=generator)
    frame = ACTION * action + SHARED * shared + OWN * own
    return {"tokens": torch.cat((torch.zeros_like(frame), frame), dim=1)[..., None], "actions": action}


def _predicted(dynamics: Dynamics, clip: dict[str, Tensor], masked_BTN: Tensor, temperature: float) -> Tensor:
    """What the head gives for the second frame of the clip, the tokens told masked, (B, 2)."""
    rows = len(clip["tokens"])
    given, domain_B = torch.ones(rows, 1, dtype=torch.bool), torch.zeros(rows, dtype=torch.int64)
    actions = dynamics.normalise_actions(clip["actions"], domain_B)
    nothing = torch.zeros(rows, 1, 0)  # neither a robot nor an object
    previous = clip["tokens"][:, :1]
    columns = dynamics.clip_features(
        clip["tokens"][:, 1:], previous, masked_BTN, actions, given, nothing, nothing, domain_B
    )
    scene = Scene(previous[:, 0], None if columns.drawn is None else columns.drawn[:, 0])
    return dynamics.head.sample(columns.tokens_BTND[:, 0], scene, _draw(rows), temperature)[0][..., 0]


def test_one_and_all_masked_tokens_have_their_closed_forms() -> None:
    """Two jointly Gaussian tokens: both hidden, the mean is the action's part; one hidden, the other tells of it."""
    head = FlowHeadConfig((1, 2), 1, 1, change_scale=1.0, flow_width=32, flow_layers=1, flow_steps=8, noise_max=0.0)
    trunk = TrunkConfig(layers=1, width=32, heads=1, window=2)
    owner = domain(actions=1, state=0, targets=0)
    dynamics = model("soft", owner, trunk=trunk, head=head, mask_full=0.1, mask_minimum=0.0)
    dynamics.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(dynamics.parameters(), lr=2e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 400)
        dynamics.loss(_gaussian(256, 1 + step), generator)[0].backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    dynamics.eval().requires_grad_(False)
    clip = _gaussian(400, seed=0)
    frame, actions = clip["tokens"][:, 1, :, 0], clip["actions"][:, :, 0]
    both, one = torch.ones(400, 1, 2, dtype=torch.bool), torch.tensor([True, False]).expand(400, 1, 2)
    by_action = ACTION * actions
    by_other = by_action + SHARED**2 / (SHARED**2 + OWN**2) * (frame[:, 1:] - by_action)
    error = (_predicted(dynamics, clip, both, 0.0) - by_action).square().mean().sqrt()
    assert float(error) < 0.15
    error = (_predicted(dynamics, clip, one, 0.0)[:, :1] - by_other).square().mean().sqrt()
    assert float(error) < 0.2 < 0.4 * float((by_other - by_action).std())
    spread = (_predicted(dynamics, clip, both, 1.0) - by_action).std()
    assert float(spread) == pytest.approx((SHARED**2 + OWN**2) ** 0.5, rel=0.2)


def test_actions_can_be_diffused_with_a_head_of_their_own() -> None:
    """Eq. 3 for actions: from the same picture the data takes -1 or 1, never the mean."""
    head = DiffusionHeadConfig(
        (2, 2), 1, 1, flow_width=32, flow_layers=1, flow_steps=10, train_steps=100, action_layers=2
    )
    dynamics = model("soft", domain(actions=1, state=0, targets=0), head=head, action_mask=1.0, action_weight=1.0)

    def batches() -> Iterator[dict[str, Tensor]]:
        for seed in itertools.count():
            sign = torch.randint(2, (64, 1, 1), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
            yield {"tokens": torch.zeros(64, 2, 4, 1), "actions": sign}

    fit(dynamics, batches(), 300, lr=1e-2)
    state = dynamics.start(torch.zeros(200, 4, 1), None, torch.arange(200))
    action = dynamics.act(state)
    assert action.shape == (200, 1)
    assert float(((action.abs() - 1).abs() < 0.3).float().mean()) > 0.9
    assert abs(float((action > 0).float().mean()) - 0.5) < 0.15
    torch.testing.assert_close(dynamics.act(state.select(torch.arange(3))), action[:3], rtol=1e-4, atol=1e-4)
    assert not torch.equal(dynamics.act(state.reseed(torch.arange(200) + 7)), action)
    groups = {id(p) for group in dynamics.requires_grad_(True).parameter_groups() for p in group.parameters}
    assert all(id(p) in groups for p in dynamics.adapter(0).action_out.parameters())
