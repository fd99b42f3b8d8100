"""Bag -> slide vector: one small interface (``contract``), one file per idea."""
