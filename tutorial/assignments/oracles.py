"""The right answers, and the mistakes that have a name. Students do not get this file.

Everything is numpy in float64 and shares no line with the modules: DDIM is written as Bayes' rule,
softmax and percentiles sample by sample, BERTScore as a triple loop. No gradient is written down:
it is the finite difference of the answer, of a mistake's as well.

An oracle is a function with the name of its unit, and takes the unit's inputs. A mistake is one
too: `unit__mistake`, whose docstring is the cause that the student reads. "D", "B" and "T" in it
are the case's own numbers.
"""

import io

import numpy as np
from check import Sheet, answer_key
from parts import KEY, drawn, personal
from PIL import Image

STEP = 1e-5  # of finite differences
CONSTANTS = {"gaussian_log_prob": ("x",)}  # inputs that no gradient flows through, right or wrong
CONSTANTS["gaussian_log_prob__through_the_sample"] = ()
CONSTANTS["kl_to_go"] = ("log_probs",)
CONSTANTS["kl_to_go__with_gradient"] = ()


def rows(values, like):
    """(B,) -> (B, 1, 1, 1)."""
    return np.reshape(values, (-1,) + (1,) * (np.ndim(like) - 1))


def mean_over_d(x):
    """(B, ...) -> (B,)."""
    return x.reshape(len(x), -1).mean(1)


# 1: add_noise


def mix(x_0, noise, signal, rest):
    return rows(signal, x_0) * x_0 + rows(rest, x_0) * noise


def add_noise(x_0, noise, alpha_bar_t):
    return mix(x_0, noise, alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5)


def add_noise__root_forgotten(x_0, noise, alpha_bar_t):
    """the square roots are forgotten: alpha_bar_t is a variance"""
    return mix(x_0, noise, alpha_bar_t, 1 - alpha_bar_t)


def add_noise__halves_swapped(x_0, noise, alpha_bar_t):
    """picture and noise have changed places: at alpha_bar_t = 1 the picture should be whole"""
    return mix(x_0, noise, (1 - alpha_bar_t) ** 0.5, alpha_bar_t**0.5)


def add_noise__one_minus_root(x_0, noise, alpha_bar_t):
    """the noise has 1 - root where the root of 1 - alpha_bar_t belongs: variances add"""
    return mix(x_0, noise, alpha_bar_t**0.5, 1 - alpha_bar_t**0.5)


# 2: predicted_x0, ddim_std, ddim_mean_std


def predicted_x0(eps, x_t, alpha_bar_t):
    return (x_t - rows((1 - alpha_bar_t) ** 0.5, x_t) * eps) / rows(alpha_bar_t**0.5, x_t)


def predicted_x0__undivided(eps, x_t, alpha_bar_t):
    """the noise is taken off, but what is left is not divided by the root of alpha_bar_t"""
    return x_t - rows((1 - alpha_bar_t) ** 0.5, x_t) * eps


def predicted_x0__without_roots(eps, x_t, alpha_bar_t):
    """the square roots are forgotten: undo add_noise line by line"""
    return (x_t - rows(1 - alpha_bar_t, x_t) * eps) / rows(alpha_bar_t, x_t)


def predicted_x0__noise_added(eps, x_t, alpha_bar_t):
    """the noise is added once more, where it should come off"""
    return (x_t + rows((1 - alpha_bar_t) ** 0.5, x_t) * eps) / rows(alpha_bar_t**0.5, x_t)


def predicted_x0__noise_divided(eps, x_t, alpha_bar_t):
    """only the noise is divided by the root of alpha_bar_t: brackets around x_t - noise"""
    return x_t - rows(((1 - alpha_bar_t) / alpha_bar_t) ** 0.5, x_t) * eps


def posterior(alpha_bar_t, alpha_bar_prev):
    """x_{t-1} given x_t and x_0, by Bayes' rule: precisions add -> variance, weights of both."""
    alpha = alpha_bar_t / alpha_bar_prev  # x_t = sqrt(alpha) x_{t-1} + sqrt(1 - alpha) noise
    remaining = (1 - alpha) * (1 - alpha_bar_prev)
    weight = alpha * (1 - alpha_bar_prev) + 1 - alpha  # both precisions, times `remaining`
    of_x_t = alpha**0.5 * (1 - alpha_bar_prev) / weight
    of_x_0 = alpha_bar_prev**0.5 * (1 - alpha) / weight
    return remaining / weight, of_x_t, of_x_0


def ddim_std(alpha_bar_t, alpha_bar_prev, eta):
    return eta * posterior(alpha_bar_t, alpha_bar_prev)[0] ** 0.5


def ddim_std__eta_squared(alpha_bar_t, alpha_bar_prev, eta):
    """eta is squared: it multiplies the standard deviation, not the variance"""
    return eta**2 * posterior(alpha_bar_t, alpha_bar_prev)[0] ** 0.5


def ddim_std__variance(alpha_bar_t, alpha_bar_prev, eta):
    """that is the variance: the root is forgotten"""
    return (eta * posterior(alpha_bar_t, alpha_bar_prev)[0] ** 0.5) ** 2


def ddim_std__eta_under_the_root(alpha_bar_t, alpha_bar_prev, eta):
    """eta stands under the root, where it counts only half as much"""
    return (eta * posterior(alpha_bar_t, alpha_bar_prev)[0]) ** 0.5


def ddim_std__fraction_upside_down(alpha_bar_t, alpha_bar_prev, eta):
    """the fraction of the two 1 - alpha_bar stands upside down: the last step then has noise"""
    with np.errstate(divide="ignore"):
        ratio = (1 - alpha_bar_t) / (1 - alpha_bar_prev)
    return eta * (ratio * (1 - alpha_bar_t / alpha_bar_prev)) ** 0.5


def ddim_std__forward(alpha_bar_t, alpha_bar_prev, eta):
    """that is the noise of one step forward, beta_t: on the way back x_0 is known too"""
    return eta * (1 - alpha_bar_t / alpha_bar_prev) ** 0.5


def ddim_mean(eps, x_t, alpha_bar_t, alpha_bar_prev, towards, signal=None):
    """signal x_0 + towards eps."""
    x_0 = predicted_x0(eps, x_t, alpha_bar_t)
    signal = alpha_bar_prev**0.5 if signal is None else signal
    return rows(signal, x_t) * x_0 + rows(towards, x_t) * eps


def ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """At eta = 1 the posterior; with less noise, more of what points from x_0 to x_t is kept."""
    x_0 = predicted_x0(eps, x_t, alpha_bar_t)
    variance, of_x_t, of_x_0 = posterior(alpha_bar_t, alpha_bar_prev)
    mean = rows(of_x_0, x_t) * x_0 + rows(of_x_t, x_t) * x_t
    most = np.maximum(1 - alpha_bar_prev - variance, 0)
    more = np.maximum(1 - alpha_bar_prev - eta**2 * variance, 0) ** 0.5 - most**0.5
    return mean + rows(more, x_t) * eps, eta * variance**0.5


def ddim_mean_std__std_for_variance(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """std is taken off where its square belongs"""
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    towards = np.maximum(1 - alpha_bar_prev - std, 0) ** 0.5
    return ddim_mean(eps, x_t, alpha_bar_t, alpha_bar_prev, towards), std


def ddim_mean_std__unclamped_std_for_variance(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """std is taken off where its square belongs, and the root of what is below 0 is NaN"""
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    with np.errstate(invalid="ignore"):
        towards = (1 - alpha_bar_prev - std) ** 0.5
    return ddim_mean(eps, x_t, alpha_bar_t, alpha_bar_prev, towards), std


def ddim_mean_std__variance_not_subtracted(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """std^2 is not taken off: the noise that is still to be drawn is counted twice"""
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    return ddim_mean(eps, x_t, alpha_bar_t, alpha_bar_prev, (1 - alpha_bar_prev) ** 0.5), std


def ddim_mean_std__now_for_previous(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """x_0 is scaled by the root of alpha_bar_t, where x_{t-1} has alpha_bar_prev"""
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    towards = np.maximum(1 - alpha_bar_prev - std**2, 0) ** 0.5
    mean = ddim_mean(eps, x_t, alpha_bar_t, alpha_bar_prev, towards, alpha_bar_t**0.5)
    return mean, std


def ddim_mean_std__towards_now(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """eps has alpha_bar_t under its root, where x_{t-1} has alpha_bar_prev"""
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    towards = np.maximum(1 - alpha_bar_t - std**2, 0) ** 0.5
    return ddim_mean(eps, x_t, alpha_bar_t, alpha_bar_prev, towards), std


def ddim_mean_std__x_0_of_previous(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """x_0 is guessed by alpha_bar_prev: x_t has the noise of alpha_bar_t"""
    std = ddim_std(alpha_bar_t, alpha_bar_prev, eta)
    towards = np.maximum(1 - alpha_bar_prev - std**2, 0) ** 0.5
    return ddim_mean(eps, x_t, alpha_bar_prev, alpha_bar_prev, towards), std


def ddim_mean_std__undivided(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """the mean is built on an x_0 that was not divided by the root of alpha_bar_t"""
    mean, std = ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, eta)
    lacking = predicted_x0(eps, x_t, alpha_bar_t) * (1 - rows(alpha_bar_t, x_t) ** 0.5)
    return mean - rows(alpha_bar_prev**0.5, x_t) * lacking, std


def ddim_mean_std__variance(eps, x_t, alpha_bar_t, alpha_bar_prev, eta):
    """the mean is right, but the second output is the variance, not its root"""
    mean, std = ddim_mean_std(eps, x_t, alpha_bar_t, alpha_bar_prev, eta)
    return mean, std**2


# 3: guided_noise, predict_noise


def guided_noise(eps_uncond, eps_cond, guidance):
    return guidance * eps_cond + (1 - guidance) * eps_uncond


def guided_noise__halves_swapped(eps_uncond, eps_cond, guidance):
    """the two predictions have changed places: w = 1 should be the prompt's own"""
    return guided_noise(eps_cond, eps_uncond, guidance)


def guided_noise__one_more(eps_uncond, eps_cond, guidance):
    """that is 1 + w: some papers count so, this one's w = 1 is no guidance"""
    return guided_noise(eps_uncond, eps_cond, 1 + guidance)


def guided_noise__sum(eps_uncond, eps_cond, guidance):
    """the prediction without a prompt counts whole: the weights are w and 1 - w"""
    return eps_uncond + guidance * eps_cond


def guided_noise__prompts_only(eps_uncond, eps_cond, guidance):
    """only the prompt's prediction counts: (1 - w) of the other belongs to it"""
    return guidance * eps_cond + 0 * eps_uncond


def network(theta, x_t, timesteps, context):
    """worker.Network in numpy. theta (3,), context (B, m, d)."""
    words = np.sum(context * (1 + np.arange(context[0].size).reshape(context[0].shape)), (1, 2))
    channel = theta[:, None, None]
    return channel * x_t * (1 + rows(timesteps, x_t) / 5) + channel**2 * rows(words / 9, x_t)


def rounded(eps, half):
    """As float16 holds it."""
    return eps.astype(np.float16).astype(np.float64) if half else eps


def whole(context, like):
    """(1, m, d) -> (B, m, d)."""
    return np.broadcast_to(context, (len(like), *context.shape[1:]))


def predict_noise(theta, half, x_t, timesteps, cond, uncond, guidance):
    """Two passes."""
    eps_cond = rounded(network(theta, x_t, timesteps, cond), half)
    eps_uncond = rounded(network(theta, x_t, timesteps, whole(uncond, x_t)), half)
    return guided_noise(eps_uncond, eps_cond, guidance)


def predict_noise__halves_swapped(theta, half, x_t, timesteps, cond, uncond, guidance):
    """the halves of the pass are taken for one another: with and without a prompt"""
    return predict_noise(theta, half, x_t, timesteps, cond, uncond, 1 - guidance)


def predict_noise__interleaved(theta, half, x_t, timesteps, cond, uncond, guidance):
    """every other row is taken, where the halves lie one behind the other"""
    context = np.concatenate([whole(uncond, x_t), cond])
    eps = network(theta, np.tile(x_t, (2, 1, 1, 1)), np.tile(timesteps, 2), context)
    eps = rounded(eps, half)
    return guided_noise(eps[0::2], eps[1::2], guidance)


def predict_noise__timesteps_interleaved(theta, half, x_t, timesteps, cond, uncond, guidance):
    """each timestep is repeated in its place, where they should come one batch after the other"""
    both = np.repeat(timesteps, 2)
    eps_uncond = rounded(network(theta, x_t, both[: len(x_t)], whole(uncond, x_t)), half)
    eps_cond = rounded(network(theta, x_t, both[len(x_t) :], cond), half)
    return guided_noise(eps_uncond, eps_cond, guidance)


def predict_noise__unguided(theta, half, x_t, timesteps, cond, uncond, guidance):
    """the prompt's own prediction comes back: there is no guidance in it"""
    return predict_noise(theta, half, x_t, timesteps, cond, uncond, 1)


def predict_noise__first_prompt(theta, half, x_t, timesteps, cond, uncond, guidance):
    """all samples get the first one's prompt"""
    return predict_noise(theta, half, x_t, timesteps, whole(cond[:1], x_t), uncond, guidance)


def predict_noise__one_timestep(theta, half, x_t, timesteps, cond, uncond, guidance):
    """all samples get the first one's timestep: in training they are mixed"""
    return predict_noise(theta, half, x_t, 0 * timesteps + timesteps[0], cond, uncond, guidance)


# 4: sample


def visited(alphas_bar, final_alpha_bar, steps_offset, T):
    """[(timestep, alpha_bar there, alpha_bar after the step)], noisiest first."""
    stride = len(alphas_bar) // T
    steps = []
    for k in reversed(range(T)):
        t = k * stride + steps_offset
        after = alphas_bar[t - stride] if t >= stride else final_alpha_bar
        steps.append((t, alphas_bar[t], after))
    return steps


def log_normal(x, mean, std):
    """The mean over D of log N(x; mean, std^2), 0 where std = 0. std (B,)."""
    total = np.zeros(len(x))
    for b in range(len(x)):
        if std[b] > 0:
            z = (x[b] - mean[b]) / std[b]
            total[b] = np.mean(-(z**2) / 2 - np.log(std[b] * np.sqrt(2 * np.pi)))
    return total


def act(theta, x_t, step, cond, uncond, guidance, eta):
    """The policy's Gaussian in states x_t at one (timestep, alpha_bar, alpha_bar_prev)."""
    t, now, after = (np.full(len(x_t), value) for value in step)
    eps = predict_noise(theta, False, x_t, t, cond, uncond, guidance)
    return ddim_mean_std(eps, x_t, now, after, eta)


def rolled(inputs, draw, carry=True, guidance=None, order=1, of_state=False):
    """A plain loop. draw(k): the index of the k-th step's noise -> sample's four outputs."""
    p = inputs
    guidance = p["guidance"] if guidance is None else guidance
    schedule = (p["alphas_bar"], p["final_alpha_bar"], p["steps_offset"], p["T"])
    steps = visited(*schedule)
    x = p["noise"][:, 0]
    latents, log_probs = [x], []
    for k, step in enumerate(steps[::order]):
        state = x if carry else p["noise"][:, 0]
        mean, std = act(p["theta"], state, step, p["cond"], p["uncond"], guidance, p["eta"])
        x = mean + rows(std, mean) * p["noise"][:, draw(k)]
        log_probs.append(log_normal(latents[-1] if of_state else x, mean, std))
        latents.append(x)
    times = np.array([step[0] for step in steps])
    return np.stack(latents, 1), np.stack(log_probs, 1), times, p["cond"]


def sample(**inputs):
    return rolled(inputs, lambda k: k + 1)


def sample__one_noise(**inputs):
    """all steps draw the same noise: each action has its own"""
    return rolled(inputs, lambda k: 1)


def sample__first_noise_again(**inputs):
    """the noise of x_T is drawn again for the first action, so all are one too early"""
    return rolled(inputs, lambda k: k)


def sample__time_reversed(**inputs):
    """time runs the wrong way: x_T is pure noise, and belongs to the largest timestep"""
    return rolled(inputs, lambda k: k + 1, order=-1)


def sample__not_handed_on(**inputs):
    """every step starts from x_T: x_{t-1} is not handed on to the next one"""
    return rolled(inputs, lambda k: k + 1, carry=False)


def sample__unguided(**inputs):
    """the samples are drawn without guidance"""
    return rolled(inputs, lambda k: k + 1, guidance=1)


def sample__of_the_state(**inputs):
    """that is log p of the state x_t: the action is what it becomes, x_{t-1}"""
    return rolled(inputs, lambda k: k + 1, of_state=True)


def sample__graph_kept(**inputs):
    """the outputs hold on to the graph of the computation, T networks deep: sampling needs none"""
    return sample(**inputs)


# 5: gaussian_log_prob


def gaussian_log_prob(x, mean, std):
    return log_normal(x, mean, std)


def log_prob_parts(x, mean, std):
    """-> the squared term (B, D), log std (B,); both 0 where std = 0."""
    x, mean = x.reshape(len(x), -1), mean.reshape(len(x), -1)
    safe = np.where(std > 0, std, 1)
    density = (std > 0).astype(float)
    return ((x - mean) / safe[:, None]) ** 2 / 2 * density[:, None], np.log(safe), density


HALF_LOG_2PI = np.log(2 * np.pi) / 2


def gaussian_log_prob__summed(x, mean, std):
    """summed over the latent, where this project averages over its D = {D} numbers"""
    return log_normal(x, mean, std) * x[0].size


def gaussian_log_prob__squares_summed(x, mean, std):
    """the squared term is summed over D = {D} numbers, the others stand there once"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return -squares.sum(1) - density * (log_std + HALF_LOG_2PI)


def gaussian_log_prob__over_the_batch(x, mean, std):
    """the mean is taken over the batch too: each sample has a log p of its own"""
    return np.full(len(x), log_normal(x, mean, std).mean())


def gaussian_log_prob__std_for_variance(x, mean, std):
    """the squared error is divided by 2 std, where 2 std^2 belongs"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return -squares.mean(1) * std - density * (log_std + HALF_LOG_2PI)


def gaussian_log_prob__log_of_variance(x, mean, std):
    """log std^2 is taken off, which is twice log std"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return -squares.mean(1) - density * (2 * log_std + HALF_LOG_2PI)


def gaussian_log_prob__constant_lost(x, mean, std):
    """log(2 pi) / 2 is missing: gradients do not see it, log p does"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return -squares.mean(1) - density * log_std


def gaussian_log_prob__whole_constant(x, mean, std):
    """log(2 pi) is taken off whole: its half is wanted"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return -squares.mean(1) - density * (log_std + 2 * HALF_LOG_2PI)


def gaussian_log_prob__clamped(x, mean, std):
    """std is held above 0, as in the JAX code: where it is 0, log p is 0 here"""
    return log_normal(x, mean, np.maximum(std, 1e-6))


def gaussian_log_prob__log_std_lost(x, mean, std):
    """log std is missing"""
    squares, _, density = log_prob_parts(x, mean, std)
    return -squares.mean(1) - density * HALF_LOG_2PI


def gaussian_log_prob__half_lost(x, mean, std):
    """the squared term lacks its 1/2"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return -2 * squares.mean(1) - density * (log_std + HALF_LOG_2PI)


def gaussian_log_prob__positive(x, mean, std):
    """the squared term is added: what lies far off would be likely"""
    squares, log_std, density = log_prob_parts(x, mean, std)
    return squares.mean(1) - density * (log_std + HALF_LOG_2PI)


def gaussian_log_prob__through_the_sample(x, mean, std):
    """the gradient flows through x too: an action taken is a fact, detach it"""
    return log_normal(x, mean, std)


# 6: policy_log_prob


def judged(inputs, shift=0, guidance=None, prompt=None, order=1, of_state=False):
    """Pair by pair, log p of action k of trajectory i. prompt(i): whose prompt."""
    p = inputs
    guidance = p["guidance"] if guidance is None else guidance
    prompt = prompt or (lambda i: i)
    schedule = (p["alphas_bar"], p["final_alpha_bar"], p["steps_offset"], p["T"])
    steps = visited(*schedule)[::order]
    log_probs = []
    for i, k in zip(p["i"], p["k"], strict=True):
        x_t, x_next = p["latents"][[i], k + shift], p["latents"][[i], k + 1 - shift]
        x_next = x_t if of_state else x_next
        cond = p["prompt_embeds"][[prompt(i)]]
        mean, std = act(p["theta"], x_t, steps[k], cond, p["uncond"], guidance, p["eta"])
        log_probs.append(log_normal(x_next, mean, std)[0])
    return np.array(log_probs)


def policy_log_prob(**inputs):
    return judged(inputs)


def policy_log_prob__unguided(**inputs):
    """guidance is left out: log p is then not that of the policy that drew the samples"""
    return judged(inputs, guidance=1)


def policy_log_prob__anothers_prompt(**inputs):
    """pair j gets prompt j, where it belongs to trajectory i_j"""
    at = iter(range(len(inputs["i"])))
    count = len(inputs["prompt_embeds"])
    return judged(inputs, prompt=lambda i: next(at) % count)


def policy_log_prob__first_prompt(**inputs):
    """all pairs get the first trajectory's prompt"""
    return judged(inputs, prompt=lambda i: 0)


def policy_log_prob__swapped(**inputs):
    """x_t and x_{t-1} have changed places: the state comes first, the action is one further"""
    return judged(inputs, shift=1)


def policy_log_prob__of_the_state(**inputs):
    """that is log p of the state latents[i, k]: the action taken there is latents[i, k + 1]"""
    return judged(inputs, of_state=True)


def policy_log_prob__time_reversed(**inputs):
    """time runs the wrong way: step 0 is the noisiest, timesteps[0] is the largest"""
    return judged(inputs, order=-1)


# 7: PromptStatistics, normalize_advantages


def moments(size, min_count, ddof=0, everyone=None, before=False, **epochs):
    """Plain lists -> mean and std of the first epoch's samples, and of the second's."""
    history, outputs = {}, []
    for epoch in (0, 1):
        prompts, rewards = epochs[f"prompts_{epoch}"], [*epochs[f"rewards_{epoch}"]]
        earlier = {prompt: [*past] for prompt, past in history.items()}
        for prompt, reward in zip(prompts, rewards, strict=True):
            history[prompt] = (history.get(prompt, []) + [reward])[-size:]
        known = earlier if before else history
        rows = [known.get(prompt, []) for prompt in prompts]
        if everyone is not False:
            few = min_count if everyone is None else np.inf
            rows = [rewards if len(row) < few else row for row in rows]
        outputs.append(np.array([sum(row) / len(row) for row in rows]))
        with np.errstate(invalid="ignore", divide="ignore"):
            outputs.append(np.array([np.std(row, ddof=min(ddof, len(row))) for row in rows]))
    return tuple(outputs)


def PromptStatistics(**inputs):
    return moments(**inputs)


def PromptStatistics__whole_batch(**inputs):
    """each prompt is given the moments of the whole epoch: easy prompts then always win"""
    return moments(**inputs, everyone=True)


def PromptStatistics__ddof_1(**inputs):
    """the deviation divides by n - 1: torch's std does so unless told correction=0"""
    return moments(**inputs, ddof=1)


def PromptStatistics__no_fallback(**inputs):
    """a prompt with fewer than min_count rewards should fall back on the whole epoch's"""
    return moments(**inputs, everyone=False)


def PromptStatistics__unbounded(**inputs):
    """old rewards are never forgotten: only the last `size` of a prompt count"""
    return moments(**{**inputs, "size": 10**6})


def PromptStatistics__one_too_late(**inputs):
    """a prompt's own rewards count from min_count on, not only from one more"""
    return moments(**{**inputs, "min_count": inputs["min_count"] + 1})


def PromptStatistics__oldest_kept(**inputs):
    """the oldest rewards are kept where the newest should be"""
    size, firsts = inputs["size"], {}
    outputs = []
    for epoch in (0, 1):
        prompts, rewards = inputs[f"prompts_{epoch}"], [*inputs[f"rewards_{epoch}"]]
        for prompt, reward in zip(prompts, rewards, strict=True):
            firsts[prompt] = (firsts.get(prompt, []) + [reward])[:size]
        rows = [firsts[prompt] for prompt in prompts]
        rows = [row if len(row) >= inputs["min_count"] else rewards for row in rows]
        outputs += [np.array([np.mean(row) for row in rows]), np.array([np.std(r) for r in rows])]
    return tuple(outputs)


def PromptStatistics__variance(**inputs):
    """that is the variance: the deviation is its root"""
    outputs = moments(**inputs)
    return outputs[0], outputs[1] ** 2, outputs[2], outputs[3] ** 2


def normalize_advantages(rewards, mean, std, limit=10.0):
    return np.clip((rewards - mean) / (std + 1e-6), -limit, limit)


def normalize_advantages__no_epsilon(rewards, mean, std, limit=10.0):
    """equal rewards divide 0 by 0: std needs its 1e-6"""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((rewards - mean) / std, -limit, limit)


def normalize_advantages__not_clipped(rewards, mean, std, limit=10.0):
    """advantages are not clipped to +-limit"""
    return (rewards - mean) / (std + 1e-6)


def normalize_advantages__always_ten(rewards, mean, std, limit=10.0):
    """the limit is not the 10 of the default only: it is an argument"""
    return np.clip((rewards - mean) / (std + 1e-6), -10, 10)


def normalize_advantages__not_centred(rewards, mean, std, limit=10.0):
    """the mean is not taken off: all of a prompt's samples would be praised alike"""
    return np.clip(rewards / (std + 1e-6), -limit, limit)


def normalize_advantages__by_the_variance(rewards, mean, std, limit=10.0):
    """divided by the variance, where the deviation belongs"""
    return np.clip((rewards - mean) / (std**2 + 1e-6), -limit, limit)


def normalize_advantages__single_precision(rewards, mean, std, limit=10.0):
    """float32 comes too soon: of rewards near 1e9 it keeps every 64th, take the mean off before"""
    single = (rewards.astype(np.float32) - mean.astype(np.float32)).astype(np.float64)
    return np.clip(single / (std + 1e-6), -limit, limit)


# 8: reinforce_loss, ppo_loss


def reinforce_loss(log_prob, advantages):
    return -(advantages * log_prob)


def reinforce_loss__sign(log_prob, advantages):
    """the sign is turned: a loss falls, and the reward should rise"""
    return advantages * log_prob


def reinforce_loss__averaged(log_prob, advantages):
    """averaged over the pairs: a loss for each pair is wanted, the mean is taken elsewhere"""
    return np.mean(-(advantages * log_prob))


def reinforce_loss__probability(log_prob, advantages):
    """that weighs the probability itself: the estimator has the gradient of its logarithm"""
    return -(advantages * np.exp(log_prob))


def ratio_of(log_prob, log_prob_old):
    return np.exp(log_prob) / np.exp(log_prob_old)


def ppo_loss(log_prob, log_prob_old, advantages, clip_range):
    """By the cells of PPO's table: held where the ratio has gone where the advantage pushed it."""
    ratio = ratio_of(log_prob, log_prob_old)
    losses = []
    for r, A in zip(ratio, advantages, strict=True):
        if A >= 0:
            losses.append(-A * min(r, 1 + clip_range))
        else:
            losses.append(-A * max(r, 1 - clip_range))
    return np.array(losses), ratio


def ppo_loss__sign(log_prob, log_prob_old, advantages, clip_range):
    """the sign is turned: a loss falls, and the reward should rise"""
    loss, ratio = ppo_loss(log_prob, log_prob_old, advantages, clip_range)
    return -loss, ratio


def ppo_loss__max_for_min(log_prob, log_prob_old, advantages, clip_range):
    """the larger of the two is taken: the bound should be the pessimistic one, their minimum"""
    ratio = ratio_of(log_prob, log_prob_old)
    clipped = np.clip(ratio, 1 - clip_range, 1 + clip_range)
    return -np.maximum(ratio * advantages, clipped * advantages), ratio


def ppo_loss__unclipped(log_prob, log_prob_old, advantages, clip_range):
    """nothing is clipped"""
    ratio = ratio_of(log_prob, log_prob_old)
    return -ratio * advantages, ratio


def ppo_loss__always_clipped(log_prob, log_prob_old, advantages, clip_range):
    """the clipped ratio alone is taken: what went the wrong way could then never come back"""
    ratio = ratio_of(log_prob, log_prob_old)
    return -np.clip(ratio, 1 - clip_range, 1 + clip_range) * advantages, ratio


def ppo_loss__clipped_above_only(log_prob, log_prob_old, advantages, clip_range):
    """clipped above only: with advantages below 0 the ratio is to be held below as well"""
    ratio = ratio_of(log_prob, log_prob_old)
    clipped = np.minimum(ratio, 1 + clip_range)
    return -np.minimum(ratio * advantages, clipped * advantages), ratio


def ppo_loss__inverted(log_prob, log_prob_old, advantages, clip_range):
    """the ratio is upside down: the present policy's probability stands above"""
    return ppo_loss(log_prob_old, log_prob, advantages, clip_range)


def ppo_loss__log_ratio(log_prob, log_prob_old, advantages, clip_range):
    """that is the difference of the logarithms: the ratio is its exponential"""
    ratio = log_prob - log_prob_old
    clipped = np.clip(ratio, 1 - clip_range, 1 + clip_range)
    return -np.minimum(ratio * advantages, clipped * advantages), ratio


def ppo_loss__quotient_of_logs(log_prob, log_prob_old, advantages, clip_range):
    """the logarithms are divided: the ratio is the exponential of their difference"""
    ratio = log_prob / log_prob_old
    clipped = np.clip(ratio, 1 - clip_range, 1 + clip_range)
    return -np.minimum(ratio * advantages, clipped * advantages), ratio


def ppo_loss__lesser_ratio(log_prob, log_prob_old, advantages, clip_range):
    """the lesser ratio is taken before A comes in: below 0, A turns the order of the two"""
    ratio = ratio_of(log_prob, log_prob_old)
    clipped = np.clip(ratio, 1 - clip_range, 1 + clip_range)
    return -np.minimum(ratio, clipped) * advantages, ratio


def ppo_loss__clipped_ratio_given(log_prob, log_prob_old, advantages, clip_range):
    """the loss is right, but the ratios that come back are clipped: as they are, they are logged"""
    loss, ratio = ppo_loss(log_prob, log_prob_old, advantages, clip_range)
    return loss, np.clip(ratio, 1 - clip_range, 1 + clip_range)


# 9: rwr_weights, sparse_weights, denoising_loss


def rwr_weights(prompts, rewards, beta):
    weights = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        mine = [r for p, r in zip(prompts, rewards, strict=True) if p == prompt]
        weights.append(
            len(mine) / sum(np.exp(np.clip(beta * (r - reward), None, 700)) for r in mine)
        )
    return np.array(weights)


def rwr_weights__whole_batch(prompts, rewards, beta):
    """the softmax is over the whole batch: each prompt has its own"""
    return rwr_weights(["all"] * len(prompts), rewards, beta)


def rwr_weights__sum_one(prompts, rewards, beta):
    """the weights of a prompt add up to 1: they should average 1"""
    return rwr_weights(prompts, rewards, beta) / [prompts.count(p) for p in prompts]


def rwr_weights__divided(prompts, rewards, beta):
    """rewards are divided by beta: it is the inverse temperature, and multiplies"""
    return rwr_weights(prompts, rewards, 1 / beta)


def rwr_weights__unstable(prompts, rewards, beta):
    """exp overflows: take off the largest reward first, or use a softmax"""
    with np.errstate(over="ignore", invalid="ignore"):
        e = np.exp(beta * rewards)
        sums = [sum(x for x, q in zip(e, prompts, strict=True) if q == p) for p in prompts]
        return e / sums * [prompts.count(p) for p in prompts]


def rwr_weights__not_normalised(prompts, rewards, beta):
    """the exponential is not divided by its mean over the prompt"""
    with np.errstate(over="ignore"):
        return np.exp(beta * rewards)


def sparse_weights(prompts, rewards, percentile):
    return kept(prompts, rewards, percentile, np.greater_equal)


def kept(prompts, rewards, percentile, compare):
    weights = []
    for prompt, reward in zip(prompts, rewards, strict=True):
        mine = [r for p, r in zip(prompts, rewards, strict=True) if p == prompt]
        weights.append(float(compare(reward, np.percentile(mine, 100 * percentile))))
    return np.array(weights)


def sparse_weights__whole_batch(prompts, rewards, percentile):
    """the percentile is the whole batch's: each prompt has its own"""
    return kept(["all"] * len(prompts), rewards, percentile, np.greater_equal)


def sparse_weights__one_minus(prompts, rewards, percentile):
    """that is the percentile 1 - p: at 0.9 a tenth is kept, not nine"""
    return kept(prompts, rewards, 1 - percentile, np.greater_equal)


def sparse_weights__greater(prompts, rewards, percentile):
    """that is r > C, which leaves the one on the percentile out, and of equals all"""
    return kept(prompts, rewards, percentile, np.greater)


def sparse_weights__worst(prompts, rewards, percentile):
    """those below the percentile are kept, the best are thrown away"""
    return kept(prompts, rewards, percentile, np.less)


def denoising_loss(eps, noise, weights):
    return np.array(
        [w * np.mean((n - e) ** 2) for e, n, w in zip(eps, noise, weights, strict=True)]
    )


def denoising_loss__weight_squared(eps, noise, weights):
    """the weight is squared: it stands inside of the square"""
    return weights * denoising_loss(eps, noise, weights)


def denoising_loss__summed(eps, noise, weights):
    """summed over the latent's D = {D} numbers, where this project averages"""
    return denoising_loss(eps, noise, weights) * eps[0].size


def denoising_loss__unweighted(eps, noise, weights):
    """the weights are not used"""
    return denoising_loss(eps, noise, np.ones(len(weights)))


def denoising_loss__absolute(eps, noise, weights):
    """the difference's size is averaged, not its square"""
    return weights * mean_over_d(np.abs(noise - eps))


def denoising_loss__root(eps, noise, weights):
    """that is the norm over the root of D: the loss has its square"""
    return weights * mean_over_d((noise - eps) ** 2) ** 0.5


def denoising_loss__norm(eps, noise, weights):
    """that is the norm over D: the loss has its square"""
    return weights * (mean_over_d((noise - eps) ** 2) / eps[0].size) ** 0.5


def denoising_loss__averaged(eps, noise, weights):
    """averaged over the batch: a loss for each sample is wanted"""
    return np.mean(denoising_loss(eps, noise, weights))


# 10: bert_score, incompressibility


def bert_score(x, x_weights, x_mask, y, y_weights, y_mask, best=max, masked=True, empty=0.0):
    """A triple loop. best: of a token's cosines with the other sentence's."""
    P, R = np.full(len(x), empty), np.full(len(x), empty)
    for b in range(len(x)):
        sides = [(x, x_weights, x_mask, y, y_mask, P), (y, y_weights, y_mask, x, x_mask, R)]
        whole = x_weights[b].any() and y_weights[b].any()
        for mine, weights, mask, other, other_mask, out in sides:
            pairs = (mask[b], other_mask[b]) if masked else (mask[b] | True, other_mask[b] | True)
            if whole or (np.isnan(empty) and weights[b].any()):
                out[b] = covered(mine[b], weights[b], other[b], pairs, best)
    some = P + R != 0
    F = 2 * P * R / np.where(some, P + R, 1)
    return P, R, np.where(np.isnan(F), 0, F)


def covered(mine, weights, other, masks, best):
    """The weighted mean over my tokens of the best cosine with one of the other's."""
    total = 0.0
    for i in range(len(mine)):
        cosines = [float(mine[i] @ other[j]) for j in range(len(other)) if masks[1][j]]
        total += weights[i] * best(cosines) if masks[0][i] else 0
    return total / weights.sum()


def bert_score__swapped(**inputs):
    """precision and recall have changed places: recall is over the second sentence"""
    P, R, F = bert_score(**inputs)
    return R, P, F


def bert_score__padding_matched(**inputs):
    """padding is matched as if it were a word"""
    return bert_score(**inputs, masked=False)


def bert_score__mean_for_max(**inputs):
    """a token's cosines are averaged: its best match counts"""
    return bert_score(**inputs, best=lambda cosines: sum(cosines) / len(cosines))


def bert_score__weights_not_summed(**inputs):
    """divided by the length, padding and special tokens included: divide by the weights' sum"""
    P, R, _ = bert_score(**inputs)
    P = P * inputs["x_weights"].mean(1)
    R = R * inputs["y_weights"].mean(1)
    return P, R, 2 * P * R / np.where(P + R != 0, P + R, 1)


def bert_score__special_not_matched(**inputs):
    """special tokens are left out of the matches too: their weight is 0, but they may be matched"""
    words = {f"{side}_mask": inputs[f"{side}_weights"] > 0 for side in "xy"}
    return bert_score(**{**inputs, **words})


def bert_score__arithmetic_mean(**inputs):
    """its F is the arithmetic mean of P and R: the harmonic one is wanted"""
    P, R, F = bert_score(**inputs)
    return P, R, (P + R) / 2


def bert_score__f_undoubled(**inputs):
    """its F lacks its factor 2: where P = R it should be both"""
    P, R, F = bert_score(**inputs)
    return P, R, F / 2


def bert_score__empty_is_nan(**inputs):
    """an empty sentence divides 0 by 0: it covers nothing, and scores 0"""
    return bert_score(**inputs, empty=np.nan)


def incompressibility(images, prompts):
    return np.array([jpeg_bytes(image, 95) / 1000 for image in images])


def jpeg_bytes(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return file.tell()


def incompressibility__kibibytes(images, prompts):
    """divided by 1024: a kB has 1000 bytes here"""
    return incompressibility(images, prompts) * 1000 / 1024


def incompressibility__bytes(images, prompts):
    """in bytes: a kB has 1000"""
    return incompressibility(images, prompts) * 1000


def incompressibility__default_quality(images, prompts):
    """that is the size at Pillow's own quality of 75: the paper's is 95"""
    return np.array([jpeg_bytes(image, 75) / 1000 for image in images])


def incompressibility__negative(images, prompts):
    """that is compressibility: the sign is turned"""
    return -incompressibility(images, prompts)


# what they answer


def double(value):
    """Floating point numbers in float64."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(np.float64)
    return value


def weighed(outputs):
    """What gradients are taken of: the first output's entries, weighed 1, 1.1, 1.2 ..."""
    first = np.ravel(outputs[0])
    return float(first @ (1 + np.arange(first.size) / 10))


def difference(answer, inputs, name):
    """d weighed / d inputs[name], entry by entry."""
    gradient = np.zeros_like(inputs[name])
    for place in np.ndindex(gradient.shape):
        ends = []
        for sign in (1, -1):
            moved = inputs[name].copy()
            moved[place] += sign * STEP
            ends.append(weighed(answer({**inputs, name: moved})))
        gradient[place] = (ends[0] - ends[1]) / (2 * STEP)
    return gradient


def answered(function, unit, case, inputs):
    """What a unit's oracle, or a mistake, makes of a case -> {name: array}."""

    def answer(inputs):
        outputs = function(**inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    inputs = {name: double(value) for name, value in inputs.items()}
    if case.kind == "gradients" and not case.wrt:
        return {"graph": np.array(float(function.__name__.endswith("graph_kept")))}
    outputs = dict(zip(unit.outputs, answer(inputs), strict=True))
    constants = CONSTANTS.get(function.__name__, CONSTANTS.get(unit.name, ()))
    if case.wrt:
        outputs = {}
    for name in case.wrt:
        if name in constants:
            outputs[f"d_{name}"] = np.zeros_like(inputs[name])
        else:
            outputs[f"d_{name}"] = difference(answer, inputs, name)
    return {name: np.asarray(value) for name, value in outputs.items()}


def mistakes(unit, here):
    """[(cause, function)] of a unit."""
    named = [f for name, f in here.items() if name.startswith(f"{unit}__")]
    return [(f.__doc__, f) for f in named]


def sheet(part, signatures, student="public", key=KEY, source=None):
    """A part's questions as one student gets them, with right and wrong answers -> Sheet.

    source: the module of the oracles, where it isn't this one.
    """
    found, here = Sheet(part.number, signatures, {}, {}, []), vars(source) if source else globals()
    for unit in part.units:
        functions = [("", here[unit.name]), *mistakes(unit.name, here)]
        answers = [(cause, {}) for cause, _ in functions]
        factor = 0.8 + 0.4 * drawn(key, student, unit.name)
        for n, case in enumerate(unit.cases):
            inputs = personal(case, factor)
            found.questions[answer_key(unit, n)] = inputs
            for (_, function), (_, given) in zip(functions, answers, strict=True):
                given[answer_key(unit, n)] = answered(function, unit, case, inputs)
        found.right.update(answers[0][1])
        found.wrong += [(unit.name, cause, given) for cause, given in answers[1:]]
    return found
