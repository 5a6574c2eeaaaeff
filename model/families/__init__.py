"""Families of models elsewhere: the names of their weights and options, a file for each."""
