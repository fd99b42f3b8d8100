"""Stage 5: everything the other stages left on disk -> one page to read, and its key numbers as JSON."""
