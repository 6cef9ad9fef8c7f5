"""Google Cloud Storage: what reaches a bucket, and what goes wrong there, in words.

files.py is what the rest of the house calls. Objects are written whole and at once by
google-cloud-storage, which retries and compares checksums; paths, listings and reads go through
etils.epath and gcsfs, as orbax's do. Both find the credentials of the machine or of `gcloud auth
application-default login`; without any, public buckets can be read. STORAGE_EMULATOR_HOST names
another server (and TENSORSTORE_GCS_HTTP_URL the same one for the arrays of checkpoints).

Nothing here is imported or asked before a gs:// URL is used.
"""

import functools
import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_TOO_FEW_SLASHES = re.compile(r"(gs|s3):/?(?=[^/])")
# tensorstore has one class for all errors, and says in front which it is.
_PASSING = re.compile("UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|RESOURCE_EXHAUSTED")
_NO_RIGHTS = re.compile("PERMISSION_DENIED|UNAUTHENTICATED")
_PACKAGES = {"gcsfs": "gcsfs", "google.cloud.storage": "google-cloud-storage"}
_SECONDS_TO_ANSWER = 20.0   # for the first request to a bucket, retries included


class Refused(ValueError):
    """A URL that cannot be used; the message is for its author. files.py makes a UserError of it."""

    passing = False   # whether it may be usable later


class Name(NamedTuple):
    """What a gs:// URL names."""

    bucket: str
    key: str    # of the object, or of a folder without its last slash; "" for the bucket itself


class Entry(NamedTuple):
    """An object as a listing has it."""

    key: str
    size: int          # bytes
    generation: int    # changes whenever the object does


# --- names ----------------------------------------------------------------------------------------

def is_url(name: os.PathLike | str) -> bool:
    """Whether a name is, or is meant to be, a URL of whatever scheme and no path of this machine."""
    text = os.fspath(name)
    return bool(_URL.match(text) or _TOO_FEW_SLASHES.match(text))


def split(url: os.PathLike | str) -> Name:
    """The bucket and key of a gs:// URL.

    Raises:
        Refused: another scheme, or no bucket.
    """
    text = os.fspath(url)
    scheme, rest = _URL.fullmatch(text).groups()   # type: ignore[union-attr]
    if scheme != "gs":
        raise Refused(f"{text}: {scheme}:// is not supported yet. Give a local path or "
                      "gs://BUCKET/PATH (Google Cloud Storage); a bucket of another kind that is "
                      "mounted is a local path.")
    bucket, _, key = rest.partition("/")
    if not bucket:
        raise Refused(f"{text}: names no bucket: gs://BUCKET/PATH.")
    return Name(bucket, key.strip("/"))


def check(name: os.PathLike | str) -> None:
    """Raises Refused unless a URL is one of gs://, what reaches it is installed, and its bucket
    can be reached and read. A bucket is asked once in a process; a local path is not looked at."""
    text = os.fspath(name)
    if match := _TOO_FEW_SLASHES.match(text):
        raise Refused(f"{text}: a URL has two slashes: {match[1]}://{text[match.end():]}")
    if not is_url(text):
        return
    bucket = split(text).bucket
    for package, wheel in _PACKAGES.items():
        if not _is_installed(package):
            raise Refused(f"{text}: buckets need the package {wheel}: pip install "
                            "'t5x_lite[gcs]'")
    _reach(bucket)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:   # of google, without which google.cloud is none
        return False


def prepare() -> None:
    """Has epath go through gcsfs, where that is there, instead of TensorFlow, for orbax's paths and
    ours alike. The mains call it: epath asks once in a process."""
    if _is_installed("gcsfs"):
        os.environ.setdefault("EPATH_USE_TF", "0")
    # Calls of its own to tell kinds of buckets; what is tested here goes without.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@functools.cache
def _reach(bucket: str) -> None:
    """Raises Refused unless the bucket answers with a list."""
    prepare()
    import fsspec
    # gcsfs would keep listings for good, and tensorstore and other processes write here too.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    try:
        first = client().list_blobs(bucket, max_results=1, retry=_patience(_SECONDS_TO_ANSWER))
        next(iter(first), None)
    except failures() as error:
        why = explain(error, bucket)
        if _status(error) == 404:
            why = (f"there is no such bucket ({_said(error)}). Look at the name, or make it: "
                   f"gcloud storage buckets create gs://{bucket}")
        refused = Refused(f"gs://{bucket}: {why}")
        refused.passing = is_passing(error)
        raise refused from error


# --- what goes wrong ------------------------------------------------------------------------------

def failures(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """What reading and writing raise, here and in a bucket, and `others`. For an except clause, which
    asks for it once something was raised."""
    found: list[type[BaseException]] = [OSError, *others]
    if "gcsfs" in _loaded():
        from gcsfs.retry import ChecksumError, HttpError
        found += [HttpError, ChecksumError]
    if "google.cloud.storage" in _loaded():
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
        from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
        found += [GoogleAPIError, GoogleAuthError, DataCorruption, InvalidResponse]
    return tuple(found)


def _loaded() -> dict[str, Any]:
    import sys
    return sys.modules


def explain(error: BaseException, bucket: str) -> str:
    """What an error of storage says, and what to do about it, in a sentence or two.

    bucket: "" where what failed is no bucket's.
    """
    said = _said(error)
    if not bucket:
        return said
    status = _status(error)
    if status in (401, 403):
        return (f"no rights ({said}). Log in (gcloud auth application-default login) or have the "
                "account given roles/storage.objectAdmin and roles/storage.legacyBucketReader on "
                f"gs://{bucket}; reading alone needs roles/storage.objectViewer.")
    if status is None and _is_lost_connection(error):
        return f"Google Cloud Storage cannot be reached ({said}). Is there a network?"
    return said


def are_used() -> bool:
    """Whether this process has asked for a bucket."""
    return client.cache_info().currsize > 0


def is_passing(error: BaseException) -> bool:
    """Whether an error tells of a lost connection or of a server that is busy."""
    status = _status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return _is_lost_connection(error) or bool(_PASSING.match(str(error)))


def is_out_of_reach(error: BaseException) -> bool:
    """Whether an error is passing or tells of rights, so that nothing is known of the object."""
    return (is_passing(error) or _status(error) in (401, 403)
            or bool(_NO_RIGHTS.match(str(error))))


def _said(error: BaseException) -> str:
    # The message of a RetryError is that of what it gave up on.
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}…"


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error, where it has one."""
    code = getattr(error, "code", None)
    code = code() if callable(code) else code
    if isinstance(code, int) or (isinstance(code, str) and code.isdigit()):
        return int(code)
    if isinstance(error, OSError) and str(error).startswith("Forbidden"):   # gcsfs's 403
        return 403
    if isinstance(error, FileNotFoundError):   # gcsfs's 404
        return 404
    if type(error).__name__ in ("RefreshError", "InvalidOperation"):   # no credentials, or old ones
        return 401
    return None


def _is_lost_connection(error: BaseException) -> bool:
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError)) or re.search(
                "Connect|Transport|Retry|Timeout|Resolution", type(error).__name__):
            return True
        error = error.__cause__   # type: ignore[assignment]
    return False


# --- objects --------------------------------------------------------------------------------------

@functools.cache
def client() -> Any:
    """google.cloud.storage's client, without credentials where the machine has none."""
    from google.auth.exceptions import DefaultCredentialsError
    from google.cloud import storage
    try:
        return storage.Client()
    except DefaultCredentialsError:
        return storage.Client.create_anonymous_client()


def _blob(url: os.PathLike | str) -> Any:
    name = split(url)
    return client().bucket(name.bucket).blob(name.key)


def _patience(seconds: float) -> Any:
    """For how long google-cloud-storage tries a request again."""
    from google.cloud.storage import retry
    return retry.DEFAULT_RETRY.with_timeout(seconds)


def read(url: os.PathLike | str, seconds: float = 120.0) -> tuple[bytes, int]:
    """(content, generation) of an object; (b"", 0) where there is none. It is tried for so long."""
    from google.api_core.exceptions import NotFound
    blob = _blob(url)
    try:
        return blob.download_as_bytes(retry=_patience(seconds)), blob.generation
    except NotFound:
        return b"", 0


def write(url: os.PathLike | str, content: bytes) -> None:
    """Writes an object: readers see the old one or the new one."""
    _blob(url).upload_from_string(content)


def replace(url: os.PathLike | str, content: bytes, generation: int, seconds: float = 120.0
            ) -> int | None:
    """Writes an object if it is still of this generation (0: if there is none), tried for so long.

    Returns its new generation; None where somebody else has written it meanwhile.
    """
    from google.api_core.exceptions import PreconditionFailed
    blob = _blob(url)
    try:
        blob.upload_from_string(content, if_generation_match=generation, retry=_patience(seconds))
    except PreconditionFailed:
        # It may be our own write, whose answer was lost and which was then tried again.
        found, now = read(url, seconds)
        return now if found == content else None
    return blob.generation


def append(url: os.PathLike | str, content: bytes) -> None:
    """Writes an object with so much more at its end, whoever else does the same at that time."""
    while True:
        before, generation = read(url)
        if replace(url, before + content, generation) is not None:
            return


def upload(file: pathlib.Path, url: os.PathLike | str, size: int | None = None) -> None:
    """Writes a file, or its first so many bytes, as an object."""
    with open(file, "rb") as content:
        _blob(url).upload_from_file(content, size=size)


def download(url: os.PathLike | str, file: pathlib.Path) -> None:
    """Writes an object into a file."""
    _blob(url).download_to_filename(str(file))


def delete(url: os.PathLike | str) -> None:
    """Removes an object."""
    _blob(url).delete()


def entries(url: os.PathLike | str) -> Iterator[Entry]:
    """All objects below a folder, at any depth."""
    name = split(url)
    prefix = f"{name.key}/" if name.key else None
    for blob in client().list_blobs(name.bucket, prefix=prefix):
        if not blob.name.endswith("/"):   # what consoles make for a folder
            yield Entry(blob.name, blob.size, blob.generation)


def entry(url: os.PathLike | str) -> Entry | None:
    """An object; None where there is none."""
    name = split(url)
    blob = client().bucket(name.bucket).get_blob(name.key) if name.key else None
    return Entry(blob.name, blob.size, blob.generation) if blob is not None else None


def move_folder(source: os.PathLike | str, target: os.PathLike | str, marker: str) -> None:
    """Copies a folder's objects within its bucket, then removes the old ones.

    A kill in between leaves the old folder whole, or without its `marker` (the name of the object
    that says that it is whole), which is copied last and removed first.
    """
    old, new = split(source), split(target)
    bucket = client().bucket(old.bucket)
    keys = sorted((e.key for e in entries(source)), key=lambda key: key == f"{old.key}/{marker}")
    for key in keys:
        bucket.copy_blob(bucket.blob(key), bucket, f"{new.key}{key.removeprefix(old.key)}")
    for key in reversed(keys):
        bucket.delete_blob(key)


def _listings() -> Any:
    """gcsfs, the instance that epath has as well."""
    import fsspec
    return fsspec.filesystem("gcs", finalize_on_close=True)


def glob(pattern: str) -> list[str]:
    """The URLs of the objects that a pattern (*, ?, [ and **) matches."""
    found = _listings().glob(pattern, detail=True)
    return [f"gs://{key}" for key, info in found.items() if info["type"] == "file"]


def find(folder: os.PathLike | str, name: str, skip: str) -> Iterator[str]:
    """The URLs of the objects of that name in a folder and below, but for folders called `skip`."""
    for root, folders, objects in _listings().walk(os.fspath(folder)):
        folders[:] = [f for f in folders if f != skip]
        if name in objects:
            yield f"gs://{root}/{name}"
