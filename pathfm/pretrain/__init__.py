"""Stage 2: tile stores to an encoder."""
