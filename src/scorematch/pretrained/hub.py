"""Downloading networks from the Hugging Face Hub and uploading them, with the client of huggingface_hub.

Only the configurations and one copy of the weights of a repository are downloaded, in safetensors format if available.
The configurations are downloaded first, so that a network that is not supported is refused before its weights are
downloaded. The client caches the files, resumes interrupted downloads, repeats failed requests, and reads tokens,
``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_HOME``. A commit (40 hex digits) that is in the cache is loaded without a
request. In other cases one request without retries, which waits at most ``HF_HUB_ETAG_TIMEOUT`` seconds (10 by
default), finds out whether the Hub can be reached; if not, the cache is used. huggingface_hub is imported only when a
function needs it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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


_COMMIT = re.compile("[0-9a-f]{40}")


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository name, ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


class Repository:
    """The network of a repository on the Hub. Its files are downloaded unless they are in the cache.

    Each method raises

    - FileNotFoundError if the repository or the revision does not exist, if it holds no network, or if it is not in the
      cache and the Hub cannot be reached;
    - PermissionError if the repository is gated;
    - ValueError if ``repo_id`` is not a valid name, or a name in the repository is not valid;
    - OSError if the download fails for another reason.

    Args:
        repo_id: ``owner/name``.
        revision: a branch, a tag or a commit; None is the main branch.
        token: a token for private and gated repositories; None uses the token of ``hf auth login``, if there is one.
        cache_dir: the folder of the cache; None is the client's default.
        local_files_only: whether to use only the cache, without any request.

    Raises:
        ValueError: if ``token`` has characters that a token does not have.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> None:
        _check_token(token)
        self._repo_id, self._revision, self._token = repo_id, revision, token
        self._cache_dir, self._offline = cache_dir, local_files_only
        self._why_offline: str | None = "local_files_only is set" if local_files_only else None
        self._commit = revision if revision is not None and _COMMIT.fullmatch(revision) else None
        self._reached = False  # whether the Hub has answered

    def configurations(self) -> Path:
        """Downloads the configurations, and returns their folder in the cache."""
        folder = self._fetch(lambda offline: self._download(_CONFIGS, offline), _lacking_configuration)
        self._commit = folder.name  # the weights are those of the same commit
        return folder

    def weights(self) -> None:
        """Downloads the weights into the folder of the configurations, which were downloaded before."""

        def download(offline: bool) -> Path:
            folder = self._download(_SAFE, offline)
            if not _has_weights(folder, "safetensors"):
                self._download(_PICKLED, offline)
            if not offline:
                _verify(folder)
            return folder

        self._fetch(download, _lacking_weights)

    def _download(self, patterns: list[str], offline: bool) -> Path:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                self._repo_id,
                revision=self._commit or self._revision,
                token=self._token,
                cache_dir=None if self._cache_dir is None else Path(self._cache_dir),
                local_files_only=offline,
                allow_patterns=patterns,
            )
        )

    def _fetch(self, download: Callable[[bool], Path], lacking: Callable[[Path], str | None]) -> Path:
        """Calls ``download(offline)``: offline if the files are in the cache or the Hub cannot be reached.

        Args:
            download: returns the folder of the files.
            lacking: returns the name of the file that the folder lacks, or None.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import LocalEntryNotFoundError

        with _errors(self._repo_id, self._revision):
            if not self._offline:
                if self._commit is not None:
                    with suppress(LocalEntryNotFoundError):
                        folder = download(True)
                        if lacking(folder) is None:
                            return folder
                if not self._reached:
                    why = _unreachable(HfApi(token=self._token), self._repo_id, self._revision)
                    self._reached, self._offline = why is None, why is not None
                    self._why_offline = f"the Hub cannot be reached ({why})"
            try:
                folder = download(self._offline)
            except LocalEntryNotFoundError as error:
                if not self._offline:
                    raise
                raise FileNotFoundError(
                    f"{self._repo_id} is not in the cache, or not completely, and {self._why_offline}. Download it "
                    f"first, with ScoreNet.from_pretrained({self._repo_id!r}) while online."
                ) from error
            missing = lacking(folder)
            if missing is not None:
                if self._offline:
                    found = [path.name for path in folder.glob("*")]
                else:
                    found = HfApi(token=self._token).list_repo_files(self._repo_id, revision=self._revision)
                held = ", ".join(sorted(found)) or "nothing"
                raise FileNotFoundError(f"{self._repo_id} holds no network: expected {missing}, found {held}.")
        return folder


def _check_token(token: str | bool | None) -> None:
    """Raises an error for a token that cannot be sent; the client's error would contain the token."""
    if isinstance(token, str) and re.fullmatch("[!-~]*", token) is None:
        raise ValueError(
            "token must be the string of an access token, without spaces, line breaks and other special characters. "
            "Copy it again."
        )


def _unreachable(api: HfApi, repo_id: str, revision: str | None) -> str | None:
    """Why the Hub cannot be reached, from one request without retries; None if it answers."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        commit = api.model_info(repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).sha
    except (HFValidationError, LocalTokenNotFoundError):
        raise
    except Exception as error:  # no connection, a timeout, offline mode: the classes depend on the client's version
        if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
            return None  # the Hub answers; the download gets the same error
        return _line(error)
    if commit is None or _COMMIT.fullmatch(commit) is None:  # it becomes the name of a folder
        raise OSError(f"the Hub names the commit {commit!r}, which is not a hash")
    return None


def _line(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Converts the client's errors during a download to built-in errors whose messages say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def failed(reason: str) -> OSError:
        return OSError(f"downloading {repo_id} failed: {reason.rstrip('.')}. Load it again to continue the download.")

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
    except LocalEntryNotFoundError as error:  # the client has looked for the files in the cache after another error
        raise failed(_line(error.__cause__ or error)) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"{error.strerror}: {repo_id} could not be written to the cache. Free some space and load it again, "
                "which continues the download, or pass another folder as cache_dir=.",
            ) from error
        if error.errno is not None:
            raise
        raise failed(str(error).split("\n")[0]) from error  # without the client's advice, which mentions its options
    except Exception as error:  # the classes depend on the client's version
        if isinstance(error, ValueError):  # the name of a file is a path out of the cache, for example
            raise ValueError(f"{repo_id} cannot be downloaded: {error}") from error
        raise failed(_line(error)) from error


def _verify(folder: Path) -> None:
    """Checks the SHA-256 of large files, which is the name of their files in the cache. Wrong files are deleted.

    The client only checks their sizes.

    Raises:
        OSError: if a file has another content.
    """
    for path in folder.rglob("*"):
        blob = path.resolve()
        if not path.is_symlink() or re.fullmatch("[0-9a-f]{64}", blob.name) is None:
            continue
        digest = hashlib.sha256()
        with blob.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        if digest.hexdigest() != blob.name:
            blob.unlink()
            path.unlink()
            raise OSError(f"the content of {path.name} was damaged on the way, and was deleted.")


def _lacking_configuration(folder: Path) -> str | None:
    """The configuration that is missing in a snapshot, or None."""
    if any((folder / name).is_file() for name in (CONFIG_FILE, f"unet/{CONFIG_FILE}")):
        return None
    return f"{CONFIG_FILE} or unet/{CONFIG_FILE}"


def _lacking_weights(folder: Path) -> str | None:
    """The weights that are missing in a snapshot, or None."""
    if _has_weights(folder, "safetensors") or _has_weights(folder, "bin"):
        return None
    return "diffusion_pytorch_model.safetensors, or .bin, or model.safetensors, beside its config.json"


def _has_weights(folder: Path, kind: str) -> bool:
    """Whether a snapshot has weights of a kind, "safetensors" or "bin"."""
    home = folder / "unet" if (folder / "unet" / CONFIG_FILE).is_file() else folder
    if any(home.glob(f"diffusion_pytorch_model*.{kind}")):
        return True
    config = home / CONFIG_FILE  # next to a config.json of diffusers, model.safetensors belongs to another network
    own = config.is_file() and b'"format_version"' in config.read_bytes()
    return own and (home / f"model.{kind}").is_file()


def upload(
    save: Callable[[Path], None],
    repo_id: str,
    card: str,
    *,
    private: bool | None,
    revision: str | None,
    token: str | bool | None,
    commit_message: str,
) -> str:
    """Uploads a network in one commit, which replaces the network of the repository.

    The keyword arguments, the result and the errors are those of ``ScoreNet.push_to_hub``.

    Args:
        save: writes the network into a folder.
        repo_id: ``owner/name``, created if it does not exist.
        card: the text of README.md, used only if the repository has none.
        private: whether a new repository is private.
        revision: the branch.
        token: a token with write access.
        commit_message: the message of the commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not is_repository(repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}.")
    _check_token(token)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save(folder)
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
                    f"the Hub refused to write to {repo_id}. Check the owner's name, and log in (hf auth login) or "
                    "pass token=, with a token that has write access."
                ) from error
            raise OSError(f"uploading to {repo_id} failed: {_line(error)}") from error
        except (OSError, ValueError):
            raise
        except Exception as error:  # no connection: the classes depend on the client's version
            raise OSError(f"uploading to {repo_id} failed: {_line(error)}") from error
    return str(commit.commit_url)
