"""`push_head_to_hub`: a head as a repository on the Hub. Only the files of the head are uploaded."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from transformers import Trainer
from transformers.utils import logging

from .. import __version__
from .card import CardFacts
from .errors import HeadError, PushError, cause_to_show, shortened
from .head_config import HEAD_CONFIG, HEAD_WEIGHTS, HeadConfig
from .loading import check_weights
from .saving import save_head

logger = logging.get_logger(__name__)
T = TypeVar("T")

#: Answers of a server that may be another one a moment later.
_PASSING = {408, 425, 429, 500, 502, 503, 504}
#: Seconds before the second, third and fourth try.
_WAITS = (1.0, 4.0, 10.0)


@dataclass(frozen=True)
class Push:
    """Where a head is pushed to, and how; the fields are arguments of `push_head_to_hub`."""

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    commit_message: str | None = None
    create_pr: bool = False
    revision: str | None = None

    def __post_init__(self):
        if self.create_pr and self.revision is not None:
            raise ValueError("create_pr=True opens a pull request to the main branch: leave revision out.")


def push_head_to_hub(
    trainer_or_model: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    card: CardFacts | None = None,
    **saving: Any,
) -> CommitInfo | None:
    """Saves a head and pushes it to the Hub, in a repository that is made if there is none.

    What the server answers with a passing error is tried again. If the push fails, the head is kept in a folder that
    the error names. Of several processes the main one pushes.

    Args:
        trainer_or_model: a trainer, a model, or a folder that `save_head` wrote.
        repo_id: `owner/name` on the Hub.
        private: whether a repository that is made is private; None: as the owner's account says.
        token: with the right to write; None: the one that is stored on this machine.
        commit_message: of the commit.
        create_pr: whether a pull request is opened instead of a commit to the branch.
        revision: branch; it must exist unless it is the main one.
        card: what the README says besides.
        saving: `cut`, `include_prefix`, `base`, `processor`, `blocks` and `probe`, as for `save_head`.

    Returns:
        The commit; None in a process that does not push.

    Raises:
        HeadError: if the head could not be loaded again; nothing was pushed then.
        PushError: if the Hub refuses it, or cannot be reached.
        ValueError: if the arguments do not go together.
    """
    push = Push(repo_id, private, token, commit_message, create_pr, revision)
    if isinstance(trainer_or_model, Trainer) and not trainer_or_model.is_world_process_zero():
        return None
    if isinstance(trainer_or_model, (str, os.PathLike)):
        if saving or card is not None:
            raise ValueError(f"a folder is pushed as it is: leave out {', '.join([*saving, 'card'])}.")
        return push_folder(Path(trainer_or_model), push)
    folder = Path(tempfile.mkdtemp(prefix="hf-freezecache-head-"))
    try:
        facts = card or CardFacts()
        facts = replace(facts, repo_id=facts.repo_id or repo_id)
        save_head(trainer_or_model, folder, token=token, card=facts, **saving)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    commit = push_folder(folder, push)
    shutil.rmtree(folder)
    return commit


def push_folder(folder: Path, push: Push) -> CommitInfo:
    """Pushes a head that was saved.

    Args:
        folder: that `save_head` wrote; it stays.
        push: where to, and how.

    Raises:
        HeadError: if it holds no head, or a damaged one.
        PushError: if the Hub refuses it, or cannot be reached.
    """
    config = HeadConfig.read(folder / HEAD_CONFIG)
    check_weights(folder / HEAD_WEIGHTS, config)
    call = f"push_head_to_hub({str(folder)!r}, {push.repo_id!r})"
    again = f"{call}, or `freezecache head push {folder} {push.repo_id}`"
    return push_files(folder, config.files, push, "the head", again)


def push_files(folder: Path, files: Sequence[str], push: Push, what: str, again: str) -> CommitInfo:
    """Pushes some files of a folder.

    Args:
        folder: that holds them; it stays.
        files: their names.
        push: where to, and how.
        what: they are, for messages.
        again: how the user pushes them once more.

    Raises:
        PushError: if the Hub refuses it, or cannot be reached.
    """
    api = HfApi(token=push.token, library_name="hf_freezecache", library_version=__version__)

    def upload() -> CommitInfo:
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(files),
            commit_message=push.commit_message or f"{what.rpartition(' ')[2].capitalize()} of hf_freezecache",
            create_pr=push.create_pr,
            revision=push.revision,
        )

    try:
        name = _trying(lambda: api.create_repo(push.repo_id, private=push.private, exist_ok=True)).repo_id
        # What is there already is not uploaded again. A second pull request would be one too many.
        commit = upload() if push.create_pr else _trying(upload)
    except Exception as error:
        raise PushError(
            f"{what} was not pushed to {push.repo_id}: {_explained(error, push)} It is kept in {folder}: push it "
            f"with {again}."
        ) from cause_to_show(error, push.token)
    except BaseException:
        logger.warning(f"The push to {push.repo_id} was broken off. {what[0].upper()}{what[1:]} is kept in {folder}.")
        raise
    logger.info(f"{what[0].upper()}{what[1:]} was pushed to {name}.")
    return commit


def _trying(step: Callable[[], T]) -> T:
    """Runs a step, again where a passing error stopped it."""
    for wait in _WAITS:
        try:
            return step()
        except Exception as error:
            status = status_of(error)
            if isinstance(error, (HeadError, ValueError, OfflineModeIsEnabled)) or (
                status is not None and status not in _PASSING
            ):
                raise
            what = "could not be reached" if status is None else f"answered with {status}"
            logger.warning(f"The Hub {what} ({type(error).__name__}): tried again in {wait:g} s.")
            time.sleep(wait)
    return step()


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of the answer that an error, or a cause of it, is about; None if there was none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _explained(error: Exception, push: Push) -> str:
    status, told = status_of(error), shortened(error, push.token)
    if isinstance(error, OfflineModeIsEnabled):
        return "this process is offline (HF_HUB_OFFLINE): unset it."
    if isinstance(error, HFValidationError):
        return f"{push.repo_id} is no name of a repository ({told})."
    if status == 401:
        return "the Hub does not know the token (401): log in with `hf auth login`, or pass token=…."
    if status == 403:
        return (
            "the token may not write there (403): take one with the right to write to "
            f"{push.repo_id.partition('/')[0]}, or another owner."
        )
    if status == 404:
        branch = "" if push.revision is None else f", or no branch {push.revision}: make it with HfApi().create_branch"
        return f"there is no such repository that the token may see (404){branch}."
    if status in (409, 412):
        return f"somebody else has changed the repository at the same moment ({status}): push again."
    if status in _PASSING:
        return f"the Hub answers with {status}, in {len(_WAITS) + 1} tries: try again later."
    if status is None and not isinstance(error, ValueError):
        return f"the Hub could not be reached ({type(error).__name__}: {told})."
    return f"{told}."
