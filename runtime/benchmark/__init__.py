"""How fast and how steady the backends are."""
