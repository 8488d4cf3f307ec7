"""The command line: options in, a report out; no arithmetic here."""
