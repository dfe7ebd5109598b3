"""The ten core parts: what is to be written, what it is worth, and the numbers it is tried on.

A part has units: a function, or a class, that is tried by itself. A unit has cases of three kinds,
`values` (60 % of the part's points), `gradients` (20 %) and `edges` (20 %): a kind is earned where
all its cases are right, and shared equally by the units that have it. There are inputs here, but
no formula: those are in oracles.py, which students do not get.

The inputs are the same arrays for everyone, scaled by a factor that HMAC-SHA256(key, student)
gives, so that nobody's right answers are somebody else's. What they must hold, or mistakes pass:
B = 5 of (3, 2, 4) latents, where no two sizes are alike; standard deviations that differ, one 0;
a group of equal rewards; advantages of both signs with ratios below, in and above the clip range;
five and more rewards of a prompt, one exactly on the percentile; padding that would match best.
"""

import hashlib
import hmac
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

KINDS = {"values": 60, "gradients": 20, "edges": 20}  # per cent of a part's points
KEY = b"public"  # of those who learn alone


@dataclass
class Case:
    """One call: its inputs, and those with respect to which it is differentiated."""

    kind: str
    inputs: dict  # {name: array, number, bool or list of str}
    wrt: tuple = ()


@dataclass
class Unit:
    """What is tried by itself, while everything else is the reference's."""

    file: str  # scheduler, ddpo or rewards
    name: str
    outputs: tuple  # the names of what it returns
    cases: list
    cut: tuple = ()  # the functions whose bodies the hand-out lacks; () is the unit's own
    needs: tuple = ()  # units that it calls
    dtypes: dict = field(default_factory=dict)  # {output: its type}, where that isn't float32

    def __post_init__(self):
        self.cut = self.cut or (self.name,)


@dataclass
class Part:
    """A part of the assignments."""

    number: int
    points: int
    minutes: int
    chapter: int
    paper: str
    picture: str  # what is on screen when it is right
    units: list

    def share(self, unit, kind):
        """The points for one kind of a unit's cases -> Fraction. Without gradients: the values'."""
        with_it = [u.name for u in self.units if has(u, kind)]
        percent = KINDS[kind]
        if kind == "values" and not any(has(u, "gradients") for u in self.units):
            percent += KINDS["gradients"]
        return Fraction(self.points * percent, 100 * len(with_it))


def has(unit, kind):
    """Is there a case of this kind?"""
    return any(case.kind == kind for case in unit.cases)


def drawn(key, student, what):
    """A number of the student's own, from 0 to below 1, by HMAC-SHA256. key: bytes."""
    digest = hmac.new(key, f"{student}/{what}".encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def chosen(key, student, what, items, count):
    """`count` of the items, the student's own, in an order of their own -> list."""
    order = sorted(range(len(items)), key=lambda i: drawn(key, student, f"{what}/{i}"))
    return [items[i] for i in order[:count]]


def personal(case, factor):
    """The case's inputs as one student gets them."""
    return {name: scaled(name, value, factor) for name, value in case.inputs.items()}


def scaled(name, value, factor):
    """One input, scaled; counts, places, texts and the numbers 0 and 1 stay what they are."""
    if name in ("alpha_bar_t", "alpha_bar_prev", "alphas_bar", "final_alpha_bar"):
        power = np.asarray(value, dtype=np.float64) ** factor  # stays between 0 and 1, in order
        return power.astype(value.dtype) if isinstance(value, np.ndarray) else float(power)
    if name == "images":
        return value + np.uint8(64 * factor)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return (value.astype(np.float64) * factor).astype(value.dtype)
    if name in ("guidance", "eta", "beta") and value not in (0, 1):
        return value * factor
    return value


def normal(seed, *shape):
    """Standard normal numbers; RandomState's stream is frozen for good. -> float32."""
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def floats(*values):
    """float32, as latents, schedules and losses are."""
    return np.array(values, dtype=np.float32)


def doubles(*values):
    """float64, as rewards are."""
    return np.array(values, dtype=np.float64)


B, SHAPE = 5, (3, 2, 4)  # D = 24
NOW = floats(0.9, 0.6, 0.3, 0.1, 0.02)
PREV = floats(0.95, 0.8, 0.55, 0.3, 0.1)


def latents(seed, count=B):
    """Latents of sizes that are all different."""
    return normal(seed, count, *SHAPE)


def add_noise_unit():
    """Part 1."""
    inputs = {"x_0": latents(1), "noise": latents(2), "alpha_bar_t": NOW}
    ends = {"x_0": latents(3), "noise": latents(4), "alpha_bar_t": floats(0, 1, 0.5, 0.25, 0.75)}
    cases = [Case("values", inputs), Case("gradients", inputs, ("x_0", "noise"))]
    return Unit("scheduler", "add_noise", ("x_t",), [*cases, Case("edges", ends)])


def ddim_units():
    """Part 2."""
    pair = {"eps": latents(5), "x_t": latents(6), "alpha_bar_t": NOW}
    clean = {"eps": latents(7, 1), "x_t": latents(8, 1), "alpha_bar_t": floats(1)}
    cases = [Case("values", pair), Case("gradients", pair, ("eps", "x_t")), Case("edges", clean)]
    x0 = Unit("scheduler", "predicted_x0", ("x_0",), cases)

    alphas = {"alpha_bar_t": NOW, "alpha_bar_prev": PREV}
    last = {"alpha_bar_t": floats(0.9, 0.99), "alpha_bar_prev": floats(1, 1)}
    cases = [Case("values", {**alphas, "eta": eta}) for eta in (0.6, 1.0)]
    cases += [Case("edges", {**last, "eta": 1.0}), Case("edges", {**alphas, "eta": 0.0})]
    std = Unit("scheduler", "ddim_std", ("std",), cases)

    cases = [Case("values", {**pair, **alphas, "eta": eta}) for eta in (0.6, 1.0)]
    cases.append(Case("gradients", {**pair, **alphas, "eta": 0.6}, ("eps", "x_t")))
    ends = {"eps": latents(9, 2), "x_t": latents(10, 2), **last}
    cases += [Case("edges", {**ends, "eta": eta}) for eta in (0.0, 1.0)]
    # 1 - alpha_bar_prev - std^2 is 0 but for rounding: below 0 for some of these
    near = {"alpha_bar_t": np.geomspace(1e-13, 1e-12, 200, dtype=np.float32)}
    near["alpha_bar_prev"] = np.linspace(0.01, 0.9, 200, dtype=np.float32)
    near.update(eps=normal(11, 200, 1, 1, 1), x_t=normal(12, 200, 1, 1, 1), eta=1.0)
    needs = ("predicted_x0", "ddim_std")
    cases.append(Case("edges", near))
    mean_std = Unit("scheduler", "ddim_mean_std", ("mean", "std"), cases, needs=needs)
    return [x0, std, mean_std]


NETWORK = {"theta": floats(0.7, -0.4, 1.1)}  # worker.Network
PROMPTS = {"cond": normal(20, B, 2, 3), "uncond": normal(21, 1, 2, 3)}


def guidance_units():
    """Part 3."""
    halves = {"eps_uncond": latents(22), "eps_cond": latents(23)}
    cases = [Case("values", {**halves, "guidance": 3.0})]
    cases.append(Case("gradients", {**halves, "guidance": 3.0}, ("eps_uncond", "eps_cond")))
    cases += [Case("edges", {**halves, "guidance": w}) for w in (0.0, 1.0)]
    guided = Unit("ddpo", "guided_noise", ("eps",), cases)

    inputs = {**NETWORK, "half": False, "x_t": latents(24), **PROMPTS, "guidance": 3.0}
    inputs["timesteps"] = np.array([11, 3, 7, 2, 5])
    one = {**inputs, "x_t": latents(24, 1), "cond": normal(20, 1, 2, 3)}
    one["timesteps"] = np.array([9])
    cases = [Case("values", inputs), Case("gradients", inputs, ("theta",))]
    cases += [Case("edges", {**inputs, "guidance": 1.0}), Case("edges", one)]
    cases += [Case("edges", {**inputs, "half": True, "guidance": w}) for w in (1.0, 3.0)]
    predict = Unit("ddpo", "predict_noise", ("eps",), cases, needs=("guided_noise",))
    return [guided, predict]


# 12 timesteps: T = 3 visits 11, 7, 3; T = 1: 3
SCHEDULE = {
    "alphas_bar": np.linspace(0.8, 0.1, 12, dtype=np.float32),
    "final_alpha_bar": 0.9,
    "steps_offset": 3,
    "T": 3,
    "eta": 0.8,
}
WHOLE = {**SCHEDULE, "final_alpha_bar": 1.0}  # the last step has no noise


def sample_unit():
    """Part 4."""
    inputs = {**NETWORK, **SCHEDULE, **PROMPTS, "noise": normal(30, B, 4, *SHAPE), "guidance": 3.0}
    last = {**inputs, **WHOLE, "guidance": 1.0}
    single = {**inputs, "T": 1, "noise": normal(31, B, 2, *SHAPE)}
    cases = [Case("values", inputs), Case("gradients", inputs)]
    cases += [Case("edges", last), Case("edges", single)]
    outputs = ("latents", "log_probs", "timesteps", "prompt_embeds")
    needs = ("predict_noise", "ddim_mean_std", "gaussian_log_prob")
    return Unit("ddpo", "sample", outputs, cases, (), needs, {"timesteps": "int64"})


def log_prob_unit():
    """Part 5."""
    inputs = {"x": latents(40), "mean": latents(41), "std": floats(0.3, 0.7, 1.4, 0.05, 2.5)}
    still = {**inputs, "std": floats(0.3, 0.0, 1.4, 0.05, 2.5)}
    half = {name: value.astype(np.float16) for name, value in inputs.items()}
    cases = [Case("values", inputs), Case("gradients", inputs, ("x", "mean"))]
    cases += [Case("edges", still), Case("edges", still, ("mean",)), Case("edges", half)]
    return Unit("scheduler", "gaussian_log_prob", ("log_prob",), cases)


def policy_unit():
    """Part 6."""
    inputs = {**NETWORK, **SCHEDULE, "latents": normal(50, B, 4, *SHAPE)}
    inputs.update(prompt_embeds=PROMPTS["cond"], uncond=PROMPTS["uncond"], guidance=3.0)
    pairs = {"i": np.array([0, 3, 1, 4, 2, 3]), "k": np.array([0, 1, 2, 0, 1, 2])}
    one = {"i": np.array([2]), "k": np.array([2])}
    cases = [
        Case("values", {**inputs, **pairs}),
        Case("gradients", {**inputs, **pairs}, ("theta",)),
    ]
    cases += [Case("edges", {**inputs, **pairs, **WHOLE, "guidance": 1.0})]
    cases += [Case("edges", {**inputs, **one})]
    cut = ("policy_mean_std", "policy_log_prob")
    needs = ("predict_noise", "ddim_mean_std", "gaussian_log_prob")
    return Unit("ddpo", "policy_log_prob", ("log_prob",), cases, cut, needs)


def statistics_units():
    """Part 7."""
    first = ["cat", "dog", "cat", "dog", "cat", "dog", "cat"]
    rewards = {"rewards_0": doubles(1, 5, 2.5, -3, 4, 8, 6.5), "prompts_0": first}
    rewards["prompts_1"] = ["dog", "cat", "dog", "cat", "dog"]
    rewards["rewards_1"] = doubles(0.5, 7, -2, 3, 1.5)
    few = {**rewards, "size": 32, "min_count": 4}  # dog: 3, then 6; cat: 4
    short = {**rewards, "size": 4, "min_count": 2}  # the oldest are forgotten
    alike = {"prompts_0": ["cat"] * 3 + ["dog"] * 3, "rewards_0": doubles(2, 2, 2, 1, 3, 8)}
    alike.update(prompts_1=["cat"], rewards_1=doubles(2), size=32, min_count=2)
    cases = [Case("values", {**rewards, "size": 32, "min_count": 2})]
    cases += [Case("edges", inputs) for inputs in (few, short, alike)]
    cut = ("PromptStatistics.remember", "PromptStatistics.mean_std")
    outputs = ("mean_0", "std_0", "mean_1", "std_1")
    types = dict.fromkeys(outputs, "float64")
    statistics = Unit("ddpo", "PromptStatistics", outputs, cases, cut, (), types)

    rewards = doubles(1, 5, 2.5, -3, 4)
    stats = {"mean": doubles(2, 3, 2, 3, 2), "std": doubles(1.5, 4, 1.5, 4, 1.5)}
    alike = {
        "rewards": doubles(2, 2, 2, 7),
        "mean": doubles(2, 2, 2, 7),
        "std": doubles(0, 0, 0, 0),
    }
    far = {"rewards": doubles(40, -40, 9, -9), "mean": doubles(0, 0, 0, 0)}
    far["std"] = doubles(2, 2, 2, 2)
    large = {"rewards": rewards + 1e9, "mean": stats["mean"] + 1e9, "std": stats["std"]}
    cases = [Case("values", {"rewards": rewards, **stats, "limit": 10.0}), Case("edges", alike)]
    cases += [Case("edges", {**far, "limit": 5.0}), Case("edges", far), Case("edges", large)]
    return [statistics, Unit("ddpo", "normalize_advantages", ("advantages",), cases)]


def loss_units():
    """Part 8."""
    pairs = {"log_prob": floats(-1.4, -0.9, -1.2, -1.1, -1.3, -0.8)}
    pairs["advantages"] = floats(1.5, 0.7, 2.0, -0.6, -1.8, -1.1)
    one = {"log_prob": floats(-1.4), "advantages": floats(0.0)}
    cases = [Case("values", pairs), Case("gradients", pairs, ("log_prob",)), Case("edges", one)]
    reinforce = Unit("ddpo", "reinforce_loss", ("loss",), cases)

    # log-ratios -0.5, 0.05, 0.6 for advantages above 0, then for those below
    old = pairs["log_prob"] - floats(-0.5, 0.05, 0.6, -0.7, -0.04, 0.45)
    inputs = {**pairs, "log_prob_old": old, "clip_range": 0.2}
    first = {**pairs, "log_prob_old": pairs["log_prob"], "clip_range": 1e-4}
    cases = [Case("values", inputs), Case("gradients", inputs, ("log_prob",))]
    cases += [Case("edges", first), Case("edges", {**inputs, "advantages": 0 * old})]
    return [reinforce, Unit("ddpo", "ppo_loss", ("loss", "ratio"), cases)]


def rwr_units():
    """Part 9."""
    prompts = ["cat", "dog", "cat", "cat", "dog", "cat", "dog", "cat", "cat", "dog", "dog"]
    rewards = doubles(0.3, 1.2, -0.5, 1.9, 0.1, 0.8, -1.1, 2.4, 1.1, 0.6, 1.7)
    inputs = {"prompts": prompts, "rewards": rewards}
    alone = {"prompts": ["cat", "dog"], "rewards": doubles(0.4, 2.0)}
    alike = {"prompts": ["cat"] * 4, "rewards": doubles(2, 2, 2, 2)}
    large = {"prompts": ["cat"] * 4, "rewards": doubles(3000, 2999, 2998, -1000)}
    cases = [Case("values", {**inputs, "beta": 1.3})]
    cases += [Case("edges", {**more, "beta": 1.3}) for more in (alone, alike, large)]
    rwr = Unit("ddpo", "rwr_weights", ("weights",), cases)

    # of a cat's six rewards one lies exactly on the percentile 0.8
    cases = [Case("values", {**inputs, "percentile": p}) for p in (0.8, 0.5)]
    cases += [Case("edges", {**more, "percentile": 0.8}) for more in (alone, alike)]
    sparse = Unit("ddpo", "sparse_weights", ("weights",), cases)

    inputs = {"eps": latents(60), "noise": latents(61), "weights": floats(0.5, 2.5, 1.2, 0.1, 0.7)}
    none = {**inputs, "weights": floats(0, 0, 0, 0, 0)}
    cases = [Case("values", inputs), Case("gradients", inputs, ("eps",)), Case("edges", none)]
    return [rwr, sparse, Unit("ddpo", "denoising_loss", ("loss",), cases)]


def sentences(seed, count):
    """Token embeddings of length 1, two special tokens and some padding -> (x, weights, mask)."""
    x = normal(seed, 4, count, 6)
    x /= np.linalg.norm(x, axis=2, keepdims=True)
    weights = np.ones((4, count), dtype=np.float32)
    weights[:, 0] = 0  # a special token, which may be matched
    mask = np.ones((4, count), dtype=bool)
    mask[1, -1:], mask[2, -2:] = False, False
    return x, weights * mask, mask


def reward_units():
    """Part 10."""
    x, x_weights, x_mask = sentences(70, 5)
    y, y_weights, y_mask = sentences(71, 7)
    y[1, -1], y[2, -1] = x[1, 1], x[2, 1]  # padding that would match best
    x[1, -1], x[2, -1] = y[1, 2], y[2, 2]
    y[0, 0] = x[0, 2]  # a special token that does
    inputs = {"x": x, "x_weights": x_weights, "x_mask": x_mask}
    inputs.update(y=y, y_weights=y_weights, y_mask=y_mask)
    empty = {**inputs, "x_weights": x_weights * floats(1, 0, 1, 1)[:, None]}
    empty["y_weights"] = y_weights * floats(0, 1, 1, 1)[:, None]
    cases = [Case("values", inputs), Case("edges", empty)]
    bert = Unit("rewards", "bert_score", ("P", "R", "F"), cases)

    ramp = np.arange(3 * 24 * 16 * 3) ** 2 % 251
    images = ramp.reshape(3, 24, 16, 3).astype(np.uint8)
    images[1] //= 4
    images[2, :, 8:] = 90
    flat = np.full((1, 8, 8, 3), 100, dtype=np.uint8)
    cases = [Case("values", {"images": images, "prompts": ["cat", "dog", "cat"]})]
    cases.append(Case("edges", {"images": flat, "prompts": ["cat"]}))
    size = Unit("rewards", "incompressibility", ("kB",), cases, dtypes={"kB": None})
    return [bert, size]


PARTS = [
    Part(1, 2, 10, 1, "Sec. 3.1", "a fox dissolves", [add_noise_unit()]),
    Part(2, 5, 35, 1, "Eq. 2", "chapter 1's film", ddim_units()),
    Part(3, 4, 25, 2, "Eq. 3", "the grid of guidance weights", guidance_units()),
    Part(4, 4, 35, 3, "Sec. 4.3", "16 animals", [sample_unit()]),
    Part(5, 4, 30, 4, "Eq. 2", "log p by step", [log_prob_unit()]),
    Part(6, 4, 35, 4, "Sec. 4.3", "first ratio error 0", [policy_unit()]),
    Part(7, 5, 35, 5, "App. D.3", "pictures by advantage", statistics_units()),
    Part(8, 5, 35, 6, "Sec. 4.3", "chapter 0's reward climbs", loss_units()),
    Part(9, 4, 30, 7, "Sec. 4.2", "two rounds of RWR", rwr_units()),
    Part(10, 3, 30, 5, "Sec. 5", "best and worst description", reward_units()),
]
UNITS = {unit.name: unit for part in PARTS for unit in part.units}


def variant(number, points, chapter, paper, picture, unit):
    """A part whose one function no file of this project holds; it stands in variants.py."""
    return Part(number, points, 60, chapter, paper, picture, [unit])


def v_unit():
    """Variant 11."""
    inputs = {"v": latents(80), "x_t": latents(81), "alpha_bar_t": NOW}
    ends = {"v": latents(82, 2), "x_t": latents(83, 2), "alpha_bar_t": floats(0, 1)}
    cases = [Case("values", inputs), Case("gradients", inputs, ("v", "x_t"))]
    return Unit("variants", "v_to_noise", ("eps", "x_0"), [*cases, Case("edges", ends)])


def ddpm_unit():
    """Variant 12."""
    inputs = {"eps": latents(84), "x_t": latents(85), "alpha_bar_t": NOW, "alpha_bar_prev": PREV}
    last = {"eps": latents(86, 2), "x_t": latents(87, 2), "alpha_bar_t": floats(0.9, 0.99)}
    last["alpha_bar_prev"] = floats(1, 1)
    cases = [Case("values", {**inputs, "large": large}) for large in (0.3, 0.8)]
    cases.append(Case("gradients", {**inputs, "large": 0.3}, ("eps", "x_t")))
    cases += [Case("edges", {**inputs, "large": large}) for large in (0.0, 1.0)]
    cases += [Case("edges", {**last, "large": large}) for large in (0.0, 0.5, 1.0)]
    return Unit("variants", "ddpm_mean_std", ("mean", "std"), cases)


def joint_unit():
    """Variant 13."""
    # D x the difference: below, in and above the range, for advantages of both signs
    moved = floats(-0.9, 0.1, 1.1, -1.3, -0.08, 0.7)
    inputs = {"log_prob": floats(-1.4, -0.9, -1.2, -1.1, -1.3, -0.8), "dimensions": 24}
    inputs["log_prob_old"] = inputs["log_prob"] - moved / 24
    inputs.update(advantages=floats(1.5, 0.7, 2.0, -0.6, -1.8, -1.1), limit=0.5)
    far = {"log_prob": floats(-1, -1, -1, -1, -1), "limit": 1.5, "dimensions": 16384}
    far["log_prob_old"] = floats(-1.5, -0.5, -1.5, -1.00003, -1.1)
    far["advantages"] = floats(1, -1, 0, 2, -0.5)
    cases = [Case("values", inputs), Case("gradients", inputs, ("log_prob",))]
    cases += [Case("edges", far)]
    return Unit("variants", "joint_ppo_loss", ("loss", "ratio"), cases)


GROUPS = ["cat", "dog", "cat", "cat", "dog", "cat", "fox", "dog", "cat"]
SCORES = doubles(0.3, 1.2, -0.5, 1.9, 0.1, 0.8, -1.1, 2.4, 1.1)


def leave_one_out_unit():
    """Variant 14."""
    inputs = {"prompts": GROUPS, "rewards": SCORES}
    cases = [Case("values", inputs), Case("edges", {"prompts": ["a"], "rewards": doubles(3)})]
    cases.append(Case("edges", {"prompts": GROUPS, "rewards": SCORES + 1e9}))
    types = {"baseline": "float64"}
    return Unit("variants", "leave_one_out", ("advantages", "baseline"), cases, dtypes=types)


def rank_unit():
    """Variant 15."""
    tied = doubles(0.8, 1.2, -0.5, 0.8, 1.2, 0.8, -1.1, 2.4, 1.1)
    alike = {"prompts": ["cat"] * 3 + ["dog"], "rewards": doubles(2, 2, 2, 5)}
    cases = [Case("values", {"prompts": GROUPS, "rewards": r}) for r in (SCORES, tied)]
    return Unit("variants", "rank_advantages", ("advantages",), [*cases, Case("edges", alike)])


def importance_unit():
    """Variant 16."""
    old = normal(88, 6, 4) - 1
    inputs = {"log_probs": old + 0.02 * normal(89, 6, 4), "log_probs_old": old, "dimensions": 24}
    far = {"log_probs": old + 0.2 * normal(90, 6, 4), "log_probs_old": old, "dimensions": 16384}
    cases = [Case("values", inputs), Case("gradients", inputs, ("log_probs",))]
    cases += [Case("edges", far), Case("edges", {**inputs, "log_probs": old})]
    return Unit("variants", "trajectory_weights", ("weights", "effective_size"), cases)


def kl_unit():
    """Variant 17."""
    now = normal(91, 6, 4) - 1
    inputs = {"log_probs": now, "log_probs_ref": now - 0.04 * normal(92, 6, 4), "dimensions": 24}
    one = {"log_probs": now[:1], "log_probs_ref": now[:1] + floats(0.1), "dimensions": 3}
    cases = [Case("values", inputs), Case("gradients", inputs, ("log_probs",))]
    cases += [Case("edges", one), Case("edges", {**inputs, "log_probs_ref": now})]
    return Unit("variants", "kl_estimators", ("means", "errors"), cases)


def kl_to_go_unit():
    """Variant 18."""
    now = normal(93, 5, 4) - 1
    inputs = {"rewards": doubles(1, 5, 2.5, -3, 4), "log_probs": now, "dimensions": 24}
    inputs.update(log_probs_ref=now - 0.05 * normal(94, 5, 4), coefficient=0.3)
    single = {**inputs, "log_probs": now[:, :1], "log_probs_ref": now[:, 1:2]}
    cases = [Case("values", inputs), Case("gradients", inputs, ("log_probs",))]
    cases += [Case("edges", single), Case("edges", {**inputs, "coefficient": 0.0})]
    return Unit("variants", "kl_to_go", ("returns",), cases)


VARIANTS = [
    variant(11, 7, 1, "after Sec. 3.1", "a network of another kind draws", v_unit()),
    variant(12, 7, 1, "after Eq. 2", "the same picture, grainier by the step", ddpm_unit()),
    variant(13, 7, 6, "after App. D.1", "one clip range for all latent sizes", joint_unit()),
    variant(
        14, 7, 5, "after App. D.3", "pictures by advantage, without a std", leave_one_out_unit()
    ),
    variant(15, 7, 5, "after App. D.3", "pictures by rank", rank_unit()),
    variant(16, 7, 6, "after Sec. 4.3", "how many pictures an update is worth", importance_unit()),
    variant(17, 6, 8, "after App. C", "the distance from the base, epoch by epoch", kl_unit()),
    variant(18, 6, 8, "after App. C", "returns, step by step", kl_to_go_unit()),
]


def variants_of(student, key=KEY):
    """One variant of each of the three groups, the student's own -> list of Part."""
    groups = (VARIANTS[:3], VARIANTS[3:6], VARIANTS[6:])
    return [chosen(key, student, f"variants {n}", some, 1)[0] for n, some in enumerate(groups)]


def chapters():
    """{function whose body is cut: the chapter that it belongs to}."""
    return {name: p.chapter for p in PARTS for unit in p.units for name in unit.cut}
