"""What is said of a file that is damaged, or that unpacks to more than it can hold: the same for every format."""

from __future__ import annotations

from pathlib import Path

from convscope import limits
from convscope.errors import ConvscopeError, ModelError, one_line


def damaged(path: Path, error: Exception, how: str = "") -> ModelError:
    """The message for a file whose content can't be read.

    Args:
        path: of the file.
        error: of its reader; if it goes beyond a limit, so does this one.
        how: what it can't be read as, such as " as ONNX".
    """
    reason = one_line(error)[:200]
    beyond = {"limit": error.data["limit"]} if isinstance(error, ConvscopeError) and "limit" in error.data else {}
    return ModelError(
        f"{path} can't be read{how}: {reason}. Copy or download it again.",
        code="input-too-large" if beyond else "file-damaged",
        path=str(path),
        reason=reason,
        **beyond,
    )


def check_unpacked(what: str, unpacked: int, size: int) -> None:
    """Refuse a file of `size` bytes that declares `unpacked` bytes of unpacked content, before memory is taken.

    Args:
        what: the path of the file.
        unpacked, size: in bytes.

    Raises:
        ModelError: that is more than the limit, or more than 100 times its size.
    """
    if unpacked > limits.current().weights:
        raise ModelError(
            f"{what} declares {limits.shown('weights', unpacked)} of unpacked content, more than is read "
            f"({limits.how_to_raise('weights')}).",
            code="input-too-large",
            path=what,
            limit="weights",
        )
    if unpacked > limits.most_unpacked(size):
        raise ModelError(
            f"{what} unpacks to {limits.shown('weights', unpacked)} from {size} bytes, more than 100 times its size. "
            "Expected weights that are hardly compressed, as frameworks write them.",
            code="file-invalid",
            path=what,
            found=unpacked,
            expected=limits.most_unpacked(size),
        )
