"""What is claimed about the runs, as commands that anyone can run again."""
