"""Data sets from their public homes: checked, unpacked and put in place as a whole, or not at all."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from swiftsure.data import catalogue, cifar
from swiftsure.data.progress import progress
from swiftsure.errors import InputError

_CHUNK = 1 << 20
_TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Remote:
    """One file at a public home: its name there, its length in bytes and its SHA-256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Home:
    """Where a set is published: an address and the files under it; one archive, or the set's own files."""

    address: str
    files: tuple[Remote, ...]


# Lengths and digests are of the files as published (compressed). What arrives is compared before anything is
# unpacked, so that even an address without TLS can deliver nothing else.
HOMES = {
    "mnist": Home(
        "https://ossci-datasets.s3.amazonaws.com/mnist",
        (
            Remote(
                "train-images-idx3-ubyte.gz",
                9_912_422,
                "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            ),
            Remote(
                "train-labels-idx1-ubyte.gz",
                28_881,
                "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            ),
            Remote(
                "t10k-images-idx3-ubyte.gz",
                1_648_877,
                "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            ),
            Remote(
                "t10k-labels-idx1-ubyte.gz",
                4_542,
                "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
            ),
        ),
    ),
    "fashion_mnist": Home(
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com",
        (
            Remote(
                "train-images-idx3-ubyte.gz",
                26_421_880,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            Remote(
                "train-labels-idx1-ubyte.gz",
                29_515,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            Remote(
                "t10k-images-idx3-ubyte.gz",
                4_422_102,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            Remote(
                "t10k-labels-idx1-ubyte.gz",
                5_148,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ),
    ),
    "cifar10": Home(
        cifar.ARCHIVE.rpartition("/")[0],
        (
            Remote(
                cifar.ARCHIVE.rpartition("/")[2],
                170_052_171,
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
            ),
        ),
    ),
    "tiny_imagenet": Home(
        "https://cs231n.stanford.edu",
        (
            Remote(
                "tiny-imagenet-200.zip",
                248_100_043,
                "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
            ),
        ),
    ),
}


def fetch(name: str, root: str | os.PathLike[str] | None = None, source: str | None = None) -> Path:
    """Download a set, unless it is there already, and return its folder.

    Length and SHA-256 of every published file, as it is published (compressed), are checked before it is
    unpacked: they cover every byte of the set. All is gathered in a hidden folder of the root, renamed into
    place at the end, and deleted on any error or ctrl-C: there is never a part of a set.

    Args:
        name: one of ``swiftsure.data.names()``.
        root: the data root (see ``swiftsure.data.data_root``); made if need be.
        source: another address (http, https or file) with the same files, in place of the public home.

    Raises:
        InputError: a set that is not published, an address that does not answer or lacks a file, a broken
            transfer, a wrong checksum, an unsafe archive, or a root that cannot be written or is full.
    """
    base = catalogue.data_root(root)
    there = catalogue.found(base)
    if name in there:
        return there[name]
    home = HOMES.get(name)
    if home is None:
        return catalogue.path(name, root)
    address = (source or home.address).rstrip("/")
    if not address.startswith(("http://", "https://", "file://")):
        raise InputError(
            f"source is {source!r}; allowed: an address that begins with http://, https:// or file://"
        )
    target = base / catalogue.LAYOUTS[name].places[0]
    if target.is_dir() and any(target.iterdir()):
        raise InputError(
            f"{target} is there but lacks part of {name}; remove it, or name another root with --data"
        )
    try:
        base.mkdir(parents=True, exist_ok=True)
        gathering = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=base))
    except OSError as error:
        raise _unwritable(base, error) from None
    try:
        return _install(name, home, address, gathering, target)
    except OSError as error:
        raise _unwritable(base, error) from None
    finally:
        shutil.rmtree(gathering, ignore_errors=True)


def _install(name: str, home: Home, address: str, gathering: Path, target: Path) -> Path:
    """Fill the hidden folder, and rename what it then holds into place."""
    whole = gathering / target.name
    whole.mkdir()
    with progress(f"fetching {name}", sum(file.size for file in home.files), in_bytes=True) as advance:
        for file in home.files:
            _download(f"{address}/{file.name}", file, gathering / file.name, advance)
    for file in home.files:
        if file.name.endswith((".tar.gz", ".zip")):
            _unpack(gathering / file.name, target.name, gathering)
        else:
            (gathering / file.name).rename(whole / file.name)
    lacking = catalogue.LAYOUTS[name].missing(whole)
    if lacking:
        raise InputError(f"{address} delivered {name} without {', '.join(lacking)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    whole.replace(target)
    return target


def _download(url: str, file: Remote, path: Path, advance: Callable[[int], None]) -> None:
    digest, length = hashlib.sha256(), 0
    with path.open("xb") as out:
        for chunk in _stream(url):
            digest.update(chunk)
            length += len(chunk)
            if length > file.size:
                raise InputError(f"{url} sends more than the {file.size} bytes of the published file")
            out.write(chunk)
            advance(len(chunk))
    if length < file.size:
        raise InputError(f"the transfer of {url} broke off after {length} of {file.size} bytes; try again")
    if digest.hexdigest() != file.sha256:
        raise InputError(f"{url} has SHA-256 {digest.hexdigest()}; the published file has {file.sha256}")


def _stream(url: str) -> Iterator[bytes]:
    """What the address sends. Errors of the network end here, so that any later OSError is the disk's."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
            while chunk := response.read(_CHUNK):
                yield chunk
    except urllib.error.HTTPError as error:
        with error:
            raise InputError(f"{url} answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise InputError(f"{url} cannot be reached: {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise InputError(f"the transfer of {url} broke off: {error or type(error).__name__}") from None


def _unpack(archive: Path, top: str, into: Path) -> None:
    """Write the plain files of an archive below the folder `top`; refuse any other path or kind of entry."""
    try:
        for name, file in _entries(archive):
            parts = PurePosixPath(name).parts
            if parts[:1] != (top,) or ".." in parts or "\\" in name:
                raise InputError(
                    f"{archive.name} holds {name!r}, which is outside {top}/; nothing was installed"
                )
            path = into.joinpath(*parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as out:
                shutil.copyfileobj(file, out, _CHUNK)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{archive.name} cannot be unpacked: {error}") from None


def _entries(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Each file in an archive: its name and its content. Folders are left out; links are refused."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise _foreign_kind(archive, entry.filename)
                if not entry.is_dir():
                    with zipped.open(entry) as content:
                        yield entry.filename, content
        return
    with tarfile.open(archive, "r:gz") as tarred:
        for member in tarred:
            if not member.isfile() and not member.isdir():
                raise _foreign_kind(archive, member.name)
            file = tarred.extractfile(member)
            if file is not None:
                yield member.name, file


def _foreign_kind(archive: Path, name: str) -> InputError:
    return InputError(f"{archive.name} holds {name!r}, which is a link or a device; nothing was installed")


def _unwritable(base: Path, error: OSError) -> InputError:
    return InputError(f"cannot write under {base}: {error.strerror or error}")
