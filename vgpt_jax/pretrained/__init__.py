"""Weights that others trained: readers of their files, a table for each format, one strict loader."""
