"""Pictures and tokens: sources -> transforms -> loader, and the token cache. Imports no model.

A source is random access to examples: ``len(source)``, ``source[i] -> {"image": uint8 [H, W, 3], "label": int}``, with
``source.class_names``, a tuple of strings in the order of the labels, and ``source.identity``, which differs where the
examples do.
It is read by several threads at once.
"""
