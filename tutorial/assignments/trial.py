"""Try a test of yours: `python tutorial/assignments/trial.py test_05.py bugs/05`.

A test of a bug is a file of functions test_...() without arguments, which import scheduler, ddpo or
rewards. It must fail on the module with the fault and pass on the project's own, that is yours; it
must also pass on versions with other names, orders and layouts inside of functions. So look at what
functions give, not at how they are written.

For grade.py this is a worker (`python -I trial.py FOLDER`), locked up as worker.py is. Versions
come as texts under names that say nothing, in an order that says nothing, each to a process of its
own.
"""

import argparse
import ast
import importlib.abc
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULES = ("scheduler", "unet", "ddpo", "rewards")
SECONDS, CLOCK = 20, 3  # of computing, for one test file on one version; times that by the clock
LONGEST = 20_000  # characters that one may say


class Texts(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Modules whose source is not in a file."""

    def __init__(self, texts):
        self.texts = texts

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name in self.texts else None

    def get_source(self, name):
        return self.texts[name]


def said(error, name):
    """An error in one line, with the test's line."""
    line, trace = "", error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == name:
            line = f"line {trace.tb_lineno}: "
        trace = trace.tb_next
    text = " ".join(str(error).split())
    return f"{line}{type(error).__name__}{': ' if text else ''}{text}"[:300]


def attempt(name, test, texts):
    """A test file on one version of the modules -> "" where it passes, else what it says."""
    kept = {module: sys.modules.pop(module) for module in MODULES if module in sys.modules}
    sys.meta_path.insert(0, Texts(texts))
    try:
        space = {"__name__": "test", "__file__": name}
        exec(compile(test, name, "exec"), space)
        found = [f for key, f in space.items() if key.startswith("test_") and callable(f)]
        if not found:
            return "it has no function whose name begins with test_"
        for function in found:
            function()
    except BaseException as error:  # somebody else's code may raise anything
        return said(error, name)
    finally:
        sys.meta_path.pop(0)
        for module in MODULES:
            sys.modules.pop(module, None)
        sys.modules.update(kept)
    return ""


def scored(text, images, prompts):
    """What a student's reward.py gives for pictures -> a JSON list, or what went wrong."""
    try:
        space = {"__name__": "reward"}
        exec(compile(text, "reward.py", "exec"), space)
        return json.dumps([float(x) for x in space["reward"](images, prompts)])
    except BaseException as error:  # somebody else's code may raise anything
        return said(error, "reward.py")


def apart(function, *arguments):
    """What a function says, from a process of its own, where the system can fork."""
    if not hasattr(os, "fork"):
        return function(*arguments)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing; then, who waits
        signal.alarm(CLOCK * SECONDS)
        with os.fdopen(write, "wb") as pipe:
            pipe.write(function(*arguments).encode(errors="replace")[:LONGEST] + b"\n")
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read(LONGEST + 2)
    os.waitpid(child, 0)
    ended = f"no end within {SECONDS} seconds of computing, or it ends the whole process"
    return text.decode(errors="replace")[:-1] if text.endswith(b"\n") else ended


def worker(folder):
    """All trials of folder/job.json -> folder/answers/said.json, {token: what was said}."""
    sys.path.insert(0, str(HERE))
    import numpy as np
    import PIL.Image
    import safetensors.torch
    import torch
    import transformers
    from worker import confine, limit

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    (folder / "job.json").unlink()
    used = (PIL.Image, safetensors.torch, transformers.CLIPModel)  # loaded before the door is shut
    images = [np.load(path) for path in sorted(folder.glob("*.npy")) if used]
    torch.set_num_threads(1)
    (folder / "ready").touch()
    limit()
    if job["confined"]:
        confine(folder)
    found = {}
    for trial in job["trials"]:
        found[trial["token"]] = apart(attempt, trial["name"], trial["test"], trial["texts"])
    for n, some in enumerate(images):
        found[str(n)] = apart(scored, job["reward"], some, job["prompts"][n])
    aside = folder / "answers" / "said.tmp"
    aside.write_text(json.dumps(found), encoding="utf-8")
    aside.replace(folder / "answers" / "said.json")


def texts_of(*folders):
    """The modules of a folder, those that it lacks from the next one -> {name: text}."""
    found = {}
    for name in MODULES:
        paths = [folder / f"{name}.py" for folder in folders if (folder / f"{name}.py").is_file()]
        found[name] = paths[0].read_text(encoding="utf-8")
    return found


def launch(job, images, confined, seconds):
    """A job in a process of its own -> {token: what it said}, how it ended for whom is silent."""
    import numpy as np
    from check import NOBODY, run

    scratch = Path(tempfile.mkdtemp(prefix="ddpo-")).resolve()
    try:
        (scratch / "job.json").write_text(json.dumps({**job, "confined": confined}))
        for n, some in enumerate(images):
            np.save(scratch / f"{n}.npy", some)
        (scratch / "answers").mkdir()
        if confined and os.getuid() == 0:
            for path in (scratch, scratch / "answers"):
                os.chown(path, NOBODY, NOBODY)
        ended = run(scratch, seconds, quiet=confined, program="trial.py")
        path = scratch / "answers" / "said.json"
        regular = path.is_file() and not path.is_symlink() and path.stat().st_size < LONGEST * 16
        return (json.loads(path.read_text(encoding="utf-8")) if regular else {}), ended
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def ask(trials, confined=False, seconds=SECONDS):
    """Trials [{token, name, test, texts}], in a process of their own -> {token: what it said}."""
    found, ended = launch({"trials": trials}, [], confined, seconds)
    return {t["token"]: str(found.get(t["token"], ended)) for t in trials}


def score(text, images, prompts, seconds=SECONDS):
    """A student's reward of some lots of pictures and prompts -> a list of floats for each.

    Raises ValueError, with what it says instead.
    """
    job = {"trials": [], "reward": text, "prompts": prompts}
    found, ended = launch(job, images, confined=True, seconds=seconds)
    return [numbers(found.get(str(n), ended), len(some)) for n, some in enumerate(images)]


def numbers(line, count):
    """What `scored` says -> list of float."""
    try:
        scores = [float(x) for x in json.loads(line)]
    except (ValueError, TypeError):
        raise ValueError(f"reward.py: {str(line)[:300]}") from None
    if len(scores) != count or not all(map(math.isfinite, scores)):
        raise ValueError(f"reward.py must give {count} finite numbers")
    return scores


def main(argv=None):
    """On a student's own machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("test", type=Path, help="such as test_05.py")
    parser.add_argument("bug", type=Path, help="a folder with a module in it, such as bugs/05")
    options = parser.parse_args(argv)
    root = HERE.parents[1]
    if not any((options.bug / f"{name}.py").is_file() for name in MODULES):
        parser.error(f"{options.bug} holds no module; a folder such as bugs/05 does")
    try:
        test = options.test.read_text(encoding="utf-8")
        ast.parse(test)
    except (OSError, ValueError, SyntaxError) as error:
        parser.error(f"{options.test}: {error}")
    sources = {"that module": texts_of(options.bug, root), "yours": texts_of(root)}
    for token, texts in sources.items():
        trial = {"token": token, "name": options.test.name, "test": test, "texts": texts}
        line = ask([trial])[token]
        print(f"on {token}: {f'fails, {line}' if line else 'passes'}")


if __name__ == "__main__":
    if len(sys.argv) == 2 and (Path(sys.argv[1]) / "job.json").is_file():
        worker(Path(sys.argv[1]))
    else:
        main()
