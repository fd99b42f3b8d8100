"""Stage 4: features and labels to a slide classifier."""
