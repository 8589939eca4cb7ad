import hashlib
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gptjax.datasets import download
from gptjax.datasets.download import fetch
from gptjax.errors import DataError
from gptjax.files import file_lock
from tests.server import Status, serving

CONTENT = np.random.default_rng(0).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    with serving() as site:
        site.files["a.bin"] = CONTENT
        yield site


def test_a_file_arrives_whole_and_is_not_fetched_twice(site, tmp_path):
    path = tmp_path / "new" / "a.bin"
    for _ in range(2):
        assert fetch(f"{site.url}/a.bin", path, SHA256).read_bytes() == CONTENT
    assert site.requests == [("/a.bin", None)]
    assert list(path.parent.iterdir()) == [path]


def test_a_broken_connection_is_gone_on_with(site, tmp_path):
    """Two breaks, three requests, and no chunk is asked for twice."""
    site.failures = [15 * download.CHUNK_BYTES, 23 * download.CHUNK_BYTES]
    assert fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256).read_bytes() == CONTENT
    assert [wanted for _, wanted in site.requests] == [None, "bytes=983040-", "bytes=1507328-"]


def test_what_a_killed_process_left_is_gone_on_with(site, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:1234])
    assert fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256).read_bytes() == CONTENT
    assert site.requests == [("/a.bin", "bytes=1234-")]


def test_the_checksum_that_the_hub_announces_counts(site, tmp_path):
    site.headers["X-Linked-ETag"] = f'"{SHA256}"'
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:1234])
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin")
    site.headers["X-Linked-ETag"] = f'"{"0" * 64}"'
    with pytest.raises(DataError, match="not 0*: the download"):
        fetch(f"{site.url}/a.bin", tmp_path / "b.bin")


def test_without_a_checksum_a_download_starts_over(site, tmp_path):
    """What an earlier attempt left may be of another version of the file."""
    (tmp_path / "a.bin.partial").write_bytes(b"another version")
    assert fetch(f"{site.url}/a.bin", tmp_path / "a.bin").read_bytes() == CONTENT


def test_a_server_without_ranges(site, tmp_path):
    site.ranges = False
    site.failures = [1_000_000]
    assert fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256).read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long(site, tmp_path):
    (tmp_path / "a.bin.partial").write_bytes(CONTENT + b"more")
    assert fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256).read_bytes() == CONTENT


def test_a_busy_server_is_asked_again(site, tmp_path):
    site.failures = [Status(503), Status(429)]
    fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256)
    assert len(site.requests) == 3


def test_wrong_content_is_removed(site, tmp_path):
    with pytest.raises(DataError, match=f"has the SHA-256 {SHA256}, not {'1' * 64}"):
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin", "1" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_said_at_once(site, tmp_path):
    with pytest.raises(DataError, match=r"status 404; put the file at .*/b\.bin yourself"):
        fetch(f"{site.url}/b.bin", tmp_path / "b.bin")
    assert len(site.requests) == 1


def test_offline(monkeypatch, tmp_path):
    """One sentence that says what to put where; what had arrived stays for the next time."""
    monkeypatch.setattr(download, "PAUSE_S", 0.0)
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:10])
    with pytest.raises(
        DataError,
        match=r"cannot be downloaded \(.*refused\): go online .* put the file at .*/a\.bin yourself",
    ):
        fetch("http://127.0.0.1:9/a.bin", tmp_path / "a.bin", SHA256)
    assert (tmp_path / "a.bin.partial").read_bytes() == CONTENT[:10]


def test_a_server_that_never_delivers_is_given_up(site, tmp_path):
    site.failures = [Status(500)] * download.ATTEMPTS
    with pytest.raises(DataError, match="HTTP status 500"):
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256)
    assert len(site.requests) == download.ATTEMPTS


def test_a_file_put_there_by_hand_is_verified(site, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"something else")
    with pytest.raises(DataError, match="a.bin differs from .* remove it and try again"):
        fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256)
    (tmp_path / "a.bin").write_bytes(CONTENT)
    assert fetch(f"{site.url}/a.bin", tmp_path / "a.bin", SHA256) == tmp_path / "a.bin"
    assert site.requests == []


def test_of_two_at_once_one_downloads_and_the_other_waits(site, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = [
            pool.submit(fetch, f"{site.url}/a.bin", tmp_path / "a.bin", SHA256) for _ in range(4)
        ]
        assert all(future.result().read_bytes() == CONTENT for future in made)
    assert len(site.requests) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "a.bin"]


def test_the_lock_is_held_by_one_though_its_file_comes_and_goes(tmp_path):
    """Who waits may find it removed by who held it, at any point."""
    inside: list[int] = []

    def hold(thread):
        for _ in range(100):
            with file_lock(tmp_path / "a.lock"):
                inside.append(thread)
                assert inside == [thread]
                inside.pop()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(hold, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert not list(tmp_path.iterdir())
