"""A local S3-compatible server, for tests; none of its packages is needed by anything else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "team"


@contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Inside, `s3://` is a server in this process on 127.0.0.1; yields its address.

    Skips the test where moto's server or s3fs is not installed.
    """
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    import fsspec

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    address = f"http://{host}:{port}"
    point_s3_to(address, monkeypatch)
    try:
        fsspec.filesystem("s3").mkdir(BUCKET)
        yield address
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()


def point_s3_to(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes an address that of `s3://`, with credentials that nobody checks."""
    import fsspec
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": address})
    s3fs.S3FileSystem.clear_instance_cache()
