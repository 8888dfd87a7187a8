"""Classes that live in other libraries' worlds."""
