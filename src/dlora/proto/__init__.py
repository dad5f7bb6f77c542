"""The wire as generated from dlora.proto by `make stubs`."""
