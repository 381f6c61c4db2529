"""Workers that die or stall in the midst of everything, and what must be true all the same."""
