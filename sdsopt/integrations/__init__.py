"""Plugs for training frameworks, one file each. A framework is imported with its file, and not before."""
