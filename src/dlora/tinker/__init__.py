"""The Tinker SDK's interface on the edge's loopback, over the split model."""
