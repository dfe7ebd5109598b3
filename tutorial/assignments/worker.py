"""Calls a student's functions, in a process of their own: `python -I worker.py FOLDER`.

check.py and grade.py start it. FOLDER holds the questions; the answers go into FOLDER/answers. For
grade.py it is locked up before it looks at the student's files: no file but its own folder's may be
written, none but Python's may be read, no network, little memory, and not as root. What should be
right is not known here, and nothing that happens here can change what grade.py writes.
"""

import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import re
import signal
import struct
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

try:
    import resource
except ImportError:  # Windows
    resource = None

MEMORY, FILE = 4 * 2**30, 2**24  # bytes
NOBODY = 65534
LARGEST = 10_000  # numbers in an output
# What libraries import only when it is needed, which in a private environment is too late.
LATER = ["numpy.ctypeslib", "numpy.ma"]
LATER += [f"PIL.{kind}ImagePlugin" for kind in ("Bmp", "Gif", "Jpeg", "Ppm", "Png")]


class Network:
    """What stands for the UNet: eps = theta x_t (1 + t / 5) + theta^2 words / 9, for each channel.

    words is the prompt's: its numbers, weighed 1, 2, 3 ... half: what it returns is float16.
    """

    def __init__(self, theta, half=False):
        self.theta, self.half = theta, half

    def __call__(self, x_t, timesteps, context):
        weights = torch.arange(1, context[0].numel() + 1).reshape(context.shape[1:])
        words = (context * weights).sum((1, 2)) / 9
        channel = self.theta[:, None, None]
        eps = channel * x_t * (1 + timesteps[:, None, None, None] / 5)
        eps = eps + channel**2 * words[:, None, None, None]
        return eps.half() if self.half else eps


def make_sampler(alphas_bar, final_alpha_bar, steps_offset, T, eta):
    """scheduler.py's, whosever that is."""
    scheduler = sys.modules["scheduler"]
    schedule = scheduler.NoiseSchedule(alphas_bar, final_alpha_bar, steps_offset)
    return scheduler.Sampler(schedule, T, eta)


SCHEDULE = ("alphas_bar", "final_alpha_bar", "steps_offset", "T", "eta")


def split(inputs):
    """-> the inputs that make a sampler, the others."""
    schedule = {name: value for name, value in inputs.items() if name in SCHEDULE}
    return schedule, {name: value for name, value in inputs.items() if name not in SCHEDULE}


def call_predict_noise(module, theta, half, **inputs):
    return module.predict_noise(Network(theta, half), **inputs)


def call_sample(module, theta, **inputs):
    schedule, inputs = split(inputs)
    found = module.sample(Network(theta), make_sampler(**schedule), **inputs)
    return found.latents, found.log_probs, found.timesteps, found.prompt_embeds


def call_policy_log_prob(module, theta, latents, prompt_embeds, **inputs):
    schedule, inputs = split(inputs)
    sampler = make_sampler(**schedule)
    log_probs = torch.zeros(len(latents), sampler.T)
    recorded = module.Trajectories(latents, log_probs, sampler.timesteps, prompt_embeds)
    return module.policy_log_prob(Network(theta), sampler, recorded, **inputs)


def call_PromptStatistics(module, size, min_count, **epochs):
    statistics, outputs = module.PromptStatistics(size, min_count), []
    for epoch in (0, 1):
        prompts, rewards = epochs[f"prompts_{epoch}"], epochs[f"rewards_{epoch}"]
        statistics.remember(prompts, rewards)
        outputs += statistics.mean_std(prompts, rewards)
    return tuple(outputs)


def call_bert_score(module, x, x_weights, x_mask, y, y_weights, y_mask):
    return module.bert_score((x, x_weights, x_mask), (y, y_weights, y_mask))


def call_incompressibility(module, images, prompts):
    return module.incompressibility(images.numpy(), prompts)


def call(name, module, inputs):
    """A unit's function -> tuple of its outputs."""
    special = globals().get(f"call_{name}")
    outputs = special(module, **inputs) if special else getattr(module, name)(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def tensor(value):
    """An output as a tensor, or what is wrong with it."""
    if not isinstance(value, (torch.Tensor, np.ndarray, np.number)):
        raise TypeError(f"{type(value).__name__} is returned where a tensor or array is wanted")
    value = torch.as_tensor(value)
    if value.numel() > LARGEST:
        raise TypeError(f"an output has the shape {list(value.shape)}")
    return value


def answer(name, module, outputs, case, inputs):
    """One case -> {output or gradient: tensor}."""
    kind, wrt = case
    inputs = {k: torch.as_tensor(v) if hasattr(v, "shape") else v for k, v in inputs.items()}
    for key in wrt:
        inputs[key] = inputs[key].clone().requires_grad_()
    found = [tensor(value) for value in call(name, module, inputs)]
    if len(found) != len(outputs):
        raise TypeError(f"{len(found)} outputs are returned where {len(outputs)} are wanted")
    if wrt:
        first = found[0].flatten()
        weights = 1 + torch.arange(len(first)) / 10
        if not first.requires_grad:
            return {f"d_{key}": torch.zeros_like(inputs[key]) for key in wrt}
        leaves = [inputs[key] for key in wrt]
        gradients = torch.autograd.grad((first * weights).sum(), leaves, allow_unused=True)
        pairs = zip(wrt, gradients, leaves, strict=True)
        return {f"d_{k}": torch.zeros_like(x) if g is None else g for k, g, x in pairs}
    if kind == "gradients":
        theta = inputs["theta"].requires_grad_()
        kept = call(name, module, {**inputs, "theta": theta})
        return {"graph": torch.tensor(float(any(x.requires_grad for x in kept)))}
    return dict(zip(outputs, found, strict=True))


def load(file, submission, reference):
    """The student's module; `reference` makes all that it imports from its sisters the reference's.

    Without a reference it is simply imported, and its sisters are the student's own.
    """
    if not reference:
        return importlib.import_module(file)
    name = f"submitted_{file}"
    spec = importlib.util.spec_from_file_location(name, submission / f"{file}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def isolate(module, task, cut):
    """Give a student's module the reference's functions, but for those of one unit."""
    reference = sys.modules.get(task["file"])  # of a variant there is none
    for file, name in cut:
        if file == task["file"] and name not in task["names"]:
            setattr(module, name, getattr(reference, name))


def complaint(error, submission):
    """An error in a student's code, in one line: where it is raised, and by whose call."""
    text = " ".join(str(error).split())
    if isinstance(error, NotImplementedError) and text.startswith("write "):
        return text
    if isinstance(error, SystemExit):
        text = f"your code calls sys.exit({text})"
    if isinstance(error, RuntimeError) and re.search(r"size of tensor.* dimension 3$", text):
        text += "; (B,) against (B, 4, h, w)? scheduler.py's expand is for that"
    frames = traceback.extract_tb(error.__traceback__)
    mine = [Path(f.filename).name for f in frames if Path(f.filename).parent == Path(submission)]
    lines = [f.lineno for f in frames if Path(f.filename).parent == Path(submission)]
    line = f"{mine[-1]}, line {lines[-1]}: " if mine else ""
    if len(mine) > 1 and (mine[0], lines[0]) != (mine[-1], lines[-1]):
        line = f"{mine[-1]}, line {lines[-1]}, called from {mine[0]}, line {lines[0]}: "
    if isinstance(error, SyntaxError):
        line = f"{Path(error.filename or '?').name}, line {error.lineno}: "
        text = error.msg
    return f"{line}{type(error).__name__}: {text}"[:300]


def signature_of(module, name):
    """Its parameters, as "(x_0, noise, alpha_bar_t)"."""
    return str(inspect.signature(getattr(module, name)))


@contextmanager
def patience(seconds):
    """Raise TimeoutError where a student's code computes on and on, with the line it is in."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def ring(*_):
        raise TimeoutError(f"no end within {seconds} seconds of computing: does a loop never end?")

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def answers(task, job, questions):
    """A unit's -> {key: {output: tensor, "type output": str}, or {"error": why}}."""
    keys, found = [f"{task['name']}/{n}" for n in range(len(task["cases"]))], {}
    try:
        module = load(task["file"], Path(job["submission"]), job["reference"])
        if job["reference"]:
            isolate(module, task, job["cut"])
        given, wanted = signature_of(module, task["name"]), task["signature"]
        if given != wanted:
            raise TypeError(f"{task['name']}{given}: the signature should be {wanted}")
        with patience(job["patience"]):
            for key, case in zip(keys, task["cases"], strict=True):
                found[key] = tried(task, module, case, questions[key], job["submission"])
    except BaseException as error:  # a student's code may raise anything
        why = {"error": complaint(error, job["submission"])}
        return {key: found.get(key, why) for key in keys}
    return found


def tried(task, module, case, inputs, submission):
    """One case's answers, or the error; but that of a loop without end ends the unit."""
    try:
        outputs = answer(task["name"], module, task["outputs"], case, inputs)
        found = {f"type {name}": str(x.dtype).split(".")[1] for name, x in outputs.items()}
        found.update({name: x.detach().double().clone() for name, x in outputs.items()})
    except TimeoutError:
        raise
    except BaseException as error:
        return {"error": complaint(error, submission)}
    return found


def read(path):
    """As check.py's -> {key: {name: value}}, the metadata."""
    nested = {}
    with safe_open(path, framework="pt") as file:
        metadata = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
        flat = {name: file.get_tensor(name) for name in file.keys()}
    for path, value in {**flat, **metadata.pop("plain")}.items():
        key, _, name = path.rpartition("/")
        nested.setdefault(key, {})[name] = value
    return nested, metadata


def write(path, nested):
    """As check.py's; aside, then renamed."""
    flat = {f"{key}/{name}": v for key, values in nested.items() for name, v in values.items()}
    tensors = {name: value.contiguous() for name, value in flat.items() if torch.is_tensor(value)}
    plain = {name: value for name, value in flat.items() if not torch.is_tensor(value)}
    aside = path.with_suffix(".tmp")
    save_file(tensors, aside, {"plain": json.dumps(plain)})
    aside.replace(path)


def limit():
    """A mistake shall fill neither the memory nor the disk."""
    if resource:
        for what, most in (("DATA", MEMORY), ("FSIZE", FILE), ("CORE", 0), ("NOFILE", 256)):
            resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (most, most))


def confine(folder):
    """Lock this process up, as far as the system allows."""
    if not sys.platform.startswith("linux"):
        return
    libc, root = ctypes.CDLL(None, use_errno=True), os.getuid() == 0
    if root:
        libc.unshare(0x40000000)  # CLONE_NEWNET: no network but its own, which leads nowhere
    most = threads_of(NOBODY if root else os.getuid()) + 64
    resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    landlock(libc, folder)
    if root:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def threads_of(user):
    """How many threads a user has, by number."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may have ended
            count += len(os.listdir(path / "task")) if path.stat().st_uid == user else 0
    return count


def landlock(libc, folder):
    """Linux' Landlock: files may be read in Python's folders only, and written in this one only.

    Nor may TCP be used, or a process outside be sent a signal. Older kernels know less of this.
    """
    create, add, restrict = 444, 445, 446  # the system calls, of all architectures
    version = libc.syscall(create, None, 0, 1)
    if version < 1:
        return
    every = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    rights, read = 2**every - 1, 0b1101  # execute, read a file, read a folder
    net, scope = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    size = 8 * (1 + (version >= 4) + (version >= 6))
    rules = libc.syscall(create, struct.pack("QQQ", rights, net, scope), size, 0)
    python = {sys.prefix, sys.base_prefix, *filter(os.path.isdir, sys.path[1:])}
    for path in {*python, "/usr", "/lib", "/lib64", "/etc", "/proc", "/sys", "/dev"}:
        allow(libc, add, rules, path, read | (2 if path == "/dev" else 0))
    allow(libc, add, rules, folder, rights)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.syscall(restrict, rules, 0)
    os.close(rules)


def allow(libc, add, rules, path, rights):
    """One folder's rights, and those of all that lies in it."""
    if os.path.isdir(path):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        libc.syscall(add, rules, 1, struct.pack("=Qi", rights, place), 0)
        os.close(place)


def main():
    """Everything that is ours is imported, then the door is shut, then the student's code runs."""
    folder = Path(sys.argv[1])
    questions, metadata = read(folder / "questions.safetensors")
    job = metadata["job"]
    sys.path.insert(0, job["reference"] or job["submission"])
    files = {task["file"] for task in job["units"]}
    for file in files if job["reference"] else ():  # a variant has no reference, but may use them
        importlib.import_module(file if file != "variants" else "ddpo")
    torch.set_num_threads(1)
    for name in LATER:
        importlib.import_module(name)
    (folder / "ready").touch()
    limit()
    if job["confined"]:
        confine(folder)
    for task in job["units"]:
        write(folder / "answers" / f"{task['name']}.safetensors", answers(task, job, questions))


if __name__ == "__main__":
    main()
