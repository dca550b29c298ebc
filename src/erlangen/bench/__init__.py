"""Benchmarks that anyone can run; and timing and the CSV schema (`record`), which those in ``benchmarks/`` use too."""
