"""The command line: `main` has the commands, the other files those of a group and what is printed."""
