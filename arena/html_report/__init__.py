"""One HTML file about a finished run."""
