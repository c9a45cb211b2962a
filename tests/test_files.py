"""Files and folders are complete or absent; texts of the errors."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from s2quant.errors import UserError, VerificationError, shorten_list
from s2quant.files import (
    atomic_file,
    atomic_folder,
    check_new,
    disk_errors,
    read_json,
    read_text,
    sha256_file,
    sha256_text,
    side_by_side,
    write_json,
)
from s2quant.records import folder_hashes, git_commit, manifest, versions


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == sha256_text("abc") == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "manifest.json").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    assert folder_hashes(tmp_path) == {"a": hashlib.sha256(b"abc").hexdigest()}


def test_json_comes_back_in_order(tmp_path: Path) -> None:
    data = {"b": [1, 2.5, None, True], "a": {"text": "\u00e9\u4f60"}}
    write_json(tmp_path / "x.json", data)
    assert read_json(tmp_path / "x.json") == data
    assert list(read_json(tmp_path / "x.json")) == ["b", "a"]
    assert (tmp_path / "x.json").read_bytes().endswith(b"}\n")


@pytest.mark.parametrize("name", ["absent", "folder", "file/below", "n" * 300])
def test_unreadable_text(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError) as error:
        read_text(tmp_path / name)
    assert name in error.value.got


def test_atomic_folder(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new" / "deep" / "out") as folder:
        (folder / "a").write_text("x")
        assert not (tmp_path / "new" / "deep" / "out").exists()
    assert (tmp_path / "new" / "deep" / "out" / "a").read_text() == "x"
    assert os.listdir(tmp_path / "new" / "deep") == ["out"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("x"), UserError("a", "b", "c")])
def test_atomic_folder_and_file_leave_nothing(tmp_path: Path, failure: BaseException) -> None:
    def fail() -> None:
        raise failure

    with pytest.raises(type(failure)), atomic_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        fail()
    with pytest.raises(type(failure)), atomic_file(tmp_path / "out.wav") as file:
        file.write_text("half")
        fail()
    assert list(tmp_path.iterdir()) == []


def test_atomic_file_replaces_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_text("old")
    with pytest.raises(UserError, match="exists already"), atomic_file(path):
        pass
    with pytest.raises(ZeroDivisionError), atomic_file(path, overwrite=True) as file:
        file.write_text("half" * (1 // 0))
    assert path.read_text() == "old"
    with atomic_file(path, overwrite=True) as file:
        assert file.suffix == ".wav"
        file.write_text("new")
    assert path.read_text() == "new"
    with atomic_file(tmp_path / "new" / "y.wav", overwrite=True) as file:
        file.write_text("y")
    assert (tmp_path / "new" / "y.wav").read_text() == "y"


def test_long_names(tmp_path: Path) -> None:
    name = "\u00e9" * 120  # 240 bytes: a name may have 255
    with atomic_folder(tmp_path / name):
        pass
    with atomic_file(tmp_path / f"{name}.wav") as file:
        file.write_text("x")
    with pytest.raises(UserError, match="too long"):
        check_new(tmp_path / ("n" * 256))


def test_check_new_creates_nothing(tmp_path: Path) -> None:
    check_new(tmp_path / "a" / "b" / "c")
    assert list(tmp_path.iterdir()) == []


def test_check_new_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, fragment in (("file", "exists already"), ("dangling", "exists already"), ("file/x/y", "file is a file")):
        with pytest.raises(UserError, match=fragment):
            check_new(tmp_path / name)


def test_folder_without_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written"):
        check_new(tmp_path / "x" / "out")


@pytest.mark.parametrize(
    ("failure", "fragment"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "I/O error: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/from/codec.pth"), "/from/codec.pth: Permission denied"),
        (OSError("codec.pth could not be written whole"), "codec.pth could not be written whole"),
    ],
)
def test_full_disk_is_one_clear_message(tmp_path: Path, failure: Exception, fragment: str) -> None:
    with pytest.raises(UserError) as error, disk_errors(tmp_path / "out"):
        raise failure
    assert f"writing {tmp_path / 'out'} failed: {fragment}" in error.value.got
    assert "bytes free)" in error.value.got
    assert "nothing was left under the final name" in error.value.todo
    with pytest.raises(UserError, match="failed"), disk_errors(tmp_path / "gone" / "out"):
        raise failure


def test_error_texts() -> None:
    error = UserError("this", "that", "so")
    assert str(error) == "got: this\nexpected: that\ndo: so"
    failure = VerificationError("folder", ["one", "two"])
    assert str(failure) == "folder: 2 fault(s)\n  one\n  two"
    assert shorten_list([str(n) for n in range(25)]).splitlines()[-1] == "  ... and 5 more"
    assert len(shorten_list([str(n) for n in range(20)]).splitlines()) == 20


def test_manifest_names_what_can_move_a_number() -> None:
    record = manifest("quantize", {"model": {"a": "b"}}, "cpu", 3, num_tensors=5)
    assert record["stage"] == "quantize"
    assert (record["seed"], record["device"], record["num_tensors"]) == (3, "cpu", 5)
    assert record["versions"] == versions()
    assert record["versions"].keys() >= {"s2quant", "python", "torch", "gptqmodel", "safetensors", "tokenizers"}
    commit = git_commit()
    assert record["s2quant_commit"] == commit
    assert commit is None or len(commit.removesuffix("+dirty")) == 40


def test_side_by_side_keeps_the_order_and_raises_the_first_error() -> None:
    barrier = threading.Barrier(min(4, os.cpu_count() or 1))

    def work(item: int) -> int:
        if item < barrier.parties:
            barrier.wait(10)  # they run at the same time
        if item in (5, 7):
            raise UserError(f"item {item}", "another", "leave it out")
        return item * item

    assert side_by_side(work, range(5)) == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="item 5"):
        side_by_side(work, range(9))
    assert side_by_side(work, []) == []
