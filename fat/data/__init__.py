"""Images: where they come from, how they are cut, and the four splits that a run needs."""
