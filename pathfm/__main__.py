"""``python -m pathfm`` is the command ``pathfm``."""

from pathfm.cli import main

main()
