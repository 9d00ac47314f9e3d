"""The sha256 that goes into records is that of the bytes that were loaded, or none is named."""

import hashlib
import os
import time

import pytest

FIRST, SECOND = b"a" * 3001, b"b" * 3001  # of one size


@pytest.fixture
def model_files(comfy):
    found = comfy.module("nodes.model_files")
    found._sha256.cache_clear()
    return found


def replaced(path):
    new = path.with_name("new")
    new.write_bytes(SECOND)
    os.replace(new, path)


def written(path):
    path.write_bytes(SECOND)


def written_with_its_old_times(path):
    found = path.stat()
    path.write_bytes(SECOND)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


CHANGES = [replaced, written, written_with_its_old_times]


def aged(path, monkeypatch, model_files):
    """Have the file's times lie so far back that they tell changes."""
    monkeypatch.setattr(model_files.time, "time_ns", lambda: time.monotonic_ns() + 2**62)


def test_the_hash_is_that_of_what_was_read(model_files, tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    for content in (FIRST, SECOND, b""):
        path.write_bytes(content)
        read, name = model_files.read_identified(path, lambda path: path.read_bytes())
        assert (read, name) == (content, f"student.safetensors sha256:{hashlib.sha256(content).hexdigest()}")


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("before", [True, False], ids=["before it is read", "after it was read"])
@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "aged"])
def test_a_file_that_is_changed_meanwhile_has_no_hash(model_files, tmp_path, monkeypatch, change, before, fresh):
    path = tmp_path / "student.safetensors"
    path.write_bytes(FIRST)
    if not fresh:
        time.sleep(0.02)  # a tick of the clock of files
        aged(path, monkeypatch, model_files)

    def read(path):
        change(path) if before else None
        found = path.read_bytes()
        change(path) if not before else None
        return found

    read_bytes, name = model_files.read_identified(path, read)
    assert name in ("student.safetensors", f"student.safetensors sha256:{hashlib.sha256(read_bytes).hexdigest()}")
    _, again = model_files.read_identified(path, lambda path: path.read_bytes())
    assert again == f"student.safetensors sha256:{hashlib.sha256(SECOND).hexdigest()}"


def test_a_file_is_hashed_once(model_files, tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    path.write_bytes(FIRST)
    aged(path, monkeypatch, model_files)
    for _ in range(3):
        model_files.read_identified(path, lambda path: None)
    assert model_files._sha256.cache_info().misses == 1


def test_a_file_that_goes_is_read_all_the_same(model_files, tmp_path):
    path = tmp_path / "student\n.safetensors"
    path.write_bytes(FIRST)
    assert model_files.read_identified(path, lambda path: path.unlink()) == (None, "student\\n.safetensors")
    with pytest.raises(ValueError, match="its own words"):
        model_files.read_identified(path, lambda path: (_ for _ in ()).throw(ValueError("its own words")))


@pytest.mark.parametrize("change", CHANGES)
def test_the_checksum_of_the_hub_is_that_of_the_file_it_fetched(comfy, model_files, tmp_path, change):
    hub = comfy.module("attention.hub.download")
    path = tmp_path / "student.safetensors"
    path.write_bytes(FIRST)
    file = comfy.module("attention.hub.transfer").HubFile("me/student", path.name)
    known = hub.Download(path, "0" * 40, hashlib.sha256(FIRST).hexdigest(), len(FIRST), "mit")
    hub._write_record(known, file, path.stat().st_mtime_ns)
    assert hub.recorded_sha256(path) == known.sha256
    time.sleep(0.02)
    if change is not written_with_its_old_times:  # which only a bad will does, and no record can tell
        change(path)
        assert hub.recorded_sha256(path) is None
        _, name = model_files.read_identified(path, lambda path: path.read_bytes())
        assert name.endswith(hashlib.sha256(SECOND).hexdigest())
