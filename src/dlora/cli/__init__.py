"""The command line: one module for a group of commands; the only place that prints."""
