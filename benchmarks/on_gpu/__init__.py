"""The blocks of `benchmarks.gpu`. They import nothing that a bare machine with torch and triton lacks."""
