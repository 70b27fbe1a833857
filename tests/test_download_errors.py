"""What is said where a file cannot be had: why, from which addresses, and what to do."""

import socket
from pathlib import Path
from typing import Any

import pytest
from local_server import Site
from test_fetch import only_this_machine, site  # noqa: F401  (fixtures)

from plm_weights.errors import DownloadError
from plm_weights.fetch import download, fetch, home
from plm_weights.registry import Checkpoint, File


def test_refused_connection(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = File("x.pt", url=f"http://127.0.0.1:{port}/x.pt")
    with pytest.raises(DownloadError, match=r"failed 2 times, at last with: .*refused.*run again\.$"):
        download(file, tmp_path / "x.pt", tries=2, pause=0)
    (tmp_path / "x.pt.part").write_bytes(b"a piece")
    with pytest.raises(DownloadError, match=r"run again: 7 bytes are kept in .*x\.pt\.part\.$"):
        download(file, tmp_path / "x.pt", tries=1)


def test_a_host_that_cannot_be_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from the network, another try would wait in vain."""

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it waits"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        DownloadError, match=r"host.* cannot be resolved \(Name or service not known\)\. .*run again\.$"
    ):
        download(File("x.pt", url="http://models.invalid/x.pt"), tmp_path / "x.pt")


def test_an_archive_can_be_put_by_hand(site: Site) -> None:  # noqa: F811
    files = (File("config.json"), File("pytorch_model.bin"))
    row = Checkpoint("tiny", "progen2", "BSD", "none", originals=files, archive=f"{site.url}/tiny.tar.gz")
    told = (
        rf"tiny\.tar\.gz answered HTTP 404.*\n.*put config\.json, pytorch_model\.bin into {home() / 'originals/tiny'}\."
    )
    with pytest.raises(DownloadError, match=told):
        fetch(row, form="original")
