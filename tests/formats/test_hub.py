"""Models of the hub through a mirror: a small HTTP server that speaks as much of it as is asked."""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from t5x_lite.errors import UserError
from t5x_lite.formats import hf, hub
from tests import tiny
from tests.formats import folders

SHA = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def mirror(folder: pathlib.Path):
    """A server of one model, org/tiny, that takes uploads of another, org/new; yields (its address,
    what was asked: paths with their tokens, and {path: bytes} of what was uploaded)."""
    asked: list[tuple[str, str]] = []
    uploaded: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append((self.path, self.headers.get("Authorization", "")))
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/api/models/org/new/preupload/main":
                answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False,
                                     "oid": None} for f in json.loads(body)["files"]]}
            elif self.path == "/api/models/org/new/commit/main":
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                answer = {"commitUrl": f"{address}/org/new/commit/{SHA}", "commitOid": SHA}
            elif self.path == "/api/repos/create":
                answer = {"url": f"{address}/org/new", "id": "org/new"}
            else:
                answer = {"errors": [], "warnings": []}   # the card's YAML is looked at
            self.answer(json.dumps(answer).encode())

        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization", "")))
            path = self.path.partition("?")[0]
            files = sorted(f for f in folder.iterdir() if f.is_file())
            if path in ("/api/models/org/tiny/revision/main", "/api/models/org/tiny/revision/v1"):
                self.answer(json.dumps({"id": "org/tiny", "sha": SHA, "siblings": [
                    {"rfilename": f.name} for f in files]}).encode())
            elif path == f"/api/models/org/tiny/tree/{SHA}":
                self.answer(json.dumps([{
                    "type": "file", "path": f.name, "size": f.stat().st_size,
                    "oid": hashlib.sha1(f.read_bytes()).hexdigest()} for f in files]).encode())
            elif path.startswith(f"/org/tiny/resolve/{SHA}/"):
                data = (folder / path.rpartition("/")[2]).read_bytes()
                self.answer(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                                   "X-Repo-Commit": SHA})
            else:
                self.send_response(404)
                if "/revision/" in path:
                    self.send_header("X-Error-Code", "RevisionNotFound" if "/org/tiny/" in path
                                     else "RepoNotFound")
                self.end_headers()

        do_HEAD = do_GET

        def answer(self, data, headers=()):
            self.send_response(200)
            for name, value in {"Content-Length": len(data), **dict(headers)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield address, asked, uploaded
    finally:
        server.shutdown()


def fetch(cache, endpoint, *names, **environment):
    """What hub.local_folder says of each name, in a process of its own: the first line of an error."""
    script = """
import sys
from t5x_lite.errors import UserError
from t5x_lite.formats import hub
for name in sys.argv[1:]:
    try:
        print(hub.local_folder(name).resolve())
    except UserError as error:
        print(str(error).splitlines()[0])
"""
    result = subprocess.run([sys.executable, "-c", script, *names], capture_output=True, text=True,
                            env={**os.environ, "HF_HOME": str(cache), "HF_ENDPOINT": endpoint,
                                 "JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_XET": "1", **environment})
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if not line.endswith("in the hub")]


def test_a_model_of_the_hub_by_its_name(tmp_path):
    pytest.importorskip("huggingface_hub")
    folders.write_hf(tmp_path / "served", tiny.seq2seq().model)
    (tmp_path / "served" / "consolidated.safetensors").write_bytes(b"not to be fetched")
    cache = tmp_path / "cache"
    with mirror(tmp_path / "served") as (address, asked, _):
        folder, other, revision, tagged = fetch(
            cache, address, "org/tiny", "org/other", "org/tiny@v9", "org/tiny@v1", HF_TOKEN="hf_secret")
    assert not any("/consolidated" in path for path, _ in asked)
    assert {token for path, token in asked if "/org/tiny" in path} == {"Bearer hf_secret"}
    assert tagged == folder
    assert "neither a local folder nor a model of the hub" in other
    assert "has no such revision" in revision
    served, read = (hf.read_model(str(f)) for f in (tmp_path / "served", folder))
    path = "token_embedding/embedding"
    np.testing.assert_array_equal(served.read(path), read.read(path))
    # The server is gone; the cache holds what was asked before, and says what it does not hold.
    again, other = fetch(cache, address, "org/tiny", "org/other", HF_HUB_OFFLINE="1")
    assert again == folder and "cannot be reached" in other


def test_an_export_is_pushed(tmp_path):
    pytest.importorskip("huggingface_hub")
    folders.write_hf(tmp_path / "export", tiny.seq2seq().model)
    (tmp_path / "export" / "README.md").write_text("---\ntags: [t5x_lite]\n---\n# tiny\n")
    script = ("import sys\nfrom t5x_lite.errors import UserError\nfrom t5x_lite.formats import hub\n"
              "try:\n    hub.push(sys.argv[1], 'org/new')\nexcept UserError as e:\n    print(e)\n")

    def push(endpoint, **environment):
        result = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "export")], capture_output=True, text=True,
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": endpoint,
                 "JAX_PLATFORMS": "cpu", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_secret",
                 **environment})
        assert result.returncode == 0, result.stderr
        return result.stdout

    with mirror(tmp_path / "export") as (address, asked, uploaded):
        assert f"pushed to {address}/org/new" in push(address)
    assert uploaded == {f.name: f.read_bytes() for f in (tmp_path / "export").iterdir()}
    assert {token for path, token in asked if "/org/new" in path} == {"Bearer hf_secret"}
    assert "What was written stays in" in push(address, HF_HUB_OFFLINE="1")


def test_a_local_folder_comes_first_and_other_names_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert hub.local_folder("org/tiny") == pathlib.Path("org/tiny")
    for name in ("/a/b", "../b", "a", "a/b/c", "~/x"):
        assert hub.local_folder(name) == pathlib.Path(name).expanduser()
    with pytest.raises(UserError, match="--push=tiny: must be ORG/NAME"):
        hub.push(tmp_path, "tiny")


def test_a_folders_own_config(tmp_path):
    from configs import hf as preset
    folders.write_hf(tmp_path / "m", tiny.seq2seq().model)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    run = preset.run(str(tmp_path / "m"))
    assert (run.init_from, run.objective.name) == (f"hf:{tmp_path / 'm'}", "seq2seq")
    assert run.model.embed_dim == tiny.seq2seq().model.embed_dim
    assert run.data.vocabulary == str(tmp_path / "m" / "tokenizer.json")
    from t5x_lite import cli
    assert cli._find_config("--config=hf:a/b").endswith("configs/hf.py:a/b")
    with pytest.raises(UserError, match="config.json does not exist"):
        preset.run(str(tmp_path))
