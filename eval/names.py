"""What the contestants that are always there are called, in records and beside them."""

MODEL, BASE = "model", "base"
TAKEN = (MODEL, BASE, "id", "prompt", "score")  # keys of a line in answers.jsonl, which no other contestant may have
