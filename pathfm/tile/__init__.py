"""Stage 1: slides to tile stores."""
