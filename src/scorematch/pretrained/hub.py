"""Downloading networks from the Hugging Face Hub and uploading them, with the client of huggingface_hub.

Only the configurations and one copy of the weights of a repository are downloaded, in safetensors format if available.
The client caches them, resumes interrupted downloads, and reads tokens, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and
``HF_HOME``. A commit (40 hex digits) that is in the cache is loaded without a request. In other cases one request
without retries, which waits at most ``HF_HUB_ETAG_TIMEOUT`` seconds (10 by default), finds out whether the Hub can be
reached; if not, the cache is used. huggingface_hub is imported only when a function needs it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from scorematch.pretrained.configuration import CONFIG_FILE, SCHEDULE_FILE
from scorematch.pretrained.weights import WEIGHTS_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CONFIGS = [
    CONFIG_FILE,
    SCHEDULE_FILE,
    "scheduler_config.json",
    "model_index.json",
    f"unet/{CONFIG_FILE}",
    f"unet/{SCHEDULE_FILE}",
    "scheduler/scheduler_config.json",
]
_OWN = [WEIGHTS_FILE, f"unet/{WEIGHTS_FILE}"]


def _weights(kind: str) -> list[str]:
    names = [f"diffusion_pytorch_model.{kind}", f"diffusion_pytorch_model.{kind}.index.json"]
    names.append(f"diffusion_pytorch_model-*-of-*.{kind}")
    return [*names, *(f"unet/{name}" for name in names)]


# The patterns must not change between calls: the client records for which patterns a snapshot is complete.
_SAFE = [*_CONFIGS, *_OWN, *_weights("safetensors")]
_PICKLED = [*_CONFIGS, *_weights("bin")]
# The files of a network in a repository, which are deleted when another network is uploaded.
_NETWORK = [*_CONFIGS, *_OWN, "diffusion_pytorch_model*", "unet/diffusion_pytorch_model*"]


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository name, ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Downloads the network of a repository unless it is in the cache, and returns its folder in the cache.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, a tag or a commit; None is the main branch.
        token: a token for private and gated repositories; None uses the token of ``hf auth login``, if there is one.
        cache_dir: the folder of the cache; None is the client's default.
        local_files_only: whether to use only the cache, without any request.

    Raises:
        FileNotFoundError: if the repository or the revision does not exist, if it holds no network, or if it is not in
            the cache and the Hub cannot be reached.
        PermissionError: if the repository is gated.
        ValueError: if ``repo_id`` is not a valid name.
        OSError: if the download fails for another reason.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(patterns: list[str], *, offline: bool) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=offline,
                allow_patterns=patterns,
            )
        )

    def network(*, offline: bool) -> Path:
        folder = download(_SAFE, offline=offline)
        return folder if _has_weights(folder, "safetensors") else download(_PICKLED, offline=offline)

    def is_cached() -> bool:
        try:
            return _lacking(network(offline=True)) is None
        except LocalEntryNotFoundError:
            return False

    unreachable: str | None = None
    with _errors(repo_id, revision):
        pinned = re.fullmatch("[0-9a-f]{40}", revision or "") is not None
        if not local_files_only and not (pinned and is_cached()):
            unreachable = _unreachable(HfApi(token=token), repo_id, revision)
        try:
            folder = network(offline=local_files_only or unreachable is not None)
        except LocalEntryNotFoundError as error:
            why = "local_files_only is set" if unreachable is None else f"the Hub cannot be reached ({unreachable})"
            raise FileNotFoundError(
                f"{repo_id} is not in the cache, or not completely, and {why}. Download it first, with "
                f"ScoreNet.from_pretrained({repo_id!r}) while online."
            ) from error
        lacking = _lacking(folder)
        if lacking is not None:
            if local_files_only or unreachable is not None:
                found = [path.name for path in folder.glob("*")]
            else:
                found = HfApi(token=token).list_repo_files(repo_id, revision=revision)
            held = ", ".join(sorted(found)) or "nothing"
            raise FileNotFoundError(f"{repo_id} holds no network: expected {lacking}, found {held}.")
    return folder


def _unreachable(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Why the Hub cannot be reached, from one request without retries; None if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        api.model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HFValidationError, LocalTokenNotFoundError):
        raise
    except Exception as error:  # no connection, a timeout, offline mode: the classes depend on the client's version
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return None  # the Hub answers; the download gets the same error
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


@contextmanager
def _errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Converts the client's errors during a download to built-in errors whose messages say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:  # before its parent class, RepositoryNotFoundError
        raise PermissionError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, then log in (hf auth login) or "
            "pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no repository {repo_id!r} on the Hub, or it is private. Check the name, log in (hf auth login) "
            f"or pass token=; for a folder write './{repo_id}'."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no revision {revision!r}. Pass a branch, a tag or a commit.") from error
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not the name of a repository: {error}") from error
    except HfHubHTTPError as error:
        raise OSError(f"downloading {repo_id} failed: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: {repo_id} could not be written to the cache. Free some space and load it again, which "
            "continues the download, or pass another folder as cache_dir=.",
        ) from error


def _lacking(folder: Path) -> str | None:
    """The file of a network that is missing in a snapshot, or None."""
    if not any((folder / name).is_file() for name in (CONFIG_FILE, f"unet/{CONFIG_FILE}")):
        return f"{CONFIG_FILE} or unet/{CONFIG_FILE}"
    if not _has_weights(folder, "safetensors") and not _has_weights(folder, "bin"):
        return "diffusion_pytorch_model.safetensors, or .bin, or model.safetensors, beside its config.json"
    return None


def _has_weights(folder: Path, kind: str) -> bool:
    """Whether a snapshot has weights of a kind, "safetensors" or "bin"."""
    home = folder / "unet" if (folder / "unet" / CONFIG_FILE).is_file() else folder
    if any(home.glob(f"diffusion_pytorch_model*.{kind}")):
        return True
    config = home / CONFIG_FILE  # next to a config.json of diffusers, model.safetensors belongs to another network
    own = config.is_file() and b'"format_version"' in config.read_bytes()
    return own and (home / f"model.{kind}").is_file()


def upload(
    folder: Path,
    repo_id: str,
    card: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a score network",
) -> str:
    """Uploads a saved network in one commit, which replaces the network of the repository.

    Args:
        folder: the folder into which the network was saved.
        repo_id: ``owner/name``, created if it does not exist.
        card: the text of README.md, used only if the repository has none.
        private: whether a new repository is private; None is the owner's default.
        revision: the branch, created if it does not exist; None is the main branch.
        token: a token with write access; None uses the token of ``hf auth login``.
        commit_message: the message of the commit.

    Returns:
        The URL of the commit.

    Raises:
        PermissionError: if the Hub refuses the upload.
        OSError: if the upload fails for another reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, "README.md", revision=revision):  # an existing card is kept
            (folder / "README.md").write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=_NETWORK,
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub refused to write to {repo_id}. Check the owner's name, and log in (hf auth login) or pass "
                "token=, with a token that has write access."
            ) from error
        raise OSError(f"uploading to {repo_id} failed: {error}") from error
    return str(commit.commit_url)
