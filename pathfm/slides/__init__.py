"""Glass in: every kind of slide behind one reader protocol."""
