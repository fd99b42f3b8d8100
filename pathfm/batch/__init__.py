"""The night batch: slides that arrive in a folder, through a locked bundle, unattended. Specified in ``docs/hospital.md``."""
