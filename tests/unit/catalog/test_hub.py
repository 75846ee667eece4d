"""Downloads from a hub, played by a local HTTP server that speaks the part of its protocol that a download needs."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from apportion.catalog.hub import resolve_model
from apportion.types.errors import ModelError

COMMIT = "a" * 40
REVISIONS: list[str] = []
QUANTISED = b'{"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}'
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 400,
    "pytorch_model.bin": b"never asked for",
}


class Hub(BaseHTTPRequestHandler):
    requested: list[str]
    looks: list[str]
    revisions: list[str]
    """Of the files that were asked for."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if self.path.startswith("/api/models/org/tiny"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            info = {"id": "org/tiny", "sha": self.commit(), "siblings": siblings, "private": False}
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in FILES.items()
            ]
            self.reply(200, json.dumps(tree if "/tree/" in self.path else info).encode(), body=body)
        elif (name := self.path.rsplit("/", 1)[-1]) in FILES and self.path.startswith("/org/tiny/resolve/"):
            self.revisions.append(self.path.split("/")[4])
            if body:
                self.requested.append(name)
            self.reply(200, FILES[name], body=body)
        else:
            self.reply(404, b"{}", body=body, error="RepoNotFound")

    def commit(self) -> str:
        """A branch moves on with every look at it."""
        revision = self.path.partition("?")[0].rpartition("/")[2]
        if len(revision) == len(COMMIT):
            return revision
        self.looks.append(revision)
        return COMMIT if len(self.looks) == 1 else "b" * 40

    def reply(self, status: int, data: bytes, *, body: bool, error: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.path.split("/")[4] if "/resolve/" in self.path else COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    requested: list[str] = []
    handler = type("Handler", (Hub,), {"requested": requested, "revisions": REVISIONS, "looks": []})
    REVISIONS.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()
    thread.join()


def resolve(endpoint: str, cache: Path, name: str, *, weights: bool) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub client reads its settings on import."""
    code = f"""
from apportion.catalog.hub import resolve_model
from apportion.types.errors import ModelError
try:
    print(resolve_model({name!r}, weights={weights}))
except ModelError as error:
    print("ModelError:", error)
"""
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_download_fetches_what_is_asked_with_a_progress_bar(hub: tuple[str, list[str]], tmp_path: Path):
    endpoint, requested = hub
    done = resolve(endpoint, tmp_path, "org/tiny", weights=True)
    folder = Path(done.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"], done.stderr
    assert sorted(requested) == ["config.json", "model.safetensors"]
    assert "100%" in done.stderr


def test_weights_are_of_the_commit_whose_config_was_checked(hub: tuple[str, list[str]], tmp_path: Path):
    """The branch `v1` has moved on in between."""
    done = resolve(hub[0], tmp_path, "org/tiny@v1", weights=True)
    assert set(REVISIONS) == {COMMIT}, done.stderr
    assert done.stdout.strip().endswith(COMMIT)


def test_weights_that_cannot_be_run_are_not_downloaded(
    hub: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    endpoint, requested = hub
    monkeypatch.setitem(FILES, "config.json", QUANTISED)
    done = resolve(endpoint, tmp_path, "org/tiny", weights=True)
    assert "is in mxfp4: such weights can be planned" in done.stdout, done.stderr
    assert requested == ["config.json"]


def test_planning_downloads_the_config_alone(hub: tuple[str, list[str]], tmp_path: Path):
    endpoint, requested = hub
    done = resolve(endpoint, tmp_path, "org/tiny", weights=False)
    assert (Path(done.stdout.strip()) / "config.json").is_file(), done.stderr
    assert requested == ["config.json"]


def test_unknown_model_is_one_line(hub: tuple[str, list[str]], tmp_path: Path):
    done = resolve(hub[0], tmp_path, "org/nothing", weights=True)
    assert done.stdout.startswith("ModelError: the hub has no model 'org/nothing'"), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_unreachable_hub_is_one_line(tmp_path: Path):
    done = resolve("http://127.0.0.1:9", tmp_path, "org/tiny", weights=True)
    assert done.stdout.startswith("ModelError: cannot download 'org/tiny'"), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1


def test_local_names(tmp_path: Path):
    assert (resolve_model("demo", weights=True) / "model.safetensors").is_file()
    config = tmp_path / "config.json"
    config.write_text("{}")
    assert resolve_model(str(config), weights=False) == config
    with pytest.raises(ModelError, match="is a file; running needs a folder"):
        resolve_model(str(config), weights=True)
    with pytest.raises(ModelError, match=r"no folder, config\.json or hub id"):
        resolve_model("no-such-thing", weights=True)
