"""Folds, metrics and intervals: pure numbers, no torch."""
