"""The command line: one thin module per command that parses, calls one function, and prints."""
