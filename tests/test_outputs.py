"""engine/outputs.py: what is listed, which names lead into the folder, and how thumbnails are kept."""

import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.files import media
from engine.files.outputs import Entry, Outputs
from engine.files.thumbnails import ThumbnailCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "outputs"
    path.mkdir()
    return path


@pytest.fixture
def outputs(folder: Path, tmp_path: Path) -> Outputs:
    (tmp_path / "cache").mkdir()
    return Outputs(folder, tmp_path / "cache")


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that really were decoded for a thumbnail."""
    names: list[str] = []
    decode = media.thumbnail
    monkeypatch.setattr(
        media, "thumbnail", lambda file, width: (names.append(Path(file.name).name), decode(file, width))[1]
    )
    return names


@pytest.fixture
def short_socket_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.chdir(folder)  # a socket's path holds 108 bytes


def put(folder: Path, name: str, at: float | None = None, data: bytes = b"x") -> Path:
    """A file of the folder, by default an hour old, so that its time stamp has settled."""
    path = folder / name
    path.write_bytes(data)
    stamp = time.time() - 3600 if at is None else at
    os.utime(path, (stamp, stamp))
    return path


def found(outputs: Outputs, name: str) -> Path | None:
    """Where the file is that a request for this name would get."""
    file = outputs.find(name)
    if file is None:
        return None
    with file:
        return Path(file.name)


def settle(folder: Path, age_s: float = 600.0) -> None:
    """Make the folder look unchanged for a while, as it would after a rest."""
    stamp = time.time() - age_s
    os.utime(folder, (stamp, stamp))


def picture(folder: Path, name: str, size: tuple[int, int] = (400, 200)) -> Path:
    path = folder / name
    Image.new("RGB", size, "teal").save(path)
    return path


def names(entries: object) -> list[str]:
    assert isinstance(entries, tuple)
    return [entry.filename for entry in entries]


# --------------------------------------------------------------------------------------------------------- listing


def test_the_newest_file_comes_first(folder: Path, outputs: Outputs) -> None:
    for name, at in (("old.mp4", 100.0), ("new.mp4", 300.0), ("mid.mp4", 200.0)):
        put(folder, name, at)
    assert names(outputs.listing()) == ["new.mp4", "mid.mp4", "old.mp4"]


def test_files_of_the_same_time_come_by_name(folder: Path, outputs: Outputs) -> None:
    for name in ("c.mp4", "a.mp4", "b.mp4"):
        put(folder, name, 100.0)
    assert names(outputs.listing()) == ["a.mp4", "b.mp4", "c.mp4"]


@pytest.mark.parametrize(
    ("file_type", "expected"),
    [
        ("video", ["a.mp4"]),
        ("image", ["b.png"]),
        ("audio", ["c.wav"]),
        ("text", []),
        (None, ["a.mp4", "b.png", "c.wav"]),
    ],
)
def test_one_type_can_be_listed(folder: Path, outputs: Outputs, file_type: str | None, expected: list[str]) -> None:
    for name in ("a.mp4", "b.png", "c.wav", "d.txt"):
        put(folder, name, 100.0)
    assert names(outputs.listing(file_type)) == expected


def test_an_entry_tells_what_the_file_is(folder: Path, outputs: Outputs) -> None:
    put(folder, "a.PNG", 1000.5, b"12345")
    assert outputs.listing() == (Entry("a.PNG", "image", 5, 1000.5, 1000.5),)


def test_a_file_is_never_created_after_it_was_modified(folder: Path, outputs: Outputs) -> None:
    put(folder, "future.png", time.time() + 86_400)
    entry = outputs.listing()[0]
    assert entry.created_at < entry.modified_at


def test_only_regular_media_files_are_listed(folder: Path, outputs: Outputs, tmp_path: Path) -> None:
    put(folder, "real.mp4")
    for name in (".hidden.mp4", ".real2.mp4.part", "notes.txt", "no-suffix", "mp4", "new\nline.mp4", "back\\slash.mp4"):
        put(folder, name)
    (folder / "folder.mp4").mkdir()
    (folder / "link.mp4").symlink_to(put(tmp_path, "secret.mp4"))
    os.mkfifo(folder / "pipe.mp4")
    assert names(outputs.listing()) == ["real.mp4"]


def test_a_name_that_is_not_utf8_is_not_listed(folder: Path, outputs: Outputs) -> None:
    put(folder, os.fsdecode(b"caf\xe9.mp4"))
    assert outputs.listing() == ()


def test_everything_listed_can_be_found(folder: Path, outputs: Outputs) -> None:
    for name in ("plain.mp4", "with space.png", "ünï 猫 😀.webp", "50%2f.mp4", "narrow\u202fspace.png", "a'b\"c.wav"):
        put(folder, name)
    assert len(outputs.listing()) == 6
    assert all(found(outputs, entry.filename) == folder / entry.filename for entry in outputs.listing())


def test_a_missing_folder_is_no_empty_one(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "none", tmp_path / "cache")
    with pytest.raises(FileNotFoundError):
        outputs.listing()
    assert not outputs.fresh()
    (tmp_path / "none").mkdir()
    put(tmp_path / "none", "a.mp4")
    assert names(outputs.listing()) == ["a.mp4"]


def test_nothing_is_fresh_before_the_first_listing(folder: Path, outputs: Outputs) -> None:
    settle(folder)
    assert not outputs.fresh()


def test_a_folder_at_rest_is_answered_from_memory(
    folder: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.mp4")
    settle(folder)
    first = outputs.listing()
    monkeypatch.setattr(os, "scandir", None)
    assert outputs.fresh()
    assert outputs.listing() is first


@pytest.mark.parametrize("change", ["add", "remove", "rename", "replace"])
def test_a_change_of_the_folder_is_seen(folder: Path, outputs: Outputs, change: str) -> None:
    old = put(folder, "a.mp4")
    settle(folder)
    outputs.listing()
    if change == "add":
        put(folder, "b.mp4", 10.0)
    elif change == "remove":
        old.unlink()
    elif change == "rename":
        old.rename(folder / "b.mp4")
    else:
        put(folder, ".b.part", data=b"longer").rename(old)
    assert not outputs.fresh()
    sizes = {entry.filename: entry.size_bytes for entry in outputs.listing()}
    assert (
        sizes
        == {"add": {"a.mp4": 1, "b.mp4": 1}, "remove": {}, "rename": {"b.mp4": 1}, "replace": {"a.mp4": 6}}[change]
    )


def test_a_change_that_leaves_the_time_stamp_as_it_was_is_not_lost(folder: Path, outputs: Outputs) -> None:
    put(folder, "a.mp4")
    stamp = folder.stat().st_mtime_ns
    outputs.listing()
    put(folder, "b.mp4")
    os.utime(folder, ns=(stamp, stamp))  # what a change within one tick of the clock looks like
    assert len(outputs.listing()) == 2


def test_a_file_that_grows_is_followed(folder: Path, outputs: Outputs) -> None:
    growing = put(folder, "copy.mp4", time.time())
    settle(folder)
    assert outputs.listing()[0].size_bytes == 1
    growing.write_bytes(b"x" * 100)
    settle(folder)
    assert outputs.listing()[0].size_bytes == 100


def test_a_file_overwritten_in_place_is_seen_in_the_end(
    folder: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.mp4")
    settle(folder)
    outputs.listing()
    put(folder, "a.mp4", data=b"other bytes")
    settle(folder)
    later = time.monotonic() + 31
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert outputs.listing()[0].size_bytes == 11


def test_a_file_from_the_future_does_not_keep_the_folder_busy(folder: Path, outputs: Outputs) -> None:
    put(folder, "a.mp4", time.time() + 86_400)
    settle(folder)
    outputs.listing()
    assert outputs.fresh()


def test_a_file_that_vanishes_during_the_reading_is_left_out(
    folder: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "stays.mp4")
    put(folder, "goes.mp4")
    scan = os.scandir

    class Vanishing:
        """A scan whose files are deleted between their names and their stats."""

        def __init__(self, path: Path) -> None:
            with scan(path) as items:
                self.items = list(items)
            (folder / "goes.mp4").unlink(missing_ok=True)

        def __enter__(self) -> "Iterator[os.DirEntry[str]]":
            return iter(self.items)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(os, "scandir", Vanishing)
    assert names(outputs.listing()) == ["stays.mp4"]


def test_callers_that_wait_for_a_reading_share_the_next_one(
    folder: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(folder, "a.mp4")
    scan, clock, all_asked, asked, scans = os.scandir, time.monotonic, threading.Event(), [], []

    def counting_clock() -> float:
        asked.append(clock())
        if len(asked) >= 10:  # nine callers, and the one reading that the first has begun
            all_asked.set()
        return asked[-1]

    def waiting_scan(path: Path) -> object:
        scans.append(path)
        assert all_asked.wait(60)
        return scan(path)

    monkeypatch.setattr(os, "scandir", waiting_scan)
    monkeypatch.setattr(time, "monotonic", counting_clock)
    with ThreadPoolExecutor(9) as pool:
        answers = [pool.submit(outputs.listing) for _ in range(9)]
    assert all(names(answer.result()) == ["a.mp4"] for answer in answers)
    assert len(scans) == 2


# ----------------------------------------------------------------------------------------------------- hostile names

HOSTILE = [
    "",
    ".",
    "..",
    "...",
    "/",
    "\\",
    ".mp4",
    "..mp4",
    ".hidden.mp4",
    ".a.mp4.part",
    "a.mp4.part",
    "a.mp4\0",
    "\0a.mp4",
    "a\0.mp4",
    "../secret.mp4",
    "..\\secret.mp4",
    "./a.mp4",
    "sub/b.mp4",
    "sub\\b.mp4",
    "sub//../a.mp4",
    "/etc/passwd",
    "/dev/zero",
    "//a.mp4",
    "a.mp4/",
    "a.mp4/.",
    "a.mp4/..",
    "a.mp4\n",
    "a.mp4 ",
    "a.mp4.",
    "..%2fsecret.mp4",
    "%2e%2e%2fsecret.mp4",
    "..%5csecret.mp4",
    "%2fetc%2fpasswd",
    "a%00.mp4",
    "..\u2215secret.mp4",
    "\uff0e\uff0e\uff0fsecret.mp4",
    "\ud800.mp4",
    "\udcff.mp4",
    "CON",
    "NUL",
    "con.mp4",
    "nul.mp4",
    "COM1.mp4",
    "a.mp4:stream",
    "a.mp4::$DATA",
    "C:a.mp4",
    "C:\\a.mp4",
    "~/a.mp4",
    "~root",
    "a.txt",
    "a",
    "wangpd.toml",
    "x" * 300 + ".mp4",
    "x" * 100_000 + ".mp4",
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:40])
def test_a_hostile_name_finds_nothing(folder: Path, outputs: Outputs, tmp_path: Path, name: str) -> None:
    put(folder, "a.mp4")
    put(folder, ".hidden.mp4")
    put(folder, "a.txt")
    put(folder, "a")
    (folder / "sub").mkdir()
    put(folder / "sub", "b.mp4")
    put(tmp_path, "secret.mp4")
    assert outputs.find(name) is None


@given(name=st.text(st.characters(categories=None) | st.sampled_from("./\\\0%"), max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_name_raises_or_leads_out_of_the_folder(folder: Path, outputs: Outputs, name: str) -> None:
    for candidate in (name, f"{name}.mp4", f"../{name}.mp4"):
        path = found(outputs, candidate)
        assert path is None or path.parent == folder


def test_a_media_file_is_found_whatever_the_case_of_its_suffix(folder: Path, outputs: Outputs) -> None:
    for name in ("a.mp4", "b.MP4", "c.JpEg"):
        assert outputs.find(name) is None
        assert found(outputs, put(folder, name).name) == folder / name


@pytest.mark.parametrize("target", ["inside", "outside", "loop", "nowhere"])
def test_a_symbolic_link_finds_nothing(folder: Path, outputs: Outputs, tmp_path: Path, target: str) -> None:
    put(folder, "inside.mp4")
    put(tmp_path, "outside.mp4")
    aims = {"inside": folder / "inside.mp4", "outside": tmp_path / "outside.mp4", "loop": folder / "link.mp4"}
    (folder / "link.mp4").symlink_to(aims.get(target, tmp_path / "nowhere"))
    assert outputs.find("link.mp4") is None


@pytest.mark.usefixtures("short_socket_folder")
def test_folders_pipes_and_sockets_find_nothing(folder: Path, outputs: Outputs) -> None:
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.mp4")
        assert [outputs.find(name) for name in ("folder.mp4", "pipe.mp4", "socket.mp4")] == [None, None, None]


# ------------------------------------------------------------------------------------------------------- thumbnails


def shown(outputs: Outputs, path: Path, width: int) -> bytes:
    """The JPEG that a client would get."""
    with path.open("rb") as file:
        thumbnail = outputs.thumbnail(file, width)
    with thumbnail:
        return thumbnail.read()


def test_a_thumbnail_is_decoded_once(folder: Path, outputs: Outputs, decoded: list[str]) -> None:
    path = picture(folder, "a.png")
    assert shown(outputs, path, 64) == shown(outputs, path, 64)
    assert decoded == ["a.png"]


def test_thumbnails_outlive_the_process(folder: Path, outputs: Outputs, tmp_path: Path, decoded: list[str]) -> None:
    path = picture(folder, "a.png")
    shown(outputs, path, 64)
    shown(Outputs(folder, tmp_path / "cache"), path, 64)
    assert decoded == ["a.png"]


def test_each_width_has_its_own_thumbnail(folder: Path, outputs: Outputs) -> None:
    path = picture(folder, "a.png")
    assert shown(outputs, path, 64) != shown(outputs, path, 128)


def test_each_file_has_its_own_thumbnail(folder: Path, outputs: Outputs, decoded: list[str]) -> None:
    for name in ("a.png", "b.png"):
        os.utime(picture(folder, name), (100, 100))
        shown(outputs, folder / name, 64)
    assert decoded == ["a.png", "b.png"]


def test_a_changed_file_has_a_new_thumbnail(folder: Path, outputs: Outputs, decoded: list[str]) -> None:
    path = picture(folder, "a.png")
    os.utime(path, (100, 100))
    shown(outputs, path, 64)
    os.utime(path, (101, 101))
    shown(outputs, path, 64)
    assert len(decoded) == 2


def test_a_file_with_no_picture_leaves_nothing_in_the_cache(folder: Path, outputs: Outputs, tmp_path: Path) -> None:
    with pytest.raises(media.NoPreview):
        shown(outputs, put(folder, "a.wav"), 64)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("successor", ["another picture", "a link", "nothing"])
def test_the_thumbnail_is_of_the_file_that_was_opened(folder: Path, outputs: Outputs, successor: str) -> None:
    path = picture(folder, "a.png")
    whole = shown(outputs, path, 64)
    with path.open("rb") as file:
        path.unlink()
        if successor == "another picture":
            Image.new("RGB", (300, 200), "blue").save(path)
        elif successor == "a link":
            path.symlink_to("/etc/passwd")
        thumbnail = outputs.thumbnail(file, 64)
    with thumbnail:
        assert thumbnail.read() == whole


def test_a_cache_that_cannot_be_written_costs_only_time(folder: Path, tmp_path: Path, decoded: list[str]) -> None:
    outputs = Outputs(folder, put(tmp_path, "a-file"))
    path = picture(folder, "a.png")
    assert shown(outputs, path, 64) == shown(outputs, path, 64)
    assert len(decoded) == 2


def test_a_thumbnail_lost_to_a_power_cut_is_made_again(folder: Path, outputs: Outputs, tmp_path: Path) -> None:
    path = picture(folder, "a.png")
    whole = shown(outputs, path, 64)
    for file in (tmp_path / "cache" / "thumbnails").iterdir():
        file.write_bytes(b"")
    assert shown(outputs, path, 64) == whole


def test_many_threads_may_ask_for_the_same_thumbnail(folder: Path, outputs: Outputs, tmp_path: Path) -> None:
    path = picture(folder, "a.png")
    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(lambda _: shown(outputs, path, 64), range(32)))
    assert len(answers) == 1
    assert [file.suffix for file in (tmp_path / "cache" / "thumbnails").iterdir()] == [".jpg"]


def test_the_cache_stays_within_its_limit_and_drops_the_oldest(tmp_path: Path) -> None:
    cache = ThumbnailCache(tmp_path, limit_bytes=1000)
    for number in range(30):
        cache.put(f"k{number}", bytes([number + 1]) * 100)
        os.utime(tmp_path / f"k{number}.jpg", (number, number))
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1000
    assert cache.get("k0") is None
    newest = cache.get("k29")
    assert newest and newest.read() == bytes([30]) * 100
    newest.close()


def test_a_cache_within_its_limit_drops_nothing(tmp_path: Path) -> None:
    cache = ThumbnailCache(tmp_path, limit_bytes=1000)
    for number in range(10):
        cache.put(f"k{number}", b"x" * 100)
    assert len(list(tmp_path.iterdir())) == 10


def test_what_an_earlier_process_left_counts_towards_the_limit(tmp_path: Path) -> None:
    for number in range(20):
        put(tmp_path, f"old{number}.jpg", 100.0 + number, b"x" * 100)
    ThumbnailCache(tmp_path, limit_bytes=1000).put("new", b"x" * 100)
    kept = {file.name for file in tmp_path.iterdir()}
    assert "new.jpg" in kept
    assert "old0.jpg" not in kept
    assert len(kept) == 7


# -------------------------------------------------------------------------------------------------- broken attempts


def test_a_broken_attempt_leaves_nothing(folder: Path, outputs: Outputs) -> None:
    for name in (
        "20261122-210533_t000123-000000_a-cat_s42.mp4",
        "20261122-210533_t000123-000000_untitled_s43.png",
        ".20261122-210533_t000123-000000_a-cat_s44.mp4.part",
    ):
        put(folder, name)
    assert outputs.remove_attempt(123) == 3
    assert list(folder.iterdir()) == []


def test_of_a_broken_attempt_the_files_that_it_has_made_stay(folder: Path, outputs: Outputs) -> None:
    made = ["20261122-210533_t000123-000000_a-cat_s42.mp4", "20261122-210533_t000123-000000_a.cat_s43.mp4"]
    for name in (*made, f".{made[0]}.part", "20261122-210533_t000123-000000_a-cat_s43.mp4"):
        put(folder, name)
    assert outputs.remove_attempt(123, made) == 2
    assert sorted(path.name for path in folder.iterdir()) == made


def test_a_file_of_a_broken_attempt_that_can_not_be_deleted_does_not_keep_the_others(
    folder: Path, outputs: Outputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"20261122-210533_t000123-000000_a-cat_s{seed}.mp4" for seed in range(3)]
    for name in names:
        put(folder, name)
    unlink = Path.unlink

    def refuse(path: Path, **options: bool) -> None:
        if path.name == names[1]:
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(PermissionError):
        outputs.remove_attempt(123)
    assert [path.name for path in folder.iterdir()] == [names[1]]


def test_the_files_of_others_stay(folder: Path, outputs: Outputs) -> None:
    others = {
        "20261122-210533_t000124-000000_a-cat_s42.mp4",
        "20261122-210533_t1000123-000000_a-cat_s42.mp4",
        "20261122-210533_t000012-000000_t000123-000000_s42.mp4",
        ".20261122-210533_t000124-000000_a-cat_s42.mp4.part",
        "20261122-210533_t000123-1f3a9c_of-another-daemon_s42.mp4",
        ".20261122-210533_t000123-1f3a9c_of-another-daemon_s42.mp4.part",
        "20261122-210533_t000123_of-an-older-version_s42.mp4",
        "20261122-210533_t000123-000000.mp4",
        "trip_t000123_.mp4",
        "video_001.mp4",
    }
    for name in others:
        put(folder, name)
    assert outputs.remove_attempt(123) == 0
    assert {path.name for path in folder.iterdir()} == others


def test_removing_an_attempt_from_a_missing_folder_is_nothing(tmp_path: Path) -> None:
    assert Outputs(tmp_path / "none", tmp_path / "cache").remove_attempt(1) == 0


def test_a_state_folder_that_can_not_be_read_is_a_reason_and_no_fault(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its disk may fail while a task ends, which must not lose the task."""

    def scandir(_: object) -> None:
        raise OSError(5, "Input/output error")

    (tmp_path / "state").mkdir()
    outputs = Outputs(folder, tmp_path / "state")
    assert outputs.publish_kept(["a.mp4"]) == ""
    monkeypatch.setattr(os, "scandir", scandir)
    for names in (None, ["a.mp4"]):
        assert outputs.publish_kept(names) == "state_path can't be used now; bring the folder back"
