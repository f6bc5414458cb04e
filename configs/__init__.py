"""Configurations. ``default.py`` names every field; the others are deltas from it."""
