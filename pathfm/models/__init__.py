"""Networks that more than one stage needs."""
