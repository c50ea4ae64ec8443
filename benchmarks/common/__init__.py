"""What benchmarks share, and parts of them that run nothing by themselves."""
