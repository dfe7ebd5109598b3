"""What copying can't answer: variants, bugs, questions and the final project.

No right answer to a variant stands in this repository but its oracle, so a right submission here is
the oracle itself, called from torch, with gradients by finite differences; a wrong one is a named
mistake. That the oracles are right is tried by what they must fulfil.
"""

import inspect
import re
from pathlib import Path

import check
import handout
import numpy as np
import oracles
import pytest
import torch
import variants
import worker
from parts import VARIANTS, variants_of

import scheduler

ROOT = Path(__file__).parents[1]
FUNCTIONS = {part.units[0].name: part for part in VARIANTS}

SUBMITTED = '''
import numpy as np
import oracles
import torch
import variants


class Brute(torch.autograd.Function):
    """The oracle's first output; its gradient of what the grader takes gradients of."""

    @staticmethod
    def forward(ctx, inputs, names, *tensors):
        ctx.inputs, ctx.names = inputs, names
        return torch.from_numpy(answer(inputs)[0]).float()

    @staticmethod
    def backward(ctx, gradient):
        found = [oracles.difference(answer, ctx.inputs, name) for name in ctx.names]
        return None, None, *[torch.from_numpy(x).float() for x in found]


def answer(inputs):
    found = variants.ORACLE(**inputs)
    return [np.asarray(x) for x in (found if isinstance(found, tuple) else (found,))]


def NAME SIGNATURE:
    given = dict(locals())
    arrays = {k: v.detach().numpy() if torch.is_tensor(v) else v for k, v in given.items()}
    arrays = {k: oracles.double(v) for k, v in arrays.items()}
    outputs = [torch.from_numpy(x) for x in answer(arrays)]
    outputs = [x if "NAME" == "leave_one_out" and n else x.float() for n, x in enumerate(outputs)]
    leaves = {k: v for k, v in given.items() if torch.is_tensor(v) and v.requires_grad}
    if leaves and not oracles.CONSTANTS.get("ORACLE", oracles.CONSTANTS.get("NAME")):
        outputs[0] = Brute.apply(arrays, list(leaves), *leaves.values())
    return tuple(outputs) if len(outputs) > 1 else outputs[0]
'''


def variant_sheet(part, student="ada"):
    """A variant's questions to one student."""
    return handout.questions(part, student, b"a key")


def judged(part, sheet, folder):
    """The points of the variants.py in a folder, and what its student reads."""
    job = check.job_of([sheet], folder, ROOT, confined=False)
    task = next(task for task in job["units"] if task["name"] == part.units[0].name)
    given = worker.answers(task, job, sheet.questions)
    for values in given.values():
        values.update({k: x.numpy() for k, x in values.items() if torch.is_tensor(x)})
    verdicts = check.judge(part, sheet, given)
    return check.earned(part, verdicts), check.sentences(part, verdicts)


def submit(folder, name, oracle):
    """A submission whose function answers as an oracle does."""
    signature = str(inspect.signature(getattr(variants, name)))
    text = SUBMITTED.replace("ORACLE", oracle).replace("NAME SIGNATURE", name + signature)
    (folder / "variants.py").write_text(text.replace("NAME", name))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_of_each_variant_the_right_answer_earns_all_and_its_mistakes_are_named(name, tmp_path):
    part = FUNCTIONS[name]
    sheet = variant_sheet(part)
    submit(tmp_path, name, name)
    assert judged(part, sheet, tmp_path) == (part.points, [])
    wrong = oracles.mistakes(name, vars(variants))
    assert len(wrong) >= 3
    for cause, mistake in wrong:
        submit(tmp_path, name, mistake.__name__)
        points, lines = judged(part, sheet, tmp_path)
        assert points < part.points and cause in lines[0] and len(lines) == 1, (cause, lines)
        assert 10 < len(cause) < 95 and cause[0].islower() and cause[-1] not in ".:"


def test_a_mistake_without_a_name_is_described(tmp_path):
    """Half of what is right, and a float64."""
    part = FUNCTIONS["rank_advantages"]
    submit(tmp_path, "rank_advantages", "rank_advantages")
    text = (tmp_path / "variants.py").read_text()
    for change, said in ((" / 2", "0.5 times what is right"), (".double()", "is float64")):
        edited = text.replace("else outputs[0]\n", f"else outputs[0]{change}\n")
        (tmp_path / "variants.py").write_text(edited)
        assert said in judged(part, variant_sheet(part), tmp_path)[1][0]


def test_each_student_has_a_variant_of_each_group_and_students_differ():
    lots = [tuple(p.number for p in variants_of(f"student {n}", b"k")) for n in range(60)]
    assert {lot[0] for lot in lots} == {11, 12, 13} and {lot[1] for lot in lots} == {14, 15, 16}
    assert {lot[2] for lot in lots} == {17, 18} and len(set(lots)) > 15
    assert all(sum(p.points for p in variants_of(s, b"k")) == 20 for s in ("ada", "bob"))
    assert lots[0] == tuple(p.number for p in variants_of("student 0", b"k"))


def test_no_variant_stands_in_the_project():
    """Neither its function nor its terms, but in the assignments themselves."""
    terms = "leave.one.out|rloo|rank_advantage|effective.s(ample|ize)|expm1|returns_to_go"
    for path in [*ROOT.glob("*.py"), *(ROOT / "tutorial").rglob("*.py")]:
        if path.parent.name != "assignments":
            text = path.read_text()
            assert not re.search(terms, text, re.IGNORECASE), path
            assert not any(f"def {name}(" in text for name in FUNCTIONS), path


def test_stubs_hold_signatures_and_tasks_and_no_answer(tmp_path):
    (tmp_path / "variants.py").write_text(variants.stubs(FUNCTIONS))
    for name, part in FUNCTIONS.items():
        points, lines = judged(part, variant_sheet(part), tmp_path)
        assert points == 0 and lines == [f"write {name}"]
    text = (tmp_path / "variants.py").read_text()
    assert "np." not in text and "return" not in re.sub(r'""".*?"""', "", text, flags=re.DOTALL)


def test_oracles_of_the_first_group():
    """v as it is defined; DDPM's two ends; hand numbers."""
    x_0, noise = np.random.RandomState(0).standard_normal((2, 3, 1, 2, 2))
    now = np.array([0.0, 0.3, 1.0])
    wide = now[:, None, None, None]
    x_t, v = (
        wide**0.5 * x_0 + (1 - wide) ** 0.5 * noise,
        wide**0.5 * noise - (1 - wide) ** 0.5 * x_0,
    )
    eps, picture = variants.v_to_noise(v, x_t, now)
    np.testing.assert_allclose([eps, picture], [noise, x_0], atol=1e-12)
    now, before = np.array([0.3, 0.6]), np.array([0.5, 1.0])
    tensors = [torch.from_numpy(x) for x in (noise[:2], x_t[:2], now, before)]
    mean, std = scheduler.ddim_mean_std(*tensors, 1.0)
    for large, expected in ((0, std), (1, np.sqrt([1 - 0.6, 1 - 0.6]))):
        found = variants.ddpm_mean_std(noise[:2], x_t[:2], now, before, large)
        np.testing.assert_allclose(found[0], mean, atol=1e-12)
        np.testing.assert_allclose(found[1], expected, atol=1e-7)
    pair = variants.ddpm_mean_std(noise[:2], x_t[:2], now, before, 0.25)[1]
    np.testing.assert_allclose(pair, [(0.5 / 0.7) ** 0.375 * 0.4**0.5, 0], atol=1e-12)
    moved = np.log([2.0, 0.25, 1.1, 2.0]) / 3
    loss, ratio = variants.joint_ppo_loss(
        moved, 0 * moved, np.array([1, -1, 2, -1]), 3, np.log(1.5)
    )
    np.testing.assert_allclose(ratio, [2, 0.25, 1.1, 2])
    np.testing.assert_allclose(loss, [-1.5, 2 / 3, -2.2, 2])


def test_oracles_of_the_second_group():
    """Hand numbers; true importance weights give another policy's mean from this one's samples."""
    advantages, baseline = variants.leave_one_out(["a", "b", "a", "a"], np.array([1.0, 7, 2, 6]))
    np.testing.assert_allclose([advantages, baseline], [[-3, 0, -1.5, 4.5], [4, 7, 3.5, 1.5]])
    ranks = variants.rank_advantages(["a"] * 5 + ["b"], np.array([3.0, 1, 3, 9, 2, 5]))
    np.testing.assert_allclose(ranks, [0.25, -1, 0.25, 1, -0.5, 0])
    two = np.log([[2.0, 1.0], [1.0, 1.0]]) / 24
    weights, size = variants.trajectory_weights(two, 0 * two, 24)
    np.testing.assert_allclose([*weights, size], [4 / 3, 2 / 3, 9 / 5])
    x = 0.5 * np.random.RandomState(1).standard_normal((4000, 2, 3))  # two steps of three numbers
    old = -0.5 * (x / 0.5) ** 2
    now = -0.5 * ((x - 0.1) / 0.5) ** 2
    weights, size = variants.trajectory_weights(now.mean(2), old.mean(2), 3)
    np.testing.assert_allclose(np.mean(weights[:, None] * x[:, :, 0], 0), [0.1, 0.1], atol=0.03)
    # E w^2 = exp(sum of squared shifts)
    np.testing.assert_allclose(len(x) / size, np.exp(6 * 0.2**2), rtol=0.05)


def test_oracles_of_the_third_group():
    """k1 and k3 are the divergence, in the mean, and k3 varies less; hand numbers."""
    x = np.random.RandomState(2).standard_normal((4000, 2, 3))
    now, ref = -(x**2) / 2, -((x - 0.3) ** 2) / 2
    means, errors = variants.kl_estimators(now.mean(2), ref.mean(2), 3)
    truth = 6 * 0.3**2 / 2
    assert abs(means[0] - truth) < 3 * errors[0] and abs(means[2] - truth) < 3 * errors[2]
    assert errors[2] < 0.6 * errors[0] and abs(means[1] - truth) > 3 * errors[1]
    returns = variants.kl_to_go(np.array([5.0]), np.array([[1.0, 2, 4]]), np.zeros((1, 3)), 2, 0.5)
    np.testing.assert_allclose(returns, [[-2, -1, 1]])
