"""What a corpus holds: sizes, languages, duplicates, evaluation sets and personal data in it."""
