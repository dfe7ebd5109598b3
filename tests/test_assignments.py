"""The assignments: what is handed out, and that the grader names mistakes, for the right points.

Wrong versions are tried in this process, by the functions that the worker runs; a few submissions
go through processes of their own. Hostile ones: tests/hostile.py.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import grade
import handout
import numpy as np
import oracles
import pytest
import show
import torch
import worker
from parts import KINDS, PARTS, UNITS, VARIANTS, has

ROOT = Path(__file__).parents[1]
PART_OF = {unit.name: part for part in PARTS for unit in part.units}


@pytest.fixture(scope="module")
def sheets():
    """The questions of one student."""
    return {p.number: oracles.sheet(p, handout.signatures(p), "ada", b"a key") for p in PARTS}


@pytest.fixture(scope="module")
def given_out(tmp_path_factory):
    """The hand-out, without the zoo."""
    out = tmp_path_factory.mktemp("given") / "out"
    handout.write(out, zoo=False)
    return out


def answers(unit, sheet, folder):
    """What the module in a folder answers to a unit's questions, in this process."""
    job = check.job_of([sheet], folder, ROOT, confined=False)
    task = next(task for task in job["units"] if task["name"] == unit.name)
    found = worker.answers(task, job, sheet.questions)
    arrays = {key: dict(values) for key, values in found.items()}
    for values in arrays.values():
        values.update({k: v.numpy() for k, v in values.items() if torch.is_tensor(v)})
    return arrays


def marked(unit, sheet, folder):
    """The points that a part loses by one unit of a module, and what its student reads."""
    part = PART_OF[unit.name]
    given = {**sheet.right, **answers(unit, sheet, folder)}
    verdicts = check.judge(part, sheet, given)
    return part.points - check.earned(part, verdicts), check.sentences(part, verdicts)


def changed(unit, edits, folder):
    """Write a unit's module into a folder, some text of its bodies replaced."""
    path = ROOT / f"{unit.file}.py"
    text, bodies = handout.cut(path.read_text(), dict.fromkeys(unit.cut, "pass"))
    for old, new in edits:
        assert sum(body.count(old) for body in bodies.values()) == 1, f"{unit.name}: {old}"
        bodies = {name: body.replace(old, new) for name, body in bodies.items()}
    (folder / path.name).write_text(handout.graft(text, bodies))


def wrong_versions():
    """tests/wrong_versions.txt -> [(unit, points lost, what is said, [(old, new)])]."""
    found = []
    text = (ROOT / "tests" / "wrong_versions.txt").read_text().partition("\n\n")[2]
    for line in text.splitlines():
        if line[0] == "-":
            found[-1][3].append([line[1:]])
        elif line[0] == "+":
            found[-1][3][-1].append(line[1:])
        else:
            unit, lost, said = line.split(", ", 2)
            found.append((UNITS[unit], float(lost), said, []))
    return found


def test_wrong_versions_lose_what_they_should_and_are_told_why(sheets, tmp_path):
    """Each has a message of its own. Those of a named mistake have its cause."""
    seen, versions = {}, wrong_versions()
    assert len(versions) >= 60
    for unit, lost, said, edits in versions:
        changed(unit, edits, tmp_path)
        points, lines = marked(unit, sheets[PART_OF[unit.name].number], tmp_path)
        cause = getattr(oracles, f"{unit.name}__{said}", None)
        words = cause.__doc__.replace("{D}", "24") if cause else said
        assert words in lines[0], (edits, lines)
        assert round(float(points), 2) == lost, (edits, lines)
        assert lines[0] not in seen, (edits, seen[lines[0]])
        seen[lines[0]] = edits


def test_every_named_mistake_is_told_from_what_is_right_and_from_every_other(sheets):
    for part in PARTS:
        sheet = sheets[part.number]
        for unit in part.units:
            known = [("", sheet.right)]
            known += [(cause, given) for name, cause, given in sheet.wrong if name == unit.name]
            assert len(known) > 2
            keys = [check.answer_key(unit, n) for n in range(len(unit.cases))]
            for i, (cause, given) in enumerate(known):
                for other, wrong in known[:i]:
                    alike = [check.fits(given[key], wrong[key]) for key in keys]
                    assert not all(alike), (unit.name, cause, other)


def test_messages_are_short_readable_sentences(sheets):
    for part in PARTS:
        for unit, cause, _ in sheets[part.number].wrong:
            assert 10 < len(cause) < 95 and cause[0].islower() and cause[-1] not in ".:", cause


def test_all_is_well_with_the_real_modules_and_other_ways_to_write_them(sheets, tmp_path):
    """Of functions that are written otherwise the grader must not say that they are wrong."""
    others = {
        "guided_noise": [["eps_uncond + guidance * (eps_cond - eps_uncond)", OTHER_GUIDANCE]],
        "gaussian_log_prob": [["x, mean, std = x.detach()", OTHER_LOG_PROB]],
        "ppo_loss": [["ratio = (log_prob - log_prob_old).exp()", OTHER_PPO]],
        "rwr_weights": [["len(r) * torch.softmax(beta * r, 0)", OTHER_SOFTMAX]],
        "normalize_advantages": [[".clamp(-limit, limit).float()", OTHER_CLIP]],
    }
    for unit in UNITS.values():
        for edits in ([], others.get(unit.name, [])):
            changed(unit, edits, tmp_path)
            sheet = sheets[PART_OF[unit.name].number]
            assert marked(unit, sheet, tmp_path) == (0, []), (unit.name, edits)


OTHER_GUIDANCE = "guidance * eps_cond + (1 - guidance) * eps_uncond"
OTHER_SOFTMAX = "(beta * (r - r.max())).exp() / (beta * (r - r.max())).exp().mean()"
OTHER_CLIP = ".float().minimum(torch.tensor(limit)).maximum(torch.tensor(-limit))"
OTHER_LOG_PROB = """if (std > 0).all():
        wide = expand(std.float(), x)
        p = torch.distributions.Normal(mean.float(), wide, validate_args=False)
        return p.log_prob(x.detach().float()).flatten(1).mean(1)
    x, mean, std = x.detach()"""
OTHER_PPO = """ratio = log_prob.exp() / log_prob_old.exp()
    low, high = 1 - clip_range, 1 + clip_range
    bound = torch.where(advantages > 0, ratio.clamp(max=high), ratio.clamp(min=low))
    if advantages.any():
        return -bound * advantages, ratio"""


def test_the_oracles_are_those_of_the_text_books():
    """DDIM at eta = 1 is DDPM's posterior; a percentile and log p by hand."""
    now, after = np.array([0.5]), np.array([0.8])
    mean, std = oracles.ddim_mean_std(np.ones((1, 1)), np.full((1, 1), 2.0), now, after, 1.0)
    beta = 1 - 0.5 / 0.8  # Ho et al. 2020, Eq. 7 and 11
    expected = (2 - beta / 0.5**0.5) / (1 - beta) ** 0.5
    np.testing.assert_allclose([mean[0, 0], std[0] ** 2], [expected, 0.2 / 0.5 * beta], rtol=1e-12)
    assert oracles.sparse_weights(["a"] * 6, np.arange(6.0), 0.8).tolist() == [0, 0, 0, 0, 1, 1]
    log_p = oracles.gaussian_log_prob(np.ones((1, 2)), np.zeros((1, 2)), np.array([1.0]))
    np.testing.assert_allclose(log_p, -0.5 - 0.5 * np.log(2 * np.pi), rtol=1e-12)


@pytest.mark.parametrize("name", ["scheduler.py", "ddpo.py", "rewards.py"])
def test_cut_and_graft_give_the_source_to_the_byte(name):
    source = (ROOT / name).read_bytes().decode()
    lines = {name: handout.asks(name, 1) for name in handout.chapters()}
    text, bodies = handout.cut(source, lines)
    assert text != source and handout.graft(text, bodies) == source
    before, after = handout.functions(source), handout.functions(text)
    for name in set(before) & set(lines):
        docs = [handout.ast.get_docstring(tree[name]) for tree in (before, after)]
        args = [handout.ast.unparse(tree[name].args) for tree in (before, after)]
        assert docs[0] == docs[1] and args[0] == args[1]
    kept = [line for line in source.splitlines() if line not in "\n".join(bodies.values())]
    assert all(line in text for line in kept)


def test_comments_around_a_body_stay_and_those_in_it_go():
    source = 'def f(x):\n    """Doc."""\n    # in\n    return x  # in\n\n\n# out\ny = 1\n'
    text, bodies = handout.cut(source, {"f": "pass"})
    assert text == 'def f(x):\n    """Doc."""\n    pass\n\n\n# out\ny = 1\n'
    assert bodies == {"f": "    # in\n    return x  # in"}


def test_formulas_can_be_taken_out_of_the_docstrings(tmp_path):
    text = handout.without_formulas((ROOT / "scheduler.py").read_text())
    doc = handout.ast.get_docstring(handout.functions(text)["gaussian_log_prob"])
    assert "log p =" not in doc and "0 where std = 0." in doc and "\n\n\n" not in doc
    assert "x_t =" not in handout.ast.get_docstring(handout.functions(text)["add_noise"])


def test_whoever_checks_the_whole_repository_is_told_to_make_a_hand_out(given_out):
    command = "python tutorial/assignments/handout.py handout && cd handout"
    with pytest.raises(SystemExit, match=f"make one: {command}$"):
        check.main(["--parts", "1"])
    name = Path("tutorial", "assignments", "README.md")
    assert f"\n{command}\n" in (ROOT / name).read_text()
    for text in ((given_out / name).read_text(), (given_out / "README.md").read_text()):
        assert "handout.py" not in text
        assert "runs on your code.\n\n```sh\npython tutorial/assignments/check.py " in text


def test_what_chapters_quote_is_cut_as_well(given_out):
    for path in given_out.glob("tutorial/[0-9]*.md"):
        text, source = path.read_text(), (ROOT / "tutorial" / path.name).read_text()
        for _, quoted, before, _ in handout.QUOTE.findall(source):
            parts = [name for name in handout.chapters() if f"{name}.".startswith(f"{quoted}.")]
            assert text.count(before) == source.count(before) - bool(parts)
            for name in parts:
                assert handout.asks(name, handout.chapters()[name]) in text


def squeezed(text):
    """Without white space."""
    return re.sub(r"\s+", "", text)


def test_the_hand_out_holds_none_of_the_cut_bodies(given_out):
    """No line of theirs that says something, in any file."""
    files = [path for path in given_out.rglob("*") if path.is_file()]
    everything = squeezed("".join(path.read_bytes().decode(errors="replace") for path in files))
    for name in ("scheduler.py", "ddpo.py", "rewards.py"):
        source = (ROOT / name).read_text()
        bodies = handout.cut(source, dict.fromkeys(handout.chapters(), "pass"))[1]
        for function, body in bodies.items():
            assert squeezed(body) in squeezed(source)
            for line in [squeezed(line) for line in body.splitlines()]:
                if len(line) > 24:
                    assert line not in everything, (function, line)


def graded(folder, out, **options):
    """results.json of a submission, by processes of its own."""
    grade.grade(folder, out, **options)
    return json.loads(out.read_text())


def test_an_untouched_hand_out_earns_nothing_and_is_told_what_to_write(given_out, sheets, tmp_path):
    for part in PARTS:
        sheet, lines = sheets[part.number], []
        for unit in part.units:
            lost, said = marked(unit, sheet, given_out)
            assert lost == sum(part.share(unit, kind) for kind in KINDS if has(unit, kind))
            lines += said
        assert len(lines) == len(part.units)
        for unit, line in zip(part.units, lines, strict=True):
            assert re.fullmatch(rf"write {unit.name}(\.\w+)? \(chapter {part.chapter}\)", line)


def test_a_mistake_is_paid_once(sheets, tmp_path):
    """What calls a wrong function loses nothing by it."""
    changed(UNITS["ddim_std"], [("return eta *", "return 2 * eta *")], tmp_path)
    assert marked(UNITS["ddim_std"], sheets[2], tmp_path)[0] > 0
    for name in ("predicted_x0", "ddim_mean_std"):
        assert marked(UNITS[name], sheets[2], tmp_path) == (0, [])


def test_results_are_there_from_the_first_second(tmp_path, monkeypatch):
    """With zeros, whatever happens next; and the parts that were marked before it."""
    out, seen = tmp_path / "results.json", []

    def fails(*arguments, **options):
        seen.append(json.loads(out.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(grade, "ask", fails)
    with pytest.raises(KeyboardInterrupt):
        grade.grade(ROOT, out, numbers=[1, 2])
    assert seen[0]["score"] == 0
    assert [(test["score"], test["max_score"]) for test in seen[0]["tests"]] == [(0, 2), (0, 5)]


def test_grade_in_processes_of_its_own(given_out, tmp_path):
    """Parts 1 and 8: one right, one with a mistake; the student's other functions don't matter."""
    source = (ROOT / "ddpo.py").read_text().replace("return -torch.minimum", "return torch.minimum")
    (tmp_path / "ddpo.py").write_text(source)
    (tmp_path / "scheduler.py").write_text((ROOT / "scheduler.py").read_text())
    out = tmp_path / "results.json"
    found = graded(tmp_path, out, student="ada", key=b"a key", numbers=[1, 8])
    assert [test["score"] for test in found["tests"]] == [2, 2.5] and found["score"] == 4.5
    assert found["tests"][0]["output"].startswith("right.")
    assert "ppo_loss" in found["tests"][1]["output"] and "the sign is turned" in json.dumps(found)
    assert [test["max_score"] for test in found["tests"]] == [2, 5]


LATE = """
import importlib, sys
sys.path[:0] = [{assignments!r}, {root!r}]
import worker, ddpo, rewards
for name in worker.LATER:
    importlib.import_module(name)
before = set(sys.modules)
rewards.incompressibility(worker.np.zeros((1, 8, 8, 3), worker.np.uint8), ["a cat"])
ddpo.rwr_weights(["a cat", "a dog"], worker.torch.zeros(2), 1.0)
worker.write(worker.Path({file!r}), {{"a": {{"b": worker.torch.zeros(1)}}}})
print([name for name in sys.modules if name not in before and name.split(".")[0] != "encodings"])
"""


def test_workers_import_nothing_after_the_door_is_shut(tmp_path):
    """Then they are nobody, who cannot look into a private environment, as CI's is."""
    folders = {"root": str(ROOT), "assignments": str(ROOT / "tutorial" / "assignments")}
    code = LATE.format(**folders, file=str(tmp_path / "x.safetensors"))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_check_names_a_mistake_in_a_filled_hand_out(given_out, tmp_path, capfd):
    """Out of its own files, which hold no formula; what is built on a wrong function waits."""
    folder = tmp_path / "mine"
    shutil.copytree(given_out, folder)
    source = (ROOT / "scheduler.py").read_text().replace("return eta * variance", "return variance")
    (folder / "scheduler.py").write_text(source)
    command = [sys.executable, str(folder / "tutorial/assignments/check.py"), "--parts", "1,2"]
    subprocess.run(command, check=True)
    said = capfd.readouterr().out
    assert "part 1: 2.00 of 2" in said and "part 2: 2." in said
    assert "make ddim_std right first" in said


def checked(folder, *options):
    """What check.py says in a folder."""
    command = [sys.executable, str(folder / "tutorial/assignments/check.py"), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def filled(given_out, folder, without=()):
    """The hand-out with the source's bodies in it, but for some functions."""
    shutil.copytree(given_out, folder)
    names = [name for name in handout.chapters() if name not in without]
    for path in (folder / name for name in ("scheduler.py", "ddpo.py", "rewards.py")):
        bodies = handout.cut((ROOT / path.name).read_text(), dict.fromkeys(names, "pass"))[1]
        path.write_text(handout.graft(path.read_text(), bodies))
    return folder


def test_check_gives_all_points_to_a_filled_hand_out_and_says_how_to_see_it(given_out, tmp_path):
    """Its right answers were written into files and read again."""
    said = checked(filled(given_out, tmp_path / "mine"))
    for part in PARTS:
        assert f"part {part.number}: {part.points:.2f} of {part.points}\n" in said, said
        assert f"{part.picture}: python tutorial/assignments/show.py {part.number}\n" in said


def test_check_says_which_part_to_write_before_this_one(given_out, tmp_path):
    """sample records what part 5 computes."""
    folder = filled(given_out, tmp_path / "mine", without=["gaussian_log_prob"])
    said = checked(folder, "--parts", "4,5")
    assert "part 4, sample, values, gradients, edges: it calls gaussian_log_prob: " in said
    assert "write part 5 first (chapter 3)" in said
    assert "    write gaussian_log_prob (chapter 4)\n" in said


def test_sheets_come_out_of_files_as_they_went_in(tmp_path):
    """Scalars too."""
    for part in (*PARTS, *VARIANTS):
        asked = handout.questions(part)
        check.store(asked, tmp_path)
        again = check.stored(tmp_path / f"part{part.number:02d}.safetensors")
        for before, after in ((asked.right, again.right), (asked.questions, again.questions)):
            assert before.keys() == after.keys()
            for key, values in before.items():
                for name, value in values.items():
                    assert np.shape(value) == np.shape(after[key][name]), (key, name)


SLEEPER = "import time\n    time.sleep(2)\n    signal = "


def test_limits_count_what_is_computed_and_say_which_was_hit(tmp_path, monkeypatch):
    """Right code that gets no processor for two seconds is right; who waits for ever is ended."""
    source = (ROOT / "scheduler.py").read_text()
    (tmp_path / "scheduler.py").write_text(source.replace("signal = ", SLEEPER, 1))
    monkeypatch.setattr(check, "PATIENCE", 1)
    monkeypatch.setattr(grade, "SECONDS", 1)
    monkeypatch.setattr(check, "CLOCK", 30)
    out, limits = tmp_path / "results.json", []
    found = graded(tmp_path, out, numbers=[1])
    assert found["score"] == 2, found
    monkeypatch.setattr(check, "CLOCK", 1)
    limits.append(graded(tmp_path, out, numbers=[1]))
    monkeypatch.setattr(check, "STARTUP", 0.01)
    limits.append(graded(tmp_path, out, numbers=[1]))
    monkeypatch.setattr(check, "STARTUP", 120)
    monkeypatch.setattr(grade, "WHOLE", 1.1)
    limits.append(graded(tmp_path, out, numbers=[1]))
    words = ["1 seconds by the clock", "not imported within 0.01 seconds", "for all parts together"]
    for result, said in zip(limits, words, strict=True):
        assert result["score"] == 0 and said in result["tests"][0]["output"], result


def test_readmes_of_the_hand_out_link_nothing_that_it_lacks(given_out):
    for path in (given_out / "README.md", given_out / "tutorial" / "assignments" / "README.md"):
        text = path.read_text()
        assert "LECTURER" not in text and "own.py" not in text and "Not handed out" in text
        for link in re.findall(r"\]\((?!http)([^)#]+)", text):
            assert (path.parent / link).exists(), link
    text = (given_out / "tutorial" / "README.md").read_text()
    assert "python tutorial/chapters.py" not in text and "python -i tutorial/lab.py`." in text


@pytest.mark.parametrize(["part", "said"], [(1, "1.png"), (6, "largest |ratio - 1|")])
def test_pictures_of_parts_are_drawn(part, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "OUT", tmp_path)
    show.main([str(part)])
    assert said in capsys.readouterr().out


def test_a_picture_of_what_is_not_written_says_what_to_write(monkeypatch):
    def add_noise(*_):
        raise NotImplementedError("write add_noise (chapter 1)")

    monkeypatch.setattr(show.scheduler, "add_noise", add_noise)
    with pytest.raises(SystemExit, match=r"^write add_noise \(chapter 1\) first$"):
        show.main(["1"])


def test_numbers_are_each_students_own():
    part = PARTS[0]
    first, second = (oracles.sheet(part, {}, student, b"k") for student in ("ada", "bob"))
    again = oracles.sheet(part, {}, "ada", b"k")
    assert (first.questions["add_noise/0"]["x_0"] == again.questions["add_noise/0"]["x_0"]).all()
    assert (first.questions["add_noise/0"]["x_0"] != second.questions["add_noise/0"]["x_0"]).all()
    assert not check.fits(second.right["add_noise/0"], first.right["add_noise/0"])


def test_the_parts_add_up():
    assert sum(part.points for part in PARTS) == 40
    for part in PARTS:
        shares = [part.share(u, kind) for u in part.units for kind in KINDS if has(u, kind)]
        assert sum(shares) == part.points
