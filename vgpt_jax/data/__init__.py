"""Pictures and tokens: sources -> transforms -> loader, and the token cache. Imports no model.

A source is random access to examples: ``len(source)``, ``source[i] -> {"image": uint8 [H, W, 3], "label": int}``, and
``source.class_names``, a tuple of strings in the order of the labels.
"""
