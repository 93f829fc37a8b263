"""The GPU campaign: its steps, its report, and the searches beside it."""
