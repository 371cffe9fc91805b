"""Serves judges over HTTP, with a page to try them out."""
