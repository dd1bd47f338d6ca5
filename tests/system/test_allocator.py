"""Freed memory that stays with the process, and who is left alone."""

import ctypes
import subprocess
import sys

import pytest

import senet
from senet.system import allocator

PROGRAM = """
import resource, sys
import torch
import senet

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
ordinary = faults()
print(senet.keep_freed_memory(), end=" ")
faults()
print(faults() < ordinary / 4)
"""
# of mallopt(3) and of glibc's manual, "Memory Allocation Tunables"
CHOICES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="no glibc"
)


@needs_glibc
def test_memory_that_is_kept_costs_no_page_faults(monkeypatch):
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "True"]


@pytest.mark.parametrize("name", CHOICES)
def test_a_user_who_has_chosen_is_left_alone(monkeypatch, name):
    for other in CHOICES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "131072")
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("asked the C library"))
    assert senet.keep_freed_memory() is False


def test_other_c_libraries_are_left_alone(monkeypatch):
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert senet.keep_freed_memory() is False
    monkeypatch.setattr(allocator.sys, "platform", "darwin")
    assert senet.keep_freed_memory() is False
