"""Parameters that blocks share: whoever freezes one block freezes a part of another."""

from __future__ import annotations

from .chain import BlockChain
from .errors import ChainError


def check_sharing(chain: BlockChain) -> list[str]:
    """Checks that no trainable parameter is used by several blocks, or by a block and the head.

    Embedding tables may be: a language model's head often is its table.

    Args:
        chain: the model, traced.

    Returns:
        For every embedding table that is shared, a sentence that says so.

    Raises:
        ChainError: if another parameter is shared; the message names it, its users and the remedies.
    """
    tied: dict[str, str] = {}
    for cut in range(1, len(chain) + 1):
        barred, tables = chain.shared_parameters(cut)
        for name in barred:
            raise ChainError(
                f"{_users(chain, name, cut)}: freezing the first would freeze a part of the second. Give each a "
                "parameter of its own (models of Transformers: tie_word_embeddings=False), set its requires_grad to "
                "False, or train with policy='none'."
            )
        for name in tables:
            tied.setdefault(name, f"{_users(chain, name, cut)}: it is frozen with the first.")
    return list(tied.values())


def _users(chain: BlockChain, name: str, cut: int) -> str:
    """The beginning of a sentence that names a parameter, and the first and the last part that use it."""
    parameter = dict(chain.model.named_parameters())[name]
    aliases = [other for other, same in chain.model.named_parameters(remove_duplicate=False) if same is parameter]
    also = f" (also '{aliases[1]}')" if len(aliases) > 1 else ""
    cuts = [k for k in range(cut, len(chain) + 1) if any(name in names for names in chain.shared_parameters(k))]
    parts = [*chain.names, "the head"]
    return f"'{name}'{also} of {type(chain.model).__name__} is used by '{parts[cut - 1]}' and by '{parts[cuts[-1]]}'"
