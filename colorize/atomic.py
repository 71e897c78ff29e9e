"""A file is either whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with its suffix; what is written there becomes `path` when the block ends well.

    Whatever ends the block early (Ctrl-C included) removes the temporary file and leaves an older `path` as it was.

    Raises:
        OSError: the folder is missing or cannot be written to.
    """
    path = Path(path)
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")  # short, so that no name grows past the limit
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut could leave the new name on empty blocks
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
