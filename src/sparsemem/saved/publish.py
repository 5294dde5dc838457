"""Upload an adapter or model folder to the Hub.

Choices: only files with the names in _PUBLIC are uploaded, which lie directly in the folder and are no
links. So a file that happens to be there, or a checkpoint, is not. The card is written anew for the name on
the Hub. If a JSON file names a local path, the uploaded copy names only its last part.
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

from ..atomic import read_json
from ..data.models import hub_reachable
from ..data.names import public_data, public_model
from .card import model_card
from .contents import ADAPTER_FILE, BACKGROUND_FILE, CARD_FILE, EVALUATIONS_FILE, METRICS_FILE, PATCH_FILE

# Patterns of the names that graft, train, transformers and PEFT give to what belongs to a model.
_PUBLIC = (
    ADAPTER_FILE, BACKGROUND_FILE, CARD_FILE, EVALUATIONS_FILE, METRICS_FILE, PATCH_FILE,
    "adapter_model.safetensors", "model.safetensors", "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json", "LICENSE", "LICENSE.*", "NOTICE",
)  # fmt: skip


def public_files(folder: Path, repo: str, *, name_tasks: bool = False) -> list[tuple[str, bytes | Path]]:
    """The files to upload as pairs of name and content; content is a path, or bytes that replace the file.

    Args:
        name_tasks: as for `model_card`.

    Raises:
        ValueError: the folder was not made by sparsemem, or `repo` is not of the form NAMESPACE/NAME.
    """
    _check_repo(repo)
    held: dict[str, bytes | Path] = {
        path.name: path
        for path in folder.glob("*")
        if path.is_file() and not path.is_symlink() and any(path.match(one) for one in _PUBLIC)
    }
    held[CARD_FILE] = model_card(folder, name=repo, name_tasks=name_tasks).encode()
    for name in {ADAPTER_FILE, METRICS_FILE, EVALUATIONS_FILE} & held.keys():
        held[name] = json.dumps(_without_paths(read_json(folder / name)), indent=2).encode()
    return sorted(held.items())


def upload(files: list[tuple[str, bytes | Path]], repo: str, *, private: bool = False) -> str:
    """Upload files to a model repository in one commit, creating the repository if it does not exist.

    Args:
        files: the result of `public_files`.
        repo: NAMESPACE/NAME.
        private: make a new repository private. Otherwise the default of the namespace applies.

    Returns the URL of the commit.

    Raises:
        ValueError: not logged in, the Hub cannot be reached, or the Hub rejects the upload.
    """
    _check_repo(repo)
    if not get_token():
        raise ValueError(
            "not logged in to the Hub; run `hf auth login`, or set HF_TOKEN to a token with write access"
        )
    operations = [CommitOperationAdd(name, file) for name, file in files]
    try:
        if not hub_reachable():
            raise ConnectionError("its host name cannot be resolved")
        api = HfApi()
        api.create_repo(repo, private=private or None, exist_ok=True)
        return api.create_commit(repo, operations, commit_message="Upload from sparsemem").commit_url
    except HfHubHTTPError as error:
        status, first_line = error.response.status_code, str(error).strip().split("\n")[0]
        what = "your token with `hf auth whoami`" if status == 401 else "that your token has write access"
        raise ValueError(f"the Hub rejected the upload to {repo} ({first_line}); check {what}") from error
    # network errors of the client, and HF_HUB_OFFLINE
    except (HTTPError, ConnectionError) as error:
        raise ValueError(
            f"the Hub at {HfApi().endpoint} cannot be reached ({error}); check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, then try again"
        ) from error


def _check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
        fits = repo.count("/") == 1
    except HFValidationError:
        fits = False
    if not fits:
        raise ValueError(
            f"repository {repo!r} is not of the form NAMESPACE/NAME; NAMESPACE is a user or organisation"
        )


def _without_paths(content: Any) -> Any:
    """A JSON value in which models and data have their public names."""
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
