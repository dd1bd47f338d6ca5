"""The folder of what can be made again: where the user, the system or nobody says so."""

import os
import pwd
import sys
import tempfile

import pytest

from senet.errors import InputError
from senet.system.cache import cache_folder


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    for name in ("SENET_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def unknown(user):
        raise KeyError(user)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    return monkeypatch


def test_the_users_word_comes_first_then_the_systems(homeless, tmp_path):
    homeless.setenv("HOME", str(tmp_path / "home"))
    usual = cache_folder()
    assert tmp_path / "home" in usual.parents
    if sys.platform == "linux":
        assert usual == tmp_path / "home" / ".cache" / "senet"
    homeless.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "senet"
    homeless.setenv("SENET_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.mark.parametrize("home", [None, "somewhere"])
def test_a_user_without_a_home_has_a_private_folder_among_the_temporary_files(homeless, tmp_path, home):
    if home is not None:
        homeless.setenv("HOME", home)
    folder = cache_folder()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert cache_folder() == folder


@pytest.mark.parametrize("below", ["a file", "a folder that cannot be written"])
def test_a_home_that_cannot_be_used_is_no_home(homeless, tmp_path, below):
    home = tmp_path / "home"
    if below == "a file":
        home.write_text("")
    else:
        home.mkdir()
        homeless.setattr(os, "access", lambda path, mode: os.fspath(path) != str(home))  # root may write everywhere
    homeless.setenv("HOME", str(home))
    assert cache_folder().parent == tmp_path


@pytest.mark.skipif(os.name != "posix", reason="rights are POSIX's")
@pytest.mark.parametrize("trap", ["others may write", "a link", "a file", "another owner"])
def test_a_temporary_folder_that_others_could_fill_is_refused(homeless, tmp_path, trap):
    path = tmp_path / f"senet-{os.getuid()}"
    if trap == "others may write":
        path.mkdir()
        path.chmod(0o777)
    elif trap == "a link":
        (tmp_path / "elsewhere").mkdir()
        path.symlink_to("elsewhere")
    elif trap == "a file":
        path.write_text("")
    else:
        path.mkdir(mode=0o700)
        owner = os.getuid() + 1
        homeless.setattr(os, "getuid", lambda: owner)
        path.rename(tmp_path / f"senet-{owner}")
    with pytest.raises(InputError, match="SENET_CACHE"):
        cache_folder()
