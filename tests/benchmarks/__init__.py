"""The figures that the README promises: `make bench`, or `make bench ROWS="claim launch"`."""
