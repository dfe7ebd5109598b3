"""DDPO: denoising diffusion policy optimization (Black et al., arXiv 2305.13301), Sec. 4.

Denoising as an MDP (Sec. 4.3): the state is (c, t, x_t), the action x_{t-1}, the policy the
Gaussian p_theta(x_{t-1} | x_t, c) of scheduler.py; the reward r(x_0, c) comes once, at the end.

In reading order: the guided prediction, rollouts, advantages, the losses, the algorithms, one
optimizer step, alarms, several processes.

Shapes: N samples an epoch, B in a batch, b in a micro-batch; T steps; latents (4, h, w), of
D = 4 h w dimensions; a prompt's embedding (m, d).

Deviations, beside those of scheduler.py. From the paper's text, as in its authors' code:

    what                                        why, effect
    losses are means over timesteps, not sums   the code; REINFORCE's gradient is 1/T of the true
    normalised by a prompt's last 32 rewards,   the code; D.3 gives no numbers
      from the 16th on, else by the epoch's
    advantages are clipped at +-10              the JAX code (PyTorch: 5); touches outliers only
    RWR regresses the noise, not Eq. 1's mean   the code; other weights of the timesteps

and from the code:

    noise is named (seed, epoch, sample)        resume and processes to the bit; batch sizes change
                                                results by rounding only
    RWR trains on the sampled x_0               theirs encodes pictures and samples the VAE's
                                                posterior; here no error of the VAE is in the data
    RWR's weights are per prompt, always        D.3; for JPEG rewards theirs are over all
    RWR's loss is a mean over the batch         theirs is 1/128 of it: its clipping never binds
    RWR-sparse: percentile of a round's own     theirs samples until 1,024 are kept; of few samples
      samples of each prompt                    a prompt, ours keeps a larger share, and says so
    Adam's moments are float32                  theirs: bfloat16 first moments
    rewards are normalised in float64           constant ones give 0; theirs +-1, by rounding
    pairs are trained on in order, unshuffled   rounding: all timesteps go into one update anyway
"""

import math
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import TensorDataset

from scheduler import add_noise, gaussian_log_prob, named_noise, refusing, require


def guided_noise(eps_uncond, eps_cond, guidance):
    """Classifier-free guidance, Eq. 3, rearranged: w eps(x_t, t, c) + (1 - w) eps(x_t, t).

    guidance is the paper's w; 1 is the plain conditional prediction.
    eps_uncond, eps_cond (B, 4, h, w) -> (B, 4, h, w).
    """
    return eps_uncond + guidance * (eps_cond - eps_uncond)


def predict_noise(network, x_t, timesteps, cond, uncond, guidance):
    """The guided prediction, both halves in one pass. In training too: "CFG training", App. E.1.

    network(x_t, timesteps, context) -> any float type. x_t (B, 4, h, w), timesteps (B,),
    cond (B, m, d), uncond (1, m, d) -> float32 (B, 4, h, w).
    """
    if guidance == 1:
        return network(x_t, timesteps, cond).float()
    context = torch.cat([uncond.expand_as(cond), cond])  # (2B, m, d)
    eps = network(torch.cat([x_t, x_t]), torch.cat([timesteps, timesteps]), context).float()
    eps_uncond, eps_cond = eps.chunk(2)
    return guided_noise(eps_uncond, eps_cond, guidance)


@dataclass
class Trajectories:
    """A batch of rollouts: what sampling hands to training.

    Always float32, so that ratios begin at 1: a rounded x_{t-1} is not the one of this log p.
    """

    latents: torch.Tensor  # (B, T+1, 4, h, w): x_T first, x_0 last
    log_probs: torch.Tensor  # (B, T): log p(x_{t-1} | x_t, c) under the policy that sampled
    timesteps: torch.Tensor  # (T,): common to all
    prompt_embeds: torch.Tensor  # (B, m, d)

    def __len__(self):
        return len(self.latents)

    @staticmethod
    def cat(parts):
        """Several batches as one."""
        names = ("latents", "log_probs", "prompt_embeds")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        return Trajectories(timesteps=parts[0].timesteps, **joined)


@torch.no_grad()
def sample(network, sampler, cond, uncond, noise, guidance):
    """Sec. 4.3: roll out the policy. x_T ~ N(0, I), then T actions x_{t-1} ~ p_theta(. | x_t, c).

    cond (B, m, d); uncond (1, m, d), the empty prompt; noise (B, T+1, 4, h, w), for x_T and for
    each action -> Trajectories.
    """
    x = noise[:, 0]
    latents, log_probs = [x], []
    for k, timestep in enumerate(sampler.timesteps):
        t = timestep.expand(len(x))
        eps = predict_noise(network, x, t, cond, uncond, guidance)
        x, mean, std = sampler.step(eps, x, t, noise[:, k + 1])
        latents.append(x)
        log_probs.append(gaussian_log_prob(x, mean, std))
    latents, log_probs = torch.stack(latents, dim=1), torch.stack(log_probs, dim=1)
    return Trajectories(latents, log_probs, sampler.timesteps, cond)


@dataclass
class Policy:
    """The parts of a Stable Diffusion, of which only the UNet is trained."""

    unet: torch.nn.Module
    vae: torch.nn.Module
    sampler: object  # scheduler.Sampler
    tokenizer: object
    text_encoder: torch.nn.Module
    device: torch.device
    guidance: float  # in sampling
    dtype: torch.dtype = torch.float32  # of the networks' arithmetic

    def __post_init__(self):
        # 512 prompts of SD v1.4 take 121 MB; all those of a long list would take gigabytes
        self.encoded = lru_cache(maxsize=512)(self.encode)

    def autocast(self):
        """Half precision where it was asked for: around the networks, and around nothing else."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def network(self, x_t, timesteps, context):
        """The UNet, in the precision asked for: the `network` of `sample` and the losses."""
        with self.autocast():
            return self.unet(x_t, timesteps, context)

    @torch.no_grad()
    def encode(self, prompt):
        """The embedding of one prompt, padded to the tokenizer's length -> float32 (m, d)."""
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        tokens = self.tokenizer(prompt, **options, return_tensors="pt").input_ids
        return self.text_encoder(tokens.to(self.device)).last_hidden_state[0].float()

    def embed(self, prompts):
        """Prompt embeddings, each prompt encoded once: list of B str -> (B, m, d)."""
        return torch.stack([self.encoded(prompt) for prompt in prompts])

    def uncond(self):
        """The embedding of the empty prompt (1, m, d)."""
        return self.embed([""])

    def sample(self, prompts, names, batch):
        """Pictures for the prompts, `batch` at a time; sample i has the noise called names[i].

        prompts: N str; names: N tuples of int -> yields Trajectories, images uint8 (b, H, W, 3).
        """
        side, T = self.unet.config["sample_size"], self.sampler.T
        shape = (self.unet.config["in_channels"], side, side)
        for start in range(0, len(prompts), batch):
            some = slice(start, start + batch)
            noise = torch.stack([named_noise(shape, T + 1, *name) for name in names[some]])
            inputs = (self.embed(prompts[some]), self.uncond(), noise.to(self.device))
            trajectories = sample(self.network, self.sampler, *inputs, self.guidance)
            yield trajectories, self.decode(trajectories.latents[:, -1])

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, 4, h, w) -> images uint8 (B, H, W, 3), on the CPU."""
        with self.autocast():
            decoded = self.vae.decode(latents)
        images = (decoded.float() / 2 + 0.5).clamp(0, 1)
        return (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class PromptStatistics:
    """App. D.3's running statistics of each prompt: over its last `size` rewards (code: 32)."""

    def __init__(self, size=32, min_count=16):
        self.size, self.min_count = size, min_count
        self.history = {}  # {prompt: list of its last rewards}

    def remember(self, prompts, rewards):
        """Take in an epoch's rewards. prompts: B str, rewards (B,)."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.history[prompt] = [*self.history.get(prompt, []), reward][-self.size :]

    def mean_std(self, prompts, rewards):
        """Mean and deviation (over n) to normalise each reward by. float64 (B,) -> (B,), (B,).

        Those of its prompt's remembered rewards; of all this epoch's, while these are too few.
        """
        everyone = rewards.tolist()
        rows = [self.history.get(prompt, []) for prompt in prompts]
        rows = [row if len(row) >= self.min_count else everyone for row in rows]
        mean = torch.tensor([np.mean(row) for row in rows])
        return mean.to(rewards), torch.tensor([np.std(row) for row in rows]).to(rewards)


def normalize_advantages(rewards, mean, std, limit=10.0):
    """App. D.3: A = (r - mean) / (std + 1e-6), clipped to +-limit as in the authors' code.

    rewards, mean, std float64 (B,), the last two those of each sample's prompt -> float32 (B,).
    """
    return ((rewards - mean) / (std + 1e-6)).clamp(-limit, limit).float()


def reinforce_loss(log_prob, advantages):
    """DDPO_SF, the score-function estimator of Sec. 4.3, as a loss a pair.

        loss = -A log p_theta(x_{t-1} | x_t, c)         gradient: -A grad log p_theta

    Valid for samples of the current policy only, hence one update an epoch.
    log_prob, advantages (B,) -> (B,).
    """
    return -advantages * log_prob


def ppo_loss(log_prob, log_prob_old, advantages, clip_range):
    """DDPO_IS, the importance-sampling estimator of Sec. 4.3, clipped as in App. D.1.

        ratio = (p_theta(x_{t-1} | x_t, c) / p_theta_old(x_{t-1} | x_t, c))^(1/D)
        loss  = -min(ratio A, clip(ratio, 1 - clip_range, 1 + clip_range) A)

    The D-th root, since log_prob is a mean over the D dimensions.
    log_prob, log_prob_old, advantages (B,) -> losses (B,), ratios before the clip (B,).
    """
    ratio = (log_prob - log_prob_old).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio


def policy_mean_std(network, sampler, trajectories, i, k, uncond, guidance):
    """The present policy's Gaussian in recorded states, with gradient.

    Pair j: state k_j (0: the noisiest) of trajectory i_j. i, k (b,) -> mean (b, 4, h, w), std (b,).
    """
    x_t, t = trajectories.latents[i, k], trajectories.timesteps[k]
    eps = predict_noise(network, x_t, t, trajectories.prompt_embeds[i], uncond, guidance)
    return sampler.mean_std(eps, x_t, t)


def policy_log_prob(network, sampler, trajectories, i, k, uncond, guidance):
    """log p_theta(x_{t-1} | x_t, c) of recorded actions, pairs as above. i, k (b,) -> (b,)."""
    mean, std = policy_mean_std(network, sampler, trajectories, i, k, uncond, guidance)
    return gaussian_log_prob(trajectories.latents[i, k + 1], mean, std)


def noise_weights(sampler):
    """w_t = |d mean / d eps| / sigma_t of each step; 0 where sigma_t = 0. -> (T,).

    What grad log p has as a factor at step t: see `DDPOEqualCredit`.
    """
    t = sampler.timesteps
    zeros = torch.zeros(len(t), 1, 1, 1, device=t.device)
    mean, std = sampler.mean_std(zeros + 1, zeros, t)  # linear in eps, and 0 at x_t = eps = 0
    return torch.where(std > 0, mean.flatten().abs() / std, 0.0)


def by_prompt(weigh, prompts, rewards):
    """weigh(the rewards of one prompt (n,)) -> (n,), for each prompt by itself. -> float32 (B,)."""
    weights, prompts = torch.empty_like(rewards), np.array(prompts)
    for prompt in np.unique(prompts):
        mine = torch.from_numpy(prompts == prompt)
        weights[mine] = weigh(rewards[mine])
    return weights.float()


def rwr_weights(prompts, rewards, beta):
    """w_RWR of Sec. 4.2, normalised prompt by prompt (App. D.2, D.3): they average 1 in each.

        w = n_c softmax(beta r)         over the n_c samples of prompt c

    beta: the inverse temperature, per unit of reward. prompts: B str, rewards (B,) -> (B,).
    """
    return by_prompt(lambda r: len(r) * torch.softmax(beta * r, 0), prompts, rewards)


def sparse_weights(prompts, rewards, percentile):
    """w_sparse of Sec. 4.2: 1[r >= C], with C a percentile, 0 to 1, of the prompt's rewards.

    Of up to 10 samples a prompt, 0.9 leaves the best one (interpolating between neighbours; equals
    are all kept). prompts: B str, rewards (B,) -> 0 or 1 each, (B,).
    """
    return by_prompt(lambda r: (r >= torch.quantile(r, percentile)).to(r), prompts, rewards)


def denoising_loss(eps, noise, weights):
    """RWR's loss, Sec. 4.2: Eq. 1 with noise as the target, weighted. As in the authors' code.

        loss = weight ||noise - eps||^2 / D

    eps, noise (B, 4, h, w); weights (B,) -> (B,).
    """
    return weights * (noise - eps).square().flatten(1).mean(1)


@dataclass
class Pairs:
    """(sample, timestep) pairs: action k_j (0: the noisiest) of trajectory i_j, advantage A_j."""

    trajectories: Trajectories
    i: torch.Tensor  # (n,)
    k: torch.Tensor  # (n,)
    advantages: torch.Tensor  # (n,)

    def __len__(self):
        return len(self.i)

    def __getitem__(self, chunk):
        return Pairs(self.trajectories, self.i[chunk], self.k[chunk], self.advantages[chunk])


def all_pairs(trajectories, samples, advantages):
    """Every action of the trajectories `samples` (b,), timestep by timestep -> Pairs (T * b,).

    In this order micro-batches of the rollout's size repeat the rollout's arithmetic.
    """
    steps = torch.arange(len(trajectories.timesteps), device=samples.device)
    k, i = torch.meshgrid(steps, samples, indexing="ij")
    return Pairs(trajectories, i.flatten(), k.flatten(), advantages[i.flatten()])


class Algorithm(ABC):
    """How an epoch's rewards become optimizer steps; `settings` are train.py's.

    Numbers and words among the class attributes can be set by --set name=value, before `setup`.
    """

    defaults = {}  # the paper's numbers, where they differ from DDPO_IS's
    fresh_optimizer = False  # does each epoch begin without Adam's moments?

    def __init__(self, settings):
        self.settings = settings

    @classmethod
    def settle(cls, settings, given):
        """Fill in batch_size and updates, refuse what cannot be. `given`: the settings typed."""
        settings.batch_size = settings.batch_size or settings.samples_per_epoch
        settings.updates = settings.updates or settings.samples_per_epoch // settings.batch_size

    def setup(self, policy):
        """Called once, with the policy as it is before any update."""

    def record(self, trajectories):
        """What training keeps of a batch of trajectories."""
        return trajectories

    @abstractmethod
    def weights(self, prompts, rewards):
        """Called once an epoch. prompts: N str, rewards float64 (N,) -> float32 (N,)."""

    @abstractmethod
    def batches(self, policy, records, prompts, weights, name):
        """Yield `updates` batches of this process's rows, each with len() and [slice].

        records: of this process's samples; prompts, weights: of all; name: seeds what is random.
        """

    @abstractmethod
    def losses(self, policy, batch):
        """-> losses (b,), and what is to be logged of each row {name: (b,)}."""

    def metrics(self, logged):
        """From what an update logged of all its rows, {name: (n,)} -> {name: tensor}."""
        return {}

    def state_dict(self):
        """What --resume needs to know, for JSON."""
        return {}

    def load_state_dict(self, state):
        """What `state_dict` gave."""


class DDPO(Algorithm):
    """DDPO_IS, Sec. 4.3, App. D.1, D.3: importance sampling, several updates an epoch."""

    defaults = {"batch_size": 64}  # App. D.5
    advantage_limit = 10.0

    def __init__(self, settings):
        super().__init__(settings)
        self.statistics = PromptStatistics(settings.history_size, settings.min_count)

    @classmethod
    def settle(cls, settings, given):
        """Every picture is taken once an epoch; a batch size nobody gave shrinks until it fits."""
        n, world = settings.samples_per_epoch, processes()[1]
        most = settings.batch_size or n
        if "batch_size" not in given:
            fits = [size for size in range(world, most + 1, world) if n % size == 0]
            settings.batch_size = max(fits, default=most)
        super().settle(settings, given)
        size, updates = settings.batch_size, settings.updates
        require(settings.eta > 0, "--eta 0: a step without noise has no policy gradient")
        require(not settings.no_cfg_training, "--no-cfg-training is for rwr and rwr-sparse only")
        line = f"--updates {updates} of --batch-size {size} do not take each of {n} pictures once"
        require(updates * size == n, line)

    def weights(self, prompts, rewards):
        """The advantages of an epoch's samples, which are remembered."""
        self.statistics.remember(prompts, rewards)
        mean, std = self.statistics.mean_std(prompts, rewards)
        return normalize_advantages(rewards, mean, std, self.advantage_limit)

    def batches(self, policy, records, prompts, weights, name):
        """Whole trajectories with all their timesteps, each once, as sampled -> yields Pairs."""
        trajectories = Trajectories.cat(records)
        records.clear()  # or they would be held twice: 0.9 GB of SD v1.4
        advantages = share(weights).to(policy.device)
        samples = torch.arange(len(trajectories), device=policy.device)
        for some in samples.split(self.settings.batch_size // processes()[1]):
            yield all_pairs(trajectories, some, advantages)

    def log_probs(self, policy, pairs):
        """Of the present policy and of the one that sampled -> (b,), (b,)."""
        actions = (pairs.trajectories, pairs.i, pairs.k)
        guided = (policy.uncond(), self.settings.guidance)
        now = policy_log_prob(policy.network, policy.sampler, *actions, *guided)
        old = pairs.trajectories.log_probs[pairs.i, pairs.k]
        return now, old

    def losses(self, policy, pairs):
        """-> losses (b,), what is to be logged of each pair {name: (b,)}."""
        now, old = self.log_probs(policy, pairs)
        losses = self.estimator(now, old, pairs.advantages)
        return losses, {"k": pairs.k, "log_ratio": (now - old).detach()}

    def estimator(self, log_prob, log_prob_old, advantages):
        """The policy gradient's estimator, as a loss a pair. (b,), (b,), (b,) -> (b,)."""
        return ppo_loss(log_prob, log_prob_old, advantages, self.settings.clip_range)[0]

    def metrics(self, logged):
        """How far the ratios are off 1, on either side, whether the clip is active or not."""
        off_1 = (logged["log_ratio"].exp() - 1).abs()
        return {
            "approx_kl": 0.5 * logged["log_ratio"].square().mean(),
            "clip_fraction": (off_1 > self.settings.clip_range).float().mean(),
            "first_ratio_error": off_1.max(),  # `averaged` keeps that of the epoch's first update
        }

    def state_dict(self):
        """The rewards remembered."""
        return {"statistics": self.statistics.history}

    def load_state_dict(self, state):
        """What `state_dict` gave."""
        self.statistics.history = state["statistics"]


class DDPOScoreFunction(DDPO):
    """DDPO_SF, Sec. 4.3: REINFORCE, one update an epoch."""

    defaults = {"batch_size": 256}

    @classmethod
    def settle(cls, settings, given):
        """A batch is the whole epoch."""
        settings.batch_size = given.get("batch_size", settings.samples_per_epoch)
        super().settle(settings, given)
        require(settings.updates == 1, "ddpo-sf takes one update an epoch: leave out --batch-size")

    def estimator(self, log_prob, log_prob_old, advantages):
        """Without a ratio: that is logged all the same, and should be 1."""
        return reinforce_loss(log_prob, advantages)


class DDPOEqualCredit(DDPO):
    """DDPO_IS with the same credit for each step; not the paper's (PCPO, arXiv 2509.25774).

    The mean is linear in eps, k_t eps + ..., and an action was mean + sigma_t z, so that at ratio 1

        grad log p(x_{t-1} | x_t, c) = (k_t / sigma_t) z grad eps             w_t = |k_t| / sigma_t

    Nobody chose w_t: at T = 12 it is 7.4 at the last step but one and about 1 at the others, which
    hands most of an update to that step. Here log-probabilities are multiplied by mean(w) / w_t:
    no longer the exact policy gradient, but a clip range means the same at every step.
    """

    def setup(self, policy):
        """The factor of each step."""
        w = noise_weights(policy.sampler)
        self.scale = torch.where(w > 0, w[w > 0].mean() / w, 0.0)

    def log_probs(self, policy, pairs):
        """Of the present policy and of the one that sampled, both scaled -> (b,), (b,)."""
        now, old = super().log_probs(policy, pairs)
        return self.scale[pairs.k] * now, self.scale[pairs.k] * old


class RWR(Algorithm):
    """Reward-weighted regression on the policy's own samples. Sec. 4.2, D.2."""

    defaults = {"samples_per_epoch": 10_000, "batch_size": 128, "updates": 400}  # App. D.5
    defaults.update(eval_every=1, checkpoint_every=1)  # a round is as long as 40 of DDPO's epochs
    fresh_optimizer = True  # as in the authors' code: each round is a regression of its own

    def record(self, trajectories):
        """x_0 alone: 10,000 trajectories of SD v1.4 would take 36 GB."""
        return trajectories.latents[:, -1].clone()

    def weights(self, prompts, rewards):
        """The weight of each sample's loss."""
        return rwr_weights(prompts, rewards, self.settings.beta)

    def batches(self, policy, records, prompts, weights, name):
        """Pass after pass over the samples of weight above 0, each in a new order.

        Each batch has noise of its own, and timesteps of all the schedule's 1000, not only of
        sampling's T; all are drawn from `name`. -> yields x_t, timesteps, cond, noise, weights.
        """
        updates, size = self.settings.updates, self.settings.batch_size
        x_0, alphas_bar = gather(torch.cat(records)), policy.sampler.schedule.alphas_bar
        rng, kept = np.random.default_rng(name), np.flatnonzero(weights)
        passes = math.ceil(updates * size / len(kept))
        order = np.concatenate([rng.permutation(kept) for _ in range(passes)])
        for n in range(updates):
            chosen = share(order[n * size : (n + 1) * size])
            t = torch.from_numpy(share(rng.integers(len(alphas_bar), size=size))).to(policy.device)
            noise = share(named_noise(x_0.shape[1:], size, *name, n)).to(policy.device)
            x_t = add_noise(x_0[torch.from_numpy(chosen).to(x_0.device)], noise, alphas_bar[t])
            cond = policy.embed([prompts[i] for i in chosen])
            # they average 1 over what is drawn, though some may have underflowed to 0
            w = (weights / weights[kept].mean())[chosen].to(policy.device)
            yield TensorDataset(x_t, t, cond, noise, w)

    def losses(self, policy, rows):
        """-> losses (b,), and nothing to be logged of each row."""
        x_t, timesteps, cond = rows[:3]
        noise, weights = rows[3:]
        guidance = 1.0 if self.settings.no_cfg_training else self.settings.guidance
        eps = predict_noise(policy.network, x_t, timesteps, cond, policy.uncond(), guidance)
        return denoising_loss(eps, noise, weights), {}


class RWRSparse(RWR):
    """RWR with weights of 0 and 1: the best samples of each prompt are kept. Sec. 4.2."""

    def weights(self, prompts, rewards):
        """1 for the samples that are kept, else 0."""
        weights = sparse_weights(prompts, rewards, self.settings.percentile)
        kept, expected = weights.mean().item(), 1 - self.settings.percentile
        if kept > 2 * expected and rewards.std() > 0:  # alike, all are kept: an alarm says so
            why = "of few a prompt the best is kept anyway. Raise --samples-per-prompt"
            print(f"warning: rwr-sparse keeps {kept:.0%} of the samples, not {expected:.0%}: {why}")
        return weights


ALGORITHMS = {
    "ddpo-is": DDPO,
    "ddpo-sf": DDPOScoreFunction,
    "ddpo-equal": DDPOEqualCredit,
    "rwr": RWR,
    "rwr-sparse": RWRSparse,
}


def accumulate(policy, algorithm, batch, micro_batch, scaler):
    """Gradients of the mean of a batch's losses, added up micro-batch by micro-batch.

    The mean is over all processes' rows, len(batch) in each -> what was logged of this process's
    rows {name: (n,)}, "loss" included.
    """
    parts, total = [], len(batch) * processes()[1]
    for start in range(0, len(batch), micro_batch):  # nothing in this loop waits for the device
        losses, logged = algorithm.losses(policy, batch[start : start + micro_batch])
        scaler.scale(losses.sum() / total).backward()
        parts.append({"loss": losses.detach(), **logged})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def optimizer_step(policy, algorithm, optimizer, batch, micro_batch, max_grad_norm, scaler=None):
    """One update of the weights, the same in all processes -> metrics {name: tensor}.

    scaler: a GradScaler, for fp16. grad_norm: before clipping; 0 where it overflows: no update.
    """
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad(set_to_none=True)
    logged = accumulate(policy, algorithm, batch, micro_batch, scaler)
    sum_gradients(parameters)
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled():
        grad_norm = torch.where(grad_norm.isfinite(), grad_norm, 0.0)
    logged = {name: gather(values) for name, values in logged.items()}
    return {"loss": logged["loss"].mean(), "grad_norm": grad_norm, **algorithm.metrics(logged)}


def averaged(updates):
    """The mean of each metric over an epoch's updates; of first_..., the first update's value.

    updates: [{name: tensor}] -> {name: float, or list of floats}.
    """
    means = {}
    for name, value in updates[0].items():
        if not name.startswith("first_"):
            value = torch.stack([metrics[name] for metrics in updates]).mean(0)
        means[name] = value.tolist()
    return means


def alarms(lines, updates):
    """What commonly goes wrong, seen early: the alarms that the last of a run's lines sets off.

    lines: the metrics of every epoch so far, oldest first; updates: how many an epoch has
    -> {name: what it means, what to try}. Thresholds: healthy runs of the zoo show clip fractions
    of 3 to 20 %, and gradients within a factor of 3.
    """
    now, found = lines[-1], {}
    values = [np.atleast_1d(v) for v in now.values() if isinstance(v, (int, float, list))]
    if not np.isfinite(np.concatenate(values)).all():
        return {"not finite": "not all metrics are finite numbers. Try a smaller --lr"}
    error = now.get("first_ratio_error") or 0
    if error > 1e-5:
        what = f"the ratio is off 1 by {error:.1e} before the first update, for training computes"
        found["ratio"] = f"{what} log p otherwise: is --micro-batch --sample-batch? the precision?"
    before = [line["grad_norm"] for line in lines[-21:-1] if line["grad_norm"]]  # 0: skipped
    times = now["grad_norm"] / np.median(before) if len(before) >= 3 else 0
    if times > 10:
        found["gradient"] = f"its norm is {times:.0f} times what it was. Try a smaller --lr"
    if now.get("reward_std") == 0:
        found["spread"] = "all rewards of the epoch are alike: there is nothing to learn from them"
    elif updates > 1 and now["clip_fraction"] is not None and len(lines) >= 3:
        # of the updates that can clip: in an epoch's first one all ratios are 1
        outside = np.mean([line["clip_fraction"] for line in lines[-3:]]) * updates / (updates - 1)
        what = f"{outside:.1%} of ratios are outside the clip range after the first update: "
        if outside < 0.001:
            found["clipping"] = what + "the policy hardly moves. Try a larger --lr"
        if outside > 0.9:
            found["clipping"] = what + "it moves too far. Try a smaller --lr or wider --clip-range"
    seen = [line for line in lines if line.get("eval_diversity")]
    if seen:
        risen = seen[-1]["eval_reward_mean"] - seen[0]["eval_reward_mean"]
        left = seen[-1]["eval_diversity"] / seen[0]["eval_diversity"]
        if risen > 0.5 * seen[0]["eval_reward_std"] and left < 0.5:
            what = f"the reward rises while diversity falls, to {left:.0%} of the base model's"
            found["diversity"] = f"{what}. Look at samples/; stop here, or try a smaller --lr"
    return found


def join(device):
    """Meet the other processes, each with its own device. torchrun says how, or a job queue."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with refusing("WORLD_SIZE is set: start by torchrun, or unset it", ValueError):
        dist.init_process_group(timeout=timedelta(hours=2))  # a slow reward is no death
        dist.barrier()  # one that ended now would leave the others a traceback


def together():
    """Where another process has died, all end: here, in one line."""
    line = "another process has ended; its own line says why, and --resume goes on"
    return refusing(line, RuntimeError)


def processes():
    """The number of this process, and of all -> (0, 1) where there is but one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(items):
    """This process's share of a list, an array or a tensor: every so many-th item."""
    rank, world = processes()
    return items[rank::world]


def gather(mine):
    """All processes' rows, array or tensor, as `share` dealt. (n, ...) -> (n * world, ...)."""
    mine, world = torch.as_tensor(mine), processes()[1]
    if world == 1:
        return mine
    parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(world)]
    with together():
        dist.all_gather(parts, mine.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def sum_gradients(parameters):
    """Add up the gradients of all processes, in plain sight."""
    if processes()[1] > 1:
        with together():
            for p in parameters:
                dist.all_reduce(p.grad)
