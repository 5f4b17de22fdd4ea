"""The command line: its options, previews, progress and profile."""
