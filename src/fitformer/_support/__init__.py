"""Helpers that every room may use. They know neither models nor data."""
