"""Fashion-MNIST as Debian packs it, for torchvision: unpacked once, into a cache."""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
import zlib
from pathlib import Path

NAMES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
ADVICE = (
    "torchvision's own download is --download; Debian's package is: apt-get install dataset-fashion-mnist, "
    "then --root /usr/share/datasets/fashion-mnist"
)


def unpacked(root: str, dataset: str = "FashionMNIST") -> str:
    """A folder that torchvision reads the dataset from: `root` or, if that holds the packed files alone, a cache of them.

    What is in the cache already, and is what the packed file says, stays. Each file appears there whole or not at all.
    """
    packed = [Path(root) / f"{name}.gz" for name in NAMES]
    if (Path(root) / dataset / "raw").is_dir() or not all(path.is_file() for path in packed):
        return root
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "se_fx"
    raw = cache / dataset / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for path in packed:
        _unpack(path, raw / path.stem)
    return str(cache)


def _unpack(packed: Path, target: Path) -> None:
    if target.is_file() and _is_of(packed, target.read_bytes()):
        return
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=target.name, delete=False) as file:
        try:
            file.write(gzip.decompress(packed.read_bytes()))
            file.close()
            Path(file.name).replace(target)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _is_of(packed: Path, content: bytes) -> bool:
    """Whether this is what the file unpacks to, by the checksum and the size that it ends in."""
    with packed.open("rb") as file:
        file.seek(-8, os.SEEK_END)
        return struct.unpack("<2I", file.read(8)) == (zlib.crc32(content), len(content) % 2**32)
