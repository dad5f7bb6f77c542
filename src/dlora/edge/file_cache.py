"""Files of a cloud, fetched once for each content: later calls and runs take them from a folder.

The folder's name is a digest of all names and hashes, so that another content is another folder.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from tqdm.auto import tqdm

from dlora.errors import WireError
from dlora.files import ScratchFolder
from dlora.proto import dlora_pb2 as pb
from dlora.protocol.text import clean_text

__all__ = ["cached_files"]

_MAX_BYTES: Final = 32 * 2**30
_MAX_OTHER_BYTES: Final = 256 * 2**20
"""Of all files that are no weights: tokenizers and templates."""
_SPARE_BYTES: Final = 256 * 2**20
"""Of the disk, left free for everything else."""


def cached_files(
    cache: Path,
    infos: Sequence[pb.FileInfo],
    chunks: Callable[[], Iterable[pb.FileChunk]],
    address: str,
    title: str,
) -> Path:
    """A folder with these files. Where the cache has none, take `chunks` from the cloud.

    Raises WireError for more than was announced, and for a file whose hash does not match.
    `address` and `title` are for messages and the progress bar.
    """
    infos = sorted(infos, key=lambda info: info.name)
    names = "".join(f"{info.name} {info.sha256}\n" for info in infos)
    folder = cache / hashlib.sha256(names.encode()).hexdigest()[:32]
    if folder.is_dir():
        return folder

    cache.mkdir(parents=True, exist_ok=True)
    _check_room(infos, cache, address)
    with ScratchFolder("fetching-", cache) as partial:
        files = Path(partial) / "files"
        files.mkdir()
        _fetch(infos, chunks, files, address, title)
        try:
            files.rename(folder)  # at once or not at all
        except OSError:
            if not folder.is_dir():  # else another process was faster with the same content
                raise
    return folder


def _check_room(infos: Sequence[pb.FileInfo], cache: Path, address: str) -> None:
    """Raises WireError for more than any model needs, or more than the disk has room for."""
    total = sum(info.size for info in infos)
    other = sum(info.size for info in infos if not info.name.endswith(".safetensors"))
    for what, size, most in (("edge files", total, _MAX_BYTES), ("text", other, _MAX_OTHER_BYTES)):
        if size > most:
            raise WireError(f"{address} offers {size} bytes of {what}, over {most}")

    free = shutil.disk_usage(cache).free - _SPARE_BYTES
    if total > free:
        raise WireError(
            f"{address} offers {total / 2**20:.0f} MiB of edge files, and there is room for "
            f"{max(0, free) / 2**20:.0f} MiB in {cache}: make room, or set DLORA_CACHE"
        )


def _fetch(
    infos: Sequence[pb.FileInfo],
    chunks: Callable[[], Iterable[pb.FileChunk]],
    folder: Path,
    address: str,
    title: str,
) -> None:
    """Write the files, as they come, into an empty folder, and check them."""
    wanted = {info.name: info for info in infos}
    total = sum(info.size for info in infos)
    num_bytes = dict.fromkeys(wanted, 0)
    hashes = {name: hashlib.sha256() for name in wanted}
    with tqdm(total=total, unit="B", unit_scale=True, desc=title) as bar:
        for chunk in chunks():
            name, size = chunk.name, len(chunk.data)
            if name not in wanted or num_bytes[name] + size > wanted[name].size:
                raise WireError(
                    f"{address} sent more of {clean_text(name, 80)!r} than it had announced"
                )
            with (folder / name).open("ab") as file:
                file.write(chunk.data)
            num_bytes[name] += size
            hashes[name].update(chunk.data)
            bar.update(size)

    for name, info in wanted.items():
        if hashes[name].hexdigest() != info.sha256:
            raise WireError(
                f"{name} from {address}: {num_bytes[name]} of {info.size} bytes, SHA-256 does "
                "not match"
            )
