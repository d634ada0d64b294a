"""Downloading networks from the Hugging Face Hub and uploading them, with the client of huggingface_hub.

Only the configurations and one copy of the weights of a repository are downloaded, in safetensors format if available.
The configurations are downloaded first, so that a network that is not supported is refused before its weights are
downloaded. The client caches the files, resumes interrupted downloads, and reads tokens, ``HF_ENDPOINT``,
``HF_HUB_OFFLINE`` and ``HF_HOME``. A commit (40 hex digits) that is in the cache is loaded without a request.

In other cases the first request asks for the commit and the names of the files. If it fails, the cache is used. If the
network is not in the cache and the Hub is busy (status 429 or 5xx), the request is repeated after 1, 2 and 4 seconds.
Each request has a time limit: ``HF_HUB_ETAG_TIMEOUT`` and ``HF_HUB_DOWNLOAD_TIMEOUT`` seconds, 10 by default, before
the client repeats it. huggingface_hub is imported only when a function needs it.
"""

from __future__ import annotations

import errno
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from scorematch.core.files import sha256
from scorematch.core.messages import reason
from scorematch.pretrained.configuration import CONFIG_FILE, SCHEDULE_FILE, listed
from scorematch.pretrained.diffusers import INDEX_FILE, SCHEDULER_FILE
from scorematch.pretrained.weights import HALF_WEIGHTS_FILES, WEIGHTS_FILE

_CONFIGS = (
    SCHEDULE_FILE,
    SCHEDULER_FILE,
    INDEX_FILE,
    f"unet/{SCHEDULE_FILE}",
    f"scheduler/{SCHEDULER_FILE}",
    CONFIG_FILE,  # downloaded last, so that the others are there as well
    f"unet/{CONFIG_FILE}",
)
_WEIGHTS = (WEIGHTS_FILE, "diffusion_pytorch_model*")
# The files of a network in a repository, which are deleted when another network is uploaded.
_NETWORK = [*_CONFIGS, *_WEIGHTS, *(f"unet/{name}" for name in _WEIGHTS)]
_COMMIT = re.compile("[0-9a-f]{40}")
_BUSY = (429, 500, 502, 503, 504)  # the statuses of answers after which a request is repeated
_WAITS = (1.0, 2.0, 4.0)  # seconds before each repetition
_T = TypeVar("_T")


def is_repository(name: str) -> bool:
    """Whether a name has the form of a repository name, ``owner/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None


def check_repository(name: str) -> None:
    """Raises ValueError if a name does not have the form of a repository name."""
    if not is_repository(name):
        raise ValueError(f"the repository must be owner/name, got {name!r}.")


def check_login() -> None:
    """Checks that the client of the Hub has a token, before a computation whose result is uploaded.

    Raises:
        PermissionError: if it has none.
    """
    from huggingface_hub import get_token

    if get_token() is None:
        raise PermissionError(
            "you are not logged in to the Hugging Face Hub. Run hf auth login, or set the environment variable "
            "HF_TOKEN, with a token that has write access."
        )


@dataclass
class Repository:
    """The network of a repository on the Hub. Its files are downloaded unless they are in the cache.

    Each method raises

    - FileNotFoundError if the repository or the revision does not exist, if it holds no network, or if it is not in the
      cache and the Hub cannot be reached;
    - PermissionError if the repository is gated, or the Hub refuses the token;
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

    repo_id: str
    revision: str | None
    token: str | bool | None
    cache_dir: Path | None
    local_files_only: bool

    def __post_init__(self) -> None:
        _check_token(self.token)
        self._commit = self.revision if self.revision is not None and _COMMIT.fullmatch(self.revision) else None
        self._names: Sequence[str] | None = None  # the files of the repository, once the Hub has answered
        self._why_offline = "local_files_only is set"

    def configurations(self) -> Path:
        """Downloads the configurations, and returns their folder in the cache."""
        with _errors(self.repo_id, self.revision):
            folder = self._cached()
            if folder is None or self._commit is None or not _has_configurations(folder):
                names = self._ask(optional=folder is not None)
                if names is not None:
                    folder = self._download_configurations(names)
            if folder is None:
                raise self._not_in_the_cache()
            self._commit = folder.name  # the weights are those of the same commit
            return folder

    def weights(self, files: Iterable[str]) -> None:
        """Downloads the first file of weights that exists into the folder of the configurations.

        Args:
            files: the names of the files, in order of preference, in the folder that holds the config.json of the
                network. With an index, its parts are downloaded too.
        """
        files = tuple(files)
        with _errors(self.repo_id, self.revision):
            folder = self._cached()
            if folder is None:  # it was deleted meanwhile
                raise self._not_in_the_cache()
            home = "unet/" if (folder / "unet" / CONFIG_FILE).is_file() else ""
            if _has_weights(folder / home, [name for name in files if name not in HALF_WEIGHTS_FILES]):
                return
            cached = _has_weights(folder / home, files)  # in float16, by another program
            names = self._ask(optional=cached)
            if names is None and cached:
                return
            if names is None:
                raise self._not_in_the_cache()
            chosen = next((home + name for name in files if home + name in names), None)
            if chosen is None:
                raise self._no_network(f"{', '.join(files[:-1])} or {files[-1]}, beside its {CONFIG_FILE}", names)
            parts = [name for name in names if fnmatch(name, home + _parts(chosen.removeprefix(home)))]
            for name in [*parts, chosen]:
                _verify(self._download(name, self._commit))

    def _download_configurations(self, names: Sequence[str]) -> Path:
        """Downloads the configurations among the files of the repository, and returns their folder."""
        chosen = [name for name in _CONFIGS if name in names]
        if not chosen or Path(chosen[-1]).name != CONFIG_FILE:
            raise self._no_network(f"{CONFIG_FILE} or unet/{CONFIG_FILE}", names)
        for name in chosen[:-1]:
            self._download(name, self._commit)
        # With the name of a branch, the client records its commit, with which the network is found in the cache later.
        path = self._download(chosen[-1], self.revision)
        folder = path.parents[chosen[-1].count("/")]
        if folder.name != self._commit:
            raise OSError(f"{self.repo_id} has changed during the download")
        return folder

    def _cached(self) -> Path | None:
        """The folder of the revision in the cache, or None if it has no configuration of a network."""
        from huggingface_hub import try_to_load_from_cache

        for name in (CONFIG_FILE, f"unet/{CONFIG_FILE}"):
            found = try_to_load_from_cache(self.repo_id, name, self.cache_dir, self._commit or self.revision)
            if isinstance(found, str):
                return Path(found).parents[name.count("/")]
        return None

    def _download(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> str:
            return hf_hub_download(self.repo_id, name, revision=revision, token=self.token, cache_dir=self.cache_dir)

        return Path(_repeated(download, _WAITS))

    def _ask(self, *, optional: bool = False) -> Sequence[str] | None:
        """Asks the Hub for the commit of the revision and for the names of the files, until it has answered once.

        Args:
            optional: whether the files in the cache can be used if the request fails.

        Returns:
            The names of the files; None if the Hub cannot be reached or must not be asked, or if the request failed and
            is optional.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalTokenNotFoundError,
            RevisionNotFoundError,
        )

        if self._names is not None or self.local_files_only:
            return self._names
        api, seconds = HfApi(token=self.token), constants.HF_HUB_ETAG_TIMEOUT
        revision = self._commit or self.revision
        try:
            info = _repeated(
                lambda: api.model_info(self.repo_id, revision=revision, timeout=seconds), () if optional else _WAITS
            )
        except (HFValidationError, LocalTokenNotFoundError, RevisionNotFoundError):
            raise
        except Exception as error:  # no connection, a timeout, offline mode: the classes depend on the client's version
            if not optional and isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            self._why_offline = f"the Hub cannot be reached ({_line(error)})"
            return None
        if info.sha is None or _COMMIT.fullmatch(info.sha) is None:  # it becomes the name of a folder
            raise OSError(f"the Hub names the commit {info.sha!r}, which is not a hash")
        self._commit = info.sha
        self._names = [file.rfilename for file in info.siblings or ()]
        return self._names

    def _not_in_the_cache(self) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.repo_id} is not in the cache, or not completely, and {self._why_offline}. Download it first, with "
            f"ScoreNet.from_pretrained({self.repo_id!r}) while online. There is no folder of this name either."
        )

    def _no_network(self, expected: str, names: Sequence[str]) -> FileNotFoundError:
        return FileNotFoundError(f"{self.repo_id} holds no network: expected {expected}, found {listed(names)}.")


def _check_token(token: str | bool | None) -> None:
    """Raises an error for a token that cannot be sent; the client's error would contain the token."""
    if isinstance(token, str) and re.fullmatch("[!-~]*", token) is None:
        raise ValueError(
            "token must be the string of an access token, without spaces, line breaks and other special characters. "
            "Copy it again."
        )


def _repeated(request: Callable[[], _T], waits: Sequence[float]) -> _T:
    """Makes a request, and repeats it after each of the waits, in seconds, if the Hub is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    for wait in waits:
        try:
            return request()
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY:
                raise
        time.sleep(wait)
    return request()


def _line(error: BaseException) -> str:
    return reason(f"{type(error).__name__}: {error}")


@contextmanager
def _errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Converts the client's errors during a download to built-in errors whose messages say what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def failed(why: str) -> OSError:
        return OSError(f"downloading {repo_id} failed: {reason(why)}. Load it again to continue the download.")

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
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise PermissionError(
                f"the Hub refused to send {repo_id}. The access token may be wrong or expired: log in again (hf auth "
                "login), correct the environment variable HF_TOKEN, or pass another token=."
            ) from error
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
            raise ValueError(f"{repo_id} cannot be downloaded: {reason(error)}.") from error
        raise failed(_line(error)) from error


def _verify(path: Path) -> None:
    """Checks the SHA-256 of a large file, which is the name of its file in the cache. A wrong file is deleted.

    The client only checks its size.

    Raises:
        OSError: if the file has another content.
    """
    blob = path.resolve()
    if not path.is_symlink() or re.fullmatch("[0-9a-f]{64}", blob.name) is None:
        return
    if sha256(blob) != blob.name:
        blob.unlink()
        path.unlink()
        raise OSError(f"the content of {path.name} was damaged during the download, and was deleted.")


def _has_configurations(folder: Path) -> bool:
    """Whether a folder of the cache has all configurations; other programs download only some of them."""
    home = folder / "unet" if (folder / "unet" / CONFIG_FILE).is_file() else folder
    config = (home / CONFIG_FILE).read_bytes()
    if b'"format_version"' in config:  # written by this package
        return SCHEDULE_FILE.encode() not in config or (home / SCHEDULE_FILE).is_file()
    return any(folder.rglob(SCHEDULER_FILE))


def _has_weights(home: Path, files: Iterable[str]) -> bool:
    """Whether the first of the files that is in a folder is complete: an index with all of its parts."""
    name = next((name for name in files if (home / name).is_file()), None)
    if name is None or not name.endswith(".index.json"):
        return name is not None
    parts = [path.stem for path in home.glob(_parts(name))]
    return bool(parts) and all(part.endswith(f"-of-{len(parts):05d}") for part in parts)


def _parts(index: str) -> str:
    """The pattern of the names of the parts of split weights, from the name of their index; empty for other files."""
    match = re.fullmatch(r"(.*)\.(\w+)\.index\.json", index)
    return "" if match is None else f"{match[1]}-*-of-*.{match[2]}"


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

    check_repository(repo_id)
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
