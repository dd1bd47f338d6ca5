"""The C++ library: its sources, how it is compiled, which prebuilt forms there are."""
