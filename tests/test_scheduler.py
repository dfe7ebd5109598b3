"""scheduler.py against diffusers' DDIMScheduler, torch.distributions, the DDPM posterior, and numbers worked by hand."""
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler import Scheduler, add_noise, ddim_mean_std, gaussian_log_prob

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
          set_alpha_to_one=False, clip_sample=False)


def both(steps_offset=1, set_alpha_to_one=False, **more):
    config = SD | dict(steps_offset=steps_offset, set_alpha_to_one=set_alpha_to_one) | more
    return Scheduler.from_config(config), DDIMScheduler(**config)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- against diffusers -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", ["scaled_linear", "linear"])
@pytest.mark.parametrize("count", [1000, 300])
def test_noise_schedule_equals_diffusers_bit_for_bit(schedule, count):
    ours, theirs = both(beta_schedule=schedule, num_train_timesteps=count)
    assert ours.alphas_bar.dtype == torch.float32
    assert torch.equal(ours.alphas_bar, theirs.alphas_cumprod)
    assert ours.final_alpha_bar == theirs.final_alpha_cumprod.item()


def test_fields_missing_from_a_config_have_diffusers_defaults():
    config = {name: SD[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    ours, theirs = Scheduler.from_config(config), DDIMScheduler(**config)
    assert (len(ours.alphas_bar), ours.steps_offset, ours.final_alpha_bar) == (1000, theirs.config.steps_offset, 1.0)
    assert theirs.final_alpha_cumprod == 1


GRID = [(T, offset) for T in (1, 5, 7, 20, 50) for offset in (0, 1)] + [(1000, 0)]       # with offset 1, T = 1000 would need timestep 1000


@pytest.mark.parametrize("T, offset", GRID)
def test_timesteps_equal_diffusers(T, offset):
    ours, theirs = both(offset)
    theirs.set_timesteps(T)
    assert torch.equal(ours.timesteps(T), theirs.timesteps)


@pytest.mark.parametrize("precision, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("T, offset", GRID)
def test_mean_sigma_and_step_of_all_timesteps_in_one_batch_equal_diffusers(T, offset, eta, set_alpha_to_one, precision, tolerance):
    """In float64 only the formula can differ. In float32 (eps 1.2e-7) a few roundings, of numbers as large as the largest: 2e-6 of it."""
    ours, theirs = both(offset, set_alpha_to_one)
    ours.alphas_bar = ours.alphas_bar.to(precision)
    theirs.alphas_cumprod, theirs.final_alpha_cumprod = theirs.alphas_cumprod.to(precision), theirs.final_alpha_cumprod.to(precision)
    theirs.set_timesteps(T)
    timesteps = theirs.timesteps.flip(0) if T < 1000 else theirs.timesteps[::37]        # not in sampling order: training shuffles them
    B = len(timesteps)
    eps, x_t, noise = (normal(B, 4, 2, 3, seed=seed).to(precision) for seed in (1, 2, 3))
    zero, one = torch.zeros_like(eps[:1]), torch.ones_like(eps[:1])

    def diffusers_step(i, eps, x_t, noise):
        return theirs.step(eps, int(timesteps[i]), x_t, eta=eta, variance_noise=noise).prev_sample

    their_mean = torch.cat([diffusers_step(i, eps[i:i + 1], x_t[i:i + 1], zero) for i in range(B)])
    their_std = torch.cat([diffusers_step(i, zero, zero, one)[:, 0, 0, 0] for i in range(B)])    # x = eps = 0 leaves sigma alone
    their_prev = torch.cat([diffusers_step(i, eps[i:i + 1], x_t[i:i + 1], noise[i:i + 1]) for i in range(B)])

    mean, std = ours.mean_std(eps, x_t, timesteps, T, eta)
    x_prev, log_prob = ours.step(eps, x_t, timesteps, T, eta, noise)
    largest = their_mean.abs().max()
    assert mean.dtype == std.dtype == precision and log_prob.dtype == torch.float32
    assert torch.allclose(mean, their_mean, rtol=0, atol=tolerance * largest)
    assert torch.allclose(std, their_std, rtol=tolerance, atol=0)
    assert torch.allclose(x_prev, their_prev, rtol=0, atol=tolerance * largest)
    assert log_prob.isfinite().all()


def test_add_noise_equals_diffusers_with_mixed_timesteps():
    ours, theirs = both()
    timesteps, x_0, noise = torch.tensor([0, 1, 500, 981, 999]), normal(5, 4, 2, 3), normal(5, 4, 2, 3, seed=1)
    expected = theirs.add_noise(x_0, noise, timesteps)
    assert torch.allclose(add_noise(x_0, noise, ours.alphas_bar[timesteps]), expected, rtol=0, atol=1e-6)


# --- Stable Diffusion's own numbers ------------------------------------------------------------------------------------------------------

def test_sd_v1_4_with_50_steps_visits_981_961_to_1():
    assert both()[0].timesteps(50).tolist() == list(range(981, 0, -20))


def test_sd_v1_4_last_step_still_has_a_sigma_of_0_0206():
    ours = both()[0]
    zero = torch.zeros(1, 4, 2, 2)
    assert ours.mean_std(zero, zero, torch.tensor([1]), 50, 1.0)[1].item() == pytest.approx(0.0206, abs=5e-5)
    assert ours.step(zero, zero, torch.tensor([1]), 50, 1.0, zero)[1].isfinite().all()


def test_a_schedule_that_ends_at_the_clean_picture_has_a_deterministic_last_step():
    """The case that makes log p NaN in other codes: sigma is 0 there, x_{t-1} is the predicted x_0, log p is 0."""
    ours = both(steps_offset=0, set_alpha_to_one=True)[0]
    eps, x_t, noise = normal(1, 4, 2, 2), normal(1, 4, 2, 2, seed=1), normal(1, 4, 2, 2, seed=2)
    x_prev, log_prob = ours.step(eps, x_t, torch.tensor([0]), 50, 1.0, noise)
    ab = ours.alphas_bar[0]
    assert torch.allclose(x_prev, (x_t - (1 - ab).sqrt() * eps) / ab.sqrt(), atol=1e-6)
    assert log_prob.item() == 0


# --- ddim_mean_std -----------------------------------------------------------------------------------------------------------------------

def one(value, dtype=torch.float64):
    return torch.tensor([value], dtype=dtype)


def scalar_step(eps, x_t, ab_t, ab_prev, eta):
    """ddim_mean_std of a picture of one pixel, in and out as Python floats."""
    mean, std = ddim_mean_std(one(eps).view(1, 1, 1, 1), one(x_t).view(1, 1, 1, 1), one(ab_t), one(ab_prev), eta)
    return mean.item(), std.item()


def test_ddim_step_by_hand():
    # ab_t 0.36, ab_prev 0.64, x_t 1, eps 0.5: x_0 = (1 - 0.8 * 0.5) / 0.6 = 1.  Without noise: mean = 0.8 * 1 + 0.6 * 0.5 = 1.1
    assert scalar_step(0.5, 1.0, 0.36, 0.64, eta=0.0) == pytest.approx((1.1, 0.0))
    # eta 1: sigma^2 = 0.36 / 0.64 * (1 - 0.36 / 0.64) = 0.5625 * 0.4375 = 0.24609375
    #        mean = 0.8 * 1 + sqrt(0.36 - 0.24609375) * 0.5 = 0.8 + 0.3375 * 0.5
    assert scalar_step(0.5, 1.0, 0.36, 0.64, eta=1.0) == pytest.approx((0.96875, 0.24609375**0.5))
    # eta 0.5: half that sigma, a quarter of the variance: 0.36 - 0.0615234375 = 0.2984765625
    assert scalar_step(0.5, 1.0, 0.36, 0.64, eta=0.5) == pytest.approx((0.8 + 0.5 * 0.2984765625**0.5, 0.5 * 0.24609375**0.5))


def test_a_direction_of_zero_is_not_made_nan_by_rounding():
    # almost nothing left at t: sigma^2 is 1 - ab_prev to the last digit, and their difference in float32 is below zero for some of these
    ab_prev = torch.linspace(0.01, 0.99, 1000)
    mean, std = ddim_mean_std(torch.ones(1000, 1), torch.ones(1000, 1), torch.full((1000,), 1e-8), ab_prev, 1.0)
    assert (1 - ab_prev - std**2).min() < 0                                 # so the case is met
    assert mean.isfinite().all()


alpha_bars = st.tuples(st.floats(0.002, 0.9995), st.floats(0.002, 0.9995)).map(sorted).filter(lambda pair: pair[1] - pair[0] > 1e-6)


@settings(max_examples=200, deadline=None)
@given(alpha_bars, st.floats(0, 1))
def test_a_step_preserves_variance(pair, eta):
    """If x_t = sqrt(ab_t) x_0 + sqrt(1 - ab_t) eps, then x_{t-1} is sqrt(ab_prev) x_0 plus noise of variance 1 - ab_prev, for every eta."""
    ab_t, ab_prev = pair
    direction, sigma = scalar_step(1.0, math.sqrt(1 - ab_t), ab_t, ab_prev, eta)         # x_0 = 0, eps = 1
    assert direction**2 + sigma**2 == pytest.approx(1 - ab_prev, rel=1e-6, abs=1e-9)
    assert direction >= -1e-9
    assert scalar_step(0.0, math.sqrt(ab_t), ab_t, ab_prev, eta)[0] == pytest.approx(math.sqrt(ab_prev), rel=1e-9)       # x_0 = 1, eps = 0


@settings(max_examples=200, deadline=None)
@given(alpha_bars, st.floats(-3, 3), st.floats(-3, 3))
def test_eta_1_is_the_ddpm_posterior(pair, eps, x_0):
    """q(x_{t-1} | x_t, x_0) of Ho et al. 2020, Eq. 7, written in x_0 and x_t: what the paper's Sec. 3.1 calls the sampler."""
    ab_t, ab_prev = pair
    alpha = ab_t / ab_prev
    x_t = math.sqrt(ab_t) * x_0 + math.sqrt(1 - ab_t) * eps
    posterior_mean = (math.sqrt(ab_prev) * (1 - alpha) * x_0 + math.sqrt(alpha) * (1 - ab_prev) * x_t) / (1 - ab_t)
    mean, sigma = scalar_step(eps, x_t, ab_t, ab_prev, eta=1.0)
    assert mean == pytest.approx(posterior_mean, rel=1e-6, abs=1e-6)
    assert sigma**2 == pytest.approx((1 - ab_prev) / (1 - ab_t) * (1 - alpha), rel=1e-6)


# --- gaussian_log_prob -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(3, 4, 2, 5), (3, 7), (3, 1)])
def test_log_prob_is_the_mean_over_dimensions_of_torchs_normal(shape):
    x, mean, std = normal(*shape), normal(*shape, seed=1), torch.tensor([0.02, 1.0, 7.0])
    expected = torch.distributions.Normal(mean, std.view(-1, *[1] * (len(shape) - 1))).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(gaussian_log_prob(x, mean, std), expected, rtol=1e-6, atol=1e-6)


def test_log_prob_by_hand():
    # (x - mean) / std = 1 and 3: -(1 + 9) / 2 / 2 - log 2 - log(2 pi) / 2 = -2.5 - 0.6931472 - 0.9189385
    log_prob = gaussian_log_prob(torch.tensor([[2.0, 6.0]]), torch.zeros(1, 2), torch.tensor([2.0]))
    assert log_prob.item() == pytest.approx(-4.1120857)


def test_log_prob_gradient_flows_through_the_mean_and_not_the_sample():
    x, mean, std = normal(2, 4, 2, 2).requires_grad_(), normal(2, 4, 2, 2, seed=1).requires_grad_(), torch.tensor([0.5, 2.0])
    gaussian_log_prob(x, mean, std).sum().backward()
    assert x.grad is None
    expected = ((x - mean) / std.view(2, 1, 1, 1)**2 / 16).detach()         # d/dmean of -(x - mean)^2 / (2 std^2), averaged over D = 16
    assert torch.allclose(mean.grad, expected, rtol=1e-5, atol=1e-7)
    bump = torch.zeros(2, 4, 2, 2)
    bump[1, 2, 0, 1] = 0.1                                                 # a quadratic: the central difference is exact
    difference = gaussian_log_prob(x, mean + bump, std) - gaussian_log_prob(x, mean - bump, std)
    assert difference[0] == 0
    assert difference[1].item() / 0.2 == pytest.approx(expected[1, 2, 0, 1].item(), abs=1e-5)


def test_a_step_without_noise_has_log_prob_0_and_no_gradient_beside_one_that_has():
    x, mean, std = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1).requires_grad_(), torch.tensor([0.0, 0.3, 0.0])
    log_prob = gaussian_log_prob(x, mean, std)
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
    x, mean, std = normal(2, 4, 8, 8).to(dtype), normal(2, 4, 8, 8, seed=1).to(dtype), torch.tensor([0.02, 0.5]).to(dtype)
    log_prob = gaussian_log_prob(x, mean, std)
    assert log_prob.dtype == torch.float32
    assert torch.equal(log_prob, gaussian_log_prob(x.float(), mean.float(), std.float()))


def test_log_prob_of_a_step_computed_again_is_the_same_to_the_bit():
    """Otherwise the importance ratio is not 1 before the first update."""
    ours = both()[0]
    timesteps = ours.timesteps(50)
    eps, x_t, noise = (normal(50, 4, 2, 3, seed=seed) for seed in (1, 2, 3))
    x_prev, log_prob = ours.step(eps, x_t, timesteps, 50, 1.0, noise)
    mean, std = ours.mean_std(eps, x_t, timesteps, 50, 1.0)
    assert torch.equal(log_prob, gaussian_log_prob(x_prev, mean, std))
    expected = -noise.square().flatten(1).mean(1) / 2 - std.log() - math.log(2 * math.pi) / 2       # x_{t-1} - mean is std * noise
    assert torch.allclose(log_prob, expected, atol=2e-4)                                   # the subtraction loses digits where std is 0.02


# --- configs and files -------------------------------------------------------------------------------------------------------------------

def write(folder, config):
    (folder / "scheduler_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def test_the_pndm_config_on_the_hub_is_read_as_the_same_schedule(tmp_path):
    """v1.4's file names another class and has no clip_sample, which diffusers' DDIM takes for True."""
    config = {name: value for name, value in SD.items() if name != "clip_sample"}
    config |= {"_class_name": "PNDMScheduler", "_diffusers_version": "0.2.2", "skip_prk_steps": True, "trained_betas": None}
    ours, expected = Scheduler.from_folder(write(tmp_path, config)), both()[0]
    assert torch.equal(ours.alphas_bar, expected.alphas_bar)
    assert (ours.final_alpha_bar, ours.steps_offset) == (expected.final_alpha_bar, 1)


def test_a_config_that_diffusers_saved_is_read(tmp_path):
    theirs = both()[1]
    theirs.save_pretrained(tmp_path)
    assert torch.equal(Scheduler.from_folder(tmp_path).alphas_bar, theirs.alphas_cumprod)


FAULTS = {   # what the config holds, what the message must say
    "v-prediction": (SD | {"prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
    "clipped pictures": (SD | {"clip_sample": True}, "clip_sample = True"),
    "other spacing": (SD | {"timestep_spacing": "trailing"}, "timestep_spacing = 'trailing'"),
    "unknown schedule": (SD | {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule = 'squaredcos_cap_v2'"),
    "no schedule": ({name: value for name, value in SD.items() if name != "beta_schedule"}, "beta_schedule = None"),
    "no beta_start": ({name: value for name, value in SD.items() if name != "beta_start"}, "beta_start"),
    "no beta_end": ({name: value for name, value in SD.items() if name != "beta_end"}, "beta_end"),
    "not JSON": ("{not json", "not JSON"),
    "empty": ("", "not JSON"),
}


@pytest.mark.parametrize("config, word", FAULTS.values(), ids=FAULTS)
def test_a_config_that_cannot_be_followed_is_refused_in_one_line_that_names_the_file(config, word, tmp_path):
    with pytest.raises(ValueError) as caught:
        Scheduler.from_folder(write(tmp_path, config))
    message = str(caught.value)
    assert type(caught.value) is ValueError
    assert str(tmp_path / "scheduler_config.json") in message and word in message and "\n" not in message, message


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="scheduler_config.json is missing") as caught:
        Scheduler.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("T, offset", [(0, 1), (-1, 1), (1001, 0), (1000, 1)])
def test_a_number_of_steps_that_the_schedule_lacks_is_refused(T, offset):
    with pytest.raises(ValueError, match=f"steps = {T}") as caught:
        both(offset)[0].timesteps(T)
    assert "\n" not in str(caught.value)


def test_moving_to_a_device_keeps_the_numbers_and_moves_the_timesteps():
    ours = both()[0].to("cpu")
    assert ours.final_alpha_bar == both()[0].final_alpha_bar and ours.timesteps(20).device.type == "cpu"
    assert ours.to("meta").alphas_bar.device.type == "meta"
