"""Tasks of meta learning: the rows of a user, an item or an advertisement, each with a support and a query set."""
