"""Model architectures; attention and positions are passed in, and no process group is known here."""
