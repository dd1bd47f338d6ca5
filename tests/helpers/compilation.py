"""Networks that the commands compile, as by default; most tests run them uncompiled (``conftest.py``)."""

import pytest

from senet.acceleration import use


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that reach the backend ``senet``, which runs them as they are."""
    captured = []

    def keep(graph, example_inputs, **_):
        captured.append(graph)
        return graph.forward

    monkeypatch.delenv(use.VARIABLE)
    monkeypatch.setitem(use.HOW, "senet", keep)
    monkeypatch.setattr(use, "_said", set())
    return captured
