"""Pages about runs, stores and students: what they hold, what came out, and by what command."""
