"""Benchmarks that anyone can run on their machine; each writes a file with command, machine, versions and figures."""
