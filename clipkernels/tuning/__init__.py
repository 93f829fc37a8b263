"""Tuning: the plan of a tower that costs least and keeps a budget."""
