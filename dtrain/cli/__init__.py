"""The command line: one file per group of verbs, nothing heavy imported before a verb needs it."""
