"""Conversations: records, templates, rows."""
