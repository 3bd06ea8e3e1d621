"""Experiment records, as people use them: one module a command (or a few that belong together)."""
