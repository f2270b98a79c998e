"""How the tiny model is trained; nothing here is needed to load or use it."""
