from senet.system.text_table import text_table


def test_a_table_is_as_wide_as_its_cells_and_its_cells_are_no_markup():
    rows = [("layer1.[bold]0", "7", ":smile:"), ("x" * 300, "1,024", "✓")]
    lines = text_table(("gate", "size", "fate"), rows, right=("size",)).splitlines()
    assert lines == [
        f"{'gate':300}   size  fate",
        "-" * 313,
        f"{'layer1.[bold]0':300}      7  :smile:",
        f"{'x' * 300}  1,024  ✓",
    ]


def test_a_table_may_have_no_rows():
    assert text_table(("gate", "size"), [], right=()).splitlines() == ["gate  size", "----------"]
