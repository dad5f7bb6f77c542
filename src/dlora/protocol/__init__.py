"""What both halves agree on: tensors on the wire, sites, layers, files."""
