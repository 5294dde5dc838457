"""Upload an adapter or model folder to the Hub: what goes up, and how a refusal is put.

Choices: the files of the folder itself go up, not hidden or unfinished ones, and no folder within it, such as
a checkpoint; the card is made anew for the Hub name; where a JSON file names a path of this machine, the copy
that goes up has its last part.
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # type: ignore[reportPrivateImportUsage] (httpx's or httpx2's, by the version of the Hub's client)
)
from huggingface_hub.utils import validate_repo_id

from ..data.models import hub_reachable
from ..files import read_json
from .card import model_card
from .contents import ADAPTER_FILE, CARD_FILE, EVALUATIONS_FILE, METRICS_FILE
from .names import public_data, public_model

_UNFINISHED = (".part", ".partial")


def public_files(folder: Path, repo: str) -> list[tuple[str, bytes | Path]]:
    """What `upload` would put into the repository, by name: a file as it is, or bytes to go up in its place.

    Raises:
        ValueError: the folder is none of ours, or `repo` is not NAMESPACE/NAME.
    """
    _check_repo(repo)
    held: dict[str, bytes | Path] = {
        path.name: path
        for path in folder.glob("*")
        if path.is_file() and not path.name.startswith(".") and path.suffix not in _UNFINISHED
    }
    held[CARD_FILE] = model_card(folder, name=repo).encode()
    for name in {ADAPTER_FILE, METRICS_FILE, EVALUATIONS_FILE} & held.keys():
        held[name] = json.dumps(_without_paths(read_json(folder / name)), indent=2).encode()
    return sorted(held.items())


def upload(files: list[tuple[str, bytes | Path]], repo: str, *, private: bool = False) -> str:
    """Put files into a model repository, made if need be, as one commit; returns the commit's address.

    Args:
        files: what `public_files` returned.
        private: a new repository; otherwise it is as the namespace's own default says.

    Raises:
        ValueError: not logged in, the Hub cannot be reached, or it refuses.
    """
    _check_repo(repo)
    if not get_token():
        raise ValueError(
            "not logged in to the Hub; run `hf auth login`, or set HF_TOKEN to a token that may write"
        )
    operations = [CommitOperationAdd(name, file) for name, file in files]
    try:
        if not hub_reachable():
            raise ConnectionError("its name does not resolve")
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        return api.create_commit(repo, operations, commit_message="Upload from sparsemem").commit_url
    except HfHubHTTPError as error:
        status, first_line = error.response.status_code, str(error).strip().split("\n")[0]
        what = "your token with `hf auth whoami`" if status == 401 else "that your token may write there"
        raise ValueError(f"the Hub refused {repo} ({first_line}); check {what}") from error
    # the client's own errors of transport, and of HF_HUB_OFFLINE
    except (HTTPError, ConnectionError) as error:
        raise ValueError(
            f"the Hub at {HfApi().endpoint} cannot be reached ({error}); check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, and push again"
        ) from error


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        fits = repo.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise ValueError(
            f"repository {repo!r} is not of the form NAMESPACE/NAME; give your user or organisation first"
        )


def _without_paths(content: Any) -> Any:
    """JSON with the names of models and data as the card gives them."""
    if isinstance(content, list):
        return [_without_paths(one) for one in content]
    if not isinstance(content, dict):
        return content
    shown = {key: _without_paths(value) for key, value in content.items()}
    for keys, public in ((_MODELS, public_model), (_DATA, public_data)):
        shown |= {key: public(shown[key]) for key in keys if isinstance(shown.get(key), str)}
    return shown


_MODELS = ("base_model_name_or_path", "base_model", "model")
_DATA = ("data", "background")
