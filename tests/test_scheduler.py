"""scheduler.py against diffusers, torch.distributions, DDPM's posterior, numbers worked by hand."""

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import SD, TOY, normal
from scheduler import (
    NoiseSchedule,
    Sampler,
    UserError,
    add_noise,
    ddim_mean_std,
    ddim_std,
    expand,
    gaussian_log_prob,
    named_noise,
    predicted_x0,
    require,
)


def both(steps_offset=1, set_alpha_to_one=False, **more):
    """Our schedule and diffusers' DDIM."""
    config = {**SD, "steps_offset": steps_offset, "set_alpha_to_one": set_alpha_to_one, **more}
    return NoiseSchedule.from_config(config), DDIMScheduler(**config)


def sd_sampler(T=50, eta=1.0, **config):
    return Sampler(both(**config)[0], T, eta)


# --- against diffusers ----------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("count", [1000, 300])
def test_noise_schedule_equals_diffusers_bit_for_bit(schedule, count):
    ours, theirs = both(beta_schedule=schedule, num_train_timesteps=count)
    assert ours.alphas_bar.dtype == torch.float32
    assert torch.equal(ours.alphas_bar, theirs.alphas_cumprod)
    assert ours.final_alpha_bar == theirs.final_alpha_cumprod.item()


def test_fields_missing_from_a_config_have_diffusers_defaults():
    config = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    ours, theirs = NoiseSchedule.from_config(config), DDIMScheduler(**config)
    assert len(ours.alphas_bar) == 1000
    assert (ours.steps_offset, ours.final_alpha_bar) == (theirs.config.steps_offset, 1.0)
    assert theirs.final_alpha_cumprod == 1


# with offset 1, T = 1000 would need timestep 1000
GRID = [(T, offset) for T in (1, 5, 7, 20, 50) for offset in (0, 1)] + [(1000, 0)]


@pytest.mark.parametrize("T, offset", GRID)
def test_timesteps_equal_diffusers(T, offset):
    ours, theirs = both(offset)
    theirs.set_timesteps(T)
    assert torch.equal(Sampler(ours, T, 1.0).timesteps, theirs.timesteps)


def in_precision(ours, theirs, precision):
    """Both schedules' alpha_bar in another float type, and no longer in float32."""
    ours.alphas_bar = ours.alphas_bar.to(precision)
    theirs.alphas_cumprod = theirs.alphas_cumprod.to(precision)
    if hasattr(theirs, "final_alpha_cumprod"):
        theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.to(precision)


def not_in_order(timesteps):
    """In training a batch's timesteps are in any order; of a thousand, every 37th will do."""
    return timesteps.flip(0) if len(timesteps) < 1000 else timesteps[::37]


PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-6)]


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T, offset", GRID)
def test_mean_std_and_step_of_all_timesteps_in_one_batch_equal_diffusers(
    T, offset, eta, set_alpha_to_one, precision, tolerance
):
    """In float64 only the formula can differ.

    In float32 (eps 1.2e-7) a few roundings, of numbers as large as the largest: 2e-6 of it.
    """
    ours, theirs = both(offset, set_alpha_to_one)
    in_precision(ours, theirs, precision)
    theirs.set_timesteps(T)
    timesteps = not_in_order(theirs.timesteps)
    B = len(timesteps)
    eps, x_t, noise = (normal(B, 4, 2, 3, seed=seed).to(precision) for seed in (1, 2, 3))
    zero, one = torch.zeros_like(eps), torch.ones_like(eps)

    def diffusers_steps(eps, x_t, noise):
        rows = zip(timesteps.tolist(), eps.split(1), x_t.split(1), noise.split(1), strict=True)
        return torch.cat(
            [theirs.step(e, t, x, eta=eta, variance_noise=z).prev_sample for t, e, x, z in rows]
        )

    their_mean = diffusers_steps(eps, x_t, zero)
    their_std = diffusers_steps(zero, zero, one)[:, 0, 0, 0]  # x = eps = 0 leaves sigma alone
    their_prev = diffusers_steps(eps, x_t, noise)

    sampler = Sampler(ours, T, eta)
    mean, std = sampler.mean_std(eps, x_t, timesteps)
    x_prev, *again = sampler.step(eps, x_t, timesteps, noise)
    largest = their_mean.abs().max()
    assert mean.dtype == std.dtype == x_prev.dtype == precision
    assert torch.allclose(mean, their_mean, rtol=0, atol=tolerance * largest)
    assert torch.allclose(std, their_std, rtol=tolerance, atol=0)
    assert torch.allclose(x_prev, their_prev, rtol=0, atol=tolerance * largest)
    assert torch.equal(again[0], mean) and torch.equal(again[1], std)
    log_prob = gaussian_log_prob(x_prev, mean, std)
    assert log_prob.dtype == torch.float32 and log_prob.isfinite().all()


@pytest.mark.parametrize("precision, tolerance", PRECISIONS)
@pytest.mark.parametrize("T, offset", [(50, 0), (50, 1), (1000, 0)])
def test_predicted_x0_equals_diffusers(T, offset, precision, tolerance):
    ours, theirs = both(offset)
    in_precision(ours, theirs, precision)
    theirs.set_timesteps(T)
    timesteps = not_in_order(theirs.timesteps)
    eps, x_t = (normal(len(timesteps), 4, 2, 3, seed=seed).to(precision) for seed in (1, 2))
    expected = torch.cat(
        [
            theirs.step(eps[i : i + 1], t, x_t[i : i + 1]).pred_original_sample
            for i, t in enumerate(timesteps.tolist())
        ]
    )
    x_0 = predicted_x0(eps, x_t, ours.alphas_bar[timesteps])
    assert torch.allclose(x_0, expected, rtol=tolerance, atol=tolerance * x_t.abs().max())


def test_add_noise_equals_diffusers_with_mixed_timesteps():
    ours, theirs = both()
    timesteps = torch.tensor([0, 1, 500, 981, 999])
    x_0, noise = normal(5, 4, 2, 3), normal(5, 4, 2, 3, seed=1)
    expected = theirs.add_noise(x_0, noise, timesteps)
    x_t = add_noise(x_0, noise, ours.alphas_bar[timesteps])
    assert torch.allclose(x_t, expected, rtol=0, atol=1e-6)


class LargeVariance(Sampler):
    """DDPM with the other of Ho et al.'s variances: std^2 = 1 - alpha_bar_t / alpha_bar_prev."""

    def mean_std(self, eps, x_t, timesteps):
        alpha_bar_t, alpha_bar_prev = self.alpha_bar(timesteps)
        mean, _ = ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, self.eta)
        return mean, (1 - alpha_bar_t / alpha_bar_prev).sqrt()


@pytest.mark.parametrize("precision, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("T, offset", [(50, 0), (50, 1), (333, 1), (1000, 0)])
@pytest.mark.parametrize("cls, variance", [(Sampler, "small"), (LargeVariance, "large")])
def test_a_sampler_with_another_mean_std_steps_as_diffusers_ddpm(
    cls, variance, T, offset, precision, tolerance, monkeypatch
):
    """Their DDPM ends at alpha_bar = 1; it adds no noise at t = 0, and clips variances at 1e-20.

    Their mean is another formula: in float32, small betas lose digits differently (1e-5).
    """
    ours, _ = both(offset, True)
    config = {name: value for name, value in SD.items() if name != "set_alpha_to_one"}
    theirs = DDPMScheduler(
        **{**config, "steps_offset": offset, "variance_type": f"fixed_{variance}"}
    )
    in_precision(ours, theirs, precision)
    theirs.set_timesteps(T)
    timesteps = not_in_order(theirs.timesteps)
    timesteps = timesteps[timesteps > 0]
    B = len(timesteps)
    eps, x_t, noise = (normal(B, 4, 2, 3, seed=seed).to(precision) for seed in (1, 2, 3))

    def diffusers_steps(noise):
        rows = []
        for i, t in enumerate(timesteps.tolist()):
            drawn = noise[i : i + 1]
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, z=drawn, **k: z)
            rows.append(theirs.step(eps[i : i + 1], t, x_t[i : i + 1]).prev_sample)
        return torch.cat(rows)

    x_prev, mean, std = cls(ours, T, 1.0).step(eps, x_t, timesteps, noise)
    their_mean, their_prev = diffusers_steps(torch.zeros_like(noise)), diffusers_steps(noise)
    largest = their_mean.abs().max()
    assert torch.allclose(mean, their_mean, rtol=0, atol=tolerance * largest)
    assert torch.allclose(x_prev, their_prev, rtol=0, atol=tolerance * largest + 1e-9)
    assert torch.allclose(std, ((their_prev - their_mean) / noise)[:, 0, 0, 0], rtol=1e-3)


# --- Stable Diffusion's own numbers ---------------------------------------------------------------


def test_sd_v1_4_with_50_steps_visits_981_961_to_1():
    assert sd_sampler().timesteps.tolist() == list(range(981, 0, -20))
    assert sd_sampler().timesteps.dtype == torch.int64


def test_sd_v1_4_last_step_still_has_a_sigma_of_0_0206():
    zero = torch.zeros(1, 4, 2, 2)
    x_prev, mean, std = sd_sampler().step(zero, zero, torch.tensor([1]), zero)
    assert std.item() == pytest.approx(0.0206, abs=5e-5)
    assert gaussian_log_prob(x_prev, mean, std).isfinite().all()


def test_a_schedule_that_ends_at_the_clean_picture_has_a_deterministic_last_step():
    """What makes log p NaN in other codes: std is 0, x_{t-1} the predicted x_0, log p 0."""
    sampler = sd_sampler(steps_offset=0, set_alpha_to_one=True)
    eps, x_t, noise = (normal(1, 4, 2, 2, seed=seed) for seed in (0, 1, 2))
    x_prev, mean, std = sampler.step(eps, x_t, torch.tensor([0]), noise)
    ab = sampler.schedule.alphas_bar[0]
    assert torch.allclose(x_prev, (x_t - (1 - ab).sqrt() * eps) / ab.sqrt(), atol=1e-6)
    assert std.item() == 0
    assert gaussian_log_prob(x_prev, mean, std).item() == 0


def test_alpha_bar_now_and_at_the_next_step_by_hand():
    sampler = Sampler(TOY, 3, 1.0)
    assert sampler.timesteps.tolist() == [11, 7, 3]
    now, after = sampler.alpha_bar(torch.tensor([3, 11, 7]))
    assert now.tolist() == TOY.alphas_bar[[3, 11, 7]].tolist()
    assert after[1:].tolist() == TOY.alphas_bar[[7, 3]].tolist()
    assert after[0].item() == pytest.approx(0.9)  # the schedule's own end
    after = Sampler(TOY, 2, 1.0).alpha_bar(torch.tensor([9, 6, 5]))[1]
    assert after[:2].tolist() == TOY.alphas_bar[[3, 0]].tolist()  # timestep 0 is not the end yet
    assert after[2].item() == pytest.approx(0.9)


# --- predicted_x0, ddim_std, ddim_mean_std --------------------------------------------------------


def one(value, dtype=torch.float64):
    return torch.tensor([value], dtype=dtype)


def pixel(value):
    return one(value).view(1, 1, 1, 1)


def scalar_step(eps, x_t, ab_t, ab_prev, eta):
    """ddim_mean_std of a picture of one pixel, in and out as Python floats."""
    mean, std = ddim_mean_std(pixel(eps), pixel(x_t), one(ab_t), one(ab_prev), eta)
    return mean.item(), std.item()


def test_predicted_x0_and_add_noise_by_hand():
    # alpha_bar 0.36: x_t = 0.6 x_0 + 0.8 eps = 0.6 * 1 + 0.8 * 0.5
    assert add_noise(pixel(1.0), pixel(0.5), one(0.36)).item() == pytest.approx(1.0)
    assert predicted_x0(pixel(0.5), pixel(1.0), one(0.36)).item() == pytest.approx(1.0)
    # (2 - 0.8 * -1.5) / 0.6
    assert predicted_x0(pixel(-1.5), pixel(2.0), one(0.36)).item() == pytest.approx(16 / 3)


def test_predicted_x0_undoes_add_noise_row_by_row():
    x_0, noise = normal(5, 4, 2, 3).double(), normal(5, 4, 2, 3, seed=1).double()
    alpha_bar = torch.tensor([0.9991, 0.5, 0.0047, 0.25, 1.0], dtype=torch.float64)
    x_t = add_noise(x_0, noise, alpha_bar)
    assert torch.allclose(predicted_x0(noise, x_t, alpha_bar), x_0, rtol=1e-12, atol=1e-12)
    assert torch.equal(x_t[4], x_0[4])


def test_ddim_std_by_hand():
    ab_t = torch.tensor([0.36, 0.36, 0.5, 0.25], dtype=torch.float64)
    ab_prev = torch.tensor([0.64, 1.0, 0.5, 0.75], dtype=torch.float64)
    # 0.36 / 0.64 * (1 - 0.36 / 0.64); nothing left to add; no step at all; 0.25 / 0.75 * (2 / 3)
    expected = [0.24609375**0.5, 0.0, 0.0, (2 / 9) ** 0.5]
    assert ddim_std(ab_t, ab_prev, 1.0).tolist() == pytest.approx(expected)
    assert ddim_std(ab_t, ab_prev, 0.3).tolist() == pytest.approx([0.3 * s for s in expected])
    assert ddim_std(ab_t, ab_prev, 0.0).tolist() == [0.0] * 4


def test_ddim_step_by_hand():
    # ab_t 0.36, ab_prev 0.64, x_t 1, eps 0.5: x_0 = (1 - 0.8 * 0.5) / 0.6 = 1
    # Without noise: mean = 0.8 * 1 + 0.6 * 0.5 = 1.1
    assert scalar_step(0.5, 1.0, 0.36, 0.64, eta=0.0) == pytest.approx((1.1, 0.0))
    # eta 1: sigma^2 = 0.36 / 0.64 * (1 - 0.36 / 0.64) = 0.5625 * 0.4375 = 0.24609375
    #        mean = 0.8 * 1 + sqrt(0.36 - 0.24609375) * 0.5 = 0.8 + 0.3375 * 0.5
    sigma = 0.24609375**0.5
    assert scalar_step(0.5, 1.0, 0.36, 0.64, eta=1.0) == pytest.approx((0.96875, sigma))
    # eta 0.5: half that sigma, a quarter of the variance: 0.36 - 0.0615234375 = 0.2984765625
    expected = (0.8 + 0.5 * 0.2984765625**0.5, 0.5 * sigma)
    assert scalar_step(0.5, 1.0, 0.36, 0.64, eta=0.5) == pytest.approx(expected)


def test_a_direction_of_zero_is_not_made_nan_by_rounding():
    # almost nothing left at t: sigma^2 is 1 - ab_prev to the last digit, and their difference in
    # float32 is below zero for some of these
    ab_prev = torch.linspace(0.01, 0.99, 1000)
    one = torch.ones(1000, 1)
    mean, std = ddim_mean_std(one, one, torch.full((1000,), 1e-8), ab_prev, 1.0)
    assert (1 - ab_prev - std**2).min() < 0  # so the case is met
    assert mean.isfinite().all()


alpha_bars = st.tuples(st.floats(0.002, 0.9995), st.floats(0.002, 0.9995)).map(sorted)
alpha_bars = alpha_bars.filter(lambda pair: pair[1] - pair[0] > 1e-6)


@settings(max_examples=200, deadline=None)
@given(alpha_bars, st.floats(0, 1))
def test_a_step_preserves_variance(pair, eta):
    """From x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, for every eta.

    x_{t-1} is sqrt(ab_prev) x_0 plus noise of variance 1 - ab_prev.
    """
    ab_t, ab_prev = pair
    # x_0 = 0, eps = 1
    direction, sigma = scalar_step(1.0, math.sqrt(1 - ab_t), ab_t, ab_prev, eta)
    assert direction**2 + sigma**2 == pytest.approx(1 - ab_prev, rel=1e-6, abs=1e-9)
    assert direction >= -1e-9
    # x_0 = 1, eps = 0
    mean, _ = scalar_step(0.0, math.sqrt(ab_t), ab_t, ab_prev, eta)
    assert mean == pytest.approx(math.sqrt(ab_prev), rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(alpha_bars, st.floats(-3, 3), st.floats(-3, 3))
def test_eta_1_is_the_ddpm_posterior(pair, eps, x_0):
    """q(x_{t-1} | x_t, x_0) of Ho et al. 2020, Eq. 7, written in x_0 and x_t."""
    ab_t, ab_prev = pair
    alpha = ab_t / ab_prev
    x_t = math.sqrt(ab_t) * x_0 + math.sqrt(1 - ab_t) * eps
    from_x_0 = math.sqrt(ab_prev) * (1 - alpha) * x_0
    from_x_t = math.sqrt(alpha) * (1 - ab_prev) * x_t
    posterior_mean = (from_x_0 + from_x_t) / (1 - ab_t)
    mean, sigma = scalar_step(eps, x_t, ab_t, ab_prev, eta=1.0)
    assert mean == pytest.approx(posterior_mean, rel=1e-6, abs=1e-6)
    assert sigma**2 == pytest.approx((1 - ab_prev) / (1 - ab_t) * (1 - alpha), rel=1e-6)


# --- gaussian_log_prob ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (3, 7), (3, 1)])
def test_log_prob_is_the_mean_over_dimensions_of_torchs_normal(shape):
    x, mean, std = normal(*shape), normal(*shape, seed=1), torch.tensor([0.02, 1.0, 7.0])
    policy = torch.distributions.Normal(mean, std.view(-1, *[1] * (len(shape) - 1)))
    expected = policy.log_prob(x).flatten(1).mean(1)
    assert torch.allclose(gaussian_log_prob(x, mean, std), expected, rtol=1e-6, atol=1e-6)


def test_log_prob_by_hand():
    # (x - mean) / std = 1 and 3: -(1 + 9) / 2 / 2 - log 2 - log(2 pi) / 2
    #                             = -2.5 - 0.6931472 - 0.9189385
    x, mean = torch.tensor([[2.0, 6.0]]), torch.zeros(1, 2)
    log_prob = gaussian_log_prob(x, mean, torch.tensor([2.0]))
    assert log_prob.item() == pytest.approx(-4.1120857)


def test_log_prob_gradient_flows_through_the_mean_and_not_the_sample():
    x = normal(2, 4, 2, 2).requires_grad_()
    mean, std = normal(2, 4, 2, 2, seed=1).requires_grad_(), torch.tensor([0.5, 2.0])
    gaussian_log_prob(x, mean, std).sum().backward()
    assert x.grad is None
    # d/dmean of -(x - mean)^2 / (2 std^2), averaged over D = 16
    expected = ((x - mean) / std.view(2, 1, 1, 1) ** 2 / 16).detach()
    assert torch.allclose(mean.grad, expected, rtol=1e-5, atol=1e-7)
    bump = torch.zeros(2, 4, 2, 2)
    bump[1, 2, 0, 1] = 0.1  # a quadratic: the central difference is exact
    more, less = (gaussian_log_prob(x, mean + sign * bump, std) for sign in (1, -1))
    assert more[0] == less[0]
    slope = (more[1] - less[1]).item() / 0.2
    assert slope == pytest.approx(expected[1, 2, 0, 1].item(), abs=1e-5)


def test_a_step_without_noise_has_log_prob_0_and_no_gradient_beside_one_that_has():
    x, mean = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1).requires_grad_()
    log_prob = gaussian_log_prob(x, mean, torch.tensor([0.0, 0.3, 0.0]))
    log_prob.sum().backward()
    assert log_prob[0] == log_prob[2] == 0 and log_prob[1] != 0
    assert mean.grad.isfinite().all()
    assert mean.grad[0].eq(0).all() and mean.grad[2].eq(0).all() and mean.grad[1].ne(0).all()


def test_a_step_without_noise_is_finite_even_where_mean_and_sample_differ_wildly():
    mean = torch.full((1, 4, 2, 2), 1e6, requires_grad=True)
    gaussian_log_prob(torch.zeros(1, 4, 2, 2), mean, torch.zeros(1)).sum().backward()
    assert mean.grad.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_log_prob_of_half_precision_inputs_is_computed_in_float32(dtype):
    x, mean = normal(2, 4, 8, 8).to(dtype), normal(2, 4, 8, 8, seed=1).to(dtype)
    std = torch.tensor([0.02, 0.5]).to(dtype)
    log_prob = gaussian_log_prob(x, mean, std)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, gaussian_log_prob(x.float(), mean.float(), std.float()))


def test_log_prob_of_a_step_computed_again_is_the_same_to_the_bit():
    """Otherwise the importance ratio is not 1 before the first update."""
    sampler = sd_sampler()
    eps, x_t, noise = (normal(50, 4, 2, 3, seed=seed) for seed in (1, 2, 3))
    x_prev, *mean_std = sampler.step(eps, x_t, sampler.timesteps, noise)
    mean, std = sampler.mean_std(eps, x_t, sampler.timesteps)
    log_prob = gaussian_log_prob(x_prev, *mean_std)
    assert torch.equal(log_prob, gaussian_log_prob(x_prev, mean, std))
    # x_{t-1} - mean is std * noise
    expected = -noise.square().flatten(1).mean(1) / 2 - std.log() - math.log(2 * math.pi) / 2
    # the subtraction loses digits where std is 0.02
    assert torch.allclose(log_prob, expected, atol=2e-4)


@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 7), (3,)])
def test_expand_lines_a_number_a_row_up_with_a_batch(shape):
    values = torch.tensor([1.0, 2.0, 3.0])
    product = expand(values, torch.ones(shape)) * torch.ones(shape)
    assert product.shape == shape
    assert product.reshape(3, -1).eq(values[:, None]).all()


# --- named noise ----------------------------------------------------------------------------------


def test_noise_is_fixed_by_its_whole_name_and_leaves_torchs_own_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    names = [(s, e, i) for s in (0, 1, 2**32 + 7) for e in (0, 1) for i in (0, 1, 300)]
    draws = [named_noise((4, 8, 8), 3, *name) for name in names]
    assert torch.equal(torch.get_rng_state(), before)
    for name, draw in zip(names, draws, strict=True):
        assert draw.shape == (3, 4, 8, 8) and draw.dtype == torch.float32
        assert torch.equal(draw, named_noise((4, 8, 8), 3, *name))
    for i, draw in enumerate(draws):
        assert all((draw - other).abs().max() > 1 for other in draws[:i])
        assert (draw[0] - draw[1]).abs().max() > 1  # x_T and the noise of the steps differ too
    values = torch.stack(draws).flatten()
    assert values.mean().abs() < 4 / math.sqrt(len(values))
    assert (values.std() - 1).abs() < 4 / math.sqrt(2 * len(values))


def test_names_of_other_lengths_are_other_names():
    assert not torch.equal(named_noise((4,), 1, 3, 5), named_noise((4,), 1, 3, 5, 0))


def test_more_noise_of_a_name_begins_like_less():
    assert torch.equal(named_noise((4, 2, 2), 8, 3, 5)[:2], named_noise((4, 2, 2), 2, 3, 5))


# --- configs and files ----------------------------------------------------------------------------


def write(folder, config):
    """scheduler_config.json of a dict, or of a text as it is, or of bytes -> folder"""
    text = json.dumps(config) if isinstance(config, (dict, list)) else config
    data = text if isinstance(text, bytes) else text.encode()
    (folder / "scheduler_config.json").write_bytes(data)
    return folder


def without(name):
    return {key: value for key, value in SD.items() if key != name}


def test_the_pndm_config_on_the_hub_is_read_as_the_same_schedule(tmp_path):
    """v1.4's names another class and has no clip_sample, which diffusers' DDIM takes for True."""
    config = {
        **without("clip_sample"),
        "_class_name": "PNDMScheduler",
        "_diffusers_version": "0.2.2",
        "skip_prk_steps": True,
        "trained_betas": None,
    }
    ours, expected = NoiseSchedule.from_folder(write(tmp_path, config)), both()[0]
    assert torch.equal(ours.alphas_bar, expected.alphas_bar)
    assert (ours.final_alpha_bar, ours.steps_offset) == (expected.final_alpha_bar, 1)


def test_a_config_that_diffusers_saved_is_read(tmp_path):
    theirs = both()[1]
    theirs.save_pretrained(tmp_path)
    assert torch.equal(NoiseSchedule.from_folder(tmp_path).alphas_bar, theirs.alphas_cumprod)


FAULTS = {  # what the config holds, what the message must say
    "v-prediction": (
        {**SD, "prediction_type": "v_prediction"},
        "prediction_type = 'v_prediction'",
    ),
    "clipped pictures": ({**SD, "clip_sample": True}, "clip_sample = True"),
    "thresholding": ({**SD, "thresholding": True}, "thresholding = True"),
    "own betas": ({**SD, "trained_betas": [0.1, 0.2]}, "trained_betas = [0.1, 0.2]"),
    "zero SNR": ({**SD, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr = True"),
    "unknown schedule": ({**SD, "beta_schedule": "cosine"}, "beta_schedule = 'cosine'"),
    "no schedule": (without("beta_schedule"), "beta_schedule = None"),
    "no beta_start": (without("beta_start"), "beta_start = None"),
    "no beta_end": (without("beta_end"), "beta_end = None"),
    "a text": ({**SD, "beta_start": "0.1"}, "beta_start = '0.1'"),
    "beta of 0": ({**SD, "beta_start": 0}, "beta_start = 0"),
    "beta of 1": ({**SD, "beta_end": 1}, "beta_end = 1"),
    "beta not a number": ({**SD, "beta_end": math.nan}, "beta_end = nan"),
    "falling betas": (
        {**SD, "beta_end": 0.0001},
        "beta_end = 0.0001; needed: ",
    ),
    "no timesteps": ({**SD, "num_train_timesteps": 0}, "num_train_timesteps = 0"),
    "half a timestep": ({**SD, "num_train_timesteps": 10.5}, "num_train_timesteps = 10.5"),
    "yes to timesteps": ({**SD, "num_train_timesteps": True}, "num_train_timesteps = True"),
    "offset below 0": ({**SD, "steps_offset": -1}, "steps_offset = -1"),
    "half an offset": ({**SD, "steps_offset": 0.5}, "steps_offset = 0.5"),
    "null offset": ({**SD, "steps_offset": None}, "steps_offset = None"),
    "not JSON": ("{not json", "cannot be read as JSON"),
    "empty": ("", "cannot be read as JSON"),
    "not text": (b"\xff\xfe\x00", "cannot be read as JSON"),
    "endlessly nested": ("[" * 100_000, "cannot be read as JSON"),
    "a list": ([1, 2], "not a JSON object"),
    "a number": ("7", "not a JSON object"),
}


@pytest.mark.parametrize("config, word", FAULTS.values(), ids=FAULTS)
def test_a_config_that_cannot_be_followed_is_refused_in_one_line_that_names_the_file(
    config, word, tmp_path
):
    with pytest.raises(ValueError) as caught:
        NoiseSchedule.from_folder(write(tmp_path, config))
    message = str(caught.value)
    assert type(caught.value) is UserError
    assert str(tmp_path / "scheduler_config.json") in message, message
    assert word in message and "\n" not in message, message


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(
        UserError, match="scheduler_config.json cannot be read.*No such file"
    ) as caught:
        NoiseSchedule.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_betas_that_are_all_alike_are_a_schedule():
    ours, theirs = both(beta_start=0.01, beta_end=0.01)
    assert torch.equal(ours.alphas_bar, theirs.alphas_cumprod)


@pytest.mark.parametrize("T, offset", [(0, 1), (-1, 1), (1001, 0), (1000, 1), (500, 2)])
def test_a_number_of_steps_that_the_schedule_lacks_is_refused(T, offset):
    with pytest.raises(UserError, match=f"--steps {T}:") as caught:
        Sampler(both(offset)[0], T, 1.0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("T, offset", [(1, 999), (500, 1), (999, 1), (1000, 0)])
def test_the_last_timestep_there_is_can_be_asked_for(T, offset):
    assert Sampler(both(offset)[0], T, 1.0).timesteps[0] == (T - 1) * (1000 // T) + offset


def test_timesteps_are_where_the_schedule_is():
    schedule = both()[0]
    assert Sampler(schedule, 20, 1.0).timesteps.device.type == "cpu"
    schedule.alphas_bar = schedule.alphas_bar.to("meta")
    assert Sampler(schedule, 20, 1.0).timesteps.device.type == "meta"


def test_require_raises_the_users_error_alone():
    require(True, "fine")
    with pytest.raises(UserError, match="^--flag is wrong$"):
        require([], "--flag is wrong")
    assert issubclass(UserError, ValueError)
