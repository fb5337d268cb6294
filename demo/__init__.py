"""The demonstration: a tiny model of the real classes, real photographs, and one script that walks the whole way."""
