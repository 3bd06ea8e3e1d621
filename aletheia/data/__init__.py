"""`aletheia data …`: a module a command."""
