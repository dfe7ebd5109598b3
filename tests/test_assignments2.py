"""What copying can't answer: variants, bugs, questions and the final project.

No right answer to a variant stands in this repository but its oracle, so a right submission here is
the oracle itself, called from torch, with gradients by finite differences; a wrong one is a named
mistake. That the oracles are right is tried by what they must fulfil.
"""

import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import bug_tests
import bugs
import check
import final
import grade
import handout
import marks
import numpy as np
import oracles
import own
import pytest
import questions
import rewrite
import torch
import trial
import variants
import worker
from parts import PARTS, VARIANTS, chosen, variants_of
from PIL import Image

import scheduler
import train
import unet

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
    x = 0.5 * np.random.RandomState(1).standard_normal((1500, 2, 3))  # two steps of three numbers
    old = -0.5 * (x / 0.5) ** 2
    now = -0.5 * ((x - 0.1) / 0.5) ** 2
    weights, size = variants.trajectory_weights(now.mean(2), old.mean(2), 3)
    np.testing.assert_allclose(np.mean(weights[:, None] * x[:, :, 0], 0), [0.1, 0.1], atol=0.05)
    # E w^2 = exp(sum of squared shifts)
    np.testing.assert_allclose(len(x) / size, np.exp(6 * 0.2**2), rtol=0.1)


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


NOTHING = "def test_nothing():\n    pass\n"
AS_WRITTEN = """def test_as_it_is_written():
    import sys
    finder = sys.meta_path[0]
    assert '"' * 3 in finder.texts["FILE"]
"""


def bug_test(bug):
    """The lecturer's test of a bug, as a student hands it in."""
    return bug_tests.source(bug.as_if or bug.number)


@pytest.mark.parametrize("bug", bugs.BUGS, ids=lambda bug: f"bug{bug.number:02d}")
def test_of_each_bug_the_right_answer_earns_all_and_three_wrong_ones_are_told_why(bug):
    """A test that shows nothing, one that looks at how things are written, a wrong place."""
    versions = bugs.versions(bug)

    def judged(test):
        said = [trial.attempt("test.py", test, texts) for _, _, texts in versions]
        return bugs.judge_test(bug, said, versions)

    points, why = judged(bug_test(bug))
    assert points == 2, why
    points, why = judged(NOTHING)
    assert points == 0 and "there it has to fail" in why
    points, why = judged(AS_WRITTEN.replace("FILE", bug.file))
    assert points == 0 and "fails on a version that behaves the same (1)" in why, why
    lines = bugs.module(bug, "ada")[1]
    place = f"{bug.file}.py:{lines[0]}" if lines else "none"
    assert bugs.judge_place(bug, place, lines)[0] == 1
    wrong = f"{bug.file}.py:{lines[0] - 2}" if lines else f"{bug.file}.py:100"
    assert bugs.judge_place(bug, wrong, lines)[0] == 0
    assert bugs.judge_place(bug, "none", lines)[0] == (not bug.old)


def test_a_diff_points_nowhere():
    """Nearly all functions differ from the project's, whose comments and docstrings are left out
    of the comparison, and from another student's."""
    for file in ("scheduler", "ddpo", "rewards"):
        source = (ROOT / f"{file}.py").read_text()
        tree = ast.parse(source)
        rewrite.without_docstrings(tree)
        plain = handout.functions(ast.unparse(tree))
        first, second = (handout.functions(rewrite.rewrite(source, n)[0]) for n in (1, 2))
        assert set(first) == set(plain) and list(first) != list(plain)
        bodies = {name for name, node in plain.items() if isinstance(node, ast.FunctionDef)}
        bodies = {name for name in bodies if len(ast.unparse(plain[name]).splitlines()) > 3}
        for one, other in ((plain, first), (first, second)):
            same = [n for n in bodies if ast.unparse(one[n]) == ast.unparse(other[n])]
            assert len(same) < 0.2 * len(bodies), same


def test_line_numbers_are_each_students_own_and_the_same_each_time():
    places = set()
    for student in ("ada", "bob", "cy", "dee"):
        seed = bugs.seed_of(student, b"k", bugs.BY_NUMBER[4])
        text, lines = bugs.module(bugs.BY_NUMBER[4], seed)
        assert (text, lines) == bugs.module(bugs.BY_NUMBER[4], seed)
        assert "repeat_interleave" in "\n".join(text.split("\n")[lines[0] - 1 : lines[1]])
        places.add(lines)
    assert len(places) == 4


def test_rewriting_keeps_what_is_computed():
    """Where order matters: what is evaluated first is what is taken out first."""
    source = """
import torch
def note(log, x):
    log.append(x)
    return x
def f(log, flag):
    '''Doc.'''
    a, b = note(log, 2), note(log, 3)
    total = note(log, a) * note(log, b) + note(log, 5) - [note(log, 6)][0]
    if flag and total > 3:
        return note(log, total) < note(log, 7)
    else:
        total = torch.tensor(float(total)).square().sqrt().item()
    return [note(log, x) * total for x in (a, b) if not x == 3]
"""
    for seed in range(30):
        text, lines = rewrite.rewrite(source, seed, (9, 9))
        spaces = ({}, {})
        for space, code in zip(spaces, (source, text), strict=True):
            exec(code, space)
        for flag in (True, False):
            logs = ([], [])
            results = [s["f"](log, flag) for s, log in zip(spaces, logs, strict=True)]
            assert results[0] == results[1] and sorted(logs[0]) == sorted(logs[1])
        assert "Doc" not in text and rewrite.BEGIN not in text
        assert "note" in "\n".join(text.split("\n")[lines[0] - 1 : lines[1]])


def test_the_core_parts_checks_find_no_fault_in_the_twelve(tmp_path, monkeypatch):
    """So a bug is not found by running check.py on it."""
    monkeypatch.setattr(oracles, "mistakes", lambda unit, here: [])
    sheets = {part.number: handout.questions(part) for part in PARTS}
    for bug in bugs.BUGS:
        (tmp_path / f"{bug.file}.py").write_text(bugs.module(bug, 1)[0])
        for part in PARTS:
            units = [unit for unit in part.units if unit.file == bug.file]
            if units:
                sheet = sheets[part.number]
                job = check.job_of([sheet], tmp_path, ROOT, confined=False)
                for task in [t for t in job["units"] if t["file"] == bug.file]:
                    given = arrays(worker.answers(task, job, sheet.questions))
                    assert all(check.fits(given[key], sheet.right[key]) for key in given), task


def arrays(given):
    """The worker's answers, as check.py reads them."""
    for values in given.values():
        values.update({k: x.numpy() for k, x in values.items() if torch.is_tensor(x)})
    return given


def test_recorded_runs_are_there_and_show_what_the_sheet_says():
    """The numbers that the causes name."""
    runs = {}
    for bug in bugs.BUGS:
        folder = bugs.RUNS / f"{bug.number:02d}"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        runs[bug.number] = [json.loads(line) for line in lines]
        command = (folder / "command.txt").read_text()
        assert len(lines) == 3 and command == f"python train.py {bug.options}\n"
        assert Image.open(folder / "pictures.png").size == (520, 256)
    assert all(abs(line["diversity"]) < 1e-6 for line in runs[1])
    assert all(line["approx_kl"] == line["clip_fraction"] == 0 for n in (5, 12) for line in runs[n])
    assert all(line["approx_kl"] > 0 for n in (3, 4, 6, 7, 10, 11) for line in runs[n])
    first = {number: lines[0] for number, lines in runs.items()}
    assert first[6]["grad_norm"] > 4 * first[11]["grad_norm"]
    assert first[11]["diversity"] == pytest.approx(0.75 * first[12]["diversity"], rel=1e-3)
    assert first[11]["eval_diversity"] == pytest.approx(0.5 * first[12]["eval_diversity"], rel=1e-3)
    assert first[10]["eval_compressibility_mean"] == first[12]["eval_compressibility_mean"]
    assert abs(first[10]["eval_reward_mean"] - first[12]["eval_reward_mean"]) > 0.01


def test_bugs_are_marked_in_a_process_of_their_own(tmp_path):
    """Four of one student: right, a wrong place, none where there is a fault, nothing handed in."""
    four = bugs.bugs_of("ada", b"k")
    assert len({bug.number for bug in four}) == 4
    handed = {}
    for n, bug in enumerate(four[:3]):
        lines = bugs.module(bug, bugs.seed_of("ada", b"k", bug))[1]
        place = [f"{bug.file}.py:{lines[0]}" if lines else "none", "ddpo.py:1", "everywhere"][n]
        handed[str(bug.number)] = {"place": place, "sentence": "it is so"}
        (tmp_path / f"test_{bug.number:02d}.py").write_text(bug_test(bug))
    (tmp_path / f"test_{four[2].number:02d}.py").write_text("import os\nos._exit(0)\n")
    (tmp_path / "bugs.json").write_text(json.dumps(handed))
    found = bugs.mark(tmp_path, "ada", b"k")
    assert [entry["score"] for entry in found] == [3, 2, 0, 0]
    assert [len(entry["ungraded"]) for entry in found] == [1, 1, 1, 0]
    assert found[0]["ungraded"][0]["handed in"] == "it is so" and four[0].cause
    assert "ends the whole process" in found[2]["output"] and "no test_" in found[3]["output"]
    for text in ("[1]", "{", '{"x": 3}', "9" * 100_000):
        (tmp_path / "bugs.json").write_text(text)
        assert bugs.read_answers(tmp_path)[1].startswith("bugs.json is not as")


@pytest.fixture
def student(tmp_path, monkeypatch):
    """questions.py in an empty folder, with ada's numbers."""
    monkeypatch.setattr(questions, "own_numbers", lambda: questions.numbers("ada", b"k"))
    monkeypatch.setattr(questions, "FILE", tmp_path / questions.FILE)
    monkeypatch.setattr(questions, "RUNS", [lambda own, n=n: n / 3 for n in range(6)])
    return tmp_path


def test_predictions_count_where_a_head_was_handed_in_before(student, capsys):
    """Six points for the lecturer; a line that was changed, or came late, counts for nothing."""
    for n in range(1, 6):
        questions.main(["predict", str(n), "1.5", "since it is so"])
    capsys.readouterr()
    questions.main(["head"])
    head = capsys.readouterr().out.strip()
    questions.main(["run", "2"])
    assert capsys.readouterr().out == "0.3333; predicted: 1.5\n"
    questions.main(["explain", "2", "I forgot a third"])
    questions.main(["predict", "6", "0", "late"])
    found = marks.mark(21, student, heads=[head])[0]
    assert [wait["name"][-1] for wait in found["ungraded"]] == list("12345")
    handed = found["ungraded"][1]["handed in"]
    assert [*map(list, handed)] == [["number", "reason"], ["found"], ["difference"]]
    assert all(wait["look for"] and wait["max_score"] == 2 for wait in found["ungraded"])
    assert len(marks.mark(21, student)[0]["ungraded"]) == 6  # no heads are known
    assert marks.mark(21, student, heads=["of another"])[0]["ungraded"] == []
    path = student / questions.FILE
    path.write_text(path.read_text().replace("1.5", "0.5", 1))
    found = marks.mark(21, student, heads=[head])[0]
    assert found["ungraded"] == [] and "line 1 does not fit" in found["output"]
    for text in ("no JSON", "[3]\n", '{"question": 1}\n'):
        path.write_text(text)
        assert marks.mark(21, student, heads=[head])[0]["ungraded"] == []


def test_a_prediction_after_its_run_does_not_count_and_none_is_made_twice(student):
    with pytest.raises(SystemExit):
        questions.main(["run", "1"])
    questions.main(["predict", "1", "3", "so"])
    with pytest.raises(SystemExit):
        questions.main(["predict", "1", "4", "no, so"])
    lines = []
    for what in ("run", "predict"):
        lines.append(questions.chained(lines, {"what": what, "question": 2}))
    (student / questions.FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert marks.mark(21, student)[0]["ungraded"] == []


def test_questions_find_the_modules_from_a_script_of_their_own():
    """Without what pytest puts on the path."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tutorial/assignments')!r})\n"
    code += "import questions\nprint(questions.run_4(questions.numbers('ada', b'k')) > 2)"
    command = [sys.executable, "-I", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.stdout == "True\n", said.stderr


@pytest.mark.parametrize("said", [["abc", "so"], ["nan", "so"], ["1"], ["1", "so", "on"]])
def test_what_is_no_prediction_is_refused_and_nothing_is_explained_before_its_run(student, said):
    with pytest.raises(SystemExit):
        questions.main(["predict", "4", *said])
    assert not questions.FILE.exists()
    questions.main(["predict", "4", "-1.5", "so"])
    for what in (["explain", "4", "because"], ["run", "4"], ["explain", "4"]):
        if what == ["run", "4"]:
            questions.main(what)
        else:
            with pytest.raises(SystemExit):
                questions.main(what)
    assert [line["what"] for line in questions.read(questions.FILE)] == ["predict", "run"]


def test_trial_refuses_a_folder_without_a_module_and_a_test_that_is_not_there(tmp_path, capsys):
    test = tmp_path / "test_05.py"
    for bug, wrong in ((tmp_path, "holds no module"), (ROOT, "test_05.py")):
        with pytest.raises(SystemExit):
            trial.main([str(test), str(bug)])
        assert wrong in capsys.readouterr().err


def test_questions_run_and_give_what_the_sheet_says(monkeypatch):
    """Those that need no drawing; of the others what a small T gives."""
    own = {**questions.numbers("ada", b"k"), "T": 4, "k": 1, "prompts": ["cat", "dog"]}
    monkeypatch.setattr(questions, "policy_of", cache(questions.policy_of))
    rewards = np.exp(own["beta"] * (np.array(own["rewards"]) - max(own["rewards"])))
    assert questions.run_3(own) == pytest.approx(8 / rewards.sum())
    assert questions.run_4(own) == pytest.approx(2.961, abs=1e-3)
    rough = 45 * own["min_count"] / (own["each"] * own["draws"])
    assert questions.run_5(own) == pytest.approx(rough, rel=0.25)
    assert 0.02 < questions.run_2(own) < 0.9
    assert questions.run_6(own) == pytest.approx(0.5, abs=0.05)
    assert questions.run_1(own) == 2  # the last one: it moves the weights
    asked = questions.text(own)
    assert len(asked.splitlines()) == 6 and "{" not in asked


REWARD = "def reward(images, prompts):\n    return images[..., 2].mean((1, 2)) / 255\n"


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A final project of which the pictures that are redrawn are real, two instead of eight."""
    folder = tmp_path_factory.mktemp("project") / "final"
    (folder / "samples").mkdir(parents=True)
    own = questions.numbers("ada", b"k")
    said = {**final.settings(own), "algorithm": "ddpo-is"}
    net = unet.add_lora(unet.load(unet.UNet, train.ZOO / "unet"), 4, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in [p for p in net.parameters() if p.requires_grad]:
            p.add_(0.05 * torch.randn_like(p))
    unet.save_lora(net, folder)
    (folder / "reward.py").write_text(REWARD)
    (folder / "report.md").write_text("It became blue.")
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "metrics.jsonl").write_text('{"reward_queries": 64}\n{"reward_queries": 1280}\n')
    prompts = [own["prompts"][i % 8] for i in range(64)]
    which, drawn = chosen(b"k", "ada", "redrawn", list(range(64)), 2), []
    policies = final.policies(said, folder / final.LORA)
    for epoch, policy in zip((0, 20), policies, strict=True):
        images = np.random.RandomState(epoch).randint(0, 200, (64, 64, 64, 3), dtype=np.uint8)
        images[..., 2] = images[..., 2] // 2 + 5 * epoch
        drawn.append(final.redraw(policy, own, which))
        images[which] = drawn[-1]
        path = folder / "samples" / f"epoch_{epoch:04d}.png"
        train.grid(images).save(path)
        rewards = images[..., 2].mean((1, 2)) / 255
        path.with_suffix(".json").write_text(
            json.dumps({"prompts": prompts, "rewards": rewards.tolist()})
        )
    return folder.parent, own, drawn, policies


def score(text, images, prompts):
    """trial.score in this process."""
    pairs = zip(images, prompts, strict=True)
    return [trial.numbers(trial.scored(text, *pair), len(pair[0])) for pair in pairs]


def test_a_final_project_is_redrawn_and_measured(project, monkeypatch):
    """By the LoRA itself, the reward in a process of its own."""
    root, mine, drawn = project[:3]
    monkeypatch.setattr(final, "REDRAWN", 2)
    monkeypatch.setattr(final, "policies", lambda config, lora: project[3])
    found = final.mark(root, mine, "ada", b"k", trial.score)
    assert found["max_score"] == 10 and found["ungraded"][0]["handed in"] == "It became blue."
    lines = dict(line.split(": ", 1) for line in found["output"].splitlines())
    assert list(lines) == [*final.POINTS] and found["score"] == 9
    assert np.abs(drawn[0].astype(float) - drawn[1]).mean() > 3  # the LoRA draws otherwise
    assert "0.0 levels off" in lines["redrawn"] and "judge names 3%" in lines["judge"]


def test_a_final_project_that_is_not_what_it_says_is_told_so(project, tmp_path, monkeypatch):
    root, mine, drawn = project[:3]
    monkeypatch.setattr(final, "REDRAWN", 2)
    monkeypatch.setattr(final, "policies", lambda config, lora: [0, 1])
    monkeypatch.setattr(final, "redraw", lambda policy, own, which: drawn[policy])
    monkeypatch.setattr(final, "measures", lambda base, last, scores, own: {})
    changes = [
        ("metrics.jsonl", "1280", "1281", "1281 reward queries; allowed: 1280"),
        ("config.json", '"lora_rank": 4', '"lora_rank": 8', "should say lora_rank = 4"),
        ("config.json", "{", "[", "JSONDecodeError"),
        (
            "samples/epoch_0020.json",
            mine["prompts"][0],
            "yak",
            "of other prompts",
        ),
        ("reward.py", "/ 255", "/ 100", "of a deviation off those handed in"),
        ("reward.py", "2].mean", "7].mean", "IndexError"),
    ]
    for n, (name, old, new, said) in enumerate(changes):
        folder = tmp_path / str(n)
        shutil.copytree(root, folder)
        path = folder / "final" / name
        path.write_text(path.read_text().replace(old, new))
        found = final.mark(folder, mine, "ada", b"k", score)
        assert said in found["output"] and found["score"] < 4, found["output"]
    monkeypatch.setattr(final, "redraw", lambda policy, own, which: drawn[0])
    found = final.mark(root, mine, "ada", b"k", score)
    assert found["score"] == 1 and "redrawn from your LoRA" in found["output"]
    assert final.mark(tmp_path, mine, "ada", b"k", score)["output"] == "there is no folder final/"


def test_the_bar_is_the_best_of_four_of_each_prompt():
    """Pictures go round the eight prompts."""
    rewards = np.zeros(64)
    rewards[[3, 11, 3 + 32]] = 1, 2, 4
    assert final.best_of(rewards, 4) == (2 + 4) / 16


def test_what_is_a_students_own_is_written_on_top_of_the_hand_out(tmp_path):
    own.write("ada", b"k", tmp_path / "own")
    text = (tmp_path / "own" / "own.md").read_text()
    mine = bugs.bugs_of("ada", b"k")
    for part in variants_of("ada", b"k"):
        assert f"`{part.units[0].name}`, {part.points} points" in text
    for bug in mine:
        folder = tmp_path / "own" / "bugs" / f"{bug.number:02d}"
        names = [f"{bug.file}.py", "command.txt", "metrics.jsonl", "pictures.png"]
        assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    numbers = json.loads((tmp_path / "own" / "own.json").read_text())
    assert numbers == questions.numbers("ada", b"k") and f"--seed {numbers['seed']}" in text
    assert all(max(map(len, line.split("`"))) <= 400 for line in text.splitlines())
    everything = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*.*"))
    assert not any(bug.cause[:40] in everything for bug in mine)


def test_results_json_holds_what_waits_for_a_person(student, capsys):
    """Zeros from the first second, then the sections; marks that wait are in extra_data."""
    questions.main(["predict", "3", "1.5", "since it is so"])
    out = student / "results.json"
    grade.grade(student, out, "ada", b"k", [20, 21, 22])
    found = json.loads(out.read_text())
    assert [test["score"] for test in found["tests"]] == [0] * 6 and found["score"] == 0
    assert [test["max_score"] for test in found["tests"]] == [3, 3, 3, 3, 0, 10]
    waiting = found["extra_data"]["ungraded"]
    assert [wait["name"] for wait in waiting] == ["question 3"] and "look for" in waiting[0]
    points = 4 * bugs.POINTS + 2 * 6 + sum(final.POINTS.values()) + final.WRITTEN
    assert points + 20 == 60 and not any("ungraded" in test for test in found["tests"])
