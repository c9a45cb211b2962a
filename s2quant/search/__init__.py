"""Which bits each linear should have: the damage of every choice measured, the best choice of a size found."""
