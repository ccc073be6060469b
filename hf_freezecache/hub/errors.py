"""What goes wrong with heads, and how it is told without a secret."""

from __future__ import annotations

from typing import Any

from huggingface_hub import get_token


class HeadError(RuntimeError):
    """A head cannot be saved or loaded; the message says why and what to do. Nothing was written or changed."""


class PushError(HeadError):
    """A head could not be pushed; the message says why, where the head is kept and what to do."""


def shortened(error: BaseException, token: Any = None) -> str:
    """The message of an error in a line, without the token, which a server may repeat."""
    return without_token(" ".join(str(error).split())[:500], token)


def without_token(text: str, token: Any) -> str:
    """A text without the token: that which is given, or the one that is stored on this machine."""
    for secret in (token, get_token()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "<token>")
    return text


def cause_to_show(error: BaseException, token: Any) -> BaseException | None:
    """The error as the cause of another one; None if its message, or that of a cause of its own, tells the token."""
    cause: BaseException | None = error
    while cause is not None:
        if without_token(str(cause), token) != str(cause):
            return None
        cause = cause.__cause__ or cause.__context__
    return error
