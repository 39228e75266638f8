"""Many settings of one recipe over one model: what each weighs, and what it is worth."""
