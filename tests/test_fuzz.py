"""Files from anywhere, bent and broken: each is refused in one line that names it, or it loads, and
takes neither more time nor more memory than the file says.

Safetensors headers and every JSON document that train.py reads. A few cases of each run with the
other tests; thousands by hand: `python -m pytest tests/test_fuzz.py --hypothesis-profile=long`.
"""

import json
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import rewards
import train
import unet
from scheduler import NoiseSchedule, Sampler, UserError
from test_train import resolve, run, small_model
from test_unet import lora_pair

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")


@contextmanager
def modest(seconds=5, memory=2**27):
    """More of the CPU or of memory than this is an error, but for what was there before."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, limits[1]))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert time.process_time() - start < seconds


def loads_or_is_refused(path, call):
    """Call it; a refusal is one line that names the file, or the flag of what the file sets."""
    with warnings.catch_warnings(action="ignore"), modest():
        try:
            call()
            event("loads")
        except UserError as error:
            event("is refused")
            line = str(error)
            assert str(path.parent) in line or "--" in line, line
            assert "\n" not in line and len(line) < 1500, line


# Documents


ODD = ["\ud800", "\0", "../x", "a.py:f", "cpu", "zoo", "fp16", "-1", "1e9", " ", "x" * 5000]
NUMBERS = [2**31, 2**63, 10**18, 10**400, -1, 0, 1e308, 5e-324, float("nan"), float("-inf")]
SIMPLE = st.none() | st.booleans() | st.integers(-2, 40) | st.sampled_from(NUMBERS)
SIMPLE |= st.floats() | st.text(max_size=4) | st.sampled_from(ODD)
GONE = object()
KEYS = st.text(max_size=4) | st.sampled_from(["all", "epoch", "prompt", "prompts", "lora"])
VALUES = st.recursive(
    SIMPLE, lambda x: st.lists(x, max_size=4) | st.dictionaries(KEYS, x, max_size=3), max_leaves=8
)
TAILS = [b"", b"\0", b"{}", b"}", b"\n", b"[" * 100_000, b"\xff", b"1" * 5000, b'"']


@st.composite
def bent(draw, content, most):
    """Bytes like these: some of the first `most` replaced, dropped, repeated; cut, or added to."""
    new = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, min(len(new), most) - 1)))
        length = draw(st.integers(0, 9))
        new[at : at + length] = draw(
            st.binary(max_size=9) | st.just(bytes(new[at : at + length]) * 2)
        )
    if draw(st.integers(0, 3)) == 0:
        new = new[: draw(st.integers(0, len(new)))]
    return bytes(new) + (draw(st.sampled_from(TAILS)) if draw(st.integers(0, 3)) == 0 else b"")


def places(value, path=()):
    """The paths to all parts of a JSON value."""
    yield path
    items = {dict: lambda: value.items(), list: lambda: enumerate(value)}.get(type(value), list)()
    for key, part in items:
        yield from places(part, (*path, key))


def at(value, path):
    """The part of a JSON value at a path."""
    for key in path:
        value = value[key]
    return value


def replaced(value, path, new):
    """The value with another part at a path, or without it where that is GONE."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    if copy[path[0]] is GONE:
        del copy[path[0]]
    return copy


def similar(value):
    """What might as well stand there."""
    others = st.just(GONE)
    if isinstance(value, bool):
        return others | st.just(not value)
    if isinstance(value, int):
        return others | st.integers(value - 2, value + 2) | st.just(2 * value)
    if isinstance(value, float):
        return others | st.sampled_from([value / 2, 2 * value, -value, round(value)])
    return others | st.sampled_from([value, value * 2 if isinstance(value, (str, list)) else {}])


@st.composite
def documents(draw, value):
    """The text of a JSON document like this one, as bytes."""
    text = json.dumps(value).encode()
    way = draw(st.integers(0, 8))
    if way == 0:
        return draw(bent(text, len(text)))
    if way == 1:
        return json.dumps(draw(VALUES)).encode()
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from([*places(value)][1:] or [()]))
        new = draw(similar(at(value, path)) if way > 4 else VALUES)
        value = replaced(value, path, new if path or new is not GONE else {})
    if way == 2 and isinstance(value, dict):
        value = {**value, draw(KEYS): draw(VALUES)}
    return json.dumps(value).encode()


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small model, and a run of it that can be gone on with."""
    home = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(small_model(), home / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curve", lambda *_: None)
        run(home / "run", "--model", str(home / "model"), "--clip", "x", "--lora-rank", "2")
    return home


def network(cls):
    def load(home):
        net = unet.load(cls, home / "model" / cls.__name__.lower())
        assert all(p.isfinite().all() and p.dtype == torch.float32 for p in net.parameters())

    return load


def reckoned(home):
    """By what fits a card, and then by what is loaded."""
    train.merge({"lora_rank": 4}, home / "model", (16e9, "bf16"))
    network(unet.UNet)(home)


def schedule(home):
    schedule = NoiseSchedule.from_folder(home / "model" / "scheduler")
    sampler = Sampler(schedule, 2, 1.0)
    x = torch.ones(2, 4, 2, 2)
    assert all(y.isfinite().all() for y in sampler.mean_std(x, x, sampler.timesteps))


def settings(home):
    config = resolve({}, home / "model")
    assert config.samples_per_epoch % config.batch_size == 0


def resumed(home):
    """All that is loaded before a run goes on, and its newest checkpoint."""
    ready = train.prepare({"out": str(home / "run"), "resume": True})
    assert train.read_checkpoint(ready) == 2


def prompts(home):
    found = train.load_prompts(str(home / "prompts.jsonl"))
    assert found and all(prompt.strip() for prompt in found)


def lines(home):
    found = train.read_lines(home / "run" / "metrics.jsonl")
    assert all(line["epoch"] < 10**400 for line in found)


DOCUMENTS = {
    "model/unet/config.json": reckoned,
    "model/vae/config.json": network(unet.VAE),
    "model/scheduler/scheduler_config.json": schedule,
    "model/ddpo.json": settings,
    "run/config.json": resumed,
    "run/checkpoints/000002/state.json": resumed,
    "run/metrics.jsonl": lines,
    "run/prompts.jsonl": resumed,
    "prompts.jsonl": prompts,
}


@pytest.fixture(scope="module", params=DOCUMENTS)
def document(request, home):
    """A file, what it holds, and how it is read; it is put back."""
    path = home / request.param
    if not path.exists():
        path.write_text('{"prompt": "a cat", "n": 2}\n{"prompt": "a dog"}\n')
    content = path.read_bytes()
    yield path, content, lambda: DOCUMENTS[request.param](home)
    path.write_bytes(content)


@given(data=st.data())
def test_any_document_is_refused_in_one_line_or_loads(document, data):
    path, content, call = document
    if path.suffix == ".jsonl":
        parts = content.splitlines()
        which = data.draw(st.integers(0, len(parts) - 1))
        parts[which] = data.draw(documents(json.loads(parts[which])))
        new = b"\n".join(parts)
    else:
        new = data.draw(documents(json.loads(content)))
    path.write_bytes(new)
    loads_or_is_refused(path, call)


# Safetensors: 8 bytes of the header's length, the header, numbers


DTYPES = "F64 F32 F16 BF16 I64 I32 I8 U8 BOOL F8_E4M3 F8_E5M2 C64 F4 U64 f32".split()
LENGTHS = st.integers(-9, 9) | st.sampled_from([2**27, 2**40, 2**63 - 1, -(2**20)])
SHAPES = st.lists(st.integers(-1, 8) | st.sampled_from(NUMBERS), max_size=5)


@st.composite
def headers(draw, header):
    """The text of a header like this one."""
    way = draw(st.integers(0, 3))
    if way == 0:
        return draw(documents(header))
    header, names = dict(header), [name for name in header if name != "__metadata__"]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(names))
        start, end = header[name]["data_offsets"]
        change = draw(
            st.fixed_dictionaries({"dtype": st.sampled_from(DTYPES)})
            | st.fixed_dictionaries({"shape": SHAPES})
            | st.fixed_dictionaries(
                {
                    "data_offsets": st.tuples(LENGTHS, LENGTHS).map(
                        lambda d: [start + d[0], end + d[1]]
                    )
                }
            )
        )
        header[name] = {**header[name], **change}
        if way == 1:
            header[draw(KEYS | st.sampled_from(names))] = header.pop(name)
            names = [name for name in header if name != "__metadata__"]
    return json.dumps(header).encode()


@st.composite
def tensor_files(draw, content):
    """Files like this one, all of them damaged."""
    length = int.from_bytes(content[:8], "little")
    if draw(st.integers(0, 2)) == 0:
        return draw(bent(content, length))
    text = draw(headers(json.loads(content[8 : 8 + length])))
    size = (len(text) + (0 if draw(st.booleans()) else draw(LENGTHS))) % 2**64
    numbers = content[8 + length :]
    numbers = numbers[: len(numbers) + draw(st.sampled_from([0, 0, -1, -64]))]
    return size.to_bytes(8, "little") + text + numbers


def lora(home):
    net = lora_pair(2)[0]
    unet.load_lora(net, home / "tensors")
    assert all(p.isfinite().all() for p in net.parameters())


def head(home):
    net = rewards.load_head(str(home / "tensors" / "head.safetensors"), 8)
    assert net(torch.ones(1, net.layers[0].in_features)).shape == (1,)


TENSORS = {
    f"model/unet/{unet.WEIGHTS}": network(unet.UNet),
    f"model/vae/{unet.WEIGHTS}": network(unet.VAE),
    "tensors/pytorch_lora_weights.safetensors": lora,
    "tensors/head.safetensors": head,
    "run/checkpoints/000002/optimizer.safetensors": resumed,
}


@pytest.fixture(scope="module", params=TENSORS)
def tensors(request, home):
    """A file, what it holds, and how it is read; it is put back."""
    path = home / request.param
    path.parent.mkdir(exist_ok=True)
    if path.name == unet.LORA and not path.exists():
        unet.save_tensors(unet.lora_weights(lora_pair(2)[0]), path.parent / unet.LORA)
    if path.name == "head.safetensors":
        unet.save_tensors(rewards.AestheticHead(8).state_dict(), path)
    content = path.read_bytes()
    yield path, content, lambda: TENSORS[request.param](home)
    path.write_bytes(content)


@given(data=st.data())
def test_any_tensors_are_refused_in_one_line_or_load(tensors, data):
    path, content, call = tensors
    path.write_bytes(data.draw(tensor_files(content)))
    loads_or_is_refused(path, call)
