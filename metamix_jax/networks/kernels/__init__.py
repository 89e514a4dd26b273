"""Products of layers, in the form that is fast on the platform at hand."""
