"""Configs: every key in `schema`, YAML files and overrides to a checked dict in `reader`."""
