"""Small weights beside frozen ones."""
