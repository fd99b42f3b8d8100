"""Speed and memory figures, printed; nothing here asserts on time."""
