"""Every option of a run: types, checks, command line, DeepSpeed JSON. No torch here."""
