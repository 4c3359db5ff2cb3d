"""Integrations with the loading and saving of other libraries."""
