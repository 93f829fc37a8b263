"""The GPU campaign: steps, report, and searches for configurations."""
