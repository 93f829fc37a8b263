"""Artefacts: folders with a host's own checkpoint and, beside it, the method that its tower runs."""
