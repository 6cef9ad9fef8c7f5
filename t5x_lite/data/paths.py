"""Lists of names and paths in a config's strings, and the files that paths and globs mean.

A list is separated by commas, a share stands behind "=" and a glob has *, ? and [: characters that
paths may hold as well. What exists as it is written is that file; only what does not is taken
apart.

    data.train=set, two/a.jsonl,b.jsonl=2      "set, two/a.jsonl" if there is such a file
    data.train=lang=en/train.jsonl=3           the share 3 of lang=en/train.jsonl
    data.train_files=v[2]/*.txt                the folder v[2] if there is one, else v2

A path may be a gs:// URL. Imports no TensorFlow.
"""

import glob
import os
import re

from t5x_lite import files
from t5x_lite.errors import nearest

EXAMPLES = re.compile(r"(.*\.(?:jsonl|json|tsv)(?:\.gz)?)(?:\[(\d*)%?:(\d*)%?\])?", re.DOTALL)
_COMMAS = 8   # in one path, at most
_GLOB = re.compile(r"[*?\[]")


def split(text: str) -> list[str]:
    """The entries of a comma-separated list, stripped; of parts that are a path together, one."""
    parts = text.split(",")
    entries = []
    while parts:
        most = min(len(parts), _COMMAS + 1)
        count = next((n for n in range(most, 1, -1) if _exists(",".join(parts[:n]))), 1)
        entry = ",".join(parts[:count]).strip()
        parts = parts[count:]
        if entry:
            entries.append(entry)
    return entries


def _exists(entry: str) -> bool:
    """Whether the entry is a path or glob of files that exist, with or without slice and share."""
    name, _, value = share(entry.strip())
    if "," in value:   # the last of these parts is no part of the path
        return False
    sliced = EXAMPLES.fullmatch(name)
    return bool(matches(sliced[1] if sliced else name))


def share(entry: str) -> tuple[str, str, str]:
    """(name, "=", what stands behind its last "="), or (name, "", "") where there is none or that
    "=" is part of a path's name."""
    if EXAMPLES.fullmatch(entry) or "=" not in entry:
        return entry, "", ""
    name, equals, value = entry.rpartition("=")
    return name.strip(), equals, value.strip()


def matches(name: str) -> list[str]:
    """The files of a path or a glob, sorted; [] where there are none."""
    path = _expanded(name)
    if not _possible(path):
        return []
    return [path] if files.is_file(path) else files.glob(_escaped(path))


def _expanded(name: str) -> str:
    """The name with its "~" written out."""
    name = name.strip()
    return os.path.expanduser(name) if _possible(name) else name


def _possible(name: str) -> bool:
    """Whether a file can have this name: no NUL, and no half of a surrogate pair."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _escaped(path: str) -> str:
    """The glob, the folders in front that exist as they are written being no part of it."""
    parts = path.split(os.sep)
    for count in range(len(parts) - 1, 0, -1):
        front = os.sep.join(parts[:count])
        if _GLOB.search(front) and files.is_dir(front):
            return os.sep.join([glob.escape(front), *parts[count:]])
    return path


def sizes(*lists: str) -> dict[str, int]:
    """{path: bytes} of the files among the entries of comma-separated lists, shares and slices
    aside: what tells copies of other data apart on the hosts of a run."""
    found = {}
    for entry in (entry for text in lists for entry in split(text)):
        name = share(entry)[0]
        sliced = EXAMPLES.fullmatch(name)
        for path in matches(sliced[1] if sliced else name):
            found[path] = files.state_of(path)[1]
    return found


def missing(name: str) -> str:
    """What to say of a path or glob that names no file: what stands there instead, or where it was
    looked for, what is near, and which character of the name is read as something else."""
    path = _expanded(name)
    if _possible(path) and files.is_dir(path):
        return f"a folder; name its files ({os.path.join(path, '*.txt')})"
    if _possible(path) and not files.is_url(path) and os.path.exists(path):
        return "a pipe or a device, which cannot be read again on resume; write it into a file"
    return f"no such file{_hint(path)}"


def _hint(path: str) -> str:
    folder = os.path.dirname(path) or "."
    beside = files.names(folder) if _possible(folder) and files.is_dir(folder) else ()
    special = ""
    if "[" in path:
        special = " In a glob [ opens a set of characters: write [[] for the character itself."
    elif "," in path:
        special = " A comma separates entries of a list: is there such a path?"
    return f" (in {files.absolute(folder)});{nearest(os.path.basename(path), beside)}{special}"
