import functools
import http.server
import threading
from pathlib import Path

import pytest

from tfrecords import remote, tfio
from tfrecords.listing import list_sites
from tfrecords.manifest import read_manifest
from tfrecords.read import read_records
from tfrecords.remote import find_transport, is_remote, remote_url
from tfrecords.verify import verify_records


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TFRECORDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tfio, "is_made_for_this_tensorflow", lambda: False)  # test_tfio.py is about it.


def read_all(dest):
    pairs = read_records(dest, "val", batch_size=2, metadata=True)
    return [(site.decode(), image.numpy().tobytes()) for *image, meta in pairs for site in meta["site_id"].numpy()
            for image in image[:1]]  # fmt: skip


def test_what_is_a_url(tmp_path):
    assert not any(map(is_remote, (tmp_path, "records", "./a/b", "C:\\records", "C:/records", "/data/s3:/x")))
    assert all(map(is_remote, ("s3://bucket/records", "gs://b/r", "https://host/r", Path("az://container/records"))))
    assert (
        remote_url(Path("az://container/records/")) == remote_url("az://container/records/") == "az://container/records"
    )


@pytest.mark.parametrize("url", ["https://me:SECRET@host/records", "https://host/records?sig=SECRET"])
def test_a_secret_in_the_url_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="'https://host/records' came with a user name, a password or a query") as info:
        list_sites(url, "val")
    assert "SECRET" not in str(info.value)


def test_tensorflow_reads_what_it_knows_by_itself(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    for url in ("gs://bucket/records", "ram://bucket/records"):
        find_transport(url)
    with pytest.raises(ImportError, match=r's3:// needs fsspec .* not installed: pip install "keras-abra\[remote\]"'):
        read_manifest("s3://bucket/records")


def test_a_missing_file_system_says_what_to_install(monkeypatch):
    fsspec = pytest.importorskip("fsspec")

    def refuse(scheme):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", refuse)
    with pytest.raises(ImportError, match=r'Install s3fs to access S3\): pip install "keras-abra\[remote\]"'):
        find_transport("s3://bucket/records")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="Unknown scheme 's4' of s4://bucket"):
        find_transport("s4://bucket")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_records_on_a_plain_web_server(records_tree):
    pytest.importorskip("aiohttp", reason="needs the extra remote")
    pytest.importorskip("fsspec", reason="needs the extra remote")
    handler = functools.partial(Quiet, directory=str(records_tree.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/records"
        assert read_all(url) == read_all(records_tree)
        with pytest.raises(ValueError, match="holds no finished records: there is no manifest.json"):
            read_manifest(f"{url}/train")
        server.shutdown()
    with pytest.raises(OSError, match=r"manifest.json cannot be read \(Client"):
        read_manifest(url)


def test_records_on_an_s3_server(bucket, records_tree):
    pytest.importorskip("s3fs", reason="needs the extra remote")
    assert read_all(bucket) == read_all(records_tree)
    assert verify_records(bucket) == []
    with pytest.raises(ValueError, match="holds no finished records"):
        read_manifest("s3://screens/nothing")


def test_any_failure_of_a_library_is_an_oserror():
    with pytest.raises(OSError, match=r"x cannot be read \(ZeroDivisionError: division by zero\)"):
        remote._wrapped(lambda url: 1 / 0)("x")
