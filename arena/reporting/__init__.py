"""Reporting: tables and figures about runs."""
