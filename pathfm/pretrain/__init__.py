"""Stage 2: tile stores to an encoder."""

VERSION = 2
"""Raised whenever the same tiles and settings give another encoder; part of the fingerprint."""
