"""What `make demo` and `make demo-all` run, and the embedded scenes that they make."""
