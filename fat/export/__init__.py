"""Files that run in integers: one file per target, and the proof that they equal the student."""
