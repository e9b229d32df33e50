"""Damaged files for everything that reads files. Mirrors nothing in src/: one table of readers, one promise.

`python -m benchmarks.fuzz` gives the same readers thousands of inputs, and prints a table.
"""
