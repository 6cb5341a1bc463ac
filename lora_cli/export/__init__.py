"""Merge, combine, export and upload trained adapters."""
