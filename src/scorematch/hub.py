"""Networks on the Hugging Face Hub: fetching what is needed, and uploading, through huggingface_hub's own client.

Of a repository only configurations and one copy of the weights are fetched, safetensors if there are any. The client
keeps them in its cache, goes on with a download that broke off, and knows tokens, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``
and ``HF_HOME``; a pinned commit that is in the cache needs no request at all. huggingface_hub is imported when it is
needed.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from pathlib import Path

_CONFIGS = [
    "config.json",
    "scheduler_config.json",
    "model_index.json",
    "unet/config.json",
    "scheduler/scheduler_config.json",
]


def _weights(kind: str) -> list[str]:
    names = [f"diffusion_pytorch_model.{kind}", f"diffusion_pytorch_model.{kind}.index.json"]
    names.append(f"diffusion_pytorch_model-*-of-*.{kind}")
    return [*names, *(f"unet/{name}" for name in names)]


# Always the same patterns: the client takes a snapshot for complete if it was fetched with the patterns that are
# asked for.
_SAFE = [*_CONFIGS, "model.safetensors", *_weights("safetensors")]
_PICKLED = [*_CONFIGS, *_weights("bin")]
# What a repository's network may consist of: another one in its place replaces them all.
_NETWORK = [*_CONFIGS, "model.safetensors", "diffusion_pytorch_model*", "unet/diffusion_pytorch_model*"]


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository's, ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder of the cache that holds a repository's network, fetched if need be.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, a tag or a commit; None is the main branch.
        token: for private and gated repositories; None is the one that is logged in.
        cache_dir: None is the client's own.
        local_files_only: whether to look in the cache only.

    Raises:
        FileNotFoundError: if there is no such repository or revision, no network in it, or it is not in the cache and
            the Hub cannot be reached.
        PermissionError: if the repository is gated.
        OSError: if the download fails otherwise.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def download(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=patterns,
            )
        )

    try:
        folder = download(_SAFE)
        if not _has_weights(folder, "safetensors"):
            folder = download(_PICKLED)
        lacking = None
        if not any((folder / name).is_file() for name in ("config.json", "unet/config.json")):
            lacking = "config.json or unet/config.json"
        elif not _has_weights(folder, "safetensors") and not _has_weights(folder, "bin"):
            lacking = "diffusion_pytorch_model.safetensors, or .bin, or model.safetensors, beside its config.json"
        if lacking is not None and not local_files_only:
            held = ", ".join(sorted(HfApi(token=token).list_repo_files(repo_id, revision=revision))) or "nothing"
            raise FileNotFoundError(f"{repo_id} holds no network: expected {lacking}, it has {held}.")
    except GatedRepoError as error:  # before its parent class, a repository that is not found
        raise PermissionError(
            f"{repo_id} is gated: accept its terms at https://huggingface.co/{repo_id}, then log in (hf auth login) or "
            "pass token=."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no repository {repo_id!r} on the Hub, or it is private: check the name, log in (hf auth login) "
            f"or pass token=. A folder is written './{repo_id}'."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo_id} has no revision {revision!r}: pass a branch, a tag or a commit.") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo_id} is not in the cache, or not completely, and the Hub was not asked or not reached. Fetch it "
            f"first, online and without local_files_only, with ScoreNet.from_pretrained({repo_id!r})."
            + ("" if error.__cause__ is None else f" ({error.__cause__})")
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"fetching {repo_id} failed: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{error.strerror}: {repo_id} could not be written to the cache. Free some space, or name another place, "
            "cache_dir=...; the download then goes on where it stopped.",
        ) from error
    return folder


def _has_weights(folder: Path, kind: str) -> bool:
    """Whether the network of a snapshot has weights of a kind; those of a RefineNet are known by its configuration."""
    home = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if any(home.glob(f"diffusion_pytorch_model*.{kind}")):
        return True
    config = home / "config.json"
    ours = config.is_file() and b'"format_version"' in config.read_bytes()
    return ours and (home / f"model.{kind}").is_file()


def push(
    folder: Path,
    repo_id: str,
    card: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a score network",
) -> str:
    """Uploads a saved network as the one network of a repository, in one commit; returns the commit's address.

    Args:
        folder: that the network was saved into.
        repo_id: ``owner/name``, made if there is none.
        card: the README.md, for a repository without one.
        private: whether a new repository is private; None is the owner's default.
        revision: the branch, made if there is none; None is the main branch.
        token: one that may write; None is the one that is logged in.
        commit_message: of the commit.

    Raises:
        PermissionError: if the Hub refuses.
        OSError: if the upload fails otherwise.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if not api.file_exists(repo_id, "README.md", revision=revision):  # a card that its owner wrote stays
            (folder / "README.md").write_text(card, encoding="utf-8")
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            delete_patterns=_NETWORK,  # of another network, if they stay
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub refused to write to {repo_id}: check the owner's name, and log in (hf auth login) or pass "
                "token=, with a token that may write."
            ) from error
        raise OSError(f"uploading to {repo_id} failed: {error}") from error
    return str(commit.commit_url)


def altered_file(folder: Path) -> Path | None:
    """A file of a cached snapshot that is not what its name in the cache says; None if there is none.

    That name is the SHA-256 of large files, and of small ones the hash that git gives them.
    """
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if path.is_file() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            digest = hashlib.sha256()
            if len(blob.name) == 40:
                digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
            with blob.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
            if digest.hexdigest() != blob.name:
                return blob
    return None
