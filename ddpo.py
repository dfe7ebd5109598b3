"""DDPO: denoising diffusion policy optimization (Black et al., arXiv 2305.13301), Sec. 4.

Denoising as an MDP (Sec. 4.3): the state is (c, t, x_t), the action x_{t-1}, the policy the Gaussian p_theta(x_{t-1} | x_t, c) of
scheduler.py; the reward r(x_0, c) comes once, at the end. In reading order:

    guided_noise, predict_noise     Eq. 3: the guided noise prediction, in sampling and in training alike ("CFG training", App. E.1)
    sample                          roll the policy out and keep x_T ... x_0 and the log-probabilities
    Policy                          the parts of a Stable Diffusion, from prompts to pictures
    PromptStatistics, normalize_advantages      Sec. 5.1, App. D: rewards normalised prompt by prompt
    reinforce_loss, ppo_loss        Eq. DDPO_SF and DDPO_IS, the two policy gradients
    join ... training_order         several processes: each draws its share of the samples, gradients are summed in `step`
    step, update, improve           one optimizer step in micro-batches; DDPO's, on whole samples; those of an epoch
    rwr_weights, sparse_weights, denoising_loss, regress        Sec. 4.2: reward-weighted regression, the baseline
    learn                           an epoch's updates by any of the four
    alarms                          what goes wrong in practice, seen early in a run's metrics

Deviations from the paper's text, and why:
- Log-probabilities are means over the latent's dimensions (see scheduler.py), and losses are means over the T timesteps where the paper
  writes sums. As in the authors' code. Effect: DDPO_SF's gradient is 1/(D T) of the paper's; DDPO_IS's ratio is the D-th root of the paper's,
  so that a clip range holds for one D only.
- The paper clips the ratio by a trust region "as in PPO"; here, as in the authors' code: clipped ratio, pessimistic minimum, no value
  function, no entropy bonus.
- Advantages are clipped at +-10 (the authors' JAX code; their PyTorch code takes 5).
- Noise comes from a generator seeded by (seed, epoch, sample), not from one stream: results depend on batch sizes by rounding only.
- RWR trains on the sampled x_0 itself; the authors' code encodes the finished picture again, through the VAE. Effect: none of the VAE's
  errors in the data. RWR-sparse never draws a sample of weight 0 for a batch (its gradient is 0), so that a batch is all signal.
"""
import os
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from scheduler import Trajectories, add_noise, gaussian_log_prob, named_noise


def guided_noise(eps_uncond, eps_cond, w):
    """Classifier-free guidance, Eq. 3: w eps(x_t, t, c) + (1 - w) eps(x_t, t, nothing), rearranged.

    eps_uncond, eps_cond (B, 4, h, w); w = 1 is the plain conditional model -> (B, 4, h, w).
    """
    return eps_uncond + w * (eps_cond - eps_uncond)


def predict_noise(unet, x_t, timesteps, cond, uncond, w):
    """Guided noise, both halves in one forward pass. x_t (B, 4, h, w), timesteps (B,), cond (B, m, d), uncond (1, m, d) -> float32 (B, 4, h, w)."""
    if w == 1:
        return unet(x_t, timesteps, cond).float()
    context = torch.cat([uncond.expand_as(cond), cond])                         # (2B, m, d)
    eps_uncond, eps_cond = unet(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), context).float().chunk(2)
    return guided_noise(eps_uncond, eps_cond, w)


@torch.no_grad()
def sample(unet, scheduler, cond, uncond, noise, T, eta, w, tick=None):
    """Roll out the policy: x_T ~ N(0, I), then T steps x_{t-1} ~ p_theta(. | x_t, c).

    cond (B, m, d); uncond (1, m, d), the empty prompt; noise (B, T+1, 4, h, w), for x_T and for each step -> Trajectories.
    `tick()`, where given, is called after every step.
    """
    timesteps = scheduler.timesteps(T)
    x, log_probs = noise[:, 0], []
    latents = [x]
    for i in range(T):
        t = timesteps[i].expand(len(x))
        eps = predict_noise(unet, x, t, cond, uncond, w)
        x, log_prob = scheduler.step(eps, x, t, T, eta, noise[:, i + 1])
        latents.append(x)
        log_probs.append(log_prob)
        if tick:
            tick()
    return Trajectories(torch.stack(latents, 1), torch.stack(log_probs, 1), timesteps, cond)


@dataclass
class Policy:
    """The parts of a Stable Diffusion, of which only the UNet is trained, and how pictures are drawn with them."""
    unet: torch.nn.Module
    vae: torch.nn.Module
    scheduler: object
    tokenizer: object
    text_encoder: torch.nn.Module
    device: torch.device
    T: int
    eta: float
    w: float
    embeds: dict = field(default_factory=dict)

    @torch.no_grad()
    def embed(self, prompts):
        """Prompt embeddings, each prompt encoded once: list of B str -> (B, m, d)."""
        for prompt in set(prompts) - set(self.embeds):
            tokens = self.tokenizer(prompt, padding="max_length", truncation=True, max_length=self.tokenizer.model_max_length, return_tensors="pt")
            self.embeds[prompt] = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state[0].float()
        return torch.stack([self.embeds[prompt] for prompt in prompts])

    def sample(self, prompts, name, batch, tick=None, each=None, whole=False, places=None):
        """A trajectory for each of `places` (all, if not given) in the list of prompts, `batch` at a time, the noise of sample i named (*name, i)
        -> Trajectories, images uint8 (B, H, W, 3).

        `each(images, prompts)`, where given, is called with every batch as soon as it is drawn. Unless `whole`, of the latents only
        x_0 is kept (B, 1, 4, h, w), and no embeddings: all that RWR and evaluation need, where 10,000 trajectories of SD v1.4 would take 36 GB.
        """
        side, parts, images, places = self.unet.config["sample_size"], [], None, list(range(len(prompts)) if places is None else places)
        for start in range(0, len(places), batch):
            some = [prompts[i] for i in places[start:start + batch]]
            noise = torch.stack([named_noise((self.unet.config["in_channels"], side, side), self.T + 1, *name, i) for i in places[start:start + batch]])
            parts.append(sample(self.unet, self.scheduler, self.embed(some), self.embed([""]), noise.to(self.device), self.T, self.eta, self.w, tick))
            drawn = self.decode(parts[-1].latents[:, -1])
            images = np.empty((len(places), *drawn.shape[1:]), np.uint8) if images is None else images
            images[start:start + batch] = drawn
            if not whole:
                parts[-1].latents, parts[-1].prompt_embeds = parts[-1].latents[:, -1:].clone(), None
            if each:
                each(drawn, some)
        trajectories = Trajectories.cat(parts)
        trajectories.places = torch.tensor(places, device=self.device)
        return trajectories, images

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, 4, h, w) -> images uint8 (B, H, W, 3)."""
        images = (self.vae.decode(latents).float() / 2 + 0.5).clamp(0, 1)
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def normalize_advantages(rewards, mean, std, limit=10.0):
    """A = (r - mean) / std, clipped to +-limit. App. D.3. All (B,), mean and std those of each sample's prompt."""
    return ((rewards - mean) / (std + 1e-6)).clamp(-limit, limit)


class PromptStatistics:
    """Running mean and standard deviation of the reward of each prompt, over its last `size` rewards, this epoch's included.

    A prompt with fewer than `min_count` rewards (this epoch's counted) takes the mean and std of all this epoch's rewards instead. App. D.3; the
    numbers 32 and 16 are those of the authors' code.
    """

    def __init__(self, size=32, min_count=16):
        self.size, self.min_count, self.history = size, min_count, {}

    def update(self, prompts, rewards):
        """Take in an epoch's rewards -> the mean and std for each of its samples. prompts: B strings, rewards (B,) -> (B,), (B,)."""
        everyone = rewards.tolist()
        for prompt, reward in zip(prompts, everyone, strict=True):
            self.history.setdefault(prompt, deque(maxlen=self.size)).append(reward)
        rows = [self.history[p] if len(self.history[p]) >= self.min_count else everyone for p in prompts]
        mean = torch.tensor([np.mean(row) for row in rows], dtype=torch.float32)
        std = torch.tensor([np.std(row) for row in rows], dtype=torch.float32)
        return mean.to(rewards.device), std.to(rewards.device)

    def state_dict(self):
        return {prompt: list(rewards) for prompt, rewards in self.history.items()}

    def load_state_dict(self, state):
        self.history = {prompt: deque(rewards, maxlen=self.size) for prompt, rewards in state.items()}


def reinforce_loss(log_prob, advantages):
    """DDPO_SF, the score-function estimator of Sec. 4.3: its gradient is -E[A grad log p_theta(x_{t-1} | x_t, c)].

    Valid for data of the current policy only, hence one update an epoch. log_prob, advantages (B,) -> (B,), a loss a pair.
    """
    return -advantages * log_prob


def ppo_loss(log_prob, log_prob_old, advantages, clip_range):
    """DDPO_IS, the importance-sampling estimator of Sec. 4.3 with PPO's clipped trust region.

        ratio = (p_theta(x_{t-1} | x_t, c) / p_theta_old(x_{t-1} | x_t, c))^(1/D)         since log_prob is a mean over the D dimensions
        loss  = -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A)

    log_prob, log_prob_old, advantages (B,) -> losses (B,), ratios (B,).
    """
    ratio = (log_prob - log_prob_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio


def policy_log_prob(unet, scheduler, trajectories, samples, steps, uncond, eta, w):
    """log p_theta(x_{t-1} | x_t, c) of recorded actions under the present weights, with gradient.

    samples, steps (B,): places in the batch and in `timesteps` (0 is the noisiest) -> (B,)."""
    T = len(trajectories.timesteps)
    x_t, x_prev = trajectories.latents[samples, steps], trajectories.latents[samples, steps + 1]
    t = trajectories.timesteps[steps]
    eps = predict_noise(unet, x_t, t, trajectories.prompt_embeds[samples], uncond, w)
    return gaussian_log_prob(x_prev, *scheduler.mean_std(eps, x_t, t, T, eta))


def join(device):
    """Under torchrun: meet the other processes, each with its own device, and wait for all."""
    if "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))           # a slow reward is no death
        dist.barrier()


def processes():
    """The number of this process, and of all -> (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(mine):
    """The rows of all processes, taken in turn: row 0 of each, row 1 of each ... mine (n, ...), the same n in each -> (n * processes, ...)."""
    if processes()[1] == 1:
        return mine
    parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(processes()[1])]
    dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, 1).flatten(0, 1)


def everyones(mine, places):
    """What all processes hold of an epoch's N samples, in the samples' order. mine (n, ...) on any device, places (n,): which they are of -> (N, ...)."""
    moved = mine if processes()[1] == 1 else mine.to(places.device)             # NCCL gathers on the GPU alone
    return gather(moved)[gather(places).argsort().to(moved.device)].to(mine.device)


def training_order(count, name):
    """The order in which an epoch trains on its samples. Process r of R draws and keeps order[r::R], of which each slice is its share of a minibatch."""
    return np.random.default_rng(name).permutation(count)


def step(unet, optimizer, losses_of, count, micro_batch, max_grad_norm, scaler=None, tick=None):
    """One optimizer step on the mean of the losses of all processes, `count` in each, in micro-batches of any size: gradients add up to that of the whole.

    losses_of(indices (b,)) -> losses (b,), {name: (b,)} to be logged. tick() is called after every micro-batch. scaler: a GradScaler, for fp16; an update
    whose gradients overflow is skipped, and its norm is 0. -> {name: (count * processes,)} of what was logged and the losses; the norm before clipping.
    """
    parameters, rows, world = [p for p in unet.parameters() if p.requires_grad], [], processes()[1]
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    optimizer.zero_grad(set_to_none=True)
    for chunk in torch.arange(count, device=parameters[0].device).split(micro_batch):       # nothing in this loop waits for the device
        losses, logged = losses_of(chunk)
        scaler.scale(losses.sum() / (count * world)).backward()
        rows.append({"loss": losses.detach(), **logged})
        if tick:
            tick()
    if world > 1:
        for p in parameters:
            dist.all_reduce(p.grad)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    grad_norm = torch.where(grad_norm.isfinite(), grad_norm, 0.0) if scaler.is_enabled() else grad_norm
    return {name: gather(torch.cat([row[name] for row in rows])) for name in rows[0]}, grad_norm


def update(unet, optimizer, scheduler, trajectories, minibatch, uncond, *, algorithm, eta, w, clip_range, **settings):
    """DDPO's optimizer step on the samples `minibatch` (indices into this process's) with all their timesteps -> metrics (tensors, of all
    processes; the README says what they mean).

    Pairs (sample, timestep) are taken timestep by timestep; since all of them go into one gradient, their order and the size of the micro-batches
    change nothing but rounding. With micro_batch = the rollout's batch the networks compute to the bit what they did in the rollout (CPU, fp32),
    and ratios are exactly 1 before the first update. settings: those of `step`.
    """
    if algorithm not in ("ddpo-is", "ddpo-sf"):
        raise ValueError(f"algorithm {algorithm!r}: ddpo-is or ddpo-sf")
    T = len(trajectories.timesteps)
    steps, samples = (index.flatten() for index in torch.meshgrid(
        torch.arange(T, device=minibatch.device), minibatch, indexing="ij"))    # (T * B,), timestep by timestep

    def losses_of(chunk):
        i, k = samples[chunk], steps[chunk]
        log_prob, log_prob_old, advantages = policy_log_prob(unet, scheduler, trajectories, i, k, uncond, eta, w), trajectories.log_probs[i, k], trajectories.advantages[i]
        losses, ratio = ppo_loss(log_prob, log_prob_old, advantages, clip_range)
        if algorithm == "ddpo-sf":
            losses = reinforce_loss(log_prob, advantages)
        return losses, {"ratio": ratio.detach(), "log_ratio": (log_prob - log_prob_old).detach()}

    pairs, grad_norm = step(unet, optimizer, losses_of, len(steps), **settings)
    ratio = pairs["ratio"].reshape(T, -1)
    outside = ((ratio - 1).abs() > clip_range).float()
    return {"loss": pairs["loss"].mean(), "grad_norm": grad_norm, "approx_kl": 0.5 * pairs["log_ratio"].square().mean(),
            "clip_fraction": outside.mean(), "clip_fraction_by_step": outside.mean(1), "ratio_error": (ratio - 1).abs().max()}


def improve(policy, optimizer, trajectories, batch_size, name, lrs, w, **settings):
    """The updates of an epoch of DDPO: every sample once, in the `training_order` of `name`, `batch_size` samples an update.

    lrs: the learning rate of each update; w: guidance in training, policy.w unless --no-cfg-training; settings: those of `update` -> its metrics as
    floats, averaged; first_ratio_error is from the first.
    """
    (rank, world), row, metrics = processes(), {place: i for i, place in enumerate(trajectories.places.tolist())}, []
    order = torch.tensor([row[place] for place in training_order(len(row) * world, name)[rank::world]], device=policy.device)
    for minibatch, lr in zip(order.split(batch_size // world), lrs, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        metrics.append(update(policy.unet, optimizer, policy.scheduler, trajectories, minibatch, policy.embed([""]), eta=policy.eta, w=w, **settings))
    return {**averaged(metrics, without="ratio_error"), "first_ratio_error": metrics[0]["ratio_error"].item()}


def averaged(metrics, without=""):
    """The mean of each metric over an epoch's updates -> {name: float, or list of floats}."""
    return {name: torch.stack([m[name] for m in metrics]).mean(0).tolist() for name in metrics[0] if name != without}


def by_prompt(weight, prompts, rewards):
    """weight(the rewards of one prompt (n,)) -> (n,), for each prompt by itself. prompts: B str, rewards (B,) -> (B,)."""
    weights, prompts = torch.empty_like(rewards), np.array(prompts)
    for prompt in np.unique(prompts):
        mine = torch.from_numpy(prompts == prompt)
        weights[mine] = weight(rewards[mine])
    return weights


def rwr_weights(prompts, rewards, beta):
    """w_RWR of Sec. 4.2: exp(beta r) / Z(c), with Z(c) from the samples of the same prompt, so that a prompt's weights average 1.

    n_c softmax(beta r) over the n_c samples of each prompt. beta: the inverse temperature, per unit of reward. prompts: B str, rewards (B,) -> (B,).
    """
    return by_prompt(lambda r: len(r) * torch.softmax(beta * r, 0), prompts, rewards)


def sparse_weights(prompts, rewards, percentile):
    """w_sparse of Sec. 4.2: 1[r >= C(c)], with C(c) a percentile, from 0 to 1, of the rewards of the same prompt. -> 0 or 1 each, (B,).

    Of up to 10 samples a prompt, 0.9 leaves the best one (interpolating between neighbours; equals are all kept).
    """
    return by_prompt(lambda r: (r >= torch.quantile(r, percentile)).to(r), prompts, rewards)


def denoising_loss(eps, noise, weights):
    """RWR's loss: Eq. 1 in the form that predicts noise (Ho et al. 2020), without weights of timesteps, as in the authors' code.

    weight ||noise - eps||^2 / D. eps, noise (B, 4, h, w); weights (B,) -> (B,).
    """
    return weights * (noise - eps).square().flatten(1).mean(1)


def regress(policy, optimizer, x_0, prompts, weights, batch_size, name, lrs, w, **settings):
    """The updates of an iteration of RWR (Sec. 4.2): the policy's own samples x_0 (N, 4, h, w), all processes', as data for weighted denoising training.

    len(lrs) updates, pass after pass over the samples of weights (N,) above 0, each in a new order; each gets its own noise and a timestep of all
    the schedule's 1000, not only sampling's T; all drawn from `name`. w: guidance in training (App. E.1), 1 with --no-cfg-training. settings: those
    of `step` -> metrics.
    """
    (rank, world), rng, kept, uncond, metrics = processes(), np.random.default_rng(name), np.flatnonzero(weights.cpu()), policy.embed([""]), []
    order = np.concatenate([rng.permutation(kept) for _ in range(-(-len(lrs) * batch_size // len(kept)))])
    for n, lr in enumerate(lrs):
        chosen = order[n * batch_size:(n + 1) * batch_size][rank::world]
        i = torch.from_numpy(chosen).to(policy.device)
        t = torch.from_numpy(rng.integers(len(policy.scheduler.alphas_bar), size=batch_size)[rank::world]).to(policy.device)
        noise = named_noise(x_0.shape[1:], batch_size, *name, n)[rank::world].to(policy.device)
        x_t, cond = add_noise(x_0[i], noise, policy.scheduler.alphas_bar[t]), policy.embed([prompts[j] for j in chosen])

        def losses_of(chunk):
            eps = predict_noise(policy.unet, x_t[chunk], t[chunk], cond[chunk], uncond, w)
            return denoising_loss(eps, noise[chunk], weights[i[chunk]]), {}

        optimizer.param_groups[0]["lr"] = lr
        losses, grad_norm = step(policy.unet, optimizer, losses_of, batch_size // world, **settings)
        metrics.append({"loss": losses["loss"].mean(), "grad_norm": grad_norm})
    return averaged(metrics)


def learn(policy, optimizer, trajectories, prompts, statistics, *, algorithm, batch_size, beta, percentile, clip_range, **settings):
    """All updates of an epoch by any of the four algorithms: rewards weighed prompt by prompt, then `improve` or `regress` -> metrics, None where
    an algorithm has none. trajectories: this process's; prompts: all."""
    places, rewards = trajectories.places, everyones(trajectories.rewards, trajectories.places)
    if algorithm in ("ddpo-is", "ddpo-sf"):
        trajectories.advantages = normalize_advantages(rewards, *statistics.update(prompts, rewards))[places]
        return improve(policy, optimizer, trajectories, batch_size, algorithm=algorithm, clip_range=clip_range, **settings)
    weights = rwr_weights(prompts, rewards, beta) if algorithm == "rwr" else sparse_weights(prompts, rewards, percentile)
    return {**dict.fromkeys(("approx_kl", "clip_fraction", "clip_fraction_by_step", "first_ratio_error")),
            **regress(policy, optimizer, everyones(trajectories.latents[:, -1], places), prompts, weights, batch_size, **settings)}


def alarms(lines, updates):
    """What commonly goes wrong, seen early: the alarms that the last of a run's lines sets off -> {name: what it means, what to try}.

    lines: the metrics of every epoch so far (the README defines them), oldest first. updates: how many of an epoch can have ratios off 1 (DDPO_IS:
    all but the first; else 0). Thresholds: healthy runs of the zoo show clip fractions of 3 to 20 %, gradients within a factor of 3.
    """
    now, earlier, found = lines[-1], [line["grad_norm"] for line in lines[-21:-1] if line["grad_norm"]], {}            # 0: skipped, in fp16
    numbers = [number for value in now.values() for number in (value if isinstance(value, list) else [value])]
    if not all(np.isfinite(number) for number in numbers if isinstance(number, (int, float))):
        return {"not finite": "not all metrics are finite numbers. Try a smaller --lr"}
    if (now.get("first_ratio_error") or 0) > 1e-5:
        found["ratio"] = (f"the ratio is off 1 by {now['first_ratio_error']:.1e} before the first update: training computes another log-probability than "
                          "sampling did. Is guidance the same (--no-cfg-training)? --micro-batch like --sample-batch? the precision?")
    if len(earlier) >= 3 and now["grad_norm"] > 10 * np.median(earlier):
        found["gradient"] = f"the gradient's norm, {now['grad_norm']:.2g}, is over 10 times what it was ({np.median(earlier):.2g}). Try a smaller --lr"
    fractions = [line["clip_fraction"] * (updates + 1) / updates for line in lines[-3:]] if updates else []         # of the updates that can clip
    if len(fractions) == 3 and not 0.001 < np.mean(fractions) < 0.9:
        found["clipping"] = (f"{np.mean(fractions):.1%} of ratios are outside the clip range after the first update: " + (
            "the policy hardly moves. Try a larger --lr" if np.mean(fractions) < 0.5 else "the policy moves too far in an epoch. Try a smaller --lr, or a wider --clip-range"))
    first, *later = [line for line in lines if line.get("eval_diversity")] or [None]
    if later and later[-1]["eval_diversity"] < 0.5 * first["eval_diversity"] and (
            later[-1]["eval_reward_mean"] > first["eval_reward_mean"] + 0.5 * first["eval_reward_std"]):
        found["diversity"] = (f"the reward rises while diversity falls ({first['eval_diversity']:.2f} -> {later[-1]['eval_diversity']:.2f}): "
                              "samples of a prompt grow alike. Look at samples/; stop here, or try a smaller --lr or larger batches")
    return found
