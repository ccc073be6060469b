"""What goes wrong with heads."""


class HeadError(RuntimeError):
    """A head cannot be saved or loaded; the message says why and what to do. Nothing was written or changed."""


class PushError(HeadError):
    """A head could not be pushed; the message says why, where the head is kept and what to do."""
