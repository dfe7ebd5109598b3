"""The lecturer's own answers to bugs.py: a test for each, which fails on the module with the fault.

`source(5)` is the text of a submission's test_05.py. The third test of each row of wrong answers
that tests/test_assignments2.py hands in is in here as well: one that looks at how things are
written.
"""

import inspect


def test_01():
    """Pictures of an epoch have noises of their own."""
    import torch

    from scheduler import named_noise

    first, second = (named_noise((2, 2), 1, 0, 3, picture) for picture in (0, 1))
    assert not torch.equal(first, second)


def test_02():
    """Of scaled_linear the square roots of beta lie on a line."""
    from scheduler import NoiseSchedule

    ends = {"beta_start": 0.01, "beta_end": 0.09, "num_train_timesteps": 3}
    schedule = NoiseSchedule.from_config({**ends, "beta_schedule": "scaled_linear"})
    assert abs(schedule.alphas_bar[1].item() - 0.99 * (1 - 0.2**2)) < 1e-6


def test_03():
    """What is brighter than white stays white."""
    import types

    import torch

    import ddpo

    vae = types.SimpleNamespace(decode=lambda latents: torch.full((1, 3, 2, 2), 1.5))
    device = torch.device("cpu")
    policy = ddpo.Policy(None, vae, None, None, None, device, 1.0)
    assert (policy.decode(torch.zeros(1, 4, 1, 1)) == 255).all()


def test_04():
    """Each action has the advantage of its own picture."""
    import torch

    import ddpo

    latents, steps = torch.zeros(2, 4, 1, 1, 1), torch.arange(3)
    trajectories = ddpo.Trajectories(latents, torch.zeros(2, 3), steps, torch.zeros(2, 1, 1))
    advantages = torch.tensor([1.0, -1.0])
    pairs = ddpo.all_pairs(trajectories, torch.arange(2), advantages)
    assert torch.equal(pairs.advantages, advantages[pairs.i])


def test_05():
    """The ratio is that to the log p that was recorded when sampling."""
    import types

    import torch

    import ddpo
    from scheduler import NoiseSchedule, Sampler

    def embed():
        return torch.zeros(1, 1, 1)

    sampler = Sampler(NoiseSchedule(torch.tensor([0.9, 0.5]), 1.0, 0), 2, 1.0)
    still = {"network": lambda x_t, timesteps, context: 0 * x_t}
    policy = types.SimpleNamespace(sampler=sampler, uncond=embed, **still)
    settings = dict(guidance=1.0, clip_range=0.1, history_size=32, min_count=16)
    algorithm = ddpo.DDPO(types.SimpleNamespace(**settings))
    latents, logs = [torch.ones(1, 3, 1, 1, 1), torch.tensor([[-7.0, 0.0]])]
    recorded = ddpo.Trajectories(latents, logs, sampler.timesteps, torch.zeros(1, 1, 1))
    first = torch.tensor([0])
    pairs = ddpo.Pairs(recorded, first, first, torch.ones(1))
    logged = algorithm.losses(policy, pairs)[1]
    now = ddpo.policy_log_prob(policy.network, sampler, recorded, first, first, embed(), 1.0)
    assert abs(logged["log_ratio"] - (now + 7.0)) < 1e-5


def test_06():
    """The gradient does not depend on how many pairs go through at a time."""
    import types

    import torch

    import ddpo

    gradients = []
    for size in (4, 1):
        weight = torch.ones(1, requires_grad=True)
        losses = types.SimpleNamespace(losses=lambda policy, rows, w=weight: (w * rows, {}))
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        ddpo.accumulate(None, losses, torch.arange(4.0), size, scaler)
        gradients.append(weight.grad.item())
    assert gradients == [1.5, 1.5]


def test_07():
    """The gradient of an update does not hold on to the one before."""
    import types

    import torch

    import ddpo

    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], 0.0)
    parts = {"losses": lambda policy, rows: (weight * rows, {}), "metrics": lambda logged: {}}
    algorithm = types.SimpleNamespace(**parts)
    data = (None, algorithm, optimizer, torch.ones(2), 2, 100.0)
    norms = [ddpo.optimizer_step(*data)["grad_norm"].item() for _ in range(2)]
    assert abs(norms[0] - norms[1]) < 1e-6


def test_08():
    """Each picture is trained on with the prompt that it was drawn for."""
    import types

    import torch

    import ddpo

    settings = types.SimpleNamespace(updates=1, batch_size=8)
    schedule = types.SimpleNamespace(alphas_bar=torch.ones(10))  # no noise: x_t is x_0
    parts = {"sampler": types.SimpleNamespace(schedule=schedule), "device": torch.device("cpu")}
    policy = types.SimpleNamespace(embed=lambda p: torch.tensor([*map(float, p)]), **parts)
    records = [torch.arange(4.0).reshape(4, 1, 1, 1)]
    prompts, weights = ["0", "1", "2", "3"], torch.ones(4)
    batches = ddpo.RWR(settings).batches(policy, records, prompts, weights, [0, 0, 1])
    x_t, _, cond = next(iter(batches))[:][:3]
    assert torch.equal(x_t.flatten(), cond)


def test_09():
    """RWR keeps the finished picture, which is the last of the latents."""
    import types

    import torch

    import ddpo

    latents = torch.arange(3.0).reshape(1, 3, 1, 1, 1)
    trajectories = ddpo.Trajectories(latents, torch.zeros(1, 2), torch.arange(2), torch.zeros(1))
    assert ddpo.RWR(types.SimpleNamespace()).record(trajectories).item() == 2


def test_10():
    """The same picture has the same score: no dropout."""
    import tempfile
    from pathlib import Path

    from safetensors.torch import save_file

    import rewards

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(rewards.AestheticHead(4).state_dict(), path)
        assert not rewards.load_head(str(path), 4).training


def test_11():
    """Two pictures at right angles are 1 apart; a picture is no pair with itself."""
    import numpy as np

    from rewards import diversity

    assert abs(diversity(np.eye(2, dtype=np.float32), ["a", "a"]) - 1) < 1e-6


def source(number):
    """The text of one test, as a file of its own."""
    return inspect.getsource(globals()[f"test_{number:02d}"])


def as_if_12():
    """What looks like a fault in bug 12 is what bug 5 has: the same test tells them apart."""
    return source(5).replace("def test_05", "def test_12")
