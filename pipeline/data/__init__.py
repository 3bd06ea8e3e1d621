"""Rows of data: where they come from, what shape they have, how they are split, kept and compared."""
