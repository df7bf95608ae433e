"""Scripts that print the numbers README and LOG.md quote."""
