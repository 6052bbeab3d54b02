"""The commands of `make demo` and `make demo-all`, and the embedded scenes that they make."""
