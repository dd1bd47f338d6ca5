"""Files are written whole or not at all, and what a killed process leaves does not stay."""

import os
import socket
import stat
import subprocess
import sys
import threading
import time

import pytest

from senet.system.atomic import remove_leftovers, replacing, temporary_folder, write_atomically


def test_a_file_has_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a" / "file", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "file").stat().st_mode) == 0o640
    assert (tmp_path / "a" / "file").read_bytes() == b"content"


def test_the_umask_of_other_threads_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask belongs to the whole process"))
    writers = [threading.Thread(target=write_atomically, args=(tmp_path / str(n), b"x" * n)) for n in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [(tmp_path / str(n)).stat().st_size for n in range(8)] == list(range(8))


@pytest.mark.parametrize("name", ["file", "n" * 250])
def test_what_goes_wrong_leaves_the_old_content_and_nothing_else(tmp_path, name):
    path = tmp_path / name

    def half_of_it(error):
        with replacing(path) as file:
            file.write(b"half")
            raise error

    write_atomically(path, b"old")
    with pytest.raises(OSError, match="No space") as caught:
        half_of_it(OSError(28, "No space left on device"))
    assert caught.value.filename == str(path)
    with pytest.raises(KeyboardInterrupt):
        half_of_it(KeyboardInterrupt())
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [name]


def leftover(folder, process, host=None, seconds=0.0):
    host = host or socket.gethostname().replace(".", "_")
    path = folder / f".senet.{host}.{process}.{int(seconds):08x}.tmp"
    path.write_bytes(b"half")
    os.utime(path, (time.time() - seconds,) * 2)
    return path


def test_leftovers_of_dead_processes_go_and_others_stay(tmp_path):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    gone = [
        leftover(tmp_path, int(dead.stdout)),
        leftover(tmp_path, os.getpid()),  # of a process before this one, in a container say
        leftover(tmp_path, os.getppid(), seconds=90_000),
        leftover(tmp_path, 1, host="elsewhere", seconds=90_000),
    ]
    stays = [leftover(tmp_path, os.getppid()), leftover(tmp_path, 1, host="elsewhere"), tmp_path / ".senet.mine.tmp"]
    stays[-1].write_text("a user's")
    with replacing(tmp_path / "now") as file:
        file.write(b"being written")
        before = set(tmp_path.iterdir())
        remove_leftovers(tmp_path)
        assert before - set(tmp_path.iterdir()) <= set(gone)  # the first write of a process has taken most away
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stays)
    assert (tmp_path / "now").read_bytes() == b"being written"


def test_a_temporary_folder_of_a_killed_process_goes_at_the_next_write(tmp_path):
    code = "import os, sys; from pathlib import Path; from senet.system.atomic import temporary_folder\n"
    code += "with temporary_folder(Path(sys.argv[1])) as folder: (folder / 'a').touch(); os._exit(9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert len(os.listdir(tmp_path)) == 1
    with temporary_folder(tmp_path) as folder:
        assert os.listdir(tmp_path) == [folder.name]
    assert os.listdir(tmp_path) == []
