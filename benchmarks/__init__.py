"""Speed, memory and fidelity figures, printed and saved; nothing here asserts on time.

Every machine is noisy, so rivals do the same piece of work one right after the other, many times, and what counts is the
median of the ratios within one run; CPU milliseconds are told beside it.
"""
