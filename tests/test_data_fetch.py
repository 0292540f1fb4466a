"""Downloads, against a server on this machine and archives made here."""

import gzip
import hashlib
import io
import socket
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from swiftsure import data
from swiftsure.data import cifar, download, idx
from swiftsure.data.download import Home, Remote
from swiftsure.errors import InputError


class Server(ThreadingHTTPServer):
    """Serves what ``content`` holds; a path in ``broken`` is announced whole and sent by half."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        body = self.server.content.get(name)
        if body is None:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if name in self.server.broken else body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the test's output is the test's."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def publish(server: Server, monkeypatch, name: str, files: dict[str, bytes]) -> None:
    """Let the server be the public home of a set."""
    server.content.update(files)
    remotes = tuple(Remote(n, len(b), hashlib.sha256(b).hexdigest()) for n, b in files.items())
    monkeypatch.setitem(download.HOMES, name, Home(server.address, remotes))


def idx_files() -> dict[str, bytes]:
    made = {}
    for name in idx.FILES:
        count = 60 if name.startswith("train") else 20
        shape = (count, 28, 28) if "idx3" in name else (count,)
        array = (np.arange(np.prod(shape)) % 10).astype(np.uint8)
        header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
        made[f"{name}.gz"] = gzip.compress(header + array.tobytes())
    return made


def tarred(entries: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in entries.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return out.getvalue()


def cifar_entries(records: int = 30) -> dict[str, bytes]:
    record = np.zeros((records, 3073), np.uint8)
    record[:, 0] = np.arange(records) % 10
    names = (*cifar.TRAIN_FILES, cifar.TEST_FILE)
    return {f"cifar-10-batches-bin/{name}": record.tobytes() for name in names}


def refused(name: str, root: Path, line: str, source: str | None = None) -> None:
    """The fetch fails in one line that holds `line`, and leaves the root as it was."""
    before = sorted(root.rglob("*"))
    with pytest.raises(InputError, match=line) as error:
        data.fetch(name, root, source)
    assert "\n" not in str(error.value)
    assert sorted(root.rglob("*")) == before


def test_idx_files_arrive_and_load(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    root = tmp_path / "new" / "root"
    assert data.fetch("mnist", root) == root / "MNIST" / "raw"
    assert [p.name for p in root.iterdir()] == ["MNIST"]
    assert len(data.load("mnist", root).test) == 20


def test_what_is_there_is_not_fetched_again(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    data.fetch("mnist", tmp_path)
    asked = len(server.asked)
    assert data.fetch("mnist", tmp_path) == tmp_path / "MNIST" / "raw"
    assert len(server.asked) == asked


def test_a_tar_archive_is_unpacked(tmp_path, server, monkeypatch):
    monkeypatch.setattr(cifar, "_RECORDS", 30)
    entries = {**cifar_entries(), "cifar-10-batches-bin/readme.html": b"hello"}
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tarred(entries)})
    assert data.fetch("cifar10", tmp_path) == tmp_path / "cifar-10-batches-bin"
    assert len(data.load("cifar10", tmp_path).test) == 30
    assert [p.name for p in tmp_path.iterdir()] == ["cifar-10-batches-bin"]


def tiny_zip(*more: zipfile.ZipInfo) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.mkdir("tiny-imagenet-200")
        for name in (
            "wnids.txt",
            "train/n01/images/n01_0.JPEG",
            "val/images/v.JPEG",
            "val/val_annotations.txt",
        ):
            archive.writestr(f"tiny-imagenet-200/{name}", b"x")
        for entry in more:
            archive.writestr(entry, b"/etc/passwd")
    return out.getvalue()


def test_a_zip_archive_is_unpacked(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "tiny_imagenet", {"tiny-imagenet-200.zip": tiny_zip()})
    assert data.fetch("tiny_imagenet", tmp_path) == tmp_path / "tiny-imagenet-200"
    assert (tmp_path / "tiny-imagenet-200/train/n01/images/n01_0.JPEG").read_bytes() == b"x"


def test_another_address_must_deliver_the_same_files(tmp_path, server, monkeypatch):
    files = idx_files()
    publish(server, monkeypatch, "mnist", files)
    monkeypatch.setitem(download.HOMES, "mnist", Home("http://127.0.0.1:9", download.HOMES["mnist"].files))
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert data.fetch("mnist", tmp_path / "a", f"{server.address}/some/where/").is_dir()
    assert data.fetch("mnist", tmp_path / "b", folder.as_uri()).is_dir()
    refused("mnist", tmp_path, "allowed: an address that begins with", "ftp://127.0.0.1/mnist")
    refused("mnist", tmp_path, "allowed: an address that begins with", "/some/where")


def test_a_wrong_checksum_installs_nothing(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    name = "t10k-labels-idx1-ubyte.gz"
    body = bytearray(server.content[name])
    body[-1] ^= 1
    server.content[name] = bytes(body)
    refused("mnist", tmp_path, "t10k-labels-idx1-ubyte.gz has SHA-256 .* the published file has")


def test_a_file_that_is_too_long_installs_nothing(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    server.content["t10k-labels-idx1-ubyte.gz"] += b"\0"
    refused("mnist", tmp_path, "sends more than the")


def test_a_missing_file_installs_nothing(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    del server.content["t10k-images-idx3-ubyte.gz"]
    refused("mnist", tmp_path, "t10k-images-idx3-ubyte.gz answers 404 Not Found")


def test_a_broken_transfer_installs_nothing(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    server.broken.add("train-images-idx3-ubyte.gz")
    refused("mnist", tmp_path, r"transfer of .*train-images-idx3-ubyte.gz broke off")


def test_no_server_installs_nothing(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    # Bound but not listening: the port is ours, and every connection to it is refused.
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        source = f"http://127.0.0.1:{silent.getsockname()[1]}"
        refused("mnist", tmp_path, "cannot be reached: ", source)


def test_a_full_disk_installs_nothing(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tarred(cifar_entries())})

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.shutil, "copyfileobj", full)
    refused("cifar10", tmp_path, "cannot write under .*: No space left on device")


def test_a_root_that_is_a_file_is_refused(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write under"):
        data.fetch("mnist", tmp_path / "file")


def test_ctrl_c_leaves_nothing_behind(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tarred(cifar_entries())})

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(download.shutil, "copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.fetch("cifar10", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../evil", "/evil", "other/evil", "cifar-10-batches-bin/../../evil"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, server, monkeypatch, name):
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    publish(
        server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tarred({**cifar_entries(), name: b"x"})}
    )
    refused("cifar10", root, "which is outside cifar-10-batches-bin/")
    assert not list(tmp_path.rglob("evil"))


def test_a_link_in_an_archive_is_refused(tmp_path, server, monkeypatch):
    archive = tarred(cifar_entries(), links={"cifar-10-batches-bin/link": "/etc/passwd"})
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": archive})
    refused("cifar10", tmp_path, "is a link or a device")
    link = zipfile.ZipInfo("tiny-imagenet-200/link")
    link.external_attr = 0o120777 << 16
    publish(server, monkeypatch, "tiny_imagenet", {"tiny-imagenet-200.zip": tiny_zip(link)})
    refused("tiny_imagenet", tmp_path, "is a link or a device")


@pytest.mark.parametrize("content", [b"no archive", b""])
def test_what_is_no_archive_is_refused(tmp_path, server, monkeypatch, content):
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": content})
    refused("cifar10", tmp_path, "cannot be unpacked")
    publish(server, monkeypatch, "tiny_imagenet", {"tiny-imagenet-200.zip": content})
    refused("tiny_imagenet", tmp_path, "cannot be unpacked")


def test_an_archive_cut_short_by_its_maker_is_refused(tmp_path, server, monkeypatch):
    whole = tarred(cifar_entries())
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": whole[: len(whole) // 2]})
    refused("cifar10", tmp_path, "cannot be unpacked")


def test_an_archive_without_a_batch_is_refused(tmp_path, server, monkeypatch):
    entries = cifar_entries()
    del entries["cifar-10-batches-bin/data_batch_3.bin"]
    publish(server, monkeypatch, "cifar10", {"cifar-10-binary.tar.gz": tarred(entries)})
    refused("cifar10", tmp_path, "without data_batch_3.bin")


def test_a_part_of_a_set_is_not_overwritten(tmp_path, server, monkeypatch):
    publish(server, monkeypatch, "mnist", idx_files())
    (tmp_path / "MNIST/raw").mkdir(parents=True)
    (tmp_path / "MNIST/raw" / idx.FILES[0]).write_bytes(b"mine")
    refused("mnist", tmp_path, "is there but lacks part of mnist; remove it")


def test_sets_that_are_not_published_need_no_fetching(tmp_path):
    assert data.fetch("digits", tmp_path) == data.path("digits")
    refused("folder", tmp_path, "it is your own data")
    refused("mnits", tmp_path, "allowed: digits, mnist")


@pytest.mark.real_data("mnist")
def test_the_checksums_are_those_of_the_published_mnist():
    folder = data.path("mnist")
    for file in download.HOMES["mnist"].files:
        path = folder / file.name
        if not path.is_file():
            continue
        content = path.read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file.size, file.sha256)
