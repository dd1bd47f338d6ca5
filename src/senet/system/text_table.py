"""Tables as plain text, for ``str(report)``."""

import io
from collections.abc import Iterable, Sequence


def text_table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str]) -> str:
    """A table as wide as its cells, with a rule below the header; the columns in ``right`` are right-justified."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table, right = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False), set(right)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))  # Text, because names may look like markup
    console = Console(file=io.StringIO(), width=100_000, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    head, *body = (line.rstrip() for line in captured.get().splitlines())
    return "\n".join([head, "-" * len(head), *body])
