"""Results in files: whole or not at all, wherever they are to be."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shoal.cli.result_file import write_result
from shoal.core.errors import ConfigError
from shoal.core.whole_file import write_whole


def names_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_new_file_is_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    write_whole(tmp_path / "new", "a \u00e9\n")
    assert (tmp_path / "new").read_bytes() == "a \u00e9\n".encode()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert names_in(tmp_path) == ["new", "plain"]


def test_what_was_there_keeps_its_mode_and_its_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "plan.yaml", tmp_path / "plan.yaml"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to("far/plan.yaml")
    write_whole(link, "after")
    assert link.is_symlink() and target.read_text() == "after"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names_in(tmp_path / "far") == ["plan.yaml"]


def test_a_link_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("later")
    write_whole(tmp_path / "link", "a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "later").read_text() == "a"


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((os, "fsync", full) if at == "fsync" else (Path, "replace", full)))
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left .* another -o"):
        write_result(path, "after", "-o")
    assert path.read_text() == "before" and names_in(tmp_path) == ["plan.yaml"]


def test_what_somebody_left_behind_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / f".shoal-{os.getpid()}-0").write_text("half")
    write_whole(tmp_path / "plan.yaml", "whole")
    assert names_in(tmp_path) == [f".shoal-{os.getpid()}-0", "plan.yaml"]
    assert (tmp_path / "plan.yaml").read_text() == "whole"


def test_cancelled_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("before")

    def cancelled(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", cancelled)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "after")
    assert path.read_text() == "before" and names_in(tmp_path) == ["plan.yaml"]


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "a" * 200_000)
    reader.join()
    assert read == ["a" * 200_000] and stat.S_ISFIFO(pipe.stat().st_mode)


_WRITES = """
import sys
from pathlib import Path
from shoal.core.whole_file import write_whole
print("first", flush=True)
write_whole(Path(sys.argv[1]), "second\\n")
print("third", flush=True)
"""


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_goes_on(tmp_path: Path, name: str, to: str) -> None:
    command = [sys.executable, "-c", _WRITES, name]
    if to == "pipe":
        said = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    else:
        with (tmp_path / "out").open("wb") as file:
            subprocess.run(command, stdout=file, check=True)
        said = (tmp_path / "out").read_bytes()
    assert said == b"first\nsecond\nthird\n"


def test_where_nothing_can_be(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "file", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null"),
        (Path("/dev/full"), "No space left"),
    ):
        with pytest.raises(ConfigError, match=why):
            write_result(path, "a", "--html")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=r"loop|levels of symbolic links"):
        write_result(tmp_path / "loop", "a", "-o")


def test_what_is_not_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept"
    kept.write_text("before")
    kept.chmod(0o444)
    opened = os.open

    def refused(path: Path, flags: int, mode: int = 0o777) -> int:
        if path == kept:  # who runs tests may be root
            raise OSError(13, "Permission denied")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(ConfigError, match="Permission denied"):
        write_result(kept, "after", "-o")
    assert kept.read_text() == "before" and names_in(tmp_path) == ["kept"]


def test_a_folder_that_takes_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("before, and longer")

    def refused(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(Path, "replace", refused)
    write_whole(path, "after")
    assert path.read_text() == "after" and names_in(tmp_path) == ["plan.yaml"]


def test_what_utf_8_does_not_have_is_written_out(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "b\udcff")
    assert (tmp_path / "a").read_text() == "b\\udcff"
