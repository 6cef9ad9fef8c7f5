"""Folders of the Hugging Face hub: hf:ORG/NAME is downloaded where no local folder has that name.

huggingface_hub keeps what it downloaded in its cache (HF_HOME), takes the token of `hf auth login`
or HF_TOKEN, asks HF_ENDPOINT where a mirror is named, and nothing but the cache under
HF_HUB_OFFLINE=1. hf:ORG/NAME@REVISION names a branch, tag or commit. A folder in a bucket,
hf:gs://BUCKET/PATH, is brought into the cache of t5x_lite.
"""

import functools
import pathlib
import re

from t5x_lite import files, log
from t5x_lite.errors import UserError

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_TEXTS = ("*.json", "*.model", "*.txt", "*.jinja")
_WEIGHTS = (".safetensors", ".bin", ".h5", ".msgpack", ".pt", ".pth", ".onnx", ".ot")
_ELSEWHERE = ("*/*", "consolidated*", "*.onnx.json")   # other formats of the same model


def local_folder(name: str, weights: bool = True) -> pathlib.Path:
    """The local folder of hf:NAME, which is downloaded if it names a model of the hub or a bucket.

    Args:
        name: a local folder, one in a bucket, or ORG/NAME, or ORG/NAME@REVISION.
        weights: whether the tensors are wanted too, beside config.json and the tokenizer.

    Raises:
        UserError: the model is not there, asks for a token, or cannot be reached.
    """
    if files.is_url(name):
        return files.local_copy(name, lambda file: weights or not file.endswith(_WEIGHTS))
    path = pathlib.Path(name).expanduser()
    match = _NAME.fullmatch(name)
    if path.exists() or match is None:
        return path
    return _download(match.group(1), match.group(2), weights)


@functools.cache
def _download(model: str, revision: str | None, weights: bool) -> pathlib.Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(f"hf:{model} is no local folder; `pip install huggingface_hub` lets it be "
                        "downloaded by that name.") from error

    def fetch(*patterns: str) -> pathlib.Path:
        return pathlib.Path(huggingface_hub.snapshot_download(
            model, revision=revision, allow_patterns=list(patterns),
            ignore_patterns=list(_ELSEWHERE)))

    log.say(f"hf:{model}: no local folder of that name; looking in the hub")
    try:
        folder = fetch(*_TEXTS, *(("*.safetensors",) if weights else ()))
        if weights and not any(folder.glob("*.safetensors")):
            folder = fetch(*_TEXTS, "*.bin")
    except errors.GatedRepoError as error:
        raise UserError(f"hf:{model} is there, but its owner asks for consent: agree to it on "
                        f"https://huggingface.co/{model} and log in with `hf auth login`.") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"hf:{model}@{revision}: the model has no such revision.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"hf:{model}: neither a local folder nor a model of the hub (or a private "
                        "one, for which `hf auth login` is needed).") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled,
            OSError, ValueError) as error:
        raise UserError(
            f"hf:{model} is no local folder, and the hub cannot be reached and its cache does not "
            f"hold the model ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Download "
            f"it where there is a network: `hf download {model} --local-dir FOLDER`.") from error
    return folder


def push(folder: pathlib.Path, model: str) -> None:
    """Uploads a folder as a model ORG/NAME of the hub, private where it is new.

    Raises:
        UserError: no such name, no rights, or no connection.
    """
    match = _NAME.fullmatch(model)
    if match is None or match.group(2):
        raise UserError(f"--push={model}: must be ORG/NAME.")
    import huggingface_hub
    from huggingface_hub import errors
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(model, private=True, exist_ok=True)
        api.upload_folder(repo_id=model, folder_path=folder,
                          commit_message="Exported by t5x_lite.convert")
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, errors.OfflineModeIsEnabled,
            OSError, ValueError) as error:
        raise UserError(f"--push={model}: {type(error).__name__}: "
                        f"{str(error).splitlines()[0][:200]}. What was written stays in {folder}; "
                        "log in with `hf auth login` and upload it with `hf upload`.") from error
    log.say(f"pushed to {api.endpoint}/{model}")
