"""Files are complete or absent, with the permissions of the umask; errors name them."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from fitformer._support.atomic_files import write_atomically


def test_file_appears_complete_with_its_folder(tmp_path):
    path = tmp_path / "new/file.txt"
    with write_atomically(path) as scratch:
        scratch.write_text("all of it")
        assert not path.exists()
    assert path.read_text() == "all of it"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_failure_keeps_the_old_file(error, tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write():
        with write_atomically(path) as scratch:
            scratch.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_disk_error_names_the_file(tmp_path):
    path = tmp_path / "file.txt"
    with pytest.raises(OSError, match=r"No space left on device: '.*/file\.txt'"), write_atomically(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"directory: '.*/folder'$"), write_atomically(tmp_path / "folder"):
        pass
    other = FileNotFoundError(errno.ENOENT, "No such file", "another")
    with pytest.raises(FileNotFoundError, match="another"), write_atomically(path):
        raise other


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_follow_the_umask(tmp_path):
    with write_atomically(tmp_path / "weights") as scratch:
        save_file({"a": torch.zeros(1)}, scratch)
    (tmp_path / "plain").touch()
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not name open files")
def test_what_must_survive_a_power_cut_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), sync(file))[1])
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths))[1])
    for durable in (False, True):
        with write_atomically(tmp_path / "file", durable) as scratch:
            scratch.write_text("content")
    assert done == ["renamed", str(scratch), "renamed", str(tmp_path)]
