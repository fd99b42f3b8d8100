"""Stage 3: tiles and an encoder to features."""
