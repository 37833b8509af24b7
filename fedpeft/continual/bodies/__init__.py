"""Bodies: how parameters move while tasks keep arriving, one file each."""
