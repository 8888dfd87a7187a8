"""Recipes: finding, overriding, checking, resolving. `recipes` needs no torch."""
