"""`make demo`: eight jobs, from a file to the table of what became of them."""
