"""Push a directory to the Hub: one commit, so that a repository is never half published."""

import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx, validate_repo_id

_ATTEMPTS = 4
_WEIGHTS = ("config.json", "adapter_config.json")


class PushError(Exception):
    """What stopped a push, and what to do; never holds the token."""


def push(directory: Path, repository: str, *, public: bool, api: HfApi | None = None) -> str:
    """Upload a published directory; returns the repository's address.

    A new repository is private. Large files go up first, which shows nothing; then one commit adds everything and
    removes weights of an earlier publication that are there no longer. Only then is it made public. Running it again
    after a failure continues: what is uploaded is not sent again.

    Args:
        directory: what `export` wrote.
        repository: `user/name`.
        public: make the repository public when it is complete; else its visibility is left as it is.
        api: the Hub; by default the one that `HF_ENDPOINT` names, with the token of `HF_TOKEN` or `hf auth login`.

    Raises:
        PushError: the Hub refused, or could not be reached in four attempts.
        ValueError: a name that is none, or a card that the Hub does not accept.
    """
    validate_repo_id(repository)
    if repository.count("/") != 1:
        raise ValueError(f"--push {repository!r} must be user/name")
    api = api or HfApi()
    for attempt in range(_ATTEMPTS):
        try:
            return _push(api, directory, repository, public)
        except (HfHubHTTPError, httpx.HTTPError, RuntimeError, OSError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
            if not _passing(cause) or attempt + 1 == _ATTEMPTS:
                raise PushError(_explain(cause, repository)) from None
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def _push(api: HfApi, directory: Path, repository: str, public: bool) -> str:
    url = api.create_repo(repository, private=True, exist_ok=True)
    there = api.list_repo_files(repository)
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    stale = [name for name in there if name not in files and (name.endswith(".safetensors") or name in _WEIGHTS)]
    api.create_commit(
        repository,
        [
            *(CommitOperationAdd(name, path) for name, path in files.items()),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message="Publish with vkvtrain",
    )
    missing = set(files) - set(api.list_repo_files(repository))
    if missing:
        raise RuntimeError(f"{', '.join(sorted(missing))} did not arrive")
    if public:
        api.update_repo_settings(repository, private=False)
    return str(url)


def _passing(error: BaseException) -> bool:
    """Whether an error may be gone in a moment: no answer, a server's fault, or too many requests."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, httpx.TransportError)


def _explain(error: BaseException, repository: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status in (401, 403):
        return (
            f"the Hub refused to write to {repository}: log in with `hf auth login`, or set HF_TOKEN to a write token"
        )
    said = " ".join(str(error).split())[:300]
    return (
        f"{repository} was not published: {said}. Nothing of it is half visible; run the same command again, it "
        "continues where it stopped"
    )
