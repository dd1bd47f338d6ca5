"""What a message must name, in this order: the value, the place, the remedy. "…" stands for any words between them."""

import re


def _named(named):
    return ".*".join(re.escape(part.strip()) for part in named.split("…"))


def one_line(named):
    """For ``pytest.raises(match=…)``: the message is one line, and names these."""
    return rf"\A(?!(?s:.*)\n).*{_named(named)}"


def assert_said(text, named):
    """Printed somewhere, at whatever width of the terminal."""
    words = " ".join(text.split())
    assert re.search(_named(named), words), f"{named!r} is not in {words!r}"
