"""Names of parameters and modules: in `DualAR` and in a checkpoint folder.

A checkpoint keeps the Slow AR under `text_model.model.` and the Fast AR under `audio_decoder.`, except that the
codebook tables of the Slow AR's input are stored with the audio decoder. The mapping is one to one and holds for
modules (`...wqkv`) and for their tensors (`...wqkv.weight`, `...wqkv.qweight`) alike.
"""

from __future__ import annotations

from s2quant.errors import UserError

# (in DualAR, on disk); the first match wins, so the exception comes before the rule.
_PREFIXES = (
    ("slow.codebook_embeddings", "audio_decoder.codebook_embeddings"),
    ("slow.", "text_model.model."),
    ("fast.", "audio_decoder."),
)


def disk_name(name: str) -> str:
    """Give the name in a checkpoint of a parameter or module of `DualAR`.

    Args:
        name: A name as in `DualAR.named_parameters()` or `named_modules()`.

    Returns:
        The name on disk.
    """
    for ours, theirs in _PREFIXES:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"{name!r} is not a name inside DualAR")


def module_name(name: str) -> str:
    """Give the name in `DualAR` of a tensor or module of a checkpoint.

    Args:
        name: A name on disk.

    Returns:
        The name in `DualAR`.

    Raises:
        UserError: The name belongs to neither transformer.
    """
    for ours, theirs in _PREFIXES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    expected = ", ".join(sorted(theirs for _, theirs in _PREFIXES))
    raise UserError(f"tensor {name!r}", f"a name that starts with one of {expected}", "use an S2 Pro checkpoint")
