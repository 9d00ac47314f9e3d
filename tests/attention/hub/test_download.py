"""What is fetched and when, where it lies, and what is known of it; how it travels is in test_transfer.py."""

import hashlib
import json
import threading

import pytest

from linearize.attention.hub.download import (
    CLEAR_FILES,
    CLEAR_LICENCE,
    UNKNOWN_LICENCE,
    HubError,
    HubFile,
    local_path,
    parse_hub_file,
    recorded_sha256,
)
from linearize.attention.students.clear_weights import published_radius

NAME = "owner--repo--folder--student.safetensors"


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_whole_download_is_verified_and_recorded(fake, tmp_path):
    steps = []
    found = fake.fetch(tmp_path / "new", progress=lambda done, total: steps.append((done, total)))
    assert found.path == tmp_path / "new" / NAME and found.path.read_bytes() == fake.CONTENT
    assert (found.commit, found.size, found.licence) == (fake.COMMIT, len(fake.CONTENT), "mit")
    assert found.sha256 == fake.SHA256 == recorded_sha256(found.path)
    record = json.loads(found.path.with_name(f"{NAME}.json").read_text(encoding="utf-8"))
    told = (record["repo"], record["file"], record["revision"], record["commit"])
    assert told == ("owner/repo", "folder/student.safetensors", "main", fake.COMMIT)
    assert steps == sorted(steps) and steps[-1] == (len(fake.CONTENT), len(fake.CONTENT))
    assert names(tmp_path / "new") == [NAME, f"{NAME}.json"]


def test_what_is_here_costs_no_request(fake, tmp_path):
    first = fake.fetch(tmp_path)
    fake.requests.clear()
    assert fake.fetch(tmp_path, allow_download=False) == first
    assert fake.requests == []


def test_a_file_put_there_by_hand_is_taken(fake, tmp_path):
    content = fake.CONTENT[:2345]  # read in three pieces
    (tmp_path / "clear_local_8.safetensors").write_bytes(content)
    found = fake.fetch(tmp_path, CLEAR_FILES["clear_local_8"], allow_download=False)
    assert found.sha256 == hashlib.sha256(content).hexdigest() and found.commit == ""
    assert fake.requests == []


def test_a_file_that_changed_since_it_was_fetched_is_not_trusted(fake, tmp_path):
    path = fake.fetch(tmp_path).path
    path.write_bytes(b"shorter")
    assert recorded_sha256(path) is None
    fake.refusal(tmp_path, "has 7 bytes where its record says 10000", "delete")


def test_nothing_is_fetched_without_permission(fake, tmp_path):
    fake.refusal(tmp_path, "switch on allow_download to fetch it", "by hand", allow_download=False)
    assert fake.requests == [] and names(tmp_path) == []


def test_two_calls_at_once_fetch_once(fake, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(fake.fetch(tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(results) == 3 and len({result.sha256 for result in results}) == 1
    assert len(fake.asked("cdn", "GET")) == 1


def test_another_revision_is_asked_for_and_lies_beside_it(fake, tmp_path):
    pinned = HubFile("owner/repo", "deep/student.safetensors", "v2")
    assert local_path(tmp_path, pinned).name == "owner--repo@v2--deep--student.safetensors"
    fake.fetch(tmp_path, pinned)
    assert any("/resolve/v2/deep/student.safetensors" in path for _, _, path, _ in fake.requests)


def test_the_five_published_files(tmp_path):
    assert {(file.file, *published_radius(file.file)) for file in CLEAR_FILES.values()} == {
        ("clear_local_32.safetensors", 32, 1),
        ("clear_local_16.safetensors", 16, 1),
        ("clear_local_8.safetensors", 8, 1),
        ("clear_local_16_down_4.safetensors", 16, 4),
        ("clear_local_8_down_4.safetensors", 8, 4),
    }
    assert "FLUX.1 [dev]" in CLEAR_LICENCE
    for file in CLEAR_FILES.values():
        assert file.repo == "Huage001/CLEAR"
        assert local_path(tmp_path, file) == tmp_path / file.file


def test_forms_of_a_hub_file():
    assert parse_hub_file("owner/repo/a/b.safetensors") == HubFile("owner/repo", "a/b.safetensors")
    assert parse_hub_file(" owner/repo/b.safetensors@abc ") == HubFile("owner/repo", "b.safetensors", "abc")


@pytest.mark.parametrize(
    "text",
    ["", "b.safetensors", "owner/b.safetensors", "owner/repo/b.ckpt", "owner/repo/../b.safetensors",
     "owner/repo/b.safetensors@", "https://host/owner/repo/b.safetensors", "owner\\repo\\b.safetensors",
     "owner/repo//b.safetensors", "owner/repo/.hidden.safetensors", "../../etc/b.safetensors",
     "owner/repo/b.safetensors@../main", "owner/re po/b.safetensors"],
)  # fmt: skip
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError) as error:
        parse_hub_file(text)
    assert "\n" not in str(error.value) and not isinstance(error.value, HubError)


def test_two_files_of_one_local_name_are_told_apart(fake, tmp_path):
    fake.fetch(tmp_path, HubFile("o/r", "a/b.safetensors"))
    fake.refusal(tmp_path, "another file than o/r/a--b.safetensors", file=HubFile("o/r", "a--b.safetensors"))


@pytest.mark.parametrize("part", ["../x", "/x", "x/../../y", "x\\..\\y", "..", "C:\\x", "x\0"])
def test_nothing_leaves_the_folder(part):
    for arguments in ((f"{part}/r", "a.safetensors"), ("o/r", f"{part}/a.safetensors"), ("o/r", "a.safetensors", part)):
        with pytest.raises(ValueError):
            HubFile(*arguments)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "other", "license_name": "flux-dev"}, "flux-dev"),
        ({"license": "other"}, CLEAR_LICENCE),
        ({}, CLEAR_LICENCE),
        ({"license": "a\nb"}, CLEAR_LICENCE),
    ],
)
def test_the_licence_is_the_cards_or_what_is_known(fake, tmp_path, card, licence):
    fake.licence = card
    assert fake.fetch(tmp_path, CLEAR_FILES["clear_local_32"]).licence == licence


def test_a_licence_that_nobody_states_is_said_to_be_so(fake, tmp_path):
    fake.licence = {}
    assert fake.fetch(tmp_path).licence == UNKNOWN_LICENCE


def test_a_small_file_is_verified_by_gits_checksum(fake, tmp_path):
    fake.is_direct = True
    fake.etag = hashlib.sha1(b"blob 10000\0" + fake.CONTENT).hexdigest()
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
    fake.etag = "0" * 40
    fake.refusal(tmp_path, "another checksum", file=HubFile("o/r", "b.safetensors"))


def test_the_bytes_are_those_of_the_recorded_commit(fake, tmp_path):
    fake.fetch(tmp_path)
    assert fake.asked("hub", "GET")[0][2] == f"/owner/repo/resolve/{fake.COMMIT}/folder/student.safetensors"


def test_a_second_call_waits_for_the_first(fake, tmp_path):
    started, waiting = threading.Event(), threading.Event()
    results, calls = [], []

    def hold_on(done, total):
        started.set()
        assert waiting.wait(5)

    def count():
        calls.append(None)
        if len(calls) == 3:  # refused by the lock at least once
            waiting.set()

    first = threading.Thread(target=lambda: results.append(fake.fetch(tmp_path, progress=hold_on)))
    first.start()
    assert started.wait(5)
    second = threading.Thread(target=lambda: results.append(fake.fetch(tmp_path, should_stop=count)))
    second.start()
    first.join(5)
    second.join(5)
    assert len(results) == 2 and results[0] == results[1] and len(fake.ranges()) == 1


def test_a_lock_file_that_was_left_behind_stops_nobody(fake, tmp_path):
    (tmp_path / f"{NAME}.lock").write_bytes(b"")
    assert fake.fetch(tmp_path).sha256 == fake.SHA256
